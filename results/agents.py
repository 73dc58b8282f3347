# SPDX-License-Identifier: MIT
"""The weights of a run in a small file that --eval plays; no optimiser and no replay, so --resume refuses it.

python results/agents.py runs/RUN results/agents/NAME.pt
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamerv3  # noqa: E402  # load and save are the same in every file

KEYS = ("args", "agent", "source")  # of an agent of any file; ftw.py: a population, and its ratings
POPULATION = ("args", "agents", "source", "now")
HEADS = ("reward.", "cont.", "critic.", "slow_critic.")  # of the Dreamers, for training only
HEADS += ("value.", "sign_of_reward.", "decoder.image_net.")  # of ftw.py and merlin.py
LARGEST = 3 * 2**20  # bytes of a file in results/agents


def blank(agent):
    """Zeros, which take no space, in place of the heads that only training needs."""
    return {key: torch.zeros(()).expand(x.shape) if key.startswith(HEADS) else x for key, x in agent.items()}


def shrink(run, path, most=float("inf")):
    """run: folder or checkpoint of any of the files -> path, with its weights, flags and source only. A population
    goes without the heads for training; so do weights of one agent that are more than `most` bytes, in bfloat16: those
    of dreamerv3.py at 12m for Atari then have 15.8 MiB.
    """
    saved = dreamerv3.load(run, need=("args", "source"))
    kept = {key: saved[key] for key in (POPULATION if "agents" in saved else KEYS)}
    if "agents" in kept:
        kept["agents"] = [{"agent": blank(part["agent"])} for part in kept["agents"]]
    elif sum(x.nbytes for x in kept["agent"].values()) > most:
        agent = {key: x.bfloat16() if x.numel() > 1024 else x for key, x in kept["agent"].items()}
        kept["agent"] = blank(agent)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    dreamerv3.save(path, **kept)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 3:
        dreamerv3.fail("allowed: python results/agents.py runs/RUN results/agents/NAME.pt")
    path = shrink(*sys.argv[1:], most=LARGEST)
    print(f"{path}: {Path(path).stat().st_size / 2**20:.1f} MiB")
