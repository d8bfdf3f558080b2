"""Writes the golden models of this directory: tiny seeded models and what they must answer.

    python tests/golden/models/make.py [NAME ...]

Each model is a model directory (config.json, weights) with its expectations in
NAME/expected/model.safetensors, computed by reference.py in float64 from the stored weights:

    tokens      [T]      I32   fed one by one from position 0
    rows        [P]      I32   positions whose logits are below
    logits      [P, V]   F32
    logits_bf16 [P, V]   F32   the same with matrices rounded to bf16
    greedy      [G]      I32   the greedy continuation
    state.NAME           F32   the state after the tokens (before the continuation)
    far         [4]      I64   n, P, k, j: feed n tokens, move to position P, feed tokens n..k-1,
                               logits of the last j   (some models only)
    far_logits  [j, V]   F32

A seed is used only if its answers do not hang on rounding: float32 in the same plain order stays
within 5e-5 of float64 (bf16-rounded weights and far positions too), and on the greedy path the
best logit leads by at least 5e-3, 25 times the engine's tolerance.
"""
import collections
import itertools
import json
import math
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file

import reference

HERE = pathlib.Path(__file__).resolve().parent
ROW_SPACING = 9      # every ninth row's logits are kept, and the last two
MIN_LEAD = 5e-3
MAX_ROUNDING = 5e-5
FAR = {"near int32's end": 3_000_000_000, "past float's integers": 2 ** 24 + 4096}

BASE = {"model_type": "latte", "architectures": ["LatteForCausalLM"], "vocab_size": 72,
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 36,
        "num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": 0}
CLASSIC = {"norm": "layernorm", "mlp": "plain", "hidden_act": "gelu"}
PLUS = {"norm": "rmsnorm", "mlp": "gated", "hidden_act": "silu"}
LATTE = {"layer_type": "latte", "num_latents": 16}
MACCHIATO = {"layer_type": "macchiato", "num_latents": 16, "sliding_window": 8}
WINDOW = {"layer_type": "macchiato", "num_latents": 0, "sliding_window": 8}
FULL = {"layer_type": "full_attention", "max_position_embeddings": 96}
CONV = {"latent_input": "conv", "conv_kernel": 3}
RGLRU = {"latent_input": "rglru"}
LLAMA3 = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}
LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}
GEMMA = {"norm": "rmsnorm", "mlp": "gated", "hidden_act": "gelu_tanh", "norm_offset": 1.0,
         "post_norms": True, "embedding_scale": math.sqrt(32), "tie_word_embeddings": True,
         "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, "head_dim": 16, "num_key_value_heads": 2}

# How a model is stored and driven, beside its config.
Make = collections.namedtuple("Make", "dtype biases qk_norms shards theta far tokens",
                              defaults=("BF16", False, False, 1, None, None, 72))

# The first rows are those of the paper's table of models, then the options in other mixtures.
MODELS = {
    "latte": (CLASSIC | LATTE | {"position_embedding": "sinusoidal"},
              Make("F32", biases=True, far="past float's integers")),
    "latte-vapor": (CLASSIC | LATTE | {"position_embedding": "vapor", "tie_word_embeddings": True,
                                       "hidden_act": "gelu_tanh", "norm_eps": 0.02},
                    Make("F16", far="near int32's end")),
    "latte-plus": (PLUS | LATTE | {"position_embedding": "vapor", "num_key_value_heads": 2},
                   Make("BF16")),
    "latte-conv-plus": (PLUS | LATTE | CONV, Make("BF16")),
    "latte-conv-swa-plus": (PLUS | MACCHIATO | CONV | {"conv_kernel": 4, "num_key_value_heads": 2},
                            Make("F16", biases=True, shards=3)),
    "latte-rglru-plus": (PLUS | LATTE | RGLRU | {"rglru_blocks": 4}, Make("BF16")),
    "macchiato": (PLUS | MACCHIATO | RGLRU | {"rglru_blocks": 4, "tie_word_embeddings": True},
                  Make("F32", far="near int32's end")),
    "rglru-swa-plus": (PLUS | WINDOW | RGLRU | {"rglru_blocks": 2}, Make("F16", biases=True)),
    "transformer-plus": (PLUS | FULL | LLAMA3 | {"position_embedding": "rope",
                                                 "num_key_value_heads": 2},
                         Make("BF16", qk_norms=True)),
    "gemma-macchiato": (GEMMA | MACCHIATO | RGLRU | {"rglru_blocks": 4, "position_embedding": "rope",
                                                     "hidden_size": 48},
                        Make("BF16")),

    "gemma-mixed": (GEMMA | {"layer_types": ["macchiato", "full_attention", "latte"],
                             "num_hidden_layers": 3, "num_latents": 8, "sliding_window": 12,
                             "rope_theta": [10000.0, 1e6, 500.0], "max_position_embeddings": 96},
                    Make("BF16", qk_norms=True, far=None)),
    "vapor-window": (PLUS | MACCHIATO | CONV | {"position_embedding": "vapor",
                                                "num_key_value_heads": 2},
                     Make("BF16", biases=True, far="past float's integers")),
    "vapor-window-only": (CLASSIC | WINDOW | {"position_embedding": "vapor"}, Make("BF16")),
    "window-conv": (PLUS | WINDOW | CONV | LINEAR | {"num_key_value_heads": 1, "conv_kernel": 1,
                                                     "hidden_act": "gelu"},
                    Make("BF16", qk_norms=True, shards=2)),
    "macchiato-linear": (CLASSIC | MACCHIATO | LINEAR | {"norm_eps": 0.01, "sliding_window": 5,
                                                         "num_latents": 4},
                         Make("BF16", biases=True, qk_norms=True, far="near int32's end")),
    "no-final-norm": (CLASSIC | MACCHIATO | RGLRU | {"final_norm": False, "embedding_scale": 0.5,
                                                     "position_embedding": "sinusoidal",
                                                     "query_pre_attn_scalar": 20},
                      Make("BF16", biases=True)),
    "mixed-conv": (PLUS | CONV | LLAMA3 | {
        "layer_types": ["latte", "full_attention", "macchiato"], "num_hidden_layers": 3,
        "num_latents": 12, "sliding_window": 8, "rope_theta": [1e4, 2e4, 300.0],
        "max_position_embeddings": 96, "position_embedding": "sinusoidal", "final_norm": False,
        "intermediate_size": 24, "attn_logit_softcapping": 5.0}, Make("BF16")),
    "full-classic": (CLASSIC | FULL | {"norm_offset": 1.0, "tie_word_embeddings": True,
                                       "final_logit_softcapping": 4.0, "post_norms": True},
                     Make("BF16", biases=True)),
    "wide-theta": (PLUS | LATTE | {"tie_word_embeddings": True}, Make("F32", theta=1000.0)),
    "wide-theta-macchiato": (PLUS | MACCHIATO | RGLRU | {"rglru_blocks": 4, "num_latents": 8},
                             Make("BF16", theta=1000.0)),
}


# ---- weights ----

def shapes(c, make):
    """Every tensor of a model, by the rules of weights/README.md, with its fan-in (0: a vector)."""
    D, F, V, H = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_attention_heads"]
    KV, d = c["num_key_value_heads"], c.get("head_dim", c["hidden_size"] // H)
    L, B = c.get("num_latents", 0), c.get("rglru_blocks", 1)
    types = c.get("layer_types") or [c["layer_type"]] * c["num_hidden_layers"]
    out = {}

    def linear(name, n_out, n_in):
        out[name + ".weight"] = ([n_out, n_in], n_in)
        if make.biases:
            out[name + ".bias"] = ([n_out], 0)

    def norm(name):
        out[name + ".weight"] = ([D], 0)
        if c["norm"] == "layernorm" and make.biases:
            out[name + ".bias"] = ([D], 0)

    out["model.embed_tokens.weight"] = ([V, D], 1)
    for layer, kind in enumerate(types):
        p, full = f"model.layers.{layer}.", kind == "full_attention"
        norm(p + "norm1")
        norm(p + "norm2")
        if c.get("post_norms"):
            out[p + "post_norm1.weight"] = out[p + "post_norm2.weight"] = ([D], 0)
        if L and not full:
            linear(p + "mix.latent_q", L if kind == "latte" else L + H, D)
            linear(p + "mix.latent_k", L, D)
        linear(p + "mix.v_proj", KV * d, D)
        linear(p + "mix.o_proj", D, H * d)
        if kind != "latte":
            linear(p + "mix.q_proj", H * d, D)
            linear(p + "mix.k_proj", KV * d, D)
            if make.qk_norms:
                out[p + "mix.q_norm.weight"] = out[p + "mix.k_norm.weight"] = ([d], 0)
        if c.get("latent_input") == "conv" and not full:
            out[p + "mix.conv.weight"] = ([D, c["conv_kernel"]], c["conv_kernel"])
            if make.biases:
                out[p + "mix.conv.bias"] = ([D], 0)
        if c.get("latent_input") == "rglru" and not full:
            for gate in ("input_gate", "recurrence_gate"):
                out[p + f"mix.rglru.{gate}.weight"] = ([B, D // B, D // B], D // B)
                if make.biases:
                    out[p + f"mix.rglru.{gate}.bias"] = ([D], 0)
            out[p + "mix.rglru.lambda"] = ([D], 0)
            out[p + "mix.rglru_norm.weight"] = ([D], 0)
        if c.get("position_embedding") == "vapor" and not full:
            out[p + "mix.vapor.theta"] = ([H, d // 2], 0)
        if c["mlp"] == "gated":
            linear(p + "mlp.gate_proj", F, D)
        linear(p + "mlp.up_proj", F, D)
        linear(p + "mlp.down_proj", D, F)
    if c.get("final_norm", True):
        norm("model.norm")
    if not c.get("tie_word_embeddings"):
        linear("lm_head", V, D)
    return out


def draw(name, shape, fan_in, c, make, random):
    """Values of a scale at which every part of the model shows in the logits."""
    values = torch.randn(shape, generator=random)
    if name.endswith("rglru.lambda"):
        return values - 3  # a = exp(-8 softplus(lambda) r): memory of a few tokens to a hundred
    if name.endswith("vapor.theta"):
        return values.abs()
    if "norm" in name and name.endswith(".weight"):
        return 1 - c.get("norm_offset", 0.0) + 0.3 * values
    if name.endswith(".bias"):
        return 0.3 * values
    gain = 1.5 if ("latent_" in name or "q_proj" in name or "k_proj" in name) else 1.0
    if name == "model.embed_tokens.weight" and c.get("embedding_scale", 1) > 1:
        gain = 1 / c["embedding_scale"]  # so that a tied head stays in proportion, as Gemma's does
    if name == "model.embed_tokens.weight" and c.get("tie_word_embeddings"):
        gain /= 2
    return values * gain / math.sqrt(fan_in)


def make_weights(c, make, seed):
    random = torch.Generator().manual_seed(seed)
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[make.dtype]
    tensors = {name: draw(name, shape, fan_in, c, make, random)
               for name, (shape, fan_in) in shapes(c, make).items()}
    if make.theta:
        widen(tensors, make.theta)
    return {name: value.to(stored).contiguous() for name, value in tensors.items()}


def widen(tensors, theta):
    """Scale latent_k to logits of up to about +-theta. Each latent looks at two inputs only, the
    way float32 keeps such logits exact to 1e-4."""
    for name in tensors:
        if name.endswith("latent_k.weight"):
            w = tensors[name]
            keep = torch.zeros_like(w)
            for l in range(w.shape[0]):
                keep[l, (7 * l) % w.shape[1]] = 1
                keep[l, (7 * l + 3) % w.shape[1]] = 1
            tensors[name] = w.sign() * keep * theta / 4


def rising_and_falling(config, tensors, tokens):
    """Order the second third of the tokens by rising logits of the first latent, the last by
    falling ones, so that the running maximum moves in every way."""
    model = reference.Model(config, tensors)
    def first_logit(token):
        h = model.norm(model.t["model.embed_tokens.weight"][token], "model.layers.0.norm1")
        return float(model.t["model.layers.0.mix.latent_k.weight"][0] @ h)
    third = len(tokens) // 3
    return (tokens[:third] + sorted(tokens[third:2 * third], key=first_logit)
            + sorted(tokens[2 * third:], key=first_logit, reverse=True))


# ---- expectations ----

class Unsuitable(Exception):
    pass


def answers(config, tensors, tokens, round_matrices=None):
    """Logits [T, V] in float64, and the model that gave them, if float32 agrees."""
    exact = reference.Model(config, tensors, torch.float64, round_matrices)
    logits = exact.run(tokens)
    single = reference.Model(config, tensors, torch.float32, round_matrices).run(tokens)
    difference = float((single - logits).abs().max())
    if not difference <= MAX_ROUNDING:
        raise Unsuitable(f"float32 differs by {difference:.1e}")
    return logits, exact


def continue_greedily(model, last_logits, n):
    out, logits = [], last_logits
    for _ in range(n):
        best = torch.topk(logits, 2).values
        if best[0] - best[1] < MIN_LEAD:
            raise Unsuitable(f"a lead of {float(best[0] - best[1]):.1e} on the greedy path")
        out.append(int(logits.argmax()))
        logits = model.step(out[-1])
    return out


def far_answers(config, tensors, tokens, place):
    n, k = 12, 36
    window = config.get("sliding_window", 1)
    position = FAR[place] // window * window + n % window  # the ring's rows stay where they are
    logits = []
    for dtype in (torch.float64, torch.float32):
        model = reference.Model(config, tensors, dtype)
        model.run(tokens[:n])
        model.position = position
        logits.append(model.run(tokens[n:k]))
    if (logits[0] - logits[1]).abs().max() > MAX_ROUNDING:
        raise Unsuitable("float32 differs far away")
    j = 4
    return {"far": torch.tensor([n, position, k, j]), "far_logits": logits[0][-j:].float()}


def expectations(config, make, tensors, tokens):
    logits, model = answers(config, tensors, tokens)
    out = {f"state.{name}": value.float() for name, value in model.state().items()}
    rounded, _ = answers(config, tensors, tokens, torch.bfloat16)
    rows = sorted({*range(0, len(tokens), ROW_SPACING), len(tokens) - 2, len(tokens) - 1})
    out |= {"tokens": torch.tensor(tokens, dtype=torch.int32),
            "rows": torch.tensor(rows, dtype=torch.int32),
            "logits": logits[rows].float(), "logits_bf16": rounded[rows].float(),
            "greedy": torch.tensor(continue_greedily(model, logits[-1], 24), dtype=torch.int32)}
    if make.far:
        out |= far_answers(config, tensors, tokens, make.far)
    return {name: value.contiguous() for name, value in out.items()}


# ---- files ----

def save(directory, config, make, tensors, expected):
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "expected").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(expected, directory / "expected" / "model.safetensors")
    if make.shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": {}}
    names = sorted(tensors)
    for shard in range(make.shards):
        file = f"model-{shard + 1:05}-of-{make.shards:05}.safetensors"
        mine = names[shard::make.shards]
        save_file({name: tensors[name] for name in mine}, directory / file)
        index["weight_map"] |= {name: file for name in mine}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def make_model(name, options, make):
    config = BASE | options
    for seed in itertools.count(sum(name.encode())):
        random = torch.Generator().manual_seed(seed + 1)
        tokens = torch.randint(0, config["vocab_size"], (make.tokens,), generator=random).tolist()
        tensors = make_weights(config, make, seed)
        if make.theta:
            tokens = rising_and_falling(config, tensors, tokens)
        try:
            expected = expectations(config, make, tensors, tokens)
            break
        except Unsuitable as reason:
            print(f"{name}: seed {seed}: {reason}", flush=True)
    save(HERE / name, config, make, tensors, expected)
    spread = float(expected["logits"].std())
    print(f"{name}: seed {seed}, logits' deviation {spread:.2f}", flush=True)


def check_coverage():
    """Every value of every option in at least two models."""
    seen = collections.Counter()
    for options, make in MODELS.values():
        config = BASE | options
        for key, value in (config | make._asdict()).items():
            if key in ("model_type", "architectures", "vocab_size", "eos_token_id", "tokens"):
                continue
            if isinstance(value, dict):
                value = value.get("rope_type") or value["type"]
            if isinstance(value, (str, bool)):
                seen[key, value] += 1
            elif isinstance(value, list) and key == "layer_types":
                seen.update((key, kind) for kind in value)
            elif value != BASE.get(key):
                seen[key, "set"] += 1
    seen["conv_kernel", "set"] += 0
    rare = [f"{key}={value}" for (key, value), n in seen.items() if n < 2]
    if rare:
        print("in one model only:", ", ".join(rare))


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_coverage()
    for wanted in sys.argv[1:] or MODELS:
        make_model(wanted, *MODELS[wanted])
