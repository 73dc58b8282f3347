# SPDX-License-Identifier: MIT
"""Curves: python results/plot.py NAME runs/A runs/B ... [--published BENCHMARK,METHOD,TASK] [--window 10] [--by FLAG]

Reads the TensorBoard files of the runs, or a CSV of this script in place of a run; writes NAME.csv (one row per
training episode) and NAME.png next to this file, or elsewhere, if NAME is an absolute path.
--by exp-name draws one curve for all runs of one value of that flag: mean over runs, band from least to greatest.
--by prior,alpha-obs one for each combination, named by those values that most runs do not have.
A published curve comes from published.csv (columns benchmark, method, task, step, mean, min, max), as a line in a band
of its seeds; one measured with another program from the file of --against (columns seed, step, return): both in frames.
Needs matplotlib, which the algorithms do not: pip install matplotlib
"""

import argparse
import csv
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent


def smooth(returns, window):
    """Mean of the last `window` episodes."""
    return np.array([returns[max(0, i + 1 - window) : i + 1].mean() for i in range(len(returns))])


def episodes(run, every):
    """-> {run: rows}, of a run folder or of all in a CSV of this script. A row: policy step, frames, seconds since the
    start, return; one for `every` training episodes, their mean.
    """
    if run.suffix == ".csv":
        runs = {}
        with open(run) as file:
            for row in csv.DictReader(file):
                numbers = int(row["policy_step"]), int(row["frames"]), float(row["seconds"]), float(row["return"])
                runs.setdefault(Path(row["run"]), []).append(numbers)
        return runs
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    frames = events.Scalars("charts/frames")[-1]
    repeat = frames.value / frames.step
    start = events.FirstEventTimestamp()
    points = events.Scalars("charts/episodic_return")
    means = smooth(np.array([x.value for x in points]), every)
    rows = [(x.step, int(x.step * repeat), round(x.wall_time - start, 1)) for x in points]
    return {run: [(*row, round(float(mean), 4)) for row, mean in zip(rows, means, strict=True)][every - 1 :: every]}


def draw_groups(axes, curves, flags, window):
    """curves: [(run, frames, returns)] -> a line and a band for each combination of flags, read from checkpoints."""
    import torch

    saved = [torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["args"] for run, *_ in curves]
    values = [tuple(args.get(flag.replace("-", "_")) for flag in flags) for args in saved]
    usual = [max(column, key=column.count) for column in zip(*values, strict=True)] if len(flags) > 1 else [None]
    groups = {}
    for (_, frames, returns), own in zip(curves, values, strict=True):
        texts = [f"{flag}: {x}" for flag, x in zip(flags, own, strict=True)]
        unlike = [text for text, x, y in zip(texts, own, usual, strict=True) if x != y]
        groups.setdefault(", ".join(unlike or texts), []).append((frames, smooth(returns, window)))
    for label, members in groups.items():
        grid = np.linspace(0, min(frames[-1] for frames, _ in members), 200)
        lines = np.array([np.interp(grid, frames, mean) for frames, mean in members])
        (line,) = axes.plot(grid, lines.mean(0), label=f"{label} ({len(members)} runs)")
        axes.fill_between(grid, lines.min(0), lines.max(0), color=line.get_color(), alpha=0.12, linewidth=0)


def published(row):
    """BENCHMARK,METHOD,TASK of published.csv -> frames, mean over seeds, least, greatest: (4, points)."""
    with open(HERE / "published.csv") as file:
        rows = [x for x in csv.DictReader(file) if row.split(",") == list(x.values())[:3]]
    return np.array([[float(x[key] or "nan") for x in rows] for key in ("step", "mean", "min", "max")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--published", help="BENCHMARK,METHOD,TASK of published.csv")
    parser.add_argument("--against", type=Path, help="file with another program's episodes")
    parser.add_argument("--window", type=int, default=10, help="episodes in the running mean")
    parser.add_argument("--every", type=int, default=1, help="training episodes in one row: for many short episodes")
    parser.add_argument("--by", help="names of flags: one curve for each of their values")
    args = parser.parse_args()
    curves, known = [], {run: rows for path in args.runs for run, rows in episodes(path, args.every).items()}
    figure, axes = plt.subplots(figsize=(6, 4))
    with open(HERE / f"{args.name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "policy_step", "frames", "seconds", "return"])
        for run, rows in known.items():
            writer.writerows([run.name, *row] for row in rows)
            _, frames, _, returns = np.array(rows).T
            curves.append((run, frames, returns))
    for run, frames, returns in curves if not args.by else []:
        (line,) = axes.plot(frames, smooth(returns, args.window), label=run.name.rsplit("__", 1)[0])
        axes.plot(frames, returns, ".", color=line.get_color(), alpha=0.25, markersize=3)
    if args.by:
        draw_groups(axes, curves, args.by.split(","), args.window)
    if args.published:
        steps, mean, low, high = published(args.published)
        axes.plot(steps, mean, "k--", label="published " + args.published)
        axes.fill_between(steps, low, high, color="k", alpha=0.1, linewidth=0)
        axes.set_xlim(0, 1.5 * max(frames[-1] for _, frames, _ in curves))
    if args.against:
        with open(args.against) as file:
            rows = [(row["seed"], float(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
        for seed in sorted({row[0] for row in rows}):
            _, steps, returns = zip(*(row for row in rows if row[0] == seed), strict=True)
            label = f"{args.against.stem}, seed {seed}"
            axes.plot(steps, smooth(np.array(returns), args.window), "--", color="gray", label=label)
    axes.set(
        xlabel="environment frames",
        ylabel=f"return of training episodes (mean of {args.window})",
        title=Path(args.name).name,
    )
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / f"{args.name}.png", dpi=110)


if __name__ == "__main__":
    main()
