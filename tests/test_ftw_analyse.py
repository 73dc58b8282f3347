# SPDX-License-Identifier: MIT
"""results/ftw_analyse.py: linear readings where the answer is known, facts and habits on a board set up by hand; the
cases of results/bench.py that time ftw.py.
"""

import bench
import ftw_analyse
import numpy as np
import pytest

import ftw


def test_area():
    """By counting pairs, ties half; 1 and 0 where the order is perfect."""
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, 80), rng.random(80) < 0.3
    pairs = scores[truth][:, None] - scores[~truth]
    assert np.isclose(ftw_analyse.area(scores, truth), (pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert ftw_analyse.area(truth * 1.0, truth) == 1 and ftw_analyse.area(truth * -1.0, truth) == 0


def test_probe():
    """What lies in x linearly is found, what does not is not, on matches that it was not fitted to; rare facts: nan."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 40, 6)).astype(np.float32)
    truth = x @ np.array([1, -2, 0, 0, 0.5, 0]) > 1
    assert ftw_analyse.probe(x, truth) > 0.99
    assert abs(ftw_analyse.probe(x, x[..., 0] * x[..., 1] > 0) - 0.5) < 0.08
    assert abs(ftw_analyse.probe(x, rng.random((50, 40)) < 0.3) - 0.5) < 0.08
    assert np.isnan(ftw_analyse.probe(x, np.zeros((50, 40), bool)))


def test_facts_and_habits():
    """Players 0 and 1 are mates below, 2 and 3 above; 1 carries the flag of 2 and 3."""
    game = ftw.CaptureTheFlag(1, 0)
    game.reset()
    game.pos[0] = [[5, 2], [6, 2], [4, 3], [1, 4]]
    game.carrier[0, 1], game.flag[0, 1], game.flag[0, 0] = 1, [6, 2], [4, 7]
    told = {name: x[0].tolist() for name, x in {**ftw_analyse.facts(game), **ftw_analyse.habits(game)}.items()}
    assert told["I carry the flag"] == told["carrying"] == [False, True, False, False]
    assert told["my mate carries it"] == [True, False, False, False]
    assert told["an opponent is near"] == [True, True, True, False]
    assert told["our flag is carried away"] == [False, False, True, True]
    assert told["our flag is carried away, out of sight"] == [False, False, False, True]
    assert told["our flag lies about"] == [True, True, False, False]
    assert told["their flag lies at their base"] == [False, False, False, False]
    assert told["beside a mate"] == [True, True, False, False]
    assert told["at the own base"] == [True, False, False, True]
    assert told["at the opponents' base"] == [False] * 4
    game.wait[0, [1, 2]] = 5  # at home and unseen
    told = {name: x[0].tolist() for name, x in {**ftw_analyse.facts(game), **ftw_analyse.habits(game)}.items()}
    assert told["an opponent is near"] == [False, False, True, False] and not any(told["beside a mate"][:1])


def test_ways():
    """Straight on, as many steps as rows between the bases; round a wall, two more."""
    game = ftw.CaptureTheFlag(2, 0)
    game.reset()
    game.walls[:] = True
    game.walls[:, 1:-1, 1:-1] = False
    game.walls[1, 4, :5] = True  # the middle of its row and all that is left of it
    assert ftw_analyse.ways(game).tolist() == [6, 8]


@pytest.mark.parametrize("core", ["ftw", "flat", "lstm"])
def test_analysis(tmp_path, capsys, core):
    """From a run folder to all three tables."""
    flags = dict(size="debug", device="cpu", total_games=4, core=core, run_root=str(tmp_path))
    run = ftw.train(ftw.Args(**flags))["run_dir"]
    capsys.readouterr()
    ftw_analyse.main(ftw_analyse.Args(run, games=4, device="cpu"))
    told = capsys.readouterr().out.splitlines()
    sources = {
        "ftw": ["observation", "z", "h", "slow_h"],
        "flat": ["observation", "z", "h"],
        "lstm": ["observation", "h"],
    }
    assert told[0].split()[-len(sources[core]) - 1 :] == ["share", *sources[core]] and len(told) == 18
    assert told[1].startswith("I carry the flag") and told[13].startswith("carrying") and "%" in told[13]
    boards = [sum(int(x.split(" of ")[1].split()[0]) for x in line.split("%")[1:]) for line in told[16:]]
    assert [line.split()[0] for line in told[16:]] == ["random", "greedy"] and boards == [4, 4]


@pytest.mark.parametrize("population", [0, 1, 3])
def test_bench(population):
    """Steps per second of the game alone and of a population."""
    flags = dict(games=4) if not population else dict(size="debug", total_games=4)
    told = bench.measure(0, "cpu", 0.1, population=population, **flags)
    assert told["steps / s"] > 100 and told["agent steps / core s"] > 100
