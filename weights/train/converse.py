"""Lets a Transformer talk with itself: conversations as training text, in its own words.

    python converse.py --model TEACHER --out DATA/train-teacher.npz --rows 2048 --length 1024 \\
        --prompts train-chat.jsonl.xz

All rows are decoded together. A conversation begins with a prompt (topics below, or first messages of
--prompts, or nothing but the opening of a user's message, which the model then writes itself), goes on
for some turns and makes way for the next one. Writes the same kind of file as adapt_data.py.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import ops
from adapt_data import SYSTEM
from corpus import END_OF_TEXT, IM_END, IM_START, open_text
from model import linear, load, rope_frequencies

LONGEST_PROMPT = 96                             # tokens
REQUESTS = (
    "Explain {} to a child.", "What is {}?", "Tell me something interesting about {}.", "Give me three tips about {}.",
    "Write a short poem about {}.", "Write a short story about {}.", "Why do people care about {}?",
    "List five words related to {}.", "Summarise what you know about {} in two sentences.", "How does one begin with {}?",
    "Write an email to a friend about {}.", "What are the pros and cons of {}?", "I want to learn about {}. Can you help?",
    "What is a common mistake with {}?", "Rewrite this sentence to be more formal: I really like {}.",
    "Ask me a question about {}.", "Who should I talk to about {}?", "Give a title for an article about {}.",
    "Correct the spelling: I wuld like to no more abuot {}.", "Describe {} in one paragraph.",
)
TOPICS = (
    "gardening", "the moon", "bread baking", "volcanoes", "chess", "bicycles", "rainbows", "the human heart", "jazz", "bees",
    "saving money", "sleep", "ancient Rome", "whales", "tea", "job interviews", "stars", "recycling", "the ocean", "dogs",
    "learning a language", "mathematics", "friendship", "trains", "painting", "football", "coffee", "climate", "honesty",
    "photography", "mountains", "computers", "cooking pasta", "libraries", "winter", "the guitar", "healthy food", "birds",
    "travelling by bus", "maps", "electricity", "dinosaurs", "public speaking", "rice", "the desert", "time management",
    "writing letters", "swimming", "clouds", "history", "robots", "museums", "good manners", "camping", "vaccines",
    "the Olympic Games", "islands", "democracy", "trees", "small businesses", "birthdays", "news papers", "science",
)
GREETINGS = ("Hi!", "Hello, how are you?", "Good morning!", "Hey, what can you do?", "Who are you?", "Thanks for your help.",
             "Can you help me with something?", "I am bored. What should I do?", "What is your name?", "Tell me a joke.")


def first_messages(path, tokenizer):
    """First user messages of --prompts that are short enough, grouped by source."""
    found = {}
    with open_text(path) as file:
        for line in file:
            talk = json.loads(line)
            text = next((m["content"] for m in talk["messages"] if m["role"] == "user"), "")
            if 8 < len(text) < 3 * LONGEST_PROMPT:
                found.setdefault(talk.get("source", ""), []).append(text)
    return found


class Prompts:
    """Token rows that are fed instead of sampled ones: how a message opens, and how conversations begin."""

    def __init__(self, tokenizer, path, system, n, seed):
        rng = np.random.default_rng(seed)
        asked = [request.format(topic) for request in REQUESTS for topic in TOPICS]
        texts = [asked[i] for i in rng.permutation(len(asked))[:n // 2]] + list(GREETINGS) * 8
        by_source = list(first_messages(path, tokenizer).values()) if path else []
        for messages in by_source:
            texts += [messages[i] for i in rng.permutation(len(messages))[:n // (2 * len(by_source))]]
        opening = f"{IM_START}system\n{system}{IM_END}\n{IM_START}user\n"
        begun = [f"{opening}{text}{IM_END}\n{IM_START}assistant\n" for text in texts]
        bare = [opening] * (len(begun) // 8)
        fixed = [f"\n{IM_START}assistant\n", f"\n{IM_START}user\n"]
        encoded = [tokenizer.encode(text).ids for text in fixed]
        end = tokenizer.encode(f"\n{END_OF_TEXT}").ids
        encoded += [end + tokenizer.encode(text).ids for text in begun + bare]
        self.roles = [1, 0] + [1] * len(begun) + [0] * len(bare)        # who speaks behind it: 1 the assistant
        kept = [i for i, ids in enumerate(encoded) if i < 2 or len(ids) <= LONGEST_PROMPT]
        self.roles = torch.tensor([self.roles[i] for i in kept])
        self.lengths = torch.tensor([len(encoded[i]) for i in kept])
        self.table = torch.zeros(len(kept), int(self.lengths.max()), dtype=torch.long)
        for row, i in enumerate(kept):
            self.table[row, :len(encoded[i])] = torch.tensor(encoded[i])
        self.lead = len(end)                    # tokens that still belong to the conversation before


class Talk:
    """All that changes from step to step lives in tensors, so that a step can be a CUDA graph."""

    def __init__(self, model, prompts, args, device, dtype):
        c, B, T = model.config, args.rows, args.length
        self.model, self.args, self.device = model, args, device
        self.table, self.lengths, self.roles = (t.to(device) for t in (prompts.table, prompts.lengths, prompts.roles))
        self.lead = prompts.lead
        shape = (B, c.num_key_value_heads, T, c.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in model.model.layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in model.model.layers]
        angle = torch.arange(T, dtype=torch.float64)[:, None] * rope_frequencies(c, 0)
        self.cos, self.sin = angle.cos().float().to(device), angle.sin().float().to(device)
        self.index = torch.arange(T, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.out = torch.zeros(B, T, dtype=torch.long, device=device)
        self.queue = torch.randint(2, len(self.lengths), (B,), device=device)      # row of the table being fed
        self.at = torch.full((B,), self.lead + 1, device=device)                   # next entry of it
        self.token = self.table[self.queue, self.lead].clone()
        self.begin = torch.zeros(B, dtype=torch.long, device=device)               # of the conversation
        self.role = self.roles[self.queue].clone()
        self.spoken = torch.zeros(B, dtype=torch.long, device=device)              # tokens of this message

    def logits(self):
        model, c = self.model, self.model.config
        B, H, KV, d = len(self.token), c.num_attention_heads, c.num_key_value_heads, c.head_dim
        x = model.embed(self.token, None, self.k[0].dtype)
        cos, sin = self.cos[self.position], self.sin[self.position]
        seen = (self.index >= self.begin[:, None]) & (self.index <= self.position) | (self.index == self.position)
        bias = torch.zeros(seen.shape, device=self.device).masked_fill(~seen, -1e9)[:, None, None]
        for n, layer in enumerate(model.model.layers):
            mix = layer.mix
            h = layer.norm1(x)
            q = linear(h, mix.q_proj.weight).view(B, 1, H, d)
            k = linear(h, mix.k_proj.weight).view(B, 1, KV, d)
            q, k = ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)
            self.k[n].index_copy_(2, self.position, k.transpose(1, 2))
            self.v[n].index_copy_(2, self.position, linear(h, mix.v_proj.weight).view(B, KV, 1, d))
            scores = q.view(B, KV, H // KV, d) @ self.k[n].mT
            weights = torch.softmax(scores.float() * mix.scale + bias, -1).to(x.dtype)
            y = (weights @ self.v[n]).view(B, H * d)
            x = x + linear(y, mix.o_proj.weight)
            x = x + layer.mlp(layer.norm2(x))
        return model.head(model.model.norm(x)).float()

    def step(self):
        args = self.args
        self.out.index_copy_(1, self.position, self.token[:, None])
        logits = self.logits() + args.banned
        top, ids = logits.topk(args.top_k, -1)
        noise = -torch.log(-torch.log(torch.rand_like(top).clamp(1e-9, 1 - 1e-7)))
        sampled = ids.gather(1, (top / args.temperature + noise).argmax(-1, keepdim=True))[:, 0]
        sampled = sampled.masked_fill(self.spoken >= args.longest, args.im_end)

        forced = self.at < self.lengths[self.queue]
        fed = self.table[self.queue, self.at.clamp(max=self.table.shape[1] - 1)]
        self.token.copy_(torch.where(forced, fed, sampled))
        self.at.copy_(torch.where(forced, self.at + 1, self.at))
        self.spoken.copy_((self.spoken + 1).masked_fill(forced, 0))

        ended = ~forced & (sampled == args.im_end)
        over = ended & (self.role == 1) & (torch.rand(len(ended), device=self.device) < args.over)
        fresh = torch.randint(2, len(self.lengths), (len(ended),), device=self.device)
        follow = torch.where(over, fresh, self.role)        # row 0 opens the assistant's message, row 1 the user's
        self.queue.copy_(torch.where(ended, follow, self.queue))
        self.at.masked_fill_(ended, 0)
        self.role.copy_(torch.where(ended, self.roles[self.queue], self.role))
        self.begin.copy_(torch.where(over, self.position + 2 + self.lead, self.begin))
        self.position += 1

    def run(self):
        steps = self.args.length
        begun = time.monotonic()
        if self.device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            for n in range(3, steps):           # capturing ran nothing
                graph.replay()
                if n % 256 == 0:
                    torch.cuda.synchronize()
                    print(f"{n} of {steps} steps, {n * len(self.out) / (time.monotonic() - begun):.0f} tokens/s", flush=True)
        else:
            for _ in range(steps):
                self.step()
        return self.out.cpu().numpy()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the exact Transformer, from ../convert")
    parser.add_argument("--out", type=Path, required=True, help="a .npz file")
    parser.add_argument("--prompts", type=Path, help="conversations whose first messages are used as well")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--n-prompts", type=int, default=4000)
    parser.add_argument("--longest", type=int, default=400, help="tokens of one message")
    parser.add_argument("--over", type=float, default=0.3, help="chance that an answer ends the conversation")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--system", default=SYSTEM)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=1, help="print the beginning of this many rows")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = arguments()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load(args.model, device).to(dtype)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    args.im_end = tokenizer.token_to_id(IM_END)
    specials = [token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    args.banned = torch.zeros(model.config.vocab_size, device=device)      # added to the logits
    args.banned[[i for i in specials if i != args.im_end]] = -1e9
    prompts = Prompts(tokenizer, args.prompts, args.system, args.n_prompts, args.seed)
    rows = Talk(model, prompts, args, device, dtype).run().astype(np.uint16)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = np.concatenate([np.append(row, np.uint16(end)) for row in rows])
    starts = np.append(0, np.flatnonzero(tokens == end)[:-1] + 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, tokens=tokens, starts=starts.astype(np.int64))
    for row in rows[:args.show]:
        print(tokenizer.decode(row[:500].tolist(), skip_special_tokens=False))
    print(f"{args.out}: {len(starts)} conversations, {len(tokens)} tokens", flush=True)


if __name__ == "__main__":
    main()
