"""Converts a pre-trained Transformer to the format of ../README.md, exactly or as a fresh Macchiato.

    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf --out teacher
    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf --out fresh --macchiato
    python convert.py a-hugging-face-directory --out teacher --dtype f32

Reads GGUF files (dequantised) and directories with safetensors: Llama, Qwen 2 and 3, Gemma 2 and 3.
What the format cannot express is refused by name. The exact Transformer gives the original's logits;
a fresh Macchiato gives those of the Transformer with a sliding window and wants training (../train).
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

from architectures import latte_config, latte_tensors
from macchiato import fresh_tensors, macchiato_config
from source import Unsupported
from write import write_model


def read(path):
    if path.is_dir():
        from hf_source import read_directory
        return read_directory(path)
    from gguf_source import read_gguf
    return read_gguf(str(path))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="a .gguf file, or a directory with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use in place of the source's")
    parser.add_argument("--macchiato", action="store_true", help="windows plus fresh latents in place of attention")
    parser.add_argument("--latents", type=int, help="of all heads together (default: 16 a head)")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--latent-input", choices=("none", "conv", "rglru"), default="rglru")
    parser.add_argument("--rglru-blocks", type=int, help="default: blocks of 64")
    parser.add_argument("--window-bias", type=float, default=20.0, help="logit of p(0|t) in the fresh model")
    parser.add_argument("--adapter", type=Path, help="trained Latte tensors, and norms, in place of fresh ones and the base's")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def latent_tensors(args, config, base):
    """Fresh, or an adapter's: all that Latte adds, and those of the base's norms (`base` {name: tensor}) that were trained."""
    if not args.adapter:
        return fresh_tensors(config, args.window_bias, args.seed)
    from hf_source import Tensors
    from safetensors import safe_open
    with safe_open(args.adapter, framework="np") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    needed = {name: value.shape for name, value in fresh_tensors(config, 0.0)}
    norms = {name: value.shape for name, value in base.items() if name.endswith((".norm1.weight", ".norm2.weight"))}
    wrong = sorted(name for name in set(needed) | set(shapes)
                   if shapes.get(name, norms.get(name)) != {**norms, **needed}.get(name))
    if wrong:
        raise Unsupported(f"{args.adapter}: {wrong[0]}: expected {({**norms, **needed}).get(wrong[0], 'no such tensor')}, "
                          f"found {shapes.get(wrong[0], 'none')}")
    read_tensor = Tensors({name: args.adapter for name in shapes})
    return ((name, read_tensor(name)) for name in shapes)


def convert(args):
    source = read(args.source)
    if args.tokenizer:
        source.tokenizer_json = args.tokenizer.read_text(encoding="utf-8")
    config = latte_config(source)
    tensors = dict(latte_tensors(source, config))
    if args.macchiato:
        latents = args.latents or 16 * config["num_attention_heads"]
        blocks = args.rglru_blocks or max(1, config["hidden_size"] // 64)
        config = macchiato_config(config, latents, args.window, blocks, args.latent_input)
        tensors.update(latent_tensors(args, config, tensors))
    write_model(args.out, source, config, tensors, args.dtype)
    n = sum(int(np.prod(value.shape)) for value in tensors.values())
    print(f"{args.out}: {len(tensors)} tensors, {n / 1e6:.1f} million parameters, {args.dtype}"
          + "".join(f"; {note}" for note in source.notes))


def main():
    try:
        convert(arguments())
    except (Unsupported, OSError) as error:
        sys.exit(f"convert: {error}")


if __name__ == "__main__":
    main()
