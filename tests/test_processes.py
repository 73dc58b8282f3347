# SPDX-License-Identifier: MIT
"""--vector async: environments in processes of their own, that give the same rows, and that may die. What a run tells
when it stops, and what may fail without stopping it.
"""

import time

import gymnasium as gym
import numpy as np
import pytest
from helpers import short
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

agents = pytest.mark.parametrize("module", ["planet", "dreamerv2", "dreamerv3", "merlin"], indirect=True)
one = pytest.mark.parametrize("module", ["dreamerv3"], indirect=True)  # where Part 3 is the same
TINY = "toy_envs:Tiny-vector-discrete-v0"  # with its module: each process imports it


def running(module, root, **flags):
    """Args of a run in two environments at once."""
    return short(module, flags.pop("env_id", TINY), root, num_envs=2, **flags)


@agents
def test_processes_give_the_same_run(module, tmp_path):
    """Equal bit for bit, losses included. No run hands its processes on."""
    flags = dict(env_id=TINY.replace("vector", "both"), total_timesteps=60)
    results = [module.train(running(module, tmp_path / vector, vector=vector, **flags)) for vector in ("sync", "async")]
    for key in results[0].keys() - {"run_dir"}:
        assert results[0][key] == results[1][key], key
    assert module.load_agent(results[1]["run_dir"])[1].vector == "sync"


@one
def test_an_evaluation_needs_no_process(module, tmp_path):
    args = module.resolve(running(module, tmp_path, vector="async"))
    envs = module.make_envs(args.env_id, 1, 0, args, evaluation=True)
    assert isinstance(envs.unwrapped, gym.vector.SyncVectorEnv)


@one
def test_a_process_that_raises_is_named(module, tmp_path):
    """Its number and its own traceback in warnings, the error in the last line."""
    args = running(module, tmp_path, env_id="toy_envs:Tiny-raises-v0", vector="async", total_timesteps=400)
    with pytest.warns(UserWarning, match="toy_envs.py") as seen:
        with pytest.raises(RuntimeError, match=r"policy step \d+: ValueError"):
            module.train(args)
    assert any("Worker-" in str(warning.message) for warning in seen)


@one
def test_a_process_that_is_killed(module, tmp_path, monkeypatch):
    """The run stops; what else fails while it closes hides nothing."""
    next_row, rows = module.next_row, []

    def killing(envs, action, row):
        rows.append(row)
        if len(rows) == 30:
            envs.processes[1].kill()
            envs.processes[1].join()
        return next_row(envs, action, row)

    monkeypatch.setattr(module, "next_row", killing)
    with pytest.raises(RuntimeError, match=r"policy step \d+: (EOF|BrokenPipe|ConnectionReset)Error"):
        module.train(running(module, tmp_path, vector="async"))


@one
def test_atari_has_threads_of_its_own(module, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        module.train(running(module, tmp_path, env_id="ALE/Pong-v5", vector="async"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--vector sync" in error and error.count("\n") == 1


@agents
def test_share_of_time_in_environments(module, tmp_path, monkeypatch):
    """charts/env_share / charts/SPS are seconds in environments per policy step."""
    step = gym.vector.SyncVectorEnv.step

    def slow(self, actions):
        time.sleep(0.02)
        return step(self, actions)

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", slow)
    result = module.train(running(module, tmp_path, log_every=1e9))
    events = EventAccumulator(result["run_dir"]).Reload()
    share, speed = (events.Scalars(f"charts/{key}")[-1].value for key in ("env_share", "SPS"))
    assert 0.01 < share / speed < 0.05 and share < 1  # two environments; some rows are resets


@agents
def test_an_interrupted_run_says_how_it_goes_on(module, tmp_path, monkeypatch, capsys):
    next_row, rows = module.next_row, []

    def interrupted(envs, action, row):
        rows.append(row)
        if len(rows) > 20:
            raise KeyboardInterrupt
        return next_row(envs, action, row)

    monkeypatch.setattr(module, "next_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.train(running(module, tmp_path))
    (folder,) = tmp_path.iterdir()
    assert f"--resume {folder}" in capsys.readouterr().out


@agents
def test_one_purpose_at_a_time(module, tmp_path, capsys):
    """--eval beside --resume is refused."""
    run = module.train(running(module, tmp_path))["run_dir"]
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(eval=run, resume=run, device="cpu"))
    assert stop.value.code == 2 and f"--resume {run}" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["planet", "dreamerv2", "dreamerv3"], indirect=True)
def test_a_picture_that_fails(module, tmp_path, monkeypatch):
    """One warning; the run goes on to its end, with its checkpoint."""

    def full(path, frames):
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_gif", full)
    with pytest.warns(UserWarning, match=r"open_loop.gif .*12\d: no space left"):
        result = module.train(running(module, tmp_path))
    assert np.isfinite(result["losses/total"]) and module.load(result["run_dir"])["now"]["step"] >= 120
