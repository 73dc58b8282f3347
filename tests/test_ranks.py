# SPDX-License-Identifier: MIT
"""results/ranks.py: two processes take the steps of one with the whole batch; resume; bad input; a rank that dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
SHORT = {  # flags for a few updates; the first KL of dreamerv2 is 0.266 on average, 0.249 and 0.282 of the two ranks
    "dreamerv3": "--batch-size 4 --batch-length 8 --learning-starts 20 --num-envs 2",
    "dreamerv2": "--batch-size 4 --prefill 20 --free-nats 0.26 --num-envs 2",
    "planet": "--batch-size 4 --seed-episodes 2 --num-envs 2",
    "merlin": "--num-envs 4",
}


def run(command, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), **kwargs.pop("env", {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("name", SHORT)
def test_two_ranks_take_the_steps_of_one(name, tmp_path):
    """Pixels and vectors: averaged gradients of the first three updates; both ranks the same bit by bit, always."""
    flags = "--env-id toy_envs:Tiny-both-discrete-v0 --size debug --device cpu --total-timesteps 80".split()
    saved = {}
    for kind, start in {"one": [sys.executable], "two": TORCHRUN}.items():
        own = [*SHORT[name].split(), "--run-root", str(tmp_path / kind)]
        result = run([*start, "tests/ranks_run.py", str(tmp_path / kind), f"{name}.py", *flags, *own], cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]
        (path,) = (tmp_path / kind).glob("*/checkpoint.pt")
        saved[kind] = torch.load(path)["agent"]
    alone, first, second = (torch.load(tmp_path / x) for x in ("one.alone", "two.0", "two.1"))
    assert len(alone) == len(first) == len(second) >= 3
    for grads in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    for one, two in zip(alone[:3], first[:3], strict=True):
        one, two = (torch.cat([x.flatten() for x in grads]) for grads in (one, two))
        assert one.norm() > 1e-3 and (one - two).norm() < 1e-3 * one.norm()
    if name == "dreamerv3":  # percentiles of all returns, not of a part
        assert torch.allclose(saved["one"]["return_range"], saved["two"]["return_range"], rtol=1e-3)
        assert saved["one"]["return_range"].diff() > 0.01


@pytest.mark.parametrize("name", ["dreamerv3", "dreamerv2"])
def test_updates_in_pieces(name, tmp_path):
    """Captured between two exchanges each, by the stand-in for CUDA graphs: the same weights, bit by bit."""
    flags = "--env-id toy_envs:Tiny-both-discrete-v0 --size debug --device cpu --total-timesteps 120".split()
    agents = []
    for kind in "eager", "pieces":
        own = [*SHORT[name].split(), "--run-root", str(tmp_path / kind)]
        command = [*TORCHRUN, "tests/ranks_run.py", str(tmp_path / kind), f"{name}.py", *flags, *own]
        result = run(command, cwd=ROOT, env={"GRAPHS": "1" if kind == "pieces" else ""})
        assert result.returncode == 0, result.stderr[-3000:]
        saved = torch.load(next((tmp_path / kind).glob("*/checkpoint.pt")))
        agents.append(saved["agent"])
        assert saved["now"]["updates"] >= 6
    taken = [len(torch.load(tmp_path / f"{kind}.0")) for kind in ("eager", "pieces")]
    assert taken[1] < taken[0]  # replays run no Python
    assert all(torch.equal(a, b) for a, b in zip(*(x.values() for x in agents), strict=True))


def test_exchanges(tmp_path):
    """Averages, gathered elements, and a bound on the mean of all: its gradient is that of one process."""
    (tmp_path / "script.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT / "results")!r})
import ranks, torch
r = ranks.Ranks()
r.average_gradients()
x = torch.tensor([[1.0, 2.0], [3.0, 6.0]][r.rank], requires_grad=True)
assert r.gather(x).tolist() == [1, 2, 3, 6] and r.tell(r.rank) == 0
for least, grad in (2.5, 0.5), (3.5, 0.0):  # the mean of one rank lies below 2.5, the other above 3.5
    (mine,) = ranks.torch.autograd.grad(r.mean(x).clamp(min=least), x)
    assert mine.tolist() == [grad, grad], mine
assert r.mean(x).item() == 3 and [y.tolist() for y in r.average([x, x[0]])] == [[2, 4], 2]
batch = {{"a": torch.arange(12).view(4, 3), "b": torch.tensor([True, False, False, True])}} if r.rank == 0 else None
part = r.share(batch, [("a", (2, 3), torch.int64), ("b", (2,), torch.bool)], torch.device("cpu"))
assert part["a"].flatten().tolist() == list(range(6 * r.rank, 6 * r.rank + 6))
assert part["b"].tolist() == [[True, False], [False, True]][r.rank]
ranks.dist.all_reduce(torch.zeros(1))
ranks.dist.destroy_process_group()
""")
    result = run([*TORCHRUN, tmp_path / "script.py"])
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_run_goes_on_with_other_ranks(tmp_path):
    """Two ranks, then one process, then two: checkpoints are those of the file."""
    flags = f"--env-id CartPole-v1 --size debug --device cpu --run-root {tmp_path} {SHORT['dreamerv3']}".split()
    two, one = [*TORCHRUN, "results/ranks.py", "dreamerv3.py"], [sys.executable, "dreamerv3.py"]
    result = run([*two, *flags, "--total-timesteps", "60"], cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    (folder,), updates = tmp_path.glob("*__*"), [torch.load(next(tmp_path.glob("*/checkpoint.pt")))["now"]["updates"]]
    for command, steps in (one, 90), (two, 120):
        result = run([*command, "--resume", str(folder), "--total-timesteps", str(steps)], cwd=ROOT)
        assert result.returncode == 0, result.stderr[-2000:]
        updates.append(torch.load(folder / "checkpoint.pt")["now"]["updates"])
    assert 0 < updates[0] < updates[1] < updates[2]


@pytest.mark.parametrize(
    "file,flags,text",
    [
        ("dreamerv3.py", "--batch-size 5", "--batch-size 5: allowed with 2 ranks: a multiple of that"),
        ("merlin.py", "--num-envs 3", "--num-envs 3: allowed with 2 ranks: a multiple of that"),
        ("dreamerv3.py", "--device cuda:0", "--device cuda:0: allowed with ranks: auto, cpu, cuda"),
        ("ftw.py", "--population 3", "--population 3: allowed with 2 ranks: a multiple of that"),
        ("ftw.py", "--population 4 --games 5", "--games 5: allowed with 2 ranks: a multiple of that"),
        ("gumbel_softmax.py", "", "allowed: torchrun"),
    ],
)
def test_bad_input(file, flags, text, tmp_path):
    """One line, and nothing is left behind."""
    own = f"--size debug --device cpu --run-root {tmp_path}".split() + flags.split()
    own += ["--env-id", "CartPole-v1"] if file != "ftw.py" else []
    result = run([*TORCHRUN, "results/ranks.py", file, *own], cwd=ROOT)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode and len(lines) == 1 and text in lines[0] and not list(tmp_path.iterdir())


def test_a_population_is_spread(tmp_path):
    """ftw.py: parts dealt anew for each batch of matches, players of a match from one part; each rank trains its own
    agents on boards of its own; then both have all agents, and the same ratings and genes, bit by bit.
    """
    (tmp_path / "script.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT / "results")!r})
import ranks, torch
seen, collect = [], ranks.Parts.collect
flat = lambda a: torch.cat([x.flatten() for x in (*a.state_dict().values(), *a.squares)]).clone()
def recorded(self, agents, stats, who, match, now):
    before = dict(before=[flat(a) for a in agents], own=match.outcome, acted=[*match.act])
    before |= dict(boards=match.game.walls.copy(), own_totals=match.totals.copy())
    collect(self, agents, stats, who, match, now)
    seen.append(dict(before, after=[flat(a) for a in agents], owner=dict(self.owner), who=who, match=match.who,
                     outcome=match.outcome, totals=match.totals, updates=now["updates"], losses=dict(stats)))
ranks.Parts.collect = recorded
sys.argv = ["ranks.py", {str(ROOT / "ftw.py")!r}, *sys.argv[1:]]
ranks.main()
torch.save(seen, {str(tmp_path)!r} + "/seen." + ranks.os.environ["RANK"])
""")
    flags = "--size debug --device cpu --population 4 --games 8 --total-games 64".split()
    result = run([*TORCHRUN, tmp_path / "script.py", *flags, "--run-root", str(tmp_path / "runs")])
    assert result.returncode == 0, result.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"seen.{rank}", weights_only=False) for rank in (0, 1))
    assert len(first) == len(second) == 8 and len({str(sorted(x["owner"].items())) for x in first}) > 1
    updates = 0
    for one, two in zip(first, second, strict=True):
        owner = [one["owner"][p] for p in range(4)]
        assert owner == [two["owner"][p] for p in range(4)] and sorted(owner) == [0, 0, 1, 1]
        for p, rank in enumerate(owner):
            mine, other = (one, two) if rank == 0 else (two, one)
            assert torch.equal(mine["before"][p], mine["after"][p]) and torch.equal(mine["after"][p], other["after"][p])
            assert p not in other["acted"]
            if p in mine["acted"]:  # and learned
                assert not torch.equal(other["before"][p], mine["after"][p])
                assert mine["losses"][p] == other["losses"][p]
        assert (one["who"] == two["who"]).all() and (one["match"] == one["who"]).all() and len(one["who"]) == 8
        assert all(len({owner[p] for p in players if p < 4}) == 1 for players in one["who"].tolist())
        assert one["outcome"].tolist() == two["outcome"].tolist() == [*one["own"], *two["own"]]
        assert (one["totals"] == two["totals"]).all() and one["boards"].shape[0] == 4
        assert (one["totals"] == one["own_totals"] + two["own_totals"]).all() and one["totals"].any()
        assert (one["boards"] != two["boards"]).any()
        updates += 16 * len(one["acted"] + two["acted"])  # windows of 8 steps in a match of 128
        assert one["updates"] == two["updates"]
    assert first[-1]["updates"] == updates
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    saved = torch.load(path)
    assert saved["now"]["games"] == 64 and saved["now"]["updates"] == updates and saved["args"]["games"] == 8
    assert saved["now"]["steps"] == 64 * 4 * 128


def test_a_population_goes_on_with_other_ranks(tmp_path):
    """Two ranks, then one process, then two; other boards than before on each rank."""
    flags = f"--size debug --device cpu --population 4 --games 4 --run-root {tmp_path}".split()
    two, one = [*TORCHRUN, "results/ranks.py", "ftw.py"], [sys.executable, "ftw.py"]
    assert run([*two, *flags, "--total-games", "24"], cwd=ROOT).returncode == 0
    (folder,), states = tmp_path.glob("*__*"), [torch.load(next(tmp_path.glob("*/checkpoint.pt")))]
    for command, games in (one, 36), (two, 48):
        result = run([*command, "--resume", str(folder), "--total-games", str(games)], cwd=ROOT)
        assert result.returncode == 0, result.stderr[-2000:]
        states.append(torch.load(folder / "checkpoint.pt"))
    assert [x["now"]["games"] for x in states] == [24, 36, 48]
    assert states[0]["now"]["updates"] < states[1]["now"]["updates"] < states[2]["now"]["updates"]
    assert not torch.equal(states[1]["agents"][0]["squares"][0], states[2]["agents"][0]["squares"][0])


@pytest.mark.parametrize("rank,how", [("1", signal.SIGKILL), ("0", signal.SIGTERM)])
def test_a_rank_dies(rank, how, tmp_path):
    """kill -9 of a rank that computes, or what torchrun sends to rank 0 then: within a minute all have ended, rank 0
    has said where it stopped, and the last checkpoint is good.
    """
    flags = "--env-id CartPole-v1 --size debug --device cpu --total-timesteps 1000000 --checkpoint-every 20".split()
    own = [*flags, "--run-root", str(tmp_path), *SHORT["dreamerv3"].split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "results/ranks.py", "dreamerv3.py", *own]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.time() + 90
        while not list(tmp_path.glob("*/checkpoint.pt")) and time.time() < deadline:
            time.sleep(0.5)
        ranks = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environ, words = (path / "environ").read_bytes().split(b"\0"), (path / "cmdline").read_bytes()
            except OSError:
                continue
            found = [x[5:].decode() for x in environ if x.startswith(b"RANK=")]
            if found and str(tmp_path).encode() in words and b"ranks.py" in words:
                ranks[found[0]] = int(path.name)
        os.kill(ranks[rank], how)
        assert process.wait(timeout=60) != 0
    for pid in ranks.values():
        assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    log = (tmp_path / "log").read_text()
    assert "stopped   at step" in log and f"rank      : {rank}" in log
    (path,) = tmp_path.glob("*/checkpoint.pt")
    assert torch.load(path)["now"]["step"] >= 20
