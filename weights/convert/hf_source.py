"""Reads a model directory of the Hugging Face ecosystem: config.json, safetensors, tokenizer."""
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from source import Source, Unsupported

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _files_of_tensors(directory):
    """{tensor name: file}"""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return {name: directory / file for name, file in _read_json(index)["weight_map"].items()}
    file = directory / "model.safetensors"
    if not file.exists():
        raise Unsupported(f"{directory}: no model.safetensors (other formats of weights are not read)")
    with safe_open(file, framework="np") as opened:
        return {name: file for name in opened.keys()}


def _bf16_to_f32(raw):
    return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


class Tensors:
    """Reads single tensors from safetensors files; NumPy has no bfloat16, so bytes are read here."""

    KINDS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}

    def __init__(self, files):
        self.files, self.headers = files, {}

    def header(self, file):
        if file not in self.headers:
            with open(file, "rb") as opened:
                n = int.from_bytes(opened.read(8), "little")
                self.headers[file] = (8 + n, json.loads(opened.read(n)))
        return self.headers[file]

    def __call__(self, name):
        file = self.files[name]
        base, header = self.header(file)
        entry = header[name]
        begin, end = entry["data_offsets"]
        with open(file, "rb") as opened:
            opened.seek(base + begin)
            raw = opened.read(end - begin)
        if entry["dtype"] == "BF16":
            return _bf16_to_f32(raw).reshape(entry["shape"])
        if entry["dtype"] not in self.KINDS:
            raise Unsupported(f"{file}: tensor {name} has dtype {entry['dtype']}; F32, F16 and BF16 are read")
        return np.frombuffer(raw, dtype=self.KINDS[entry["dtype"]]).astype(np.float32).reshape(entry["shape"])


def _text_of(token):
    return token.get("content") if isinstance(token, dict) else token


def read_directory(directory):
    directory = Path(directory)
    config = _read_json(directory / "config.json")
    if not config:
        raise Unsupported(f"{directory}: no config.json")
    if "text_config" in config:                 # the language part of a model with eyes
        raise Unsupported(f"{directory}: {config.get('model_type')} reads more than text")
    files = _files_of_tensors(directory)
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    jinja = directory / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.exists() else tokenizer_config.get("chat_template") or ""
    if not isinstance(template, str):
        template = next((t["template"] for t in template if t["name"] == "default"), "")
    generation = _read_json(directory / "generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    tokenizer = directory / "tokenizer.json"
    return Source(
        name=str(directory), config=config, names=set(files), tensor=Tensors(files),
        tokenizer_json=tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else "",
        chat_template=template,
        special={key: _text_of(tokenizer_config[key]) for key in SPECIAL if tokenizer_config.get(key)},
        eos_ids=eos if isinstance(eos, list) else [] if eos is None else [eos])
