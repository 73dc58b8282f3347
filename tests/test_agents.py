# SPDX-License-Identifier: MIT
"""results/agents: weights small enough for the repository, which play as results/ says; results/agents.py makes them;
results/export.py gives a file for ONNX that acts as the agent does.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import agents  # noqa: E402

import dreamerv3  # noqa: E402

FOLDER = ROOT / "results" / "agents"


def module_of(path):
    """The file that made a checkpoint; it named the run."""
    return importlib.import_module(torch.load(path, weights_only=True)["args"]["exp_name"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.pt")), ids=lambda path: path.stem)
def test_weights(path):
    """At most 3 MiB each; today's version of their file loads them."""
    assert path.stat().st_size <= 3 * 2**20
    module = module_of(path)
    (module.load_population if hasattr(module, "load_population") else module.load_agent)(path)


def test_together():
    """At most 20 MiB."""
    assert 0 < sum(path.stat().st_size for path in FOLDER.glob("*.pt")) <= 20 * 2**20


def test_cartpole_is_held():
    """Three episodes, each of the most there is."""
    agent, args = dreamerv3.load_agent(FOLDER / "cartpole.pt", dreamerv3.Args(device="cpu"))
    assert dreamerv3.evaluate(agent, args, 3) == [500, 500, 500]


def test_cards_are_found():
    """Random play earns -7.2, a player who remembers 2."""
    merlin = importlib.import_module("merlin")
    agent, args = merlin.load_agent(FOLDER / "merlin_memory_game_6.pt", merlin.Args(device="cpu"))
    assert np.mean(merlin.evaluate(agent, args, 100)) > 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    flags = dict(size="debug", device="cpu", env_id="toy_envs:Tiny-both-box-v0", total_timesteps=60)
    result = dreamerv3.train(dreamerv3.Args(**flags, learning_starts=20, run_root=str(tmp_path_factory.mktemp("runs"))))
    return Path(result["run_dir"])


def test_shrink(run, tmp_path, capsys):
    """The same weights and flags, nothing else: --eval takes them, --resume needs more, in one line."""
    agents.shrink(run, tmp_path / "small" / "checkpoint.pt")
    before, after = dreamerv3.load_agent(run)[0], dreamerv3.load_agent(tmp_path / "small")[0]
    assert all(torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True))
    size, whole = ((path / "checkpoint.pt").stat().st_size for path in (tmp_path / "small", run))
    assert size < whole / 2 and [path.name for path in (tmp_path / "small").iterdir()] == ["checkpoint.pt"]
    with pytest.raises(SystemExit) as stop:
        dreamerv3.train(dreamerv3.Args(resume=str(tmp_path / "small")))
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_shrunk_population(tmp_path, capsys):
    """ftw.py: agents and ratings stay, but for the heads that only learn; --resume is refused."""
    ftw = importlib.import_module("ftw")
    result = ftw.train(ftw.Args(size="debug", device="cpu", total_games=8, run_root=str(tmp_path / "runs")))
    agents.shrink(result["run_dir"], tmp_path / "small" / "checkpoint.pt")
    (before, ratings, _), (after, same, _) = map(ftw.load_population, (result["run_dir"], tmp_path / "small"))
    assert ratings.tolist() == same.tolist() and len(before) == len(after) == 3
    for one, two in zip(before, after, strict=True):
        weights = {key: (x, two.state_dict()[key]) for key, x in one.state_dict().items()}
        gone = {key for key, (x, y) in weights.items() if not torch.equal(x, y)}
        assert gone == {key for key in weights if key.startswith(("value.", "sign_of_reward."))}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ftw.train(ftw.Args(resume=str(tmp_path / "small")))
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_export(run):
    """Images, vectors, actions of floats: six steps in onnxruntime are those of PyTorch."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    import export

    session = onnxruntime.InferenceSession(export.export(run))
    shapes = {x.name: x.shape for x in session.get_inputs()}
    agent, args = dreamerv3.load_agent(run)
    state, rng = agent.initial(1), np.random.default_rng(0)
    envs = dreamerv3.make_envs(args.env_id, 1, args.seed, args)
    row, step, keys = dreamerv3.start_row(envs, args.seed), export.Step(agent), ("deter", "stoch", "action")
    for _ in range(6):
        obs = {key: row[key] for key in agent.decoder.shapes}
        noise = rng.random(shapes["noise"], np.float32)
        given = {**obs, "is_first": row["is_first"], "noise": noise}
        given |= {f"last_{key}": x.numpy() for key, x in state.items()}
        results = session.run(keys, given)
        plain = {key: torch.as_tensor(x) for key, x in obs.items()}, torch.as_tensor(row["is_first"])
        with torch.no_grad():
            ours = step(*plain, torch.as_tensor(noise), *(state[key] for key in keys))
        for x, y in zip(ours, results, strict=True):
            np.testing.assert_allclose(y, x.numpy(), atol=1e-4)
        state = dict(zip(keys, ours, strict=True))
        row = dreamerv3.next_row(envs, agent.env_action(state), row)
    envs.close()
