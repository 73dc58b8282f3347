# SPDX-License-Identifier: MIT
"""Checks of the files themselves: size, order, licence, dependencies, help, imports, shape comments, copying."""

import ast
import dataclasses
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import shape_comments
from helpers import AGENTS, APPLICATIONS, FILES

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINES = {"planet": 1050, "dreamerv2": 1200, "merlin": 980, "dreamerv3": 1250, "ftw": 1250, "gumbel_softmax": 720}
LINES |= {"vqgan": 650, "sac_discrete": 350}
# Everything counted. No file grows: what a feature adds has to go elsewhere, or replaces something.
SECTIONS = [  # those of Replay and make_envs: in agents only
    "# SPDX-License-Identifier: MIT",
    "# /// script",
    '"""',
    "import ",
    "class Args",
    "SIZES = ",
    "def resolve",
    "# === Part 1: the algorithm ===",
    "class Agent",
    "class Replay",
    "# === Part 2: training ===",
    "def train",
    "# === Part 3: plumbing",
    "def make_envs",
    "def evaluate",
    'if __name__ == "__main__":',
]
ACTING = [*AGENTS, "sac_discrete"]
COMPOUND = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.FunctionDef | ast.Match
PATHS = {name: ROOT / f"{name}.py" for name in FILES} | {x: ROOT / "applications" / f"{x}.py" for x in APPLICATIONS}
file = pytest.mark.parametrize("name", PATHS)
DEBUG = ["--size", "debug", "--device", "cpu"]  # with the flags of SHORT a run of seconds; its folder begins with RUN
SHORT = {name: ["--env-id", "CartPole-v1", "--total-timesteps", 120] for name in AGENTS}
SHORT |= {"merlin": ["--total-timesteps", 200], "gumbel_softmax": ["--estimator", "st", "--total-steps", 20]}
SHORT |= {"ftw": ["--total-games", 8], "vqgan": [], "sac_discrete": []}
RUN = {name: "CartPole-v1" for name in AGENTS} | {"merlin": "MemoryGame-6-v0", "gumbel_softmax": "vae-categorical-st"}
RUN |= {"ftw": "CaptureTheFlag", "vqgan": "vq", "sac_discrete": "CartPole-v1"}


def read(name):
    source = PATHS[name].read_text(encoding="utf-8")
    return source, ast.parse(source)


def python(*command, cwd, **env):
    """Run python in a folder of its own, without this repository on its path. -> finished process."""
    clean = {key: x for key, x in os.environ.items() if key not in ("PYTHONPATH", "MUJOCO_GL")}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env={**clean, **env}, capture_output=True, encoding="utf-8", timeout=200)


def dependencies(name):
    """The list of the PEP 723 block."""
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", read(name)[0])[1]
    content = re.sub(r"(?m)^# ?", "", block)
    assert re.search(r'(?m)^requires-python = ">=3\.\d+"$', content)
    return set(ast.literal_eval(re.search(r"dependencies = (\[.*\])", content, re.S)[1]))


def depth(node):
    """How deep compound statements are nested in a node; elif does not go deeper than its if."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            chained = isinstance(node, ast.If) and field == "orelse" and len(value) == 1 and isinstance(child, ast.If)
            if isinstance(child, ast.AST):
                deepest = max(deepest, depth(child) + (isinstance(child, COMPOUND) and not chained))
    return deepest


def test_licence_and_columns():
    """Every Python file of the repository starts with the licence line and keeps to 120 columns."""
    paths = [path for path in ROOT.rglob("*.py") if not {"runs", ".venv"} & set(path.relative_to(ROOT).parts)]
    assert len(paths) > 5
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0] == "# SPDX-License-Identifier: MIT", path
        assert [f"{path}:{i}" for i, line in enumerate(lines, 1) if len(line) > 120] == []


@file
def test_budgets(name):
    """Lines of a file, lines of a function, depth of nesting."""
    source, tree = read(name)
    assert len(source.splitlines()) <= LINES[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (90 if node.name == "train" else 60), f"{node.name}: {lines} lines"
            assert depth(node) <= 4, f"{node.name}: {depth(node)} statements deep"


@file
def test_order(name):
    """The sections stand in the order that all files share, each once; the last one is parse and train only."""
    source, tree = read(name)
    sections = [text for text in SECTIONS if name in ACTING or text not in ("class Replay", "def make_envs")]
    starts = [[i for i, line in enumerate(source.splitlines()) if line.startswith(text)] for text in sections]
    for text, found in zip(sections, starts, strict=True):
        assert found and (len(found) == 1 or text in ('"""', "import ")), f"{text}: lines {found}"
    assert [found[0] for found in starts] == sorted(found[0] for found in starts)
    assert isinstance(tree.body[-1], ast.If) and tree.body[-1].end_lineno - tree.body[-1].lineno <= 2


@file
def test_docstrings(name):
    """Every public function and class, and every public method of Agent, Replay and RSSM, says what it does."""
    _, tree = read(name)
    silent = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "Args":
            silent += [node.name] * (ast.get_docstring(node) is None)
        if isinstance(node, ast.ClassDef) and node.name in ("Agent", "Replay", "RSSM"):
            methods = [x for x in node.body if isinstance(x, ast.FunctionDef) and not x.name.startswith("_")]
            methods = [x for x in methods if x.name not in ("forward", "state_dict")]
            silent += [f"{node.name}.{x.name}" for x in methods if ast.get_docstring(x) is None]
    assert silent == []


@file
def test_imports(name):
    """No file of this repository is imported; packages that only some runs need are imported where they are used."""
    _, tree = read(name)
    nodes = {True: set(), False: set()}  # at top level, or within a function
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            nodes[node in tree.body] |= {x.split(".")[0] for x in names} - sys.stdlib_module_names
            assert getattr(node, "level", 0) == 0
    assert nodes[True] <= {"torch", "numpy", "tyro", "gymnasium"}
    optional = {"gymnasium", "ale_py", "shimmy", "PIL", "tensorboard", "wandb", "matplotlib", "numcodecs"}
    assert nodes[False] <= {"torch"} | optional


def test_dependencies_are_the_requirements():
    """requirements.txt lists what the PEP 723 blocks of all files list together, bound by bound."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {line.split("#")[0].strip() for line in lines} - {""}
    assert required == set().union(*map(dependencies, PATHS))


@file
def test_help(name):
    """--help exits with 0; every field of Args is a flag there, with the text of its trailing comment."""
    result = python(PATHS[name], "--help", cwd=ROOT, COLUMNS="120", PYTHONIOENCODING="utf-8")
    assert result.returncode == 0, result.stderr
    shown = " ".join(re.sub(r"[│╭╰─╮╯]", " ", result.stdout).split())
    source, tree = read(name)
    (args,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    for node in args.body:
        text = source.splitlines()[node.end_lineno - 1].partition("  # ")[2]
        assert text, f"{node.target.id}: no trailing comment"
        flag = "--" + node.target.id.replace("_", "-")
        assert re.search(rf" {flag}[ ,].{{0,300}}? ?{re.escape(text)} \(", shown), f"{flag}: {text}"


@file
def test_import_has_no_side_effects(name, tmp_path):
    """Importing touches no random state, device, environment variable, argument or file, and stays light."""
    shutil.copy(PATHS[name], tmp_path)
    (tmp_path / "probe.py").write_text(
        f"""
import os, random, sys
import numpy, torch, gymnasium, tyro
sys.argv = ["probe", "--nonsense"]
state = lambda: (random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist(), dict(os.environ),
                 sys.argv, torch.get_default_dtype(), torch.backends.cudnn.deterministic, len(gymnasium.registry))
before, threads = state(), torch.get_num_threads()
import {name}
assert state() == before and torch.get_num_threads() == threads
assert not torch.cuda.is_initialized()
heavy = {{"dm_control", "mujoco", "ale_py", "PIL", "wandb", "tensorboard", "tensorflow", "matplotlib", "scipy"}}
heavy |= {{"shimmy", "numcodecs", "zarr"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    )
    result = python("-B", "probe.py", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == "", result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"probe.py", f"{name}.py"}


@file
def test_copy_out(name, tmp_path):
    """A file alone, renamed, in an empty folder, runs; the run has the new name, and nothing else is written."""
    folder, home = tmp_path / "project", tmp_path / "home"
    folder.mkdir(), home.mkdir()
    shutil.copy(PATHS[name], folder / "my_agent.py")
    result = python("my_agent.py", *DEBUG, *SHORT[name], cwd=folder, HOME=str(home), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in folder.iterdir()} == {"my_agent.py", "runs"}
    assert not list(home.iterdir())
    (run,) = (folder / "runs").iterdir()
    assert run.name.startswith(f"{RUN[name]}__my_agent__1__") and (run / "checkpoint.pt").exists()
    assert str(run.relative_to(folder)) in result.stdout


@pytest.mark.parametrize("name", [*AGENTS, "merlin"])
def test_your_own_environment(name, tmp_path):
    """Twelve lines of one's own, in a module beside the copied file, are all that --env-id needs."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "mymodule.py").write_text(
        """import gymnasium as gym
import numpy as np

class MyEnv(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        self.x = np.zeros(2, np.float32)
        return self.x, {}
    def step(self, action):
        self.x = self.x + np.float32([0.1, 2 * action - 1]) / 2
        return self.x, float(self.x[1]), False, bool(self.x[0] > 0.5), {}
gym.register("MyEnv-v0", MyEnv)
"""
    )
    flags = ["--size", "debug", "--env-id", "mymodule:MyEnv-v0", "--device", "cpu", "--total-timesteps", 120]
    result = python(f"{name}.py", *flags, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"mymodule-MyEnv-v0__{name}__1__") and (run / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", AGENTS)
def test_shape_comments(name, tmp_path):
    """Every trailing shape comment holds in real runs, with sizes chosen to be told apart, and each one is reached."""
    module = importlib.import_module(name)
    sizes = dict(batch_size=5, batch_length=9, imag_horizon=4, stoch=6, classes=7, deter=64, hidden=40, units=48)
    sizes |= dict(bins=31, blocks=8, depth=2, horizon=4, candidates=11, top=3, learning_starts=20)
    sizes |= dict(seed_episodes=1, prefill=20)
    fields = {field.name for field in dataclasses.fields(module.Args)}
    sizes = {key: x for key, x in sizes.items() if key in fields}
    symbols = dict(imag_horizon="H", stoch="S", classes="K", deter="D", bins="V", horizon="H", candidates="J", top="K")
    known = {symbols[key]: x for key, x in sizes.items() if key in symbols}
    known["F"] = known.get("D", 0) + known.get("S", 0) * sizes.get("classes", 1)
    missed = []
    for action, size in ("discrete", 3), ("box", 2):
        flags = dict(env_id=f"toy_envs:Tiny-both-{action}-v0", num_envs=2, run_root=str(tmp_path / action))
        flags |= dict(size="debug", device="cpu", total_timesteps=60, checkpoint_every=60, **sizes)
        errors, checked, unreached = shape_comments.check(
            module.__file__, lambda flags=flags: module.train(module.Args(**flags)), {**known, "A": size}
        )
        assert errors == [] and len(checked) > 10
        missed.append(unreached)
    assert set.intersection(*missed) == set()


def test_wrong_shape_comments_are_found(tmp_path):
    """The check itself: rank, size, sums, products, unification within a call, several lines, lines never reached."""
    path = tmp_path / "example.py"
    path.write_text(
        """import torch
def f(B, T):
    good = torch.zeros(B, T + 1, 2 * 3)  # (B, T+1, 2*U), fine
    good = torch.zeros(
        B * T, 3
    )  # (B*T, U)
    a = torch.zeros(B)  # (T)
    b = torch.zeros(B)  # (B, 1)
    c = torch.zeros(B, 4)  # (B, U)
    d, e = torch.zeros(2, T)  # (T-1): wrong
    g = torch.zeros(B, K_of(2))  # (B, K)
    h = torch.zeros(7)  # (3*W)
    f.x = torch.zeros(2)  # (2)
    if B > 100:
        i = torch.zeros(2)  # (2)
    note = torch.zeros(2)  # (which is no shape)
def K_of(x):
    return x
"""
    )
    sys.path.insert(0, str(tmp_path))
    try:
        example = importlib.import_module("example")
    finally:
        sys.path.remove(str(tmp_path))
    errors, checked, unreached = shape_comments.check(str(path), lambda: example.f(2, 5), {"K": 3})
    assert sorted({int(error.split(":")[1]) for error in errors}) == [7, 8, 9, 10, 11, 12, 13], errors
    assert checked == {3, 4, 7, 8, 9, 10, 11, 12} and unreached == {15}
