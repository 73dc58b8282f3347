# SPDX-License-Identifier: MIT
"""What --vector async gains: steps of environments a second, in one process and in one for each, without an agent.

    python results/vector.py --env-id dm_control/cheetah-run-v0 --obs image --num-envs 2

Takes the flags of dreamerv3.py. Each kind steps for ten seconds, with action 0.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamerv3  # noqa: E402


def speed(args, seconds=10.0):
    """-> steps per second of all environments together, seconds that it took to make them."""
    began = time.perf_counter()
    envs = dreamerv3.make_envs(args.env_id, args.num_envs, args.seed, args)
    row, steps = dreamerv3.start_row(envs, args.seed), 0
    made = time.perf_counter() - began
    action = np.zeros(envs.action_space.shape, envs.action_space.dtype)
    while envs.seconds < seconds:
        row, steps = dreamerv3.next_row(envs, action, row), steps + args.num_envs
    envs.close()
    return steps / envs.seconds, made


def main(args):
    args = dreamerv3.resolve(args)
    for vector in "sync", "async":
        print("{}: {:,.0f} steps/s, made in {:.1f} s".format(vector, *speed(replace(args, vector=vector))), flush=True)


if __name__ == "__main__":  # processes that are spawned import this file, too
    main(tyro.cli(dreamerv3.Args, description=__doc__))
