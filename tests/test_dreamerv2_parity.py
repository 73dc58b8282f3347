# SPDX-License-Identifier: MIT
"""dreamerv2.py against numbers of the authors' released code: values and gradients."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from parity import TOLERANCE, case

import dreamerv2

CONSTANT = 0.5 * np.log(2 * np.pi)  # of a unit-variance normal, which the code's losses leave out


def tied(data, layers, prefix=""):
    """{our parameter: name of its gradient}, after a copy of the weights. layers: {our layer: official name}."""
    found = {}
    for layer, name in layers.items():
        official = ("gamma", "beta") if isinstance(layer, torch.nn.LayerNorm) else ("kernel", "bias")
        for p, part in zip((layer.weight, layer.bias), official, strict=True):
            with torch.no_grad():
                p.copy_(turned(data[f"{prefix}param/{name}/{part}"]))
            found[p] = f"{name}/{part}"
    return found


def turned(x):
    """An official weight (..., in, out) or a gradient of one, in PyTorch's order, and back."""
    return x.permute(3, 2, 0, 1) if x.dim() == 4 else x.T if x.dim() == 2 else x


def untied(x):
    return x.permute(2, 3, 1, 0) if x.dim() == 4 else x.T if x.dim() == 2 else x


def made(action_space=None, obs_space=None, **flags):
    """A small agent, for its methods."""
    args = dreamerv2.resolve(dreamerv2.Args(env_id="X-v0", size="debug", device="cpu", **flags))
    obs_space = obs_space or spaces.Dict(vector=spaces.Box(-1, 1, (2,)))
    return dreamerv2.Agent(obs_space, action_space or spaces.Discrete(3), args)


@case("dreamerv2_01_gru")
def test_gru(data):
    x, h = data.leaf("in/x"), data.leaf("in/h")
    cell = dreamerv2.GRU(x.shape[1], h.shape[1])
    assert cell.norm.eps == pytest.approx(float(data["cfg/eps"])) and data["cfg/update_bias"] == -1
    params = tied(data, {cell.gates: "cell/dense", cell.norm: "cell/norm"})
    out = cell(x, h)
    data.check("out/h", out)
    grads = torch.autograd.grad((out * data["in/cot"]).sum(), [x, h, *params])
    for name, grad in zip(("x", "h", *params.values()), grads, strict=True):
        data.check(f"grad/{name}", untied(grad) if "/" in name else grad)


@case("dreamerv2_02_rssm")
@pytest.mark.parametrize("variant", ["dreamerv2", "dreamerv2 gaussian"], indirect=True, ids=["cat", "gauss"])
def test_rssm(data, variant):
    """Prior and posterior of one step, by observe, the features, and the step again by imagine."""
    dreamerv2, latent = variant, "gauss" if "gaussian" in variant.__name__ else "cat"
    data.open = {key for key in data.open if key.startswith(latent)}
    D, S, K = data["in/deter"].shape[1], int(data["cfg/stoch"]), int(data["cfg/classes"])
    (_, A), (_, E) = data["in/action"].shape, data["in/embed"].shape
    args = dreamerv2.resolve(dreamerv2.Args(env_id="X-v0", size="debug"))
    args.stoch, args.classes, args.deter, args.hidden = S, K, D, int(data["cfg/hidden"])
    rssm = dreamerv2.RSSM(E, A, args)
    layers = {rssm.inputs: "img_in", rssm.prior[0]: "img_out_0", rssm.prior[-2]: "img_dist_0"}
    layers |= {rssm.post_in: "obs_out", rssm.post_out: "obs_dist"}
    layers |= {rssm.cell.gates: "cell/dense", rssm.cell.norm: "cell/norm"}
    params = tied(data, {layer: f"rssm/{name}" for layer, name in layers.items()}, f"{latent}/")
    assert {key.split("param/")[1] for key in data.arrays if key.startswith(f"{latent}/param")} == set(params.values())
    if latent == "gauss":  # official: all means, then all deviations; ours: pairs
        for layer in rssm.prior[-2], rssm.post_out:
            for p in layer.weight, layer.bias:
                p.data = p.unflatten(0, (2, S)).transpose(0, 1).flatten(0, 1).clone()
    stoch = data[f"{latent}/in/stoch"]
    state = {"deter": data["in/deter"], "stoch": stoch if latent == "cat" else stoch[..., None]}
    action, is_first = data["in/action"], data["in/is_first"][:, None].bool()
    assert is_first.any() and not is_first.all()
    post = rssm.observe(data["in/embed"][:, None], action[:, None], is_first, state)
    data.check(f"{latent}/out/deter", post["deter"][:, 0])
    for kind, logits in ("post", post["logits"][:, 0]), ("prior", rssm.prior(post["deter"][:, 0])):
        if latent == "cat":
            data.check(f"cat/out/{kind}_logit", logits)
        else:
            mean, std = rssm.dist(logits)
            data.check(f"gauss/out/{kind}_mean", mean), data.check(f"gauss/out/{kind}_std", std)
    data.check(f"{latent}/out/feat", rssm.feat({"deter": post["deter"][:, 0], "stoch": state["stoch"]}))
    feat, _ = rssm.imagine(state, lambda feat: action, 1)
    known = ~is_first[:, 0]
    assert torch.allclose(feat[known, 1, -D:], data[f"{latent}/out/deter"][known], **TOLERANCE)


@case("dreamerv2_03_kl")
@pytest.mark.parametrize("variant", ["dreamerv2 gaussian"], indirect=True)
def test_kl(data, variant):
    """Of categoricals, and of the normals of the patch."""
    for name in "low", "high", "mixed":
        post, prior = data.leaf(f"{name}/in/post"), data.leaf(f"{name}/in/prior")
        dists = post.log_softmax(-1), prior.log_softmax(-1)
        data.check(f"{name}/out/kl", dreamerv2.kl_categorical(*dists))
        for balance in "0.8", "0.5":
            for free in "0", "1":
                key = f"{name}/bal{balance}_free{free}"
                loss = dreamerv2.kl_loss(*dists, float(free), float(balance))
                data.check(f"{key}/out/loss", loss)
                grads = torch.autograd.grad(loss, (post, prior), retain_graph=True)
                data.check(f"{key}/grad/post", grads[0]), data.check(f"{key}/grad/prior", grads[1])
    names = [f"{kind}_{part}" for kind in ("post", "prior") for part in ("mean", "std")]
    inputs = [data.leaf(f"gauss/in/{name}") for name in names]
    data.check("gauss/out/kl", variant.kl_gaussian(*inputs))
    loss = variant.kl_loss(torch.stack(inputs[:2]), torch.stack(inputs[2:]), 1.0, 0.8)
    data.check("gauss/out/loss", loss)
    for name, grad in zip(names, torch.autograd.grad(loss, inputs), strict=True):
        data.check(f"gauss/grad/{name}", grad)


@case("dreamerv2_04_distributions")
def test_distributions(data, monkeypatch):
    """One-hot categoricals and truncated normals: density, entropy, mode and samples, with their gradients."""
    logits, sample = data.leaf("onehot/in/logits"), data["onehot/in/sample"]
    actor = made(spaces.Discrete(logits.shape[1])).actor
    monkeypatch.setattr(actor, "dist", lambda feat: (logits.log_softmax(-1),))
    dist = actor.dist(None)
    for key, x in ("logp", actor.log_prob(dist, sample)), ("entropy", actor.entropy(dist)):
        data.check(f"onehot/out/{key}", x)
        data.check(f"onehot/grad/{key}", torch.autograd.grad(x.sum(), logits, retain_graph=True)[0])
    data.check("onehot/out/mode", actor.sample(None, mode=True))
    drawn = actor.sample(None)
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and (drawn.sum(-1) == 1).all()
    (grad,) = torch.autograd.grad((drawn * data["onehot/in/cot"]).sum(), logits)
    data.check("onehot/grad/straight_through", grad)

    feat, x, cot = data["trunc/in/feat"], data["trunc/in/action"], data["trunc/in/cot"]
    actor = made(spaces.Box(-1, 1, (x.shape[1],))).actor
    actor.mlp, sizes = torch.nn.Identity(), (feat.shape[1], x.shape[1])
    actor.out, actor.std_out = torch.nn.Linear(*sizes), torch.nn.Linear(*sizes)
    tied(data, {actor.out: "actor/out/out", actor.std_out: "actor/out/std"}, "trunc/")
    loc, scale = (x.detach().requires_grad_() for x in actor.dist(feat))
    data.check("trunc/out/loc", loc), data.check("trunc/out/scale", scale)
    data.check("trunc/out/mode", actor.sample(feat, mode=True))
    for key, value in ("logp", actor.log_prob((loc, scale), x)), ("entropy", actor.entropy((loc, scale))):
        data.check(f"trunc/out/{key}", value)
        for name, grad in zip(("loc", "scale"), torch.autograd.grad(value.sum(), (loc, scale)), strict=True):
            data.check(f"trunc/grad/{key}_{name}", grad, rtol=2e-4, atol=2e-5)
    wide = [x.detach().double().requires_grad_() for x in (loc, scale)]  # the inverse needs more digits at the ends
    low, high = dreamerv2.truncated_mass(*wide)
    sample = data["trunc/in/sample"].double()
    u = ((torch.special.ndtr((sample - wide[0]) / wide[1]) - low) / (high - low)).detach()
    for function, suffix in (dreamerv2.truncated_sample, ""), (dreamerv2.truncated_icdf, "_exact"):
        value = function(u, *wide)
        assert torch.allclose(value, sample, atol=1e-5)
        for name, grad in zip(("loc", "scale"), torch.autograd.grad((value * cot).sum(), wide), strict=True):
            data.check(f"trunc/grad/sample_{name}{suffix}", grad, rtol=2e-4, atol=2e-5)


@case("dreamerv2_05_actor_critic")
@pytest.mark.parametrize("kind", ["cat", "cont"])
@pytest.mark.parametrize("grad,rho", [("reinforce", 1.0), ("dynamics", 0.0), ("both", None)])
def test_actor_critic(data, monkeypatch, kind, grad, rho):
    """Targets, weights and both losses of the code's form, by the methods that train; imagination is given."""
    mine = f"{kind}/{grad}/"
    data.open = {key for key in data.open if key.startswith((mine, "out/", "grad/"))}
    turn = lambda key: data[key].transpose(0, 1)  # ours: (N, H+1, ...)
    H, (N, A) = len(data["out/target"]), data["in/action"].shape[1:]
    space = spaces.Discrete(A) if kind == "cat" else spaces.Box(-1, 1, (A,))
    flags = dict(gamma=float(data["cfg/gamma"]), lam=float(data["cfg/lam"]), entropy_scale=float(data["cfg/actent"]))
    agent = made(space, rho=1 - float(data["cfg/mix"]) if rho is None else rho, imag_horizon=H, **flags)
    assert agent.args.advantage == "code"
    action = turn("in/action" if kind == "cat" else "in/action_cont")[:, 1:]
    feat, terminal = torch.zeros(N, H + 1, 1), data["in/terminal"]
    # what imagine makes of the predictions
    monkeypatch.setattr(agent.rssm, "imagine", lambda *_: (feat, action))
    logit = turn("in/disc_pred").logit()[..., None]
    heads = {"reward": turn("in/rew")[..., None], "slow_critic": turn("in/slow_value")[..., None], "cont": logit}
    for name, value in heads.items():
        monkeypatch.setattr(getattr(agent, name), "forward", lambda feat, value=value: value)
    _, _, reward, disc, slow_value = agent.imagine(agent.rssm.initial(N), terminal)
    data.check("out/disc", disc.T)
    # what the losses make of it
    names = ["rew", "slow_value", "disc"]
    leaves = [x.detach().requires_grad_() for x in (reward, slow_value, disc)]
    monkeypatch.setattr(agent, "imagine", lambda *_: (feat, action, leaves[0], leaves[2], leaves[1]))
    value = turn("in/value").requires_grad_()
    monkeypatch.setattr(agent.critic, "forward", lambda feat: value[:, :H, None])
    keys = ["policy_logits"] if kind == "cat" else ["policy_loc", "policy_scale"]
    policy = [turn(f"in/{key}").requires_grad_() for key in keys]
    dist = (policy[0].log_softmax(-1),) if kind == "cat" else policy
    monkeypatch.setattr(agent.actor, "dist", lambda feat: [x[:, : H - 1] for x in dist])
    seen = {}
    for name in "lambda_return", "actor_loss", "critic_loss":
        real = getattr(dreamerv2, name)
        monkeypatch.setattr(dreamerv2, name, lambda *x, real=real, name=name: seen.setdefault(name, (x, real(*x)))[1])
    losses, _ = agent.behaviour_losses(None, {"is_terminal": terminal})
    data.check("out/target", seen["lambda_return"][1].T)
    weight = seen["critic_loss"][0][2]
    assert torch.allclose(weight.T, data["out/weight"][:H], **TOLERANCE)
    assert torch.equal(seen["actor_loss"][0][4], weight[:, : H - 1])
    data.open.discard("out/weight")  # its last row is of a state that no loss has
    data.check("out/critic_loss", (losses["critic"] + CONSTANT * weight).mean())
    data.check("grad/critic_loss/value", torch.autograd.grad(losses["critic"].mean(), value)[0].T)
    actor = losses["actor"].mean()
    data.check(f"{mine}out/actor_loss", actor)
    grads = torch.autograd.grad(actor, leaves + policy, allow_unused=True)
    for name, leaf, found in zip(names + keys, leaves + policy, grads, strict=True):
        found = torch.zeros_like(leaf) if found is None else found
        data.check(f"{mine}grad/{name}", found.transpose(0, 1))
    # without a discount head
    agent.cont = None
    monkeypatch.undo()
    feat = torch.zeros(N, H + 1, agent.reward.mlp[0].in_features)
    monkeypatch.setattr(agent.rssm, "imagine", lambda *_: (feat, action))
    disc = agent.imagine(agent.rssm.initial(N), terminal)[3]
    data.check("out/weight_nohead", torch.cat([torch.ones(N, 1), disc[:, :-1]], 1).cumprod(1).T)


@case("dreamerv2_06_heads")
def test_heads(data, monkeypatch):
    """Reward and discount heads with their targets, by the method that trains; the features are given."""
    feat, units = data.leaf("in/feat"), len(data["param/reward/dense0/bias"])
    flags = dict(stoch=1, classes=1, deter=feat.shape[2] - 1, units=units, gamma=float(data["cfg/gamma"]))
    agent, layers = made(tanh_reward=True, **flags), int(data["cfg/layers"])
    params = {}
    for head, name in (agent.reward, "reward"), (agent.cont, "discount"):
        head.mlp = dreamerv2.mlp(feat.shape[2], units, layers, False)
        linears = [x for x in head.mlp if isinstance(x, torch.nn.Linear)]
        layers_of = {layer: f"{name}/dense{i}" for i, layer in enumerate(linears)} | {head.out: f"{name}/out/out"}
        params[name] = tied(data, layers_of)
    known = {"deter": feat[..., 1:], "stoch": feat[..., :1, None], "logits": torch.zeros(*feat.shape[:2], 1, 1)}
    monkeypatch.setattr(agent.rssm, "observe", lambda *_: dict(known))
    B, T = data["in/reward"].shape
    batch = {"reward": data["in/reward"], "is_terminal": data["in/terminal"], "vector": torch.zeros(B, T, 2)}
    batch |= {"is_first": torch.zeros(B, T, dtype=torch.bool), "action": torch.zeros(B, T, dtype=torch.int64)}
    losses = agent.model_losses(batch)[0]
    data.check("out/reward_nll", losses["reward"] + CONSTANT), data.check("out/discount_nll", losses["cont"])
    data.check("out/reward_loss", losses["reward"].mean() + CONSTANT)
    data.check("out/discount_loss", losses["cont"].mean())
    with torch.no_grad():
        data.check("out/reward_mean", agent.reward(feat)[..., 0])
        data.check("out/discount_mean", agent.cont(feat)[..., 0].sigmoid())
    data.check("out/reward_target", batch["reward"].tanh())
    data.check("out/discount_target", agent.args.gamma * (1 - batch["is_terminal"].float()))
    for name, key in ("reward", "reward"), ("discount", "cont"):
        grads = torch.autograd.grad(losses[key].mean(), [feat, *params[name]], retain_graph=True)
        for part, grad in zip(("feat", *params[name].values()), grads, strict=True):
            data.check(f"grad/{name}/{part}", untied(grad) if part != "feat" else grad)
    image, seen = torch.arange(256, dtype=torch.uint8).repeat(16).view(1, 1, 64, 64, 1), []
    encoder = dreamerv2.Encoder(spaces.Dict(image=spaces.Box(0, 255, (64, 64, 1), np.uint8)), agent.args)
    encoder.convs[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder({"image": image})
    data.check("out/image_levels", seen[0].flatten()[:256])


@case("dreamerv2_07_optimizer")
@pytest.mark.parametrize("name", ["official", "fast"])
def test_optimizer(data, name):
    data.open = {key for key in data.open if key.startswith(name)}
    keys = [key.removeprefix("in/param0/") for key in data.arrays if key.startswith("in/param0/")]
    params = [torch.nn.Parameter(data[f"in/param0/{key}"].clone()) for key in keys]
    cfg = {key: float(data[f"{name}/cfg/{key}"]) for key in ("eps", "clip", "wd", "lr")}
    args = dreamerv2.Args(eps=cfg["eps"], clip=cfg["clip"], weight_decay=cfg["wd"])
    optimizer = dreamerv2.Adam({"model": (params, cfg["lr"])}, args)
    norms, values = [], [[p.detach().clone() for p in params]]
    for i in range(len(data[f"{name}/out/grad_norm"])):
        norms.append(optimizer.step("model", [data[f"in/grad/{key}"][i] for key in keys]))
        values.append([p.detach().clone() for p in params])
    data.check(f"{name}/out/grad_norm", torch.stack(norms))
    for j, key in enumerate(keys):
        steps = torch.stack([value[j] for value in values])
        data.check(f"{name}/out/{key}", steps[1:], rtol=2e-6, atol=2e-7)
        data.check(f"{name}/upd/{key}", steps.diff(dim=0), rtol=1e-3, atol=3e-7)


@case("dreamerv2_08_encoder_decoder")
def test_encoder_decoder(data, monkeypatch):
    """Convolutions, and the image loss by the method that trains."""
    image, feat = data["in/image"], data.leaf("in/feat")
    flags = dict(depth=int(data["cfg/depth"]), stoch=1, classes=1, deter=feat.shape[2] - 1)
    agent = made(obs_space=spaces.Dict(image=spaces.Box(0, 255, image.shape[2:], np.uint8)), **flags)
    params = tied(data, {conv: f"encoder/conv{i}" for i, conv in enumerate(agent.encoder.convs)})
    embed = agent.encoder({"image": image})
    data.check("out/embed", embed)
    for (_, name), grad in zip(
        params.items(), torch.autograd.grad((embed * data["in/embed_cot"]).sum(), list(params)), strict=True
    ):
        data.check(f"grad/embed/{name}", untied(grad), summed=True)
    layers = {conv: f"decoder/conv{i}" for i, conv in enumerate(agent.decoder.convs)}
    params = tied(data, {**layers, agent.decoder.linear: "decoder/convin"})
    data.check("out/image", agent.decoder(feat)["image"] - 0.5)  # dreamerv2.py predicts from 0 to 1
    known = {"deter": feat[..., 1:], "stoch": feat[..., :1, None], "logits": torch.zeros(*feat.shape[:2], 1, 1)}
    monkeypatch.setattr(agent.rssm, "observe", lambda *_: dict(known))
    B, T = image.shape[:2]
    batch = {"image": image, "reward": torch.zeros(B, T), "is_terminal": torch.zeros(B, T, dtype=torch.bool)}
    batch |= {"is_first": torch.zeros(B, T, dtype=torch.bool), "action": torch.zeros(B, T, dtype=torch.int64)}
    nll = agent.model_losses(batch)[0]["image"]
    data.check("out/image_nll", nll + CONSTANT * np.prod(image.shape[2:]))
    grads = torch.autograd.grad(nll.mean(), [feat, *params])
    data.check("grad/nll/feat", grads[0], summed=True)
    for name, grad in zip(params.values(), grads[1:], strict=True):
        data.check(f"grad/nll/{name}", untied(grad), summed=True)
