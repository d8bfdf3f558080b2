"""Draws what `latte-run --explain` wrote: a picture of all heads, as in the paper's figure 7.

    latte-run -m MODEL -f text.txt --explain latents.csv
    python plot_latents.py latents.csv latents.png

Left: how what a head gives to its latents is shared among them (mean p(l|t), the row's sum made 1), a
row for each head of each layer, sorted by size within the row. A head that has collapsed shows one bright
cell and darkness behind it. Middle: p(0|t), the share of the window. Right: how many choices, latents and
window together, a head uses: exp of its mean entropy.
"""
import argparse
import csv
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read(path):
    """{(layer, head): (p(0|t), [p(l|t)], entropy)}"""
    heads = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            head = heads.setdefault((int(row["layer"]), int(row["head"])), [0.0, [], 0.0])
            if row["latent"] == "0":
                head[0] = float(row["p"])
            else:
                head[1].append(float(row["p"]))
            head[2] = float(row["head_entropy"])
    return heads


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    heads = read(args.csv)
    names = sorted(heads)
    latents = np.array([sorted(heads[name][1], reverse=True) for name in names])
    latents /= latents.sum(1, keepdims=True)
    window = np.array([heads[name][0] for name in names])
    used = np.array([math.exp(heads[name][2]) for name in names])
    layers = sorted({layer for layer, _ in names})
    per_layer = len(names) // len(layers)
    at = [i * per_layer + (per_layer - 1) / 2 for i in range(len(layers))]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 2 + 0.04 * len(names)), sharey=True,
                                                 width_ratios=(3, 1, 1), layout="constrained")
    image = left.imshow(latents, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=left, location="top", shrink=0.6, label="share among the latents")
    left.set(xlabel="latent, by size", ylabel="layer (a row a head)", yticks=at, yticklabels=layers)
    middle.barh(range(len(names)), window, height=1)
    middle.set(xlabel="p(0|t): the window", xlim=(0, 1))
    right.barh(range(len(names)), used, height=1, color="tab:green")
    right.set(xlabel="choices: exp(entropy)", xlim=(1, latents.shape[1] + 1))
    figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    main()
