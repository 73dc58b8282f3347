# SPDX-License-Identifier: MIT
"""Table 1 of PlaNet: its planner on the simulator itself, the most that a perfect model would give it.

    python results/planet_planner.py --env-id dm_control/cartpole-balance-v0 --eval-episodes 1

Takes the flags of planet.py; needs no checkpoint, learns nothing. Slow: each decision simulates iterations x candidates
x horizon x action_repeat steps in Python.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import planet  # noqa: E402


def simulator_score(env, repeat, to_action):
    """-> a function from plans (1, J, H, A) in -1 to 1 to their returns (1, J) from where the simulator now stands, and
    is left. env: shimmy's of dm_control; to_action: from -1 to 1 to its bounds.
    """
    physics, task = env.physics, env.task
    substeps = round(env.control_timestep() / physics.timestep())

    def score(plans):
        state, warm = physics.get_state(), physics.data.qacc_warmstart.copy()  # warm: of the contact solver

        def rewind():
            physics.set_state(state)
            physics.forward()
            physics.data.qacc_warmstart[:] = warm

        returns = []
        for plan in to_action(plans[0].numpy()):
            rewind()
            total = 0.0
            for action in plan.repeat(repeat, 0):
                task.before_step(action, physics)
                physics.step(substeps)
                total += task.get_reward(physics)
            returns.append(total)
        rewind()
        return torch.tensor([returns])

    return score


def upper_bound(args):
    """args: of planet.py -> the returns of eval_episodes episodes."""
    args = planet.resolve(args)
    if args.resume or args.eval or not args.env_id.startswith("dm_control/"):
        planet.fail(f"--env-id {args.env_id}: allowed: dm_control/..., whose state can be copied, and no checkpoint")
    env = planet.make_envs(args.env_id, 1, args.seed, replace(args, obs="vector")).envs[0].unwrapped
    env = planet.gym.wrappers.RepeatAction(env, args.action_repeat)
    low, high = env.action_space.low, env.action_space.high
    to_action = lambda x: low + (x + 1) / 2 * (high - low)
    shape, returns = (1, args.candidates, args.horizon, len(low)), []
    torch.manual_seed(args.seed)
    for episode in range(args.eval_episodes):
        env.reset(seed=args.seed + episode)
        score, total, done = simulator_score(env.unwrapped, args.action_repeat, to_action), 0.0, False
        while not done:
            plan = planet.cem(score, shape, args.iterations, args.top, torch.zeros(1))
            _, reward, terminated, truncated, _ = env.step(to_action(plan[0, 0].numpy()))
            total, done = total + reward, terminated or truncated
        returns.append(total)
        print(f"episode {episode + 1}: {total:.1f}", flush=True)
    print(f"{args.env_id}, planner on the simulator: mean {np.mean(returns):.4g} of {len(returns)} episodes")
    return returns


if __name__ == "__main__":
    upper_bound(tyro.cli(planet.Args, description=__doc__))
