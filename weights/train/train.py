"""Trains a Latte language model from scratch; stops on a clock or after a number of tokens.

    python train.py --data DATA --config ../latte-12m/config.json --out RUN --minutes 10

Training is stateful: each of --rows rows reads its own strip of text in segments of --segment
tokens, and the state of every layer goes, without gradient, from one segment to the next. So the
model meets states as old as a whole novel, as the server does. Sessions begin at documents:
mostly the state is empty before the document's first token or before the <|endoftext|> that
precedes it, sometimes it goes on across the boundary.

RUN holds loss.csv, checkpoint.pt (--resume goes on from it) and model/, the export.
"""
import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from export import export
from model import Config, Latte, linear, load
from optim import optimisers

FRESH_AT_END, FRESH_AT_TEXT = 0.4, 0.45         # chances of the two kinds of beginning; else none


class Tape:
    """An endless supply of segments. An epoch is all kept documents in a new order, cut into one
    strip a row."""

    def __init__(self, path, rows, length, device, seed=0, shuffle=True):
        data = np.load(path)
        self.tokens, self.starts, self.keep = data["tokens"], data["starts"], data["keep"]
        self.ends = np.append(self.starts[1:], len(self.tokens))
        self.n_bytes = int(data["bytes"])
        self.rows, self.length, self.device, self.shuffle = rows, length, device, shuffle
        self.rng = np.random.default_rng(seed)
        self.epoch = self.at = self.segments = 0

    def wind(self):
        """Lay out the next epoch: tokens, and 1 where a session begins."""
        chosen = np.arange(len(self.starts))
        if self.shuffle:
            chosen = self.rng.permutation(np.flatnonzero(self.rng.random(len(chosen)) < self.keep))
        tokens = np.concatenate([self.tokens[self.starts[i]:self.ends[i]] for i in chosen])
        first = np.cumsum([0] + [self.ends[i] - self.starts[i] for i in chosen[:-1]])
        begin = np.zeros(len(tokens), dtype=np.uint8)
        if self.shuffle:
            kind = self.rng.random(len(first))
            begin[first[kind < FRESH_AT_TEXT]] = 1
            begin[first[kind > 1 - FRESH_AT_END] - 1] = 1
        else:
            begin[first] = 1
        # each row one token longer than its segments: the last target
        strip = (len(tokens) - 1) // self.rows
        self.segments = strip // self.length
        strip = self.segments * self.length
        at = np.arange(self.rows)[:, None] * strip + np.arange(strip + 1)
        self.strips = torch.from_numpy(tokens[at].astype(np.int16)).to(self.device)
        begin = begin[at[:, :-1]]
        begin[:, 0] = 1
        self.begin = torch.from_numpy(begin).to(self.device)
        self.epoch += 1
        self.at = 0

    def next(self):
        """Inputs, targets [rows, length] and beginnings of the next segment."""
        if self.at == self.segments:
            self.wind()
        a = self.at * self.length
        self.at += 1
        part = self.strips[:, a:a + self.length + 1].long()
        return part[:, :-1].contiguous(), part[:, 1:].contiguous(), self.begin[:, a:a + self.length].int()


def head_loss(x, weight, targets):
    return F.cross_entropy(linear(x, weight).flatten(0, 1).float(), targets.flatten())


class Trainer:
    def __init__(self, args):
        self.args = args
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(args.seed)
        self.values = json.loads(args.config.read_text())
        if args.init:
            self.model = load(args.init, self.device)
        else:
            self.model = Latte(Config(self.values)).to(self.device)
        self.optimisers = optimisers(self.model, args)
        self.base = [[group["lr"] for group in o.param_groups] for o in self.optimisers]
        self.loss = head_loss
        if args.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)    # one layer is compiled, all reuse it
            self.loss = torch.compile(head_loss, dynamic=False)
        self.train = Tape(args.data / "train.npz", args.rows, args.segment, self.device, args.seed)
        self.valid = Tape(args.data / "valid.npz", args.rows, args.valid_segment or args.segment,
                          self.device, shuffle=False)
        self.step = self.tokens = 0
        self.elapsed = 0.0
        self.state = None
        args.out.mkdir(parents=True, exist_ok=True)
        if args.resume:
            self.resume()
        self.log = open(args.out / "loss.csv", "a" if args.resume else "w", newline="")
        if not args.resume:
            csv.writer(self.log).writerow(["step", "tokens", "seconds", "train_nats_per_token", "valid_bits_per_byte"])

    def progress(self):
        """From 0 to 1, by the clock or by tokens."""
        if self.args.tokens:
            return self.tokens / self.args.tokens
        return self.elapsed / (60 * self.args.minutes)

    def set_rates(self):
        """Warm up, hold, then fall linearly to zero at the end."""
        p = self.progress()
        rate = min(1.0, (self.step + 1) / self.args.warmup, max(0.0, (1 - p) / (1 - self.args.hold)))
        for optimiser, base in zip(self.optimisers, self.base):
            for group, lr in zip(optimiser.param_groups, base):
                group["lr"] = lr * rate
        for group in self.optimisers[0].param_groups:
            group["momentum"] = 0.85 + 0.10 * min(1.0, self.step / 300)

    def segment_loss(self, batch, state):
        inputs, targets, begin = batch
        x, state = self.model.hidden(inputs, state, begin, self.dtype)
        config = self.model.config
        if config.final_logit_softcapping or not config.tie_word_embeddings:
            return F.cross_entropy(self.model.head(x).flatten(0, 1).float(), targets.flatten()), state
        return self.loss(x, self.model.model.embed_tokens.weight, targets), state

    def update(self):
        self.set_rates()
        loss, self.state = self.segment_loss(self.train.next(), self.state)
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += self.args.rows * self.args.segment
        return loss.detach()

    def validate(self):
        """Bits per byte of the validation text, one strip a row; evaluate.py measures whole documents."""
        tape, state, total = self.valid, None, 0.0
        tape.wind()
        # gradients stay on although unused: switching them off would compile every layer again
        for _ in range(tape.segments):
            loss, state = self.segment_loss(tape.next(), state)
            total += loss.detach()
        seen = tape.segments * tape.rows * tape.length
        share = seen / len(tape.tokens)
        return float(total) / tape.segments * seen / (np.log(2) * tape.n_bytes * share)

    def save(self):
        torch.save({"model": self.model.state_dict(), "config": self.values, "step": self.step,
                    "tokens": self.tokens, "elapsed": self.elapsed,
                    "optimisers": [o.state_dict() for o in self.optimisers]}, self.args.out / "checkpoint.tmp")
        (self.args.out / "checkpoint.tmp").rename(self.args.out / "checkpoint.pt")
        export(self.model.state_dict(), self.values, self.args.out / "model")

    def resume(self):
        saved = torch.load(self.args.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"]):
            optimiser.load_state_dict(state)
        self.step, self.tokens, self.elapsed = saved["step"], saved["tokens"], saved["elapsed"]
        self.train.rng = np.random.default_rng(self.args.seed + self.step)      # another order from here

    def run(self):
        args, losses = self.args, []
        before = time.monotonic() - self.elapsed
        next_valid = next_save = self.elapsed
        next_valid += args.valid_seconds
        next_save += args.save_seconds
        logged = (self.tokens, self.elapsed)
        while self.progress() < 1:
            losses.append(self.update())
            self.elapsed = time.monotonic() - before
            if self.step == 5 and not args.resume:
                before = time.monotonic()       # compilation is over: the clock starts
                logged = (self.tokens, 0.0)
            if self.step % args.log_steps and self.progress() < 1:
                continue
            loss = float(torch.stack(losses).mean())        # waits for the device
            losses = []
            self.elapsed = time.monotonic() - before
            speed = (self.tokens - logged[0]) / max(1e-9, self.elapsed - logged[1])
            logged = (self.tokens, self.elapsed)
            score = ""
            if self.elapsed >= next_valid or self.progress() >= 1:
                score = f"{self.validate():.5f}"
                next_valid = self.elapsed + args.valid_seconds
            csv.writer(self.log).writerow([self.step, self.tokens, f"{self.elapsed:.1f}", f"{loss:.5f}", score])
            self.log.flush()
            print(f"step {self.step} tokens {self.tokens / 1e6:.1f}M epoch {self.train.epoch} {self.elapsed:.0f}s "
                  f"{speed / 1e6:.3f}M/s loss {loss:.4f} {'valid ' + score if score else ''}", flush=True)
            if not np.isfinite(loss):
                raise SystemExit("the loss is no longer a number")
            if self.elapsed >= next_save:
                self.save()
                next_save = self.elapsed + args.save_seconds
        self.save()
        print(f"done: {self.step} steps, {self.tokens} tokens, {self.elapsed:.0f} seconds", flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10, help="length of the run, by the clock")
    parser.add_argument("--tokens", type=int, help="length of the run in tokens, instead")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--lr-matrix", type=float, default=0.015)
    parser.add_argument("--lr-embed", type=float, default=0.003)
    parser.add_argument("--lr-rest", type=float, default=0.003)
    parser.add_argument("--decay-matrix", type=float, default=0.06)
    parser.add_argument("--decay-embed", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--hold", type=float, default=0.2, help="share of the run before the rate falls")
    parser.add_argument("--valid-segment", type=int, help="default: --segment")
    parser.add_argument("--valid-seconds", type=float, default=60)
    parser.add_argument("--save-seconds", type=float, default=180)
    parser.add_argument("--log-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init", type=Path, help="start from the weights of this model directory")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    Trainer(arguments()).run()
