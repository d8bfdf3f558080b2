"""A Macchiato beside the Transformer it came from: perplexity by length of the text, and recall of a fact.

    python probe.py --model FRESH --adapter RUN/adapter.safetensors --data DATA --text valid-longbooks

Perplexity: the mean over the first N tokens of each text, from an empty state. Recall: "The secret word
of NAME is WORD." comes N tokens before "The secret word of NAME is"; counted is how often WORD is the
likeliest of all candidate words (a guess gets 1 of them) and how often it is the likeliest token.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model import load
from teacher import Teacher

NAMES = ("Mary", "Peter", "Helen", "Robert", "Alice", "Victor", "Laura", "Simon")
WORDS = ("apple", "river", "castle", "silver", "garden", "window", "bridge", "forest", "music", "pepper", "winter", "horse",
         "mirror", "candle", "island", "button", "coffee", "dragon", "eagle", "flower", "hammer", "jacket", "kitchen", "lemon",
         "market", "needle", "orange", "pencil", "rabbit", "ticket", "violin", "wagon")
CHUNK = 8192                                    # tokens whose logits exist at once


class Reader:
    """Three ways to read tokens [B, T]; each gives what the head multiplies [B, T, D]."""

    def __init__(self, model, dtype, segment, window):
        self.model, self.dtype, self.segment = model, dtype, segment
        self.ways = {"teacher": Teacher(model).hidden, f"teacher, window {window}": Teacher(model, window).hidden,
                     "macchiato": self.student}

    def student(self, tokens, dtype):
        state, out = None, []
        for a in range(0, tokens.shape[1], self.segment):
            x, state = self.model.hidden(tokens[:, a:a + self.segment], state, dtype=dtype)
            out.append(x)
        return torch.cat(out, 1)

    def read(self, way, tokens):
        """Padded at the end to a multiple of 64, which the kernels want; all ways are causal."""
        T = tokens.shape[1]
        return self.ways[way](F.pad(tokens, (0, -T % 64)), self.dtype)[:, :T]


def nats(model, x, targets):
    """Cross entropy of each token, [B, T] float32 on the CPU."""
    flat, t, out = x.flatten(0, 1), targets.flatten(), []
    for a in range(0, len(flat), CHUNK):
        out.append(F.cross_entropy(model.head(flat[a:a + CHUNK]).float(), t[a:a + CHUNK], reduction="none"))
    return torch.cat(out).view(targets.shape).cpu()


def perplexities(reader, data, lengths, n_texts, rows):
    """{way: {N: perplexity of the first N tokens}} over the first texts that are long enough."""
    tokens, starts = data
    ends = np.append(starts[1:], len(tokens))
    longest = max(lengths)
    texts = [tokens[s:s + longest + 1].astype(np.int64) for s, e in zip(starts, ends) if e - s > longest][:n_texts]
    if not texts:
        raise SystemExit(f"no text of more than {longest} tokens")
    batch = torch.from_numpy(np.stack(texts)).to(next(reader.model.parameters()).device)
    table = {}
    for way in reader.ways:
        losses = torch.cat([nats(reader.model, reader.read(way, part[:, :-1]), part[:, 1:])
                            for part in batch.split(rows)])
        table[way] = {n: float(torch.exp(losses[:, :n].double().mean())) for n in lengths}
        print(f"{way:22} perplexity " + ", ".join(f"{n}: {p:.2f}" for n, p in table[way].items()), flush=True)
    return {"texts": len(texts), **table}


def recall_rows(tokenizer, filler, distance, n, rng):
    """Prompts of one length, and the index of each one's word."""
    rows, answers = [], []
    for i in range(n):
        name, word = NAMES[i % len(NAMES)], int(rng.integers(len(WORDS)))
        told = tokenizer.encode(f"The secret word of {name} is {WORDS[word]}.\n\n").ids
        asked = tokenizer.encode(f"\n\nThe secret word of {name} is").ids
        begin = int(rng.integers(len(filler) - distance))
        rows.append(told + filler[begin:begin + distance - len(asked)].tolist() + asked)
        answers.append(word)
    shortest = min(map(len, rows))              # names and words differ by a token: cut from the filler
    rows = [row[:16] + row[16 + len(row) - shortest:] for row in rows]
    return rows, answers


def recall(reader, tokenizer, filler, distances, n, rows, seed=0):
    """{way: {distance: (share right among the words, share likeliest token)}}"""
    words = [tokenizer.encode(f" {word}").ids[0] for word in WORDS]
    table = {}
    for way in reader.ways:
        table[way] = {}
        for distance in distances:
            prompts, answers = recall_rows(tokenizer, filler, distance, n, np.random.default_rng(seed))
            batch = torch.tensor(prompts, device=next(reader.model.parameters()).device)
            logits = torch.cat([reader.model.head(reader.read(way, part)[:, -1]).float() for part in batch.split(rows)])
            chosen = logits[:, words].argmax(-1).cpu().numpy()
            first = logits.argmax(-1).cpu().numpy()
            table[way][distance] = (float((chosen == answers).mean()),
                                    float((first == np.array(words)[answers]).mean()))
        print(f"{way:22} recall " + ", ".join(f"{d}: {a:.0%} of {len(WORDS)} words, {b:.0%} first"
                                              for d, (a, b) in table[way].items()), flush=True)
    return table


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a fresh Macchiato, with tokenizer.json")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", default="valid-longbooks", help="NAME of NAME.npz; the filler of recall as well")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--distances", default="500,2000,8000")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--facts", type=int, default=96)
    parser.add_argument("--rows", type=int, default=8, help="texts read at once")
    parser.add_argument("--segment", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


@torch.no_grad()
def main():
    args, begun = arguments(), time.monotonic()
    device = torch.device(args.device)
    model = load(args.model, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    data = np.load(args.data / f"{args.text}.npz")
    reader = Reader(model, dtype, args.segment, model.config.sliding_window)
    if args.adapter:                            # the teachers have their norms by now
        named = dict(model.named_parameters())
        for name, value in load_file(args.adapter, device=str(device)).items():
            named[name].copy_(value)
    lengths, distances = ([int(n) for n in text.split(",")] for text in (args.lengths, args.distances))
    result = {"perplexity": perplexities(reader, (data["tokens"], data["starts"]), lengths, args.texts, args.rows),
              "recall": recall(reader, tokenizer, data["tokens"].astype(np.int64), distances, args.facts, args.rows)}
    print(f"took {time.monotonic() - begun:.0f}s", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
