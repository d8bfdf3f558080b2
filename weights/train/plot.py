"""Draws loss.csv of a run.

    python plot.py RUN/loss.csv loss.png
"""
import argparse
import csv

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table")
    parser.add_argument("image")
    args = parser.parse_args()
    with open(args.table, newline="") as file:
        rows = list(csv.DictReader(file))

    tokens = [float(row["tokens"]) / 1e6 for row in rows]
    train = [float(row["train_nats_per_token"]) for row in rows]
    valid = [(x, float(row["valid_bits_per_byte"])) for x, row in zip(tokens, rows) if row["valid_bits_per_byte"]]
    figure, left = plt.subplots(figsize=(8, 4.5))
    left.plot(tokens, train, color="#9aa5b1", linewidth=0.8, label="training, nats per token")
    left.set_xlabel("tokens, millions")
    left.set_ylabel("training, nats per token")
    left.set_ylim(min(train) - 0.05, min(train) + 1.2)
    right = left.twinx()
    right.plot(*zip(*valid), color="#b3541e", marker="o", markersize=3, label="validation, bits per byte")
    right.set_ylabel("validation, bits per byte")
    left.legend(loc="upper center")
    right.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(args.image, dpi=110)


if __name__ == "__main__":
    main()
