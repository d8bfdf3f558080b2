"""Converted models against `transformers`: tiny random ones of every architecture, all logits.

    pytest test_convert.py                     # needs torch, transformers and gguf; about a minute on a CPU

The converted directory is read by ../train/model.py, whose arithmetic is tested against a recurrence
written from the format's description; check_logits.py does the same for a real model and the engine.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

import convert
from model import load
from source import Unsupported

TOLERANCE = 2e-4                                # float32, two to four layers, logits of order one
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, head_dim=16)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
CASES = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, llama3 rope, biases": transformers.LlamaConfig(**SIZES, rope_scaling=LLAMA3, attention_bias=True, mlp_bias=True),
    "llama, linear rope": transformers.LlamaConfig(**SIZES, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "qwen2": transformers.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, sliding_window=8, query_pre_attn_scalar=20),
    "gemma3": transformers.Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 7}, sliding_window=8, query_pre_attn_scalar=20),
}


def arguments(source, out, **changes):
    values = dict(source=source, out=out, dtype="f32", tokenizer=None, macchiato=False, latents=None, window=16,
                  latent_input="rglru", rglru_blocks=None, window_bias=30.0, adapter=None, seed=0)
    return argparse.Namespace(**{**values, **changes})


def random_model(config):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():        # norms and biases that say something
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", CASES)
def test_exact_transformer(name, tmp_path):
    model = random_model(CASES[name])
    model.save_pretrained(tmp_path / "source")
    convert.convert(arguments(tmp_path / "source", tmp_path / "out"))
    tokens = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        ours, _ = load(tmp_path / "out")(tokens)
    assert (ours - logits_of(model, tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize("latent_input", ["none", "conv", "rglru"])
def test_fresh_macchiato_is_the_windowed_transformer(latent_input, tmp_path):
    """Mistral is a Llama whose every layer has a sliding window."""
    config = transformers.MistralConfig(**SIZES, sliding_window=16)
    model = random_model(config)
    model.save_pretrained(tmp_path / "source")
    values = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    convert.convert(arguments(tmp_path / "source", tmp_path / "out", macchiato=True, rglru_blocks=2,
                              latent_input=latent_input))
    tokens = torch.randint(0, 96, (2, 60))
    with torch.no_grad():
        ours, _ = load(tmp_path / "out")(tokens)
    assert (ours - logits_of(model, tokens)).abs().max() < TOLERANCE


REFUSED = {
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    "model_type": ({"model_type": "mamba"}, "mamba"),
    "hidden_act": ({"hidden_act": "relu2"}, "relu2"),
    "tensor": ({"num_hidden_layers": 2}, "model.layers.2"),
    "shape": ({"vocab_size": 97}, "embed_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_named(name, tmp_path):
    changes, word = REFUSED[name]
    random_model(CASES["llama"]).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    values = {key: v for key, v in json.loads(file.read_text()).items() if key != "rope_parameters"}
    file.write_text(json.dumps({**values, **changes}))
    with pytest.raises(Unsupported, match=word):
        convert.convert(arguments(tmp_path / "source", tmp_path / "out"))


def test_an_adapter_may_bring_norms_and_must_fit(tmp_path):
    random_model(CASES["llama"]).save_pretrained(tmp_path / "source")
    adapter, made = tmp_path / "adapter.safetensors", tmp_path / "out" / "model.safetensors"

    def convert_with(tensors):
        safetensors.numpy.save_file(tensors, adapter)
        convert.convert(arguments(tmp_path / "source", tmp_path / "out", macchiato=True, adapter=adapter))
        return safetensors.numpy.load_file(made)

    convert.convert(arguments(tmp_path / "source", tmp_path / "out", macchiato=True))
    fresh = safetensors.numpy.load_file(made)
    trained = {name: value + 1 for name, value in fresh.items() if ".latent_" in name or ".rglru" in name}
    norm, other = "model.layers.2.norm1.weight", "model.layers.0.mlp.up_proj.weight"
    for more in ({}, {norm: fresh[norm] * 2}):
        got = convert_with({**trained, **more})
        for name, value in fresh.items():
            np.testing.assert_array_equal(got[name], {**trained, **more}.get(name, value))
    for bad in ({norm: fresh[norm][:-1]}, {other: fresh[other]}, {"model.layers.9.norm1.weight": fresh[norm]}):
        with pytest.raises(Unsupported, match=next(iter(bad)).replace(".", r"\.")):
            convert_with({**trained, **bad})
    missing = sorted(trained)[3]
    with pytest.raises(Unsupported, match=f"{missing}.*none"):
        convert_with({name: value for name, value in trained.items() if name != missing})


def test_bf16_rounds_to_nearest_even(tmp_path):
    from write import to_bf16
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (to_bf16(values) == expected).all()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
