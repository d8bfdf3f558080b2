"""Bits per byte of whole documents, as the server reads them: from an empty state, state carried.

    python evaluate.py --model ../latte-12m FILE... [--json scores.json]

Two protocols. "streamed": a document is fed from its first token to its last with the state
carried. "fresh": the state is emptied every --fresh tokens. In both, the first token of a
document has nothing to predict it and is charged log2(vocabulary) bits. The sum of all nats over
ln 2 and over the raw bytes of the documents is the score; <|endoftext|> is never scored. With
--positions the scores are also given by position in the document. Weights are the stored ones;
arithmetic is float32 in the exact form.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from corpus import SPECIAL_TOKENS, read_documents
from model import load

EDGES = [0, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 98304, 131072, 1 << 62]


def select(state, rows):
    """The state of some of its rows."""
    if isinstance(state, dict):
        return {key: select(value, rows) for key, value in state.items()}
    if isinstance(state, list):
        return [select(value, rows) for value in state]
    return state[rows]


@torch.no_grad()
def stream(model, documents, chunk, fresh=None):
    """Nats of every token of every document (lists of ids); `fresh`: empty the state that often."""
    device = next(model.parameters()).device
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    nats = [np.full(len(d), math.log(model.config.vocab_size)) for d in documents]
    longest = len(documents[order[0]])
    tokens = torch.zeros(len(order), longest, dtype=torch.long)
    for row, i in enumerate(order):
        tokens[row, :len(documents[i])] = torch.tensor(documents[i])
    lengths = np.array([len(documents[i]) for i in order])
    state, rows = None, len(order)
    for t in range(0, longest - 1, chunk):
        alive = int((lengths > t + 1).sum())    # rows are sorted: the living come first
        if alive < rows:
            state, rows = select(state, slice(0, alive)) if state else None, alive
        if fresh and t % fresh == 0:
            state = None
        end = min(t + chunk, longest - 1)
        inputs = tokens[:rows, t:end].to(device)
        logits, state = model(inputs, state)
        targets = tokens[:rows, t + 1:end + 1].to(device)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = loss.view(rows, -1).double().cpu().numpy()
        for row in range(rows):
            n = min(end, lengths[row] - 1) - t
            nats[order[row]][t + 1:t + 1 + n] = loss[row, :n]
    return nats


def by_position(nats, n_bytes):
    """Bits per byte between the EDGES, over all documents that reach there."""
    table = []
    for low, high in zip(EDGES, EDGES[1:]):
        total = sum(float(x[low:high].sum()) for x in nats)
        count = sum(int(b[low:high].sum()) for b in n_bytes)
        if count:
            table.append({"from": low, "tokens": sum(len(x[low:high]) for x in nats),
                          "documents": sum(len(x) > low for x in nats), "bits_per_byte": total / math.log(2) / count})
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--fresh", type=int, default=2048)
    parser.add_argument("--positions", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.fresh % args.chunk:
        parser.error("--fresh must be a multiple of --chunk")

    model = load(args.model, args.device).eval()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    # in a byte-level vocabulary every character of an entry stands for one byte
    width = np.array([0 if entry in SPECIAL_TOKENS else len(entry) for entry, _ in
                      sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])])
    results, totals = {}, np.zeros(3)
    for path in args.files:
        texts = read_documents(path)
        documents = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        n_bytes = sum(len(text.encode()) for text in texts)
        streamed = stream(model, documents, args.chunk)
        fresh = stream(model, documents, args.chunk, args.fresh)
        sums = np.array([sum(map(np.sum, streamed)), sum(map(np.sum, fresh)), n_bytes])
        totals += sums
        score = results[path.name] = {
            "documents": len(texts), "bytes": n_bytes, "tokens": sum(map(len, documents)),
            "nats": sums[0], "streamed": sums[0] / math.log(2) / n_bytes, "fresh": sums[1] / math.log(2) / n_bytes}
        print(f"{path.name}: {score['documents']} documents, {n_bytes} bytes, {score['tokens']} tokens; "
              f"bits per byte {score['streamed']:.4f} streamed, {score['fresh']:.4f} fresh", flush=True)
        if args.positions:
            widths = [width[np.array(d)] for d in documents]
            score["by_position"] = by_position(streamed, widths)
            for row, other in zip(score["by_position"], by_position(fresh, widths)):
                row["fresh"] = other["bits_per_byte"]
                print(f"  from token {row['from']:>6}: {row['documents']:>4} documents, {row['tokens']:>8} tokens, "
                      f"{row['bits_per_byte']:.4f} streamed, {row['fresh']:.4f} fresh", flush=True)
    together = totals[:2] / math.log(2) / totals[2]
    results["together"] = {"bytes": int(totals[2]), "streamed": together[0], "fresh": together[1]}
    print(f"together: {int(totals[2])} bytes; bits per byte {together[0]:.4f} streamed, {together[1]:.4f} fresh")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
