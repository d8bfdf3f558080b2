"""Writes a model directory: safetensors, config.json, tokenizer and chat template."""
import json
import os

import numpy as np

DTYPES = {"bf16": ("BF16", "bfloat16"), "f32": ("F32", "float32")}


def to_bf16(value):
    """The upper halves of float32, rounded to nearest even."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(path, tensors, dtype):
    """tensors {name: float32 array}; written beside and renamed, as engines map these files."""
    name_of, size = DTYPES[dtype][0], 2 if dtype == "bf16" else 4
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        n = tensors[name].size * size
        header[name] = {"dtype": name_of, "shape": list(tensors[name].shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            value = tensors[name]
            file.write((to_bf16(value) if dtype == "bf16" else value.astype("<f4")).tobytes())
    os.replace(beside, path)


def _dump(path, values):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(out, source, config, tensors, dtype):
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", tensors, dtype)
    _dump(out / "config.json", {**config, "torch_dtype": DTYPES[dtype][1]})
    if source.tokenizer_json:
        (out / "tokenizer.json").write_text(source.tokenizer_json, encoding="utf-8")
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                        **source.special}
    if source.chat_template:
        tokenizer_config["chat_template"] = source.chat_template
    _dump(out / "tokenizer_config.json", tokenizer_config)
