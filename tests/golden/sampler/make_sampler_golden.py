"""Write warpers.bin: distributions after Hugging Face transformers' logits processors.

    python make_sampler_golden.py

Each case is a row of logits, sampling parameters, and the probabilities that the processors
leave, applied in the order engine/sampler.h documents. Little-endian:
    int32 n_cases, then per case
    int32 V, top_k, n_seen; f32 temperature, top_p, min_p, typical_p, repetition_penalty
    int32 seen[n_seen]; f32 logits[V]; f32 probs[V]
"""

import os
import struct

import numpy as np
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0)

SETTINGS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.9),
    dict(temperature=0.05),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=40),
    dict(top_k=100000),
    dict(top_p=0.1),
    dict(top_p=0.5),
    dict(top_p=0.95),
    dict(top_p=0.999),
    dict(min_p=0.02),
    dict(min_p=0.3),
    dict(min_p=1.0),
    dict(typical_p=0.2),
    dict(typical_p=0.7),
    dict(typical_p=0.97),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.6),
    dict(temperature=0.8, top_k=50, top_p=0.9),
    dict(temperature=1.2, top_p=0.9, min_p=0.05),
    dict(top_k=30, typical_p=0.8, top_p=0.93, min_p=0.01),
    dict(temperature=0.8, top_k=64, typical_p=0.9, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
]


def f32(x):
    return float(np.float32(x))


def warp(logits, seen, p):
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    ids = torch.tensor(seen, dtype=torch.int64)[None]
    steps = []
    if p["repetition_penalty"] != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(f32(p["repetition_penalty"])))
    if p["temperature"] != 1:
        steps.append(TemperatureLogitsWarper(f32(p["temperature"])))
    if p["top_k"]:
        steps.append(TopKLogitsWarper(p["top_k"]))
    if p["typical_p"] < 1:
        steps.append(TypicalLogitsWarper(f32(p["typical_p"])))
    if p["top_p"] < 1:
        steps.append(TopPLogitsWarper(f32(p["top_p"])))
    if p["min_p"] > 0:
        steps.append(MinPLogitsWarper(f32(p["min_p"])))
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores, -1)[0].numpy().astype(np.float32)


def main():
    rng = np.random.default_rng(20)
    out = bytearray()
    cases = [(OFF | s, v, spread) for s in SETTINGS for v, spread in [(37, 1.5), (300, 3.0)]]
    out += struct.pack("<i", len(cases))
    for p, v, spread in cases:
        logits = (rng.standard_normal(v) * spread).astype(np.float32)
        seen = rng.choice(v, size=12, replace=False).astype(np.int32)
        probs = warp(logits, seen, p)
        out += struct.pack("<3i5f", v, p["top_k"], len(seen), p["temperature"], p["top_p"],
                           p["min_p"], p["typical_p"], p["repetition_penalty"])
        out += seen.tobytes() + logits.tobytes() + probs.tobytes()
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "warpers.bin")
    with open(path, "wb") as f:
        f.write(out)
    print(f"{path}: {len(cases)} cases, {len(out)} bytes")


if __name__ == "__main__":
    main()
