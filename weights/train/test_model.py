"""The parallel form against the recurrence of weights/README.md, one token at a time in float64 NumPy.

    python test_model.py        or        pytest test_model.py

Random small configurations; the text is fed whole, in pieces with the state carried, and with
sessions that begin inside a row. With TRITON_INTERPRET=1 the training kernels are compared with
the plain forms as well, without a GPU.
"""
import math
import os
import random

import numpy as np
import torch

import ops
from model import Config, Latte, rope_frequencies

TOLERANCE = 2e-4        # float32 against float64, a few layers deep; logits are of order one

BASE = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_latents": 16, "sliding_window": 8, "layer_type": "macchiato",
    "norm": "rmsnorm", "mlp": "gated",
}
CASES = {
    "latte": {"layer_type": "latte", "norm": "layernorm", "mlp": "plain", "position_embedding": "sinusoidal"},
    "latte vapor": {"layer_type": "latte", "position_embedding": "vapor"},
    "conv": {"layer_type": "latte", "latent_input": "conv"},
    "conv window": {"latent_input": "conv", "conv_kernel": 4, "tie_word_embeddings": True},
    "rglru": {"layer_type": "latte", "latent_input": "rglru", "rglru_blocks": 4},
    "rglru window": {"latent_input": "rglru", "rglru_blocks": 4, "tie_word_embeddings": True},
    "rglru window, no latents": {"latent_input": "rglru", "rglru_blocks": 2, "num_latents": 0},
    "window, no latents": {"num_latents": 0},
    "transformer": {"layer_type": "full_attention", "max_position_embeddings": 64},
    "window vapor": {"position_embedding": "vapor", "num_key_value_heads": 2},
    "mixed": {"layer_types": ["full_attention", "macchiato"], "max_position_embeddings": 64, "latent_input": "rglru"},
    "gemma": {"latent_input": "rglru", "num_key_value_heads": 2, "head_dim": 16, "norm_offset": 1.0, "post_norms": True,
              "embedding_scale": 5.5, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
              "query_pre_attn_scalar": 20.0, "hidden_act": "gelu_tanh", "tie_word_embeddings": True},
    "qk norm, llama3": {"qk_norm": True, "rope_theta": [100.0, 1000.0], "num_key_value_heads": 1, "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def turn(x, angle):
    """x [..., d] with pairs (i, i + d/2) turned by angle [..., d/2]."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


class Recurrence:
    """One session, fed token by token; written from weights/README.md, not from model.py."""

    def __init__(self, config, weights):
        self.c, self.w = config, {name: t.double().numpy() for name, t in weights.items()}
        self.position = 0
        self.layers = [{} for _ in range(config.num_hidden_layers)]

    def norm(self, x, name, kind="rmsnorm"):
        weight = self.w[name + ".weight"] + self.c.norm_offset
        if kind == "layernorm":
            x = x - x.mean()
            return x / np.sqrt((x * x).mean() + self.c.norm_eps) * weight + self.w[name + ".bias"]
        return x / np.sqrt((x * x).mean() + self.c.norm_eps) * weight

    def linear(self, x, name):
        return self.w[name + ".weight"] @ x + self.w.get(name + ".bias", 0)

    def gate(self, h, name):
        blocks = self.w[name + ".weight"]
        parts = np.split(h, len(blocks))
        return sigmoid(np.concatenate([block @ part for block, part in zip(blocks, parts)]) + self.w[name + ".bias"])

    def latent_input(self, h, at, state):
        if self.c.latent_input == "conv":
            taps = self.w[at + "conv.weight"]
            past = [h] + state.get("past", [])
            state["past"] = past[:taps.shape[1] - 1]
            return sum(taps[:, i] * row for i, row in enumerate(past)) + self.w.get(at + "conv.bias", 0)
        if self.c.latent_input == "rglru":
            r, i = self.gate(h, at + "rglru.recurrence_gate"), self.gate(h, at + "rglru.input_gate")
            if self.position == 0:
                z = i * h
            else:
                log_a = -8 * np.log1p(np.exp(self.w[at + "rglru.lambda"])) * r
                z = np.exp(log_a) * state["z"] + np.sqrt(-np.expm1(2 * log_a)) * i * h
            state["z"] = z
            return self.norm(z, at + "rglru_norm")
        return h

    def mix(self, h, layer, state):
        c, at = self.c, f"model.layers.{layer}.mix."
        H, KV, d, M = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.latents_per_head
        full = c.layer_types[layer] == "full_attention"
        M, window = (0 if full else M), c.window_of(layer)
        u = h if full else self.latent_input(h, at, state)
        own = self.linear(h, at + "v_proj").reshape(KV, d).repeat(H // KV, 0)
        vapor = self.w.get(at + "vapor.theta")
        v = own if vapor is None else turn(own, -self.position * vapor)
        y = np.zeros((H, d))
        if window:
            source = u if not M else h
            q = self.linear(source, at + "q_proj").reshape(H, d)
            k = self.linear(source, at + "k_proj").reshape(KV, d)
            if at + "q_norm.weight" in self.w:
                q = np.stack([self.norm(row, at + "q_norm") for row in q])
                k = np.stack([self.norm(row, at + "k_norm") for row in k])
            angle = self.position * rope_frequencies(c, layer).numpy()
            q, k = turn(q, angle), turn(k, angle).repeat(H // KV, 0)
            state["ring"] = (state.get("ring", []) + [(k, v)])[-window:]
            for head in range(H):
                scores = np.array([q[head] @ key[head] for key, _ in state["ring"]])
                scores = scores / math.sqrt(c.query_pre_attn_scalar or d)
                if c.attn_logit_softcapping:
                    scores = c.attn_logit_softcapping * np.tanh(scores / c.attn_logit_softcapping)
                y[head] = softmax(scores) @ np.stack([value[head] for _, value in state["ring"]])
        if M:
            theta = self.linear(u, at + "latent_k").reshape(H, M)
            p = np.stack([softmax(g) for g in self.linear(u, at + "latent_q").reshape(H, -1)])
            m = state.get("m", np.full((H, M), -np.inf))
            top = np.maximum(m, theta)
            shrink, weight = np.exp(m - top), np.exp(theta - top)
            state["alpha"] = state.get("alpha", 0) * shrink + weight
            state["s"] = state.get("s", 0) * shrink[..., None] + weight[..., None] * v[:, None]
            state["m"] = top
            latents = np.einsum("hm,hmd->hd", p[:, -M:] / state["alpha"], state["s"])
            y = p[:, :1] * y + latents if window else latents
        if vapor is not None:
            y = turn(y, self.position * vapor)
        return self.linear(y.reshape(-1), at + "o_proj")

    def mlp(self, h, at):
        x = self.linear(h, at + ("gate_proj" if self.c.mlp == "gated" else "up_proj"))
        act = {"silu": lambda x: x * sigmoid(x),
               "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))}
        x = act[self.c.hidden_act](x)
        return self.linear(x * self.linear(h, at + "up_proj") if self.c.mlp == "gated" else x, at + "down_proj")

    def step(self, token):
        c = self.c
        row = self.w["model.embed_tokens.weight"][token]
        x = row * c.embedding_scale
        if c.position_embedding == "sinusoidal":
            even = np.arange(0, c.hidden_size, 2)
            angle = self.position / 10000.0 ** (even / c.hidden_size)
            x = x + np.stack([np.sin(angle), np.cos(angle)], -1).reshape(-1)
        for n in range(c.num_hidden_layers):
            at = f"model.layers.{n}."
            y = self.mix(self.norm(x, at + "norm1", c.norm), n, self.layers[n])
            x = x + (self.norm(y, at + "post_norm1") if c.post_norms else y)
            y = self.mlp(self.norm(x, at + "norm2", c.norm), at + "mlp.")
            x = x + (self.norm(y, at + "post_norm2") if c.post_norms else y)
        self.position += 1
        x = self.norm(x, "model.norm", c.norm)
        logits = self.w["lm_head.weight" if not c.tie_word_embeddings else "model.embed_tokens.weight"] @ x
        cap = c.final_logit_softcapping
        return cap * np.tanh(logits / cap) if cap else logits


def random_model(case, seed):
    torch.manual_seed(seed)
    config = Config({**BASE, **case})
    model = Latte(config)
    with torch.no_grad():                       # nothing may hide behind a zero or a one
        for name, parameter in model.named_parameters():
            if name.endswith("latent_k.weight"):
                parameter.normal_(std=2.0)      # logits far apart: the maxima matter
            elif "lambda" not in name and "vapor" not in name:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return config, model


def check(name, seed=0, T=41):
    config, model = random_model(CASES[name], seed)
    rng = random.Random(seed)
    tokens = torch.randint(0, config.vocab_size, (2, T))
    start = torch.zeros(2, T, dtype=torch.int32)
    start[1, 7] = start[1, 30] = 1              # the second row holds three sessions
    want = np.zeros((2, T, config.vocab_size))
    for row in range(2):
        for t in range(T):
            if t == 0 or start[row, t]:
                session = Recurrence(config, model.state_dict())
            want[row, t] = session.step(int(tokens[row, t]))

    with torch.no_grad():
        whole, _ = model(tokens, start=start)
        pieces, state, t = [], None, 0
        while t < T:
            end = min(T, t + rng.choice([1, 1, 2, 9, 17]))
            logits, state = model(tokens[:, t:end], state, start[:, t:end])
            pieces.append(logits)
            t = end
    for form, got in (("whole", whole), ("in pieces", torch.cat(pieces, 1))):
        error = np.abs(got.double().numpy() - want).max()
        assert error < TOLERANCE * max(1, np.abs(want).max()), f"{name}, {form}: off by {error:.2e}"


def test_parallel_form_equals_recurrence():
    for seed, name in enumerate(CASES):
        check(name, seed)


def test_far_apart_maxima():
    """A late token whose logit towers over all before it must not starve the earlier rows."""
    theta = torch.zeros(1, 100, 1, 8)
    theta[:, 50] = 300.0
    theta[:, 90:] = 600.0
    p, v = torch.full((1, 100, 1, 8), 0.125), torch.randn(1, 100, 1, 4)
    segment = torch.zeros(1, 100, dtype=torch.int32)
    empty = (torch.full((1, 1, 8), -torch.inf), torch.zeros(1, 1, 8), torch.zeros(1, 1, 8, 4))
    y, _ = ops.latent(theta, p, v, segment, empty)
    assert torch.allclose(y[0, 49, 0], v[0, :50, 0].mean(0), atol=1e-5)
    assert torch.allclose(y[0, 80, 0], v[0, 50, 0], atol=1e-5)
    assert torch.allclose(y[0, 99, 0], v[0, 90:, 0].mean(0), atol=1e-5)


def compare_kernels(device="cpu", B=2, T=128, H=2, M=16, d=64, w=64, seed=0):
    """Relative errors of kernels against the plain forms: outputs and every gradient."""
    import kernels
    torch.manual_seed(seed)
    D = H * d
    dtype = torch.bfloat16 if device == "cuda" else torch.float32       # the interpreter has no bf16 products
    start = torch.zeros(B, T, dtype=torch.int32, device=device)
    start[0, 0] = start[1, T // 3] = start[1, T // 2 + 5] = 1
    segment = start.cumsum(1, dtype=torch.int32)
    ring = torch.cat([torch.zeros(B, w, dtype=torch.int32, device=device), segment], 1)
    ring[1, :w // 2] = -1

    def leaf(*shape, scale=1.0):
        x = (scale * torch.randn(*shape, device=device)).to(dtype)
        return x.requires_grad_()

    def both(fast, plain, leaves):
        leaves32 = [x.detach().float().requires_grad_() for x in leaves]
        a, b = fast(*leaves), plain(*leaves32)
        dy = torch.randn_like(b)
        ga = torch.autograd.grad(a, leaves, dy.to(a.dtype))
        gb = torch.autograd.grad(b, leaves32, dy.to(a.dtype).float())
        return [((x.float() - y).norm() / y.norm()).item() for x, y in zip((a, *ga), (b, *gb))]

    z0 = torch.randn(B, D, device=device)
    decay = (torch.rand(D, device=device) * 0.1 + 1e-3).requires_grad_()
    errors = {"rglru": both(lambda h, r, i, c: kernels.rglru(h, r, i, c.float(), z0, start)[0],
                            lambda h, r, i, c: ops.rglru(h, r, i, c, z0, start)[0],
                            [leaf(B, T, D), leaf(B, T, D), leaf(B, T, D), decay])}
    m0, alpha0 = torch.zeros(B, H, M, device=device), torch.rand(B, H, M, device=device) * 20
    s0 = torch.randn(B, H, M, d, device=device) * alpha0[..., None]
    empty, zero, zero_s = torch.full_like(m0, -torch.inf), torch.zeros_like(alpha0), torch.zeros_like(s0)
    p = torch.softmax(torch.randn(B, T, H, M, device=device), -1).to(dtype).requires_grad_()
    errors["latent"] = both(lambda th, p, v: kernels.latent(th, p, v, segment, alpha0, s0)[0],
                            lambda th, p, v: ops.latent(th, p, v, segment, (m0, alpha0, s0))[0],
                            [leaf(B, T, H, M, scale=2.0), p, leaf(B, T, H, d)])
    far = torch.linspace(-40, 40, M, device=device)          # a latent's maximum may lie anywhere
    errors["latent, far from 0"] = both(lambda th, p, v: kernels.latent(th + far, p, v, segment, zero, zero_s)[0],
                                        lambda th, p, v: ops.latent(th + far, p, v, segment, (empty, zero, zero_s))[0],
                                        [leaf(B, T, H, M, scale=4.0).float().detach().requires_grad_(), p, leaf(B, T, H, d)])
    last = kernels.latent(leaf(B, T, H, M), p, leaf(B, T, H, d), segment, alpha0, s0)
    assert torch.isfinite(last[1]).all() and torch.isfinite(last[2]).all()
    past_k, past_v = torch.randn(2, B, w, H, d, device=device).to(dtype)

    def window(f, k, v):
        return f(torch.cat([past_k.to(k.dtype), k], 1), torch.cat([past_v.to(v.dtype), v], 1))
    errors["window"] = both(
        lambda q, k, v: window(lambda k, v: kernels.window(q, k, v, ring, d ** -0.5)[0], k, v),
        lambda q, k, v: window(lambda k, v: ops.window(q, k, v, ring, w, d ** -0.5), k, v),
        [leaf(B, T, H, d), leaf(B, T, H, d), leaf(B, T, H, d)])
    return errors


def test_kernels():
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, errors in compare_kernels(device).items():
        print(f"kernel {name}: relative errors", " ".join(f"{error:.1e}" for error in errors))
        assert max(errors) < 2e-2, f"{name}: {errors}"      # bf16 operands and outputs


if __name__ == "__main__":
    test_parallel_form_equals_recurrence()
    test_far_apart_maxima()
    test_kernels()
    print("ok")
