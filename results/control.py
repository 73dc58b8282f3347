# SPDX-License-Identifier: MIT
"""A policy gradient through a sampled action, on CartPole-v1: python results/control.py --temperature 0.5

Of the flags of gumbel_softmax.py it takes estimator (a pathwise one), temperature, total_steps, batch_size, seed and
run_root.
"""

import copy
import csv
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from estimators import new_folder  # noqa: E402

import gumbel_softmax as gs  # noqa: E402


def control(args):
    """Soft actor-critic on CartPole-v1; the critic's gradient reaches the policy through the sampled action.

    What is stored, and what the critic learns from, is the sample itself, relaxed or not; its arg-max is played. A
    critic that saw vertices only would have no reason to be right between them. Hyperparameters are constants below.
    -> RUN_ROOT/control/ESTIMATOR-SEED.csv, one row per episode.
    """
    if args.estimator in gs.SCORE:
        gs.fail(f"--estimator {args.estimator}: allowed: {', '.join(gs.PATHWISE)}")
    args, folder = gs.resolve(args), new_folder(args, "control")
    torch.manual_seed(args.seed)
    env, discount, entropy_scale, slow_rate, starts = gym.make("CartPole-v1"), 0.99, 0.1, 0.01, 500
    hidden = lambda inputs: [nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    actor = nn.Sequential(*hidden(4), nn.Linear(128, 2))
    critics = nn.ModuleList(nn.Sequential(*hidden(6), nn.Linear(128, 1)) for _ in range(2))
    slow, optimizers = copy.deepcopy(critics), [torch.optim.Adam(net.parameters(), 3e-4) for net in (actor, critics)]
    knobs = {"temperature": args.temperature} if args.estimator in gs.TEMPERED else {}
    values = lambda nets, obs, action: torch.stack([net(torch.cat([obs, action], -1))[:, 0] for net in nets])  # (2, B)

    def policy(obs):  # (B, 4) -> sampled actions (B, 2), entropy (B,)
        logp = actor(obs).log_softmax(-1)
        return gs.PATHWISE[args.estimator](logp[:, None], **knobs)[:, 0], -(logp.exp() * logp).sum(-1)

    def learn(optimizer, loss):
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()

    rows, returns, total = [torch.zeros(args.total_steps, n) for n in (4, 2, 4, 1, 1)], [], 0.0
    obs, _ = env.reset(seed=args.seed)
    for step in range(args.total_steps):
        with torch.no_grad():
            action = policy(torch.from_numpy(obs)[None])[0][0]
        after, reward, terminated, truncated, _ = env.step(int(action.argmax()))
        for ring, x in zip(rows, (obs, action, after, reward, float(not terminated)), strict=True):
            ring[step] = torch.as_tensor(x)
        obs, total = after, total + reward
        if terminated or truncated:
            returns.append((step + 1, total))
            (obs, _), total = env.reset(), 0.0
            if len(returns) % 10 == 0:
                print(f"step {step + 1:,}  mean return of 10 episodes {np.mean([x for _, x in returns[-10:]]):.1f}")
        if step >= starts:
            index = torch.randint(step + 1, (args.batch_size,))
            seen, taken, then, gain, cont = (ring[index] for ring in rows)
            with torch.no_grad():
                action, entropy = policy(then)
                target = values(slow, then, action).amin(0) + entropy_scale * entropy  # (B)
                target = gain[:, 0] + discount * cont[:, 0] * target
            learn(optimizers[1], (values(critics, seen, taken) - target).square().sum(0))
            action, entropy = policy(seen)
            learn(optimizers[0], -values(critics, seen, action).amin(0) - entropy_scale * entropy)
            with torch.no_grad():
                torch._foreach_lerp_(list(slow.parameters()), list(critics.parameters()), slow_rate)
    with open(folder / f"{args.estimator}-{args.seed}.csv", "w", newline="") as file:
        csv.writer(file).writerows([["step", "return"], *returns])
    return {"run_dir": str(folder), "returns": returns}


if __name__ == "__main__":
    control(tyro.cli(gs.Args, description=__doc__))
