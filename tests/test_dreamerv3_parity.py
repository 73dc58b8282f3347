# SPDX-License-Identifier: MIT
"""dreamerv3.py against numbers from the official JAX code: values, gradients, optimiser steps, initial weights."""

import re
from dataclasses import fields
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from parity import Data

import dreamerv3 as d3

TOLERANCE = {  # relative, absolute: three times what a float64 computation meets, which leaves room for float32
    "value": (3e-4, 3e-5),
    "grad": (3e-3, 3e-4),
    "summed": (3e-3, 3e-4),  # gradients of convolutions; absolute part at least parity.SUMMED times the largest entry
    "pred": (3e-4, 3e-6),  # mean of a two-hot distribution; absolute part times sum(probability * |bin|)
    "pred_grad": (3e-3, 150.0),  # bins reach 4.85e8
    "from_pred": (1e-3, 1e-3),  # computed from such means: returns, advantages, losses
    "update": (1e-3, 1e-4),  # optimiser step; absolute part times the learning rate
}
MODULES = dict(enc="encoder", dyn="rssm", dec="decoder", rew="reward", con="cont", pol="actor", val="critic")
MODULES["slowval"] = "slow_critic"
LAYERS = [  # official layer name inside its module -> ours
    (r"cnn(\d)", lambda i: f"convs.{i}"),
    (r"cnn(\d)norm", lambda i: f"norms.{i}"),
    (r"mlp(\d)|mlp/linear(\d)", lambda i: f"mlp.{3 * i}"),
    (r"mlp(\d)norm|mlp/norm(\d)", lambda i: f"mlp.{3 * i + 1}"),
    (r"dynin(\d)", lambda i: ("deter_in.0", "stoch_in.0", "action_in.0")[i]),
    (r"dynin(\d)norm", lambda i: ("deter_in.1", "stoch_in.1", "action_in.1")[i]),
    (r"prior(\d)", lambda i: f"prior.{3 * i}"),
    (r"prior(\d)norm", lambda i: f"prior.{3 * i + 1}"),
    (r"conv(\d)", lambda i: f"convs.{2 - i}"),
    (r"conv(\d)norm", lambda i: f"norms.{3 - i}"),
    (r"vec/(\w+)/pred", lambda key: f"heads.{key}"),
    (r"head/(?:logits?|action/logits|action/mean)", lambda: "out"),
    (r"head/action/stddev", lambda: "std_out"),
]
NAMED = dict(dynhid0="core_hidden", dynhid0norm="core_norm", dyngru="core_gates", priorlogit="prior.6")
NAMED |= dict(obs0="post_in", obs0norm="post_norm", obslogit="post_out", imgout="convs.3", spnorm="norms.0")
NAMED |= dict(sp0="from_deter", sp1="from_stoch.0", sp1norm="from_stoch.1", sp2="from_stoch.3")


def our_name(name):
    """Official parameter name -> name in Agent."""
    module, layer, leaf = re.fullmatch(r"(\w+)/(.+)/(\w+)", name).groups()
    found = [NAMED[layer]] if layer in NAMED else []
    for pattern, ours in LAYERS:
        if match := re.fullmatch(pattern, layer):
            found.append(ours(*[int(x) if x.isdigit() else x for x in match.groups() if x is not None]))
    (layer,) = found
    return f"{MODULES[module]}.{layer}.{'weight' if leaf == 'kernel' else leaf}"


def official(x):
    """One of our parameters or its gradient as a view in the official layout: (in, out), (height, width, in, out)."""
    return x.permute({2: (1, 0), 4: (2, 3, 1, 0)}.get(x.ndim, tuple(range(x.ndim))))


def parameter(agent, name):
    return agent.get_parameter(our_name(name))


class Case(Data):
    """A case of a fixture file, with the tolerances from above, and the names and layouts of the official weights."""

    def __init__(self, file, case=""):
        super().__init__(f"dreamerv3_{file}", case)

    def check(self, key, actual, kind="value", scale=1.0):
        """Compare a result. scale: of the absolute tolerance."""
        rtol, atol = TOLERANCE[kind]
        super().check(key, actual, kind == "summed", rtol, atol * scale)

    def check_grads(self, prefix, loss, agent=None, kind="grad", **inputs):
        """Compare the gradients of a loss under prefix: of the inputs given by name, and of parameters of the agent."""
        names = self.names(prefix)
        assert names, f"{self.name}: nothing under {self.prefix}{prefix}"
        tensors = [inputs[name] if name in inputs else parameter(agent, name) for name in names]
        grads = torch.autograd.grad(loss, tensors, retain_graph=True, materialize_grads=True)
        for name, grad in zip(names, grads, strict=True):
            self.check(prefix + name, grad if name in inputs else official(grad), kind)

    @torch.no_grad()
    def load_into(self, agent, prefix="param/"):
        """Copy the official weights under prefix to the agent."""
        for name in self.names(prefix):
            target = official(parameter(agent, name))
            assert target.shape == self[prefix + name].shape, f"{name}: our shape is {tuple(target.shape)}"
            target.copy_(self[prefix + name])


def make_args(cfg, **sizes):
    """Args with the settings of a fixture file. The official policy mixes no uniform distribution in."""
    names = dict(lr="learning_rate", actent="entropy_scale", ret_rate="return_rate", rate="slow_rate")
    values = {names.get(key, key): value for key, value in cfg.items()}
    if "horizon" in cfg:
        values["gamma"] = 1 - 1 / cfg["horizon"]
    known = {field.name for field in fields(d3.Args)}
    values = {key: value for key, value in values.items() if key in known} | sizes
    return d3.resolve(d3.Args(**{"size": "debug", "device": "cpu", "actor_unimix": 0.0, **values}))


def box(*shape, dtype=np.float32):
    return spaces.Box(0, 255, shape, dtype) if dtype == np.uint8 else spaces.Box(-1, 1, shape, dtype)


def make_agent(args, action_space=None, **obs):
    """obs: spaces by name; one number if there are none."""
    return d3.Agent(spaces.Dict(obs or {"vector": box(1)}), action_space or spaces.Discrete(2), args)


def widths(state):
    """Sizes of a latent state for Args."""
    return dict(zip(("deter", "stoch", "classes"), state["deter"].shape[2:] + state["stoch"].shape[2:], strict=True))


def with_context(rows):
    """Put the row of zeros before the window that gives the first state and action."""
    return {key: torch.cat([torch.zeros_like(x[:, :1]), x], 1) for key, x in rows.items()}


def model_losses(agent, post, **rows):
    """Agent.model_losses with a given posterior. rows: {key: (B, T, ...)}; what is left out is zero."""
    shape = post["deter"].shape[:2]
    zeros = {key: torch.zeros(shape) for key in ("reward", "is_first", "is_last", "is_terminal")}
    zeros |= {key: torch.zeros(*shape, *size) for key, size in agent.decoder.shapes.items()}
    zeros |= {"deter": torch.zeros(post["deter"].shape), "stoch": torch.zeros(post["stoch"].shape)}
    agent.rssm.observe = lambda *_: {"logits": torch.zeros(post["stoch"].shape), **post}
    return agent.model_losses(with_context({**zeros, "action": torch.zeros(shape, dtype=int), **rows}))


def behaviour_losses(agent, imagined, logits, replay_logits, replay_slow_logits, rows):
    """Agent.behaviour_losses with given results of imagination and critics. rows: {key: (B, T)}."""
    agent.imagine = lambda post: imagined
    agent.critic.forward = Mock(side_effect=[logits, replay_logits])  # of the imagined states, then the replayed ones
    agent.slow_critic.forward = Mock(return_value=replay_slow_logits)
    return agent.behaviour_losses(replay_logits, None, with_context(rows))


def imagination_losses(agent, imagined, logits):
    """The same with replayed rows that are all zero."""
    replay_logits = torch.zeros(1, len(logits), logits.shape[-1])
    rows = {key: torch.zeros(replay_logits.shape[:2]) for key in ("reward", "is_last", "is_terminal")}
    return behaviour_losses(agent, imagined, logits, replay_logits, replay_logits, rows)


def forced(onehot):
    """Exponential noise that makes sample_onehot draw the given classes."""
    return torch.where(onehot > 0, 1e-30, 1.0)


def check_pred(data, key, logits, bins):
    """Compare the mean of a two-hot distribution, which is returned."""
    pred = d3.twohot_mean(logits, bins)
    data.check(key, pred, "pred", (logits.detach().softmax(-1) * bins.abs()).sum(-1))
    return pred


# --- equations --------------------------------------------------------------------------------------------------------


def test_symlog_symexp():
    """Fixture 01: symlog and symexp."""
    data = Case("01_twohot")
    data.open = {key for key in data.open if key.startswith("out/")}  # the cases follow in tests of their own
    data.check("out/symlog", d3.symlog(data["in/x"]))
    data.check("out/symexp", d3.symexp(data["in/y"]))
    data.finish()


def test_twohot():
    """Fixture 01: bins, two-hot encoding, loss and mean, for each number of bins in the file."""
    cases = sorted({key.split("/")[0] for key in Case("01_twohot").arrays if key.startswith("bins")})
    assert cases
    for case in cases:
        data = Case("01_twohot", case)
        logits, target = data.leaf("in/logits"), data["in/target"]
        bins = d3.symexp_bins(logits.shape[-1])
        data.check("out/bins", bins)
        index, weight = d3.twohot(target, bins)
        data.check("out/twohot", torch.zeros(logits.shape).scatter_add(-1, index, weight))
        loss = d3.twohot_loss(logits, bins, target)
        data.check("out/loss", loss)
        pred = check_pred(data, "out/pred", logits, bins)
        assert (pred[(logits == logits[..., :1]).all(-1)] == 0).all(), "constant logits must give exactly 0"
        data.check_grads("grad/loss_", loss.sum(), logits=logits)
        data.check_grads("grad/pred_", pred.sum(), kind="pred_grad", logits=logits)
        data.finish()


def test_categorical_kl():
    """Fixture 02: uniform mixture, KL, free nats, straight-through sample."""
    data = Case("02_categorical_kl")
    post, prior = data.leaf("in/post"), data.leaf("in/prior")
    logp, logq = (d3.unimix(x, data.cfg["unimix"]) for x in (post, prior))
    for name, x in (("post", logp), ("prior", logq)):
        data.check(f"out/{name}_logprob", x)
        data.check(f"out/{name}_entropy", -(x.exp() * x).sum((-2, -1)))
    data.check("out/kl_each", d3.kl_categorical(logp[..., None, :], logq[..., None, :]))
    losses = {"kl": d3.kl_categorical(logp, logq)}
    losses["dyn"], losses["rep"] = d3.kl_loss(logp, logq, data.cfg["free_nats"])
    for name, loss in losses.items():
        data.check(f"out/{name}", loss)
        data.check_grads(f"grad/{name}_", loss.sum(), post=post, prior=prior)
    wanted = F.one_hot(data["in/index"].long(), post.shape[-1]).float()
    onehot = d3.sample_onehot(logp.exp(), forced(wanted))
    assert torch.equal(onehot, wanted)
    sample = d3.straight_through(onehot, logp.exp())
    data.check("out/straight_through", sample)
    data.check_grads("grad/straight_through_", (data["in/cot"] * sample).sum(), post=post)
    data.finish()


# --- world model ------------------------------------------------------------------------------------------------------


def test_rmsnorm():
    """Fixture 03: RMS norm."""
    data = Case("03_rssm_core", "rmsnorm")
    x, scale = data.leaf("in/x"), data["param/norm/scale"]
    norm = d3.RMSNorm(len(scale))
    norm.load_state_dict({"scale": scale})
    y = norm(x)
    data.check("out/y", y)
    data.check("out/y", norm(x.T, dim=0).T)
    data.check_grads("grad/", (data["in/cot"] * y).sum(), x=x)
    data.finish()


def test_block_linear():
    """Fixture 03: block-diagonal linear layer."""
    data = Case("03_rssm_core", "block")
    kernel, bias = data["param/layer/kernel"], data["param/layer/bias"]
    layer = d3.BlockLinear(data["in/x"].shape[-1], len(bias), data.cfg["blocks"])
    layer.load_state_dict({"weight": kernel, "bias": bias})
    data.check("out/y", layer(data["in/x"]))
    data.finish()


def rssm_agent(data, tokens, action):
    """Agent with the recurrent model of a fixture file; the encoder is as wide as the stored tokens."""
    agent = make_agent(make_args(data.cfg, units=tokens.shape[-1]), spaces.Discrete(action.shape[-1]))
    data.load_into(agent)
    return agent


def test_rssm_core():
    """Fixture 03: one step of the recurrent core."""
    data = Case("03_rssm_core", "core")
    deter, stoch, action = (data.leaf(f"in/{key}") for key in ("deter", "stoch", "action"))
    agent = rssm_agent(data, data["observe/in/tokens"], action)
    clipped = action / action.abs().clamp(min=1).detach()  # dreamerv3.py clamps: no gradient goes into an action
    assert torch.equal(clipped, action.clamp(-1, 1))
    action_hidden = agent.rssm.action_in(clipped)
    out = agent.rssm.core(deter, stoch, action_hidden, agent.rssm.core_hidden.weight)
    data.check("out/deter", out)
    data.check_grads("grad/", (data["in/cot"] * out).sum(), agent, deter=deter, stoch=stoch, action=action)
    data.finish()


def test_rssm_observe():
    """Fixture 03: one filtering step with resets, with action vectors and with action numbers."""
    data = Case("03_rssm_core", "observe")
    vector, tokens = data["core/in/action"], data["in/tokens"][:, None]
    agent = rssm_agent(data, tokens, vector)
    state = {key: data[f"core/in/{key}"] for key in ("deter", "stoch")}
    onehot = agent.action_vector(data["in/action_index"][:, None])
    for suffix, action in (("", vector[:, None]), ("_discrete", onehot)):
        post = agent.rssm.observe(tokens, action, data["in/reset"][:, None], state)
        data.check(f"out/deter{suffix}", post["deter"][:, 0])
        data.check(f"out/logit{suffix}", post["logits"][:, 0])
    data.finish()


def test_rssm_sequence():
    """Fixture 04: posterior and prior of a whole sequence with given samples, and the losses of Agent.model_losses."""
    data = Case("04_prior_posterior")
    agent = rssm_agent(data, data["in/tokens"], data["in/action"])
    state = {key: data[f"in/{key}0"] for key in ("deter", "stoch")}
    noise = forced(data["in/stoch"])
    post = agent.rssm.observe(data["in/tokens"], data["in/action"], data["in/reset"], state, noise)
    assert torch.equal(post["stoch"].round(), data["in/stoch"])
    data.check("out/deter", post["deter"])
    data.check("out/post", post["logits"])
    data.check("out/prior", agent.rssm.prior(post["deter"]))
    losses, _, _, stats = model_losses(agent, post)
    data.check("out/dyn", losses["dyn"])
    data.check("out/rep", losses["rep"])
    data.check("out/dyn_ent", stats["stats/prior_entropy"])
    data.check("out/rep_ent", stats["stats/post_entropy"])
    deter = data["out/deter"].flatten(0, 1).requires_grad_()
    data.check_grads("grad/", (data["in/cot"] * agent.rssm.prior(deter)).sum(), agent, deter=deter)
    data.finish()


def test_posterior_sample_gradient():
    """Fixture 04: the gradient of a posterior sample is that of the mixed probabilities, as in fixture 02."""
    data = Case("04_prior_posterior")
    agent = rssm_agent(data, data["in/tokens"], data["in/action"])
    first = {key: data[f"in/{key}"][:, :1] for key in ("tokens", "action", "reset", "stoch")}
    state = {key: data[f"in/{key}0"] for key in ("deter", "stoch")}
    post = agent.rssm.observe(first["tokens"], first["action"], first["reset"], state, forced(first["stoch"]))
    cot = data["in/cot"][: len(first["stoch"])][:, None]
    (actual,) = torch.autograd.grad((cot * post["stoch"]).sum(), agent.rssm.post_out.bias)
    logits = post["logits"].detach().requires_grad_()
    sample = d3.straight_through(first["stoch"], d3.unimix(logits, data.cfg["unimix"]).exp())
    (expected,) = torch.autograd.grad((cot * sample).sum(), logits)
    torch.testing.assert_close(actual, expected.sum((0, 1)).flatten(), rtol=1e-4, atol=1e-6)


def test_encoder_decoder(monkeypatch):
    """Fixture 05: encoder, decoder, and the reconstruction losses of Agent.model_losses."""
    data = Case("05_encoder_decoder")
    obs = {key: data[f"in/{key}"] for key in ("image", "vector")}
    post = {key: data.leaf(f"in/{key}") for key in ("deter", "stoch")}
    obs_spaces = dict(image=box(*obs["image"].shape[2:], dtype=np.uint8), vector=box(*obs["vector"].shape[2:]))
    monkeypatch.setattr(d3.Decoder, "blocks", data.cfg["bspace"])
    agent = make_agent(make_args(data.cfg, **widths(post)), **obs_spaces)
    data.load_into(agent)
    data.check("out/tokens", agent.encoder(obs))
    losses, feat, _, _ = model_losses(agent, post, **obs)
    for key, recon in agent.decoder(feat).items():
        data.check(f"out/{key}", recon)
        data.check(f"out/{key}_loss", losses[key])
        data.check_grads(f"grad/{key}_loss/", losses[key].sum(), agent, "summed" if key == "image" else "grad", **post)
    # in float64 throughout: of two pixels that nearly tie, rounding would decide which gets the gradient of max-pooling
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    tokens = agent.encoder.double()({key: x.double() for key, x in obs.items()})
    data.check_grads("grad/tokens/", (data["in/tokens_cot"] * tokens).sum(), agent, "summed")
    data.finish()


def test_heads():
    """Fixture 06: reward, continue and value heads, with the losses of Agent.model_losses for the first two."""
    data = Case("06_heads")
    post = {key: data.leaf(f"in/{key}") for key in ("deter", "stoch")}
    args = make_args(data.cfg, bins=data["out/rew_logits"].shape[-1], **widths(post))
    agent = make_agent(args)
    data.load_into(agent)
    losses, feat, _, _ = model_losses(agent, post, reward=data["in/reward"], is_terminal=data["in/terminal"])
    assert torch.equal(feat, data["in/feat"])
    data.check("out/con_target", (1 - data["in/terminal"].float()) * args.gamma)
    con_logits = agent.cont(feat)[..., 0]
    data.check("out/con_logits", con_logits)
    data.check("out/con_pred", con_logits.sigmoid())
    val_logits = agent.critic(feat)
    for name, logits in (("rew", agent.reward(feat)), ("val", val_logits)):
        data.check(f"out/{name}_logits", logits)
        check_pred(data, f"out/{name}_pred", logits, agent.bin_values)
    value_loss = d3.twohot_loss(val_logits, agent.bin_values, data["in/value_target"])
    for name, loss in (("rew", losses["reward"]), ("con", losses["cont"]), ("val", value_loss)):
        data.check(f"out/{name}_loss", loss)
        data.check_grads(f"grad/{name}_loss/", loss.sum(), agent, feat=feat)
    data.finish()


# --- behaviour --------------------------------------------------------------------------------------------------------


def test_lambda_return():
    """Fixture 07: lambda returns of replayed rows, where the mixing stops at is_last; and with lambda 0 and 1."""
    data = Case("07_actor_critic", "lambda")
    live, mix = 1 - data["in/term"].float(), 1 - data["in/last"].float()
    for suffix, disc, lam in (("", data.cfg["disc"], data.cfg["lam"]), ("_lam0", 0.9, 0.0), ("_lam1", 0.9, 1.0)):
        data.check(f"out/ret{suffix}", d3.lambda_return(data["in/rew"], data["in/boot"], live * disc, mix * lam))
    data.finish()


def test_imagination_losses():
    """Fixture 07: values, returns, return range, weights, losses of Agent.behaviour_losses, update by update."""
    data = Case("07_actor_critic", "imag")
    policy_logits, value_logits = data.leaf("in/policy_logits"), data.leaf("in/value_logits")
    reward, cont, actions = data["in/rew"], data["in/con"], policy_logits.shape[-1]
    args = make_args(data.cfg, bins=value_logits.shape[-1], imag_horizon=reward.shape[-1] - 1)
    agent = make_agent(args, spaces.Discrete(actions))
    bins = agent.bin_values
    data.check("in/bins", bins)
    action = F.one_hot(data["in/action"].long(), actions).float()
    dist = d3.unimix(policy_logits, agent.actor.mix)
    logp, entropy = agent.actor.log_prob(dist, action), agent.actor.entropy(dist)
    data.check("out/logpi", logp)
    data.check("out/entropy", entropy)
    value = check_pred(data, "out/val", value_logits, bins)
    slow_value = check_pred(data, "out/slowval", data["in/slow_logits"], bins)
    returns = d3.lambda_return(reward, value, cont, args.lam)
    data.check("out/ret", returns, "from_pred")
    weight = cont.cumprod(-1)
    data.check("out/weight", weight)
    agent.return_range.copy_(torch.stack([data["state/lo_before"][0], data["state/hi_before"][0]]))
    low, high = (q / 100 for q in data.cfg["ret_perc"])
    updates = []
    for u in range(len(reward)):
        before = agent.return_range.clone()
        agent.actor.dist = lambda feat, u=u: dist[u, :, :-1]
        imagined = policy_logits[u], action[u, :, :-1], reward[u], cont[u], slow_value[u]
        losses, stats = imagination_losses(agent, imagined, value_logits[u])
        percentiles = returns[u].detach().quantile(torch.tensor([low, high]))
        assert torch.allclose(agent.return_range, before.lerp(percentiles, args.return_rate), rtol=1e-6, atol=0)
        scale = stats["stats/return_scale"]
        advantage = (returns[u] - value[u, :, :-1]) / scale
        updates.append((*agent.return_range.clone(), scale, advantage, losses["actor"], losses["critic"]))
    after_low, after_high, scale, advantage, policy_loss, value_loss = map(torch.stack, zip(*updates, strict=True))
    data.check("state/lo_after", after_low, "from_pred")
    data.check("state/hi_after", after_high, "from_pred")
    data.check("out/scale", scale, "from_pred")
    data.check("out/adv", advantage, "from_pred")
    # the losses once more, from the functions alone: they stop the gradient of returns and values themselves
    logp, entropy, now, weight = (x[..., :-1] for x in (logp, entropy, value, weight))
    actor = d3.actor_loss(logp, entropy, returns, now, weight, scale[:, None, None], args.entropy_scale)
    critic = d3.critic_loss(value_logits[..., :-1, :], bins, returns, slow_value[..., :-1], weight)
    assert not torch.autograd.grad(actor.sum(), value_logits, materialize_grads=True, retain_graph=True)[0].any()
    for name, losses in (("policy", (policy_loss, actor)), ("value", (value_loss, critic))):
        for loss in losses:  # each update has its own mean
            data.check(f"out/{name}_loss", loss, "from_pred")
            logits = policy_logits if name == "policy" else value_logits
            data.check_grads(f"grad/{name}_", loss.mean((1, 2)).sum(), logits=logits)
    data.finish()


def test_replay_value_loss():
    """Fixture 07: returns of replayed rows and the loss of Agent.behaviour_losses on them, with the given bootstrap."""
    data = Case("07_actor_critic", "replay")
    logits, slow_logits = data.leaf("in/value_logits"), data["in/slow_logits"]
    reward, boot, is_last, is_terminal = (data[f"in/{key}"] for key in ("rew", "boot", "last", "term"))
    args = make_args(data.cfg, bins=logits.shape[-1])
    disc, lam = (1 - is_terminal.float()) * args.gamma, (1 - is_last.float()) * args.lam
    data.check("out/ret", d3.lambda_return(reward, boot, disc, lam))
    agent = make_agent(args)
    # one imagined step that earns the bootstrap and ends there
    zeros = torch.zeros(boot.numel(), 2)
    imag_reward = torch.stack([zeros[:, 0], boot.flatten()], -1)
    feat = torch.zeros(*zeros.shape, args.deter + args.stoch * args.classes)
    imagined = feat, torch.zeros(len(zeros), 1, agent.actor.size), imag_reward, zeros, zeros
    rows = {"reward": reward, "is_last": is_last, "is_terminal": is_terminal}
    imag_logits = torch.zeros(*zeros.shape, args.bins)
    losses, _ = behaviour_losses(agent, imagined, imag_logits, logits, slow_logits, rows)
    data.check("out/repval_loss", losses["repval"], "from_pred")
    data.check_grads("grad/value_", losses["repval"].mean(), logits=logits)
    data.finish()


@pytest.mark.parametrize("case", ["cont", "disc"])
def test_policy(case):
    """Fixture 08: bounded normal and categorical policy, and their loss in Agent.behaviour_losses."""
    data = Case("08_policy", case)
    feat, value_logits, continuous = data["in/feat"], data["in/value_logits"], case == "cont"
    # the features alone matter: all of them deterministic but one latent class
    sizes = dict(deter=feat.shape[-1] - 1, stoch=1, classes=1, blocks=1, bins=value_logits.shape[-1])
    args = make_args(data.cfg, imag_horizon=feat.shape[1] - 1, **sizes)
    size = data[f"out/{'mean' if continuous else 'logits'}"].shape[-1]
    agent = make_agent(args, box(size) if continuous else spaces.Discrete(size))
    data.load_into(agent)
    action = data["in/action"] if continuous else F.one_hot(data["in/action_index"].long(), size).float()
    dist = agent.actor.dist(feat)
    if continuous:
        data.check("out/mean", dist.mean)
        data.check("out/std", dist.stddev)
    else:
        data.check("out/logits", agent.actor(feat))
    data.check("out/logp", agent.actor.log_prob(dist, action))
    data.check("out/entropy", agent.actor.entropy(dist))
    value, slow_value = (d3.twohot_mean(x, agent.bin_values) for x in (value_logits, data["in/slow_logits"]))
    data.check("out/ret", d3.lambda_return(data["in/rew"], value, data["in/con"], args.lam), "from_pred")
    agent.return_range.copy_(torch.stack([data["state/lo_before"], data["state/hi_before"]]))
    imagined = feat, action[:, :-1], data["in/rew"], data["in/con"], slow_value
    loss = imagination_losses(agent, imagined, value_logits)[0]["actor"]
    data.check("out/policy_loss", loss, "from_pred")
    data.check_grads("grad/", loss.mean(), agent)
    data.finish()


# --- optimiser --------------------------------------------------------------------------------------------------------


def test_optimizer():
    """Fixture 09: LaProp on any set of tensors, under each setting in the file.

    Parameters are compared in float32; what a step adds is smaller than their rounding, hence float64 for that.
    """
    arrays = Case("09_optimizer").arrays
    names = [key.removeprefix("in/param0/") for key in arrays if key.startswith("in/param0/")]
    settings = sorted({key.split("/")[0] for key in arrays if "/upd/" in key})
    assert names and settings
    for case in settings:
        data = Case("09_optimizer", case)
        args = make_args(data.cfg)
        for dtype in (torch.float32, torch.float64):
            params = [data[f"in/param0/{name}"].to(dtype).clone() for name in names]
            grads = [data[f"in/grad/{name}"].to(dtype) for name in names]
            optimizer, history = d3.LaProp(params, args), [[p.clone() for p in params]]
            for step_grads in zip(*grads, strict=True):
                optimizer.step(list(step_grads))
                history.append([p.clone() for p in params])
            for name, steps in zip(names, map(torch.stack, zip(*history, strict=True)), strict=True):
                if dtype == torch.float32:
                    data.check(f"out/{name}", steps[1:])
                else:
                    data.check(f"upd/{name}", steps.diff(dim=0), "update", args.learning_rate)
        data.finish()


def test_slow_critic():
    """Fixture 09: the slow critic after each Agent.update, with a critic that stands still."""
    data = Case("09_optimizer", "slow")
    agent = make_agent(make_args(data.cfg))
    (inputs, units), bins = data["in/val/mlp/linear0/kernel"].shape, len(data["in/val/head/logits/bias"])
    layers = sum("val/mlp/linear" in name and "slow" not in name for name in data.names("in/")) // 2
    agent.critic, agent.slow_critic = (d3.Head(inputs, units, layers, bins, 0.0) for _ in range(2))
    agent.slow_critic.requires_grad_(False)
    data.load_into(agent, "in/")
    agent.params = list(agent.critic.parameters())
    agent.model_losses = lambda batch: ({"any": sum(p.sum() for p in agent.params)}, None, None, {})
    agent.behaviour_losses, agent.latents = lambda *_: ({}, {}), lambda post: {}
    agent.optimizer.step = lambda grads: torch.zeros(())
    names, history = data.names("out/"), []
    for _ in range(len(data[f"out/{names[0]}"])):
        agent.update({})
        history.append([official(parameter(agent, f"slowval/{name}")).clone() for name in names])
    for name, steps in zip(names, zip(*history, strict=True), strict=True):
        data.check(f"out/{name}", torch.stack(steps))
    data.finish()


# --- initial weights and sizes ----------------------------------------------------------------------------------------

TRUNCATED = 0.87962566  # deviation of a standard normal cut at 2


def check_moments(name, weight, rms):
    """Statistics of random weights against the deviation they should have: 5 standard errors, and the truncation."""
    numel, mean = weight.numel(), weight.mean().item()
    assert abs(weight.square().mean().sqrt().item() / rms - 1) <= 5 / (2 * numel) ** 0.5, f"{name}: rms"
    assert abs(mean) <= 5 * rms / numel**0.5, f"{name}: mean {mean}"
    assert weight.abs().max().item() <= 2 * rms / TRUNCATED * (1 + 1e-5), f"{name}: truncation"


def test_init(monkeypatch):
    """Fixture 10: names, shapes, zeros, ones and statistics of all initial parameters."""
    data = Case("10_init")
    names = [str(name) for name in data.arrays["out/name"]]
    table = zip(*(data[f"out/{key}"].tolist() for key in ("shape", "numel", "fan_in", "expected_rms")), strict=True)
    rows = dict(zip(names, table, strict=True))
    bins, pixels = rows["rew/head/logits/bias"][0][0], rows["dec/sp0/bias"][0][0]
    args = make_args(data.cfg, bins=bins)
    height = 16 * round((pixels / rows["dec/spnorm/scale"][0][0]) ** 0.5)
    (key,) = {name.split("/")[2] for name in names if name.startswith("dec/vec/")}
    torch.manual_seed(0)
    obs = {"image": box(height, height, data.cfg["chans"], dtype=np.uint8), key: box(data.cfg["vec"])}
    monkeypatch.setattr(d3.Decoder, "blocks", rows["dec/sp0/kernel"][0][0])
    agent = make_agent(args, spaces.Discrete(data.cfg["act"]), **obs)
    trained = {name for name, p in agent.named_parameters() if p.requires_grad}
    assert {our_name(name) for name in names} == trained and len(names) == len(trained)
    for name, (shape, numel, fan_in, rms) in rows.items():
        weight = official(parameter(agent, name)).detach()
        assert weight.shape == tuple(n for n in shape if n) and weight.numel() == numel, f"{name}: {weight.shape}"
        if name.endswith("kernel"):
            assert weight[..., 0].numel() == fan_in, f"{name}: fan in"
        if rms and name.endswith("kernel"):
            check_moments(name, weight, rms)
        else:
            assert (weight == rms).all(), f"{name}: not exactly {rms}"
    assert all(map(torch.equal, agent.slow_critic.parameters(), agent.critic.parameters()))


def test_init_layers():
    """Fixture 10: init_weights on single layers; the official deviation is itself that of one draw."""
    data = Case("10_init")
    row = data.arrays["single/name"].tolist().index("trunc_normal_in")
    torch.manual_seed(0)
    for shape, rms in zip(data["single/shape"].tolist(), data["single/rms"][row].tolist(), strict=True):
        a, b, *more = (n for n in shape if n)
        layer = torch.nn.Linear(a, b)
        if more:
            conv = len(more) == 2
            layer = torch.nn.Conv2d(*more, (a, b)) if conv else d3.BlockLinear(a * b, a * more[0], a)
        d3.init_weights(layer)
        weight = official(layer.weight)
        assert list(weight.shape) == [n for n in shape if n]
        exact = 1.1368 * TRUNCATED / weight[..., 0].numel() ** 0.5
        assert abs(rms / exact - 1) <= 5 / (2 * weight.numel()) ** 0.5
        check_moments(shape, weight, exact)


@pytest.mark.parametrize("blocks", [4, 6, 8])
def test_blocks_are_those_of_the_core(blocks):
    """--blocks is of the recurrent layers alone: the decoder's first layer has 8, as the official configuration."""
    args = d3.resolve(d3.Args(size="debug", device="cpu", blocks=blocks, deter=48))
    agent = make_agent(args, image=box(64, 64, 3, dtype=np.uint8))
    assert len(agent.rssm.core_hidden.weight) == len(agent.rssm.core_gates.weight) == blocks
    assert agent.decoder.from_deter.weight.shape == (8, 48 // 8, 16 * args.depth * 4 // 8)
    assert agent.decoder(torch.randn(2, 3, 48 + args.stoch * args.classes))["image"].shape == (2, 3, 64, 64, 3)


def test_widths_that_cannot_be(capsys):
    """What the decoder of images cannot divide is refused in one line; from vectors it is allowed."""
    args = d3.resolve(d3.Args(size="debug", device="cpu", blocks=3, deter=33))
    make_agent(args)
    with pytest.raises(SystemExit) as stop:
        make_agent(args, image=box(64, 64, 3, dtype=np.uint8))
    assert stop.value.code == 2 and "--deter 33" in capsys.readouterr().err


def meta_agent(size, action_space, **obs):
    """Agent of a published size without memory."""
    with torch.device("meta"), patch.object(d3, "pick_device", lambda args: torch.device("meta")):
        return make_agent(d3.resolve(d3.Args(size=size)), action_space, **obs)


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_parameter_count_of_modules():
    """Fixture 10: parameters of each module at each published size; one image, discrete actions."""
    data = Case("10_init")
    for size, expected in zip(data.arrays["count/size"].tolist(), data["count/params"].tolist(), strict=True):
        agent = meta_agent(size, spaces.Discrete(data["count/actions"].item()), image=box(64, 64, 3, dtype=np.uint8))
        modules = {**{key: agent.get_submodule(module) for key, module in MODULES.items()}, "total": agent}
        assert [count(modules[key]) for key in data.arrays["count/module"].tolist()] == expected, size


IMAGE, GRAY = box(64, 64, 3, dtype=np.uint8), box(96, 96, 1, dtype=np.uint8)
WALKER = {"orientations": box(14), "height": box(1), "velocity": box(9)}
TOTALS = {  # color image, 6 discrete actions | walker vectors, Box(6) | color image, Box(6) | gray image, 18 actions
    "1m": (686_456, 640_867, 686_846, 769_762),
    "12m": (10_492_616, 9_738_019, 10_494_158, 11_808_850),
    "25m": (23_487_016, 21_782_947, 23_489_326, 26_444_402),
    "50m": (41_646_984, 38_612_003, 41_650_062, 46_900_882),
    "100m": (93_463_624, 86_622_499, 93_468_238, 105_276_626),
    "200m": (165_942_536, 153_769_507, 165_948_686, 186_936_082),
    "400m": (372_887_176, 345_473_059, 372_896_398, 420_106_130),
}


@pytest.mark.parametrize("size", TOTALS)
def test_parameter_count_totals(size):
    """No fixture: totals of the official code for four kinds of environment, without the slow critic."""
    kinds = [(spaces.Discrete(6), {"image": IMAGE}), (box(6), WALKER), (box(6), {"image": IMAGE})]
    kinds.append((spaces.Discrete(18), {"image": GRAY}))
    assert tuple(count(meta_agent(size, action_space, **obs)) for action_space, obs in kinds) == TOTALS[size]
