# SPDX-License-Identifier: MIT
"""What needs a GPU: pytest -m gpu. Captured update against eager update, a whole run, a replay that does not fit."""

import importlib

import numpy as np
import pytest
import torch
from test_common import AGENTS, experience, short, window

pytestmark = pytest.mark.gpu


@pytest.fixture(params=AGENTS)
def module(request):
    return importlib.import_module(request.param)


def updated(module, updates=8, **flags):
    """-> statistics of every update, and the weights after them, of an agent on the GPU."""
    _, replay = experience(module)  # on the CPU, so that all variants see the same rows
    args = module.resolve(module.Args(env_id="Tiny-both-discrete-v0", size="debug", device="cuda", warmup=1, **flags))
    envs = module.make_envs(args.env_id, 1, 0, args)
    torch.manual_seed(0)
    agent = module.Agent(envs.single_observation_space, envs.single_action_space, args)
    batch = window(module, agent, replay)
    torch.cuda.manual_seed(0)
    history = []
    for _ in range(updates):
        stats = agent.update({key: x.to(agent.device) for key, x in batch.items()})
        history.append({key: float(x) for key, x in stats.items()})
    return history, [p.detach().clone() for p in agent.params]


@pytest.mark.parametrize("bf16", [False, True])
def test_graph_equals_eager(module, bf16):
    """A captured update goes on where the eager ones stopped: finite, and as close as other random numbers allow."""
    (eager, _), (graph, after) = (updated(module, bf16=bf16, cuda_graph=on) for on in (False, True))
    for key in ("losses/total", "losses/image", "losses/dyn", "losses/critic"):
        a, b = (np.array([stats[key] for stats in history]) for history in (eager, graph))
        assert np.allclose(a[:3], b[:3], rtol=1e-2, atol=1e-3) and np.allclose(a, b, rtol=0.1, atol=0.05), (key, a, b)
    assert all(torch.isfinite(p).all() for p in after)


def test_run_on_gpu(module, tmp_path):
    """train, resume and evaluate; the replay lies on the GPU."""
    result = module.train(short(module, "Tiny-both-box-v0", tmp_path, device="cuda"))
    assert np.isfinite([x for key, x in result.items() if key.startswith("losses/")]).all()
    again = module.train(module.Args(resume=result["run_dir"], total_timesteps=160))
    assert again["global_step"] == 160
    agent, args = module.load_agent(result["run_dir"])
    assert agent.device.type == "cuda" and len(module.evaluate(agent, args, 3)) == 3


def test_replay_in_main_memory(module, tmp_path, monkeypatch):
    """Where the replay is too large for the GPU it moves to main memory, and what it stores is right all the same."""
    real = module.free_memory
    monkeypatch.setattr(module, "free_memory", lambda device: 0 if device.type == "cuda" else real(device))
    result = module.train(short(module, "Tiny-both-discrete-v0", tmp_path, device="cuda"))
    saved = module.load(next((tmp_path / result["run_dir"]).glob("replay/extras*")), "cpu")
    assert torch.isfinite(saved["deter"].float()).all() and saved["deter"].float().std() > 0
