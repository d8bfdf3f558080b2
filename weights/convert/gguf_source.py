"""Reads a GGUF file: dequantises its tensors and gives them the names and layout of `transformers`."""
import numpy as np
from gguf import GGUFReader, dequantize

from gguf_tokenizer import build_tokenizer
from source import Source, Unsupported

LAYER = {
    "attn_q.weight": "self_attn.q_proj.weight", "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight", "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias", "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias", "attn_output.bias": "self_attn.o_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight", "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight", "attn_norm.weight": "input_layernorm.weight",
}
ONE_NORM = {"ffn_norm.weight": "post_attention_layernorm.weight"}
GEMMA_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight", "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}
IGNORED = {"rope_freqs.weight"}                 # llama3's scaling as a tensor: refused below, by its name
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
SPECIAL_IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
               "unk_token": "unknown_token_id"}


def _renamed(name, layer_names, path):
    if name in WHOLE:
        return WHOLE[name]
    prefix, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    if prefix != "blk" or rest not in layer_names:
        raise Unsupported(f"{path}: tensor {name} has no place in the format")
    return f"model.layers.{number}.{layer_names[rest]}"


def _halves(rows, n_heads):
    """GGUF's llama rows pair neighbouring dimensions (2i, 2i + 1); RoPE here pairs i with i + d/2."""
    d = rows.shape[0] // n_heads
    return rows.reshape(n_heads, d // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class _Fields:
    def __init__(self, reader, path):
        self.fields, self.path = reader.fields, path
        self.architecture = self("general.architecture")

    def __call__(self, key, default=None):
        field = self.fields.get(key)
        return default if field is None else field.contents()

    def own(self, key, default=None):
        return self(f"{self.architecture}.{key}", default)

    def need(self, key):
        value = self.own(key)
        if value is None:
            raise Unsupported(f"{self.path}: key {self.architecture}.{key} is missing")
        return value


def _gemma_config(fields, config):
    layers = config["num_hidden_layers"]
    config["sliding_window"] = fields.need("attention.sliding_window")
    config["hidden_activation"] = "gelu_pytorch_tanh"
    if fields.architecture == "gemma2":         # the 27B model alone scales by hidden size / heads: not told apart
        config["query_pre_attn_scalar"] = config["head_dim"]
        if layers == 46:
            config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
        config["attn_logit_softcapping"] = fields.own("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = fields.own("final_logit_softcapping", 30.0)
        every = 2
    else:
        config["query_pre_attn_scalar"] = config["head_dim"]
        config["rope_local_base_freq"] = fields.own("rope.freq_base_swa", 10000.0)
        every = 6
    config["layer_types"] = ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(layers)]


def _config(fields, names):
    architecture = fields.architecture
    if architecture not in ARCHITECTURES:
        raise Unsupported(f"{fields.path}: architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    heads = fields.need("attention.head_count")
    config = {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": fields.own("vocab_size") or len(fields("tokenizer.ggml.tokens", [])),
        "hidden_size": fields.need("embedding_length"), "num_hidden_layers": fields.need("block_count"),
        "intermediate_size": fields.need("feed_forward_length"), "num_attention_heads": heads,
        "num_key_value_heads": fields.own("attention.head_count_kv", heads),
        "head_dim": fields.own("attention.key_length", fields.need("embedding_length") // heads),
        "rms_norm_eps": fields.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.own("rope.freq_base", 10000.0), "max_position_embeddings": fields.need("context_length"),
        "hidden_act": "silu", "tie_word_embeddings": "output.weight" not in names,
    }
    # float32 fields printed as the number that was meant
    for key in ("rms_norm_eps", "rope_theta"):
        config[key] = float(np.format_float_positional(np.float32(config[key]), trim="0"))
    if fields.own("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise Unsupported(f"{fields.path}: RoPE turns a part of each head only (rope.dimension_count)")
    kind = fields.own("rope.scaling.type", "none")
    if kind == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": fields.need("rope.scaling.factor")}
    elif kind != "none" or "rope_freqs.weight" in names:
        raise Unsupported(f"{fields.path}: rope scaling {kind!r}; GGUF files keep llama3's factors as a tensor, "
                          "convert from the original directory")
    if architecture.startswith("gemma"):
        _gemma_config(fields, config)
    return config


def read_gguf(path):
    reader = GGUFReader(path)
    fields = _Fields(reader, path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, found)
    gemma = fields.architecture.startswith("gemma")
    layer_names = {**LAYER, **(GEMMA_NORMS if gemma else ONE_NORM)}
    tensors = {_renamed(name, layer_names, path): tensor for name, tensor in found.items() if name not in IGNORED}

    def tensor(name):
        entry = tensors[name]
        value = dequantize(entry.data, entry.tensor_type).reshape([int(n) for n in entry.shape[::-1]])
        if fields.architecture == "llama" and ".q_proj." in name:
            value = _halves(value, config["num_attention_heads"])
        if fields.architecture == "llama" and ".k_proj." in name:
            value = _halves(value, config["num_key_value_heads"])
        return value

    kinds = sorted({entry.tensor_type.name for entry in tensors.values()})
    tokens = fields("tokenizer.ggml.tokens", [])
    ids = {key: fields(f"tokenizer.ggml.{field}") for key, field in SPECIAL_IDS.items()}
    return Source(
        name=str(path), config=config, names=set(tensors), tensor=tensor, norm_offset_applied=gemma,
        tokenizer_json=build_tokenizer(fields, path), chat_template=fields("tokenizer.chat_template", ""),
        special={key: tokens[n] for key, n in ids.items() if n is not None},
        eos_ids=[] if ids["eos_token"] is None else [ids["eos_token"]],
        notes=[f"tensors stored as {', '.join(kinds)}"])
