"""Writes perplexity.json: how well the bundled model predicts documents.txt, by reference.py in float64.

    python tests/golden/models/perplexity.py

Every document of documents.txt (separated by a line <|endoftext|>) is read from an empty state;
its first token is not scored, nor are the bytes of that token. `first` has the perplexity of the
first tokens of the documents that have more than the longest of the lengths.
"""
import json
import math
import pathlib

import torch
from tokenizers import Tokenizer

import reference

HERE = pathlib.Path(__file__).parent / "bundled"
LENGTHS = (8, 20, 40)


def nats_of(parts, tokens):
    """Of every token but the first, from an empty state."""
    model, out = reference.Model(*parts), []
    for token, following in zip(tokens, tokens[1:]):
        out.append(-torch.log_softmax(model.step(token), -1)[following].item())
    return out


if __name__ == "__main__":
    directory = pathlib.Path("weights/latte-12m")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    parts = reference.load(directory)
    texts = (HERE / "documents.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    documents = [tokenizer.encode(text).ids for text in texts]
    nats = [nats_of(parts, tokens) for tokens in documents]
    n_bytes = sum(len(text.encode()) - len(tokenizer.decode(ids[:1]).encode()) for text, ids in zip(texts, documents))
    long = [x for x in nats if len(x) >= LENGTHS[-1]]
    total, n = sum(map(sum, nats)), sum(map(len, nats))
    result = {
        "documents": len(texts), "tokens": n + len(texts), "perplexity": math.exp(total / n),
        "bits_per_byte": total / math.log(2) / n_bytes, "long_documents": len(long),
        "first": {str(m): math.exp(sum(sum(x[:m]) for x in long) / (m * len(long))) for m in LENGTHS}}
    (HERE / "perplexity.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)
