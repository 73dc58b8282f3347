# SPDX-License-Identifier: MIT
"""Exact checks of dreamerv2.py: equations by hand, sizes, the sampler, who gets which gradient, presets, schedule."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from dream import dream
from gymnasium import spaces
from helpers import experience, short, window

import dreamerv2

PATCHES = ["gaussian", "multidiscrete", "no_gru_norm", "no_image_grad", "no_reward_grad", "schedules"]
IMAGE = lambda channels: spaces.Dict(image=spaces.Box(0, 255, (64, 64, channels), np.uint8))


@pytest.fixture
def module():
    """For the fixture made."""
    return dreamerv2


def variants(*names):
    """The fixture of conftest.py, with the file itself or some of its patches."""
    return pytest.mark.parametrize("variant", names, indirect=True)


def agent_of(action_space=None, obs_space=None, dtype=torch.float32, module=dreamerv2, **flags):
    args = module.resolve(module.Args(env_id="X-v0", device="cpu", **{"size": "debug", **flags}))
    obs_space = obs_space or spaces.Dict(vector=spaces.Box(-1, 1, (3,)))
    torch.manual_seed(0)
    return module.Agent(obs_space, action_space or spaces.Discrete(3), args).to(dtype)


def random_batch(agent, B=4, T=8):
    batch = {"reward": torch.randn(B, T), "is_first": torch.rand(B, T) < 0.2, "is_last": torch.rand(B, T) < 0.2}
    batch |= {"is_terminal": torch.rand(B, T) < 0.2, "vector": torch.randn(B, T, 3)}
    size = agent.actor.size
    batch["action"] = torch.randint(size, (B, T)) if agent.actor.discrete else 2 * torch.rand(B, T, size) - 1
    return batch


def total(part):
    return sum(p.numel() for p in part.parameters())


# --- equations --------------------------------------------------------------------------------------------------------


def test_lambda_return():
    """By hand, and a terminal state is worth its own reward alone."""
    reward, value, disc = torch.tensor([[1, 2, 3, 9.0], [0.5, 0.6, 0.7, 1.0], [0.9, 0.8, 0.7, 9.0]])
    out = dreamerv2.lambda_return(reward, value, disc, 0.95)
    expected = [0.0, 0.0, 3 + 0.7 * 1.0]
    for t in (1, 0):
        expected[t] = float(reward[t] + disc[t] * (0.05 * value[t + 1] + 0.95 * expected[t + 1]))
    assert torch.allclose(out, torch.tensor(expected)) and torch.allclose(
        out, torch.tensor([5.1652, 4.84, 3.7]), atol=1e-4
    )
    disc[0] = 0
    assert dreamerv2.lambda_return(reward, value, disc, 0.95)[0] == 1


def test_weights(monkeypatch):
    """The first weight is 1, the others the products of the discounts before; the start's discount is known."""
    agent, seen = agent_of(imag_horizon=3), {}
    disc = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    given = torch.zeros(1, 4, 104 - 8), torch.eye(3)[None], torch.zeros(1, 4), disc, torch.zeros(1, 4)
    monkeypatch.setattr(agent, "imagine", lambda *_: given)
    real = dreamerv2.critic_loss
    monkeypatch.setattr(dreamerv2, "critic_loss", lambda v, r, w: seen.update(weight=w) or real(v, r, w))
    agent.behaviour_losses(None, {"is_terminal": None})
    assert torch.allclose(seen["weight"], torch.tensor([[1, 0.9, 0.72]]))


def test_kl():
    """By hand; balancing scales the gradients of both sides by 0.8 and 0.2, 0.5 leaves them whole."""
    post = torch.tensor([[1.0, 0, -1]], requires_grad=True)
    prior = torch.tensor([[0, 0.5, 0.0]], requires_grad=True)
    dists = [x.log_softmax(-1) for x in (post, prior)]
    assert dreamerv2.kl_categorical(*dists).item() == pytest.approx(0.339617, abs=1e-6)
    grads = {}
    for balance in (0.5, 0.8, 0.3):
        loss = dreamerv2.kl_loss(*dists, 0.0, balance)
        assert loss.item() == pytest.approx(0.339617, abs=1e-6)
        grads[balance] = torch.autograd.grad(loss, (post, prior), retain_graph=True)
    for balance in (0.8, 0.3):
        assert torch.allclose(grads[balance][0], (1 - balance) * grads[0.5][0])
        assert torch.allclose(grads[balance][1], balance * grads[0.5][1])


def test_free_nats():
    """The mean is bounded, not each step: one large KL among small ones frees them all; below the bound no gradient."""
    prior = torch.zeros(4, 1, 3)
    small, large = torch.tensor([0.5, 0, 0]), torch.tensor([9.0, 0, 0])
    for logits, free in (torch.stack([small] * 4), True), (torch.stack([small] * 3 + [large]), False):
        post = logits[:, None].clone().requires_grad_()
        kl = dreamerv2.kl_categorical(post.log_softmax(-1), prior.log_softmax(-1))
        bound = 0.2 if free else 0.1
        assert (float(kl.mean()) < bound) == free and float(kl[0]) < bound
        loss = dreamerv2.kl_loss(post.log_softmax(-1), prior.log_softmax(-1), bound, 0.8)
        (grad,) = torch.autograd.grad(loss, post)
        assert (grad == 0).all() == free and (grad[0] == 0).all() == free
        assert float(loss) == pytest.approx(max(bound, float(kl.mean())))


def test_truncated_normal():
    """By hand; density that integrates to 1, and to the entropy; samples have the distribution function they should."""
    mean, std = torch.tensor(0.3), torch.tensor(0.5)
    assert float(dreamerv2.truncated_entropy(mean, std)) == pytest.approx(0.502598, abs=1e-5)
    assert float(dreamerv2.truncated_logp(torch.tensor(0.2), mean, std)) == pytest.approx(-0.156503, abs=1e-5)
    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    for mean, std in itertools.product((-0.99, 0.0, 0.7), (0.1, 0.6, 2.1)):
        mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        logp = dreamerv2.truncated_logp(x, mean, std)
        assert float(torch.trapezoid(logp.exp(), x)) == pytest.approx(1, abs=1e-5)
        entropy = float(torch.trapezoid(-logp * logp.exp(), x))
        assert float(dreamerv2.truncated_entropy(mean, std)) == pytest.approx(entropy, abs=1e-5)
        u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
        sample = dreamerv2.truncated_sample(u, mean, std)
        below = torch.cumulative_trapezoid(logp.exp(), x)[((sample + 1) / 2 * 20_000).long().clamp(max=19_999)]
        assert torch.allclose(below, u, atol=2e-3)
    for mean, std in itertools.product((-1.0, -0.9999, 0.3, 1.0), (0.1, 2.1)):  # tanh does reach 1
        u = torch.cat([torch.tensor([0, 2**-24, 1 - 2**-24, 1]), torch.rand(1000)])
        mean, std = torch.tensor(mean, requires_grad=True), torch.tensor(std, requires_grad=True)
        sample = dreamerv2.truncated_sample(u, mean, std)
        parts = sample, dreamerv2.truncated_logp(sample.detach(), mean, std), dreamerv2.truncated_entropy(mean, std)
        for part in parts:
            grads = torch.autograd.grad(part.sum(), (mean, std), retain_graph=True)
            assert torch.isfinite(part).all() and all(torch.isfinite(x) for x in grads)
        assert sample.abs().max() < 1


def test_actor_loss():
    """Both parts by hand; REINFORCE without advantage and entropy has no gradient, dynamics follows the return."""
    logp, returns = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    entropy, weight = torch.tensor([[0.7]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    baseline = torch.tensor([[2.0]], requires_grad=True)
    leaves = logp, entropy, returns, baseline, weight
    for rho, value, grads in (
        (1.0, -0.5 * (-1 * 1 + 0.1 * 0.7), (-0.5, -0.05, 0, None, None)),
        (0.0, -0.5 * (3 + 0.1 * 0.7), (0, -0.05, -0.5, None, None)),
        (0.9, -0.5 * (0.9 * -1 + 0.1 * 3 + 0.1 * 0.7), (-0.45, -0.05, -0.05, None, None)),
    ):
        loss = dreamerv2.actor_loss(*leaves, rho, 0.1)
        assert float(loss) == pytest.approx(value)
        found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        for a, b in zip(found, grads, strict=True):
            assert (a is None and not b) or float(a) == pytest.approx(b)
    loss = dreamerv2.actor_loss(logp, entropy, returns, returns, weight, 1.0, 0.0)
    assert float(torch.autograd.grad(loss.sum(), logp)[0]) == 0


def test_critic_loss():
    value = torch.tensor([[1.0, 4.0]], requires_grad=True)
    loss = dreamerv2.critic_loss(value, torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 0.5]]))
    assert loss.tolist() == [[2.0, 0.25]] and torch.autograd.grad(loss.sum(), value)[0].tolist() == [[-2.0, 0.5]]


# --- sizes and presets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size,channels,action,expected",
    [
        ("atari", 1, spaces.Discrete(18), (1_549_776, 5_664_848, 10_497_553, 1_131_601, 1_138_418, 22_245_398)),
        ("atari-fast", 1, spaces.Discrete(6), (1_549_776, 5_657_648, 10_497_553, 1_131_601, 1_133_606, 22_233_386)),
        ("dmc-vision", 3, spaces.Box(-1, 1, (6,)), (1_551_312, 1_247_248, 9_886_611, 971_601, 976_012, 15_604_385)),
    ],
)
def test_parameter_counts(size, channels, action, expected):
    """Those computed from the released code; the slow critic is not counted."""
    agent = agent_of(action, IMAGE(channels), size=size)
    parts = agent.encoder, agent.rssm, agent.decoder, agent.reward, agent.actor
    assert (*map(total, parts), sum(p.numel() for p in agent.params)) == expected
    assert total(agent.critic) == expected[3] == total(agent.slow_critic)
    assert (agent.cont is None) == (size == "dmc-vision")


def test_parameter_count_with_norm():
    """Preset crafter: 1,024 units, and a layer norm in each hidden layer, convolutions too."""
    agent = agent_of(spaces.Discrete(17), IMAGE(3), size="crafter")
    norms = lambda part: sum(total(x) for x in part.modules() if isinstance(x, torch.nn.LayerNorm))
    assert total(agent.encoder) - norms(agent.encoder) == 1_551_312
    assert norms(agent.encoder) == 2 * 48 * (1 + 2 + 4 + 8) and norms(agent.decoder) == 2 * 48 * (4 + 2 + 1)
    assert total(agent.rssm) - 3 * 2 * 1024 == 13_138_944
    assert total(agent.decoder) - norms(agent.decoder) == 11_152_275
    assert total(agent.reward) == 1_301_201 + 3_200 and total(agent.actor) == 1_310_817
    assert all(x.eps == 1e-3 for x in agent.modules() if isinstance(x, torch.nn.LayerNorm))


def test_presets():
    """The table of the released configurations, and the paper's."""
    rows = {
        "atari": dict(batch_size=50, train_every=4, prefill=50_000, pretrain=1, gamma=0.999, entropy_scale=1e-3),
        "atari-fast": dict(batch_size=16, train_every=16, prefill=50_000, pretrain=1, gamma=0.999, entropy_scale=1e-3),
        "dmc-vision": dict(batch_size=16, train_every=5, prefill=1000, pretrain=100, gamma=0.99, entropy_scale=1e-4),
        "crafter": dict(batch_size=16, train_every=5, prefill=10_000, pretrain=1, gamma=0.999, entropy_scale=3e-3),
    }
    rows["dmc-proprio"] = rows["dmc-vision"]
    atari = dict(
        kl_scale=0.1, free_nats=0, cont_scale=5, tanh_reward=True, ends=True, deter=600, hidden=600, norm=False
    )
    dmc = dict(kl_scale=1, free_nats=1, cont_scale=0, tanh_reward=False, ends=False, deter=200, hidden=200, norm=False)
    crafter = dict(
        kl_scale=1, free_nats=0, cont_scale=1, tanh_reward=True, ends=True, deter=1024, hidden=1024, norm=True
    )
    losses = {"atari": atari, "atari-fast": atari, "dmc-vision": dmc, "dmc-proprio": dmc, "crafter": crafter}
    rates = {"atari": (2e-4, 4e-5, 1e-4), "dmc-vision": (3e-4, 8e-5, 8e-5), "crafter": (1e-4, 1e-4, 1e-4)}
    rates |= {"atari-fast": rates["atari"], "dmc-proprio": rates["dmc-vision"]}
    common = dict(batch_length=50, stoch=32, classes=32, units=400, depth=48, kl_balance=0.8, lam=0.95, imag_horizon=15)
    common |= dict(slow_every=100, eps=1e-5, clip=100, weight_decay=1e-6)
    for size, row in rows.items():
        args = dreamerv2.resolve(dreamerv2.Args(env_id="X-v0", size=size))
        for key, value in {**row, **losses[size], **common}.items():
            assert getattr(args, key) == value, (size, key)
        assert (args.learning_rate, args.actor_learning_rate, args.critic_learning_rate) == rates[size]
        assert args.advantage == ("paper" if size == "atari" else "code")
    assert dreamerv2.resolve(dreamerv2.Args(size="atari")).buffer_size == 2_000_000


@pytest.mark.parametrize(
    "env_id,obs,size,repeat",
    [
        ("ALE/Pong-v5", "image", "atari-fast", 4),
        ("dm_control/walker-walk-v0", "image", "dmc-vision", 2),
        ("dm_control/walker-walk-v0", "both", "dmc-vision", 2),
        ("dm_control/walker-walk-v0", "vector", "dmc-proprio", 2),
        ("CartPole-v1", "image", "small", 1),
    ],
)
def test_size_auto(env_id, obs, size, repeat):
    args = dreamerv2.resolve(dreamerv2.Args(env_id=env_id, obs=obs))
    assert (args.size, args.action_repeat) == (size, repeat)


@pytest.mark.parametrize(
    "flags,protocol,count",
    [
        (dict(size="atari"), "200m", 18),
        (dict(size="atari-fast"), "fast", 6),
        (dict(), "fast", 6),
        (dict(size="debug"), "200m", 18),
        (dict(size="atari-fast", atari_protocol="200m"), "200m", 18),
        (dict(size="atari", atari_protocol="fast"), "fast", 6),
    ],
)
def test_atari_action_sets(flags, protocol, count):
    """The paper's 18, the code's minimal ones: by size, where the flag does not say; gray and sticky both."""
    args = dreamerv2.resolve(dreamerv2.Args(**flags))
    envs = dreamerv2.make_envs(args.env_id, 1, 0, args)
    assert args.atari_protocol == protocol and envs.single_action_space.n == count
    assert envs.single_observation_space["image"].shape == (64, 64, 1)
    envs.close()
    settings = dreamerv2.ATARI[protocol]
    assert settings["repeat_action_probability"] == 0.25 and len(dreamerv2.ATARI) == 3


def test_atari_protocol_needs_ale(capsys):
    """Elsewhere the flag is refused, but for what the size says anyway, which a resumed run hands on."""
    for size, own in ("debug", "200m"), ("small", "200m"), ("atari-fast", "fast"):
        for protocol in dreamerv2.ATARI:
            args = dreamerv2.Args(env_id="CartPole-v1", size=size, atari_protocol=protocol)
            if protocol == own:
                assert dreamerv2.resolve(dreamerv2.resolve(args)).atari_protocol == own
                continue
            with pytest.raises(SystemExit) as stop:
                dreamerv2.resolve(args)
            error = capsys.readouterr().err
            assert stop.value.code == 2 and f"--atari-protocol {protocol}" in error and "ALE" in error


@pytest.mark.parametrize(
    "flags,text",
    [
        (dict(rho=1.5), "--rho 1.5"),
        (dict(kl_balance=-0.1), "--kl-balance -0.1"),
        (dict(gamma=1.5), "--gamma 1.5"),
        (dict(kl_scale=-1.0), "--kl-scale -1"),
        (dict(learning_rate=0.0), "--learning-rate 0"),
        (dict(imag_horizon=1), "--imag-horizon 1"),
        (dict(prefill=-1), "--prefill -1"),
        (dict(train_every=0.0), "--train-every 0"),
    ],
)
def test_bad_flags(flags, text, capsys, tmp_path):
    check_bad_flags(dreamerv2, flags, text, capsys, tmp_path)


@pytest.mark.parametrize("flags", [dict(rho=1.0), dict(entropy_scale=1.0)])
@variants("dreamerv2 schedules")
def test_bad_flags_of_schedules(variant, flags, capsys, tmp_path):
    (tmp_path / "runs").mkdir()
    check_bad_flags(variant, flags, "--rho, --entropy-scale: schedules anneal both", capsys, tmp_path / "runs")


def check_bad_flags(module, flags, text, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(env_id="CartPole-v1", size="debug", run_root=str(tmp_path), **flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and text in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


# --- world model ------------------------------------------------------------------------------------------------------


def test_every_patch_is_tested():
    """The list of this file is that of the folder."""
    names = [path.name for path in (ROOT / "results" / "ablations").glob("dreamerv2_*")]
    assert sorted(names) == [f"dreamerv2_{name}.patch" for name in PATCHES]


@variants(*(f"dreamerv2 {name}" for name in PATCHES))
def test_patched_file_runs(variant, tmp_path):
    """The patch applies, and the file trains, saves, evaluates and dreams."""
    result = variant.train(short(variant, "Tiny-both-discrete-v0", tmp_path))
    assert result["updates"] > 1 and np.isfinite(result["losses/total"])
    agent, args = variant.load_agent(result["run_dir"])
    assert len(variant.evaluate(agent, args, 1)) == 1
    assert len(dream(variant, agent, args, 5)) == 6


@variants("dreamerv2", "dreamerv2 gaussian")
@pytest.mark.parametrize("norm", [False, True])
def test_observe_is_its_plain_form(variant, norm):
    """Against a loop that concatenates all inputs at each step, with the same noise: values and gradients, float64."""
    agent = agent_of(module=variant, norm=norm, dtype=torch.float64)
    rssm, B, T = agent.rssm, 3, 6
    embed = torch.randn(B, T, agent.encoder.size, dtype=torch.float64, requires_grad=True)
    action, is_first = torch.eye(3, dtype=torch.float64)[torch.randint(3, (B, T))], torch.rand(B, T) < 0.3
    torch.manual_seed(3)
    noise = torch.empty(B, T, *rssm.initial(B)["stoch"].shape[1:], dtype=torch.float64)
    noise = noise.normal_() if "gaussian" in variant.__name__ else noise.exponential_()
    fast = rssm.observe(embed, action, is_first, rssm.initial(B), noise)
    state, plain = rssm.initial(B), []
    for t in range(T):
        keep = ~is_first[:, t, None]
        stoch, deter = state["stoch"] * keep[..., None], state["deter"] * keep
        x = rssm.inputs(torch.cat([stoch.flatten(1), action[:, t] * keep], -1))
        deter = rssm.cell(torch.nn.functional.elu(rssm.inputs_norm(x)), deter)
        x = rssm.post_norm(rssm.post_in(torch.cat([deter, embed[:, t]], -1)))
        logits = rssm.post_out(torch.nn.functional.elu(x)).unflatten(-1, (rssm.args.stoch, -1))
        state = {"deter": deter, "stoch": rssm.draw(logits, noise[:, t]), "logits": logits}
        plain.append(state)
    for key, x in fast.items():
        assert torch.allclose(
            x, torch.stack([state[key] for state in plain], 1), atol=1e-6
        )  # logits go through float32
    outs = list(fast.values()), [x for state in plain for x in state.values()]
    grads = [torch.autograd.grad(sum((x.double() ** 2).sum() for x in out), embed)[0] for out in outs]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6) and grads[0].abs().min() > 0


@variants("dreamerv2 no_gru_norm")
def test_gru_remembers(variant):
    """A new network keeps most of its state: the update gate is sigmoid(-1) at zero input."""
    for cell in dreamerv2.GRU(2, 4), variant.GRU(2, 4):
        for p in cell.parameters():
            torch.nn.init.zeros_(p)
        assert torch.allclose(cell(torch.zeros(1, 2), torch.ones(1, 4)), torch.full((1, 4), 1 - 1 / (1 + math.e)))
    assert total(dreamerv2.GRU(2, 4)) == total(cell) + 2 * 12


def test_windows_begin_anew():
    """A window knows no action before its first row, nor a state, whatever is_first says there."""
    agent = agent_of()
    batch = random_batch(agent)
    action, is_first = agent.previous(batch)
    assert (action[:, 0] == 0).all() and is_first[:, 0].all() and torch.equal(is_first[:, 1:], batch["is_first"][:, 1:])
    assert torch.equal(action[:, 1:].argmax(-1), batch["action"][:, :-1])


def test_rewards_are_squashed():
    """tanh in the loss alone: what is predicted, not what is stored."""
    losses = {}
    for squash in (True, False):
        agent = agent_of(tanh_reward=squash)
        torch.manual_seed(1)
        batch = random_batch(agent)
        batch["reward"] *= 5
        kept = batch["reward"].clone()
        torch.manual_seed(2)
        losses[squash] = agent.model_losses(batch)[0]["reward"]
        assert torch.equal(kept, batch["reward"])
    torch.manual_seed(2)
    predicted = kept - (2 * losses[False]).sqrt(), kept + (2 * losses[False]).sqrt()
    found = [(x - kept.tanh()).square() / 2 for x in predicted]
    assert (torch.isclose(found[0], losses[True], rtol=1e-3) | torch.isclose(found[1], losses[True], rtol=1e-3)).all()


def test_without_discount_head(monkeypatch):
    """--cont-scale 0: no loss, and gamma everywhere, the start included."""
    agent = agent_of(cont_scale=0.0, gamma=0.9)
    losses, _, post, _ = agent.model_losses(random_batch(agent))
    disc = agent.imagine(post, torch.ones(4, 8, dtype=torch.bool))[3]
    assert "cont" not in losses and (disc == torch.tensor(0.9)).all()
    agent = agent_of(gamma=0.9)
    disc = agent.imagine(post, torch.ones(4, 8, dtype=torch.bool))[3]
    assert (disc[:, 0] == 0).all() and (disc[:, 1:] > 0).all()


@variants("dreamerv2 no_image_grad", "dreamerv2 no_reward_grad")
def test_gradient_patches(variant):
    """The head still learns, the latents do not learn from it."""
    loss, head = ("vector", "decoder") if "image" in variant.__name__ else ("reward", "reward")
    for on in (True, False):
        agent = agent_of(module=dreamerv2 if on else variant)
        agent.update(random_batch(agent))
        value = agent.model_losses(random_batch(agent))[0][loss].mean()
        parts = [list(part.parameters()) for part in (getattr(agent, head), agent.encoder)]
        mine, theirs = (torch.autograd.grad(value, part, allow_unused=True, retain_graph=True) for part in parts)
        assert all(g is not None and g.abs().max() > 0 for g in mine)
        assert all((g is not None) == on for g in theirs)


# --- behaviour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))])
@variants("dreamerv2", "dreamerv2 gaussian")
def test_reinforce_needs_no_graph(monkeypatch, action_space, variant):
    """Imagination without gradients is the same imagination, and gives the actor and the critic the same gradients."""
    results = []
    for forced in (False, True):
        agent = agent_of(action_space, rho=1.0, module=variant)
        torch.manual_seed(1)
        batch = random_batch(agent)
        post = agent.model_losses(batch)[2]
        if forced:
            real = torch.set_grad_enabled
            monkeypatch.setattr(torch, "set_grad_enabled", lambda on, real=real: real(True))
        torch.manual_seed(2)
        losses, _ = agent.behaviour_losses(post, batch)
        monkeypatch.undo()
        params = [agent.optimizer.groups[key][0] for key in ("actor", "critic")]
        grads = [torch.autograd.grad(losses[key].mean(), p) for key, p in zip(("actor", "critic"), params, strict=True)]
        results.append([x for g in grads for x in g])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7) and a.abs().max() > 0


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))])
def test_who_learns_from_what(rho, action_space):
    """The actor's loss has gradients for the actor, and past it the dynamics; the critic's for the critic only."""
    agent = agent_of(action_space, rho=rho, entropy_scale=0.0)
    batch = random_batch(agent)
    post = agent.model_losses(batch)[2]
    losses, _ = agent.behaviour_losses(post, batch)
    everything = dict(agent.named_parameters())
    names = [name for name, p in everything.items() if p.requires_grad]
    for key in "actor", "critic":
        grads = torch.autograd.grad(
            losses[key].mean(), [everything[n] for n in names], allow_unused=True, retain_graph=True
        )
        found = {name.split(".")[0] for name, g in zip(names, grads, strict=True) if g is not None}
        allowed = {"actor", "rssm", "reward", "cont"} if key == "actor" and rho < 1 else {key}
        assert key in found and found <= allowed, (key, found)
        if key == "actor":  # discrete: through straight-through samples
            strengths = [g.abs().max() for name, g in zip(names, grads, strict=True) if name.startswith("actor")]
            assert ({"rssm", "reward"} <= found) == (rho < 1) and max(strengths) > 0
    before = {name: p.detach().clone() for name, p in everything.items()}
    agent.optimizer.groups["critic"], agent.optimizer.groups["model"] = ([], 0.0), ([], 0.0)
    agent.optimizer.step("actor", torch.autograd.grad(losses["actor"].mean(), agent.optimizer.groups["actor"][0]))
    changed = {name.split(".")[0] for name, p in everything.items() if not torch.equal(p, before[name])}
    assert changed == {"actor"}


@variants("dreamerv2 gaussian")
def test_dynamics_gradient_is_the_derivative(variant):
    """Gaussian latents, deviations far from the bounds, one noise: the gradient is that of finite differences."""
    agent = agent_of(spaces.Box(-1, 1, (2,)), module=variant, rho=0.0, entropy_scale=0.0, dtype=torch.float64)
    for x in agent.modules():  # rounding to float32 would swamp small differences
        if isinstance(x, variant.Head):
            x.forward = lambda feat, x=x: x.out(x.mlp(feat))
    agent.rssm.dist = lambda logits: (logits[..., 0], 2 * (logits[..., 1] / 2).sigmoid() + 0.1)
    actor = agent.actor
    actor.dist = lambda feat: (
        actor.out(actor.mlp(feat)).tanh(),
        2 * (actor.std_out(actor.mlp(feat)) / 2).sigmoid() + 0.1,
    )
    with torch.no_grad():
        actor.std_out.weight.zero_(), actor.std_out.bias.fill_(-30.0)  # deviation 0.1
        actor.out.weight.zero_()  # a policy that does not look: the gradient past what it sees is left out
    cell = agent.rssm.cell
    cell.forward = lambda x, h: plain_gru(cell, x, h)
    shapes = {key: x.shape[1:] for key, x in agent.rssm.initial(1).items()}
    post = {key: torch.randn(4, 8, *shape, dtype=torch.float64) for key, shape in shapes.items()}
    torch.set_default_dtype(torch.float64)
    try:

        def objective():
            torch.manual_seed(5)
            batch = {"is_terminal": torch.zeros(4, 8, dtype=torch.bool)}
            return agent.behaviour_losses(post, batch)[0]["actor"].mean()

        agent.cont = None  # whose discounts weigh without gradient
        (grad,) = torch.autograd.grad(objective(), actor.out.bias)
        for i in range(2):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    actor.out.bias[i] += step
                    values.append(float(objective()))
                    actor.out.bias[i] -= step
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(grad[i]), rel=1e-4)
            assert abs(float(grad[i])) > 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


def plain_gru(cell, x, h):
    """The cell without rounding to float32."""
    reset, cand, update = cell.norm(cell.gates(torch.cat([x, h], -1))).chunk(3, -1)
    update = (update - 1).sigmoid()
    return update * torch.tanh(reset.sigmoid() * cand) + (1 - update) * h


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_policy_sees_features_without_gradient(monkeypatch, rho):
    """Where there is a gradient it flows through states and actions, not through what the policy saw."""
    agent, seen = agent_of(rho=rho, imag_horizon=3), []
    real = agent.actor.sample
    monkeypatch.setattr(agent.actor, "sample", lambda feat: seen.append(feat.requires_grad) or real(feat))
    batch = random_batch(agent)
    post = agent.model_losses(batch)[2]
    with torch.set_grad_enabled(rho < 1):
        feat, action, *_ = agent.imagine(post, batch["is_terminal"])
    assert seen == [False] * 3 and feat.requires_grad == action.requires_grad == (rho < 1)


def test_total_loss():
    """Image, vector and reward count once, KL and discount as their flags say."""
    agent = agent_of(kl_scale=0.3, cont_scale=7.0)
    stats = agent.update(random_batch(agent))
    vector, reward, cont, kl, total = (
        float(stats[f"losses/{key}"]) for key in ("vector", "reward", "cont", "kl", "total")
    )
    assert total == pytest.approx(vector + reward + 7 * cont + 0.3 * kl, rel=1e-5) and kl > 0.01


def test_kl_of_posterior_from_prior():
    """The KL of the update is that of the posterior from the prior, in this order; both train the recurrence."""
    agent, batch = agent_of(), random_batch(agent_of())
    with torch.no_grad():
        agent.rssm.post_out.weight.mul_(20)  # far from symmetric
    priors = []
    agent.rssm.prior.register_forward_hook(lambda *hook: priors.append(hook[2]))
    torch.manual_seed(3)
    losses, _, post, _ = agent.model_losses(batch)
    logits = post["logits"], *priors
    forward, backward = (
        torch.distributions.kl_divergence(*[torch.distributions.Categorical(logits=x) for x in pair]).sum(-1).mean()
        for pair in (logits, logits[::-1])
    )
    assert abs(float(forward - backward)) > 0.1
    gates = agent.rssm.cell.gates.weight
    (slope,) = torch.autograd.grad(losses["kl"], priors, retain_graph=True)  # what the KL wants of the prior
    (through_prior,) = torch.autograd.grad(priors[0], gates, slope, retain_graph=True)
    assert through_prior.abs().max() > 0 and float(losses["kl"]) == pytest.approx(float(forward), rel=1e-4)
    torch.manual_seed(3)
    assert float(agent.update(batch)["losses/kl"]) == pytest.approx(float(forward), rel=1e-4)


def test_learning_rates():
    """Each group has its own parameters and its own rate, and together they have all but the slow critic's."""
    agent = agent_of(learning_rate=1e-3, actor_learning_rate=2e-3, critic_learning_rate=3e-3)
    groups = agent.optimizer.groups
    assert {name: rate for name, (_, rate) in groups.items()} == {"model": 1e-3, "actor": 2e-3, "critic": 3e-3}
    mine = {name: {id(p) for p in params} for name, (params, _) in groups.items()}
    assert mine["actor"] == {id(p) for p in agent.actor.parameters()}
    assert mine["critic"] == {id(p) for p in agent.critic.parameters()}
    assert sum(map(len, mine.values())) == len(set.union(*mine.values())) == len(agent.params)


def test_heads_are_not_rounded():
    """With autocast to bfloat16 a value near 150 keeps its digits."""
    head = dreamerv2.Head(8, 1, dreamerv2.resolve(dreamerv2.Args(env_id="X-v0", size="debug")))
    torch.nn.init.constant_(head.out.bias, 150.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(torch.randn(1000, 8))
    assert out.dtype == torch.float32 and len(out.unique()) > 500


@pytest.mark.parametrize("advantage", ["code", "paper"])
def test_advantage(monkeypatch, advantage):
    """code: the next state's return minus this state's slow value; paper: this state's return minus its value."""
    agent, seen = agent_of(imag_horizon=4, advantage=advantage), {}
    N, slow, reward = 32, torch.randn(32, 5), torch.randn(32, 5)
    disc = torch.full((N, 5), 0.9)
    given = torch.zeros(N, 5, agent.rssm.split[0] + 32), torch.eye(3)[torch.randint(3, (N, 4))], reward, disc, slow
    value = torch.randn(N, 4)
    monkeypatch.setattr(agent, "imagine", lambda *_: given)
    monkeypatch.setattr(agent.critic, "forward", lambda feat: value[..., None])
    monkeypatch.setattr(dreamerv2, "actor_loss", lambda *x: seen.update(args=x) or x[0])
    agent.behaviour_losses(None, {"is_terminal": None})
    returns = dreamerv2.lambda_return(reward, slow, disc, agent.args.lam)
    logp, _, target, baseline, weight, *_ = seen["args"]
    shift = int(advantage == "code")
    assert torch.equal(target, returns[:, shift : 3 + shift]) and logp.shape == weight.shape == (N, 3)
    assert torch.equal(baseline, (slow if shift else value)[:, :3])


def test_slow_critic():
    """A hard copy after updates 0, 3, 6, nothing between."""
    agent = agent_of(slow_every=3)
    slow = lambda: [p.detach().clone() for p in agent.slow_critic.parameters()]
    fast = lambda: list(agent.critic.parameters())
    before = slow()
    for i in range(7):
        agent.update(random_batch(agent))
        now = slow()
        assert all(map(torch.equal, now, fast() if i % 3 == 0 else before))
        assert all(map(torch.equal, now, fast())) == (i % 3 == 0)
        before = now
    assert int(agent.optimizer.moments["critic"][2]) == 7


@variants("dreamerv2 schedules")
def test_schedules(variant):
    """rho 0.9 -> 1 and the entropy scale 3e-3 -> 3e-4 within 2.5M policy steps, then constant."""
    agent = agent_of(module=variant, size="atari-fast", units=8, hidden=8, deter=8, stoch=2, classes=2)
    for steps, rho, entropy in (50_000, 0.902, 2.946e-3), (1_250_000, 0.95, 1.65e-3), (9_000_000, 1.0, 3e-4):
        agent.optimizer.moments["critic"][2].fill_((steps - 50_000) // 16)
        assert [float(x) for x in agent.scales()] == pytest.approx([rho, entropy], rel=1e-5)
    agent = agent_of(module=variant)
    assert np.isfinite([float(x) for x in agent.update(random_batch(agent)).values()]).all()


def test_constant_scales(monkeypatch):
    """What the actor's loss is given without schedules: rho by action space or flag, the preset's entropy scale."""
    seen, real = [], dreamerv2.actor_loss
    monkeypatch.setattr(dreamerv2, "actor_loss", lambda *x: seen.append(x[-2:]) or real(*x))
    for agent in agent_of(), agent_of(spaces.Box(-1, 1, (2,))), agent_of(rho=0.0):
        agent.update(random_batch(agent))
    assert seen == [(1.0, 2e-3), (0.0, 2e-3), (0.0, 2e-3)]


def test_behaviour_learns_in_the_updated_model(monkeypatch):
    """Start states are those from before the update of the world model, imagination and heads those after it."""
    agent, order = agent_of(), []
    real_step, real_imagine = agent.optimizer.step, agent.rssm.imagine
    monkeypatch.setattr(agent.optimizer, "step", lambda name, g: order.append(name) or real_step(name, g))
    monkeypatch.setattr(agent.rssm, "imagine", lambda *x: order.append("imagine") or real_imagine(*x))
    agent.update(random_batch(agent))
    assert order == ["model", "imagine", "actor", "critic"]


def test_decay():
    """Without gradients an update multiplies every parameter by 1 - decay, whatever the learning rate."""
    for rate in (1.0, 1e-8):
        params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(()))]
        before = [p.detach().clone() for p in params]
        optimizer = dreamerv2.Adam({"x": (params, rate)}, dreamerv2.Args(weight_decay=0.25))
        optimizer.step("x", [torch.zeros_like(p) for p in params])
        assert all(torch.equal(p, 0.75 * b) for p, b in zip(params, before, strict=True))


# --- data -------------------------------------------------------------------------------------------------------------


def recorded(lengths, capacity=400, ends=False, num_envs=1):
    """A replay with episodes of these lengths, the last one still under way; observations count the rows."""
    space = spaces.Dict(vector=spaces.Box(-1, 1, (1,)))
    cpu = torch.device("cpu")
    replay = dreamerv2.Replay(capacity * num_envs, num_envs, space, spaces.Discrete(2), cpu, ends)
    for i, length in enumerate(lengths):
        for t in range(length):
            last = np.full(num_envs, t == length - 1 and i < len(lengths) - 1)
            row = {"vector": np.full((num_envs, 1), replay.rows, np.float32), "reward": np.zeros(num_envs)}
            row |= {"is_first": np.full(num_envs, t == 0), "is_last": last, "is_terminal": last}
            replay.add({**row, "action": np.zeros(num_envs)})
    return replay


def starts_of(replay, B=20_000, T=10):
    torch.manual_seed(0)
    rows = replay.sample(B, T)["vector"][..., 0].long()
    assert torch.equal(rows, rows[:, :1] + torch.arange(T))
    return torch.bincount(rows[:, 0], minlength=replay.rows).double() / B


def close(found, expected, draws=20_000):
    """Frequencies within 5 standard errors."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_windows_of_finished_episodes():
    """Uniform over finished episodes, then over their places; short ones from their start; none of the running one."""
    expected = np.zeros(30 + 12 + 4 + 25)
    expected[:21] = 1 / 3 / 21
    expected[30:33] = 1 / 3 / 3
    expected[42] = 1 / 3
    assert close(starts_of(recorded([30, 12, 4, 25])), expected)


def test_windows_of_several_environments(tmp_path):
    """Against brute force: rings of all sizes, episodes of all lengths, wrapped or not, saved and read back."""
    rng, space = np.random.default_rng(0), spaces.Dict(vector=spaces.Box(-1, 1, (2,)))
    make = lambda E, R, ends: dreamerv2.Replay(R * E, E, space, spaces.Discrete(2), torch.device("cpu"), ends)
    for trial in range(60):
        E, R, T, ends = int(rng.integers(1, 4)), int(rng.integers(12, 40)), int(rng.integers(2, 11)), bool(trial % 2)
        replay, first, firsts = make(E, R, ends), np.ones(E, bool), []
        for t in range(int(rng.integers(T, 150))):
            last = rng.random(E) < 0.15
            row = {"vector": np.float32([[t, e] for e in range(E)]), "reward": np.zeros(E), "action": np.zeros(E)}
            replay.add({**row, "is_first": first, "is_last": last, "is_terminal": last})
            firsts.append(first)
            first = last
            if rng.random() < 0.1 and replay.windows(T):
                replay.sample(3, T)  # so that what is kept between samples has to be renewed
        oldest, expected = max(0, replay.rows - R), set()
        for e in range(E):
            begins = np.flatnonzero(np.array(firsts)[:, e])
            for a, b in zip(begins, begins[1:], strict=False):
                if b > oldest:
                    low = max(a, oldest)
                    expected |= {(e, min(t, replay.rows - T)) for t in range(low, max(low, b - T) + 1)}
        row, env = replay.sample(2000, T)["vector"].long().unbind(-1)
        assert (env == env[:, :1]).all() and (row == row[:, :1] + torch.arange(T)).all()
        found = set(zip(env[:, 0].tolist(), row[:, 0].tolist(), strict=True))
        assert not expected or found <= expected and {e for e, _ in found} == {e for e, _ in expected}
        other, state = make(E, R, ends), replay.save(tmp_path / str(trial))
        other.load(tmp_path / str(trial), state)
        batches = []
        for x in replay, other:
            torch.manual_seed(trial)
            batches.append(x.sample(20, T))
        assert all(torch.equal(x, batches[1][key]) for key, x in batches[0].items())


def test_windows_prefer_ends():
    """ends: the last window has the probability (T + 1) / (places + T), as in the code."""
    expected = np.zeros(30 + 12 + 4 + 25)
    expected[:20], expected[20] = 1 / 3 / 31, 1 / 3 * 11 / 31
    expected[30:32], expected[32] = 1 / 3 / 13, 1 / 3 * 11 / 13
    expected[42] = 1 / 3
    assert close(starts_of(recorded([30, 12, 4, 25], ends=True)), expected)


def test_windows_before_the_first_end():
    """While no episode has finished, the running one is used; afterwards no more."""
    expected = np.zeros(25)
    expected[:16] = 1 / 16
    assert close(starts_of(recorded([25])), expected)
    expected = np.zeros(15 + 25)
    expected[:6] = 1 / 6
    assert close(starts_of(recorded([15, 25])), expected)


def test_windows_in_a_full_ring():
    """An episode that has left the ring in part is used as far as it is there; late ones end with the last row."""
    replay = recorded([30, 30, 3, 4], capacity=50)  # rows 17 to 66 are kept: 13 of the first episode
    expected = np.zeros(67)
    expected[17:21] = 1 / 3 / 4
    expected[30:51] = 1 / 3 / 21
    expected[57] = 1 / 3  # row 60 would run beyond row 66
    assert close(starts_of(replay), expected)


@pytest.mark.parametrize("ends", [False, True])
def test_ends_flag(made, tmp_path, ends):
    """--ends says whether the replay of a run favours ends of episodes."""
    dreamerv2.train(short(dreamerv2, "CartPole-v1", tmp_path, total_timesteps=30, ends=ends))
    assert made["Replay"][0].ends is ends


@pytest.mark.parametrize("action_space", [spaces.Discrete(4), spaces.Box(-1, 1, (2,))])
def test_random_actions(action_space):
    """Uniform over the classes, or over the box; the state is empty but for the action."""
    agent, N = agent_of(action_space), 20_000
    state = agent.act({"is_first": torch.zeros(N), **agent.initial(N)}, random=True)
    action = agent.env_action(state)
    assert (state["deter"] == 0).all() and (state["stoch"] == 0).all()
    if agent.actor.discrete:
        assert close(torch.bincount(torch.as_tensor(action), minlength=4) / N, torch.full((4,), 0.25), N)
        assert torch.equal(state["action"].argmax(-1), torch.as_tensor(action))
    else:
        counts = torch.histc(torch.as_tensor(action[:, 1]), 10, -1, 1) / N
        assert action.shape == (N, 2) and close(counts, torch.full((10,), 0.1), N)
        assert torch.equal(state["action"], torch.as_tensor(action))


def test_acting_and_training_agree(monkeypatch):
    """Without sampling noise the filter in acting goes through the states of training, from an episode's start."""
    mode = lambda logp, noise=None: torch.zeros_like(logp).scatter_(-1, logp.argmax(-1, keepdim=True), 1.0)
    monkeypatch.setattr(dreamerv2, "sample_onehot", mode)
    states, real = [], dreamerv2.Agent.act
    spy = lambda self, inputs, **flags: states.append(real(self, inputs, **flags)) or states[-1]
    monkeypatch.setattr(dreamerv2.Agent, "act", spy)
    agent, replay = experience(dreamerv2, "Tiny-both-discrete-v0", rows=60, num_envs=1)
    start = int(replay.data["is_first"][:40, 0].nonzero()[2, 0])
    batch = {key: x[start : start + 15, 0][None] for key, x in replay.data.items()}
    assert batch["is_first"][0, 1:].any()
    post = agent.model_losses(batch)[2]
    for key in "deter", "stoch":
        expected = torch.stack([state[key][0] for state in states[start : start + 15]])
        assert torch.allclose(post[key][0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        dict(norm=True),
        dict(rho=0.0),
        dict(rho=0.5),
        dict(kl_balance=0.5),
    ],
)
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_variants_train(flags, action):
    """Losses of every variant stay finite and fall on one batch."""
    check_training(dreamerv2, action, **flags)


@variants("dreamerv2 gaussian", "dreamerv2 no_gru_norm")
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_patched_files_train(variant, action):
    """The same with patches of results/ablations."""
    check_training(variant, action)


def check_training(module, action, **flags):
    agent, replay = experience(module, f"Tiny-both-{action}-v0", learning_rate=3e-3, **flags)
    batch = window(module, agent, replay)
    history = [agent.update(batch) for _ in range(40)]
    assert all(torch.isfinite(x) for stats in history for x in stats.values())
    assert history[-1]["losses/image"] < history[0]["losses/image"] / 2
