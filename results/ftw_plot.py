# SPDX-License-Identifier: MIT
"""Curves of ftw.py: NAME.csv and NAME.png from run folders.

    python results/ftw_plot.py results/ftw runs/RUN ...   (pip install matplotlib)

Above: Elo of the best and the median agent, of the greedy player (dashed; it differs between runs), and the random
player's 500. Below: genes, mean over the population. CSV: a row for each record, with the agent that is best there.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

GENES = ["learning_rate", "period", "kl", "I captured", "I picked up", "I tagged"]


def read(run):
    """-> list of {"run", "games", "best", "median", "greedy", "wins_random", "wins_greedy", "genes/...": ...}."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    columns = {tag: {x.step: x.value for x in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    agents = sorted(int(tag[4:]) for tag in columns if tag[4:].isdigit() and tag.startswith("elo/"))
    rows = []
    for games in sorted(columns["elo/0"]):
        elo = [columns[f"elo/{p}"][games] for p in agents]
        best, at = agents[int(np.argmax(elo))], lambda tag, games=games: columns.get(tag, {}).get(games, float("nan"))
        row = {"run": Path(run).name, "games": games, "best": max(elo), "median": float(np.median(elo))}
        row |= {"greedy": at("elo/greedy"), "wins_random": at(f"wins/{best}_against_random")}
        row["wins_greedy"] = at(f"wins/{best}_against_greedy")
        rows.append(row | {f"genes/{x}": float(np.mean([at(f"genes/{x}/{p}") for p in agents])) for x in GENES})
    return rows


def draw(path, runs):
    """runs: lists of rows, as of read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(8, 8), sharex=True)
    for i, rows in enumerate(runs):
        games, colour = [row["games"] for row in rows], f"C{i}"
        axes[0].plot(games, [row["best"] for row in rows], color=colour, label=rows[0]["run"])
        axes[0].plot(games, [row["median"] for row in rows], color=colour, alpha=0.5, linewidth=1)
        axes[0].plot(games, [row["greedy"] for row in rows], color=colour, alpha=0.5, linestyle="--", linewidth=1)
    for gene in GENES:
        values = np.array([row[f"genes/{gene}"] for row in runs[0]])
        axes[1].plot([row["games"] for row in runs[0]], values / values[0], label=f"{gene} (first: {values[0]:.3g})")
    axes[0].axhline(500, color="black", linewidth=1)
    axes[0].set_ylabel("Elo: best, median (thin), greedy (dashed)")
    axes[1].set(xlabel="matches", ylabel="mean gene of the first run, relative to its first")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(name, *folders):
    runs = [read(folder) for folder in folders]
    with open(f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, runs[0][0])
        writer.writeheader()
        for row in (row for rows in runs for row in rows):
            writer.writerow({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})
    draw(f"{name}.png", runs)


if __name__ == "__main__":
    main(*sys.argv[1:])
