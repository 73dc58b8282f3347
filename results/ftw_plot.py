# SPDX-License-Identifier: MIT
"""Curves of ftw.py: NAME.csv and NAME.png from run folders.   (pip install matplotlib)

    python results/ftw_plot.py results/ftw FTW=runs/A,runs/B,runs/C self-play=runs/D,runs/E,runs/F

One curve for each LABEL=RUNS: mean over its runs, band from least to greatest; a folder alone is its own label. By
matches for each agent, as in the paper: a population of four has played four times as many.
Above: Elo of the best agent, the random player pinned at 500 (dotted). Middle: points of the best agent in rating
matches against the greedy player, draws count half, a moving mean (dashed: against the random one). Below: genes of the
first curve, relative to their first mean. CSV: a row for each record, with the agent that is best there.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

GENES = ["learning_rate", "period", "kl", "kl_prior", "I captured", "I picked up", "I tagged"]
WINDOW = 15  # records in a point of the moving mean


def read(label, run):
    """-> list of {"curve", "run", "games", "best", "median", "greedy", "points_random", ..., "genes/...": ...}."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    columns = {tag: {x.step: x.value for x in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    agents = sorted(int(tag[4:]) for tag in columns if tag[4:].isdigit() and tag.startswith("elo/"))
    rows = []
    for games in sorted(columns["elo/0"]):
        elo = [columns[f"elo/{p}"][games] for p in agents]
        best, at = agents[int(np.argmax(elo))], lambda tag, games=games: columns.get(tag, {}).get(games, float("nan"))
        row = {"curve": label, "run": Path(run).name, "agents": len(agents), "games": games}
        row |= {"best": max(elo), "median": float(np.median(elo)), "greedy": at("elo/greedy")}
        row |= {"points_random": at(f"wins/{best}_against_random")}
        row["points_greedy"] = at(f"wins/{best}_against_greedy")
        rows.append(row | {f"genes/{x}": float(np.mean([at(f"genes/{x}/{p}") for p in agents])) for x in GENES})
    return rows


def smooth(values):
    """Mean of the last WINDOW known values, nan before the first."""
    known = ~np.isnan(values)
    sums, counts = np.cumsum(np.where(known, values, 0)), np.cumsum(known)
    before = lambda x: np.concatenate([np.zeros(WINDOW), x])[: len(x)]
    with np.errstate(invalid="ignore"):
        return (sums - before(sums)) / (counts - before(counts))


def together(runs, column, smoothed=False):
    """Values of several runs at common numbers of matches for each agent -> matches, (runs, matches)."""
    matches = [[row["games"] / row["agents"] for row in rows] for rows in runs]
    games = np.linspace(0, min(x[-1] for x in matches), 200)
    curves = []
    for x, rows in zip(matches, runs, strict=True):
        values = np.array([row[column] for row in rows])
        curves.append(np.interp(games, x, smooth(values) if smoothed else values))
    return games, np.array(curves)


def draw(path, curves):
    """curves: {label: lists of rows, as of read}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(8, 11), sharex=True)
    for i, (label, runs) in enumerate(curves.items()):
        name = f"{label} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        for axis, column, style in (0, "best", "-"), (1, "points_greedy", "-"), (1, "points_random", "--"):
            games, values = together(runs, column, column != "best")
            axes[axis].plot(games, values.mean(0), style, color=f"C{i}", label=name if style == "-" else None)
            if style == "-":
                axes[axis].fill_between(games, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, linewidth=0)
    first = next(iter(curves.values()))
    for gene in GENES:
        games, values = together(first, f"genes/{gene}")
        means = values.mean(0)
        axes[2].plot(games, means / means[0], label=f"{gene} (first: {means[0]:.3g})")
    axes[0].axhline(500, color="black", linewidth=1, linestyle=":")
    axes[0].set_ylabel("Elo of the best agent")
    axes[1].set_ylabel("points against the greedy player\n(dashed: the random one)")
    axes[2].set(xlabel="matches for each agent", yscale="log")
    axes[2].set_ylabel(f"mean gene of {next(iter(curves))}, relative to its first")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(name, *asked):
    curves = {}
    for text in asked:
        label, _, folders = text.rpartition("=")
        curves[label or Path(text).name] = [read(label or Path(text).name, folder) for folder in folders.split(",")]
    rows = [row for runs in curves.values() for rows in runs for row in rows]
    with open(f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})
    draw(f"{name}.png", curves)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(2)
    main(*sys.argv[1:])
