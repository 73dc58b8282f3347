# SPDX-License-Identifier: MIT
"""planet.py against numbers computed independently, from the published description: values, gradients."""

import torch
from parity import TOLERANCE, case

import planet


def copy(data, layer, name):
    """Weights of a linear layer from `name`/kernel (in, out) and `name`/bias."""
    with torch.no_grad():
        layer.weight.copy_(data[f"param/{name}/kernel"].T)
        layer.bias.copy_(data[f"param/{name}/bias"])


@case("planet_01_gru")
def test_gru(data):
    cell = planet.GRU(data["in/x"].shape[1], data["in/h"].shape[1])
    copy(data, cell.gates, "gates"), copy(data, cell.cand, "cand")
    data.check("out/h", cell(data["in/x"], data["in/h"]))


@case("planet_02_kl")
def test_kl(data):
    names = "post_mean", "post_std", "prior_mean", "prior_std"
    inputs = [data[f"in/{name}"].requires_grad_() for name in names]
    data.check("out/kl", planet.kl_gaussian(*inputs))
    loss = planet.kl_loss(inputs[:2], inputs[2:], float(data["cfg/free_nats"])).mean()
    data.check("out/loss", loss)
    for name, grad in zip(names, torch.autograd.grad(loss, inputs), strict=True):
        data.check(f"grad/{name}", grad)


@case("planet_03_preprocess")
def test_preprocess(data):
    data.check("out/image", planet.preprocess(data["in/image"], int(data["cfg/bits"]), data["in/noise"]))


@case("planet_04_cem")
def test_cem(data, monkeypatch):
    """A refit on its own, and the planner's first round, with its noise given and another start forced on it."""
    candidates = (data["in/mean"] + data["in/std"] * data["in/noise"]).clamp(-1, 1)
    returns, top = data["in/reward"].sum(-1), int(data["cfg/top"])
    data.check("out/return", returns)
    data.check("out/top", returns.topk(top).indices.sort().values)
    mean, std = planet.refit(candidates[None], returns[None], top)
    data.check("out/mean", mean[0, 0]), data.check("out/std", std[0, 0])
    seen = []
    noise = data["in/mean"] + data["in/std"] * data["in/noise"]  # cem starts from N(0, 1)
    monkeypatch.setattr(torch, "randn", lambda shape, device: noise.view(shape))
    score = lambda plans: seen.append(plans) or returns[None]
    plan = planet.cem(score, (1, *candidates.shape), 1, top, mean)
    data.check("out/candidates", seen[0][0])
    assert torch.allclose(plan, mean[:, 0])


@case("planet_05_rssm")
def test_rssm(data):
    """The prior and the posterior of one step, by observe, and the prior again by imagine."""
    (N, S), D, A, E = data["in/sample"].shape, *(data[f"in/{key}"].shape[1] for key in ("belief", "action", "embed"))
    hidden = data["param/in/bias"].shape[0]
    rssm = planet.RSSM(E, A, planet.Args(stoch=S, deter=D, hidden=hidden))
    layers = {"in": rssm.inputs, "gru/gates": rssm.cell.gates, "gru/cand": rssm.cell.cand}
    layers |= {"prior_hidden": rssm.prior[0], "post_hidden": rssm.post_hidden}
    layers |= {f"prior_{part}": getattr(rssm.prior[2], part) for part in ("mean", "std")}
    layers |= {f"post_{part}": getattr(rssm.post_out, part) for part in ("mean", "std")}
    assert {key.split("param/")[1].rsplit("/", 1)[0] for key in data.arrays if "param/" in key} == set(layers)
    for name, layer in layers.items():
        copy(data, layer, name)
    state = {"deter": data["in/belief"], "stoch": data["in/sample"]}
    action = data["in/action"][:, None]
    post = rssm.observe(data["in/embed"][:, None], action, torch.zeros(N, 1, dtype=torch.bool), state)
    data.check("out/belief", post["deter"][:, 0])
    for kind, prefix in ("prior", "prior_"), ("post", ""):
        data.check(f"out/{kind}_mean", post[f"{prefix}mean"][:, 0])
        data.check(f"out/{kind}_std", post[f"{prefix}std"][:, 0])
    future = rssm.imagine(state, action)
    for key, name in ("deter", "belief"), ("mean", "prior_mean"), ("std", "prior_std"):
        assert torch.allclose(future[key][:, 0], data[f"out/{name}"], **TOLERANCE)
