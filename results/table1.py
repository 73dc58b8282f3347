# SPDX-License-Identifier: MIT
"""The paper's Table 1: python results/table1.py [--table1-seeds 3] [--jobs 2] [flags of gumbel_softmax.py]

Trains every cell that RUN_ROOT/table1 lacks, goes on with those that were begun, then prints the table and writes
table1.csv and table1.png there. Run it again to go on. Needs matplotlib: pip install matplotlib
"""

import concurrent.futures
import csv
import json
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import tyro

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from estimators import new_folder  # noqa: E402

import gumbel_softmax as gs  # noqa: E402

PAPER = get_args(gs.Estimator)  # in the order of Table 1
# Test nats. The table has the same numbers for annealed ST and ST Gumbel-softmax in both VAE rows, 111.5 and 107.8:
# both cells of st_gumbel_softmax are from Figure 4.
TABLE1 = {
    ("sbn", "bernoulli"): [72.0, 59.7, 58.9, 58.9, 58.7, 58.5, 59.3],
    ("sbn", "categorical"): [73.1, 67.9, 63.0, 61.8, 61.1, 59.0, 59.7],
    ("vae", "bernoulli"): [112.2, 110.9, 109.7, 116.0, 111.5, 105.0, 111.1],
    ("vae", "categorical"): [110.6, 128.8, 107.0, 110.9, 107.8, 101.5, 103.1],
}


@dataclass
class Args(gs.Args):
    table1_seeds: int = 1  # of reinforce, st and gumbel_softmax; the others have one
    jobs: int = 1  # cells trained side by side, a process of one thread each


def cell_folder(args):
    """Where a cell has its run."""
    return Path(args.run_root) / f"{args.task}-{args.latent}-{args.estimator}-{args.seed}"


def cell(args):
    """Train one cell of the table, or go on with it. What train returned, and the flags, are kept as cell.json."""
    torch.set_num_threads(1)
    folder = cell_folder(args)
    begun = sorted(folder.glob("*/checkpoint.pt"), key=os.path.getmtime)
    again = dict(resume=str(begun[-1])) if begun else {}
    result = gs.train(replace(args, run_root=str(folder), **again))
    (folder / "cell.tmp").write_text(json.dumps({**result, "args": asdict(args)}))
    os.replace(folder / "cell.tmp", folder / "cell.json")


def finished(args):
    """What cell left, or None. Stops where it was trained with other flags: a table must not mix budgets."""
    path = cell_folder(args) / "cell.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    for name in {*result["args"]} - {"device", "data", "cuda_graph", "run_root"}:
        if result["args"][name] != getattr(args, name):
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            gs.fail(f"{flag}: {path} has {result['args'][name]}; allowed: the same, or another --run-root")
    return {**result, "task": args.task, "latent": args.latent, "estimator": args.estimator, "seed": args.seed}


def cells_of(args):
    """-> the flags of every cell."""
    base = {x.name: getattr(args, x.name) for x in fields(gs.Args)} | {"run_root": str(Path(args.run_root) / "table1")}
    cells, repeated = [], ("reinforce", "st", "gumbel_softmax")
    for seed in range(args.seed, args.seed + args.table1_seeds):
        for task, latent in TABLE1:
            for name in PAPER:
                if seed == args.seed or name in repeated:
                    own = dict(task=task, latent=latent, estimator=name, seed=seed)
                    cells.append(gs.resolve(gs.Args(**{**base, **own})))
    return cells


def table1(args):
    """Train the cells that are missing, then print and draw the table. -> {"run_dir", "cells"}."""
    for name in "table1_seeds", "jobs":
        if getattr(args, name) < 1:
            gs.fail(f"--{name.replace('_', '-')} {getattr(args, name)}: allowed: 1 or more")
    if args.resume or args.eval:
        gs.fail("--resume, --eval: no flags of a table; it goes on by itself, allowed: none of them")
    cells, folder = cells_of(args), new_folder(args, "table1")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(cell, [args for args in cells if finished(args) is None]))
    results = [finished(args) for args in cells]
    keys = ["task", "latent", "estimator", "seed", "global_step", "bound", "bound_1", "seconds"]
    rows = [[x[key] for key in keys] for x in results]
    paper = [TABLE1[args.task, args.latent][PAPER.index(args.estimator)] for args in cells]
    with open(folder / "table1.csv", "w", newline="") as file:
        csv.writer(file).writerows([[*keys, "paper"], *[[*row, x] for row, x in zip(rows, paper, strict=True)]])
    print(f"| | {' | '.join(PAPER)} |\n|-|{'-|' * len(PAPER)}")
    for (task, latent), row in TABLE1.items():
        texts = []
        for name, known in zip(PAPER, row, strict=True):
            mine = [x for x in results if (x["task"], x["latent"], x["estimator"]) == (task, latent, name)]
            texts.append(f"{np.mean([x['bound'] for x in mine]):.1f} ({known})")
        print(f"| {task} {latent} | {' | '.join(texts)} |")
    picture(folder / "table1.png", results)
    print(f"ours (the paper's, after 550,000 steps); {folder}: table1.csv, table1.png")
    return {"run_dir": str(folder), "cells": results}


def picture(path, results):
    """Validation curves of all cells."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, axes = plt.subplots(2, 2, figsize=(13, 10))
    for (task, latent), axis in zip(TABLE1, axes.flat, strict=True):
        for i, name in enumerate(PAPER):
            mine = [x for x in results if (x["task"], x["latent"], x["estimator"]) == (task, latent, name)]
            for x in mine:
                axis.plot(*zip(*x["curve"], strict=True), color=f"C{i}", label=name if x is mine[0] else None)
        lowest = min(y for x in results if x["task"] == task for _, y in x["curve"])
        axis.set(title=f"{task}, {latent}", xlabel="steps", ylabel="validation bound, 20 samples, nats")
        axis.set_ylim(lowest - 2, lowest + 45)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    table1(tyro.cli(Args, description=__doc__))
