"""A converted GGUF against `transformers` reading the same file by itself: logits, tokens, the engine.

    python check_logits.py MODEL.gguf --exact teacher-f32 [--fresh fresh-f32] [--server latte-server] [--text FILE]

`transformers` dequantises the file, undoes the row order of q and k and rebuilds the tokenizer with its
own code. Compared are all logits of --exact (float32, read by ../train/model.py), those of --fresh with
the same model under a sliding-window mask, the ids of a text, and with --server the log probabilities
that the engine gives for the text's tokens over HTTP.
"""
import argparse
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from model import load

LIMIT = 1e-3
TEXT = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once
or twice she had peeped into the book. "It's 1865," she'd say — naïve, but 3,141 times better than nothing!
"""


def original(path):
    where = dict(gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **where, dtype=torch.float32,
                                                              attn_implementation="eager").eval()
    return model, transformers.AutoTokenizer.from_pretrained(path.parent, **where)


def window_mask(length, window):
    """[1, 1, T, T], added to the scores."""
    at = torch.arange(length)
    seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    return torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def wait_until_ready(url, seconds=300):
    for _ in range(seconds):
        try:
            return urllib.request.urlopen(f"{url}/health/ready")
        except urllib.error.HTTPError:          # still loading
            time.sleep(1)
    raise SystemExit(f"{url} was not ready after {seconds} seconds")


def served(server, directory, ids):
    """Log probabilities of the ids after the first, from the engine in float32."""
    process = subprocess.Popen([server, "--model", str(directory), "--port", "0", "--device", "cpu", "--max-slots", "1",
                                "--weight-dtype", "f32", "--window-dtype", "f32"], stdout=subprocess.PIPE, text=True)
    try:
        line = next((line for line in process.stdout if "http://" in line), None)
        if line is None:
            raise SystemExit("the server ended before it listened")
        url = re.search(r"http://[^ \n]+", line)[0]
        wait_until_ready(url)
        body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request))
        return torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1:])
    finally:
        process.terminate()
        process.wait()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--exact", type=Path, required=True)
    parser.add_argument("--fresh", type=Path)
    parser.add_argument("--server")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args()
    model, tokenizer = original(args.gguf)
    text = args.text.read_text() if args.text else TEXT * 6
    ours = transformers.PreTrainedTokenizerFast(tokenizer_file=str(args.exact / "tokenizer.json"))
    ids = ours(text)["input_ids"]
    same = ids == tokenizer(text)["input_ids"]
    print(f"tokenizer: {len(ids)} ids, {'the same' if same else 'DIFFERENT'}")
    ids = ids[:args.tokens]
    tokens = torch.tensor([ids])

    def compare(what, a, b):
        error = (a - b).abs().max().item()
        print(f"{what}: max abs error {error:.2e} over {a.numel()} values, limit {LIMIT:g}", flush=True)
        return error <= LIMIT

    wanted = model(tokens).logits
    fine = same and compare("logits, exact", load(args.exact)(tokens)[0], wanted)
    if args.fresh:
        window = json.loads((args.fresh / "config.json").read_text())["sliding_window"]
        masked = model(tokens, attention_mask=window_mask(len(ids), window)).logits
        fine &= compare(f"logits, fresh macchiato with window {window}", load(args.fresh)(tokens)[0], masked)
    if args.server:
        for directory, logits in [(args.exact, wanted)] + ([(args.fresh, masked)] if args.fresh else []):
            expected = torch.log_softmax(logits[0, :-1], -1).gather(1, tokens[0, 1:, None])[:, 0]
            fine &= compare(f"log probabilities of the engine, {directory.name}", served(args.server, directory, ids), expected)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
