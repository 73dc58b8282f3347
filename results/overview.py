# SPDX-License-Identifier: MIT
"""The picture of the README, from the CSV files of this folder: python results/overview.py (pip install matplotlib)"""

import csv
from pathlib import Path

import matplotlib
import numpy as np
from plot import episodes, published, smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
PANELS = [  # title, CSV, episodes in the running mean, published curve, random play
    ("DreamerV3, Pong from pixels", "gpu/pong.csv", 10, "atari100k,dreamerv3,atari_pong", -20.7),
    ("DreamerV3, Boxing from pixels", "boxing.csv", 4, "atari100k,dreamerv3,atari_boxing", 0.1),
    ("DreamerV3, walker-walk, vectors", "walker_walk.csv", 10, "dmc_proprio,dreamerv3,dmc_walker_walk", None),
    ("PlaNet, cartpole-swingup from vectors", "planet_swingup.csv", 5, None, 106),
    ("MERLIN, memory game with 8 cards", "merlin8.csv", 10, None, -11.2),
]
OTHERS = {  # runs of the same CSV files that are there for comparison: the seconds in which they began
    "random collection": ["1795381459", "1795384923", "1795385255"],
    "RL-LSTM": ["1795391950", "1795392065", "1795392166"],
    "RL-MEM": ["1795392531", "1795400515", "1795400709"],
}
COLORS = {"ours": "tab:blue", "random collection": "tab:gray", "RL-LSTM": "tab:orange", "RL-MEM": "tab:green"}


def curves(axes, path, window):
    """A line for each run, a colour for each kind of run."""
    for run, rows in episodes(path, 1).items():
        _, frames, _, returns = np.array(rows).T
        label = next((kind for kind, names in OTHERS.items() if run.name.rsplit("__", 1)[1] in names), "ours")
        axes.plot(frames, smooth(returns, window), color=COLORS[label], linewidth=1, alpha=0.8, label=label)


def beside(axes, row):
    """The authors' curve, as far as ours goes: mean over seeds, band from least to greatest."""
    right, points = axes.get_xlim()[1], published(row)
    steps, mean, low, high = points[:, points[0] < 1.1 * right]
    axes.plot(steps, mean, "k--", linewidth=1, label="published")
    axes.fill_between(steps, low, high, color="k", alpha=0.1, linewidth=0)
    axes.set_xlim(0, right)


def ftw(axes):
    """Points of the best agent against the greedy player, draws counted half; a line for each run."""
    with open(HERE / "ftw.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["points_greedy"] != "nan"]
    labels = list(dict.fromkeys(row["curve"] for row in rows))
    for label, run in dict.fromkeys((row["curve"], row["run"]) for row in rows):
        own = [row for row in rows if row["run"] == run]
        matches = [float(row["games"]) / float(row["agents"]) for row in own]
        points = smooth(np.array([float(row["points_greedy"]) for row in own]), 15)
        axes.plot(matches, points, linewidth=1, color=f"C{labels.index(label)}", label=label)
    axes.set_title("FTW: points against the greedy player", fontsize=9)
    axes.set_xlabel("matches for each agent", fontsize=8)


def main():
    figure, grid = plt.subplots(2, 3, figsize=(11, 5.2))
    for axes, (title, name, window, row, random) in zip(grid.flat, PANELS, strict=False):
        curves(axes, HERE / name, window)
        if row:
            beside(axes, row)
        if random is not None:
            axes.axhline(random, color="gray", linewidth=0.8, linestyle=":", label="random")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("environment frames", fontsize=8)
    ftw(grid.flat[-1])
    for axes in grid.flat:
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))  # each label once
        axes.legend(handles.values(), handles.keys(), fontsize=7)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "overview.png", dpi=90)


if __name__ == "__main__":
    main()
