# SPDX-License-Identifier: MIT
"""What needs a GPU: pytest -m gpu. Captured update against eager update, a whole run, a replay that does not fit."""

import importlib

import numpy as np
import pytest
import test_merlin
import torch
from test_common import AGENTS, experience, known, short, window

pytestmark = pytest.mark.gpu


@pytest.fixture(params=AGENTS)
def module(request):
    return importlib.import_module(request.param)


def updated(module, updates=8, **flags):
    """-> statistics of every update, and the weights after them, of an agent on the GPU."""
    _, replay = experience(module)  # on the CPU, so that all variants see the same rows
    flags = known(module, dict(env_id="Tiny-both-discrete-v0", size="debug", device="cuda", warmup=1, **flags))
    args = module.resolve(module.Args(**flags))
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


VARIANTS = [(name, {}) for name in AGENTS]
VARIANTS += [("dreamerv3", dict(compile=True))]
VARIANTS += [("dreamerv2", x) for x in (dict(rho=0.0, slow_every=3), dict(schedules=True), dict(latent="gaussian"))]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "module,variant", VARIANTS, indirect=["module"], ids=lambda x: x if isinstance(x, str) else "-".join(x) or "plain"
)
def test_graph_equals_eager(module, bf16, variant):
    """A captured update goes on where the eager ones stopped: finite, and as close as other random numbers allow."""
    (eager, _), (graph, after) = (updated(module, bf16=bf16, cuda_graph=on, **variant) for on in (False, True))
    for key in {"losses/total", "losses/image", "losses/dyn", "losses/kl", "losses/critic"} & eager[0].keys():
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
    saved = module.load(next((tmp_path / result["run_dir"]).glob("replay/*")), "cpu")
    key = "deter" if "deter" in saved else "vector"
    assert torch.isfinite(saved[key].float()).all() and saved[key].float().std() > 0


@pytest.mark.parametrize("on", [True, False])
def test_captured_plans(on):
    """planet: plans for 1, 8 and again 1 environments, captured each, are drawn anew and follow the weights."""
    module = importlib.import_module("planet")
    args = module.resolve(module.Args(env_id="Pendulum-v1", size="debug", device="cuda", cuda_graph=on))
    envs = module.make_envs(args.env_id, 1, 0, args)
    agent, plans = module.Agent(envs.single_observation_space, envs.single_action_space, args), []
    for N in [1] * 6 + [8] * 6 + [1] * 6:
        plans.append(agent.captured_plan(agent.rssm.initial(N))["action"].clone())
        assert plans[-1].shape == (N, 1) and torch.isfinite(plans[-1]).all() and plans[-1].abs().max() <= 1
    assert not any(torch.equal(a, b) for a, b in zip(plans, plans[1:], strict=False) if a.shape == b.shape)
    for p in agent.reward.parameters():
        p.data.zero_()
    assert torch.isfinite(agent.captured_plan(agent.rssm.initial(1))["action"]).all()


@pytest.mark.parametrize("name", ["dreamerv2", "dreamerv3"])
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_captured_acting(name, action):
    """Captured acting follows the weights: after an update it does what an eager agent of the same weights does."""
    module, agents = importlib.import_module(name), []
    _, replay = experience(module, f"Tiny-both-{action}-v0")
    for on in False, True:
        flags = dict(env_id=f"Tiny-both-{action}-v0", size="debug", device="cuda", warmup=1, bf16=False, cuda_graph=on)
        args = module.resolve(module.Args(**known(module, flags)))
        envs = module.make_envs(args.env_id, 1, 0, args)
        torch.manual_seed(0)
        agents.append(module.Agent(envs.single_observation_space, envs.single_action_space, args))
    eager, graph = agents
    batch = {key: x.to(eager.device) for key, x in window(module, eager, replay).items()}
    obs, first = {key: batch[key][:, 0] for key in eager.decoder.shapes}, batch["is_first"][:, 0] | True
    begin = eager.initial(len(first))
    for _ in range(6):
        for _ in range(6):  # captured at the fourth
            graph.act(obs, first, begin, eval=True)
        graph.update({key: x.clone() for key, x in batch.items()})
        eager.load_state_dict(graph.state_dict())
        states = [agent.act(obs, first, begin, eval=True)[1]["deter"] for agent in agents]
        assert torch.allclose(*states, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("agent", ["merlin", "rl_mem", "rl_lstm"])
def test_merlin_graphs_equal_eager(agent):
    """merlin: a captured update is the eager one, which draws nothing; and captured acting follows the weights."""
    flags = dict(agent=agent, device="cuda", bf16=False)
    (envs, graph), (_, eager) = (test_merlin.made(**flags, cuda_graph=on) for on in (True, False))
    batch = test_merlin.window(envs, eager)[0]
    for _ in range(8):
        a, b = (made.update(batch) for made in (graph, eager))
        assert {key: float(x) for key, x in a.items()} == pytest.approx({key: float(b[key]) for key in a}, rel=1e-3)
    real, logits = graph.captured_act, []
    graph.captured_act = lambda inputs: logits.append((out := real(inputs))["logits"].clone()) or out
    for _ in range(3):  # captured at the fourth step of the first window
        del logits[:]
        batch = test_merlin.window(envs, graph)[0]
        with torch.no_grad():
            again = graph.unroll(batch)["logits"][:, :-1]
        assert torch.allclose(again, torch.stack(logits, 1), rtol=1e-3, atol=1e-4)
        graph.update(batch)


@pytest.mark.parametrize("agent", ["merlin", "rl_mem", "rl_lstm"])
def test_merlin_on_gpu(agent, tmp_path):
    """merlin: captured acting and updates learn as eager ones do; a run goes on, on this device and the other."""
    merlin = importlib.import_module("merlin")
    flags = dict(agent=agent, size="debug", total_timesteps=3_000, checkpoint_every=10_000, device="cuda")
    results = []
    for on in (False, True):
        results.append(merlin.train(merlin.Args(**flags, cuda_graph=on, run_root=str(tmp_path / str(on)))))
    for key in ("losses/total", "stats/policy_entropy"):
        assert np.isclose(*[result[key] for result in results], rtol=0.5, atol=0.1), key
    for device in ("cuda", "cpu"):
        steps = results[1]["global_step"] + 300
        results[1] = merlin.train(merlin.Args(resume=results[1]["run_dir"], total_timesteps=steps, device=device))
        assert results[1]["global_step"] >= steps and np.isfinite(results[1]["losses/total"])
