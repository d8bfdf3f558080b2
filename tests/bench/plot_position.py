#!/usr/bin/env python3
"""Draw the time of a token against the position of its session.

    latte-bench engine --device cuda --random 156m --only position --csv >position.csv
    latte-bench engine --device cuda --random transformer-151m --context 1010000 \\
        --only position --csv --positions 1000,3000,10000,30000,100000,300000,1000000 >>position.csv
    plot_position.py position.csv position.png

Needs matplotlib. Reads the rows of latte-bench's `position` table, any number of models.
"""
import argparse
import csv
import sys

LABELS = {
    "156m": "Latte Macchiato, 156M parameters",
    "transformer-151m": "Transformer++ (full attention), 151M parameters",
    "gemma-2.6b": "Gemma-2-2.6B as Macchiato",
}


def read(path):
    """{model: ([position], [token_ms], [p10], [p90])}, and the machines named."""
    models, machines = {}, set()
    with open(path, newline="") as f:
        rows = csv.reader(f)
        names = None
        for row in rows:
            if row[:1] == ["kind"]:
                names = row
            elif names and row[0] == "position":
                values = dict(zip(names, row))
                series = models.setdefault(values["model"], ([], [], [], []))
                for column, name in zip(series, ("position", "token_ms", "p10_ms", "p90_ms")):
                    column.append(float(values[name]))
                machines.add(values["machine"])
    return models, sorted(machines)


def draw(models, machines, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    for model, (position, median, low, high) in models.items():
        (line,) = axes.plot(position, median, marker="o", markersize=4,
                            label=LABELS.get(model, model))
        axes.fill_between(position, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.annotate(f"{median[-1]:.3g} ms", (position[-1], median[-1]), xytext=(0, 6), ha="right",
                      textcoords="offset points", fontsize=8, color=line.get_color())
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("position of the session (tokens before this one)")
    axes.set_ylabel("ms per token (median, 10th to 90th percentile)")
    axes.set_title("Decoding one session: " + ", ".join(machines), fontsize=10)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.grid(True, which="both", alpha=0.25)
    axes.set_ylim(min(min(s[1]) for s in models.values()) / 3,
                  max(max(s[1]) for s in models.values()) * 4)
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", help="rows of latte-bench engine --only position --csv")
    parser.add_argument("png", help="the picture to write")
    args = parser.parse_args()
    models, machines = read(args.csv)
    if not models:
        sys.exit(f"{args.csv}: no rows of kind position")
    draw(models, machines, args.png)


if __name__ == "__main__":
    main()
