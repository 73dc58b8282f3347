# SPDX-License-Identifier: MIT
"""The learner of ftw.py alone: one agent, with the genes of the middle, trained against a scripted player.

    python results/ftw_scripted.py --kl 1e-5 --minutes 4            with 1e-4 and more next to nothing is learned
    python results/ftw_scripted.py --core flat                      or lstm; --opponent greedy

A line for each 640 matches: wins, captures and tags of an agent in a match, entropy of the policy, nats of the KL.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ftw  # noqa: E402


@dataclass
class Args:
    opponent: Literal["random", "greedy"] = "random"
    core: Literal["ftw", "flat", "lstm"] = "ftw"
    memory: Literal["merlin", "dnc", "none"] = "merlin"
    kl: float = 1e-5  # weight of the KL; that of the prior's is a tenth
    learning_rate: float = 2e-3
    games: int = 16  # at once; the agent has both places of a team
    minutes: float = 4.0
    seed: int = 1


def main(options):
    flags = dict(core=options.core, memory=options.memory, games=options.games, seed=options.seed)
    args = ftw.resolve(ftw.Args(device="cpu", population=1, reward="events", **flags))
    ftw.tune(args)
    torch.manual_seed(args.seed)
    game = ftw.make_game(args, args.games, args.seed)
    (agent,) = ftw.make_population(args, game, np.random.default_rng(args.seed))
    for name, value in dict(kl=options.kl, kl_prior=options.kl / 10, learning_rate=options.learning_rate).items():
        agent.genes[list(ftw.GENES).index(name)] = value
    who = np.broadcast_to(game.team, (args.games, len(game.team)))
    began, matches, won, totals = time.time(), 0, [], 0.0
    while time.time() - began < 60 * options.minutes:
        match = ftw.Match(game, [agent, options.opponent], who, {0: agent.act})
        while match.outcome is None:
            stats = agent.update(match.window(args.window)[0])
        matches, totals = matches + args.games, totals + match.totals[0]
        won.append((match.outcome == 1).mean())
        if matches % 640 < args.games:
            captured, tagged = totals[[0, 9]] / (len(won) * args.games * game.players)
            line = f"matches {matches:,}  won {np.mean(won):.0%}  captured {captured:.2f}  tagged {tagged:.1f}"
            line += f"  entropy {-stats['losses/entropy']:.2f}  KL {stats.get('losses/kl', torch.zeros(())):.1f}"
            print(f"{line}  {time.time() - began:.0f} s", flush=True)
            won, totals = [], 0.0


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
