"""Writes a model in the layout the server reads: bf16 safetensors in shards, an index, config.json.

    python export.py --checkpoint RUN/checkpoint.pt --out DIRECTORY [--shard-bytes 14000000]
"""
import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 14_000_000


def shards(tensors, limit):
    """Tensors in order, packed into dictionaries of at most `limit` bytes."""
    packed, size = [{}], 0
    for name, tensor in tensors.items():
        n = tensor.numel() * tensor.element_size()
        if size + n > limit and packed[-1]:
            packed.append({})
            size = 0
        packed[-1][name] = tensor
        size += n
    return packed


def export(state_dict, config, out, limit=SHARD_BYTES):
    """state_dict carries the file's tensor names (model.py); config is the config.json dictionary."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in state_dict.items()}
    packed = shards(tensors, limit)
    index = {"metadata": {"total_size": sum(t.numel() * 2 for t in tensors.values())}, "weight_map": {}}
    for n, part in enumerate(packed, 1):
        file = f"model-{n:05d}-of-{len(packed):05d}.safetensors" if len(packed) > 1 else "model.safetensors"
        save_file(part, out / file, metadata={"format": "pt"})
        index["weight_map"].update({name: file for name in part})
    if len(packed) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    args = parser.parse_args()
    saved = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    export(saved["model"], saved["config"], args.out, args.shard_bytes)


if __name__ == "__main__":
    main()
