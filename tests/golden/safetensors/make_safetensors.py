"""Writes model.safetensors beside this script with the safetensors package.

Run: python make_safetensors.py   (needs torch and safetensors)
test_safetensors.c holds the same values.
"""
import os

import torch
from safetensors.torch import save_file

EXACT = [[0.0, -0.0, 1.0, -1.5], [0.15625, 2048.0, -0.0009765625, 240.0]]

tensors = {
    "exact.f32": torch.tensor(EXACT),
    "exact.f16": torch.tensor(EXACT, dtype=torch.float16),
    "exact.bf16": torch.tensor(EXACT, dtype=torch.bfloat16),
    "special.f32": torch.tensor([float("nan"), float("inf"), -3.4028235e38, 2.0**-149]),
    "special.f16": torch.tensor([float("nan"), float("inf"), -65504.0, 2.0**-24],
                                dtype=torch.float16),
    "scalar": torch.tensor(42.0),
    "empty": torch.zeros(3, 0, 2, dtype=torch.bfloat16),
    "cube": torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4),
    "whole": torch.tensor([1, 2, 3]),
    "naïve ☕": torch.tensor([7.0]),
}
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.safetensors")
save_file(tensors, path, metadata={"format": "pt"})
