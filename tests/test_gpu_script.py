# SPDX-License-Identifier: MIT
"""results/gpu.py on a CPU: whole, and with parts that are broken or hang. Both run as they would beside a GPU."""

import csv
import json
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from PIL import Image

import dreamerv3

pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path):
    """A copy of the checkout, to break what one likes."""
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "fixtures")
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)


def call(tree, minutes, *flags):
    """-> {stage: its records}; the folder with the results."""
    out, began = tree.parent / "out", time.time()
    command = [sys.executable, "results/gpu.py", "--device", "cpu", "--minutes", minutes, "--out", out, *flags]
    subprocess.run(list(map(str, command)), cwd=tree, check=True)
    assert time.time() - began < 60 * minutes + 15
    left = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")]
    assert not [line for line in left if str(tree).encode() in line], "a process was left behind"
    records = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    return {stage: [x for x in records if x["stage"] == stage] for stage in {x["stage"] for x in records}}, out


def test_whole(tree):
    """Every stage leaves its results in few and small files; the weights play, and the time is kept to."""
    records, out = call(tree, 2)
    stages = {"machine", "smoke", "tests", "speed", "learn"}
    assert {x["name"]: x["code"] for x in records["stage"]} == dict.fromkeys(stages, 0)
    assert any("copy_tb_per_s" in x for x in records["machine"])
    assert {"dreamerv3", "dreamerv2"} <= {x["file"] for x in records["smoke"] if x["ok"]}
    assert records["tests"][-1]["outcome"]["passed"] >= 4
    assert records["speed"][0]["median ms"] > 0
    assert len(list(out.iterdir())) <= 8 and all(path.stat().st_size < 16 * 2**20 for path in out.iterdir())
    rows = list(csv.DictReader(open(out / "pong.csv")))
    assert rows and all(float(row["frames"]) == 4 * float(row["policy_step"]) for row in rows)
    assert Image.open(out / "pong.png").size[0] > 500 and Image.open(out / "dream.gif").n_frames == 65
    agent, args = dreamerv3.load_agent(out / "weights.pt")
    assert args.env_id == "ALE/Pong-v5" and len(dreamerv3.evaluate(agent, args, 1)) == 1


def test_broken_parts(tree):
    """A file that cannot be read, one that hangs, and a stage that hangs cost what they are, and nothing else."""
    (tree / "planet.py").write_text("raise RuntimeError('broken on purpose')")
    (tree / "merlin.py").write_text("import time; time.sleep(1000)")
    (tree / "results" / "torch.py").write_text("import time; time.sleep(1000)")  # of scripts in results alone
    records, _ = call(tree, 1.3, "--only", "smoke", "machine", "speed")
    smoke = {x["file"]: x for x in records["smoke"]}
    assert "broken on purpose" in smoke["planet"]["error"] and smoke["dreamerv2"]["ok"]
    assert smoke["merlin"]["error"].endswith("ended at its limit")
    assert {x["name"]: x["code"] for x in records["stage"]} == {"machine": None, "smoke": 0, "speed": 1}
    assert records["speed"][0]["error"].endswith("ended at its limit")


def test_weights_fit(tmp_path, monkeypatch):
    """What comes back of a large net: bfloat16, without the heads that only training needs. It still acts the same."""
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    import agents

    args = dreamerv3.resolve(dreamerv3.Args(env_id="CartPole-v1", size="1m", device="cpu"))
    envs = dreamerv3.make_envs(args.env_id, 1, 0, args)
    agent = dreamerv3.Agent(envs.single_observation_space, envs.single_action_space, args)
    saved, row = tmp_path / "checkpoint.pt", dreamerv3.start_row(envs, 0)
    dreamerv3.save(saved, args=vars(args), agent=agent.state_dict(), source="")
    for most in 10**9, 1000:
        agents.shrink(saved, tmp_path / "weights.pt", most)
        again, _ = dreamerv3.load_agent(tmp_path / "weights.pt")
        states = [x.act(x.inputs(row, x.initial(1)), eval=True)["deter"] for x in (agent, again)]
        assert (states[0] - states[1]).abs().max() < 0.02
    assert (tmp_path / "weights.pt").stat().st_size < 0.45 * saved.stat().st_size
