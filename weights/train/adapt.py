"""Trains the Latte weights of a Macchiato whose base is a frozen Transformer, which is its teacher.

    python adapt.py --model FRESH --data DATA --out RUN --plan layers:60:2048,logits:240:2048,logits:240:8192

The plan is a list of stages KIND:SECONDS:LENGTH. `layers` fits every layer alone: on the teacher's
hidden states, what its mixing adds should be what the teacher's attention adds. `logits` runs the
whole student on LENGTH tokens, in segments with the state carried, and takes KL to the teacher's
logits plus cross entropy; past --teacher-length, where the teacher is lost, cross entropy alone.
Several learning rates (--lr 1e-3,3e-3) are tried for --try-seconds each before the best one is used.

RUN holds adapter.safetensors (bf16, written every --save-seconds and at the end), adapt.pt (float32
weights and the optimiser's state) and loss.csv. The run stops after --seconds; the same command goes
on where it stopped, from adapt.pt, or from --init ADAPTER where only that is left.
"""
import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapt_data import Texts
from distill import HeadLoss
from model import load
from teacher import Teacher

TRAINED = (".latent_q.", ".latent_k.", ".rglru.", ".rglru_norm.", ".conv.")
VALID_SEED = 12345


def is_trained(name):
    return any(part in name for part in TRAINED)


def parse_plan(text):
    """[(kind, seconds, length)]"""
    stages = []
    for item in text.split(","):
        kind, seconds, length = item.split(":")
        if kind not in ("layers", "logits"):
            raise SystemExit(f"--plan: {kind!r} is neither layers nor logits")
        stages.append((kind, float(seconds), int(length)))
    return stages


def parse_shares(text):
    return {name: float(share) for name, share in (item.split("=") for item in text.split(","))}


class LayerTask(torch.nn.Module):
    """How far a layer's mixing is from the teacher's attention, relative to the latter."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, wanted, state, place, rope):
        y, _ = self.layer.mix(self.layer.norm1(x), state, place, rope)
        wanted = wanted[:, 1:].float()          # the first token sees itself alone: nothing to learn, but large
        return (y[:, 1:].float() - wanted).square().sum() / wanted.square().sum()


class Student:
    """The model, its teacher and the losses, on one device."""

    def __init__(self, args):
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = load(args.model, self.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_trained(name))
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        for layer in self.model.model.layers:   # p(0|t) starts where it can still be learnt
            bias = layer.mix.latent_q.bias.data.view(self.model.config.num_attention_heads, -1)
            bias[:, 0] = args.start_bias
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.teacher = Teacher(self.model, compiled=args.compile)
        self.head = HeadLoss(self.model.model.embed_tokens.weight if self.model.config.tie_word_embeddings
                             else self.model.lm_head.weight, compiled=args.compile)
        self.tasks = [LayerTask(layer) for layer in self.model.model.layers]
        if args.compile:
            for layer, task in zip(self.model.model.layers, self.tasks):
                task.compile(dynamic=False)     # one is compiled, all reuse it
                layer.compile(dynamic=False)
        self.args = args

    def layers_losses(self, tokens, backward=True):
        """Mean over the layers; each layer's gradient is taken at once, so only one layer is held."""
        inputs = tokens[:, :-1]
        B, T = inputs.shape
        state = self.model.new_state(B, self.device, self.dtype)
        start = torch.zeros_like(inputs, dtype=torch.int32)
        start[:, 0] = 1
        place, _, _ = self.model.places(state, start, T)
        total = 0
        for n, (x, y) in enumerate(self.teacher.layers(inputs, self.dtype)):
            if y is None:
                break
            loss = self.tasks[n](x, y, state["layers"][n], place, self.model.rope(n, T, self.device))
            if backward:
                loss.backward()
            total = total + loss.detach()
        return {"layers": total / len(self.tasks)}

    def segments(self, tokens, kl_weight, ce_weight):
        """Yields (loss, parts) of one segment after another, the state carried between them."""
        # as tensors: numbers would be compiled in
        kl, ce = (torch.tensor(weight, device=self.device) for weight in (kl_weight, ce_weight))
        length = tokens.shape[1] - 1
        seen = min(length, self.args.teacher_length)
        taught = self.teacher.hidden(tokens[:, :seen], self.dtype) if kl_weight else None
        state = None
        for a in range(0, length, self.args.segment):
            part = slice(a, a + self.args.segment)
            x, state = self.model.hidden(tokens[:, :-1][:, part], state, dtype=self.dtype)
            with_teacher = taught is not None and a < seen
            yield self.head(x, taught[:, part] if with_teacher else None, tokens[:, 1:][:, part].contiguous(),
                            kl, ce)


def optimiser_of(student, lr, args):
    """AdamW; biases move faster: a logit's offset has one weight where its slope has hundreds."""
    weights = [p for name, p in student.trained.items() if not name.endswith(("bias", "lambda", "norm.weight"))]
    rest = [p for name, p in student.trained.items() if name.endswith(("bias", "lambda", "norm.weight"))]
    groups = [{"params": weights, "base": lr}, {"params": rest, "base": lr * args.bias_rate}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-12, weight_decay=0.0,
                             fused=student.device.type == "cuda")


class Run:
    def __init__(self, args):
        self.args, self.plan = args, parse_plan(args.plan)
        self.total = sum(seconds for _, seconds, _ in self.plan)
        torch.manual_seed(args.seed)
        self.student = Student(args)
        self.texts = Texts(args.data, parse_shares(args.shares), self.student.device, args.seed)
        self.valid = {"text": Texts(args.data, parse_shares(args.valid), self.student.device, VALID_SEED).batch(
            args.rows, args.segment, 0.0)}
        self.step = self.tokens = self.stage_step = 0
        self.elapsed, self.stage, self.lr = 0.0, -1, None
        self.optimiser = None
        args.out.mkdir(parents=True, exist_ok=True)
        self.resume()
        new = not (args.out / "loss.csv").exists()
        self.log = open(args.out / "loss.csv", "a", newline="")
        if new:
            csv.writer(self.log).writerow(["stage", "length", "step", "tokens", "seconds", "lr", "layers", "kl", "ce",
                                           "teacher_ce", "tokens_per_second"])

    # ---- saved runs

    def resume(self):
        file = self.args.out / "adapt.pt"
        if file.exists():
            saved = torch.load(file, map_location=self.student.device, weights_only=True)
            self.put(saved["weights"])
            self.lr = saved["lr"]
            self.optimiser = optimiser_of(self.student, self.lr, self.args)
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step, self.tokens, self.elapsed = saved["step"], saved["tokens"], saved["elapsed"]
        elif self.args.init:
            self.put(load_file(self.args.init, device=str(self.student.device)))
            with safe_open(self.args.init, framework="pt") as opened:
                about = opened.metadata() or {}
            self.lr = float(about["lr"]) if "lr" in about else None
            self.step, self.tokens = int(about.get("step", 0)), int(about.get("tokens", 0))
            self.elapsed = float(about.get("elapsed", 0))
        if self.step:
            self.texts.rng = np.random.default_rng(self.args.seed + self.step)     # other rows from here
            print(f"goes on at step {self.step}, {self.tokens / 1e6:.1f}M tokens, {self.elapsed:.0f}s, "
                  f"lr {self.lr}", flush=True)

    def put(self, weights):
        if set(weights) != set(self.student.trained):
            raise SystemExit(f"not this model's adapter: {sorted(set(weights) ^ set(self.student.trained))[:3]}")
        with torch.no_grad():
            for name, parameter in self.student.trained.items():
                parameter.copy_(weights[name])

    def save(self):
        out = self.args.out
        weights = {name: p.detach().clone() for name, p in self.student.trained.items()}
        torch.save({"weights": weights, "optimiser": self.optimiser.state_dict(), "lr": self.lr, "step": self.step,
                    "tokens": self.tokens, "elapsed": self.elapsed}, out / "adapt.tmp")
        (out / "adapt.tmp").rename(out / "adapt.pt")
        about = {"lr": self.lr, "step": self.step, "tokens": self.tokens, "elapsed": f"{self.elapsed:.1f}"}
        save_file({name: p.to("cpu", torch.bfloat16) for name, p in weights.items()}, out / "adapter.tmp",
                  metadata={"format": "pt", **{key: str(value) for key, value in about.items()}})
        (out / "adapter.tmp").rename(out / "adapter.safetensors")

    # ---- one step

    def rate(self):
        """Warm up at the beginning of every stage, hold, then fall linearly to a tenth."""
        p = min(1.0, self.elapsed / self.total)
        fall = min(1.0, (1 - p) / (1 - self.args.hold))
        return min(1.0, (self.stage_step + 1) / self.args.warmup) * (0.1 + 0.9 * fall)

    def apply(self):
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * self.rate()
        parameters = list(self.student.trained.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.stage_step += 1
        return norm

    def update(self, kind, length):
        """One batch: one step for `layers`, one a segment for `logits`. Returns dictionaries of losses."""
        args, got = self.args, []
        tokens = self.texts.batch(args.rows, length)
        if kind == "layers":
            got.append(self.student.layers_losses(tokens))
            self.apply()
        else:
            for loss, parts in self.student.segments(tokens, args.kl, args.ce):
                loss.backward()
                self.apply()
                got.append(parts)
        self.tokens += args.rows * length
        return got

    def score(self):
        """Losses on the validation rows, as text. Gradients stay on: switching them off would compile again."""
        parts = []
        for name, tokens in self.valid.items():
            got = next(iter(self.student.segments(tokens, 1.0, 0.0)))[1]
            parts.append(f"{name} kl {got['kl']:.4f} ce {got['ce']:.4f} (teacher {got['teacher']:.4f})")
        return "; ".join(parts), float(got["kl"])

    # ---- choosing a rate

    def try_rates(self):
        rates = [float(text) for text in self.args.lr.split(",")]
        if len(rates) == 1 or not self.args.try_seconds:
            return rates[0]
        before = {name: p.detach().clone() for name, p in self.student.trained.items()}
        for kind in ("layers", "logits"):       # compile before any clock starts
            self.optimiser = optimiser_of(self.student, 0.0, self.args)
            self.update(kind, self.args.segment)
        print(f"before: {self.score()[0]}", flush=True)
        scores = {}
        for lr in rates:
            self.put(before)
            self.optimiser = optimiser_of(self.student, lr, self.args)
            self.texts.rng = np.random.default_rng(self.args.seed)
            for kind in ("layers", "logits"):
                self.stage_step, end = 0, time.monotonic() + self.args.try_seconds / 2
                while time.monotonic() < end:
                    self.update(kind, self.args.segment)
                    self.sync()
                text, scores[lr] = self.score()
                print(f"try lr {lr:g}, {kind}, {self.stage_step} steps: {text}", flush=True)
        self.put(before)
        self.step = self.tokens = self.stage_step = 0
        finite = {lr: kl for lr, kl in scores.items() if math.isfinite(kl)}
        best = min(finite, key=finite.get)
        print(f"uses lr {best:g}", flush=True)
        return best

    def sync(self):
        if self.student.device.type == "cuda":
            torch.cuda.synchronize()

    # ---- the loop

    def stage_at(self, elapsed):
        for n, (_, seconds, _) in enumerate(self.plan):
            if elapsed < seconds or n == len(self.plan) - 1:
                return n
            elapsed -= seconds

    def report(self, kind, length, losses, speed):
        mean = {key: float(torch.stack([parts[key] for parts in losses if key in parts]).mean())
                for key in ("layers", "kl", "ce", "teacher") if any(key in parts for parts in losses)}
        csv.writer(self.log).writerow([kind, length, self.step, self.tokens, f"{self.elapsed:.1f}",
                                       f"{self.optimiser.param_groups[0]['lr']:.2e}",
                                       *(f"{mean[k]:.5f}" if k in mean else "" for k in ("layers", "kl", "ce", "teacher")),
                                       f"{speed:.0f}"])
        self.log.flush()
        text = " ".join(f"{key} {value:.4f}" for key, value in mean.items())
        print(f"{kind}:{length} step {self.step} {self.tokens / 1e6:.1f}M tokens {self.elapsed:.0f}s "
              f"{speed / 1e3:.0f}k/s {text}", flush=True)
        if not all(map(math.isfinite, mean.values())):
            raise SystemExit("the loss is no longer a number")

    def run(self):
        args, begun = self.args, time.monotonic()
        if self.lr is None:
            self.lr = self.try_rates()
            self.optimiser = None
        if self.optimiser is None:
            self.optimiser = optimiser_of(self.student, self.lr, args)
        if self.student.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        last_save = last_valid = mark = time.monotonic()
        losses, mark_tokens, compiled = [], self.tokens, set()
        print(f"ready after {time.monotonic() - begun:.0f}s", flush=True)
        while self.elapsed < self.total and time.monotonic() - begun < args.seconds:
            stage = self.stage_at(self.elapsed)
            kind, _, length = self.plan[stage]
            if stage != self.stage:
                self.stage, self.stage_step, losses = stage, 0, []
            at = time.monotonic()
            losses += self.update(kind, length)
            self.sync()
            now = time.monotonic()
            if (kind, length) not in compiled:  # the first batch compiles: off the clock
                compiled.add((kind, length))
                print(f"first {kind}:{length} batch took {now - at:.1f}s", flush=True)
                mark, mark_tokens = now, self.tokens
            else:
                self.elapsed += now - at
            if now - mark >= args.log_seconds:
                self.report(kind, length, losses, (self.tokens - mark_tokens) / (now - mark))
                losses = []
                if now - last_valid >= args.valid_seconds:
                    print(f"valid: {self.score()[0]}", flush=True)
                    last_valid = time.monotonic()
                if now - last_save >= args.save_seconds:
                    self.save()
                    last_save = time.monotonic()
                mark, mark_tokens = time.monotonic(), self.tokens
        self.save()
        memory = torch.cuda.max_memory_allocated() / 2 ** 30 if self.student.device.type == "cuda" else 0
        print(f"stopped: step {self.step}, {self.tokens / 1e6:.1f}M tokens, {self.elapsed:.0f} of {self.total:.0f}s, "
              f"peak {memory:.1f} GiB; valid: {self.score()[0]}", flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a fresh Macchiato from ../convert")
    parser.add_argument("--data", type=Path, required=True, help="what adapt_data.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", default="layers:60:2048,logits:240:2048,logits:240:8192,logits:120:16384")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this much wall time")
    parser.add_argument("--shares", default="train-books=0.3,train-docs=0.25,train-stories=0.1,train-chat=0.35",
                        help="NAME=SHARE of the rows")
    parser.add_argument("--valid", default="valid-docs=1")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--segment", type=int, default=2048, help="tokens a row and step; gradients reach back so far")
    parser.add_argument("--teacher-length", type=int, default=8192, help="what the teacher was trained for")
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--ce", type=float, default=0.2)
    parser.add_argument("--lr", default="1e-3,3e-3", help="one, or several to choose from")
    parser.add_argument("--try-seconds", type=float, default=40, help="for each of several rates")
    parser.add_argument("--bias-rate", type=float, default=5.0, help="times --lr for biases, lambda and norms")
    parser.add_argument("--start-bias", type=float, default=4.0, help="logit of p(0|t) at the start")
    parser.add_argument("--warmup", type=int, default=50, help="steps, at the beginning of every stage")
    parser.add_argument("--hold", type=float, default=0.4, help="share of the plan before the rate falls")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--save-seconds", type=float, default=60)
    parser.add_argument("--valid-seconds", type=float, default=30)
    parser.add_argument("--log-seconds", type=float, default=10)
    parser.add_argument("--init", type=Path, help="an adapter to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    Run(arguments()).run()
