# SPDX-License-Identifier: MIT
"""What is captured on a GPU, captured on the CPU by graphs.py: bit by bit what the eager functions do."""

import functools
import types

import graphs
import pytest
import torch
from helpers import AGENTS, act, captured, experience, gumbel_agent, merlin_agent, merlin_window, same, window
from torch.utils._python_dispatch import TorchDispatchMode

import ftw
import merlin


def test_the_recorder(monkeypatch):
    """The stand-in itself: state in place, frozen Python values, new random numbers, no reading on the host."""
    graphs.install(monkeypatch)
    state, number, graph = torch.zeros(3), [1.0], torch.cuda.CUDAGraph()
    torch.manual_seed(0)
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        drawn = torch.rand(3)
        total = (state.add_(number[0])[:2] * 2).sum()
    assert (state == 0).all()
    number[0] = 5.0
    torch.manual_seed(0)
    graph.replay(), graph.replay()
    assert (state == 2).all() and total == 8
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2, 3)[1], drawn)
    with pytest.raises(RuntimeError, match="not permitted"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            total.item()


def pair(module, monkeypatch, make):
    """-> an eager agent, and one of the same weights whose functions are then captured. make: () -> agent, ..."""
    eager = make()
    graphs.install(monkeypatch, module)
    return eager, make()


def compare(agents, call, times):
    """call(agent, i), with the same random state for both; then everything is the same, weights included."""
    for i in range(times):
        results = []
        for agent in agents:
            torch.manual_seed(i)
            results.append({key: x.clone() for key, x in call(agent, i).items()} | {"random": torch.get_rng_state()})
        assert same(*results), (i, [key for key in results[0] if not same(*(x[key] for x in results))])
    assert same(*(agent.state_dict() for agent in agents))
    states = [agent.optimizer.state for agent in agents]  # a list in files with an optimiser of their own
    assert same(*(x if isinstance(x, list) else list(x.values()) for x in states))


FLAGS = [(name, {}) for name in AGENTS] + [("dreamerv2", dict(rho=0.0, slow_every=3))]


@pytest.mark.parametrize("module,flags", FLAGS, indirect=["module"], ids=str)
def test_updates(module, flags, monkeypatch):
    """Other batches, weights loaded after the capture, a second shape, and the first again: as an eager agent."""
    check_updates(module, monkeypatch, **flags)


@pytest.mark.parametrize("variant", ["dreamerv2 schedules"], indirect=True)
def test_updates_of_patched_file(variant, monkeypatch):
    """What is annealed is not frozen at the capture."""
    check_updates(variant, monkeypatch)


def check_updates(module, monkeypatch, **flags):
    flags = dict(warmup=1, **flags)
    (eager, replay), (graph, _) = pair(module, monkeypatch, lambda: experience(module, **flags))
    captured(module, graph)
    batches = [window(module, eager, replay, B) for B in (4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 4)]
    batches = [{key: x.roll(i, 0) for key, x in batch.items()} for i, batch in enumerate(batches)]
    scaled = {key: x * 0.9 if x.is_floating_point() else x.clone() for key, x in eager.state_dict().items()}

    def update(agent, i):
        if i == 5:
            agent.load_state_dict(scaled)
        batch = {key: x.clone() for key, x in batches[i].items()}
        return {**agent.update(batch), **{f"batch/{key}": x for key, x in batch.items()}}

    count = graphs.Graph.captured
    compare((eager, graph), update, len(batches))
    assert graphs.Graph.captured == count + 2


@pytest.mark.parametrize("eval", [False, True])
def test_acting(module, eval, monkeypatch):
    """Two environments, one, and two again, with an update between: the same actions and states."""
    (eager, replay), (graph, _) = pair(module, monkeypatch, lambda: experience(module))
    eager.act, _ = functools.partial(eager.act, eval=eval), captured(module, graph, eval)
    states, batch = {}, window(module, eager, replay)

    def played(agent, i):
        N = 1 if 6 <= i < 12 else 2
        if i == 8:
            agent.update({key: x.clone() for key, x in batch.items()})
        state = states.get((id(agent), N), agent.initial(N))
        row = {key: x[i, :N] for key, x in replay.data.items()}
        action, states[id(agent), N] = act(agent, row, state)
        return {"played": torch.as_tensor(action), **states[id(agent), N]}

    compare((eager, graph), played, 16)


@pytest.mark.parametrize("agent", ["merlin", "rl_mem", "rl_lstm"])
def test_windows(agent, monkeypatch):
    """Windows played and learned from, where memory is written in place while acting."""
    (rows, eager), (_, graph) = pair(merlin, monkeypatch, lambda: merlin_agent(agent=agent))
    captured(merlin, graph)
    for group in graph.optimizer.param_groups + eager.optimizer.param_groups:
        group["capturable"] = True  # as on a GPU

    def learn(agent, i):
        batch = merlin_window(rows, agent, windows=2)[0]  # the second begins with a state that a graph gave
        return {**agent.update(batch), **{f"batch/{key}": x for key, x in batch.items()}}

    compare((eager, graph), learn, 6)


@pytest.mark.parametrize("flags", [dict(), dict(core="flat", memory="dnc"), dict(core="lstm")], ids=str)
def test_a_population(flags, tmp_path, monkeypatch):
    """Whole runs of ftw.py, with agents that are copied and genes that change after the capture. Of each agent acting
    is captured once, and the update twice: a match has windows of 8, 8 and 4 steps.
    """
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.dtype == torch.bool))  # ticks as on a GPU
    flags |= dict(size="debug", device="cpu", population=2, players=1, games=4, total_games=40, random_share=0)
    flags |= dict(evolve_every=8, evolve_above=0.45, rate_every=4, env_kwargs='{"length": 20}')
    eager = ftw.load(ftw.train(ftw.Args(**flags, run_root=str(tmp_path / "eager")))["run_dir"])
    graphs.install(monkeypatch, ftw)
    count = graphs.Graph.captured
    graph = ftw.load(ftw.train(ftw.Args(**flags, run_root=str(tmp_path / "graph")))["run_dir"])
    assert graphs.Graph.captured == count + 2 * 3
    for key in "now", "agents", "states":
        assert same(eager[key], graph[key]), key
    genes = torch.stack([part["agent"]["genes"] for part in graph["agents"]])
    assert ((genes[0] == genes[1]).sum() > 2) and (genes[0] != genes[1]).any()  # one is the mutated copy of the other


@pytest.mark.parametrize("estimator", ["st_gumbel_softmax", "reinforce", "muprop"])
def test_steps(estimator, monkeypatch):
    """Other images and other temperatures after the capture."""
    check_steps(lambda: gumbel_agent(latent="bernoulli", estimator=estimator), monkeypatch)


@pytest.mark.parametrize("variant", ["gumbel_softmax newer"], indirect=True)
def test_steps_of_patched_file(variant, monkeypatch):
    """REBAR draws its noise and takes slopes inside the step."""
    check_steps(lambda: gumbel_agent(variant, latent="bernoulli", estimator="rebar"), monkeypatch)


def check_steps(make, monkeypatch):
    agents = [make() for _ in range(2)]
    graphs.install(monkeypatch)
    agents[1].device, agents[1].side = types.SimpleNamespace(type="cuda"), torch.cuda.Stream()
    images = torch.rand(10, 8, 784).round()
    compare(agents, lambda agent, i: agent.update(images[i], 1 - i / 20), 10)


class Copies(TorchDispatchMode):
    """Finds copies from the host that wait until all work queued before is done."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            to, source = (args[0].device, args[1]) if "copy_" in func.name() else (kwargs.get("device"), args[0])
            late = kwargs.get("non_blocking", args[2:] == (True,))
            if to is not None and to.type != source.device.type == "cpu":
                self.found.append(late)
        return func(*args, **kwargs)


def test_rows_and_batches_do_not_wait(module):
    """What a row and a batch bring to a device is queued behind the update under way; "meta" is one without data."""
    agent, replay = experience(module)
    rows, meta = {key: x[3] for key, x in replay.data.items()}, torch.device("meta")
    obs_space = module.spaces.Dict({key: module.spaces.Box(0, 1, x) for key, x in agent.decoder.shapes.items()})
    extras = {key: (rows[key].shape[1:], rows[key].dtype) for key in ("deter", "stoch") if key in rows}
    there = module.Replay(1000, 2, obs_space, agent.action_space, meta, *([extras] if extras else []))
    row = {key: x.to(meta) if key in extras else x for key, x in rows.items()} | {"is_first": [True, True]}
    obs = {key: rows[key].numpy() for key in (*agent.decoder.shapes, "is_first")}
    agent.to(meta).device, given = meta, len(rows) - len(extras)
    state = agent.initial(2)
    with Copies() as copies:
        for _ in range(40):
            there.add(row)
        assert len(copies.found) == 40 * given
        there.sample(4, 5)
        assert len(copies.found) == 40 * given + 1
        agent.inputs(obs, state)
    assert len(copies.found) == 40 * given + 1 + len(obs) and all(copies.found)


class Doubled(torch.autograd.Function):
    """x (2 x) by small graphs of its own, whose backward pass runs inside the backward pass."""

    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            ctx.own = x.detach().requires_grad_()
            ctx.value = ctx.own * (2 * ctx.own)
        return ctx.value.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.value, ctx.own, grad)[0]


def test_backward_inside_backward(monkeypatch):
    """Is recorded too, so that the stand-in holds for a scan that differentiates its own steps."""
    graphs.install(monkeypatch)
    graph, x = torch.cuda.CUDAGraph(), torch.ones(3, requires_grad=True)
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        grad = torch.autograd.grad(Doubled.apply(x).sum(), x)[0]
    x.data.fill_(5.0)
    graph.replay()
    assert torch.equal(grad, torch.full((3,), 20.0))
