# SPDX-License-Identifier: MIT
"""Bias, variance and time of every estimator of gumbel_softmax.py: python results/estimators.py [--size debug]

Writes RUN_ROOT/bench/bench.csv, bench.png and temperature.png, the paper's Figure 1. Of the flags of gumbel_softmax.py
it takes size, seed, batch_size, device, cuda_graph and run_root. Four newer estimators are measured, too, after
git apply results/ablations/gumbel_softmax_newer.patch. Needs matplotlib: pip install matplotlib
"""

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gumbel_softmax as gs  # noqa: E402


def exact_gradient(f, logits):
    """E f(z) and its gradient by enumeration of all K^S values. logits: (S, K) -> (), (S, K)."""
    S, K = logits.shape
    z = F.one_hot(torch.cartesian_prod(*[torch.arange(K)] * S).view(-1, S), K).to(logits)  # (K^S, S, K)
    logits = logits.detach().requires_grad_()
    mean = ((z * logits.log_softmax(-1)).sum((-2, -1)).exp() * f(z).detach()).sum()
    return mean.detach(), torch.autograd.grad(mean, logits)[0]


def toy(latent):
    """A small problem whose gradient can be enumerated. -> f: (..., S, K) -> (...), logits (S, K); float64."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    S, K = (2, 4) if latent == "categorical" else (5, 2)
    hidden, out, square = normal(S * K, 8), normal(8), normal(S * K, S * K) / 4
    f = lambda z: (z.flatten(-2) @ hidden).tanh() @ out + ((z.flatten(-2) @ square) * z.flatten(-2)).sum(-1)
    logits = normal(S, K)
    return f, logits if latent == "categorical" else torch.stack([torch.zeros(S), logits[:, 1]], -1).double()


def measure(name, f, logits, samples, temperature=0.5):
    """One estimator against the exact gradient. -> relative bias, its standard error, variance of a single estimate.

    reinforce has the best constant baseline, E f, which in training it has to estimate.
    """
    mean, exact = exact_gradient(f, logits)
    centre = lambda signal, layer: (signal - (mean if name == "reinforce" else 0), 1.0, 0.0)
    first, second = torch.zeros_like(exact), torch.zeros_like(exact)
    for chunk in torch.empty(samples).split(20_000):  # each sample has logits of its own: one backward pass for all
        rows = logits.expand(len(chunk), *logits.shape).clone().requires_grad_()
        loss = gs.estimate(name, [lambda _, rows=rows: rows], f, temperature, centre)
        grad = torch.autograd.grad(loss.sum(), rows)[0]
        first, second = first + grad.sum(0), second + grad.square().sum(0)
    variance = second / samples - (first / samples).square()
    size = exact.norm()
    bias, error = (first / samples - exact).norm() / size, (variance.sum() / samples).sqrt() / size
    return bias.item(), error.item(), variance.sum().item()


def step_time(args, repeat=40):
    """Median seconds of a training step of the VAE, on noise."""
    agent = gs.Agent(args)
    images = (torch.rand(args.batch_size, 784, device=agent.device) < 0.13).float()
    seconds = []
    for _ in range(repeat + 5):
        start = time.perf_counter()
        agent.update(images, 1.0)
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[5:]))


def new_folder(args, name):
    """Make RUN_ROOT/name, or stop with one line."""
    try:
        (Path(args.run_root) / name).mkdir(parents=True, exist_ok=True)
        return Path(args.run_root) / name
    except OSError as error:
        gs.fail(f"--run-root {args.run_root}: {error}; allowed: a folder that can be written")


def bench(args):
    """All estimators on both toys -> {"run_dir", "rows"}."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    args = gs.resolve(args)
    folder, samples = new_folder(args, "bench"), 2_000 if args.size == "debug" else 200_000
    torch.manual_seed(args.seed)
    kinds, rows = ("categorical", "bernoulli"), []
    print(f"relative bias +- standard error, variance ({samples:,} samples, temperature 0.5), ms per VAE step")
    print("reinforce: bias and variance with the best constant baseline")
    for latent in kinds:
        f, logits = toy(latent)
        for name in [*gs.PATHWISE, *gs.SCORE]:
            if name != "disarm" or latent == "bernoulli":  # disarm: of the patch, for bits only
                seconds = step_time(replace(args, task="vae", latent=latent, estimator=name))
                rows.append([latent, name, *measure(name, f, logits, samples), 1000 * seconds])
                print("{:12} {:18} {:6.3f} +- {:.3f}  {:8.3f}  {:6.2f}".format(*rows[-1]), flush=True)
    with open(folder / "bench.csv", "w", newline="") as file:
        csv.writer(file).writerows([["latent", "estimator", "bias", "error", "variance", "ms"], *rows])
    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    for (left, right), latent in zip(axes, kinds, strict=True):
        _, names, bias, error, variance, _ = zip(*[row for row in reversed(rows) if row[0] == latent], strict=True)
        left.barh(names, bias, xerr=2 * np.array(error))
        left.set(xscale="log", xlim=(1e-3, 3), title=latent, xlabel="relative bias, with 2 standard errors")
        right.barh(names, variance, color="C1")
        right.set(title=latent, xlabel="variance of one estimate")
    figure.tight_layout()
    figure.savefig(folder / "bench.png", dpi=100)
    plt.close(figure)
    temperature_picture(folder / "temperature.png", plt)
    print(f"{folder}: bench.csv, bench.png, temperature.png")
    return {"run_dir": str(folder), "rows": rows}


def temperature_picture(path, plt):
    """The paper's Figure 1: means and samples of gumbel_softmax as the temperature rises."""
    probs = torch.tensor([0.05, 0.17, 0.20, 0.04, 0.11, 0.40, 0.03])
    figure, axes = plt.subplots(2, 5, figsize=(12, 4), sharex=True, sharey=True)
    for i, temperature in enumerate([None, 0.1, 0.5, 1.0, 10.0]):
        logits = probs.log().expand(10_000, 1, 7)
        y = gs.gumbel_softmax(logits, temperature) if temperature else gs.sample_onehot(logits)
        axes[0, i].bar(range(7), y.mean((0, 1)).tolist(), color="C0")
        axes[1, i].bar(range(7), y[0, 0].tolist(), color="C1")
        axes[0, i].set_title(f"temperature {temperature}" if temperature else "categorical")
    axes[0, 0].set(ylabel="mean", ylim=(0, 1))
    axes[1, 0].set_ylabel("a sample")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    bench(tyro.cli(gs.Args, description=__doc__))
