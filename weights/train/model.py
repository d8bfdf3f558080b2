"""Latte language models as PyTorch modules: any causal configuration of the format.

The module tree carries the tensor names of the model files, so `state_dict()` is the file's
layout and a tied head has no tensor of its own. `Latte.forward` takes many tokens at once and
carries the state of every layer from call to call: feeding a text whole, in pieces or token by
token gives the same logits. On CUDA with bf16 activations the training kernels do the mixing
(kernels.py) where they support the shapes; everywhere else the exact forms of ops.py do.
"""
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import ops

try:
    import kernels
except ImportError:                             # no Triton: the plain forms serve
    kernels = None

DEFAULTS = {
    "num_key_value_heads": None, "head_dim": None, "num_latents": 0, "layer_type": None, "layer_types": None,
    "latent_input": "none", "conv_kernel": 3, "rglru_blocks": 1, "sliding_window": 128, "rope_theta": 10000.0,
    "rope_scaling": None, "query_pre_attn_scalar": None, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "position_embedding": "none", "bidirectional": False, "norm_eps": 1e-6,
    "norm_offset": 0.0, "final_norm": True, "hidden_act": "silu", "post_norms": False, "embedding_scale": 1.0,
    "tie_word_embeddings": False, "max_position_embeddings": 4096, "qk_norm": False, "bias": None, "head_bias": False,
    "latent_q_bias": None,
}
# The last four are no keys of the format: whether optional tensors exist. A file says so by having
# them; a new model has q_norm and k_norm where `qk_norm` asks for them, and biases with layernorm.


class Config:
    """config.json with the defaults filled in; attributes carry the names of the keys."""

    def __init__(self, values):
        self.values = dict(values)
        for key, value in {**DEFAULTS, **values}.items():
            setattr(self, key, value)
        if self.bidirectional:
            raise ValueError("bidirectional models are not causal language models")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.layer_types = self.layer_types or [self.layer_type] * self.num_hidden_layers
        if self.num_latents % self.num_attention_heads:
            raise ValueError("num_latents is not divisible by num_attention_heads")
        self.latents_per_head = self.num_latents // self.num_attention_heads
        if self.bias is None:
            self.bias = self.norm == "layernorm"
        if self.latent_q_bias is None:
            self.latent_q_bias = self.bias

    @classmethod
    def load(cls, path):
        return cls(json.loads(Path(path).read_text()))

    def rope_theta_of(self, layer):
        return self.rope_theta[layer] if isinstance(self.rope_theta, list) else self.rope_theta

    def window_of(self, layer):
        """Keys a query of this layer sees; 0 where there is no window."""
        kind = self.layer_types[layer]
        return {"latte": 0, "macchiato": self.sliding_window, "full_attention": self.max_position_embeddings}[kind]


def rope_frequencies(config, layer):
    """Angle per position of each pair [d/2], with the scaling Hugging Face defines for "linear" and "llama3"."""
    d = config.head_dim
    frequencies = config.rope_theta_of(layer) ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind != "llama3":
        raise ValueError(f"rope_scaling {kind!r} is not supported")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    blend = ((old * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling["factor"])


class Norm(nn.Module):
    """RMSNorm or LayerNorm in float32; `offset` is added to the stored weight."""

    def __init__(self, size, config, kind="rmsnorm"):
        super().__init__()
        self.kind, self.eps, self.offset = kind, config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        if kind == "layernorm":
            self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        y = x.float()
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * (self.weight.float() + self.offset)
        if self.kind == "layernorm":
            y = y + self.bias.float()
        return y.to(x.dtype)


class Gate(nn.Module):
    """A block-diagonal linear map: out = W[block] @ in, plus a bias over all blocks."""

    def __init__(self, size, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, size // blocks, size // blocks) / math.sqrt(size // blocks))
        self.bias = nn.Parameter(torch.zeros(size))

    def dense(self):
        """The same map as one [D, D] matrix: a single wide product beats many narrow ones."""
        return torch.block_diag(*self.weight.unbind(0))


class RGLRU(nn.Module):
    def __init__(self, size, blocks):
        super().__init__()
        self.input_gate = Gate(size, blocks)
        self.recurrence_gate = Gate(size, blocks)
        # a at full gate, exp(-8 softplus(lambda)), is spread over (0.9, 0.999)
        slowest = torch.empty(size).uniform_(0.9, 0.999)
        self.register_parameter("lambda", nn.Parameter(torch.log(torch.expm1(-torch.log(slowest) / 8))))

    def decay(self):
        return 8 * F.softplus(getattr(self, "lambda").float())


class Vapor(nn.Module):
    def __init__(self, config):
        super().__init__()
        frequencies = rope_frequencies(config, 0).float()
        self.theta = nn.Parameter(frequencies.expand(config.num_attention_heads, -1).clone())

    def turn(self, positions, sign):
        """cos and sin of sign * position * theta for positions [B, T]: [B, T, H, d/2], reduced in double."""
        angle = positions.double()[..., None, None] * self.theta.double() * sign
        angle = (torch.remainder(angle, 2 * math.pi)).float()
        return torch.cos(angle), torch.sin(angle)


class Mix(nn.Module):
    """The token mixing of one layer: window, latents, or both (weights/README.md)."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        D, H, KV, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        full = config.layer_types[layer] == "full_attention"
        self.window = config.window_of(layer)
        self.M = 0 if full else config.latents_per_head
        self.input = "none" if full else config.latent_input
        self.scale = (config.query_pre_attn_scalar or d) ** -0.5
        self.float_logits = False               # the latents' logits in float32, whatever h is

        def linear(outputs, inputs=D, bias=config.bias):
            return nn.Linear(inputs, outputs, bias=bias)

        if self.M:
            self.latent_q = linear(H * (self.M + (1 if self.window else 0)), bias=config.latent_q_bias)
            self.latent_k = linear(H * self.M)
        self.v_proj = linear(KV * d)
        if self.window:
            self.q_proj, self.k_proj = linear(H * d), linear(KV * d)
            if config.qk_norm:
                self.q_norm, self.k_norm = Norm(d, config), Norm(d, config)
        self.o_proj = linear(D, H * d)
        if self.input == "conv":
            self.conv = nn.Module()
            self.conv.weight = nn.Parameter(torch.randn(D, config.conv_kernel) / math.sqrt(config.conv_kernel))
            self.conv.bias = nn.Parameter(torch.zeros(D)) if config.bias else None
        if self.input == "rglru":
            self.rglru = RGLRU(D, config.rglru_blocks)
            self.rglru_norm = Norm(D, config)
        if config.position_embedding == "vapor" and not full:
            self.vapor = Vapor(config)

    def new_state(self, rows, device, dtype):
        """The state before the first token. `ring_segment` says which carried rows hold a token (0) or none (-1)."""
        c, state = self.config, {}
        H, KV, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        if self.M:
            state["m"] = torch.full((rows, H, self.M), -torch.inf, device=device)
            state["alpha"] = torch.zeros(rows, H, self.M, device=device)
            state["s"] = torch.zeros(rows, H, self.M, d, device=device)
        if self.window:
            state["k"] = torch.zeros(rows, self.window, KV, d, device=device, dtype=dtype)
            state["v"] = torch.zeros(rows, self.window, KV, d, device=device, dtype=dtype)
        if self.input == "conv":
            state["conv"] = torch.zeros(rows, c.conv_kernel - 1, c.hidden_size, device=device, dtype=dtype)
        if self.input == "rglru":
            state["z"] = torch.zeros(rows, c.hidden_size, device=device)
        return state

    def forward(self, h, state, place, rope):
        """h [B, T, D] to (o_proj's output, the new state). `place` is what Latte.places computed,
        `rope` the cos and sin of this layer's window."""
        c, new = self.config, {}
        B, T, D = h.shape
        H, KV, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        fast = self.kernels_fit(h)

        jobs = {"v": self.v_proj}               # what multiplies h goes into one product
        from_u = {"latent_k": self.latent_k, "latent_q": self.latent_q} if self.M else {}
        if self.window:
            (jobs if self.M or self.input == "none" else from_u).update(q=self.q_proj, k=self.k_proj)
        if self.input == "none":
            jobs.update(from_u)
        got = products(h, {name: (job.weight, job.bias) for name, job in jobs.items()},
                       self.rglru if self.input == "rglru" else None)
        u = h
        if self.input == "conv":
            u, new["conv"] = self.convolve(h, state["conv"], place)
        elif self.input == "rglru":
            scan = kernels.rglru if fast else ops.rglru
            z, new["z"] = scan(h, got["recurrence"], got["gate"], self.rglru.decay(), state["z"], place["start"])
            u = self.rglru_norm(z.to(h.dtype))
        if self.input != "none":
            got.update(products(u.float() if self.float_logits else u,
                                {name: (job.weight, job.bias) for name, job in from_u.items()}))

        v = got["v"].view(B, T, KV, d)
        if self.window:
            k_all = torch.cat([state["k"], self.normed(got["k"].view(B, T, KV, d), "k_norm")], 1)
            v_all = torch.cat([state["v"], v], 1)
            new["k"], new["v"] = k_all[:, -self.window:].contiguous(), v_all[:, -self.window:].contiguous()
            q = self.normed(got["q"].view(B, T, H, d), "q_norm")
            cos, sin = rope
            k_all, q = ops.rotate(k_all, cos, sin), ops.rotate(q, cos[-T:], sin[-T:])
        if hasattr(self, "vapor"):
            v = ops.rotate(v.repeat_interleave(H // KV, 2), *self.vapor.turn(place["position"], -1))
            if self.window:
                v_all = ops.rotate(v_all.repeat_interleave(H // KV, 2),
                                   *self.vapor.turn(place["ring_position"][:, -v_all.shape[1]:], -1))
                k_all = k_all.repeat_interleave(H // KV, 2)

        y = 0
        if self.window:
            seen = place["ring_segment"][:, -k_all.shape[1]:].contiguous()
            if fast:                            # the kernels want keys and values for every head
                k_all, v_all = (x.repeat_interleave(H // x.shape[2], 2) for x in (k_all, v_all))
                y, _ = kernels.window(q, k_all, v_all, seen, self.scale)
            else:
                y = ops.window(q, k_all, v_all, seen, self.window, self.scale, c.attn_logit_softcapping)
        if self.M:
            p = torch.softmax(got["latent_q"].view(B, T, H, -1).float(), -1)
            if self.window:
                y = y * p[..., :1]
                p = p[..., 1:]
            theta = got["latent_k"].view(B, T, H, self.M)
            v = v.repeat_interleave(H // v.shape[2], 2) if v.shape[2] != H else v
            if fast:
                lift = torch.exp(state["m"])    # the kernels keep sums whose maximum is 0
                latents, alpha, s = kernels.latent(theta, p.to(h.dtype), v, place["segment"],
                                                   state["alpha"] * lift, state["s"] * lift[..., None])
                new["m"] = torch.zeros_like(state["m"])
                new["alpha"], new["s"] = alpha[:, :, -1].contiguous(), s[:, :, -1].contiguous()
            else:
                latents, (new["m"], new["alpha"], new["s"]) = ops.latent(
                    theta, p, v, place["segment"], (state["m"], state["alpha"], state["s"]))
            y = y + latents
        if hasattr(self, "vapor"):
            y = ops.rotate(y, *self.vapor.turn(place["position"], 1))
        heads = y.to(h.dtype).reshape(B, T, H * d)
        y = linear(heads, self.o_proj.weight, self.o_proj.bias)
        if hasattr(self, "o_down"):             # a low-rank update that adapt.py trains
            y = y + linear(linear(heads, self.o_down.weight), self.o_up.weight)
        return y, {name: tensor.detach() for name, tensor in new.items()}

    def kernels_fit(self, h):
        """Whether the training kernels serve this layer, device and number of tokens."""
        c = self.config
        return (kernels is not None and h.is_cuda and h.dtype == torch.bfloat16 and h.shape[1] % 64 == 0
                and self.input == "rglru" and self.window and self.window % 64 == 0
                and self.M in (16, 32, 64) and c.head_dim in (32, 64, 128)
                and not c.attn_logit_softcapping and c.position_embedding != "vapor")

    def normed(self, x, name):
        return getattr(self, name)(x) if hasattr(self, name) else x

    def convolve(self, h, past, place):
        """Taps must not reach into another session: one that began inside h cuts them off."""
        taps, T = self.config.conv_kernel, h.shape[1]
        rows = torch.cat([past, h], 1)
        segment = F.pad(place["segment"], (taps - 1, 0))
        bias = self.conv.bias
        u = sum(rows[:, taps - 1 - i:taps - 1 - i + T] * self.conv.weight[:, i].to(h.dtype)
                * (segment[:, taps - 1 - i:taps - 1 - i + T] == place["segment"])[..., None] for i in range(taps))
        u = u if bias is None else u + bias.to(h.dtype)
        kept = rows[:, T:] * (segment[:, T:] == segment[:, -1:])[..., None]
        return u, kept


def linear(x, weight, bias=None):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def products(x, jobs, rglru=None):
    """x times each weight of {name: (weight, bias)} as one product; with `rglru` also its two gates.
    Frozen weights are a product of their own: no gradient is computed for them."""
    jobs = dict(jobs)
    if rglru is not None:
        jobs["recurrence"] = (rglru.recurrence_gate.dense(), rglru.recurrence_gate.bias)
        jobs["gate"] = (rglru.input_gate.dense(), rglru.input_gate.bias)
    frozen = {name: job for name, job in jobs.items() if not job[0].requires_grad}
    if frozen and len(frozen) < len(jobs):
        return {**_product(x, frozen), **_product(x, {n: job for n, job in jobs.items() if n not in frozen})}
    return _product(x, jobs)


def _product(x, jobs):
    if not jobs:
        return {}
    names = list(jobs)
    widths = [jobs[name][0].shape[0] for name in names]
    weights = [jobs[name][0].to(x.dtype) for name in names]
    biases = [jobs[name][1] for name in names]
    padding = -sum(widths) % 8                  # odd widths cost the matrix units their fast path
    if padding:
        weights.append(weights[0].new_zeros(padding, x.shape[-1]))
    out = linear(x, torch.cat(weights))
    got = dict(zip(names, out[..., :sum(widths)].split(widths, -1)))
    return {name: part if bias is None else part + bias.to(x.dtype)
            for (name, part), bias in zip(got.items(), biases)}


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gated = config.mlp == "gated"
        self.act = ops.activation(config.hidden_act)
        if self.gated:
            self.gate_proj = nn.Linear(D, width, bias=config.bias)
        self.up_proj = nn.Linear(D, width, bias=config.bias)
        self.down_proj = nn.Linear(width, D, bias=config.bias)

    def forward(self, h):
        jobs = {"up": (self.up_proj.weight, self.up_proj.bias)}
        if self.gated:
            jobs["gate"] = (self.gate_proj.weight, self.gate_proj.bias)
        got = products(h, jobs)
        inner = self.act(got["gate"]) * got["up"] if self.gated else self.act(got["up"])
        return linear(inner, self.down_proj.weight, self.down_proj.bias)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D = config.hidden_size
        self.norm1, self.norm2 = Norm(D, config, config.norm), Norm(D, config, config.norm)
        self.mix, self.mlp = Mix(config, layer), MLP(config)
        if config.post_norms:
            self.post_norm1, self.post_norm2 = Norm(D, config), Norm(D, config)

    def forward(self, x, state, place, rope):
        y, state = self.mix(self.norm1(x), state, place, rope)
        x = x + (self.post_norm1(y) if hasattr(self, "post_norm1") else y)
        y = self.mlp(self.norm2(x))
        x = x + (self.post_norm2(y) if hasattr(self, "post_norm2") else y)
        return x, state


class Latte(nn.Module):
    """A causal Latte language model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.model.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        if config.final_norm:
            self.model.norm = Norm(D, config, config.norm)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, config.vocab_size, bias=config.head_bias)
        self.initialise()

    def initialise(self):
        """Rows of the embedding have length one; the last product of each branch starts at zero."""
        D = self.config.hidden_size
        nn.init.normal_(self.model.embed_tokens.weight, std=D ** -0.5)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(("o_proj", "down_proj")):
                    nn.init.zeros_(module.weight)
                if name.endswith(("latent_q", "latent_k")):
                    nn.init.normal_(module.weight, std=0.5 * module.in_features ** -0.5)

    def new_state(self, rows, device, dtype=torch.float32):
        """The state of `rows` sessions before their first token."""
        ring = max(self.config.window_of(n) for n in range(self.config.num_hidden_layers))
        return {
            "position": torch.zeros(rows, dtype=torch.long, device=device),
            "ring_segment": torch.full((rows, ring), -1, dtype=torch.int32, device=device),
            "layers": [layer.mix.new_state(rows, device, dtype) for layer in self.model.layers],
        }

    def places(self, state, start, length):
        """Where the tokens stand, shared by all layers, from `start` [B, T] (1: a session begins here):
        segment numbers and positions, of the tokens and of the carried rows before them."""
        device = start.device
        segment = start.cumsum(1, dtype=torch.int32)
        index = torch.arange(length, device=device)
        begun = torch.where(start.bool(), index, -1).cummax(1).values
        position = torch.where(begun < 0, state["position"][:, None] + index, index - begun)
        ring = state["ring_segment"].shape[1]
        back = torch.arange(-ring, 0, device=device)
        place = {
            "start": start.to(torch.int32), "segment": segment, "position": position,
            "ring_segment": torch.cat([state["ring_segment"], segment], 1),
            "ring_position": torch.cat([state["position"][:, None] + back, position], 1),
        }
        last = segment[:, -1:]
        carried = place["ring_segment"][:, -ring:] if ring else state["ring_segment"]
        return place, position[:, -1] + 1, torch.where(carried == last, 0, -1).to(torch.int32)

    def rope(self, layer, length, device):
        """cos and sin [w + T, 1, d/2], counted from the oldest carried row: only differences matter inside a window."""
        window = self.config.window_of(layer)
        key = (window, length, self.config.rope_theta_of(layer), device)
        cache = self.__dict__.setdefault("_rope", {})
        if key not in cache:
            angle = torch.arange(window + length, dtype=torch.float64)[:, None] * rope_frequencies(self.config, layer)
            cache[key] = (angle.cos().float()[:, None].to(device), angle.sin().float()[:, None].to(device))
        return cache[key]

    def embed(self, tokens, position, dtype):
        c = self.config
        x = F.embedding(tokens, self.model.embed_tokens.weight).float() * c.embedding_scale
        if c.position_embedding == "sinusoidal":
            rate = 10000.0 ** (-torch.arange(0, c.hidden_size, 2, dtype=torch.float64, device=x.device) / c.hidden_size)
            angle = position.double()[..., None] * rate
            x = x + torch.stack([angle.sin(), angle.cos()], -1).flatten(-2).float()
        return x.to(dtype)

    def hidden(self, tokens, state=None, start=None, dtype=torch.float32):
        """tokens [B, T] to what the head multiplies [B, T, D], and the new state. Without a state the
        sessions begin with the first token; `start` marks beginnings inside the rows."""
        B, T = tokens.shape
        start = torch.zeros_like(tokens, dtype=torch.int32) if start is None else start.to(torch.int32)
        if state is None:
            state = self.new_state(B, tokens.device, dtype)
        fresh = F.pad((state["position"] == 0).to(torch.int32)[:, None], (0, T - 1))
        place, position, ring_segment = self.places(state, torch.maximum(start, fresh), T)
        x = self.embed(tokens, place["position"], dtype)
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()                  # under a frozen embedding: all layers alike, compiled once
        layers = []
        for n, (layer, layer_state) in enumerate(zip(self.model.layers, state["layers"])):
            x, layer_state = layer(x, layer_state, place, self.rope(n, T, tokens.device))
            layers.append(layer_state)
        if self.config.final_norm:
            x = self.model.norm(x)
        return x, {"position": position, "ring_segment": ring_segment, "layers": layers}

    def head(self, x):
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        logits = linear(x, weight, None if self.config.tie_word_embeddings else self.lm_head.bias)
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def forward(self, tokens, state=None, start=None, dtype=torch.float32):
        """Logits [B, T, V] and the new state."""
        x, state = self.hidden(tokens, state, start, dtype)
        return self.head(x), state


def load(directory, device="cpu"):
    """A model from a directory: config.json and safetensors, sharded or not, as float32 parameters."""
    from safetensors.torch import load_file
    directory = Path(directory)
    values = json.loads((directory / "config.json").read_text())
    tensors = {}
    for file in sorted(directory.glob("model*.safetensors")):
        tensors.update(load_file(file, device=str(device)))
    values["qk_norm"] = any(name.endswith("q_norm.weight") for name in tensors)
    values["bias"] = any(name.endswith(("proj.bias", "conv.bias")) for name in tensors)
    values["head_bias"] = "lm_head.bias" in tensors
    values["latent_q_bias"] = any(name.endswith("latent_q.bias") for name in tensors)
    model = Latte(Config(values)).to(device)
    missing, unexpected = model.load_state_dict({k: t.float() for k, t in tensors.items()}, strict=False)
    missing = [name for name in missing if not name.endswith("bias")]
    if missing or unexpected:
        raise ValueError(f"{directory}: missing {missing}, unexpected {unexpected}")
    return model
