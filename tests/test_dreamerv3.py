# SPDX-License-Identifier: MIT
"""What only dreamerv3.py promises, beside the common suite and the parity with the official numbers."""

import functools
import shutil

import kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import experience, window
from torch._inductor.utils import run_and_get_code

import dreamerv3 as d3


def test_slow_critic_keeps_no_graph():
    """The slow critic's average is no part of autograd: else its history would grow with every update."""
    agent, replay = experience(d3)
    for _ in range(3):
        agent.update(window(d3, agent, replay))
    assert not any(p.requires_grad or p.grad_fn for p in agent.slow_critic.parameters())
    assert not any(p.grad_fn or p.grad is not None for p in agent.params)


def test_first_update_changes_nothing():
    """The learning rate of update 1 is exactly 0, that of update 2 is not."""
    agent, replay = experience(d3, warmup=1)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    agent.update(window(d3, agent, replay))
    assert all(torch.equal(p, before[name]) for name, p in agent.named_parameters())
    agent.update(window(d3, agent, replay))
    same = [name for name, p in agent.named_parameters() if torch.equal(p, before[name])]
    assert same and all("reward.mlp" in name or "critic.mlp" in name for name in same)  # below layers that were zero


def test_new_agent_predicts_nothing():
    """Reward and value are exactly 0 at the start, for every state; the continue probability is not."""
    agent, replay = experience(d3)
    feat = agent.model_losses(window(d3, agent, replay))[1]
    for head in agent.reward, agent.critic, agent.slow_critic:
        assert (d3.twohot_mean(head(feat), agent.bin_values) == 0).all()
    assert agent.cont(feat).std() > 0


def test_observe_equals_its_steps():
    """The fast path (embedding and action layers outside the loop) gives what T calls for one step give."""
    agent, replay = experience(d3)
    batch = window(d3, agent, replay)
    obs = {key: batch[key][:, 1:] for key in agent.decoder.shapes}
    embed, action, is_first = agent.encoder(obs), agent.action_vector(batch["action"][:, :-1]), batch["is_first"][:, 1:]
    noise = torch.rand(*is_first.shape, agent.args.stoch, agent.args.classes).log_().neg_()
    state = agent.rssm.initial(len(embed))
    whole = agent.rssm.observe(embed, action, is_first, state, noise)
    for t in range(is_first.shape[1]):
        now = slice(t, t + 1)
        step = agent.rssm.observe(embed[:, now], action[:, now], is_first[:, now], state, noise[:, now])
        state = {key: step[key][:, 0] for key in ("deter", "stoch")}
        for key in step:
            assert torch.allclose(step[key][:, 0], whole[key][:, t], rtol=1e-4, atol=1e-5), key


def test_gradients_through_time():
    """What kernels.through_time gives every parameter and input is what autograd gives through the loop of observe.

    With resets, and with gradients into each of the three outputs, alone and together.
    """
    agent, _ = experience(d3)
    rssm, args = agent.rssm, agent.args
    torch.manual_seed(3)
    B, T = 3, 12
    embed = torch.randn(B, T, agent.encoder.size, requires_grad=True)
    action = torch.randn(B, T, agent.actor.size, requires_grad=True)
    is_first = torch.zeros(B, T, dtype=torch.bool)
    is_first[1, 5] = is_first[2, 0] = is_first[2, -1] = True  # sequence 0 has none
    noise = torch.rand(B, T, args.stoch, args.classes).log_().neg_()
    state = rssm.initial(B)
    whole = list(rssm.observe(embed, action, is_first, state, noise).values())
    fast = list(kernels.observe(rssm, embed, action, is_first, state, noise).values())
    params = [p for name, p in rssm.named_parameters() if not name.startswith("prior")]
    weights = [torch.randn_like(x) for x in whole]
    for chosen in (0,), (1,), (2,), (0, 1, 2):
        losses = (sum((x[i] * weights[i]).sum() for i in chosen) for x in (whole, fast))
        options = dict(retain_graph=True, materialize_grads=True)
        a, b = (torch.autograd.grad(loss, [*params, embed, action], **options) for loss in losses)
        for x, y in zip(a, b, strict=True):
            assert (x - y).abs().max() <= 1e-4 * x.abs().max()
    last = (fast[0][0, -1] * weights[0][0, -1]).sum()
    (reach,) = torch.autograd.grad(last, embed)  # of the last step: to all before it, of its own sequence only
    assert reach[0, :-1].abs().amax(1).min() > 1e-4 * reach.abs().max() and not reach[1:].any()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("form", ["steps", *(pytest.param(x, marks=pytest.mark.slow) for x in ("images", "plainly"))])
def test_compiled_steps_equal_plain_ones(form):
    """kernels.compiled changes neither statistics, nor gradients, nor latents of an update; and it is really used."""
    compile = {"steps": kernels.compiled, "plainly": kernels.compiled_plainly}
    compile["images"] = functools.partial(kernels.compiled, images=True)
    results = []
    for on in False, True:
        agent, replay = experience(d3)
        batch = window(d3, agent, replay)
        torch.manual_seed(5)
        update = functools.partial(agent.update, batch)
        if on:
            torch.compiler.reset()
            compile[form](agent)
            stats, codes = run_and_get_code(update)
            # the step forward and backward, four parts of an imagined one; encoder, decoder; the parts with gradient
            assert len(codes) == {"steps": 6, "images": 10, "plainly": 12}[form]
        else:
            stats = update()
        squares = dict(enumerate(agent.optimizer.mean_square))  # of the gradients
        results.append({**stats, **squares, "deter": stats["deter"].float()})
    assert results[0].keys() == results[1].keys() and len(squares) > 100
    for key, x in results[0].items():
        assert (x - results[1][key]).abs().max() <= 1e-3 * x.abs().max() + 1e-12, key


def test_operations_of_an_update():
    """Launches are what an update costs on a GPU. The loops hold what is counted here, and no gradient of a weight."""
    agent, batch = kernels.case()
    assert sum(names.total() for names in kernels.count(agent, batch).values()) < 15_200
    counts = kernels.count(kernels.through_time(kernels.case()[0]), batch)
    loops = {kernels.FILTER: 60, kernels.BACK: 85, kernels.DREAM: 95}  # per step
    steps = {kernels.FILTER: 64, kernels.BACK: 64, kernels.DREAM: 15}
    for part, number in loops.items():
        assert counts[part].total() == number * steps[part], part
    products = counts[kernels.BACK]["mm"] + counts[kernels.BACK]["bmm"]
    assert products == 7 * 64  # one for each product of a step, where gradients of weights would make it two
    assert sum(names.total() for names in counts.values()) < 12_700


def test_imagination_equals_its_steps():
    """The fast path (no gradient, heads on all steps at once) gives what one step and one head after the other give."""
    agent, replay = experience(d3)
    for head in agent.reward, agent.slow_critic:  # both are 0 in a new agent
        torch.nn.init.normal_(head.out.weight, std=0.1)
    post = agent.model_losses(window(d3, agent, replay))[2]
    torch.manual_seed(5)
    fast = agent.imagine(post)
    torch.manual_seed(5)
    deter, stoch = post["deter"].flatten(0, 1), post["stoch"].flatten(0, 1)
    noise = torch.rand(agent.args.imag_horizon, *stoch.shape).log_().neg_()
    for t in range(agent.args.imag_horizon + 1):
        feat = torch.cat([deter, stoch.flatten(1)], 1)
        mean = [d3.twohot_mean(head(feat), agent.bin_values) for head in (agent.reward, agent.slow_critic)]
        action = agent.actor.sample(feat) if t < agent.args.imag_horizon else None
        for a, b in zip(fast, (feat, action, mean[0], agent.cont(feat)[:, 0].sigmoid(), mean[1]), strict=True):
            assert b is None or torch.allclose(a[:, t], b, rtol=1e-4, atol=1e-5)
        if action is not None:
            deter = agent.rssm.core(deter, stoch, agent.rssm.action_in(action), agent.rssm.core_hidden.weight)
            stoch = d3.sample_onehot(d3.unimix(agent.rssm.prior(deter), agent.args.unimix).exp(), noise[t])
    assert feat.requires_grad and not any(x.requires_grad for x in fast)


def reached(agent, loss):
    """Which parts of the agent the gradient of a loss reaches."""
    grads = torch.autograd.grad(loss.sum(), agent.params, retain_graph=True, allow_unused=True)
    names = [name for name, p in agent.named_parameters() if p.requires_grad]
    return {name.split(".")[0] for name, grad in zip(names, grads, strict=True) if grad is not None}


PATCHES = ["multidiscrete", "no_recon_gradient", "no_return_norm", "no_reward_value_gradient", "no_symlog"]


def test_every_patch_is_tested():
    """The list of this file is that of the folder."""
    assert sorted(path.name for path in (ROOT / "results" / "ablations").glob("dreamerv3_*")) == [
        f"dreamerv3_{name}.patch" for name in PATCHES
    ]


@pytest.mark.parametrize("variant", [f"dreamerv3 {name}" for name in PATCHES], indirect=True)
def test_ablated_file_runs(variant, tmp_path):
    """The patch applies, and the file trains, saves and evaluates."""
    flags = dict(env_id="Tiny-both-discrete-v0", size="debug", device="cpu", total_timesteps=120)
    result = variant.train(variant.Args(**flags, run_root=str(tmp_path)))
    assert result["updates"] > 1 and np.isfinite(result["losses/total"])
    agent, args = variant.load_agent(result["run_dir"])
    assert len(variant.evaluate(agent, args, 1)) == 1


@pytest.mark.parametrize(
    "variant", ["dreamerv3 no_recon_gradient", "dreamerv3 no_reward_value_gradient"], indirect=True
)
def test_ablated_learning_signals(variant):
    """The head learns all the same, the world model below it does not; in the whole agent it does."""
    name, model = variant.__name__.removeprefix("dreamerv3_"), {"encoder", "rssm"}
    for module in d3, variant:
        agent, replay = experience(module)
        batch = window(module, agent, replay)
        losses, feat, post, _ = agent.model_losses(batch)
        repval = agent.behaviour_losses(feat, post, batch)[0]["repval"]
        for part, loss, head in (
            ("no_recon_gradient", losses["image"] + losses["vector"], "decoder"),
            ("no_reward_value_gradient", losses["reward"], "reward"),
            ("no_reward_value_gradient", repval, "critic"),
        ):
            assert reached(agent, loss) == {head} | (set() if module is variant and part == name else model)
        assert reached(agent, losses["cont"]) == model | {"cont"}


@pytest.mark.parametrize("variant", ["dreamerv3 no_return_norm", "dreamerv3 no_symlog"], indirect=True)
def test_ablated_robustness(variant):
    """What is named is left out, and nothing else."""
    name = variant.__name__.removeprefix("dreamerv3_")
    for module in d3, variant:
        agent, replay = experience(module)
        batch = window(module, agent, replay)
        agent.return_range.copy_(torch.tensor([-500.0, 500.0]))
        losses, feat, post, _ = agent.model_losses(batch)
        stats = agent.behaviour_losses(feat, post, batch)[1]
        assert (stats["stats/return_scale"] == 1) == (module is variant and name == "no_return_norm")
        vector, reward = batch["vector"][:, 1:], batch["reward"][:, 1:]
        recon, value = agent.decoder(feat)["vector"], agent.reward(feat)
        plain = (recon - vector).square().sum(-1), (value[..., 0] - reward).square()
        for key, expected in zip(("vector", "reward"), plain, strict=True):
            assert torch.allclose(losses[key], expected, rtol=1e-3) == (module is variant and name == "no_symlog"), key


@pytest.mark.parametrize("flags,left", [(dict(free_nats=0.0, rep_scale=1.0), 0.0), ({}, 1.0)])
def test_kl_without_free_nats(flags, left):
    """The ablation of the KL is flags: where posterior and prior are alike, nothing is left of it."""
    agent, replay = experience(d3, **flags)
    for layer in agent.rssm.post_out, agent.rssm.prior[-2]:
        torch.nn.init.zeros_(layer.weight)
    losses = agent.model_losses(window(d3, agent, replay))[0]
    assert torch.allclose(losses["dyn"], torch.tensor(left), atol=1e-5)


def test_upsample_conv():
    """Four 3x3 convolutions of the small image give what a 5x5 convolution of the doubled one gives, borders too."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 7, 5, padding=2).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    plain = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    fast = d3.upsample_conv(x, conv)
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)
    weight = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, [x, *conv.parameters()], weight) for y in (fast, plain)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_samples_follow_their_distribution():
    """sample_onehot is exact: chi-square over 200,000 samples; a right sampler fails at one seed in a million."""
    torch.manual_seed(0)
    logp = d3.unimix(torch.tensor([2.0, 0.0, -1.0, -8.0]), 0.01)
    counts = d3.sample_onehot(logp.exp().expand(200_000, 4)).sum(0)
    expected = 200_000 * logp.exp()
    assert ((counts - expected) ** 2 / expected).sum() < 30.66  # 3 degrees of freedom, p = 1e-6


def test_numbers_of_the_specification():
    """Hand-computed values: bins, two-hot weights, returns, unimix, policy deviation."""
    bins = d3.symexp_bins(255)
    assert np.allclose(bins[[0, 126, 127, 128, 129]], [-485165184, -0.17055778, 0, 0.17055778, 0.37020543], rtol=1e-6)
    assert torch.equal(bins, -bins.flip(0))
    index, weight = d3.twohot(torch.tensor(1.0), bins)
    assert index.tolist() == [131, 132] and abs(weight[0] - 0.61732968) < 1e-5
    assert np.allclose(d3.twohot_loss(torch.zeros(3, 255), bins, torch.tensor([0.0, -7.0, 1e9])), np.log(255))
    logits = torch.linspace(-1, 1, 255).expand(4, 255)
    losses = d3.twohot_loss(logits, bins, torch.tensor([0, 1, -3.5, 1e9]))
    assert np.allclose(losses, [5.703935, 5.669426, 5.778985, 4.703935], atol=2e-5)
    reward, value, cont = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [1, 1, 0.9, 0.8]])
    assert np.allclose(d3.lambda_return(reward, value, cont, 0.95), [36.3735, 35.13, 36.0])
    reward, boot, last = torch.tensor([[0.0, 1, 2, 0, 3], [5, 6, 7, 8, 9], [0, 0, 1, 0, 0]])
    target = d3.lambda_return(reward, boot, torch.full((5,), 332 / 333), (1 - last) * 0.95)
    assert np.allclose(target, [9.803514, 8.978979, 11.738966, 11.972973], atol=1e-5)
    logp = d3.unimix(torch.tensor([[2.0, 0, -1]]), 0.01)
    assert np.allclose(logp.exp(), [[0.8386901, 0.1163866, 0.0449233]], atol=1e-6)
    assert abs(d3.kl_categorical(logp, d3.unimix(torch.tensor([[0.0, 0, 1]]), 0.01)) - 0.9640024) < 1e-5
