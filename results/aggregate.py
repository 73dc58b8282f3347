# SPDX-License-Identifier: MIT
"""Atari scores in the ways of the DreamerV2 paper: python results/aggregate.py FILE.csv ... [--last 5_000_000]

Each file has columns game and score, and if it likes method and seed; or it is what plot.py writes (run, frames,
return), where a run's score is the mean return of its training episodes in the last --last frames. A score is
normalised, (score - random) / (reference - random), with the references of atari_reference.csv beside this file, after
the mean over seeds. Over games: gamer median and mean, record mean, and the paper's choice, the mean of the records
clipped at 1. Brackets hold 95% intervals from 2,000 stratified bootstrap samples: seeds are drawn again within each
game. They need two seeds of each game. scipy comes with dm_control.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
NAMES = ("gamer median", "gamer mean", "record mean", "clipped record")


def plain(name):
    """Pong, ALE/Pong-v5, atari_pong -> pong; MsPacman, ms_pacman -> mspacman."""
    name = re.sub(r"^(ALE[/-]|atari_)|-v\d+$", "", name)
    return re.sub(r"[^a-z0-9]", "", name.lower())


def references():
    """-> {game: (random, gamer, record)}"""
    with open(HERE / "atari_reference.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = "random", "human_gamer", "human_record"
    return {plain(row["game"]): tuple(float(row[key] or "nan") for key in columns) for row in rows}


def read(path, last):
    """-> {(method, game): [score of each seed]}. Stops with exit code 2 where a file is of another kind."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found = {}
        if "run" in (rows[0] if rows else {}):
            runs = {}
            for row in rows:
                runs.setdefault(row["run"], []).append((float(row["frames"]), float(row["return"])))
            for run, points in runs.items():
                game, method = run.split("__")[:2]
                end = points[-1][0]
                scores = [score for frames, score in points if frames > end - last]
                found.setdefault((method, plain(game)), []).append(float(np.mean(scores)))
        else:
            for row in rows:
                key = row.get("method", Path(path).stem), plain(row["game"])
                found.setdefault(key, []).append(float(row["score"]))
        return found
    except (OSError, KeyError, ValueError) as error:
        fail(f"{path}: {type(error).__name__}: {error}; allowed: a CSV with game, score or run, frames, return")


def fail(message):
    """Bad input: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def statistics(scores, table):
    """Means over seeds (games, ...), references (games, 3) -> (4, ...) in the order of NAMES."""
    random, gamer, record = (table[:, i].reshape(-1, *[1] * (scores.ndim - 1)) for i in range(3))
    by_gamer, by_record = (scores - random) / (gamer - random), (scores - random) / (record - random)
    clipped = np.minimum(by_record, 1)
    return np.stack([np.median(by_gamer, 0), by_gamer.mean(0), by_record.mean(0), clipped.mean(0)])


def aggregate(games, samples=2000, seed=0):
    """games: {game: [score of each seed]} -> four statistics, and their intervals [(low, high)] or None."""
    table = references()
    missing = [game for game in games if game not in table or np.isnan(table[game]).any()]
    if missing:
        fail(f"{', '.join(missing)}: no reference; allowed: games with gamer and record in atari_reference.csv")
    known, data = np.array([table[game] for game in games]), [np.array(x) for x in games.values()]
    value = statistics(np.array([x.mean() for x in data]), known)
    if min(map(len, data)) < 2:
        return value, None
    from scipy.stats import bootstrap

    # each game is a sample of its own, so that seeds are drawn again within games: stratified
    over_seeds = lambda *data, axis: statistics(np.stack([x.mean(axis) for x in data]), known)
    options = dict(n_resamples=samples, vectorized=True, axis=-1, method="percentile", rng=np.random.default_rng(seed))
    interval = bootstrap(data, over_seeds, **options).confidence_interval
    return value, list(zip(interval.low, interval.high, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--last", type=float, default=5e6, help="frames at the end of a run that make its score")
    args = parser.parse_args()
    methods = {}
    for path in args.files:
        for (method, game), scores in read(path, args.last).items():
            methods.setdefault(method, {}).setdefault(game, []).extend(scores)
    print(f"| method | games | seeds | {' | '.join(NAMES)} |\n|---|---|---|{'---|' * len(NAMES)}")
    for method, games in methods.items():
        value, interval = aggregate(games)
        cells = [f"{x:.2f}" for x in value]
        if interval:
            cells = [f"{x} [{low:.2f}, {high:.2f}]" for x, (low, high) in zip(cells, interval, strict=True)]
        seeds = sorted({len(x) for x in games.values()})
        counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        print(f"| {method} | {len(games)} | {counts} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
