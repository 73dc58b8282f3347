# SPDX-License-Identifier: MIT
"""planet.py: parts against numbers by hand, the planner on problems with a known optimum, windows, variants."""

import importlib.util
import shutil
import subprocess

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from dream import dream
from gymnasium import spaces
from helpers import act, experience, short, window

import planet

spec = importlib.util.spec_from_file_location("planet_planner", ROOT / "results" / "planet_planner.py")
planet_planner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planet_planner)
BOX = spaces.Box(-1, 1, (2,))
PATCHES = ["gru", "overshooting", "random_collection", "ssm"]


def variants(*names):
    """The fixture of conftest.py, with the file itself or some of its patches."""
    return pytest.mark.parametrize("variant", names, indirect=True)


def agent_of(action_space=BOX, obs_space=None, module=planet, **flags):
    torch.manual_seed(0)
    args = module.resolve(module.Args(env_id="Tiny-vector-box-v0", device="cpu", **{"size": "debug", **flags}))
    return module.Agent(obs_space or spaces.Dict({"vector": spaces.Box(-1, 1, (3,))}), action_space, args)


# --- equations --------------------------------------------------------------------------------------------------------


def test_gru_by_hand():
    """All weights 0.1, gate bias 1, x = 0.5, h = 0.2: 0.165470."""
    cell = planet.GRU(1, 1)
    for p in cell.parameters():
        torch.nn.init.constant_(p, 0.1 if p.ndim == 2 else 0.0)
    torch.nn.init.ones_(cell.gates.bias)
    assert abs(cell(torch.tensor([[0.5]]), torch.tensor([[0.2]])).item() - 0.165470) < 1e-6


def test_kl_by_hand():
    """KL(N(0.3, 0.5) || N(0.1, 0.8)) = 0.196566, as PyTorch has it; and summed over the latents."""
    mean, std, mean2, std2 = (torch.tensor([x]) for x in (0.3, 0.5, 0.1, 0.8))
    assert abs(planet.kl_gaussian(mean, std, mean2, std2).item() - 0.196566) < 1e-6
    mean, std, mean2, std2 = torch.randn(2, 5), torch.rand(2, 5) + 0.1, torch.randn(2, 5), torch.rand(2, 5) + 0.1
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, std), normal(mean2, std2)).sum(-1)
    assert torch.allclose(planet.kl_gaussian(mean, std, mean2, std2), want, atol=1e-5)


def test_free_nats():
    """A KL of 2.9 gives no gradient, one of 3.1 all of it; steps are clipped before the mean."""
    mean = torch.tensor([[2 * 2.9], [2 * 3.1]]).sqrt().requires_grad_()  # KL = mean^2 / 2
    one, zero = torch.ones(2, 1), torch.zeros(2, 1)
    loss = planet.kl_loss((mean, one), (zero, one), 3.0)
    assert torch.allclose(loss, torch.tensor([0.0, 0.1]), atol=1e-5)
    grad = torch.autograd.grad(loss.mean(), mean)[0]
    assert grad[0] == 0 and torch.isclose(grad[1], mean[1] / 2)


def test_preprocess_range():
    """255 lies in [0.46875, 0.5), 0 in [-0.5, -0.46875): 32 levels, and noise that fills the gaps between them."""
    for value, low in (255, 0.46875), (0, -0.5), (8, -0.46875), (15, -0.46875):
        x = planet.preprocess(torch.full((10_000,), value, dtype=torch.uint8), 5)
        assert low <= x.min() < low + 1e-3 and low + 0.03 < x.max() <= low + 1 / 32  # float32 may round up to the bound


# --- planner ----------------------------------------------------------------------------------------------------------


def test_cem_on_a_quadratic():
    """Ten rounds find the optimum of each of several problems in one batch; an optimum outside is met at the bound."""
    torch.manual_seed(0)
    goal = torch.tensor([[[0.5, -0.7], [0.1, 0.9]], [[-0.3, 0.2], [2.0, 0.0]], [[0.0, 0.0], [0.4, 0.4]]])  # (N, H, A)
    score = lambda plans: -(plans - goal[:, None]).square().sum((2, 3))
    plan = planet.cem(score, (3, 1000, 2, 2), 10, 100, goal)
    assert (plan - goal.clamp(-1, 1)).abs().max() < 0.02
    one = planet.cem(score, (3, 1000, 2, 2), 1, 1, goal)  # random shooting is farther away
    assert (one - goal.clamp(-1, 1)).abs().max() > 0.05


def test_refit_by_hand():
    """The three best of five; population deviation, plus 1e-6 in the root."""
    plans = torch.tensor([1.0, 5.0, 2.0, 3.0, -9.0]).view(1, 5, 1, 1)
    mean, std = planet.refit(plans, torch.tensor([[1.0, 0.0, 9.0, 3.0, -1.0]]), 3)
    assert mean.item() == 2 and abs(std.item() - (2 / 3 + 1e-6) ** 0.5) < 1e-7


class Bandit(torch.nn.Module):
    """Stands in for RSSM and reward: the sum of rewards of a plan is its sum times the environment's sign."""

    def imagine(self, state, action):
        sign = state["stoch"][:, :1, None].sign()
        return {"deter": action * sign, "stoch": action * 0}

    def feat(self, state):
        return state["deter"]


def test_each_environment_has_its_own_plan(monkeypatch):
    """Different environments in one batch: each gets the plan for its own state, whatever their order."""
    agent = agent_of(candidates=200, iterations=5, top=20)
    agent.rssm = Bandit()
    monkeypatch.setattr(torch.nn.Sequential, "forward", lambda self, feat: feat.sum(-1, keepdim=True))
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    torch.manual_seed(0)
    state = {"deter": torch.zeros(5, 16), "stoch": sign[:, None].expand(-1, 6)}
    action = agent.plan(state)["action"]
    assert torch.equal(action.sign(), sign[:, None].expand(-1, 2)) and action.abs().min() > 0.3


def test_planner_flags(monkeypatch):
    """Random shooting is one round that keeps the single best plan; else what --size says."""
    shooting, agent, calls, real = agent_of(iterations=1, top=1), agent_of(), [], planet.cem
    monkeypatch.setattr(planet, "cem", lambda *args: calls.append(args[2:4]) or real(*args))
    shooting.plan(shooting.rssm.initial(2))
    agent.plan(agent.rssm.initial(2))
    assert calls == [(1, 1), (agent.args.iterations, agent.args.top)] == [(1, 1), (2, 4)]


def test_plan_is_scored_by_the_prior(monkeypatch):
    """The return of a plan is the undiscounted sum of reward means over the H states that the prior samples."""
    agent, seen = agent_of(horizon=3, candidates=4, iterations=1, top=2), {}
    monkeypatch.setattr(
        planet, "cem", lambda score, shape, *args: seen.update(score=score, shape=shape) or torch.zeros(2, 3, 2)
    )
    state = {key: torch.randn_like(x) for key, x in agent.rssm.initial(2).items()}
    agent.plan(state)
    plans = torch.rand(seen["shape"]) * 2 - 1
    torch.manual_seed(5)
    returns = seen["score"](plans)
    torch.manual_seed(5)
    start = {key: x[[0, 0, 0, 0, 1, 1, 1, 1]] for key, x in state.items()}
    future = agent.rssm.imagine(start, plans.flatten(0, 1))
    by_hand = agent.reward(torch.cat([future["stoch"], future["deter"]], -1))[..., 0].sum(1).view(2, 4)
    assert seen["shape"] == (2, 4, 3, 2) and torch.allclose(returns, by_hand, atol=1e-6)


def test_noise_of_collected_actions(monkeypatch):
    """Normal of deviation 0.3 around the plan, clipped; none in evaluation; uniform actions if random."""
    agent = agent_of(spaces.Box(-1, 1, (1,)))
    N = 20_000
    monkeypatch.setattr(agent, "plan", lambda state: {"action": torch.full((N, 1), 0.9)})
    row = {"vector": np.zeros((N, 3), np.float32), "is_first": np.ones(N, bool)}
    action, state = act(agent, row, agent.initial(N))
    below = action[action < 0.9]
    assert abs(np.sqrt(((below - 0.9) ** 2).mean()) - 0.3) < 0.01 and abs((action == 1).mean() - 0.369) < 0.02
    assert torch.equal(state["action"], torch.from_numpy(action))
    assert (act(agent, row, agent.initial(N), eval=True)[0] == np.float32(0.9)).all()
    action, _ = act(agent, row, agent.initial(N), random=True)
    assert abs(action.mean()) < 0.02 and abs(action.std() - 3**-0.5) < 0.01 and abs(action).max() <= 1


# --- networks and variants --------------------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("A,rssm", [(1, 556_320), (2, 556_520), (6, 557_320)])
def test_parameter_counts(A, rssm):
    """The published networks, from pixels."""
    obs_space = spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)})
    flags = dict(action_space=spaces.Box(-1, 1, (A,)), obs_space=obs_space, size="paper")
    agent = agent_of(**flags)
    parts = [count(getattr(agent, name)) for name in ("encoder", "rssm", "decoder", "reward")]
    assert parts == [690_144, rssm, 3_795_555, 250_201]
    assert A != 6 or sum(parts) == count(agent) == 5_293_220


@variants("planet ssm")
def test_parameter_counts_of_the_ssm(variant):
    """The same with 6 actions, without the deterministic path."""
    obs_space = spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)})
    ssm = agent_of(spaces.Box(-1, 1, (6,)), obs_space, variant, size="paper")
    assert count(ssm) == 4_719_620 and count(ssm.rssm) == 248_520


def test_initial_weights():
    """Glorot-uniform, biases 0, but 1 for the gates of the GRU."""
    agent = agent_of(size="paper", obs_space=spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}))
    for name, p in agent.named_parameters():
        if name.endswith("bias"):
            assert (p == (1 if "gates" in name else 0)).all(), name
        else:
            limit = (6 / (sum(p.shape[:2]) * p[0, 0].numel())) ** 0.5
            assert p.abs().max() <= limit and (p.numel() < 1000 or p.abs().max() > 0.98 * limit), name


def take_means(monkeypatch, rssm):
    """Latents without noise, in filtering and in imagination."""
    observe, imagine = rssm.observe, rssm.imagine
    zeros = lambda self, x: torch.zeros(*x.shape[:2], self.args.stoch)
    monkeypatch.setattr(
        rssm, "observe", lambda self, embed, *x, noise=None: observe(self, embed, *x, noise=zeros(self, embed))
    )
    monkeypatch.setattr(
        rssm, "imagine", lambda self, state, x, noise=None: imagine(self, state, x, noise=zeros(self, x))
    )


def slow_observe(dynamics, rssm, embed, action, is_first, noise):
    """Step by step, with whole layers, as the paper writes it."""
    B, T, A = action.shape
    S, states = rssm.args.stoch, []
    deter, stoch = torch.zeros(B, rssm.sizes["deter"]), torch.zeros(B, S)
    for t in range(T):
        keep = ~is_first[:, t, None]
        deter, stoch, a = deter * keep, stoch * keep, action[:, t] * keep
        x = torch.relu(rssm.inputs(torch.cat([stoch, a], -1)))
        if dynamics == "ssm":
            prior = rssm.prior(x)
            known = torch.cat(prior, -1)
        else:
            deter = rssm.cell(x, deter)
            prior, known = rssm.prior[2](torch.relu(rssm.prior[0](deter))), deter
        mean, std = rssm.post_out(torch.relu(rssm.post_hidden(torch.cat([known, embed[:, t]], -1))))
        stoch = mean if dynamics == "gru" else mean + std * noise[:, t]
        states.append((deter, stoch, mean, std, *prior))
    names = ("deter", "stoch", "mean", "std", "prior_mean", "prior_std")
    return {key: torch.stack(x, 1) for key, x in zip(names, zip(*states, strict=True), strict=True)}


@variants("planet", "planet ssm", "planet gru")
def test_observe_equals_the_plain_form(variant):
    """The hoisted filter against whole layers step by step, in float64, values and gradients; across resets."""
    planet, dynamics = variant, variant.__name__.removeprefix("planet_")
    agent = agent_of(module=planet).double()
    rssm, B, T = agent.rssm, 3, 6
    torch.set_default_dtype(torch.float64)
    try:
        embed, action = torch.randn(B, T, agent.encoder.size), torch.rand(B, T, 2) * 2 - 1
        is_first, noise = torch.rand(B, T) < 0.2, torch.randn(B, T, rssm.args.stoch)
        cell, normal = planet.GRU.forward, planet.Normal.forward
        planet.Normal.forward = lambda self, x: (self.mean(x), torch.nn.functional.softplus(self.std(x)) + self.min_std)
        planet.GRU.forward = lambda self, x, h: (
            lambda g, n: torch.lerp(self.cand(torch.cat([x, g[:, :n] * h], -1)).tanh(), h, g[:, n:])
        )(self.gates(torch.cat([x, h], -1)).sigmoid(), h.shape[1])
        results = []
        for post in (
            rssm.observe(embed, action, is_first, rssm.initial(B), noise),
            slow_observe(dynamics, rssm, embed, action, is_first, noise),
        ):
            total = sum((i + 1) * x.square().sum() for i, (_, x) in enumerate(sorted(post.items())))
            grads = torch.autograd.grad(total, list(rssm.parameters()), allow_unused=True)
            results.append((post, [torch.zeros(()) if g is None else g for g in grads]))
    finally:
        torch.set_default_dtype(torch.float32)
        planet.GRU.forward, planet.Normal.forward = cell, normal
    for key in results[0][0]:
        assert torch.allclose(results[0][0][key], results[1][0][key], atol=1e-12), key
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_acting_and_training_agree(monkeypatch):
    """Without noise of latents and pixels, training on stored rows gives the states that acting goes through."""
    take_means(monkeypatch, planet.RSSM)
    real = planet.preprocess
    monkeypatch.setattr(planet, "preprocess", lambda x, bits, noise=None: real(x, bits, torch.zeros(x.shape)))
    agent, replay = experience(planet, "Tiny-both-box-v0", rows=80, num_envs=1)
    start, T = int(replay.data["is_first"][:60, 0].nonzero()[1, 0]), 18  # with a reset or two
    assert replay.data["is_first"][start + 1 : start + T, 0].any()
    batch = {key: x[start - 1 : start + T, :1].transpose(0, 1) for key, x in replay.data.items()}
    post, state = agent.model_losses(batch)[2], agent.initial(1)
    for t in range(T):
        rows = {key: x[:, t + 1] for key, x in batch.items()}
        state = agent.act(agent.inputs(rows, state), random=True)
        for key in "deter", "stoch":
            assert torch.allclose(state[key], post[key][:, t], atol=1e-5), t
        state["action"] = rows["action"].clamp(-1, 1)


def test_every_patch_is_tested():
    """The list of this file is that of the folder."""
    names = [path.name for path in (ROOT / "results" / "ablations").glob("planet_*")]
    assert sorted(names) == [f"planet_{name}.patch" for name in PATCHES]


@variants("planet ssm overshooting", *(f"planet {name}" for name in PATCHES))
def test_patched_file_runs(variant, tmp_path):
    """The patches apply, and the file trains, saves, evaluates and shows what it predicts."""
    result = variant.train(short(variant, "Tiny-both-discrete-v0", tmp_path))
    assert result["updates"] > 1 and np.isfinite(result["losses/total"])
    assert ("losses/kl" in result) == (variant.__name__ != "planet_gru")
    agent, args = variant.load_agent(result["run_dir"])
    assert len(variant.evaluate(agent, args, 1)) == 1
    assert len(dream(variant, agent, args, 5)) == 6


def test_gru_has_no_kl_to_overshoot(tmp_path):
    """Whoever asks for both is told so by git."""
    shutil.copy(ROOT / "planet.py", tmp_path)
    apply = lambda name: subprocess.run(["git", "apply", ROOT / f"results/ablations/planet_{name}.patch"], cwd=tmp_path)
    assert apply("gru").returncode == 0 and apply("overshooting").returncode != 0


@variants("planet gru")
def test_gru_never_trains_its_prior(variant):
    """The authors' deterministic baseline: prior layers get no gradient, there is no KL, and states are means."""
    agent, replay = experience(variant, "Tiny-vector-box-v0")
    batch = window(variant, agent, replay)
    losses, _, post, _ = agent.model_losses(batch)
    grads = torch.autograd.grad(sum(x.mean() for x in losses.values()), agent.params, allow_unused=True)
    untrained = {name for (name, _), grad in zip(agent.named_parameters(), grads, strict=True) if grad is None}
    assert "kl" not in losses and torch.equal(post["stoch"], post["mean"])
    assert untrained == {name for name, _ in agent.named_parameters() if "prior" in name or "post_out.std" in name}
    assert np.isfinite(float(agent.update(batch)["losses/total"]))


@variants("planet overshooting", "planet ssm overshooting")
def test_overshooting(variant, monkeypatch):
    """Against a loop over every start and distance, with everything that crosses an end left out."""
    planet = variant
    agent, replay = experience(planet, "Tiny-vector-box-v0", overshooting=4, free_nats=0.5)
    take_means(monkeypatch, planet.RSSM)
    batch = window(planet, agent, replay)
    first = batch["is_first"][:, 1:]
    first[0, 3], first[1] = True, False
    action = agent.action_vector(batch["action"][:, :-1])
    obs = agent.encoder.preprocess({"vector": batch["vector"][:, 1:]})
    post = agent.rssm.observe(agent.encoder(obs), action, first, agent.rssm.initial(len(action)))
    found = agent.overshooting(post, action, first)
    B, T = first.shape
    for d in 2, 3, 4:
        values = []
        for b in range(B):
            for t in range(T - d):
                if not first[b, t + 1 : t + d + 1].any():
                    start = {key: post[key][b : b + 1, t] for key in ("deter", "stoch")}
                    future = agent.rssm.imagine(start, action[b : b + 1, t + 1 : t + d + 1])
                    prior = future["mean"][:, -1], future["std"][:, -1]
                    now = post["mean"][b : b + 1, t + d], post["std"][b : b + 1, t + d]
                    values.append(planet.kl_loss(now, prior, 0.5))
        assert values and torch.isclose(found[d - 2], torch.cat(values).mean(), rtol=1e-4), d
    pairs = (post["mean"], post["std"]), (post["prior_mean"], post["prior_std"])
    mean = (planet.kl_loss(*pairs, 0.5) + sum(found)) / 4
    assert torch.allclose(agent.model_losses(batch)[0]["kl"], mean, rtol=1e-4) and len(found) == 3


def test_losses_by_hand(monkeypatch):
    """Half the squared error, summed over pixels and numbers, mean over batch and time; reward times 10, KL times 1."""
    take_means(monkeypatch, planet.RSSM)
    real = planet.preprocess
    monkeypatch.setattr(planet, "preprocess", lambda x, bits, noise=None: real(x, bits, torch.zeros(x.shape)))
    agent, replay = experience(planet, "Tiny-both-box-v0", free_nats=0.01)
    batch = window(planet, agent, replay)
    losses, feat, post, _ = agent.model_losses(batch)
    recon, reward = agent.decoder(feat), agent.reward(feat)[..., 0]
    target = torch.floor(batch["image"][:, 1:] / 8) / 32 - 0.5
    want = {"image": (recon["image"] - target).square().sum((2, 3, 4)) / 2}
    want["vector"] = (recon["vector"] - batch["vector"][:, 1:]).square().sum(2) / 2
    want["reward"] = (reward - batch["reward"][:, 1:]).square() / 2
    assert all(torch.allclose(losses[key], x, rtol=1e-5) for key, x in want.items())
    pairs = (post["mean"], post["std"]), (post["prior_mean"], post["prior_std"])
    want["kl"] = (planet.kl_gaussian(*pairs[0], *pairs[1]) - 0.01).clamp(min=0)
    scales = {"reward": 10}
    total = sum(scales.get(key, 1) * x.mean() for key, x in want.items())
    assert torch.isclose(agent.update(batch)["losses/total"], total, rtol=1e-5)


def test_first_transposed_convolution_is_a_product():
    """The decoder's fast form against the layers as they are, in values and gradients."""
    agent = agent_of(obs_space=spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}))
    feat, slope = torch.randn(2, 3, sum(agent.rssm.sizes.values())), torch.randn(2, 3, 64, 64, 3)
    fast = agent.decoder(feat)["image"]
    plain = agent.decoder.convs(agent.decoder.linear(feat).flatten(0, 1)[..., None, None])
    plain = plain.permute(0, 2, 3, 1).unflatten(0, (2, 3))
    assert fast.shape == (2, 3, 64, 64, 3) and torch.allclose(fast, plain, atol=1e-5)
    grads = [torch.autograd.grad((x * slope).sum(), list(agent.decoder.parameters())) for x in (fast, plain)]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(*grads, strict=True))


def test_adam_is_tensorflows():
    """Against the update written out: clipping by the global norm, eps beside the uncorrected root."""
    torch.manual_seed(0)
    params = [torch.randn(3, 4), torch.randn(5)]
    args = planet.Args(learning_rate=0.01, eps=1e-2, clip=2.0)
    adam, mine = planet.Adam([p.clone() for p in params], args), [p.double() for p in params]
    m, v = ([torch.zeros_like(p) for p in mine] for _ in range(2))
    for t in range(1, 6):
        grads = [torch.randn_like(p) * 3 for p in params]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert torch.isclose(adam.step(grads), norm)
        for i, g in enumerate(grads):
            g = g.double() * min(1.0, 2.0 / float(norm))
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            rate = 0.01 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
            mine[i] -= rate * m[i] / (v[i].sqrt() + 1e-2)
    assert all(torch.allclose(a.double(), b, atol=1e-6) for a, b in zip(adam.params, mine, strict=True))


# --- windows, schedule, flags -----------------------------------------------------------------------------------------


def episodes(lengths, capacity=1000):
    """A replay of one environment with episodes of these lengths (rows, the first one included); vector = row."""
    space = spaces.Dict({"vector": spaces.Box(-np.inf, np.inf, (1,))})
    replay, row = planet.Replay(capacity, 1, space, BOX, torch.device("cpu")), 0
    for length in lengths:
        for t in range(length):
            fields = {"vector": np.float32([[row]]), "action": np.zeros((1, 2)), "reward": np.zeros(1)}
            ends = {"is_first": t == 0, "is_last": t == length - 1, "is_terminal": False}
            replay.add({**fields, **{key: np.array([x]) for key, x in ends.items()}})
            row += 1
    return replay


def test_windows_keep_to_episodes():
    """Trained rows lie in one episode; all episodes are equally likely, whatever their length, and all places."""
    replay, T = episodes([30, 12, 61]), 11
    torch.manual_seed(0)
    batch = replay.sample(60_000, T + 1)
    start = batch["vector"][:, 1, 0].long()
    assert not batch["is_first"][:, 2:].any()
    counts = torch.bincount(start, minlength=103)
    spans = (1, 20), (30, 32), (42, 93)  # from the first start to behind the last; row 0 would have no context row
    for low, high in spans:
        mine = counts[low:high].double()
        assert abs(mine.sum() / 60_000 - 1 / 3) < 0.01 and (mine > 0.7 * mine.mean()).all(), (low, high, mine)
    assert sum(counts[low:high].sum() for low, high in spans) == 60_000


def test_short_episodes():
    """Episodes shorter than a window are used from their start, and the window runs on."""
    replay = episodes([5, 4, 6, 5, 4])
    batch = replay.sample(500, 10)
    assert batch["is_first"][:, 1].float().mean() > 0.5 and batch["is_first"][:, 2:].any()
    assert (batch["vector"][:, 1:, 0] == batch["vector"][:, :-1, 0] + 1).all()


def test_windows_in_a_full_ring(tmp_path):
    """What has been overwritten is not drawn; after saving and loading the same windows are."""
    replay = episodes([30, 30, 30], capacity=50)
    batch = replay.sample(2000, 9)
    assert batch["vector"].min() == 40 and batch["vector"].max() == 89
    other = episodes([], capacity=50)
    other.load(tmp_path, replay.save(tmp_path))
    assert other.starts == replay.starts == [[30, 60]] and other.oldest == 40
    batches = []
    for x in replay, other:
        torch.manual_seed(0)
        batches.append(x.sample(500, 9))
    assert all(torch.equal(x, batches[1][key]) for key, x in batches[0].items())


@variants("planet random_collection")
def test_random_collection(variant, tmp_path, monkeypatch):
    """It never plans in training; --eval of that run does."""
    planet = variant
    plans, real = [], planet.cem
    monkeypatch.setattr(planet, "cem", lambda *args: plans.append(1) or real(*args))
    evaluations, evaluate = [], planet.evaluate
    monkeypatch.setattr(planet, "evaluate", lambda *args: evaluations.append(args) or [0.0])
    result = planet.train(short(planet, "Tiny-vector-box-v0", tmp_path))
    monkeypatch.setattr(planet, "evaluate", evaluate)
    assert plans == [] and result["updates"] > 20 and len(evaluations) == 1  # at the checkpoint
    agent, args = planet.load_agent(result["run_dir"])
    planet.evaluate(agent, args, 1)
    assert plans


def test_action_repeats():
    """The paper's table; flags win; other tasks get 2."""
    for task, repeat in {"cartpole-swingup": 8, "ball_in_cup-catch": 4, "walker-walk": 2, "hopper-hop": 2}.items():
        assert planet.resolve(planet.Args(env_id=f"dm_control/{task}-v0")).action_repeat == repeat
    assert planet.resolve(planet.Args(action_repeat=3)).action_repeat == 3
    assert planet.resolve(planet.Args(env_id="Pendulum-v1")).action_repeat == 1


def simulator(env_id, repeat):
    """The environment itself, with repeated actions in its own bounds."""
    envs = planet.make_envs(env_id, 1, 0, planet.resolve(planet.Args(env_id=env_id, obs="vector")))
    return planet.gym.wrappers.RepeatAction(envs.envs[0].unwrapped, repeat)


def test_simulator_is_left_alone(monkeypatch):
    """With contacts, too: actions chosen by planet_planner.py give the rewards that they give without any planning."""
    flags = dict(env_id="dm_control/walker-walk-v0", size="debug", action_repeat=100, horizon=2, candidates=3, top=1)
    actions, real = [], planet.cem
    monkeypatch.setattr(planet, "cem", lambda *args: actions.append(real(*args)[:, :1]) or actions[-1])
    (total,) = planet_planner.upper_bound(planet.Args(iterations=1, eval_episodes=1, device="cpu", **flags))
    env = simulator(flags["env_id"], 100)
    env.reset(seed=1)
    low, high = env.action_space.low, env.action_space.high
    played = [low + (a[0, 0].numpy() + 1) / 2 * (high - low) for a in actions]  # to the last bit: contacts are chaotic
    assert sum(env.step(a)[1] for a in played) == total


def test_bad_flags(capsys, tmp_path):
    """One line, exit code 2, no run folder."""
    for env_id in "dm_control/walker-fly-v0", "Pendulum-v1":
        with pytest.raises(SystemExit) as stop:
            planet_planner.upper_bound(planet.Args(env_id=env_id, device="cpu"))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and env_id in error and error.count("\n") == 1
    cases = [(dict(top=30), "--top 30"), (dict(bits=9), "--bits 9"), (dict(seed_episodes=0), "--seed-episodes 0")]
    cases += [(dict(horizon=0), "--horizon 0"), (dict(candidates=0), "--candidates 0")]
    for flags, text in cases:
        with pytest.raises(SystemExit) as stop:
            planet.train(planet.Args(env_id="Pendulum-v1", size="debug", run_root=str(tmp_path), device="cpu", **flags))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and text in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_true_simulator(monkeypatch):
    """planet_planner.py: scores are what the simulator then gives; planning leaves its state as it was."""
    flags = dict(env_id="dm_control/cartpole-balance-v0", size="debug", action_repeat=50, horizon=3, eval_episodes=1)
    seen, real = {}, planet.cem

    def cem(score, shape, iterations, top, like):
        plans = torch.rand(shape) * 2 - 1
        seen.setdefault("twice", (score(plans), score(plans)))
        plan = real(score, shape, iterations, top, like)
        seen.setdefault("plan", (plan, score(plan[:, None].expand(shape))[0, 0].item()))
        return plan

    monkeypatch.setattr(planet, "cem", cem)
    (total,) = planet_planner.upper_bound(planet.Args(obs="vector", device="cpu", **flags))
    assert torch.equal(*seen["twice"]) and len(seen["twice"][0].unique()) > 5
    env = simulator(flags["env_id"], 50)
    env.reset(seed=1)
    plan, score = seen["plan"]
    assert 0 < total <= 1000
    assert abs(sum(env.step(a.numpy())[1] for a in plan[0]) - score) < 1e-3


def test_gymnasium_space_of_pendulum():
    """A gymnasium task whose bounds are not 1: actions are rescaled on the way."""
    args = planet.resolve(planet.Args(env_id="Pendulum-v1", size="debug", device="cpu"))
    envs = planet.make_envs(args.env_id, 1, 0, args)
    assert envs.single_action_space == gym.spaces.Box(-1, 1, (1,))
    envs.close()
