"""Token files for adapt.py: one NAME.npz for each file of text, with the model's own tokenizer.

    python adapt_data.py --tokenizer TEACHER/tokenizer.json --out DATA train-books.txt.xz train-chat.jsonl.xz ...

Documents are followed by <|endoftext|>. Conversations become ChatML with the system message that
the model knows (--system) where they bring none, as its chat template does.
"""
import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from corpus import END_OF_TEXT, chat_text, open_text, read_documents

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def conversations(path, system):
    with open_text(path) as file:
        for line in file:
            if line.strip():
                messages = json.loads(line)["messages"]
                if messages[0]["role"] != "system":
                    messages = [{"role": "system", "content": system}] + messages
                yield chat_text(messages)


def documents(path, system):
    return list(conversations(path, system)) if ".jsonl" in path.name else read_documents(path)


def prepare(path, tokenizer, out, system):
    begun = time.monotonic()
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [np.array(e.ids + [end], dtype=np.uint16)
             for e in tokenizer.encode_batch_fast(documents(path, system))]
    starts = np.cumsum([0] + [len(part) for part in parts[:-1]]).astype(np.int64)
    name = re.sub(r"\.(txt|jsonl)(\.xz)?$", "", path.name)
    np.savez(out / f"{name}.npz", tokens=np.concatenate(parts), starts=starts)
    print(f"{name}: {len(parts)} documents, {sum(map(len, parts))} tokens, {time.monotonic() - begun:.1f}s", flush=True)


class Texts:
    """Draws rows of tokens: from a random document's beginning on, or from a random place."""

    def __init__(self, directory, shares, device, seed):
        """shares {NAME: share of the rows}; a NAME of `NAME*` takes all files that begin so."""
        self.rng, self.device, self.texts, chances = np.random.default_rng(seed), device, [], []
        for name, share in shares.items():
            files = sorted(Path(directory).glob(f"{name}.npz"))
            if not files:
                raise SystemExit(f"{directory}: no {name}.npz")
            for file in files:
                data = np.load(file)
                self.texts.append((data["tokens"], data["starts"]))
                chances.append(share / len(files))
        self.chances = np.array(chances) / sum(chances)

    def row(self, length, at_start):
        tokens, starts = self.texts[self.rng.choice(len(self.texts), p=self.chances)]
        last = len(tokens) - length - 1
        if last <= 0:
            tokens, last = np.tile(tokens, length // len(tokens) + 2), len(tokens)
        begin = self.rng.choice(starts) if self.rng.random() < at_start else self.rng.integers(last)
        begin = min(int(begin), last)
        return tokens[begin:begin + length + 1]

    def batch(self, rows, length, at_start=0.6):
        """[rows, length + 1]"""
        drawn = np.stack([self.row(length, at_start) for _ in range(rows)]).astype(np.int64)
        return torch.from_numpy(drawn).to(self.device, non_blocking=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--system", default=SYSTEM)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.files:
        prepare(path, tokenizer, args.out, args.system)


if __name__ == "__main__":
    main()
