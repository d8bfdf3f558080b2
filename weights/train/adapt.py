"""Trains the Latte weights of a Macchiato whose base is a frozen Transformer, which is its teacher.

    python adapt.py --model FRESH --data DATA --out RUN --plan layers:40:2048:3e-3,logits:300:2048,logits:200:8192
    torchrun --nproc-per-node 2 adapt.py ...       the same on two GPUs: --rows are those of each

The plan is a list of stages KIND:SECONDS:LENGTH[:RATE]. `layers` fits every layer alone: on the teacher's
hidden states, what its mixing adds should be what the teacher's attention adds. `logits` runs the
whole student on LENGTH tokens, in segments with the state carried, and takes KL to the teacher's
logits plus cross entropy; past --teacher-length, where the teacher is lost, cross entropy alone.
RATE is the learning rate of that stage, --lr where there is none.

RUN holds adapter.safetensors (bf16, written every --save-seconds and at the end), adapt.pt (float32
weights and the optimiser's state) and loss.csv, where the validation texts have lines of their own. The run stops after --seconds; the same command goes
on where it stopped, from adapt.pt. Where only an adapter is left, --init ADAPTER --begin SECONDS
starts with its weights at that place of the plan.
"""
import argparse
import csv
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapt_data import Texts
from distill import HeadLoss
from model import load
from teacher import Teacher

TRAINED = (".latent_q.", ".latent_k.", ".rglru.", ".rglru_norm.", ".conv.")
NORMS = (".norm1.", ".norm2.")                  # of the base, with --norms
LOW_RANK = (".o_down.", ".o_up.")               # with --o-rank
FAST = ("bias", "lambda", "rglru_norm.weight")
LOSSES = ("layers", "kl", "ce", "teacher")
VALID_SEED = 12345


def is_trained(name, norms=False):
    return any(part in name for part in TRAINED + LOW_RANK + (NORMS if norms else ()))


def parse_plan(text):
    """[(kind, seconds, length, learning rate or None)]"""
    stages = []
    for item in text.split(","):
        kind, seconds, length, *rate = item.split(":")
        if kind not in ("layers", "logits"):
            raise SystemExit(f"--plan: {kind!r} is neither layers nor logits")
        stages.append((kind, float(seconds), int(length), float(rate[0]) if rate else None))
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


class Group:
    """The processes that train together, a GPU each; one alone where torchrun did not start them."""

    def __init__(self, device):
        self.size, self.rank = (int(os.environ.get(name, default)) for name, default in
                                (("WORLD_SIZE", 1), ("RANK", 0)))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if self.size > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    def average_gradients(self, parameters):
        if self.size == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts):
            parameter.grad.copy_(part.view_as(parameter))

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()

    def agreed(self, value, device):
        """The first process's number."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(held, 0)
        return held.item()


class Student:
    """The model, its teacher and the losses, on one device."""

    def __init__(self, args):
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = load(args.model, self.device)
        if args.o_rank:
            self.add_low_rank(args.o_rank)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_trained(name, args.norms))
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        torch.set_float32_matmul_precision("high")      # for the latents' logits, which bf16 would round too coarsely
        for layer in self.model.model.layers:   # p(0|t) starts where it can still be learnt
            layer.mix.float_logits = True
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

    def add_low_rank(self, rank):
        """What each o_proj gives gets up(down(heads)) added; it starts at nothing."""
        for layer in self.model.model.layers:
            outputs, inputs = layer.mix.o_proj.weight.shape
            layer.mix.o_down = torch.nn.Linear(inputs, rank, bias=False, device=self.device)
            layer.mix.o_up = torch.nn.Linear(rank, outputs, bias=False, device=self.device)
            torch.nn.init.zeros_(layer.mix.o_up.weight)

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


def optimiser_of(student, args):
    """AdamW; `scale` is what a group's learning rate is, times the stage's. Biases move faster: a logit's offset has one
    weight where its slope has hundreds. The base's norms move slowly: every other weight of their layer rests on them.
    latent_k alone decays: what is the same for all tokens in a latent's logits changes nothing, so no gradient
    holds it, and noise carries it away."""
    kinds = {"slow": [], "fast": [], "norm": [], "latent_k": []}
    for name, parameter in student.trained.items():
        kind = ("norm" if any(part in name for part in NORMS) else "latent_k" if ".latent_k." in name
                else "fast" if name.endswith(FAST) else "slow")
        kinds[kind].append(parameter)
    scale = {"slow": 1.0, "fast": args.bias_rate, "norm": args.norm_rate, "latent_k": 1.0}
    groups = [{"params": params, "scale": scale[kind], "weight_decay": args.decay if kind == "latent_k" else 0.0}
              for kind, params in kinds.items() if params]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-12, fused=student.device.type == "cuda")


class Run:
    def __init__(self, args):
        self.args, self.plan = args, parse_plan(args.plan)
        self.total = sum(seconds for _, seconds, _, _ in self.plan)
        self.group = Group(args.device)
        self.seed = args.seed + 1000 * self.group.rank
        torch.manual_seed(args.seed)
        self.student = Student(args)
        self.texts = Texts(args.data, parse_shares(args.shares), self.student.device, self.seed)
        self.valid = {name: Texts(args.data, {name: 1.0}, self.student.device, VALID_SEED).batch(
            args.rows, args.segment, 0.0) for name in args.valid.split(",")}
        self.step = self.tokens = self.stage_step = 0
        self.elapsed, self.stage = args.begin, -1
        self.brake, self.best, self.usual = 1.0, None, None
        self.optimiser = optimiser_of(self.student, args)
        args.out.mkdir(parents=True, exist_ok=True)
        self.leads = self.group.rank == 0       # the one that writes and prints
        self.resume()
        new = not (args.out / "loss.csv").exists()
        self.log = open(args.out / "loss.csv" if self.leads else os.devnull, "a", newline="")
        if new:
            csv.writer(self.log).writerow(["stage", "length", "step", "tokens", "seconds", "lr", "layers", "kl", "ce",
                                           "teacher_ce", "tokens_per_second"])

    # ---- saved runs

    def resume(self):
        file = self.args.out / "adapt.pt"
        if file.exists():
            saved = torch.load(file, map_location=self.student.device, weights_only=True)
            self.put(saved["weights"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step, self.tokens, self.elapsed, self.brake = (
                saved[name] for name in ("step", "tokens", "elapsed", "brake"))
        elif self.args.init:
            self.put(load_file(self.args.init, device=str(self.student.device)))
            with safe_open(self.args.init, framework="pt") as opened:
                about = opened.metadata() or {}
            self.step, self.tokens = int(about.get("step", 0)), int(about.get("tokens", 0))
        if self.step:
            self.texts.rng = np.random.default_rng(self.seed + self.step)          # other rows from here
            self.say(f"goes on at step {self.step}, {self.tokens / 1e6:.1f}M tokens, {self.elapsed:.0f}s")

    def put(self, weights):
        """Weights without the base's norms or low-rank updates leave those as they are."""
        wrong = set(weights) - set(self.student.trained) | {
            name for name in set(self.student.trained) - set(weights) if any(part in name for part in TRAINED)}
        if wrong:
            raise SystemExit(f"not this run's adapter: {sorted(wrong)[:3]}")
        with torch.no_grad():
            for name, value in weights.items():
                self.student.trained[name].copy_(value)

    def save(self):
        if not self.leads:
            return
        out = self.args.out
        weights = {name: p.detach().clone() for name, p in self.student.trained.items()}
        torch.save({"weights": weights, "optimiser": self.optimiser.state_dict(), "step": self.step,
                    "tokens": self.tokens, "elapsed": self.elapsed, "brake": self.brake}, out / "adapt.tmp")
        (out / "adapt.tmp").rename(out / "adapt.pt")
        about = {"step": self.step, "tokens": self.tokens, "elapsed": f"{self.elapsed:.1f}"}
        save_file({name: p.to("cpu", torch.bfloat16) for name, p in weights.items()}, out / "adapter.tmp",
                  metadata={"format": "pt", **{key: str(value) for key, value in about.items()}})
        (out / "adapter.tmp").rename(out / "adapter.safetensors")

    # ---- one step

    def rate(self):
        """The stage's learning rate: warms up at its beginning; falls linearly at the end of the plan."""
        p = min(1.0, self.elapsed / self.total)
        fall = min(1.0, (1 - p) / (1 - self.args.hold))
        warm = min(1.0, (self.stage_step + 1) / self.args.warmup)
        return (self.plan[self.stage][3] or self.args.lr) * self.brake * warm * max(self.args.floor, fall)

    def apply(self):
        parameters = [p for p in self.student.trained.values() if p.grad is not None]   # all of them, or a layer's mix
        self.group.average_gradients(parameters)
        self.clip(parameters)
        for group in self.optimiser.param_groups:
            group["lr"] = group["scale"] * self.rate()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.stage_step += 1

    def clip(self, parameters):
        """Gradients much longer than those before are shortened to `--clip` times their usual length: the
        steps have a length of their own, so it is one gradient's share of the momentum that matters."""
        length = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.usual is None:
            self.usual = length
        limit = self.args.clip * self.usual
        short = torch.minimum(length, limit)
        for parameter in parameters:
            parameter.grad.mul_(short / length)
        self.usual = torch.lerp(self.usual, short, 0.02)

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
        self.tokens += args.rows * length * self.group.size
        return got

    def losses_of(self, tokens):
        """Gradients stay on: switching them off would compile again."""
        return next(iter(self.student.segments(tokens, 1.0, 0.0)))[1]

    def judge(self):
        """Scores the validation rows. The best weights so far are kept; where the present ones are worse by more
        than chance explains, training has lost its way, and goes on from the best ones with half the rate."""
        got = {name: self.losses_of(tokens) for name, tokens in self.valid.items()}
        for name, parts in got.items():
            self.note(name, self.args.segment, parts)
        kl = self.group.agreed(sum(float(parts["kl"]) for parts in got.values()) / len(got), self.student.device)
        self.say("valid: " + "; ".join(f"{name} kl {parts['kl']:.4f} ce {parts['ce']:.4f} (teacher {parts['teacher']:.4f})"
                                       for name, parts in got.items()))
        if self.best is None or kl < self.best[0]:
            self.best = kl, {name: p.detach().clone() for name, p in self.student.trained.items()}
        elif not kl <= self.best[0] + self.args.worse:          # not a number is worse, too
            self.put(self.best[1])
            self.optimiser = optimiser_of(self.student, self.args)
            self.brake, self.stage_step, self.usual = self.brake / 2, 0, None
            self.say(f"back to the weights of kl {self.best[0]:.4f}, rate times {self.brake:g}")

    # ---- the loop

    def sync(self):
        if self.student.device.type == "cuda":
            torch.cuda.synchronize()

    def stage_at(self, elapsed):
        for n, (_, seconds, *_) in enumerate(self.plan):
            if elapsed < seconds or n == len(self.plan) - 1:
                return n
            elapsed -= seconds

    def note(self, what, length, losses, speed=""):
        """A line of loss.csv."""
        csv.writer(self.log).writerow([what, length, self.step, self.tokens, f"{self.elapsed:.1f}", f"{self.rate():.2e}",
                                       *(f"{losses[k]:.5f}" if k in losses else "" for k in LOSSES), speed])
        self.log.flush()

    def report(self, kind, length, losses, speed):
        mean = {key: float(torch.stack([parts[key] for parts in losses if key in parts]).mean())
                for key in LOSSES if any(key in parts for parts in losses)}
        self.note(kind, length, mean, f"{speed:.0f}")
        text = " ".join(f"{key} {value:.4f}" for key, value in mean.items()) + f" gradient {float(self.usual):.3g}"
        self.say(f"{kind}:{length} step {self.step} {self.tokens / 1e6:.1f}M tokens {self.elapsed:.0f}s "
                 f"{speed / 1e3:.0f}k/s {text}")

    def say(self, text):
        if self.leads:
            print(text, flush=True)

    def clocked(self, kind, length):
        """One batch, and how long it took by the first process's clock."""
        begun = time.monotonic()
        losses = self.update(kind, length)
        self.sync()
        return losses, self.group.agreed(time.monotonic() - begun, self.student.device)

    def run(self):
        args, begun = self.args, time.monotonic()
        if self.student.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        last_save = mark = time.monotonic()
        judged = self.elapsed
        losses, mark_tokens, compiled, wall = [], self.tokens, set(), 0.0
        while self.elapsed < self.total and wall < args.seconds:
            stage = self.stage_at(self.elapsed)
            kind, _, length, _ = self.plan[stage]
            if stage != self.stage:
                self.stage, self.stage_step, self.usual, losses = stage, 0, None, []
            got, took = self.clocked(kind, length)
            losses += got
            wall = self.group.agreed(time.monotonic() - begun, self.student.device)
            now = time.monotonic()
            if (kind, length) not in compiled:  # the first batch compiles: off the clock
                compiled.add((kind, length))
                self.say(f"first {kind}:{length} batch took {took:.1f}s")
                mark, mark_tokens = now, self.tokens
            else:
                self.elapsed += took
            if self.leads and now - mark >= args.log_seconds:
                self.report(kind, length, losses, (self.tokens - mark_tokens) / (now - mark))
                losses = []
                if now - last_save >= args.save_seconds:
                    self.save()
                    last_save = time.monotonic()
                mark, mark_tokens = time.monotonic(), self.tokens
            if self.elapsed - judged >= args.valid_seconds:
                self.judge()
                judged = self.elapsed
        self.judge()
        self.save()
        memory = torch.cuda.max_memory_allocated() / 2 ** 30 if self.student.device.type == "cuda" else 0
        self.say(f"stopped: step {self.step}, {self.tokens / 1e6:.1f}M tokens, {self.elapsed:.0f} of {self.total:.0f}s, "
                 f"peak {memory:.1f} GiB a process")
        self.group.close()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a fresh Macchiato from ../convert")
    parser.add_argument("--data", type=Path, required=True, help="what adapt_data.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", default="layers:60:2048:3e-3,logits:240:2048,logits:240:8192,logits:120:16384")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this much wall time")
    parser.add_argument("--shares", default="train-books=0.3,train-docs=0.25,train-stories=0.1,train-chat=0.35",
                        help="NAME=SHARE of the rows")
    parser.add_argument("--valid", default="valid-docs", help="NAME,NAME")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--segment", type=int, default=2048, help="tokens a row and step; gradients reach back so far")
    parser.add_argument("--teacher-length", type=int, default=8192, help="what the teacher was trained for")
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--ce", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=7e-4, help="of stages that name none")
    parser.add_argument("--bias-rate", type=float, default=2.0, help="times the rate for biases, lambda and norms")
    parser.add_argument("--decay", type=float, default=1.0, help="of latent_k, times its rate")
    parser.add_argument("--norm-rate", type=float, default=0.25, help="times the rate for the base's norms")
    parser.add_argument("--norms", action="store_true", help="train the base's norms as well, which the teacher keeps")
    parser.add_argument("--o-rank", type=int, default=0,
                        help="also train an update of this rank to every o_proj: an ablation, convert.py takes none")
    parser.add_argument("--start-bias", type=float, default=4.0, help="logit of p(0|t) at the start")
    parser.add_argument("--warmup", type=int, default=50, help="steps, at the beginning of every stage")
    parser.add_argument("--hold", type=float, default=0.4, help="share of the plan before the rate falls")
    parser.add_argument("--floor", type=float, default=0.02, help="share of the rate that it falls to")
    parser.add_argument("--clip", type=float, default=1.5, help="times the usual length of the gradient")
    parser.add_argument("--worse", type=float, default=0.03,
                        help="a validation KL so much above the best goes back to the best, at half the rate")
    parser.add_argument("--save-seconds", type=float, default=60)
    parser.add_argument("--valid-seconds", type=float, default=30)
    parser.add_argument("--log-seconds", type=float, default=10)
    parser.add_argument("--init", type=Path, help="an adapter to go on from")
    parser.add_argument("--begin", type=float, default=0.0, help="seconds of the plan that are behind it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    Run(arguments()).run()
