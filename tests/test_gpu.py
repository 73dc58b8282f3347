# SPDX-License-Identifier: MIT
"""What needs a GPU: pytest -m gpu. Captured update against eager update, a whole run, a replay that does not fit.

TEST_DEVICE=cpu pytest -m gpu tests/test_gpu.py is a dry run, with the stand-in of graphs.py.
"""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import graphs
import kernels
import numpy as np
import pytest
import torch
from helpers import AGENTS, CONTEXT, captured, experience, known, merlin_agent, merlin_window, short, uniform, window

import ftw
import merlin

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("TEST_DEVICE", "cuda")


@pytest.fixture(autouse=DEVICE == "cpu")
def dry(monkeypatch):
    graphs.install(monkeypatch, *map(importlib.import_module, AGENTS))  # not merlin: Adam's counters lie on the CPU


def updated(module, updates=8, compile=False, **flags):
    """-> statistics of every update, and how weights changed, of an agent on the GPU. Each batch is another one."""
    _, replay = experience(module)  # on the CPU, so that all variants see the same rows
    flags = known(module, dict(env_id="Tiny-both-discrete-v0", size="debug", device=DEVICE, warmup=1, **flags))
    args = module.resolve(module.Args(**flags))
    envs = module.make_envs(args.env_id, 1, 0, args)
    torch.manual_seed(0)
    agent = module.Agent(envs.single_observation_space, envs.single_action_space, args)
    if compile:
        kernels.compiled(agent)
    captured(module, agent)
    batches = [uniform(replay, 4, args.batch_length + CONTEXT[module.__name__.split("_")[0]]) for _ in range(updates)]
    before, history = [p.detach().clone() for p in agent.params], []
    torch.manual_seed(0)
    for batch in batches:
        stats = agent.update({key: x.to(agent.device) for key, x in batch.items()})
        history.append({key: float(x) for key, x in stats.items() if x.dim() == 0})
    return history, torch.cat([(p.detach() - q).flatten() for p, q in zip(agent.params, before, strict=True)])


VARIANTS = [(name, {}) for name in AGENTS]
VARIANTS += [("dreamerv2", dict(rho=0.0, slow_every=3))]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "module,flags", VARIANTS, indirect=["module"], ids=lambda x: x if isinstance(x, str) else "-".join(x) or "plain"
)
def test_graph_equals_eager(module, bf16, flags):
    """A graph draws the random numbers that eager updates draw, so that only the order of sums differs: all losses, and
    the way that weights have gone, which is random where gradients are nothing but rounding.
    """
    check_graph(module, bf16, **flags)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("variant", ["dreamerv2 schedules", "dreamerv2 gaussian"], indirect=True)
def test_graph_equals_eager_in_patched_files(variant, bf16, monkeypatch):
    """The same with patches of results/ablations."""
    if DEVICE == "cpu":
        graphs.install(monkeypatch, variant)
    check_graph(variant, bf16)


def check_graph(module, bf16, **flags):
    (eager, way), (graph, way2) = (updated(module, bf16=bf16, cuda_graph=on, **flags) for on in (False, True))
    close = dict(rtol=3e-2, atol=3e-2) if bf16 else dict(rtol=1e-3, atol=1e-3)
    for i, stats in enumerate(eager):
        for key in (key for key in stats if key.startswith("losses/")):
            assert np.isclose(stats[key], graph[i][key], **close), f"update {i}, captured from 3 on: {key}"
    assert (way - way2).norm() < (1.0 if bf16 else 0.3) * way.norm() and way.norm() > 0


if DEVICE == "cuda":  # the dry run records operations, which a compiler hides

    def test_compiled_equals_plain():
        """dreamerv3: compiled steps inside the captured update change roundings only."""
        module = importlib.import_module("dreamerv3")
        (plain, way), (fast, way2) = (updated(module, bf16=False, compile=on) for on in (False, True))
        for i, stats in enumerate(plain):
            for key in (key for key in stats if key.startswith("losses/")):
                assert np.isclose(stats[key], fast[i][key], rtol=1e-2, atol=1e-2), f"update {i}: {key}"
        assert (way - way2).norm() < 0.5 * way.norm() and way.norm() > 0


def test_run_on_gpu(module, tmp_path):
    """train, resume and evaluate; the replay lies on the GPU."""
    result = module.train(short(module, "Tiny-both-box-v0", tmp_path, device=DEVICE))
    assert np.isfinite([x for key, x in result.items() if key.startswith("losses/")]).all()
    again = module.train(module.Args(resume=result["run_dir"], total_timesteps=160))
    assert again["global_step"] == 160
    agent, args = module.load_agent(result["run_dir"])
    assert agent.device.type == DEVICE and len(module.evaluate(agent, args, 3)) == 3


def test_random_state(module):
    """A graph draws from where a saved random state says; evaluation, with graphs of its own, leaves the state."""
    args = module.resolve(module.Args(env_id="Tiny-both-box-v0", size="debug", device=DEVICE))
    envs, random = module.make_envs(args.env_id, 2, 0, args), torch.cuda if DEVICE == "cuda" else torch
    agent = module.Agent(envs.single_observation_space, envs.single_action_space, args)
    real, row, state, actions = agent.act, module.start_row(envs, 0), agent.initial(2), []
    run = captured(module, agent).act
    for i in range(8):
        if i == 5:  # captured at the fourth
            saved, agent.act = random.get_rng_state(), real
            module.evaluate(agent, args, 3)
            assert torch.equal(random.get_rng_state(), saved), "evaluate"
        if i == 7:
            random.set_rng_state(saved)
        actions.append(agent.env_action(run(agent.inputs(row, state))).copy())  # a CPU shares the memory
    assert np.allclose(actions[5], actions[7], atol=1e-5) and not np.allclose(actions[5], actions[6], atol=1e-3)


def test_replay_in_main_memory(module, made, tmp_path, monkeypatch):
    """Where the replay is too large for the GPU it moves to main memory, and what it stores is right all the same."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    result = module.train(short(module, "Tiny-both-discrete-v0", tmp_path, device=DEVICE))
    assert made["Replay"][0].device.type == "cpu"
    saved = module.load(next((tmp_path / result["run_dir"]).glob("replay/*")))
    key = "deter" if "deter" in saved else "vector"
    assert torch.isfinite(saved[key].float()).all() and saved[key].float().std() > 0


@pytest.mark.parametrize("on", [True, False])
def test_captured_plans(on):
    """planet: plans for 1, 8 and again 1 environments, captured each, are drawn anew and follow the weights."""
    module = importlib.import_module("planet")
    args = module.resolve(module.Args(env_id="Pendulum-v1", size="debug", device=DEVICE, cuda_graph=on))
    envs = module.make_envs(args.env_id, 1, 0, args)
    agent, plans = module.Agent(envs.single_observation_space, envs.single_action_space, args), []
    plan = module.Captured(agent.plan, on and agent.device.type == "cuda")
    for N in [1] * 6 + [8] * 6 + [1] * 6:
        plans.append(plan(agent.rssm.initial(N))["action"].clone())
        assert plans[-1].shape == (N, 1) and torch.isfinite(plans[-1]).all() and plans[-1].abs().max() <= 1
    assert not any(torch.equal(a, b) for a, b in zip(plans, plans[1:], strict=False) if a.shape == b.shape)
    before = []
    for sign in 1, -1:
        agent.reward[-1].weight.data *= sign
        torch.manual_seed(0)
        before.append(plan(agent.rssm.initial(1))["action"].clone())
    assert not torch.allclose(*before, atol=1e-2), "other rewards, the same plan"


@pytest.mark.parametrize("name", ["dreamerv2", "dreamerv3"])
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_captured_acting(name, action):
    """Captured acting follows the weights: after an update it does what an eager agent of the same weights does."""
    module, agents = importlib.import_module(name), []
    _, replay = experience(module, f"Tiny-both-{action}-v0")
    for on in False, True:
        flags = dict(env_id=f"Tiny-both-{action}-v0", size="debug", device=DEVICE, warmup=1, bf16=False, cuda_graph=on)
        args = module.resolve(module.Args(**known(module, flags)))
        envs = module.make_envs(args.env_id, 1, 0, args)
        torch.manual_seed(0)
        agents.append(module.Agent(envs.single_observation_space, envs.single_action_space, args))
    eager, graph = agents[0], captured(module, agents[1], eval=True)
    eager.act = functools.partial(eager.act, eval=True)
    batch = {key: x.to(eager.device) for key, x in window(module, eager, replay).items()}
    row = {key: batch[key][:, 0] for key in eager.decoder.shapes} | {"is_first": batch["is_first"][:, 0] | True}
    inputs = eager.inputs(row, eager.initial(len(batch["is_first"])))
    for _ in range(6):
        for _ in range(6):  # captured at the fourth
            graph.act(inputs)
        graph.update({key: x.clone() for key, x in batch.items()})
        eager.load_state_dict(graph.state_dict())
        states = [agent.act(inputs)["deter"] for agent in agents]
        assert torch.allclose(*states, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("agent", ["merlin", "rl_mem", "rl_lstm"])
def test_merlin_graphs_equal_eager(agent):
    """merlin: captured updates, on another batch each, are the eager ones; and captured acting follows the weights."""
    flags = dict(agent=agent, device=DEVICE, bf16=False)
    (envs, graph), (_, eager) = (merlin_agent(**flags, cuda_graph=on) for on in (True, False))
    captured(merlin, graph)
    batches, before = [merlin_window(envs, eager, windows=n)[0] for n in range(1, 9)], eager.state_dict()
    before = {key: x.clone() for key, x in before.items()}
    for i, batch in enumerate(batches):
        a, b = ({key: float(x) for key, x in made.update(batch).items()} for made in (graph, eager))
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), f"update {i}, captured from 3 on: {key}"
    ways = [[made.state_dict()[key] - x for key, x in before.items()] for made in (graph, eager)]
    way, way2 = (torch.cat([x.flatten() for x in way]) for way in ways)
    assert (way - way2).norm() < 0.3 * way.norm() and way.norm() > 0
    for batch in batches[:3]:
        eager.load_state_dict(graph.state_dict())
        row, state = merlin.start_row(envs, 0), graph.initial(envs.num_envs)
        for _ in range(6):  # captured at the fourth
            inputs, results = graph.inputs(row, state), []
            for made in graph, eager:
                torch.manual_seed(0)
                results.append({key: x.clone() for key, x in made.act(inputs).items()})
            assert all(torch.allclose(x, results[1][key], rtol=1e-3, atol=1e-4) for key, x in results[0].items())
            state = results[0]
            row = merlin.next_row(envs, graph.env_action(state), row)
        graph.update(batch)


@pytest.mark.parametrize("agent", ["merlin", "rl_mem", "rl_lstm"])
def test_merlin_on_gpu(agent, tmp_path):
    """merlin: a run from graphs; it goes on, on this device and the other."""
    flags = dict(agent=agent, size="debug", total_timesteps=2_000, checkpoint_every=10_000, device=DEVICE)
    result = merlin.train(merlin.Args(**flags, run_root=str(tmp_path)))
    for device in (DEVICE, "cpu"):
        steps = result["global_step"] + 300
        result = merlin.train(merlin.Args(resume=result["run_dir"], total_timesteps=steps, device=device))
        assert result["global_step"] >= steps and np.isfinite(result["losses/total"])


@pytest.mark.parametrize("flags", [dict(), dict(core="flat", memory="dnc"), dict(core="lstm")])
def test_ftw_graphs_equal_eager(flags):
    """ftw: captured updates, on another window each, are the eager ones; so is what captured acting does."""
    args, agents = ftw.resolve(ftw.Args(size="debug", device=DEVICE, bf16=False, **flags)), []
    game = ftw.make_game(args, 4, 0)
    for _ in range(2):
        torch.manual_seed(0)
        agents.append(ftw.make_population(args, game, np.random.default_rng(0))[0])
    graph, eager = agents
    on = graph.device.type == "cuda"
    update, act = ftw.Captured(graph.update, on), ftw.Captured(graph.act, on)
    match = ftw.Match(game, [eager], np.zeros((4, 4), int), {0: eager.act})
    for i in range(8):
        batch = match.window(8)[0]
        a, b = ({key: float(x) for key, x in fn(dict(batch)).items()} for fn in (update, eager.update))
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), f"update {i}, captured from 3 on: {key}"
        inputs = {key: batch[key][:, 0] for key in ("obs", "reward", "ticks")} | match.states[0]
        states = [fn(inputs)["state/h"].clone() for fn in (act, eager.act)]  # of before the noise of this step
        assert torch.allclose(*states, rtol=1e-3, atol=1e-3)


def test_ftw_on_gpu(tmp_path):
    """ftw: a run from graphs, with as many places as come; it goes on, on this device and the other."""
    flags = dict(size="debug", run_root=str(tmp_path), env_kwargs='{"length": 16}', population=5)
    result = ftw.train(ftw.Args(device=DEVICE, **flags))
    for device in DEVICE, "cpu":
        games = result["games"] + 20  # two batches: debug plays two for each of five agents at once
        result = ftw.train(ftw.Args(resume=result["run_dir"], total_games=games, device=device))
        assert result["games"] == games and np.isfinite(result["losses/total"])
    assert ftw.train(ftw.Args(eval=result["run_dir"], eval_games=4, device=DEVICE))["table"]


def test_ranks(tmp_path):
    """results/ranks.py, one rank: its updates, captured in pieces, square the same gradients as eager ones."""
    saved, root = {}, Path(__file__).parent.parent
    fixed = f"--env-id toy_envs:Tiny-both-discrete-v0 --size debug --device {DEVICE} --no-bf16 --total-timesteps 120"
    fixed += " --batch-size 4 --batch-length 8 --learning-starts 20"
    for flag in "--no-cuda-graph", "--cuda-graph":
        out = str(tmp_path / flag[2:])
        start = [sys.executable, *"-m torch.distributed.run --standalone tests/ranks_run.py".split(), out]
        flags = ["dreamerv3.py", *fixed.split(), "--run-root", out, flag]
        environ = {**os.environ, "GRAPHS": "1" if DEVICE == "cpu" and flag == "--cuda-graph" else ""}
        environ["PYTHONPATH"] = os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])
        result = subprocess.run([*start, *flags], cwd=root, env=environ, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
        state = torch.load(next(Path(out).glob("*/checkpoint.pt")), map_location="cpu")
        squares = state["optimizer"][: len(state["optimizer"]) // 2]  # means of squared gradients, from zero on
        saved[flag] = torch.cat([x.flatten() for x in squares])
        assert state["now"]["updates"] >= 6
    eager, pieces = saved.values()
    assert (eager - pieces).norm() < 1e-3 * eager.norm()
