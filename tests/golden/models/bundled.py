"""Writes what the bundled model must answer, computed by reference.py from the committed weights.

    python tests/golden/models/bundled.py [weights/latte-12m]

The prompt's text is encoded by the model's own tokenizer.json. Few rows are kept, since each has
a whole vocabulary of logits. If a greedy token would lead by less than make.py's MIN_LEAD, the
continuation ends before it.
"""
import pathlib
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import make
import reference

PROMPT = ("Once upon a time, in a small village near the sea, there lived a girl who kept a tame "
          "crow. Every morning she walked along the shore with it, and every morning")
ROWS = 3      # the last rows of the prompt
GREEDY = 32


def continue_greedily(model, logits):
    out = []
    while len(out) < GREEDY:
        best = torch.topk(logits, 2).values
        if best[0] - best[1] < make.MIN_LEAD:
            break
        out.append(int(logits.argmax()))
        logits = model.step(out[-1])
    return out


if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "weights/latte-12m")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokens = tokenizer.encode(PROMPT).ids
    model = reference.Model(*reference.load(directory))
    logits = model.run(tokens)
    greedy = continue_greedily(model, logits[-1])
    rows = list(range(len(tokens) - ROWS, len(tokens)))
    out = make.HERE / "bundled" / "expected"
    out.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": torch.tensor(tokens, dtype=torch.int32),
               "rows": torch.tensor(rows, dtype=torch.int32),
               "logits": logits[rows].float().contiguous(),
               "greedy": torch.tensor(greedy, dtype=torch.int32)}, out / "model.safetensors")
    print(PROMPT + " | " + tokenizer.decode(greedy))
