"""Turns a Hugging Face configuration and its tensors into the format of ../README.md, exactly."""
from source import Unsupported

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
KNOWN = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
COMMON = {"input_layernorm": "norm1", "self_attn": "mix", "mlp": "mlp"}
ONE_NORM = {"post_attention_layernorm": "norm2"}
POST_NORMS = {"post_attention_layernorm": "post_norm1", "pre_feedforward_layernorm": "norm2",
              "post_feedforward_layernorm": "post_norm2"}


def _refuse(source, text):
    raise Unsupported(f"{source.name}: {text}")


def _rope_of(source):
    """(theta, scaling), from either generation of the config's keys."""
    config = source.config
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {key: v for key, v in parameters.items() if key != "rope_theta"}
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        _refuse(source, f"rope_scaling {kind!r} is not in the format (linear and llama3 are)")
    theta = config.get("rope_theta", parameters.get("rope_theta", 10000.0))
    return theta, None if kind == "default" else scaling


def _gemma3_rope(source, kinds):
    """Gemma 3 turns windows and full layers by two bases: (list of one a layer, no scaling)."""
    config = source.config
    if config.get("rope_scaling"):
        _refuse(source, "rope_scaling of the full layers alone is not in the format")
    parameters = config.get("rope_parameters") or {}
    for part in parameters.values():
        if isinstance(part, dict) and part.get("rope_type", "default") != "default":
            _refuse(source, f"rope_scaling {part['rope_type']!r} of some layers alone is not in the format")
    full = config.get("rope_theta") or parameters.get("full_attention", {}).get("rope_theta", 1e6)
    local = config.get("rope_local_base_freq") or parameters.get("sliding_attention", {}).get("rope_theta", 1e4)
    return [float(full if kind == "full_attention" else local) for kind in kinds], None


def _kinds_of_layers(source):
    """Hugging Face's layer types, spelt out."""
    config, n = source.config, source.config["num_hidden_layers"]
    if config.get("layer_types"):
        kinds = config["layer_types"]
    elif config["model_type"] == "gemma2":
        kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(n)]
    elif config["model_type"] == "gemma3_text":
        every = config.get("sliding_window_pattern", 6)
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]
    elif config.get("use_sliding_window"):
        _refuse(source, "use_sliding_window without layer_types")
    else:
        kinds = ["full_attention"] * n
    if len(kinds) != n or set(kinds) - {"full_attention", "sliding_attention"}:
        _refuse(source, f"layer_types {sorted(set(kinds))} with {len(kinds)} layers of {n}")
    return kinds


def _gemma_keys(source, config):
    out = {"post_norms": True, "embedding_scale": float(config["hidden_size"]) ** 0.5,
           "norm_offset": 0.0 if source.norm_offset_applied else 1.0,
           "query_pre_attn_scalar": config.get("query_pre_attn_scalar", 256)}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            out[key] = config[key]
    return out


def latte_config(source):
    """config.json of the exact Transformer."""
    config = source.config
    kind = config.get("model_type")
    if kind not in KNOWN:
        _refuse(source, f"model_type {kind!r}; known are {', '.join(KNOWN)}")
    gemma = kind.startswith("gemma")
    act = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        _refuse(source, f"hidden_act {act!r}; known are {', '.join(ACTIVATIONS)}")
    if config.get("use_bidirectional_attention"):
        _refuse(source, "use_bidirectional_attention")
    kinds = _kinds_of_layers(source)
    theta, scaling = _gemma3_rope(source, kinds) if kind == "gemma3_text" else _rope_of(source)
    heads = config["num_attention_heads"]
    out = {
        "architectures": ["LatteForCausalLM"], "model_type": "latte", "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"], "num_hidden_layers": config["num_hidden_layers"],
        "intermediate_size": config["intermediate_size"], "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
    }
    if "sliding_attention" in kinds:            # a window without latents: softmax attention over the last tokens
        out["layer_types"] = ["macchiato" if k == "sliding_attention" else k for k in kinds]
        out["sliding_window"] = config["sliding_window"]
    else:
        out["layer_type"] = "full_attention"
    out.update(rope_theta=theta, norm="rmsnorm", norm_eps=config.get("rms_norm_eps", 1e-6), mlp="gated",
               hidden_act=ACTIVATIONS[act], tie_word_embeddings=config.get("tie_word_embeddings", gemma),
               max_position_embeddings=config["max_position_embeddings"])
    if scaling:
        out["rope_scaling"] = scaling
    if gemma:
        out.update(_gemma_keys(source, config))
    if source.eos_ids:
        out["eos_token_id"] = source.eos_ids if len(source.eos_ids) > 1 else source.eos_ids[0]
    return out


def latte_tensors(source, config):
    """Yields (name in the format, float32 array); every tensor of the source has to find its place."""
    V, D, F = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    H, KV, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    parts = {**COMMON, **(POST_NORMS if config.get("post_norms") else ONE_NORM)}
    outputs = {"q_proj": H * d, "k_proj": KV * d, "v_proj": KV * d, "o_proj": D, "gate_proj": F, "up_proj": F,
               "down_proj": D}
    inputs = {"o_proj": H * d, "down_proj": F}

    def shape_of(tail):
        module, _, leaf = tail.rpartition(".")
        last = module.rpartition(".")[2]
        if last in ("q_norm", "k_norm"):
            return (d,)
        if last not in outputs:
            return (D,)
        return (outputs[last],) if leaf == "bias" else (outputs[last], inputs.get(last, D))

    left = set(source.names) - {"lm_head.weight"} if config["tie_word_embeddings"] else set(source.names)
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}
    yield "model.embed_tokens.weight", source.take("model.embed_tokens.weight", (V, D))
    yield "model.norm.weight", source.take("model.norm.weight", (D,))
    left -= {"model.embed_tokens.weight", "model.norm.weight"}
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", source.take("lm_head.weight", (V, D))
        left -= {"lm_head.weight"}
    for name in sorted(left):
        head, _, rest = name.partition("model.layers.")
        number, _, tail = rest.partition(".")
        part, _, inner = tail.partition(".")
        if head or not number.isdigit() or int(number) >= config["num_hidden_layers"] or part not in parts:
            _refuse(source, f"tensor {name} has no place in the format")
        yield f"model.layers.{number}.{parts[part]}.{inner}", source.take(name, shape_of(tail))
