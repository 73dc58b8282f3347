# SPDX-License-Identifier: MIT
"""What an agent of ftw.py knows and does: python results/ftw_analyse.py RUN [--games 64] [--device cpu]

RUN: run folder or checkpoint, of the game of ftw.py. The best agent plays against the median one.
Knows, after the paper's Figure 4: logistic regressions that read facts off the latents and, for comparison, off the
observation; the area under the ROC curve (0.5: chance, 1: always right) on the second half of the matches. Some facts
lie in the observation as they are (the agent's own lamps); others a linear reading of it cannot give, or nothing can.
Does: shares of the steps in which it is on the board, beside those of the scripted players; and how often it wins, by
the length of the way between the bases: does it go round walls?
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ftw  # noqa: E402

NEAR = 2  # cells, along rows, columns and diagonals


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # run folder or checkpoint of ftw.py
    games: int = 64  # at once; each to its end
    device: str = "auto"


def gap(a, b):
    """Cells between places (..., 2), along rows, columns and diagonals -> (...)."""
    return np.abs(a - b).max(-1)


def mates(game):
    """(N, N): who is whose mate."""
    return (game.team[:, None] == game.team) & ~np.eye(len(game.team), dtype=bool)


def facts(game):
    """What is true for each player now. -> {fact: (G, N) bool}."""
    own, other = game.team, 1 - game.team
    between, here = gap(game.pos[:, :, None], game.pos[:, None]), game.wait == 0  # (G, N, N), (G, N)
    foe = here[:, None] & (game.team[:, None] != game.team)
    carrying = game.carrying()
    taken, lies = game.carrier >= 0, (game.carrier < 0) & ~game.at_home()  # (G, 2): of each flag
    seen = gap(game.pos, game.flag[:, own]) <= game.view  # (G, N): the own flag
    return {
        "I carry the flag": carrying,
        "my mate carries it": (mates(game) & carrying[:, None]).any(2),
        "an opponent is near": (foe & (between <= NEAR)).any(2),
        "our flag is carried away": taken[:, own],
        "our flag is carried away, out of sight": taken[:, own] & ~seen,
        "our flag lies about": lies[:, own],
        "their flag lies at their base": game.at_home()[:, other],
    }


def habits(game):
    """What players do, {habit: (G, N) bool}; NaN where there is no mate."""
    here, carrying = game.wait == 0, game.carrying()
    between = np.where(mates(game) & here[:, None], gap(game.pos[:, :, None], game.pos[:, None]), 99)
    return {
        "beside a mate": between.min(2) <= 1,
        "at the own base": (gap(game.pos, game.home) <= NEAR) & ~carrying,
        "at the opponents' base": (gap(game.pos, game.base[1 - game.team]) <= NEAR) & ~carrying,
        "carrying": carrying,
    }


def watch(game, pair, act):
    """Matches of two players, the first in both places of the first team. -> {name: (steps, ...)} of facts, habits and,
    of an agent, what it had seen and computed then: "observation", "z", "h", "slow_h".
    """
    match = ftw.Match(game, pair, np.int64(game.team != np.zeros((game.games, 1))), act)
    mine, record = game.team == 0, []
    while match.outcome is None:
        step = {name: x[:, mine].ravel() for name, x in {**facts(game), **habits(game)}.items()}
        step["here"], seen = (game.wait == 0)[:, mine].ravel(), match.obs[:, mine]
        match.play()
        if 0 in act:
            state = {key.removeprefix("state/"): x for key, x in match.states[0].items()}
            step["observation"] = seen.reshape(len(step["here"]), -1)
            step |= {
                key: state[key][: len(seen) * mine.sum()].cpu().numpy() for key in ("z", "h", "slow_h") if key in state
            }
        record.append(step)
    return {name: np.stack([step[name] for step in record]) for name in record[0]}


def ways(game):
    """Steps of the shortest way between the bases of the present boards -> (G)."""
    start, end = game.base @ [game.size, 1]
    return game.distances()[:, start, end].copy()


def area(scores, truth):
    """Under the ROC curve: how often a true case scores higher than a false one; ties count half."""
    yes, ranks = truth.sum(), rankdata(scores)
    return (ranks[truth].sum() - yes * (yes + 1) / 2) / (yes * (len(truth) - yes))


def probe(x, truth):
    """A linear reading, fitted to the first half of the matches, tried on the second. x: (steps, B, ...), truth:
    (steps, B). -> area, nan where a half has not 20 cases of each kind.
    """
    half = truth.shape[1] // 2
    parts = [
        (np.float32(x[:, s]).reshape(-1, x.shape[-1]), truth[:, s].ravel()) for s in (slice(half), slice(half, None))
    ]
    if min(min(y.sum(), (~y).sum()) for _, y in parts) < 20:
        return float("nan")
    (x, y), (x2, y2) = parts
    mean, std = x.mean(0), x.std(0) + 1e-3
    inputs, target = torch.as_tensor((x - mean) / std), torch.as_tensor(np.float32(y))
    weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        fit = F.binary_cross_entropy_with_logits(inputs @ weight[:-1] + weight[-1], target)
        total = fit + 1e-4 * weight[:-1].square().sum()
        total.backward()
        return total

    solver.step(loss)
    return area((x2 - mean) / std @ weight[:-1].detach().numpy(), y2)


def main(options):
    agents, ratings, args = ftw.load_population(options.run, ftw.Args(device=options.device))
    if args.env_id != "CaptureTheFlag":
        ftw.fail(f"{options.run}: a run of {args.env_id}; allowed: of the game of ftw.py")
    best, median = ftw.best_and_median(agents, ratings)
    torch.manual_seed(0)
    game = ftw.make_game(args, options.games, args.seed + 3_000)
    steps = watch(game, [best, median], {0: best.act, 1: median.act})
    sources = [key for key in ("observation", "z", "h", "slow_h") if key in steps]
    print(f"{'what a linear reading tells':42}" + "".join(f"{key:>13}" for key in ("share", *sources)))
    for name in facts(game):
        areas = [probe(steps[key], steps[name]) for key in sources]
        print(f"{name:42}{steps[name].mean():13.1%}" + "".join(f"{x:13.3f}" for x in areas))
    players = {"best agent": steps}
    players |= {name: watch(game, [name, median], {1: median.act}) for name in game.scripted}
    print(f"\n{'share of its steps on the board':42}" + "".join(f"{name:>13}" for name in players))
    for habit in habits(game):
        shares = [x[habit][x["here"]].mean() for x in players.values()]
        print(f"{habit:42}" + "".join(f"{share:13.1%}" for share in shares))
    print("\nwins of the best agent, by steps between the bases")
    for name in game.scripted:
        outcome, _ = ftw.duel(game, [best, name], {0: best.act})
        steps = ways(game)  # of the boards that were just played
        shares = [f"{n}: {(outcome[steps == n] == 1).mean():.0%} of {(steps == n).sum()}" for n in np.unique(steps)]
        print(f"{name:10}" + "   ".join(shares))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
