"""Writes text with a trained model, one token at a time from the carried state.

    python sample.py --model ../latte-12m --prompt "The old house" --seed 1
    python sample.py --model ../latte-12m --chat "What is a volcano?"
"""
import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from corpus import IM_START, chat_text
from model import load


def choose(logits, temperature, top_p, penalty, seen, generator):
    """One token id. `penalty` above 1 divides positive and multiplies negative logits of `seen` ids."""
    logits = logits.clone()
    if penalty != 1.0 and seen:
        ids = torch.tensor(sorted(seen))
        logits[ids] = torch.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    if temperature == 0:
        return int(logits.argmax())
    p, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    p[p.cumsum(0) - p >= top_p] = 0             # the smallest set whose probability reaches top_p
    return int(order[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def generate(model, ids, n_tokens, stop, temperature=0.8, top_p=0.95, penalty=1.0, seed=0):
    """The ids that follow `ids`, until one of `stop` (not included) or n_tokens."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    logits, state = model(torch.tensor([ids], device=device))
    out = []
    while len(out) < n_tokens:
        token = choose(logits[0, -1].float().cpu(), temperature, top_p, penalty, set(out), generator)
        if token in stop:
            break
        out.append(token)
        logits, state = model(torch.tensor([[token]], device=device), state)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--chat", action="append", default=[], help="one user turn")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    model = load(args.model, args.device).eval()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    eos = json.loads((args.model / "config.json").read_text()).get("eos_token_id", [])
    stop = set(eos if isinstance(eos, list) else [eos])
    prompts = [(text, text) for text in args.prompt]
    prompts += [(text, chat_text([{"role": "user", "content": text}]) + f"{IM_START}assistant\n") for text in args.chat]
    for shown, text in prompts:
        ids = generate(model, tokenizer.encode(text, add_special_tokens=False).ids, args.tokens, stop,
                       args.temperature, args.top_p, args.repetition_penalty, args.seed)
        print(f"[{shown}]{tokenizer.decode(ids)}\n", flush=True)


if __name__ == "__main__":
    main()
