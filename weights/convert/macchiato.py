"""Fresh Latte weights for a Transformer: the window answers alone until training says otherwise.

Every attention becomes a sliding window plus latents. The latents' rows are random, so that each
can learn something else, and the bias of every head's window row makes p(0|t) so near to one that
the fresh model is the Transformer with a sliding window.
"""
import numpy as np

from source import Unsupported

MIN_LATENTS_A_HEAD = 16


def macchiato_config(config, num_latents, window, rglru_blocks, latent_input="rglru"):
    """config.json of the Macchiato, from that of the exact Transformer."""
    heads = config["num_attention_heads"]
    if num_latents % heads or num_latents // heads < MIN_LATENTS_A_HEAD:
        raise Unsupported(f"{num_latents} latents: a multiple of the {heads} heads, {MIN_LATENTS_A_HEAD} or more a head")
    if config["hidden_size"] % rglru_blocks:
        raise Unsupported(f"rglru_blocks {rglru_blocks} does not divide hidden_size {config['hidden_size']}")
    out = {key: value for key, value in config.items() if key not in ("layer_types", "max_position_embeddings")}
    out.update(layer_type="macchiato", sliding_window=window, num_latents=num_latents, latent_input=latent_input)
    if latent_input == "rglru":
        out["rglru_blocks"] = rglru_blocks
    if latent_input == "conv":
        out["conv_kernel"] = 3
    return out


def _rglru(rng, config):
    """Gates as small random maps; a at full gate spread over (0.9, 0.999), as in Griffin."""
    D, blocks = config["hidden_size"], config["rglru_blocks"]
    n = D // blocks
    slowest = rng.uniform(0.9, 0.999, D)
    return {
        "rglru.input_gate.weight": rng.standard_normal((blocks, n, n)) / np.sqrt(n),
        "rglru.input_gate.bias": np.zeros(D),
        "rglru.recurrence_gate.weight": rng.standard_normal((blocks, n, n)) / np.sqrt(n),
        "rglru.recurrence_gate.bias": np.zeros(D),
        "rglru.lambda": np.log(np.expm1(-np.log(slowest) / 8)),
        "rglru_norm.weight": np.full(D, 1.0 - config.get("norm_offset", 0.0)),
    }


def _conv(rng, config):
    """Mostly the current token."""
    taps = rng.standard_normal((config["hidden_size"], config["conv_kernel"])) * 0.1
    taps[:, 0] += 1
    return {"conv.weight": taps}


def fresh_tensors(config, window_bias, seed=0):
    """Yields the Latte-specific tensors of all layers."""
    rng = np.random.default_rng(seed)
    D, H = config["hidden_size"], config["num_attention_heads"]
    M = config["num_latents"] // H
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.mix."
        bias = np.zeros((H, M + 1))
        bias[:, 0] = window_bias
        made = {
            "latent_q.weight": rng.standard_normal((H * (M + 1), D)) * 0.5 / np.sqrt(D),
            "latent_q.bias": bias.reshape(-1),
            "latent_k.weight": rng.standard_normal((H * M, D)) * 0.5 / np.sqrt(D),
        }
        if config["latent_input"] == "rglru":
            made.update(_rglru(rng, config))
        elif config["latent_input"] == "conv":
            made.update(_conv(rng, config))
        for name, value in made.items():
            yield at + name, value.astype(np.float32)
