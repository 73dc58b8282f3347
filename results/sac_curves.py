# SPDX-License-Identifier: MIT
"""sac_discrete.csv and .png from run folders: python results/sac_curves.py runs/A runs/B ...   (needs matplotlib)"""

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent

if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
    print(__doc__)
    sys.exit(2)
rows = []
for run in map(Path, sys.argv[1:]):
    args = torch.load(run / "checkpoint.pt", weights_only=True)["args"]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for x in events.Scalars("charts/eval_return"):
        step = x.step // args["checkpoint_every"] * args["checkpoint_every"]  # a checkpoint comes at the next step
        rows.append((args["env_id"], args["estimator"], args["seed"], step, round(x.value, 1)))
rows.sort()
with open(HERE / "sac_discrete.csv", "w", newline="") as file:
    csv.writer(file).writerows([("env_id", "estimator", "seed", "step", "evaluation"), *rows])
figure, panels = plt.subplots(1, 2, figsize=(10, 4))
for axes, env_id in zip(panels, ("CartPole-v1", "Acrobot-v1"), strict=True):
    for name in "exact", "gumbel_softmax", "st_gumbel_softmax", "st", "reinmax":
        own = [row[2:] for row in rows if row[:2] == (env_id, name)]
        seeds, steps = sorted({row[0] for row in own}), sorted({row[1] for row in own})
        lines = np.array([[value for seed, _, value in own if seed == n] for n in seeds])
        thousands = np.array(steps) / 1000
        if seeds:
            (line,) = axes.plot(thousands, lines.mean(0), label=f"{name} ({len(seeds)})")
            axes.fill_between(thousands, lines.min(0), lines.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(title=env_id, xlabel="thousands of steps, of all environments", ylabel="mean of 20 evaluation episodes")
    axes.legend(fontsize=7, title="estimator (seeds)", title_fontsize=7)
    axes.grid(alpha=0.3)
figure.tight_layout()
figure.savefig(HERE / "sac_discrete.png", dpi=110)
