# SPDX-License-Identifier: MIT
"""ftw.py: the rules of its game case by case, both time scales, V-trace, memories, Elo, matches, evolution, runs."""

import dataclasses
import json
import sys
import types

import ftw_plot
import numpy as np
import pytest
import shape_comments
import torch
from helpers import gif, host_waits, same
from PIL import Image

import ftw

STAY, AHEAD, BACK, LEFT, RIGHT = range(5)
CASES = [dict(), dict(core="flat"), dict(core="lstm"), dict(memory="dnc"), dict(memory="none")]
IMAGES = dict(env_kwargs=json.dumps({"image": True, "view": 3, "length": 12}))


def board(games=1, players=2, **kwargs):
    """A game on boards without inner walls, all at home."""
    game = ftw.CaptureTheFlag(games, 0, players=players, **kwargs)
    game.reset()
    game.walls[:] = True
    game.walls[:, 1:-1, 1:-1] = False
    return game


def play(game, *actions):
    """One step; actions: (player, move, tag), all others stay. -> events of the first game, {player: names}."""
    action = np.zeros((game.games, len(game.team), 2), int)
    for player, move, tag in actions:
        action[:, player] = move, tag
    _, events, _ = game.step(action)
    return {p: {name for name, x in zip(game.events, row, strict=True) if x} for p, row in enumerate(events[0])}


def put(game, **places):
    """Players (p0=...) and flags (f0=...) to cells."""
    for name, cell in places.items():
        (game.pos if name[0] == "p" else game.flag)[:, int(name[1])] = cell


# --- the game ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [9, 13, 17])
def test_maps(size):
    """The same after half a turn; a border; every free cell can be reached from both bases; no two alike."""
    game = ftw.CaptureTheFlag(50, 3, size=size)
    game.reset()
    assert (game.walls == game.walls[:, ::-1, ::-1]).all()
    for walls in game.walls:
        assert walls[[0, -1]].all() and walls[:, [0, -1]].all()
        for base in game.base:
            seen, todo = set(), [tuple(base)]
            while todo:
                y, x = cell = todo.pop()
                if cell not in seen and not walls[cell]:
                    seen.add(cell)
                    todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            assert len(seen) == (~walls).sum()
    assert len({walls.tobytes() for walls in game.walls}) == 50 and 0.1 < game.walls[:, 1:-1, 1:-1].mean() < 0.6


def test_moves():
    """Both teams see the other's base ahead; walls stop; two may share a cell."""
    game = board()
    put(game, p0=(4, 4), p1=(4, 4), p2=(4, 4), p3=(1, 1))
    play(game, (0, AHEAD, 0), (1, LEFT, 0), (2, AHEAD, 0), (3, BACK, 0))
    assert game.pos[0].tolist() == [[3, 4], [4, 3], [5, 4], [1, 1]]  # the last ran into the border
    game.walls[0, 3, 5] = True
    play(game, (0, RIGHT, 0), (1, RIGHT, 0), (2, RIGHT, 0), (3, LEFT, 0))
    assert game.pos[0].tolist() == [[3, 4], [4, 4], [5, 3], [1, 2]]


def test_tag():
    """Within one cell, after all have moved, each opponent there; then the tag rests, and who was hit waits at home."""
    game = board()
    put(game, p0=(5, 4), p1=(7, 1), p2=(2, 4), p3=(4, 5))
    events = play(game, (0, AHEAD, 1), (2, STAY, 1))  # 0 to (4, 4): beside 3, two cells from 2, who misses
    assert events == {0: {"I tagged"}, 1: set(), 2: set(), 3: {"I was tagged"}}
    assert game.pos[0, 3].tolist() == [1, 4] and game.wait[0].tolist() == [0, 0, 0, game.WAIT]
    assert game.board()[0, 6].sum() == 1  # only 2 is seen
    put(game, p2=(3, 3))
    for _ in range(game.COOLDOWN - 1):
        assert play(game, (0, STAY, 1))[2] == set()  # resting
    assert play(game, (0, STAY, 1), (2, STAY, 1)) == {
        0: {"I tagged", "I was tagged"},
        1: set(),
        2: {"I tagged", "I was tagged"},
        3: set(),
    }
    left = game.wait[0, 3]
    for _ in range(left - 1):
        play(game, (3, AHEAD, 1))
    assert game.pos[0, 3].tolist() == [1, 4]
    play(game, (3, AHEAD, 0))
    assert game.pos[0, 3].tolist() == [2, 4]


def test_who_waits_cannot_be_tagged():
    game = board()
    put(game, p0=(2, 4), p2=(1, 4), p3=(7, 7))
    game.wait[:, 2] = 5
    assert play(game, (0, STAY, 1))[0] == set() and game.wait[0, 2] == 4


def test_two_are_tagged_at_once():
    game = board()
    put(game, p0=(4, 4), p1=(7, 7), p2=(3, 3), p3=(5, 4))
    assert play(game, (0, STAY, 1))[0] == {"I tagged"} and (game.wait[0, 2:] == game.WAIT).all()


def test_the_way_of_a_flag():
    """Taken, carried, dropped where the carrier fell, taken again by the mate, dropped, returned: who is told what."""
    game = board()
    put(game, p0=(2, 4), p1=(7, 1), p2=(4, 7), p3=(1, 7))
    events = play(game, (0, AHEAD, 0))
    assert events[0] == {"I picked up"} and events[1] == {"mate picked up"}
    assert events[2] == events[3] == {"opponent picked up"}
    play(game, (0, BACK, 0))
    put(game, p2=(3, 4))
    events = play(game, (0, RIGHT, 0), (2, STAY, 1))
    assert game.flag[0, 1].tolist() == [2, 5] and game.carrier[0, 1] == -1  # where 0 was hit
    assert events[2] == {"I tagged a carrier"} and events[0] == {"I was tagged carrying"}
    put(game, p1=(3, 5), p2=(6, 1))
    assert play(game, (1, AHEAD, 0))[1] == {"I picked up"} and game.carrier[0, 1] == 1
    put(game, p3=(3, 6))
    events = play(game, (1, STAY, 0), (3, STAY, 1))
    assert events[1] == {"I was tagged carrying"} and game.flag[0, 1].tolist() == [2, 5]
    put(game, p3=(2, 6))
    events = play(game, (3, RIGHT, 0))  # turned: to column 5
    assert events[3] == {"I returned"} and events[2] == {"mate returned"} and events[0] == {"opponent returned"}
    assert game.flag[0, 1].tolist() == [1, 4] and game.at_home().all()


def test_capture_needs_the_own_flag():
    """Carried home, it counts only while the own flag lies there; then both are home, and the score is told to all."""
    game = board()
    put(game, p0=(6, 4), p2=(4, 4), p3=(1, 7), p1=(7, 1), f0=(4, 1))
    game.carrier[0, 1] = 0
    assert play(game, (0, BACK, 0))[0] == set() and not game.score.any()  # the own flag lies elsewhere
    put(game, p1=(4, 2))
    events = play(game, (1, LEFT, 0))  # returned: the mate stands at home with the other
    assert events[1] == {"I returned", "mate captured"} and events[0] == {"mate returned", "I captured"}
    assert events[2] == {"opponent returned", "opponent captured"}
    assert game.score[0].tolist() == [1, 0] and game.at_home().all() and not game.carrying().any()


def test_own_players_come_first():
    """A dropped flag with both teams upon it goes home; two of one team: the first takes it."""
    game = board()
    put(game, p0=(4, 4), p1=(4, 4), p2=(4, 4), p3=(1, 7), f1=(4, 4))
    events = play(game)
    assert events[2] == {"I returned"} and game.carrier[0, 1] == -1
    put(game, p2=(1, 7), f1=(4, 4))
    events = play(game)
    assert events[0] == {"I picked up"} and events[1] == {"mate picked up"}


@pytest.mark.parametrize("score,outcome", [((2, 1), 1), ((1, 1), 0.5), ((0, 3), 0)])
def test_end(score, outcome):
    game = board(length=3)
    for t in range(3):
        game.score[:] = score
        _, _, end = game.step(np.zeros((1, 4, 2), int))
        assert (end is None) == (t < 2)
    assert end.tolist() == [outcome]


def test_games_do_not_mix():
    """G games at once are what each would be alone; a seed repeats everything."""
    whole, again = (ftw.CaptureTheFlag(6, 5, size=11) for _ in range(2))
    assert (whole.reset() == again.reset()).all()
    single = [ftw.CaptureTheFlag(1, i, size=11) for i in range(6)]
    for g, game in enumerate(single):
        game.reset()
        game.walls = whole.walls[g : g + 1]
    rng = np.random.default_rng(0)
    for _ in range(100):
        action = rng.integers([5, 2], size=(6, 4, 2))
        obs, events, _ = whole.step(action)
        for x, y in zip(again.step(action)[:2], (obs, events), strict=True):
            assert (x == y).all()
        for g, game in enumerate(single):
            own, own_events, _ = game.step(action[g : g + 1])
            assert (own[0] == obs[g]).all() and (own_events[0] == events[g]).all()
    assert whole.wait.any() and events.shape == (6, 4, 13)


def test_both_teams_see_the_same():
    """Turned by half with the teams exchanged, a board looks as it did: nothing tells the sides apart."""
    game = ftw.CaptureTheFlag(4, 1)
    game.reset()
    for _ in range(60):
        game.step(game.scripted["random"]())
    seen, M = game.observe(), game.size
    game.pos, game.flag = M - 1 - game.pos[:, [2, 3, 0, 1]], M - 1 - game.flag[:, ::-1]
    game.wait, game.rest = game.wait[:, [2, 3, 0, 1]], game.rest[:, [2, 3, 0, 1]]
    game.carrier = np.where(game.carrier < 0, -1, (game.carrier + 2) % 4)[:, ::-1]
    assert (game.observe()[:, [2, 3, 0, 1]] == seen).all()


def test_what_is_seen():
    """By hand: a wall, a mate, an opponent, both flags and bases, in the cells around a player of each team."""
    game = board(view=4)
    put(game, p0=(6, 4), p1=(5, 3), p2=(3, 4), p3=(1, 4))
    game.walls[0, 5, 5] = True
    cells = game.observe()[0, 0][:-3].reshape(7, 9, 9)  # its centre is (4, 4)
    wall, base, other, flag, theirs, mates, opponents = cells
    assert wall[3, 5] and not wall[3, 3] and wall[6, 4]  # the border below
    assert base[5, 4] and base.sum() == 1 and flag[5, 4] and other.sum() == theirs.sum() == 0  # too far ahead
    assert mates[4, 4] and mates[3, 3] and mates.sum() == 2 and opponents[1, 4] and opponents.sum() == 1
    wall, base, other, flag, theirs, mates, opponents = game.observe()[0, 2][:-3].reshape(7, 9, 9)  # turned
    assert base[6, 4] and flag[6, 4] and other[0, 4] and theirs[0, 4]
    assert opponents[1, 4] and opponents[2, 5] and mates[6, 4] and wall[2, 3]


def test_pictures(tmp_path):
    """Of the board, and of what is seen: 84 x 84, lamps, colours of the teams."""
    game = board(view=3, image=True)
    obs = game.observe()
    assert obs.shape == (1, 4, 84, 84, 3) and obs.dtype == np.uint8
    assert (obs[0, 0, :6, 12:18] == 255).all() and (obs[0, 0, :6, :12] == 0).all()  # may tag
    assert (obs[0, 0] == obs[0, 2]).all()  # each team is blue to itself
    frame = game.render(0)
    assert frame.shape == (216, 216, 3) and not (frame[:108] == frame[108:]).all()
    with pytest.raises(ValueError, match="players 9"):
        ftw.CaptureTheFlag(1, 0, players=9)


def test_scripted_players():
    """The greedy player wins against the random one, from both sides; neither is told what it must not know."""
    game = ftw.CaptureTheFlag(40, 2)
    outcome, match = ftw.duel(game, ["greedy", "random"], {})
    assert outcome.mean() > 0.95 and match.step == game.length
    assert ftw.duel(game, ["random", "greedy"], {})[0].mean() < 0.05


def test_greedy_players_share_their_work():
    """One runs home with the flag, the other after the own one; without a carrier both run to that of the others."""
    game = board()
    put(game, p0=(4, 2), p1=(3, 1), f0=(4, 6))
    assert game.greedy()[0, 0, 0] in (AHEAD, RIGHT) and game.greedy()[0, 1, 0] in (AHEAD, RIGHT)
    game.carrier[0, 1], game.flag[0, 1] = 1, [3, 1]
    assert game.greedy()[0, 0, 0] == RIGHT and game.greedy()[0, 1, 0] in (BACK, RIGHT)


def test_best_and_median():
    ratings = np.array([700.0, 500, 900, 600, 800, 999])  # the last: a scripted player's
    assert ftw.best_and_median(list("abcde"), ratings) == ["c", "a"]
    assert ftw.best_and_median(list("abcd"), ratings) == ["c", "d"] and ftw.best_and_median(["a"], ratings) == ["a"] * 2


def test_distances():
    game = ftw.CaptureTheFlag(3, 7)
    game.reset()
    far, M = game.distances(), game.size
    free = ~game.walls.reshape(3, -1)
    assert (far[0] == far[0].T).all() and (far[:, range(M * M), range(M * M)][free] == 0).all()
    home, other = game.base @ [M, 1]
    assert (far[:, home, other] >= M - 3).all() and (far[:, home, other] < 10_000).all()
    assert (far[~free] == 10_000).all()


# --- the agent --------------------------------------------------------------------------------------------------------


def made(games=6, **flags):
    """-> game, an agent with genes of its own, and Args."""
    args = ftw.resolve(ftw.Args(size="debug", device="cpu", population=2, games=games, **flags))
    game = ftw.make_game(args, games, 0)
    torch.manual_seed(0)
    agents = ftw.make_population(args, game, np.random.default_rng(0))
    agents[0].genes[list(ftw.GENES).index("period")] = 5
    return game, agents[0], args


def window(game, agent, T=12):
    match = ftw.Match(game, [agent], np.zeros((game.games, len(game.team)), int), {0: agent.act})
    return match, match.window(T)[0]


@pytest.mark.parametrize("flags", CASES)
def test_unroll_repeats_acting(flags):
    """With its noise and actions, the second window included: log-probabilities of acting, so that rho is 1."""
    game, agent, _ = made(**flags)
    match, first = window(game, agent)
    for batch in first, match.window(12)[0]:
        z, _, _ = agent.unroll(batch)
        logps = [head(z[:, :-1]).log_softmax(-1) for head in agent.policy]
        parts = batch["action"][:, :-1].unbind(-1)
        logp = sum(x.gather(-1, i[..., None])[..., 0] for x, i in zip(logps, parts, strict=True))
        assert torch.allclose(logp, batch["logp"][:, :-1], atol=1e-5)


@pytest.mark.parametrize("flags", [*CASES, IMAGES])
def test_nothing_waits_for_the_host(flags, monkeypatch):
    """Neither an update nor acting; the ticks pose as those of a GPU, as on a CPU the slow unit is left out between."""
    game, agent, _ = made(games=2, **flags)
    match, batch = window(game, agent, 6)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.dtype == torch.bool))
    assert host_waits(lambda: agent.update(batch)) == set()
    inputs = {key: batch[key][:, 0] for key in ("obs", "reward", "ticks")} | match.states[0]
    assert host_waits(lambda: agent.act(inputs)) == set()


@pytest.mark.parametrize("flags", CASES)
def test_one_shape_is_captured_once(flags):
    """Captured goes by names in their order, too: all windows and steps have the same, and none that nobody reads."""
    game, agent, _ = made(**flags)
    shapes, act = [], agent.act
    agent.act = lambda inputs: (shapes.append(list(inputs)), act(inputs))[1]
    match, first = window(game, agent, 6)
    second = match.window(6)[0]
    assert list(first) == list(second) and all(shape == shapes[0] for shape in shapes)
    assert not {"events", "won"} & first.keys()


def test_the_slow_unit_keeps_its_state():
    """Bit by bit between ticks; it changes at each of them, and in each place at its own time."""
    game, agent, _ = made()
    state = {key: torch.randn_like(x) for key, x in agent.initial(6).items()}
    ticks, before = torch.tensor([True, False] * 3), {key: x.clone() for key, x in state.items()}
    _, _, new = agent.step(torch.randn(6, 16), torch.zeros(6), state, torch.randn(6, 8), ticks)
    for key in "slow_h", "slow_c", "prior_mean", "prior_std":
        assert torch.equal(new[key][~ticks], before[key][~ticks])
        assert (new[key][ticks] != before[key][ticks]).any(-1).all()
    _, _, still = agent.step(torch.randn(6, 16), torch.zeros(6), state, torch.randn(6, 8), ticks & False)
    assert torch.equal(still["slow_h"], before["slow_h"]) and (still["h"] != before["h"]).any(-1).all()


def test_between_ticks_the_slow_unit_leaves_the_memory_alone():
    """With a memory that each access writes to: what the slow unit would write between ticks is not there."""
    game, agent, _ = made(memory="dnc")
    state = {key: torch.rand_like(x) for key, x in agent.initial(4).items()}
    given = torch.randn(4, 16), torch.zeros(4), state, torch.randn(4, 8)
    some, none = torch.tensor([True, False] * 2), torch.zeros(4, dtype=torch.bool)
    ticked, still = agent.step(*given, some)[2], agent.step(*given, none)[2]
    for key in ("memory/memory", "memory/usage", "memory/read"):
        assert torch.equal(ticked[key][~some], still[key][~some]) and (ticked[key] != still[key])[some].any()


def test_ticks_come_with_the_period():
    game, agent, _ = made()
    _, batch = window(game, agent, 12)
    assert batch["ticks"][0].nonzero()[:, 0].tolist() == [0, 5, 10]
    losses, _ = agent.losses(batch)
    assert (losses["kl_prior"] != 0)[0].nonzero()[:, 0].tolist() == [0, 5, 10]  # counted at ticks
    assert (losses["kl"] != 0).all()  # and this one everywhere


def test_gradient_into_the_slow_unit():
    """The factor scales what the policy sends there, down to nothing; the KL terms reach it all the same."""
    game, agent, _ = made()
    _, batch = window(game, agent)
    slow, norms = list(agent.core.slow.parameters()), {}
    for factor in 0.0, 0.5, 1.0:
        agent.genes[list(ftw.GENES).index("slow_gradient")] = factor
        z, _, _ = agent.unroll(batch)
        grads = torch.autograd.grad(agent.policy[0](z[:, 4]).sum(), slow, allow_unused=True, materialize_grads=True)
        norms[factor] = sum(g.abs().sum().item() for g in grads)  # before the second tick: one way only
    heads = [agent.core.slow.mean.bias, agent.core.slow.std.bias]  # the prior's mean and deviation are inputs, too
    assert all(g.any() for g, p in zip(grads, slow, strict=True) if any(p is head for head in heads))
    assert norms[0.0] == 0 and norms[0.5] == pytest.approx(norms[1.0] / 2, rel=1e-4) and norms[1.0] > 0
    losses, _ = agent.losses(batch)
    for key in "kl", "kl_prior":
        assert any(
            (g != 0).any()
            for g in torch.autograd.grad(losses[key].sum(), slow, retain_graph=True, allow_unused=True)
            if g is not None
        )


def test_kl_of_the_flat_core():
    """Against N(0, 0.1), by hand."""
    game, agent, _ = made(core="flat")
    _, batch = window(game, agent)
    _, _, out = agent.unroll(batch)
    q, p = torch.distributions.Normal(out["mean"], out["std"]), torch.distributions.Normal(0.0, 0.1)
    losses, _ = agent.losses(batch)
    exact = torch.distributions.kl_divergence(q, p).sum(-1)[:, :-1]
    assert torch.allclose(losses["kl"], exact, rtol=1e-4) and "kl_prior" not in losses


def test_vtrace_by_hand():
    """Two steps with rho 1/2 and 2 (clipped), discount 0.9, values 1, 2, 3, rewards 4 and 5."""
    reward, value = torch.tensor([[0.0, 4, 5]]), torch.tensor([[1.0, 2, 3]])
    target, advantage = ftw.vtrace(
        reward, value, torch.tensor([[0.5, 2.0]]).log(), torch.zeros(1, 2), torch.full((1, 3), 0.9)
    )
    second = 2 + (5 + 0.9 * 3 - 2)
    first = 1 + 0.5 * (4 + 0.9 * 2 - 1) + 0.9 * 0.5 * (second - 2)
    assert torch.allclose(target, torch.tensor([[first, second]]))
    assert torch.allclose(advantage, torch.tensor([[0.5 * (4 + 0.9 * second - 1), 5 + 0.9 * 3 - 2]]))


def test_vtrace_on_policy_is_a_return():
    """rho 1: rewards to the end of the window plus the discounted last value; nothing comes from beyond an end."""
    torch.manual_seed(0)
    reward, value, logp = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 7)
    discount = torch.full((3, 8), 0.9)
    discount[0, -1] = 0
    target, advantage = ftw.vtrace(reward, value, logp, logp, discount)
    total = value[:, -1]
    for t in range(6, -1, -1):
        total = reward[:, t + 1] + discount[:, t + 1] * total
        assert torch.allclose(target[:, t], total, atol=1e-5)
        assert torch.allclose(advantage[:, t], total - value[:, t], atol=1e-5)


def test_a_match_over_is_worth_nothing_more():
    """The last row of a match ends the discount; rows before do not."""
    game, agent, _ = made(env_kwargs='{"length": 10}')
    match, batch = window(game, agent, 6)
    assert not batch["last"].any()
    batch = match.window(6)[0]
    assert batch["last"][:, -1].all() and not batch["last"][:, :-1].any() and batch["last"].shape == (24, 5)
    agent.value[2].bias.data += 100.0  # what follows is worth much, by the network
    losses, _ = agent.losses(batch)
    error = (2 * losses["value"]).sqrt()  # targets fall from 100 * gamma^n to what the last rewards are
    assert (error[:, -1] > 90).all() and (losses["value"][:, 0] > 4000).all()
    open_ended, _ = agent.losses({**batch, "last": batch["last"] & False})
    assert (open_ended["value"] < 200).all()


def test_latents_are_more_than_noise_at_first():
    """What z says about observations, beside what it draws; deviations of 0.05."""
    _, agent, _ = made(games=2)
    unit = agent.core.fast
    assert unit.mean.weight.std() > 2.5 * unit.std.weight.std()
    obs = torch.randint(0, 2, (64, 570)).float()
    state = agent.initial(64)
    _, out, _ = agent.step(agent.embed(obs), torch.zeros(64), state, torch.zeros(64, 8), torch.ones(64).bool())
    assert 0.04 < out["std"].mean() < 0.06


def test_the_core_sees_rewards_squashed():
    """tanh: beyond a few it makes no difference, below 1 it does."""
    _, agent, _ = made()
    given = agent.initial(2), torch.zeros(2, 8), torch.ones(2, dtype=torch.bool)
    z = {r: agent.step(torch.ones(2, 16), torch.full((2,), r), *given)[0] for r in (0.1, 0.5, 50.0, 5000.0)}
    assert torch.equal(z[50.0], z[5000.0]) and (z[0.1] != z[0.5]).all()


def test_rewards():
    """w . points . events; or the outcome alone, for the winners +1, for the losers -1."""
    game, agent, _ = made()
    w = agent.genes[len(ftw.GENES) :]
    assert (w >= ftw.WEIGHTS[0]).all() and (w <= ftw.WEIGHTS[1]).all() and len(w) == 13
    points = dict(zip(game.events, game.points.tolist(), strict=True))  # good and bad for a team
    assert {name for name, x in points.items() if x < 0} == {
        *(f"opponent {x}" for x in ("captured", "picked up", "returned")),
        "I was tagged",
        "I was tagged carrying",
    }
    assert points["I captured"] == points["mate captured"] == -points["opponent captured"] == 3
    events = torch.eye(13)
    assert torch.equal(agent.rewards(events, torch.zeros(13)), w * torch.as_tensor(game.points))
    game, agent, _ = made(reward="outcome", env_kwargs='{"length": 5}')
    match, _ = window(game, agent, 4)
    game.score[:] = [1, 0]
    batch = match.window(4)[0]
    assert (
        batch["reward"][:, -1].unflatten(0, (6, 4)).tolist() == [[1, 1, -1, -1]] * 6
        and not batch["reward"][:, :-1].any()
    )


def test_product_of_choices():
    """Joint log-probability and entropy are those of independent categoricals; frequencies are the probabilities."""
    game, agent, _ = made()
    _, batch = window(game, agent)
    z, _, _ = agent.unroll(batch)
    parts = [torch.distributions.Categorical(logits=head(z[:, :-1])) for head in agent.policy]
    losses, _ = agent.losses(batch)
    assert torch.allclose(-losses["entropy"], sum(p.entropy() for p in parts), atol=1e-5)
    inputs = {
        "obs": batch["obs"][:1, 0].expand(20_000, -1),
        "reward": torch.zeros(20_000),
        "ticks": torch.ones(20_000).bool(),
    }
    inputs |= {f"state/{key}": x for key, x in agent.initial(20_000).items()}
    torch.nn.init.zeros_(agent.core.fast.std.weight)
    torch.nn.init.constant_(agent.core.fast.std.bias, -30.0)  # z hardly varies
    out = agent.act(inputs)
    for i, head in enumerate(agent.policy):
        p = head(out["state/z"][:1]).softmax(-1)[0]
        assert torch.allclose(ftw.onehot(out["action"][:, i], len(p)).mean(0), p, atol=0.02)


def test_losses_have_their_weights():
    """The total is the sum by genes; a gene of 0 leaves a loss out."""
    game, agent, args = made()
    _, batch = window(game, agent)
    z, _, _ = agent.unroll(batch)
    value, discount = agent.value(z)[..., 0].detach(), args.gamma * (1 - batch["last"].float())
    target, _ = ftw.vtrace(batch["reward"], value, batch["logp"][:, :-1], batch["logp"][:, :-1], discount)
    assert torch.allclose(agent.losses(batch)[0]["value"], (target - value[:, :-1]).square() / 2, atol=1e-5)
    stats = agent.update(batch)
    scales = {"policy": 1, "value": 0.5} | {
        key: float(agent.gene(key)) for key in ("entropy", "kl", "kl_prior", "reward_prediction")
    }
    total = sum(scale * float(stats[f"losses/{key}"]) for key, scale in scales.items())
    assert float(stats["losses/total"]) == pytest.approx(total, rel=1e-4)


def test_the_gradient_is_bounded(monkeypatch):
    """Its norm over all parameters, at --clip; shorter ones stay as they are."""
    taken = []
    monkeypatch.setattr(ftw.Agent, "rmsprop", lambda self, grads: taken.append(torch.stack(torch._foreach_norm(grads))))
    for clip in 1e6, 1e-3:
        game, agent, _ = made(clip=clip)
        norm = agent.update(window(game, agent)[1])["stats/grad_norm"]
        assert norm > 0.01 and taken[-1].norm().item() == pytest.approx(min(clip, norm.item()), rel=1e-4)


def test_padded_places_do_not_count():
    """An update with places of weight 0 is the one without them."""
    results = []
    for padded in True, False:
        game, agent, _ = made()
        _, batch = window(game, agent)
        if padded:
            batch = {key: torch.cat([x, x[:1].expand(5, *x.shape[1:])]) for key, x in batch.items()}
            batch["weight"][-5:] = 0
        results.append((agent.update(batch), agent.params))
    (first, params), (second, others) = results
    assert all(float(first[key]) == pytest.approx(float(second[key]), rel=1e-4) for key in first if "losses" in key)
    assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(params, others, strict=True))


def test_rmsprop():
    """By hand, two steps: the first is as long as lr, whatever the gradient."""
    game, agent, args = made()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in agent.params]
    rate, squares = float(agent.gene("learning_rate")), [torch.zeros_like(p) for p in twins]
    torch.manual_seed(1)
    for t in 1, 2:
        grads = [torch.randn_like(p) for p in twins]
        agent.rmsprop(grads)
        for p, g, s in zip(twins, grads, squares, strict=True):
            s.mul_(0.99).add_(0.01 * g * g)
            p.data -= rate * g / (s / (1 - 0.99**t) + args.eps).sqrt()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(agent.params, twins, strict=True))


@pytest.mark.parametrize("flags", [*CASES, dict(env_kwargs='{"image": true, "view": 3}')])
def test_losses_fall_on_one_window(flags):
    """Value and auxiliary losses of one batch, learned again and again; every parameter has a gradient."""
    game, agent, _ = made(games=2, **flags)
    agent.genes[0] = 1e-3
    _, batch = window(game, agent, 9)
    batch["reward"] = torch.randn_like(batch["reward"])
    first = agent.update(batch)
    for _ in range(30):
        last = agent.update(batch)
    for key in "value", "reward_prediction", "pixel_control":
        if f"losses/{key}" in first:
            assert last[f"losses/{key}"] < 0.8 * first[f"losses/{key}"], key
    losses, _ = agent.losses(batch)
    grads = torch.autograd.grad(sum(x.sum() for x in losses.values()), agent.params, allow_unused=True)
    assert all(g is not None for g in grads)


def test_reward_prediction():
    """Rows with a reward and rows without weigh half each; three embeddings, the last before the reward."""
    _, agent, _ = made()
    torch.manual_seed(2)
    embed, reward = torch.randn(2, 9, 16), torch.zeros(2, 9)
    reward[0, 4], reward[1, 8], reward[1, 1] = 1.0, -2.0, 5.0  # the last: too early to be predicted
    loss = agent.reward_prediction(embed, reward, torch.ones(2, 1))
    assert loss.shape == (2, 8) and (loss[:, :2] == 0).all()
    logp = lambda b, t: agent.sign_of_reward(embed[b, t - 3 : t].flatten()).log_softmax(-1)
    none = [-logp(b, t)[0] for b in (0, 1) for t in range(3, 9) if not reward[b, t]]
    exact = (-logp(0, 4)[1] - logp(1, 8)[2]) / 4 + sum(none) / len(none) / 2
    assert loss[:, 2:].mean().item() == pytest.approx(exact.item(), rel=1e-4)


def test_pixel_control():
    """Changes of 4x4 cells of the middle; targets by hand for a network that says nothing."""
    _, agent, _ = made(env_kwargs='{"image": true, "view": 3}')
    image = torch.zeros(1, 4, 84, 84, 3, dtype=torch.uint8)
    image[0, 1, 2:6, 2:6] = 255
    image[0, 3, 82:] = 255  # outside of the middle 80
    change = ftw.pixel_change(image)
    assert change.shape == (1, 3, 20, 20) and change[0, :, 0, 0].tolist() == [1, 1, 0] and change.sum() == 2
    for p in agent.pixels.parameters():
        torch.nn.init.zeros_(p)
    batch = {
        "obs": image,
        "last": torch.zeros(1, 4, dtype=torch.bool),
        "action": torch.zeros(1, 4, 2, dtype=torch.int64),
    }
    loss = agent.pixel_control(torch.zeros(1, 4, agent.core.size), batch)
    exact = torch.tensor([1.9**2, 1.0, 0]) / 400 / 2 * 2  # one cell of 400, two parts of an action
    assert torch.allclose(loss[0], exact)
    agent.pixels.heads[0].bias.data += 5.0  # now it says 5 everywhere
    for over, target in (False, 0.9 * 5.0), (True, 0.0):  # of the last step: nothing comes after an end
        batch["last"][:, 3] = over
        loss = agent.pixel_control(torch.zeros(1, 4, agent.core.size), batch)
        assert loss[0, 2].item() == pytest.approx((target - 5.0) ** 2)


def test_memory_of_merlin():
    """Each z in a row of its own, in turn; what is stored is found by its own content, and carries no gradient."""
    _, agent, args = made()
    memory = {key: torch.zeros(2, *shape) for key, shape in agent.core.memory.shapes.items()}
    zs = [torch.randn(2, 8, requires_grad=True) for _ in range(args.rows + 2)]
    for z in zs:
        memory = agent.core.memory.store(z, memory)
    assert torch.equal(memory["memory"][:, 0], zs[args.rows]) and torch.equal(memory["memory"][:, 2], zs[2])
    assert not memory["memory"].requires_grad
    found, _ = ftw.read(memory["memory"], zs[5][:, None], torch.full((2, 1), 50.0))
    assert torch.allclose(found[:, 0], zs[5], atol=0.1)


def test_dnc():
    """Free rows are written first; what was written is found by content, and what came next by the order of writing."""
    args = ftw.resolve(ftw.Args(size="debug", memory="dnc", rows=6, row_size=4, reads=1))
    dnc = ftw.DNC(3, args)
    names = ["keys", "strengths", "key", "strength", "erase", "content", "free", "allocate", "write", "modes"]

    def say(memory, **what):
        """Access with an interface vector made by hand."""
        values = dict(
            keys=[0.0] * 4, strengths=[0.0], key=[0.0] * 4, strength=[0.0], erase=[-30.0] * 4, content=[0.0] * 4
        )
        values |= dict(free=[-30.0], allocate=[30.0], write=[-30.0], modes=[0.0, 30.0, 0.0]) | what
        vector = torch.tensor([x for name in names for x in values[name]])
        dnc.interface.weight.data.zero_()
        dnc.interface.bias.data.copy_(vector)
        return dnc.access(torch.zeros(1, 3), memory)

    memory = {key: torch.zeros(1, *shape) for key, shape in dnc.shapes.items()}
    rows = torch.eye(4)[:3].tolist()
    for row in rows:
        _, memory = say(memory, write=[30.0], content=row)
    assert memory["memory"].abs().sum(-1).gt(0.5).sum() == 3 and torch.allclose(
        memory["usage"].sum(), torch.tensor(2.0), atol=0.1
    )
    by_content = dict(key=rows[0], strength=[40.0], allocate=[-30.0], write=[30.0], content=[0.0, 0.0, 0.0, 7.0])
    for erase, left in (30.0, [0.0, 0.0, 0.0, 7.0]), (-30.0, [1.0, 0.0, 0.0, 7.0]):  # written over, or added to
        changed = say(memory, **by_content, erase=[erase] * 4)[1]["memory"]
        assert (changed - torch.tensor(left)).abs().max(-1).values.min() < 0.01
    found, memory = say(memory, keys=rows[0], strengths=[40.0])
    assert torch.allclose(found, torch.tensor([rows[0]]), atol=0.05)
    found, later = say(memory, modes=[0.0, 0.0, 30.0])  # one way along the order, and the other
    back, _ = say(later, modes=[30.0, 0.0, 0.0])
    assert torch.allclose(found, torch.tensor([rows[1]]), atol=0.05) or torch.allclose(
        back, torch.tensor([rows[0]]), atol=0.05
    )


def test_links_of_the_dnc():
    """No row comes after itself; what goes out of a row, and into it, is 1 at most."""
    _, agent, _ = made(memory="dnc", games=3)
    dnc, memory = agent.core.memory, {key: torch.zeros(3, *shape) for key, shape in agent.core.memory.shapes.items()}
    torch.manual_seed(0)
    for _ in range(20):
        _, memory = dnc.access(3 * torch.randn(3, 16), memory)
    link = memory["link"]
    assert (link.diagonal(dim1=1, dim2=2) == 0).all() and link.max() > 0.01 and link.min() >= -1e-6
    assert (link.sum(1) <= 1 + 1e-5).all() and (link.sum(2) <= 1 + 1e-5).all()
    assert (memory["order"].sum(1) <= 1 + 1e-5).all() and (memory["usage"] <= 1 + 1e-5).all()
    dnc.interface.weight.data.zero_()
    dnc.interface.bias.data.zero_()
    dnc.interface.bias.data[sum(dnc.parts[:8])] = -100  # nothing is written: what was written last stays so
    later = dnc.access(torch.zeros(3, 16), memory)[1]
    assert memory["order"].max() > 0.1 and torch.allclose(later["order"], memory["order"], atol=1e-6)
    assert torch.allclose(later["link"], link, atol=1e-6) and torch.allclose(later["memory"], memory["memory"])


# --- the population ---------------------------------------------------------------------------------------------------


def test_elo():
    """Zero-sum; the winner of an even match gets half a step; who was to win gets less, and loses by a draw."""
    ratings = np.array([1000.0, 1000, 1200, 800])
    new = ftw.elo(ratings, np.array([[[0], [1]]]), np.array([1.0]), 16)
    assert new.tolist() == [1008, 992, 1200, 800]
    for outcome in 0, 0.5, 1:
        new = ftw.elo(ratings, np.array([[[0, 2], [1, 3]], [[0, 0], [3, 1]]]), np.array([outcome, 1 - outcome]), 16)
        assert new.sum() == pytest.approx(ratings.sum())
    favourite = ftw.elo(ratings, np.array([[[2], [3]]]), np.array([1.0]), 16)[2] - 1200
    assert 0 < favourite < 2 and ftw.elo(ratings, np.array([[[2], [3]]]), np.array([0.5]), 16)[2] < 1200
    assert ftw.win_probability(1400, 1000) == pytest.approx(10 / 11)


def test_matches():
    """Nobody twice where there are enough; all about as often, even matches more often; alone, only oneself."""
    rng = np.random.default_rng(0)
    who = ftw.make_matches(np.array([1000.0] * 4), 200, 4, rng)
    assert (np.sort(who, 1) == [0, 1, 2, 3]).all() and len(np.unique(who[:, 0])) == 4
    ratings = np.array([1000.0, 1010, 1600, 1620, 1630])
    pairs = np.zeros((5, 5))
    for a, b in ftw.make_matches(ratings, 3000, 2, rng):
        assert a != b
        pairs[a, b] += 1
        pairs[b, a] += 1
    assert pairs[0, 1] > 5 * pairs[0, 2:].sum() and pairs[2, 3] > 5 * pairs[2, :2].sum()
    assert (ftw.make_matches(np.array([1000.0]), 5, 4, rng) == 0).all()
    assert all(set(row) == {0, 1} for row in ftw.make_matches(np.array([1000.0, 900]), 50, 4, rng).tolist())


def test_first_genes_and_mutations():
    """First genes spread over their ranges; a mutation is within its share, of the same sign; tau in 5 to 20."""
    rng = np.random.default_rng(0)
    genes = np.stack([ftw.first_genes(13, rng) for _ in range(2000)])
    low, high = np.array([*ftw.GENES.values(), *[ftw.WEIGHTS] * 13]).T
    assert (genes >= low * 0.999).all() and (genes <= high * 1.001).all() and genes.shape == (2000, 21)
    middle = ftw.first_genes(13, rng, middle=True)
    share = (genes < middle).mean(0)
    assert (abs(np.delete(share, 7) - 0.5) < 0.05).all() and set(genes[:, 7]) == set(range(5, 21))
    args = ftw.resolve(ftw.Args(size="debug", mutation_chance=0.3, mutation=0.2))
    new = np.stack([ftw.mutate(middle, rng, args) for _ in range(2000)])
    factor = np.delete(new / middle, 7, 1)
    assert (factor >= 0.8).all() and (factor <= 1.2).all() and abs((factor != 1).mean() - 0.3) < 0.02
    assert set(new[:, 7]) == set(range(5, 21)) and abs((new[:, 7] == 10).mean() - 0.7 - 0.3 / 16) < 0.03
    fixed = dataclasses.replace(args, reward="events", mutation_chance=1.0)
    assert (ftw.mutate(middle, rng, fixed)[8:] == middle[8:]).all()


def test_copies():
    """Weights, genes and the state of the optimiser; afterwards each goes its own way."""
    game, agent, args = made()
    other = ftw.make_population(args, game, np.random.default_rng(5))[1]
    _, batch = window(game, agent)
    agent.update(batch)
    other.copy(agent)
    assert same(other.state_dict(), agent.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(other.squares, agent.squares, strict=True)) and other.squares[0].any()
    agent.update(batch)
    assert any((x != y).any() for x, y in zip(other.params, agent.params, strict=True))


def test_evolution_copies_the_better(tmp_path, monkeypatch):
    """In a run: who would lose to any other becomes a copy, with the rating of the other and mutated genes; who would
    not, stays.
    """
    monkeypatch.setattr(ftw, "elo", lambda ratings, *rest: np.array([1100.0, 1000, 1095, 500, 900]))
    copied, copy = [], ftw.Agent.copy
    monkeypatch.setattr(ftw.Agent, "copy", lambda self, other: (copied.append(self), copy(self, other)))
    saved = ftw.load(ftw.train(short(tmp_path, total_games=16, games=4, evolve_every=1))["run_dir"])
    assert len(copied) == 4 and len({id(agent) for agent in copied}) == 1  # in each batch, after it has learned
    assert saved["now"]["ratings"][1] in (1095, 1100)  # a gap of 100: 64% for one, 76% for a team of two
    first, mine, third = (part["agent"] for part in saved["agents"])
    donor = first if saved["now"]["ratings"][1] == 1100 else third
    assert same({k: x for k, x in mine.items() if k != "genes"}, {k: x for k, x in donor.items() if k != "genes"})
    assert (mine["genes"] != donor["genes"]).any() and (mine["genes"] / donor["genes"] - 1).abs().median() < 0.21


def test_who_could_evolve_waits_again(tmp_path):
    """Matches since then count from 0, whether it was copied or not."""
    saved = ftw.load(ftw.train(short(tmp_path, total_games=20, games=4, evolve_every=6))["run_dir"])
    assert 0 < max(saved["now"]["since"]) < 6
    saved = ftw.load(ftw.train(short(tmp_path / "six", total_games=1, games=1, population=6))["run_dir"])
    assert sorted(saved["now"]["since"]) == [0, 0, 1, 1, 1, 1]  # who did not play counts nothing


def test_presets_are_for_each_agent():
    """Twice as many agents play twice as many matches, twice as many at once; an explicit number counts all."""
    small = {p: ftw.resolve(ftw.Args(population=p, reward="events")) for p in (1, 4, 8)}
    assert [(small[p].games, small[p].total_games) for p in small] == [(64, 24_000), (256, 96_000), (512, 192_000)]
    paper = ftw.resolve(ftw.Args(size="paper", games=7))
    assert (paper.games, paper.total_games, paper.evolve_every) == (7, 30 * 450_000, 1_000)


def test_a_batch_is_worth_as_much_whatever_its_size(tmp_path, monkeypatch):
    """--elo-step is of all matches that end at once, as they all meet the same ratings."""
    steps, elo = [], ftw.elo
    monkeypatch.setattr(ftw, "elo", lambda *given: (steps.append(given[-1]), elo(*given))[1])
    ftw.train(short(tmp_path, games=2, total_games=2, rate_every=1, elo_step=6.0))
    assert set(steps) == {3.0} and len(steps) == 1 + 3 * 2  # of training, and of three agents with two scripted ones


def test_matches_of_training_are_rated(tmp_path, monkeypatch):
    """Once for each batch, by its teams and its outcome; rating matches come beside that."""
    rated, elo = [], ftw.elo
    monkeypatch.setattr(ftw, "elo", lambda *given: (rated.append(given), elo(*given))[1])
    ftw.train(short(tmp_path, rate_every=10**6))
    assert [(teams.shape, outcome.shape) for _, teams, outcome, _ in rated] == [((4, 2, 2), (4,))] * 3
    rated.clear()
    ftw.train(short(tmp_path / "more", rate_every=3))
    assert len(rated) == 3 + 3 * 2  # three agents against two scripted players
    monkeypatch.setattr(ftw, "elo", lambda ratings, *rest: ratings + 10)
    for rate_every in (1, 10**6):  # pinned after rating matches, and after those of training alone
        flags = dict(rate_every=rate_every, total_games=4)
        saved = ftw.load(ftw.train(short(tmp_path / f"pinned{rate_every}", **flags))["run_dir"])
        assert saved["now"]["ratings"][3] == 500 and saved["now"]["ratings"][4] > 500  # random, greedy


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_matches_against_the_random_player(tmp_path, monkeypatch, share):
    """In --random-share of the matches of training one team, of either side, is the random player's, which others learn
    from and which is rated; in the rest there are agents alone.
    """
    seen, match = [], ftw.Match
    watched = lambda game, players, who, act: (seen.append((players, who, act)), match(game, players, who, act))[1]
    monkeypatch.setattr(ftw, "Match", watched)
    flags = dict(random_share=share, games=40, total_games=40, rate_every=10**6, population=3)
    ftw.train(short(tmp_path, **flags))
    players, who, act = seen[0]
    assert players[3:] == ["random", "greedy"] and set(act) == {0, 1, 2}
    random_player = who.reshape(40, 2, 2) == 3  # teams stand in order
    whole = random_player.all(-1)  # (matches, team)
    assert (random_player.any(-1) == whole).all() and not whole.all(1).any() and who.max() <= 3
    assert whole.any(1).mean() == share if share in (0, 1) else 0.25 < whole.any(1).mean() < 0.75
    assert share == 0 or whole[:, 0].any() and whole[:, 1].any()


def test_acting_stores_z():
    """What was drawn is the newest row of the memory that the next step reads."""
    game, agent, _ = made()
    match, _ = window(game, agent, 3)
    state = match.states[0]
    assert torch.equal(state["state/memory/memory"][:, 2], state["state/z"])
    assert not state["state/memory/memory"][:, 3:].any()


# --- runs -------------------------------------------------------------------------------------------------------------


def short(root, **flags):
    flags = dict(env_kwargs='{"length": 16}', games=4, total_games=12) | flags
    return ftw.Args(size="debug", device="cpu", run_root=str(root), **flags)


def test_run(tmp_path, capsys):
    """A whole run: counts, progress, checkpoint of the population, a match to look at, the table of --eval."""
    result = ftw.train(short(tmp_path, log_every=0))
    assert result["games"] == 12 and result["batches"] == 3 and result["steps"] == 12 * 16 * 4
    assert result["updates"] == 3 * 2 * 3 and np.isfinite(result["losses/total"])  # batches, windows, agents
    out = capsys.readouterr().out
    assert out.count("Elo best") == 3 and f"--resume {result['run_dir']}" in out
    saved = ftw.load(result["run_dir"])
    assert len(saved["agents"]) == 3 and saved["source"] == ftw.SOURCE and saved["now"]["ratings"][3] == 500
    assert gif(f"{result['run_dir']}/match.gif")[1] == (216, 216)
    table = ftw.train(ftw.Args(eval=result["run_dir"], eval_games=8, device="cpu"))["table"]
    assert set(table) == {"random", "greedy", "median agent"} and all(
        sum(x) == pytest.approx(1) for x in table.values()
    )
    assert "greedy" in capsys.readouterr().out
    ftw_plot.main(str(tmp_path / "curve"), result["run_dir"], f"twice={result['run_dir']},{result['run_dir']}")
    lines = [line.split(",") for line in (tmp_path / "curve.csv").read_text().splitlines()]
    assert [line[2:4] for line in lines] == [["agents", "games"], *[["3", g] for g in ("4", "8", "12")] * 3]
    assert (tmp_path / "curve.png").exists()
    assert [line[0] for line in lines[-6:]] == ["twice"] * 6


def test_plotted_means():
    """The moving mean of what is known; runs of different lengths meet on common numbers of matches for
    each agent.
    """
    values = np.array([np.nan, 1.0, np.nan, 3.0, *[5.0] * 20])
    assert np.isnan(ftw_plot.smooth(values)[0]) and ftw_plot.smooth(values)[[1, 2, 3, -1]].tolist() == [1, 1, 2, 5]
    runs = [[{"agents": p, "games": p * g, "best": float(g)} for g in range(1, m)] for p, m in ((4, 11), (1, 21))]
    games, best = ftw_plot.together(runs, "best")
    assert games[-1] == 10 and best.shape == (2, 200) and np.allclose(best[:, -1], 10)


def test_shape_comments(tmp_path):
    """Every trailing shape comment holds in real runs, with sizes chosen to be told apart, and each one is reached."""
    sizes, missed = dict(stoch=6, units=24, rows=11, row_size=5, reads=2, games=3, window=9, rate_every=1), []
    for flags in dict(), dict(memory="dnc"), IMAGES:
        args = short(tmp_path, total_games=3, population=3, **sizes, **flags)
        check = shape_comments.check(ftw.__file__, lambda args=args: ftw.train(args), {"Z": 6, "U": 24, "E": 24})
        assert check[0] == [] and len(check[1]) > 20
        missed.append(check[2])
    assert set.intersection(*missed) == set()


@pytest.mark.parametrize("flags", [dict(), dict(env_id="guess2:make", env_kwargs="{}", rate_every=1)])
def test_resume_is_exact(flags, tmp_path, monkeypatch):
    """A run in two parts is the run in one, bit for bit: weights, genes, ratings, boards; with a game of one's own the
    numbers of its random player, too, as ratings say.
    """
    (tmp_path / "guess2.py").write_text(OTHER)
    monkeypatch.chdir(tmp_path)
    whole = ftw.load(ftw.train(short(tmp_path / "a", total_games=24, **flags))["run_dir"])
    first = ftw.train(short(tmp_path / "b", total_games=12, **flags))
    second = ftw.load(ftw.train(ftw.Args(resume=first["run_dir"], total_games=24, device="cpu"))["run_dir"])
    assert whole["now"] == second["now"] and whole["states"]["rng"] == second["states"]["rng"]
    assert whole["states"]["game"] == second["states"]["game"]
    for a, b in zip(whole["agents"], second["agents"], strict=True):
        assert same(a["agent"], b["agent"])
        assert all(torch.equal(x, y) for x, y in zip(a["squares"], b["squares"], strict=True))


@pytest.mark.parametrize(
    "flags",
    [
        dict(population=1, reward="outcome"),
        dict(population=1, reward="events"),
        dict(population=5),
        dict(players=1, population=3),
        dict(core="lstm"),
        dict(memory="dnc", map=11),
    ],
)
def test_kinds_of_runs(flags, tmp_path):
    result = ftw.train(short(tmp_path, **flags))
    assert result["games"] == 12 and np.isfinite(result["losses/total"])


def test_an_image_run(tmp_path):
    kwargs = json.dumps({"image": True, "view": 3, "length": 8})
    result = ftw.train(short(tmp_path, env_kwargs=kwargs, total_games=4, games=2))
    assert np.isfinite(result["losses/pixel_control"])


OTHER = """
import numpy as np
from gymnasium import spaces

class Guess:
    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.MultiDiscrete([3])
    team, points, events = np.array([0, 1]), np.float32([1, -1]), ["right", "wrong"]

    def __init__(self, games, seed):
        self.games = games

    def reset(self):
        self.count = 0
        return np.zeros((self.games, 2, 2), np.float32)

    def step(self, action):
        self.count += 1
        right = action[..., 0] == 1
        outcome = 0.5 + 0.5 * np.sign(right[:, 0] * 1.0 - right[:, 1]) if self.count == 4 else None
        return np.zeros((self.games, 2, 2), np.float32), np.stack([right, ~right], -1).astype(np.float32), outcome

def make(games, seed):
    return Guess(games, seed)
"""


def test_a_game_of_ones_own(tmp_path, monkeypatch):
    """module:make, with the interface of CaptureTheFlag and nothing more: it trains, and is evaluated."""
    (tmp_path / "guess.py").write_text(OTHER)
    monkeypatch.chdir(tmp_path)
    result = ftw.train(short(tmp_path / "runs", env_id="guess:make", env_kwargs="{}"))
    assert np.isfinite(result["losses/total"])
    table = ftw.train(ftw.Args(eval=result["run_dir"], eval_games=8, device="cpu"))["table"]
    assert set(table) == {"random", "median agent"}


@pytest.mark.parametrize("scripted,names", [({}, ["random"]), ({"bot": "act"}, ["random", "bot"])])
def test_the_random_player_is_there_in_any_game(scripted, names, tmp_path, monkeypatch):
    """First among the scripted ones, whatever others a game brings: training and ratings take it from there."""
    (tmp_path / "bots.py").write_text(OTHER.replace("    def reset", f"    scripted = {scripted!r}\n\n    def reset"))
    monkeypatch.chdir(tmp_path)
    game = ftw.make_game(ftw.resolve(ftw.Args(size="debug", env_id="bots:make")), 50, 0)
    sys.modules.pop("bots")
    assert list(game.scripted) == names
    assert set(np.unique(game.scripted["random"]())) == {0, 1, 2} and game.scripted["random"]().shape == (50, 2, 1)


@pytest.mark.parametrize(
    "flags,text",
    [
        (dict(map=10), "size 10"),
        (dict(players=0), "--players 0"),
        (dict(players=5), "players 5"),
        (dict(env_kwargs="[1"), "--env-kwargs [1"),
        (dict(env_kwargs='{"speed": 1}'), "speed"),
        (dict(env_kwargs='{"image": true}'), "view"),
        (dict(env_kwargs='{"length": 0}'), "length 0"),
        (dict(env_id="nothing:make"), "--env-id nothing:make"),
        (dict(gamma=1.5), "--gamma 1.5"),
        (dict(random_share=-0.1), "--random-share -0.1: allowed: 0 or more, to 1"),
        (dict(population=1), "--reward evolved"),
        (dict(device="gpu"), "--device gpu"),
        (dict(eval="nothing.pt"), "nothing.pt"),
        (dict(resume="nothing"), "nothing"),
    ],
)
def test_bad_input(flags, text, tmp_path, capsys):
    """One line, exit code 2, no run folder."""
    with pytest.raises(SystemExit) as stop:
        ftw.train(ftw.Args(**{"size": "debug", "device": "cpu", "run_root": str(tmp_path), **flags}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and text in error and "allowed" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """The run stops, names the loss, and keeps its last checkpoint."""
    real, calls = ftw.Agent.losses, []

    def broken(self, batch):
        calls.append(1)
        losses, stats = real(self, batch)
        return ({**losses, "value": losses["value"] * float("nan")} if len(calls) > 25 else losses), stats

    monkeypatch.setattr(ftw.Agent, "losses", broken)
    with pytest.raises(RuntimeError, match="losses/value is nan"):
        ftw.train(short(tmp_path, total_games=40, checkpoint_every=4))
    (run,) = tmp_path.iterdir()
    assert all(torch.isfinite(x).all() for part in ftw.load(run)["agents"] for x in part["agent"].values())


def test_a_picture_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(ftw, "save_gif", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="match.gif was not made"):
        assert ftw.train(short(tmp_path))["games"] == 12


def test_a_game_that_cannot_be_made_for_one_match(tmp_path, monkeypatch):
    """Costs the picture, not the run."""
    one = "        if games == 1:\n            raise ValueError('two at least')\n        self.games"
    (tmp_path / "pairs.py").write_text(OTHER.replace("        self.games", one))
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="match.gif was not made"):
        assert ftw.train(short(tmp_path / "runs", env_id="pairs:make", env_kwargs="{}"))["games"] == 12


def test_a_game_that_shows_no_box(tmp_path, monkeypatch, capsys):
    box = "spaces.Box(-1, 1, (2,), np.float32)"
    (tmp_path / "dicts.py").write_text(OTHER.replace(box, f"spaces.Dict(a={box})"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ftw.train(short(tmp_path / "runs", env_id="dicts:make", env_kwargs="{}"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "not a Box" in error and error.count("\n") == 1


def test_a_match_of_half_a_step(tmp_path):
    """A length that is no whole number is the next one, not a match without an end."""
    assert ftw.train(short(tmp_path, env_kwargs='{"length": 8.5}', total_games=4))["steps"] == 4 * 4 * 9


def test_pictures_can_be_told_apart(tmp_path):
    """A frame as a file: both teams, both flags."""
    Image.fromarray(board().render(0)).save(tmp_path / "frame.png")
    colours = {tuple(x) for x in np.asarray(Image.open(tmp_path / "frame.png")).reshape(-1, 3).tolist()}
    assert {(60, 110, 255), (255, 70, 60), (255, 255, 255), (110, 110, 110)} <= colours


# --- Melting Pot, without its simulator -------------------------------------------------------------------------------


class Substrate:
    """Four players; what it reports in each step is written here, as the simulator writes it."""

    reported = [
        [("flag_picked_up", [b"dict", b"player_index", np.array(3.0), b"team", b"red"])],
        [("zap", [b"dict", b"source", np.array(2.0), b"target", np.array(1.0)])],
        [
            ("zap", [b"dict", b"source", np.array(4.0), b"target", np.array(3.0)]),
            ("zapped_flag_carrier", [b"dict", b"player_index", np.array(4.0)]),
            ("flag_returned", [b"dict", b"player_index", np.array(2.0), b"team", b"blue"]),
        ],
        [("flag_captured", [b"dict", b"player_index", np.array(2.0), b"team", b"blue"])],
    ]

    def reset(self):
        self.count = 0
        return self.row()

    def step(self, action):
        assert len(action) == 4 and all(type(x) is int and 0 <= x < 9 for x in action)
        self.count += 1
        return self.row()

    def row(self):
        seen = [{"RGB": np.full((88, 88, 3), 10 * self.count + p, np.uint8)} for p in range(4)]
        return types.SimpleNamespace(observation=seen, last=lambda: self.count == len(self.reported))

    def events(self):
        return self.reported[self.count - 1]

    def observation(self):
        return [{"WORLD.RGB": np.zeros((184, 184, 3), np.uint8)}]


@pytest.fixture
def melting_pot(monkeypatch):
    substrate = types.ModuleType("substrate")
    substrate.get_config, substrate.build_from_config = lambda name: name, lambda config, roles: Substrate()
    package = types.ModuleType("meltingpot")
    package.substrate = substrate
    for name, module in {"meltingpot": package, "meltingpot.substrate": substrate}.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_melting_pot_events(melting_pot):
    """Each event for each side; a carrier that is tagged counts as such and not twice; the winner."""
    import melting_pot as wrapper

    game = wrapper.make(2, 0)
    assert game.events == ftw.EVENTS and np.array_equal(game.points, ftw.CaptureTheFlag.points)
    assert game.reset().shape == (2, 4, 88, 88, 3) and game.team.tolist() == [0, 1, 0, 1]
    told, outcome = [], None
    while outcome is None:
        obs, events, outcome = game.step(np.full((2, 4, 1), 8))
        assert (events[0] == events[1]).all()
        told.append([{name for name, x in zip(game.events, row, strict=True) if x == 1} for row in events[0]])
        assert set(np.unique(events)) <= {0, 1}
    assert told[0] == [{"mate picked up"}, {"opponent picked up"}, {"I picked up"}, {"opponent picked up"}]
    assert told[1] == [{"I was tagged"}, {"I tagged"}, set(), set()]
    returned = [{"opponent returned"}, {"I returned"}, {"opponent returned"}, {"mate returned"}]
    returned[2], returned[3] = returned[2] | {"I was tagged carrying"}, returned[3] | {"I tagged a carrier"}
    assert told[2] == returned
    assert told[3] == [{"opponent captured"}, {"I captured"}, {"opponent captured"}, {"mate captured"}]
    assert outcome.tolist() == [0, 0] and obs[1, 3, 0, 0, 0] == 43


def test_melting_pot_trains(tmp_path, melting_pot):
    flags = dict(env_id="melting_pot:make", games=2, total_games=4, population=2, window=4)
    result = ftw.train(ftw.Args(size="debug", device="cpu", run_root=str(tmp_path), **flags))
    assert np.isfinite(result["losses/pixel_control"])
