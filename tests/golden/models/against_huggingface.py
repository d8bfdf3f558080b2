"""Checks reference.py itself where another implementation exists: full-attention models against
transformers' Qwen3 (q/k norms, llama3 and linear rope scaling, grouped kv heads) and Gemma 2
(post norms, soft caps, offset norms, scaled embeddings). Prints the largest differences.

    python tests/golden/models/against_huggingface.py
"""
import math

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import make
import reference

RENAMED = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "mix.": "self_attn."}
RENAMED_GEMMA = {"norm1": "input_layernorm", "norm2": "pre_feedforward_layernorm",
                 "post_norm1": "post_attention_layernorm", "mix.": "self_attn.",
                 "post_norm2": "post_feedforward_layernorm"}
SIZES = {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 36,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def renamed(name, names):
    for old in sorted(names, key=len, reverse=True):
        if f".{old}" in name:
            return name.replace(f".{old}", f".{names[old]}", 1)
    return name


def compare(title, config, options, theirs, names):
    tensors = make.make_weights(config, options, seed=7)
    state = {renamed(name, names): value.double() for name, value in tensors.items()}
    if config.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs = theirs.double().eval()
    theirs.load_state_dict(state, strict=True)
    tokens = torch.randint(0, 72, (90,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    difference = (reference.Model(config, tensors).run(tokens) - expected).abs().max()
    print(f"{title}: {float(difference):.1e}")
    assert difference < 2e-5, "rope and norms of transformers round to float32; more is an error"


def qwen3(title, scaling):
    config = make.BASE | SIZES | make.PLUS | make.FULL | scaling
    theirs = Qwen3ForCausalLM(Qwen3Config(
        **SIZES, max_position_embeddings=96, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_theta=10000.0, attn_implementation="eager",
        rope_scaling={"rope_type": "linear", **scaling["rope_scaling"]}))
    compare(title, config, make.Make("F32", qk_norms=True), theirs, RENAMED)


def gemma2():
    config = make.BASE | make.GEMMA | make.FULL
    theirs = Gemma2ForCausalLM(Gemma2Config(
        **SIZES | {"head_dim": 16}, max_position_embeddings=96, rms_norm_eps=1e-6,
        query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        layer_types=["full_attention"] * 2, attn_implementation="eager"))
    assert math.isclose(config["embedding_scale"], math.sqrt(32))
    compare("Gemma 2", config, make.Make("F32"), theirs, RENAMED_GEMMA)


if __name__ == "__main__":
    qwen3("Qwen3, llama3 scaling", make.LLAMA3)
    qwen3("Qwen3, linear scaling", make.LINEAR)
    gemma2()
