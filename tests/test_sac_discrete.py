# SPDX-License-Identifier: MIT
"""sac_discrete.py: gradients against the exact one, losses by hand, transitions as they were played, runs, faults."""

import dataclasses
import pathlib

import gymnasium as gym
import numpy as np
import pytest
import sac_discrete as module
import torch
import toy_envs
from helpers import Evil, full_disk, same
from torch.utils.tensorboard import SummaryWriter

SAMPLED = list(module.ESTIMATORS)
EVERY = ["exact", *SAMPLED]
TINY = "Tiny-vector-discrete-v0"  # three actions, five numbers to see, episodes of 3 to 9 steps that end in both ways
sampled, every = pytest.mark.parametrize("name", SAMPLED), pytest.mark.parametrize("name", EVERY)


def agent_of(**flags):
    torch.manual_seed(0)
    args = module.resolve(module.Args(size="debug", **flags))
    return module.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(3), args)


def batch_of(B=32, seed=0):
    random = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=random)
    whole = lambda high: torch.randint(high, (B,), generator=random)
    return dict(obs=randn(B, 4), next_obs=randn(B, 4), reward=randn(B), action=whole(3), is_terminal=whole(2).bool())


class Payoffs(torch.nn.Module):
    """A critic of a bandit: f of the last three inputs, the action. (B, 4 + 3) -> (B, 1)"""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, inputs):
        return self.f(inputs[:, 4:])[:, None]


LINEAR = torch.tensor([1.0, -0.5, 0.2])
SQUARE = torch.tensor([[0.5, -1.0, 0.3], [0.2, 0.1, -0.6], [0.4, 0.9, -1.2]])
linear = lambda a: a @ LINEAR
square = lambda a: (a @ SQUARE * a).sum(-1)
cubic = lambda a: (a @ LINEAR + 0.3) ** 3
LOGITS = torch.tensor([0.3, -0.4, 0.6])


def gradients(name, f, temperature=1.0, samples=200_000):
    """-> estimates of the gradient of a bandit's mean payoff to LOGITS (samples, 3), the exact gradient (3,)."""
    rows, found = LOGITS.expand(samples, 3).clone().requires_grad_(), []
    for estimator, count in (name, samples), ("exact", 2):
        agent = agent_of(estimator=estimator, temperature=temperature)
        agent.critics = torch.nn.ModuleList([Payoffs(f), Payoffs(f)])
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad(agent.gain(torch.zeros(count, 4), rows[:count]).sum(), rows)
        found.append(gradient[:count])
    return found[0], found[1][0]


def deviation(estimates, exact):
    """Largest distance of the mean from the exact value, in standard errors."""
    error = (estimates.std(0) / len(estimates) ** 0.5).clamp(min=1e-6)  # of rounding, where there is no noise
    return ((estimates.mean(0) - exact).abs() / error).max().item()


# --- gradients on a bandit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [linear, square, cubic])
def test_exact_gradient(f):
    """d/dlogits of sum_a p(a) q(a) is p (q - p.q), whatever the payoff is between the vertices."""
    _, exact = gradients("exact", f)
    p, q = LOGITS.softmax(0), f(torch.eye(3))
    torch.testing.assert_close(exact, p * (q - p @ q))


def test_straight_through_is_exact_where_theory_says():
    """st for a linear payoff, reinmax for a quadratic one, in the mean; st is off for that one, reinmax for a cubic."""
    assert deviation(*gradients("st", linear)) < 4.5 and deviation(*gradients("reinmax", linear)) < 4.5
    assert deviation(*gradients("reinmax", square)) < 4.5
    assert deviation(*gradients("st", square)) > 20 and deviation(*gradients("reinmax", cubic)) > 20


@sampled
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gradients_point_upwards(name, temperature):
    """Each estimator's mean gradient has the sign of the exact one in all actions, for a linear payoff."""
    estimates, exact = gradients(name, linear, temperature)
    error = estimates.std(0) / len(estimates) ** 0.5
    assert (estimates.mean(0) * exact.sign() > 4.5 * error).all()


@pytest.mark.parametrize(
    ("name", "f"), [("gumbel_softmax", square), ("gumbel_softmax", cubic), ("st_gumbel_softmax", square)]
)
def test_small_temperature(name, f):
    """The bias falls with the temperature: at 0.05 within 4% of the exact gradient, at 1 far off."""
    relative = lambda estimates, exact: ((estimates.mean(0) - exact).norm() / exact.norm()).item()
    assert relative(*gradients(name, f, 0.05)) < 0.04 < 0.3 < relative(*gradients(name, f, 1.0))


@sampled
def test_samples(name):
    """Straight-through actions are vertices, drawn by the policy; gumbel_softmax is inside, its arg-max drawn so."""
    torch.manual_seed(0)
    action = module.ESTIMATORS[name](LOGITS.expand(100_000, 3), 0.7)
    torch.testing.assert_close(action.sum(-1), torch.ones(100_000))
    assert (name == "gumbel_softmax") == bool(((action > 0.01) & (action < 0.99)).any())
    picked, p = torch.eye(3)[action.argmax(-1)], LOGITS.softmax(0)
    assert ((picked.mean(0) - p).abs() < 4.5 * (p * (1 - p) / 100_000).sqrt()).all()


def test_noise_is_finite(monkeypatch):
    """A uniform number that is 0 gives a large number, not infinity."""
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert torch.isfinite(module.gumbel(torch.zeros(3))).all()


# --- update -----------------------------------------------------------------------------------------------------------


@every
def test_losses_by_hand(name):
    """Critics' loss against targets of plain loops: both slow critics' smaller value, minus alpha ln pi, over all
    actions; nothing after a terminal state, but after a truncated one. Actor and alpha from their definitions.
    """
    agent, batch = agent_of(estimator=name), batch_of()
    with torch.no_grad():
        agent.log_alpha.fill_(-0.7)
        for param in agent.slow_critics.parameters():
            param.add_(0.1 * torch.randn_like(param))
    alpha, total, q_of = np.exp(-0.7), 0.0, lambda net, obs, a: net(torch.cat([obs, torch.eye(3)[a]])).item()
    for b in range(32):
        after, obs = batch["next_obs"][b], batch["obs"][b]
        logp = agent.actor(after).log_softmax(-1)
        soft = [min(q_of(net, after, a) for net in agent.slow_critics) - alpha * logp[a].item() for a in range(3)]
        soft = sum(logp[a].exp().item() * soft[a] for a in range(3))
        target = batch["reward"][b].item() + (0 if batch["is_terminal"][b] else 0.99 * soft)
        total += sum((q_of(net, obs, batch["action"][b]) - target) ** 2 for net in agent.critics) / 32
    p = agent.actor(batch["obs"]).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    table = lambda net: torch.tensor([[q_of(net, obs, a) for a in range(3)] for obs in batch["obs"]])
    q = torch.stack([table(net) for net in agent.critics])
    stats = {key: x.item() for key, x in agent.update(batch).items()}
    assert stats["losses/critic"] == pytest.approx(total, rel=1e-4)
    assert stats["stats/entropy"] == pytest.approx(entropy, rel=1e-4)
    assert stats["losses/alpha"] == pytest.approx(-0.7 * (entropy - agent.args.target_entropy * np.log(3)), rel=1e-4)
    if name == "exact":
        value = (p * q.amin(0)).sum(-1).mean().item()
        assert stats["losses/actor"] == pytest.approx(-value - alpha * entropy, rel=1e-4)


@every
def test_who_learns_from_what(name):
    """Each loss moves its own parameters only; slow critics follow by slow_rate, and by nothing else."""
    agent, batch = agent_of(estimator=name, slow_rate=0.25, learning_rate=1e-2), batch_of()
    before = {key: x.clone() for key, x in agent.state_dict().items()}
    agent.update(batch)
    moved = agent.state_dict()
    assert all(not torch.equal(before[key], moved[key]) for key in before if not key.startswith(("slow", "scale")))
    for key in before:
        if "slow_critics" in key:
            mixed = before[key].lerp(moved[key.replace("slow_critics", "critics")], 0.25)
            torch.testing.assert_close(moved[key], mixed)
    agent.load_state_dict(before)
    inputs = torch.cat([batch["obs"], torch.eye(3)[batch["action"]]], -1)
    with torch.no_grad():
        p = agent.actor(batch["next_obs"]).softmax(-1)
        q = agent.values(agent.slow_critics, batch["next_obs"])
        soft = (p * (q - agent.log_alpha.exp() * p.log())).sum(-1)
        target = batch["reward"] + 0.99 * ~batch["is_terminal"] * soft
    loss = sum((net(inputs)[:, 0] - target).square().mean() for net in agent.critics)
    params = list(agent.critics.parameters())
    for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        torch.testing.assert_close(param.grad, grad)


def test_scale():
    """The networks see observations divided by --obs-scale: other units with their divisors change nothing."""
    scale, batch = (1e-2, 1.0, 30.0, 5.0), batch_of()
    agents = [agent_of(estimator="exact", **flags) for flags in ({}, dict(obs_scale=scale))]
    other = {**batch, **{key: batch[key] * torch.tensor(scale) for key in ("obs", "next_obs")}}
    stats = [agent.update(x) for agent, x in zip(agents, (batch, other), strict=True)]
    assert all(stats[0][key].item() == pytest.approx(stats[1][key].item(), rel=1e-4) for key in stats[0])
    actions = [agent.act(x["obs"].numpy(), eval=True) for agent, x in zip(agents, (batch, other), strict=True)]
    assert np.array_equal(*actions)


@every
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_target_entropy_is_reached(name, share):
    """A bandit whose best action is known: the policy's entropy comes to its target, with the best action on top."""
    agent = agent_of(estimator=name, target_entropy=share, learning_rate=1e-2, temperature=0.5)
    pays, entropies = torch.tensor([0.0, 1.0, 0.5]), []
    for step in range(700):
        action, obs = torch.randint(3, (64,)), torch.zeros(64, 4)
        batch = dict(obs=obs, next_obs=obs, reward=pays[action], action=action, is_terminal=torch.ones(64).bool())
        stats = agent.update(batch)
        entropies += [stats["stats/entropy"].item()] * (step >= 500)
    assert np.mean(entropies) == pytest.approx(share * np.log(3), rel=0.1)
    assert agent.act(np.zeros((1, 4)), eval=True).tolist() == [1]


@every
def test_certain_policy(name):
    """Where the probability of an action is 0 in float32, the gradients are still finite."""
    agent = agent_of(estimator=name)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([300.0, 0.0, -300.0]))
    module.finite(agent.update(batch_of()))
    assert all(torch.isfinite(param.grad).all() for param in agent.actor.parameters())


def test_act():
    """Samples follow the policy, of float64 observations too; with eval always the most likely action."""
    agent = agent_of()
    obs = np.tile([0.3, -0.2, 0.5, 0.1], (20_000, 1))
    p = agent.actor(torch.tensor(obs[0]).float()).softmax(-1).detach().numpy()
    share = np.bincount(agent.act(obs), minlength=3) / len(obs)
    assert (np.abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / len(obs))).all()
    assert set(agent.act(obs, eval=True).tolist()) == {p.argmax()}


# --- replay and loop --------------------------------------------------------------------------------------------------


def test_replay():
    """The ring keeps the newest transitions, only those to keep, and draws each of them equally often."""
    replay = module.Replay(10, gym.spaces.Box(-1, 1, (1,)), "cpu")
    for step in range(9):
        numbers = np.array([2 * step, 2 * step + 1])
        new = dict(obs=numbers[:, None], action=numbers, reward=numbers, next_obs=numbers[:, None] + 0.5)
        new["is_terminal"] = numbers % 2 == 1
        replay.add(np.array([True, step % 3 > 0]), *new.values())
    kept = [n for n in range(18) if n % 2 == 0 or n // 2 % 3][-10:]
    torch.manual_seed(0)
    batch = replay.sample(20_000)
    counts = np.bincount(batch["action"], minlength=18)
    assert np.flatnonzero(counts).tolist() == kept and (np.abs(counts[kept] - 2000) < 4.5 * 1800**0.5).all()
    assert torch.equal(batch["obs"][:, 0], batch["action"].float()) and torch.equal(batch["reward"], batch["obs"][:, 0])
    assert torch.equal(batch["next_obs"], batch["obs"] + 0.5)
    assert torch.equal(batch["is_terminal"], batch["action"] % 2 == 1)


@pytest.fixture
def run(tmp_path):
    """-> train with these flags on a tiny environment -> its result."""
    flags = dict(env_id=TINY, size="debug", num_envs=3, total_timesteps=150, learning_starts=20, checkpoint_every=60)
    flags |= dict(batch_size=8, eval_episodes=3, update_ratio=0.5, run_root=str(tmp_path))
    return lambda **more: module.train(module.Args(**{**flags, **more}))


@pytest.fixture
def plays(monkeypatch):
    """{environment: [(observation before, action, step's results)]} of everything that is played."""
    seen, reset, step = {}, toy_envs.Tiny.reset, toy_envs.Tiny.step

    def noted_reset(self, **kwargs):
        self.seen, info = reset(self, **kwargs)
        return self.seen, info

    def noted_step(self, action):
        result = step(self, action)
        seen.setdefault(self, []).append((self.seen, action, *result[:3]))
        self.seen = result[0]
        return result

    monkeypatch.setattr(toy_envs.Tiny, "reset", noted_reset)
    monkeypatch.setattr(toy_envs.Tiny, "step", noted_step)
    return seen


@pytest.mark.parametrize("num_envs", [1, 3])
def test_transitions(run, plays, monkeypatch, num_envs):
    """The replay holds what each environment itself received and gave, no transition leads to a reset; a truncated end
    is not terminal; every action that an environment received is a step, and update_ratio of them are updates.
    """
    monkeypatch.setattr(module, "evaluate", lambda agent, args: [0.0])
    result = run(num_envs=num_envs)
    played = [x for steps in plays.values() for x in steps]
    assert len(plays) == num_envs and 150 <= result["global_step"] == len(played) < 150 + num_envs
    data, count = module.load(result["run_dir"])["replay"]
    began = sum(obs[1] == 0 for obs, *_ in played)  # the second number counts the steps of an episode
    assert count == len(played) and 0 < data["is_terminal"].sum() < began - num_envs
    key = lambda obs, action, reward, after, end: (*map(float, (*obs, action, reward, *after)), bool(end))
    theirs = [key(obs, action, reward, after, end) for obs, action, after, reward, end in played]
    assert sorted(key(*(ring[i] for ring in data.values())) for i in range(count)) == sorted(theirs)
    assert result["updates"] == np.ceil((result["global_step"] - 20) * 0.5)


def test_disk_is_full(run, tmp_path, monkeypatch):
    """No space while a checkpoint is written: the one before stays, no half file is left."""
    full_disk(monkeypatch)
    with pytest.raises(RuntimeError, match="step 12.: OSError: .*No space"):
        run()
    (folder,) = tmp_path.iterdir()
    assert 60 <= module.load(folder)["now"][0] < 63
    assert all(x.name == "checkpoint.pt" or x.name.startswith("events.") for x in folder.iterdir())


def test_evaluate(run, plays):
    """One whole episode of each environment, by the most likely action; the caller's random state is left alone."""
    agent, args, _ = module.load_agent(run()["run_dir"])
    plays.clear()
    state = torch.get_rng_state()
    returns = module.evaluate(agent, dataclasses.replace(args, eval_episodes=4))
    assert torch.equal(torch.get_rng_state(), state) and len(plays) == len(returns) == 4
    for score, played in zip(returns, plays.values(), strict=True):
        starts = [i for i, (obs, *_) in enumerate(played) if obs[1] == 0]
        first = played[: [*starts, len(played)][1]]
        assert score == pytest.approx(sum(reward for *_, reward, _ in first))
        assert [x[1] for x in first] == agent.act(np.array([x[0] for x in first]), eval=True).tolist()


@every
def test_debug_run(name, tmp_path):
    """--size debug trains, logs, saves and evaluates on CartPole, with every estimator; figures are finite."""
    result = module.train(module.Args(size="debug", estimator=name, run_root=str(tmp_path), eval_episodes=2))
    folder = pathlib.Path(result["run_dir"])
    assert folder.name.startswith("CartPole-v1__sac_discrete__1__")
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"checkpoint", "events"}
    figures = {key: x for key, x in result.items() if key != "run_dir"}
    assert {"eval_return", "losses/critic", "losses/actor", "stats/entropy"} < figures.keys()
    assert np.isfinite(list(figures.values())).all() and result["updates"] > 20
    assert module.load(folder)["source"] == pathlib.Path(module.__file__).read_text(encoding="utf-8")


def test_tensorboard(run, monkeypatch):
    """Returns of training episodes at the step of their end, losses and evaluations at each checkpoint."""
    scalars, real = [], SummaryWriter.add_scalar
    spy = lambda self, key, value, step: scalars.append((key, float(value), step)) or real(self, key, value, step)
    monkeypatch.setattr(SummaryWriter, "add_scalar", spy)
    result = run(num_envs=1)
    at = lambda key: [step for name, _, step in scalars if name == key]
    assert at("charts/eval_return") == at("losses/critic") == at("charts/frames") == [60, 120, 150]
    data, _ = module.load(result["run_dir"])["replay"]
    starts = [i for i in range(150) if data["obs"][i, 1] == 0]  # the second number counts the steps of an episode
    episodes = [(step, value) for key, value, step in scalars if key == "charts/episodic_return"]
    assert len(episodes) > 10 and [step for step, _ in episodes][: len(starts) - 1] == starts[1:]
    for a, (b, value) in zip(starts, episodes, strict=False):
        assert value == pytest.approx(data["reward"][a:b].sum().item())


# --- resume, evaluation of checkpoints, faults ------------------------------------------------------------------------


def test_resume(run, monkeypatch):
    """A run goes on with weights, optimiser, replay and counters of its checkpoint, in its folder, always alike."""
    first = run()
    saved = module.load(first["run_dir"])
    left = []
    monkeypatch.setattr(module.Agent, "act", lambda self, obs, eval=False: left.append(self) or 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        module.train(module.Args(resume=first["run_dir"], total_timesteps=200))
    assert same(left[0].state_dict(), saved["agent"]) and same(left[0].optimizer.state_dict(), saved["optimizer"])
    monkeypatch.undo()
    results = []
    for _ in range(2):
        result = module.train(module.Args(resume=first["run_dir"], total_timesteps=200))
        results.append((result, module.load(first["run_dir"])))
        assert result["run_dir"] == first["run_dir"] and 200 <= result["global_step"] < 203
        data, count = results[-1][1]["replay"]
        before = saved["replay"][1]
        assert count == result["global_step"] and same(data["obs"][:before], saved["replay"][0]["obs"][:before])
        assert result["updates"] == np.ceil((result["global_step"] - 20) * 0.5) > first["updates"]
        module.save(pathlib.Path(first["run_dir"]) / "checkpoint.pt", **saved)
    assert same(results[0][1]["agent"], results[1][1]["agent"])


def test_same_flags_same_run(run, monkeypatch):
    """The seed decides everything."""
    clock = iter(np.arange(1.0, 1e6))  # another second, another folder
    monkeypatch.setattr(module.time, "time", lambda: next(clock))
    a, b, c = (module.load(run(seed=seed)["run_dir"]) for seed in (1, 1, 2))
    assert same(a["agent"], b["agent"]) and same(a["replay"][0], b["replay"][0]) and not same(a["agent"], c["agent"])


def test_eval_flag(run, capsys):
    """--eval prints the mean of episodes of a run folder or a checkpoint, and changes nothing."""
    folder = pathlib.Path(run()["run_dir"])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for path in folder, folder / "checkpoint.pt":
        returns = module.train(module.Args(eval=str(path), eval_episodes=5))["returns"]
        assert len(returns) == 5 and f"{TINY}: mean {np.mean(returns):.4g}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def refused(capsys, *texts, **flags):
    """train(flags) prints one line that holds the texts, and exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(size="debug", **flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 600, error
    assert all(text in error for text in (*texts, "allowed")), error


def test_bad_input(tmp_path, capsys, monkeypatch):
    """Spaces that are not supported, unknown ids, impossible values: one line, and no run folder."""
    root = dict(run_root=str(tmp_path / "runs"))
    for env_id in "Tiny-vector-box-v0", "Tiny-image-discrete-v0", "Tiny-both-discrete-v0", "Tiny-multi-v0":
        refused(capsys, f"--env-id {env_id}", env_id=env_id, **root)
    for env_id in "NoSuch-v0", "no_such_module:Thing-v0", "ALE/NoSuch-v5", "CartPole-v77":
        refused(capsys, f"--env-id {env_id}", env_id=env_id, **root)
    shifted = lambda: gym.wrappers.TransformAction(toy_envs.Tiny(), lambda a: a - 4, gym.spaces.Discrete(3, start=4))
    monkeypatch.setitem(gym.registry, "Shifted-v0", gym.envs.registration.EnvSpec("Shifted-v0", shifted))
    refused(capsys, "--env-id Shifted-v0", "start=4", env_id="Shifted-v0", **root)
    for scale in (1.0,), (1.0, 1.0, 0.0, 1.0):
        refused(capsys, f"--obs-scale {scale}", obs_scale=scale, **root)
    values = dict(total_timesteps=0, batch_size=-1, gamma=1.1, slow_rate=-0.1, temperature=0.0, target_entropy=1.5)
    values |= dict(learning_rate=float("nan"), update_ratio=-1.0, num_envs=0, eval_episodes=0, hidden=0, buffer_size=0)
    for key, value in values.items():
        refused(capsys, f"--{key.replace('_', '-')} {value}", **{key: value}, **root)
    refused(capsys, str(tmp_path / "nothing"), resume=str(tmp_path / "nothing"))
    assert not (tmp_path / "runs").exists()


def test_other_checkpoints(run, tmp_path, capsys):
    """Truncated, of another file, with code in it, beside flags that a run may not change."""
    folder = pathlib.Path(run()["run_dir"])
    path, whole = folder / "checkpoint.pt", (folder / "checkpoint.pt").read_bytes()
    for flag in "resume", "eval":
        refused(capsys, "--gamma 0.5", "0.99", **{flag: str(folder), "gamma": 0.5})
        path.write_bytes(whole[: len(whole) // 2])
        refused(capsys, str(path), **{flag: str(folder)})
        module.save(path, args={})
        refused(capsys, "another kind of file", **{flag: str(folder)})
        torch.save({"agent": Evil(tmp_path / "evil")}, path)
        refused(capsys, str(path), **{flag: str(folder)})
        path.write_bytes(whole)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("broken", ["actor", "critics", "reward", "observation"])
def test_not_finite(run, tmp_path, monkeypatch, broken):
    """The run stops with the name of what is not finite; the last checkpoint is from before, and goes on."""
    update, step = module.Agent.update, toy_envs.Tiny.step
    saved = lambda: list(tmp_path.glob("*/checkpoint.pt"))

    def broken_update(self, batch):
        if saved():
            with torch.no_grad():
                next(getattr(self, broken).parameters()).fill_(float("nan"))
        return update(self, batch)

    def broken_step(self, action):
        obs, reward, *rest = step(self, action)
        bad = float("nan") if saved() else 0.0
        return (obs, reward + bad, *rest) if broken == "reward" else (obs + np.float32(bad), reward, *rest)

    if broken in ("reward", "observation"):
        monkeypatch.setattr(toy_envs.Tiny, "step", broken_step)
        monkeypatch.setattr(module, "evaluate", lambda agent, args: [0.0])
    else:
        monkeypatch.setattr(module.Agent, "update", broken_update)
    name = {"actor": "losses/actor", "critics": "losses/critic"}.get(broken, broken)
    with pytest.raises(RuntimeError, match=rf"step \d+: FloatingPointError: .*{name} is nan"):
        run()
    monkeypatch.undo()
    assert 60 <= module.load(saved()[0])["now"][0] < 63 and not list(tmp_path.rglob("*.tmp"))
    assert module.train(module.Args(resume=str(saved()[0].parent), total_timesteps=100))["global_step"] >= 100
