"""Turns text into tokens: writes train.npz and valid.npz for train.py.

    python prepare.py --tokenizer ../latte-12m/tokenizer.json --out DATA \\
        --train train-books.txt.xz train-chat.jsonl.xz ... --valid valid-books.txt.xz ... \\
        --keep OpenTriviaQA=0.3 --keep jsonl=0.7

Each document is followed by <|endoftext|>. A file holds `tokens` (uint16), `starts` (where each
document begins), `keep` (the chance of each document to be in an epoch, from --keep: the last
one whose text occurs in the file name or in the source of a conversation) and `bytes`.
"""
import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from corpus import END_OF_TEXT, read_documents, read_sources


def encode(paths, tokenizer, keep):
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens, chances, total_bytes = [], [], 0
    for path in paths:
        documents = read_documents(path)
        names = [path.name + " " + source for source in read_sources(path)] if ".jsonl" in path.name \
            else [path.name] * len(documents)
        n_tokens = expected = 0
        for name, document, encoding in zip(names, documents, tokenizer.encode_batch_fast(documents)):
            tokens.append(np.array(encoding.ids + [end], dtype=np.uint16))
            chances.append(next((chance for text, chance in reversed(keep) if text in name), 1.0))
            n_tokens += len(tokens[-1])
            expected += len(tokens[-1]) * chances[-1]
        n_bytes = sum(len(document.encode()) for document in documents)
        total_bytes += n_bytes
        print(f"{path.name}: {len(documents)} documents, {n_bytes} bytes, {n_tokens} tokens, "
              f"{expected:.0f} an epoch", flush=True)
    starts = np.cumsum([0] + [len(t) for t in tokens[:-1]])
    return {"tokens": np.concatenate(tokens), "starts": starts.astype(np.int64),
            "keep": np.array(chances, dtype=np.float32), "bytes": np.int64(total_bytes)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--valid", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", action="append", default=[], metavar="TEXT=CHANCE")
    args = parser.parse_args()

    keep = [(text, float(chance)) for text, chance in (item.rsplit("=", 1) for item in args.keep)]
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(args.out / "valid.npz", **encode(args.valid, tokenizer, []))
    np.savez(args.out / "train.npz", **encode(args.train, tokenizer, keep))


if __name__ == "__main__":
    main()
