"""Draws loss.csv of a run, of train.py or of adapt.py.

    python plot.py RUN/loss.csv loss.png
"""
import argparse
import csv

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

GREY, ORANGE, BLUE = "#9aa5b1", "#b3541e", "#2b6cb0"


def series(rows, value):
    """([millions of tokens], [value]) of the rows that have one."""
    rows = [row for row in rows if row[value]]
    return [float(row["tokens"]) / 1e6 for row in rows], [float(row[value]) for row in rows]


def draw_training(rows, left):
    train = series(rows, "train_nats_per_token")
    left.plot(*train, color=GREY, linewidth=0.8, label="training, nats per token")
    left.set_ylabel("training, nats per token")
    left.set_ylim(min(train[1]) - 0.05, min(train[1]) + 1.2)
    right = left.twinx()
    right.plot(*series(rows, "valid_bits_per_byte"), color=ORANGE, marker="o", markersize=3, label="validation, bits per byte")
    right.set_ylabel("validation, bits per byte")
    left.legend(loc="upper center")
    right.legend(loc="upper right")


def draw_adapting(rows, axes):
    """KL to the teacher: in training by length of text, and of each validation text."""
    kinds = {(row["stage"], row["length"]) for row in rows if row["kl"]}
    for n, (stage, length) in enumerate(sorted(kinds, key=lambda kind: (kind[0] != "logits", kind[0], int(kind[1])))):
        part = [row for row in rows if (row["stage"], row["length"]) == (stage, length)]
        if stage == "logits":
            axes.plot(*series(part, "kl"), ".", markersize=3, color=(GREY, "black")[n % 2], label=f"training, {length} tokens")
        else:
            axes.plot(*series(part, "kl"), linewidth=1.2, color=(BLUE, ORANGE)[n % 2], label=stage)
    axes.set_ylabel("KL to the Transformer's logits, nats per token")
    axes.legend(loc="upper right")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table")
    parser.add_argument("image")
    args = parser.parse_args()
    with open(args.table, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_xlabel("tokens, millions")
    (draw_adapting if "kl" in rows[0] else draw_training)(rows, axes)
    figure.savefig(args.image, dpi=110)


if __name__ == "__main__":
    main()
