# SPDX-License-Identifier: MIT
"""What goes wrong outside: kill -9, full disks, broken files, environments that raise, losses that are not finite."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import pytest
import torch
import toy_envs
from helpers import experience, full_disk, gif, known, short
from kills import MOMENTS

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def finished(module, tmp_path_factory):
    """A short run that came to its end."""
    return pathlib.Path(
        module.train(short(module, "Tiny-vector-discrete-v0", tmp_path_factory.mktemp("run")))["run_dir"]
    )


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def refused(module, capsys, *texts, **flags):
    """train(flags) prints one line that holds the texts, and exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(**{"device": "cpu", **flags}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 500, error
    assert all(text in error for text in texts), error


# --- bad input --------------------------------------------------------------------------------------------------------


def test_spaces_and_flags(module, tmp_path, capsys):
    """Spaces that are not supported, flags that contradict each other: no run folder is made."""
    root = dict(run_root=str(tmp_path), size="debug")
    refused(module, capsys, "Tiny-multi-v0", "MultiBinary", "allowed", env_id="Tiny-multi-v0", **root)
    refused(module, capsys, "Tiny-sequence-v0", "Sequence", "allowed", env_id="Tiny-sequence-v0", **root)
    refused(module, capsys, "--obs both", "CartPole-v1", env_id="CartPole-v1", obs="both", **root)  # 400 x 600 pixels
    usual = module.resolve(module.Args(env_id="CartPole-v1", size="debug")).atari_protocol
    other = {"100k": "200m", "200m": "100k"}[usual]
    refused(module, capsys, f"--atari-protocol {other}", "ALE", env_id="CartPole-v1", atari_protocol=other, **root)
    assert not list(tmp_path.iterdir())


def test_replay_larger_than_memory(module, tmp_path, capsys):
    """Refused before anything is allocated: 7 TiB and more would not be there."""
    flags = dict(env_id="ALE/Pong-v5", size="debug", buffer_size=2 * 10**9, run_root=str(tmp_path))
    refused(module, capsys, "--buffer-size 2000000000", "GiB", **flags)
    assert not list(tmp_path.iterdir())


def test_memory_of_the_system(module, monkeypatch, capsys):
    """What counts is the smaller of free memory and a container's limit; where neither is told nothing is refused."""
    told = {"meminfo": "MemTotal: 3 kB", "memory.max": "max\n", "memory.limit_in_bytes": "?"}
    monkeypatch.setattr(pathlib.Path, "exists", lambda self: True)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: told[self.name])
    assert module.replay_device(10**12, 10**6, torch.device("cpu")) == torch.device("cpu")
    told["meminfo"] = "MemAvailable: 4194304 kB"
    assert module.replay_device(3_000, 2**20, torch.device("cpu")) == torch.device("cpu")
    for name in "memory.max", "memory.limit_in_bytes":
        monkeypatch.setitem(told, name, str(2**31))
        with pytest.raises(SystemExit):
            module.replay_device(3_000, 2**20, torch.device("cpu"))
        assert "2.9 of 2.0 free GiB" in capsys.readouterr().err
        monkeypatch.setitem(told, name, "max")


def test_run_folder(module, tmp_path, capsys, monkeypatch):
    """A folder that cannot be made, as a file is in its way, and a run that is there already."""
    (tmp_path / "file").write_text("")
    flags = dict(env_id="Tiny-vector-box-v0", size="debug")
    refused(module, capsys, "--run-root", "allowed", run_root=str(tmp_path / "file"), **flags)
    monkeypatch.setattr(module.time, "time", lambda: 1.0)
    name = f"Tiny-vector-box-v0__{module.__name__}__1__1"
    (tmp_path / name).mkdir()
    refused(module, capsys, "--run-root", name, run_root=str(tmp_path), **flags)
    assert not list((tmp_path / name).iterdir())


def test_no_renderer(module, tmp_path, capsys):
    """An environment that renders nothing, and MuJoCo without a renderer, which only a process of its own can have."""
    flags = dict(env_id="Tiny-vector-box-v0", size="debug", run_root=str(tmp_path))
    agent, _ = experience(module, flags["env_id"])
    assert len(module.evaluate(agent, agent.args, 1, tmp_path / "eval.gif")) == 1  # as the agent sees it
    (tmp_path / "eval.gif").unlink()
    flags = ["--env-id", "dm_control/cartpole-balance-v0", "--obs", "image", "--size", "debug", "--device", "cpu"]
    command = [sys.executable, str(pathlib.Path(module.__file__)), *flags, "--run-root", str(tmp_path)]
    result = subprocess.run(command, env={**os.environ, "MUJOCO_GL": "disable"}, capture_output=True, text=True)
    assert result.returncode == 2 and "MUJOCO_GL" in result.stderr and result.stderr.count("error: ") == 1
    assert not list(tmp_path.iterdir())


def test_other_checkpoints(module, run, capsys):
    """Truncated, of other shapes, of another version of the file, with a truncated or a missing part of the replay: the
    run folder stays as it was.
    """
    path, state = run / "checkpoint.pt", module.load(run)
    whole, names = path.read_bytes(), sorted(run.iterdir())
    for flag in "resume", "eval":
        path.write_bytes(whole[: len(whole) // 2])
        refused(module, capsys, str(path), **{flag: str(run)})
        module.save(path, **{**state, "args": {**state["args"], "env_id": "Tiny-image-discrete-v0"}})
        with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
            module.train(module.Args(**{flag: str(run), "device": "cpu"}))
        module.save(path, **{**state, "args": {**state["args"], "learning_rate_of_old": 1}})
        refused(module, capsys, str(run), "another version", **{flag: str(run)})
    module.save(path, **{**state, "args": {**state["args"], "flag_of_old": None}})  # not given: it says nothing
    module.load_agent(run)
    assert sorted(run.iterdir()) == names
    path.write_bytes(whole)
    refused(module, capsys, "--eps 0.5", eval=str(run), eps=0.5)
    refused(module, capsys, "--eval-episodes 0", eval=str(run), eval_episodes=0)
    shutil.copy(path, run / "older.pt")
    module.train(module.Args(resume=str(run), total_timesteps=130, device="cpu"))
    files, names = sorted((run / "replay").iterdir()), sorted(run.iterdir())
    module.load_agent(run / "older.pt")
    assert sorted((run / "replay").iterdir()) == files  # what the newer checkpoint needs is still there
    for harm in (lambda file: file.write_bytes(file.read_bytes()[:100])), pathlib.Path.unlink:
        file = next((run / "replay").glob("rows*"))
        harm(file)
        refused(module, capsys, str(file), resume=str(run), total_timesteps=200)
    assert sorted(run.iterdir()) == names


class Wide(gym.Env):
    """Steps with 700 numbers to see; an episode has five."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (700,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.count += 1
        return self.observation_space.sample(), 1.0, False, self.count == 5, {}


def test_wide_vectors(module, tmp_path):
    """Pictures of many numbers stay small enough for a GIF, and come after the checkpoint is safe."""
    gym.register("Wide-v0", Wide)
    try:
        result = module.train(short(module, "Wide-v0", tmp_path))
    finally:
        del gym.registry["Wide-v0"]
    folder = pathlib.Path(result["run_dir"])
    assert gif(folder / "open_loop.gif")[1][0] <= 6 * 64 * 16
    assert (folder / "checkpoint.pt").stat().st_mtime <= (folder / "open_loop.gif").stat().st_mtime


# --- faults in a run --------------------------------------------------------------------------------------------------


def stopped(module, args, *texts):
    """The run stops with an error that holds the texts. -> its folder, which holds no temporary file."""
    with pytest.raises(RuntimeError) as stop:
        module.train(args)
    assert all(text in str(stop.value) for text in texts), stop.value
    (run,) = pathlib.Path(args.run_root).iterdir()
    assert not list(run.rglob("*.tmp"))
    return run


def goes_on(module, run, at):
    """The last checkpoint of a run is from step `at`, whole, and can be resumed."""
    assert at <= module.load(run)["now"]["step"] < at + 3
    assert module.train(module.Args(resume=str(run), total_timesteps=130, device="cpu"))["global_step"] >= 130


def test_loss_is_not_finite(module, tmp_path, monkeypatch):
    """The run stops with step and term; the last checkpoint is from before."""
    real = module.Agent.update

    def update(self, batch):
        if list(tmp_path.glob("*/checkpoint.pt")):
            with torch.no_grad():
                self.params[0].fill_(float("nan"))
        return real(self, batch)

    monkeypatch.setattr(module.Agent, "update", update)
    args = short(module, "Tiny-vector-discrete-v0", tmp_path, checkpoint_every=40)
    run = stopped(module, args, "policy step ", "losses/", "is nan", str(tmp_path))
    monkeypatch.setattr(module.Agent, "update", real)
    saved = module.load(run)
    assert all(torch.isfinite(x).all() for x in saved["agent"].values())
    goes_on(module, run, saved["now"]["step"])


def test_environment_raises(module, tmp_path):
    """The run stops with the step and the words of the environment."""
    args = short(module, "Tiny-raises-v0", tmp_path, checkpoint_every=40)
    run = stopped(module, args, "policy step ", "ValueError: the simulator broke", str(tmp_path))
    assert 40 <= module.load(run)["now"]["step"] < 43


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reward_is_not_finite(module, tmp_path, value):
    """The run stops at the row that brings it, which is not stored, and can be resumed."""

    class Broken(toy_envs.Tiny):
        steps = 0

        def step(self, action):
            obs, reward, *ends = super().step(action)
            Broken.steps += 1
            return obs, value if Broken.steps == 70 else reward, *ends

    gym.register("Broken-v0", Broken, kwargs=dict(gym.spec("Tiny-vector-discrete-v0").kwargs))
    try:
        args = short(module, "Broken-v0", tmp_path, checkpoint_every=40)
        run = stopped(module, args, "policy step ", f"reward of an environment is {value}", str(tmp_path))
        goes_on(module, run, 40)
    finally:
        del gym.registry["Broken-v0"]


@pytest.mark.parametrize("file", ["rows", "checkpoint"])
def test_disk_is_full(module, tmp_path, monkeypatch, file):
    """No space while the second checkpoint is written, in any of its parts: the first one stays good."""
    real = full_disk(monkeypatch, lambda target: pathlib.Path(target.name).name.startswith(file))
    args = short(module, "Tiny-vector-discrete-v0", tmp_path, checkpoint_every=40)
    run = stopped(module, args, "policy step 8", "No space left", str(tmp_path))
    monkeypatch.setattr(torch, "save", real)
    goes_on(module, run, 40)


@pytest.fixture(scope="module")
def killed(module, tmp_path_factory):
    """The folder with the runs of kills.py."""
    root = tmp_path_factory.mktemp("killed")
    command, environ = [sys.executable, HERE / "kills.py", module.__name__, root], {"OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(pathlib.Path(module.__file__).parent), str(HERE)])
    result = subprocess.run(command, env={**os.environ, **environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return root


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_inside_a_save(module, killed, moment):
    """Kill -9 at each part of the second save leaves the old checkpoint or the new one, with the rows that it names.
    It can be resumed, and then nothing half-made is left: at most rows that left the ring in the last save.
    """
    step = MOMENTS[moment][-1]
    (run,) = (killed / moment).iterdir()
    state = module.load(run)
    assert step <= state["now"]["step"] < step + 3
    check_rows(module, run, state, oldest=state["replay"]["rows"] - 40)
    before = {name for _, _, name in state["replay"]["files"]}
    goes_on(module, run, step)
    state = module.load(run)
    check_rows(module, run, state, oldest=state["replay"]["rows"] - 40)
    kept, names = {path.name for path in (run / "replay").iterdir()}, {x[2] for x in state["replay"]["files"]}
    assert names <= kept <= names | before
    assert not list(run.rglob("*.tmp"))


def check_rows(module, run, state, oldest):
    """The files that a checkpoint names hold each row once, from the oldest to the newest. -> the rows."""
    spans = [(first, end) for first, end, _ in state["replay"]["files"]]
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False)) and spans[-1][1] == state["replay"]["rows"]
    parts = [module.load(run / "replay" / name) for _, _, name in state["replay"]["files"]]
    rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    assert all(len(x) == spans[-1][1] - spans[0][0] for x in rows.values()) and spans[0][0] <= oldest
    return rows


def killed_runs(module, root, kills, steps, wait):
    """Kill -9 a run at random moments, resume it, and so on, then let it end. -> its folder, checkpoints' steps."""
    flags = dict(env_id="toy_envs:Tiny-vector-box-v0", size="debug", device="cpu", num_envs=3, log_every=0.0)
    flags |= dict(total_timesteps=steps, learning_starts=20, checkpoint_every=5, run_root=str(root), train_ratio=1.0)
    flags |= dict(buffer_size=2 * steps)
    flags = known(module, {**flags, "seed_episodes": 1, "collect_interval": 4})
    start = [x for name, value in flags.items() for x in ("--" + name.replace("_", "-"), str(value))]
    environ, seen = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}, []
    rng = random.Random(0 if kills > 1 else None)
    while True:
        runs = list(root.glob("*/checkpoint.pt"))
        command = ["--resume", str(runs[0].parent), "--device", "cpu", "--log-every", "0.0"] if runs else start
        for early in [] if runs else root.iterdir():  # killed before its first checkpoint
            shutil.rmtree(early)
        log = root.parent / "log"
        with open(log, "w") as out:
            command = [sys.executable, module.__file__, *command]
            process = subprocess.Popen(command, env=environ, stdout=out, stderr=subprocess.STDOUT)
        while "\nstep " not in log.read_text() and process.poll() is None:
            time.sleep(0.01)
        if len(seen) < kills:
            time.sleep(rng.uniform(0, wait))  # the first update of a process takes half a second
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=300)
        text = log.read_text()
        assert process.returncode in (0, -signal.SIGKILL), text
        (run,) = root.iterdir()
        saved = module.load(run) if (run / "checkpoint.pt").exists() else {"now": {"step": 0}}
        lines = [line.split()[1].split("/")[0] for line in text.splitlines() if "steps/s" in line]
        reached = max([int(step.replace(",", "")) for step in lines], default=0)
        assert saved["now"]["step"] >= reached - 5 - 3, text  # at most an interval, and the rows of one step, are lost
        seen.append(saved["now"]["step"])
        if process.returncode == 0:
            return run, seen


def check_kills(module, tmp_path, kills, steps, wait):
    (tmp_path / "runs").mkdir()
    run, seen = killed_runs(module, tmp_path / "runs", kills, steps, wait)
    print("steps of the checkpoints at the kills:", seen)
    assert len(seen) == kills + 1 and len(set(seen)) > 1 and seen == sorted(seen)
    state = module.load(run)
    assert steps <= state["now"]["step"] < steps + 3
    rows = check_rows(module, run, state, oldest=0)
    assert (~rows["is_last"]).sum() == state["now"]["step"]  # every step once, none twice
    resumed = (rows["is_first"][1:] & ~rows["is_last"][:-1]).any(1)  # episodes were abandoned
    assert rows["is_first"][1:][resumed].all() and resumed.sum() <= kills  # then all environments began anew
    assert all(torch.isfinite(x).all() for x in state["agent"].values() if x.is_floating_point())


def test_kill(module, tmp_path):
    """A run killed twice with -9 reaches its end, with every step in the replay once."""
    check_kills(module, tmp_path, kills=2, steps=300, wait=0.5)


@pytest.mark.slow
def test_random_kill(module, tmp_path):
    """The same in a longer run, at another moment each time."""
    check_kills(module, tmp_path, kills=1, steps=2000, wait=5.0)
