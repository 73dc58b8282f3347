# SPDX-License-Identifier: MIT
"""The weights of a run in a small file that --eval plays; no optimiser and no replay, so --resume refuses it.

python results/agents.py runs/RUN results/agents/NAME.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamerv3  # noqa: E402  # load and save are the same in every file

KEYS = ("args", "agent", "source")  # of an agent of any file; ftw.py: a population, and its ratings
POPULATION = ("args", "agents", "source", "now")


def shrink(run, path):
    """run: folder or checkpoint of any of the files -> path, with its weights, flags and source only."""
    saved = dreamerv3.load(run, need=("args", "source"))
    kept = {key: saved[key] for key in (POPULATION if "agents" in saved else KEYS)}
    if "agents" in kept:
        kept["agents"] = [{"agent": part["agent"]} for part in kept["agents"]]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    dreamerv3.save(path, **kept)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 3:
        dreamerv3.fail("allowed: python results/agents.py runs/RUN results/agents/NAME.pt")
    path = shrink(*sys.argv[1:])
    print(f"{path}: {Path(path).stat().st_size / 2**20:.1f} MiB")
