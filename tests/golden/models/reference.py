"""A Latte language model in plain PyTorch: the oracle of the golden tests.

Written from the mathematics in weights/README.md alone, one token at a time and one head at a
time, with nothing clever in it. Slow and obviously right is the point: what the engine computes
is compared with this.

Letters: D hidden size, H heads, KV kv heads, d head width, M latents a head, w window,
K conv taps, V vocabulary.
"""
import json
import math
import pathlib

import torch
from safetensors.torch import load_file

DEFAULTS = {
    "embedding_scale": 1.0, "post_norms": False, "rope_theta": 10000.0, "norm_eps": 1e-6,
    "norm_offset": 0.0, "conv_kernel": 3, "sliding_window": 128, "rglru_blocks": 1,
    "tie_word_embeddings": False, "hidden_act": "silu", "position_embedding": "none",
    "latent_input": "none", "final_norm": True, "num_latents": 0, "max_position_embeddings": 4096,
    "query_pre_attn_scalar": None, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "rope_scaling": None,
}


def load(directory):
    """Configuration and tensors of a model directory, single file or shards."""
    directory = pathlib.Path(directory)
    config = json.loads((directory / "config.json").read_text())
    tensors = {}
    for path in sorted(directory.glob("model*.safetensors")):
        tensors.update(load_file(path))
    return config, tensors


def is_matrix(name):
    """Whether the engine keeps this tensor in the dtype chosen for weights; all others are f32."""
    linears = ("latent_q", "latent_k", "v_proj", "q_proj", "k_proj", "o_proj", "gate_proj",
               "up_proj", "down_proj", "embed_tokens", "lm_head")
    return name.endswith(".weight") and name.split(".")[-2] in linears


def rotate(x, angles):
    """Turn the pair (x_i, x_{i + d/2}) by angles[i]."""
    half = x.shape[-1] // 2
    a, b = x[:half], x[half:]
    return torch.cat([a * torch.cos(angles) - b * torch.sin(angles),
                      a * torch.sin(angles) + b * torch.cos(angles)])


def softcapped(x, cap):
    return cap * torch.tanh(x / cap) if cap else x


class Model:
    """One session of one model. dtype is that of all arithmetic; angles are always float64."""

    def __init__(self, config, tensors, dtype=torch.float64, round_matrices=None):
        self.c = {**DEFAULTS, **config}
        c = self.c
        self.dtype = dtype
        self.t = {}
        for name, value in tensors.items():
            if round_matrices is not None and is_matrix(name):
                value = value.to(round_matrices)
            self.t[name] = value.to(dtype)
        self.D, self.H, self.V = c["hidden_size"], c["num_attention_heads"], c["vocab_size"]
        self.KV = c.get("num_key_value_heads") or self.H
        self.d = c.get("head_dim") or self.D // self.H
        self.M = (c["num_latents"] or 0) // self.H
        self.n_layers = c["num_hidden_layers"]
        self.types = c.get("layer_types") or [c["layer_type"]] * self.n_layers
        scalar = c["query_pre_attn_scalar"] or self.d
        self.scale = 1 / math.sqrt(scalar)
        self.reset()

    def reset(self):
        self.position = 0
        self.layers = [self.fresh_state() for _ in range(self.n_layers)]

    def fresh_state(self):
        H, M, d = self.H, self.M, self.d
        zeros = lambda *shape: torch.zeros(*shape, dtype=self.dtype)
        return {
            "m": torch.full((H, M), -math.inf, dtype=self.dtype), "alpha": zeros(H, M),
            "s": zeros(H, M, d),
            "keys": [], "values": [],                       # the window, oldest first: [KV, d] each
            "conv": [zeros(self.D)] * (self.c["conv_kernel"] - 1),  # the last rows of h, oldest first
            "rglru": None,
        }

    # ---- small parts ----

    def linear(self, x, name):
        y = self.t[name + ".weight"] @ x
        return y + self.t[name + ".bias"] if name + ".bias" in self.t else y

    def rms_norm(self, x, weight):
        mean_square = (x * x).mean()
        return x / torch.sqrt(mean_square + self.c["norm_eps"]) * (weight + self.c["norm_offset"])

    def norm(self, x, name):
        weight = self.t[name + ".weight"]
        if self.c["norm"] == "rmsnorm":
            return self.rms_norm(x, weight)
        centred = x - x.mean()
        y = centred / torch.sqrt((centred * centred).mean() + self.c["norm_eps"])
        y = y * (weight + self.c["norm_offset"])
        return y + self.t[name + ".bias"] if name + ".bias" in self.t else y

    def act(self, x):
        kind = self.c["hidden_act"]
        if kind == "silu":
            return x * torch.sigmoid(x)
        if kind == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        assert kind == "gelu_tanh"
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    def mlp(self, h, p):
        if self.c["mlp"] == "gated":
            return self.linear(self.act(self.linear(h, p + "gate_proj"))
                               * self.linear(h, p + "up_proj"), p + "down_proj")
        return self.linear(self.act(self.linear(h, p + "up_proj")), p + "down_proj")

    # ---- positions ----

    def rope_frequencies(self, layer):
        theta = self.c["rope_theta"]
        theta = theta[layer] if isinstance(theta, list) else theta
        frequencies = [theta ** (-2 * i / self.d) for i in range(self.d // 2)]
        scaling = self.c["rope_scaling"]
        if scaling is None:
            return frequencies
        kind = scaling.get("rope_type") or scaling["type"]
        if kind == "linear":
            return [f / scaling["factor"] for f in frequencies]
        assert kind == "llama3"
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        old = scaling["original_max_position_embeddings"]
        scaled = []
        for f in frequencies:
            wavelength = 2 * math.pi / f
            if wavelength < old / high:
                scaled.append(f)
            elif wavelength > old / low:
                scaled.append(f / scaling["factor"])
            else:
                smooth = (old / wavelength - low) / (high - low)
                scaled.append((1 - smooth) * f / scaling["factor"] + smooth * f)
        return scaled

    def angles(self, turns):
        """Angles (float64, any size) reduced modulo 2 pi before they become dtype."""
        return torch.remainder(torch.as_tensor(turns, dtype=torch.float64),
                               2 * math.pi).to(self.dtype)

    def rope(self, x, layer):
        return rotate(x, self.angles([self.position * f for f in self.rope_frequencies(layer)]))

    def vapor(self, x, layer, head, turns):
        """R^turns x, with the learned angles of a head."""
        theta = self.t[f"model.layers.{layer}.mix.vapor.theta"][head].to(torch.float64)
        return rotate(x, self.angles(turns * theta))

    def sinusoidal(self):
        column = torch.arange(0, self.D, 2, dtype=torch.float64)
        angle = self.angles(self.position * 10000.0 ** (-column / self.D))
        out = torch.zeros(self.D, dtype=self.dtype)
        out[0::2], out[1::2] = torch.sin(angle), torch.cos(angle)[: self.D // 2]
        return out

    # ---- the latent input ----

    def conv(self, h, p, state):
        weight = self.t[p + "conv.weight"]  # [D, K], column 0 is the current token
        past = state["conv"] + [h]
        u = sum(weight[:, i] * past[-1 - i] for i in range(weight.shape[1]))
        state["conv"] = past[1:]
        return u + self.t[p + "conv.bias"] if p + "conv.bias" in self.t else u

    def gate(self, h, name):
        weight = self.t[name + ".weight"]  # [B, D/B, D/B]
        parts = h.reshape(weight.shape[0], -1)
        y = torch.cat([weight[b] @ parts[b] for b in range(weight.shape[0])])
        return torch.sigmoid(y + self.t[name + ".bias"] if name + ".bias" in self.t else y)

    def rglru(self, h, p, state):
        r = self.gate(h, p + "rglru.recurrence_gate")
        i = self.gate(h, p + "rglru.input_gate")
        log_a = -8 * torch.nn.functional.softplus(self.t[p + "rglru.lambda"]) * r
        if state["rglru"] is None:
            z = i * h
        else:
            z = torch.exp(log_a) * state["rglru"] + torch.sqrt(-torch.expm1(2 * log_a)) * (i * h)
        state["rglru"] = z
        return self.rms_norm(z, self.t[p + "rglru_norm.weight"])

    def latent_input(self, h, p, state):
        kind = self.c["latent_input"]
        if kind == "none":
            return h
        return self.conv(h, p, state) if kind == "conv" else self.rglru(h, p, state)

    # ---- mixing ----

    def latents(self, u, v, layer, p, state, with_window):
        """For each head sum_l p(l|t) s_l / alpha_l, and p(0|t)."""
        has_vapor = self.c["position_embedding"] == "vapor"
        theta = self.linear(u, p + "latent_k").reshape(self.H, self.M)
        g = self.linear(u, p + "latent_q").reshape(self.H, -1)
        out, p0 = [], []
        for a in range(self.H):
            value = v[a * self.KV // self.H]
            if has_vapor:
                value = self.vapor(value, layer, a, -self.position)
            m = torch.maximum(state["m"][a], theta[a])
            keep, take = torch.exp(state["m"][a] - m), torch.exp(theta[a] - m)
            alpha = state["alpha"][a] * keep + take
            s = state["s"][a] * keep[:, None] + take[:, None] * value[None, :]
            state["m"][a], state["alpha"][a], state["s"][a] = m, alpha, s
            probabilities = torch.softmax(g[a], 0)
            if with_window:
                p0.append(probabilities[0])
                probabilities = probabilities[1:]
            y = sum(probabilities[l] * s[l] / alpha[l] for l in range(self.M))
            out.append(self.vapor(y, layer, a, self.position) if has_vapor else y)
        return out, p0

    def window(self, x, v, layer, p, state, rows):
        """For each head softmax attention over the last `rows` tokens, this one included."""
        q = self.linear(x, p + "q_proj").reshape(self.H, self.d)
        k = self.linear(x, p + "k_proj").reshape(self.KV, self.d)
        if p + "q_norm.weight" in self.t:
            q = torch.stack([self.rms_norm(row, self.t[p + "q_norm.weight"]) for row in q])
        if p + "k_norm.weight" in self.t:
            k = torch.stack([self.rms_norm(row, self.t[p + "k_norm.weight"]) for row in k])
        q = [self.rope(row, layer) for row in q]
        k = torch.stack([self.rope(row, layer) for row in k])
        state["keys"] = (state["keys"] + [k])[-rows:]
        state["values"] = (state["values"] + [v])[-rows:]

        vapor = self.c["position_embedding"] == "vapor" and self.types[layer] != "full_attention"
        n = len(state["keys"])
        out = []
        for a in range(self.H):
            kv = a * self.KV // self.H
            scores = torch.stack([q[a] @ key[kv] for key in state["keys"]]) * self.scale
            weights = torch.softmax(softcapped(scores, self.c["attn_logit_softcapping"]), 0)
            values = [value[kv] for value in state["values"]]
            if vapor:  # R^t R^{-s} v_s, and t - s is the age of the value
                values = [self.vapor(value, layer, a, n - 1 - i) for i, value in enumerate(values)]
            out.append(sum(weights[i] * values[i] for i in range(n)))
        return out

    def mix(self, h, layer):
        p, kind, state = f"model.layers.{layer}.mix.", self.types[layer], self.layers[layer]
        v = self.linear(h, p + "v_proj").reshape(self.KV, self.d)
        if kind == "full_attention":
            heads = self.window(h, v, layer, p, state, self.c["max_position_embeddings"])
            return self.linear(torch.cat(heads), p + "o_proj")

        u = self.latent_input(h, p, state)
        if self.M == 0:
            heads = self.window(u, v, layer, p, state, self.c["sliding_window"])
        elif kind == "latte":
            heads, _ = self.latents(u, v, layer, p, state, False)
        else:
            far, p0 = self.latents(u, v, layer, p, state, True)
            near = self.window(h, v, layer, p, state, self.c["sliding_window"])
            heads = [p0[a] * near[a] + far[a] for a in range(self.H)]
        return self.linear(torch.cat(heads), p + "o_proj")

    # ---- the whole ----

    @torch.no_grad()
    def step(self, token):
        """Feed one token; the logits [V] of what follows it."""
        x = self.t["model.embed_tokens.weight"][token] * self.c["embedding_scale"]
        if self.c["position_embedding"] == "sinusoidal":
            x = x + self.sinusoidal()
        for layer in range(self.n_layers):
            p = f"model.layers.{layer}."
            y = self.mix(self.norm(x, p + "norm1"), layer)
            x = x + (self.rms_norm(y, self.t[p + "post_norm1.weight"]) if self.c["post_norms"] else y)
            y = self.mlp(self.norm(x, p + "norm2"), p + "mlp.")
            x = x + (self.rms_norm(y, self.t[p + "post_norm2.weight"]) if self.c["post_norms"] else y)
        if self.c["final_norm"]:
            x = self.norm(x, "model.norm")
        if self.c["tie_word_embeddings"]:
            logits = self.t["model.embed_tokens.weight"] @ x
        else:
            logits = self.linear(x, "lm_head")
        self.position += 1
        return softcapped(logits, self.c["final_logit_softcapping"])

    def run(self, tokens):
        """Feed tokens; logits [T, V] after each."""
        return torch.stack([self.step(int(t)) for t in tokens])

    # ---- the state, by the engine's names and shapes ----

    def ring(self, rows_held, rows):
        """[KV, rows, d]: the token at position p lies in row p mod rows."""
        ring = torch.zeros(self.KV, rows, self.d, dtype=self.dtype)
        for age, row in enumerate(reversed(rows_held)):
            ring[:, (self.position - 1 - age) % rows] = row
        return ring

    def state(self):
        out = {}
        for layer, (kind, s) in enumerate(zip(self.types, self.layers)):
            p, full = f"layers.{layer}.", kind == "full_attention"
            if self.M and not full:
                out |= {p + "latent_m": s["m"], p + "latent_alpha": s["alpha"], p + "latent_s": s["s"]}
            if kind != "latte":
                rows = self.c["max_position_embeddings" if full else "sliding_window"]
                out |= {p + "ring_k": self.ring(s["keys"], rows),
                        p + "ring_v": self.ring(s["values"], rows)}
            if s["conv"] and self.c["latent_input"] == "conv" and not full:
                out[p + "conv"] = torch.stack(s["conv"])
            if self.c["latent_input"] == "rglru" and not full:
                out[p + "rglru"] = s["rglru"]
        return out
