# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy", "gymnasium", "ale-py", "dm_control", "mujoco>=3.17,<4", "tyro", "tensorboard"]
# ///
"""DreamerV3: learn a model of the world, then learn to act inside it, with one set of hyperparameters for every domain.

Paper: Hafner et al., "Mastering Diverse Domains through World Models" (arXiv 2301.04104v2; Nature 640, 2025). "Eq. n" is
an equation of the arXiv text; "Table" is its hyperparameter table; "code" is the authors' release of December 2024 on.

    python dreamerv3.py --env-id ALE/Pong-v5              train (default: size 12m, 400,000 policy steps = 1.6M frames)
    python dreamerv3.py --env-id CartPole-v1 --size 1m --total-timesteps 10_000
    python dreamerv3.py --env-id dm_control/walker-walk-v0 --obs image
    python dreamerv3.py --resume runs/...                 go on where the last checkpoint stands, replay included
    python dreamerv3.py --eval runs/.../checkpoint.pt     play 10 episodes, print the returns, save eval.gif
    python dreamerv3.py --dream runs/.../checkpoint.pt    the policy rolled out in imagination only, save dream.gif
    tensorboard --logdir runs

From Python:
    import dreamerv3
    args = dreamerv3.resolve(dreamerv3.Args(env_id="CartPole-v1", size="1m", total_timesteps=10_000))
    result = dreamerv3.train(args)
    agent, args = dreamerv3.load_agent(result["run_dir"] + "/checkpoint.pt")
    print(dreamerv3.evaluate(agent, args, episodes=10))

Symbols in shapes: B sequences of a batch, T steps trained on, H imagination horizon, N = B*T start states (in acting: the
environments), A action size, E embedding, D deterministic state, S latent variables, K classes of each, Z = S*K,
F = D + Z features, U hidden units, G blocks of the recurrent layer, V bins of the two-hot distributions.

One row of experience holds obs_t, the reward that arrived with it, is_first, is_last, is_terminal, and the action chosen
after seeing obs_t. The model at row t therefore sees obs[t] and action[t-1]; at is_first it forgets both state and action.

Differs from the paper, on purpose:
- Table gives 200m parameters to most benchmarks; the default here is 12m with train ratio 512, which fits any GPU.
- The stored latents (h, z) are bfloat16 and class numbers: 4.1 kB a row at 12m instead of 10 kB.
- The recurrent state stays float32 on a GPU, where the code rounds it to bfloat16; matrix products are bfloat16 in both.
- Reset rows are not counted as steps by the train ratio; the code counts them (about 1 in 1,000).
- An Atari episode cut at 108,000 frames bootstraps, as every time-out does here; the code treats it as terminal.
- ALE's vector environment resizes by area, the code by Pillow's bilinear filter.
- Evaluation takes the most likely action; the published scores are returns of training episodes, which sample.
Where paper and code disagree, the flag's help says which one the default follows (--actor-unimix, --train-ratio).
"""

import copy
import ctypes
import difflib
import io
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from torch import nn


@dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # ALE/*, dm_control/<domain>-<task>-v0, or whatever gymnasium.make takes (module:Id too)
    env_kwargs: str = "{}"  # arguments for the environment, as JSON
    num_envs: int = 1  # environments stepped together; Table: 1 for Atari100k, 16 elsewhere
    action_repeat: int | None = None  # frames per policy step; Atari 4, dm_control 2, else 1
    atari_protocol: Literal["100k", "200m"] = "100k"  # 100k: 64x64 RGB, minimal actions; 200m: 96x96 gray, 18, sticky
    obs: Literal["vector", "image", "both"] = "vector"  # dm_control only: state vectors, 64x64 camera, or both
    seed: int = 1  # of weights, sampling and environments
    size: Literal["debug", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "12m"  # parameters; Table uses 200m
    total_timesteps: int | None = None  # policy steps of all environments together; 400_000 (debug: 400)
    batch_size: int | None = None  # B, sequences per update; Table: 16 (debug: 4)
    batch_length: int | None = None  # T, steps per sequence; Table: 64 (debug: 8)
    train_ratio: float | None = None  # replayed steps per policy step; 512. Atari100k: paper 128, code 256
    buffer_size: int | None = None  # replay capacity in rows; min(total_timesteps, 1_000_000). Table: 5e6
    learning_starts: int | None = None  # windows in the replay before the first update; code: 1024 (debug: 64)
    checkpoint_every: int | None = None  # policy steps between checkpoints; 10_000 (debug: 200)
    log_every: float = 10.0  # seconds between progress lines and scalar records
    imag_horizon: int = 15  # H, Table
    gamma: float = 1 - 1 / 333  # discount, Table: horizon 333
    lam: float = 0.95  # lambda of the returns, Table
    learning_rate: float = 4e-5  # Table, every domain and size
    warmup: int = 1000  # updates of linear learning-rate ramp; code
    agc: float = 0.3  # gradient norm of a tensor / norm of the tensor, at most; Table
    beta1: float = 0.9  # momentum; code
    beta2: float = 0.999  # mean square of gradients; code
    eps: float = 1e-20  # of the optimiser; Table
    free_nats: float = 1.0  # KL below this is not optimised, per step; Table
    dyn_scale: float = 1.0  # Eq. 2, Table
    rep_scale: float = 0.1  # Eq. 2, Table
    repval_scale: float = 0.3  # critic loss on replayed rows, Table
    entropy_scale: float = 3e-4  # Eq. 6, Table
    unimix: float = 0.01  # uniform share of every latent categorical, Table
    actor_unimix: float = 0.01  # the same for discrete actions: paper 0.01; the released code in fact uses 0
    slow_rate: float = 0.02  # of the slow critic's moving average, per update; Table: decay 0.98
    return_rate: float = 0.01  # of the return range's moving average, per update; Table: decay 0.99
    stoch: int = 32  # S, Table
    blocks: int = 8  # G, Table
    bins: int = 255  # V, Table
    deter: int | None = None  # D; by --size, as the four below
    hidden: int | None = None  # U inside the RSSM
    units: int | None = None  # U of encoder, decoder and heads
    classes: int | None = None  # K
    depth: int | None = None  # channels of the first convolution / 2
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    bf16: bool = True  # bfloat16 matrix products and convolutions on a GPU
    cuda_graph: bool = True  # replay the whole update as one CUDA graph on a GPU
    torch_deterministic: bool = False  # ask cuDNN for deterministic kernels
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder for run folders
    resume: str | None = None  # run folder or checkpoint to go on from
    eval: str | None = None  # checkpoint to evaluate
    eval_episodes: int = 10  # episodes of --eval
    dream: str | None = None  # checkpoint whose policy shall dream
    capture_video: bool = False  # a GIF of the first environment's episode after each checkpoint
    track: bool = False  # mirror to Weights & Biases (needs: pip install wandb)
    wandb_project_name: str = "cleandream"  # with --track
    wandb_entity: str | None = None  # with --track


def widths(d):
    """Table of model sizes: everything follows from the hidden width d."""
    return dict(hidden=d, units=d, deter=8 * d, depth=d // 16, classes=d // 16)


RUN = dict(total_timesteps=400_000, batch_size=16, batch_length=64, train_ratio=512.0, learning_starts=1024)
RUN["checkpoint_every"] = 10_000
SIZES = {
    "debug": dict(
        widths(32), total_timesteps=400, batch_size=4, batch_length=8, train_ratio=4.0, learning_starts=64,
        checkpoint_every=200,
    ),
    "1m": widths(64),
    "12m": widths(256),
    "25m": widths(384),
    "50m": widths(512),
    "100m": widths(768),
    "200m": widths(1024),
    "400m": widths(1536),
}  # fmt: skip


# SHARED(dreamerv3): resolve
def resolve(args: Args) -> Args:
    """Fill in what was left open (None) from the preset of --size; an explicit flag wins. Pure."""
    preset = {**RUN, **SIZES[args.size]}
    args = replace(args, **{key: value for key, value in preset.items() if getattr(args, key) is None})
    family = args.env_id.split("/")[0]
    repeat = args.action_repeat or {"ALE": 4, "dm_control": 2}.get(family, 1)
    return replace(args, action_repeat=repeat, buffer_size=args.buffer_size or min(args.total_timesteps, 1_000_000))


# === Part 1: the algorithm ============================================================================================


# SHARED(dreamerv3): symlog
def symlog(x):
    """Eq. 9: sign(x) ln(1 + |x|), a logarithm for both signs, near the identity around 0. Any shape."""
    return x.sign() * x.abs().log1p()


# SHARED(dreamerv3): symexp
def symexp(x):
    """Eq. 9, the inverse of symlog: sign(x) (exp|x| - 1). Any shape."""
    return x.sign() * x.abs().expm1()


def symexp_bins(count):
    """Eq. 10: bin positions symexp(-20 ... 20). count: odd -> (count,), exactly antisymmetric, 0 in the middle."""
    half = symexp(torch.linspace(-20, 0, count // 2 + 1))
    return torch.cat([half, -half[:-1].flip(0)])


def twohot(x, bins):
    """Eq. 11: the two bins around x and weights linear in the raw (not symlog) distance, so that their mean is x.

    x: any shape; bins: (V,) -> index, weight, each x.shape + (2,). Beyond the last bin all weight lies on the last bin.
    """
    x = x.float().contiguous()
    below = (torch.searchsorted(bins, x, right=True) - 1).clamp(0, len(bins) - 2)
    upper = ((x - bins[below]) / (bins[below + 1] - bins[below])).clamp(0, 1)
    return torch.stack([below, below + 1], -1), torch.stack([1 - upper, upper], -1)


def twohot_loss(logits, bins, *targets):
    """Eq. 11: cross-entropy of softmax(logits) with twohot(x), summed over the targets x.

    logits: (..., V); targets: (...) each -> (...). Gathering the two logits avoids a dense (..., V) target.
    """
    logp = logits.float().log_softmax(-1)
    pairs = [twohot(x.detach(), bins) for x in targets]
    return -sum((logp.gather(-1, index) * weight).sum(-1) for index, weight in pairs)


def twohot_mean(logits, bins):
    """Eq. 10: softmax(logits) . bins. logits: (..., V) -> (...).

    Bins reach 4.85e8, so a plain sum of uniform probabilities is noise of +-40. Taking mirrored bins as a difference of
    probabilities first gives exactly 0 there, whatever the summation order or fused multiply-add.
    """
    half = len(bins) // 2
    probs = logits.float().softmax(-1)
    return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :]).sum(-1)


def unimix(logits, mix):
    """ln((1 - mix) softmax(logits) + mix / K): no probability reaches 0, so no KL or log-probability explodes.

    logits: (..., K) -> log-probabilities (..., K), float32. Section "World model learning"; mix: Table, 0.01.
    """
    logp = logits.float().log_softmax(-1)
    return ((1 - mix) * logp.exp() + mix / logits.shape[-1]).log() if mix else logp


# SHARED(dreamerv3): sample_onehot
def sample_onehot(logp, noise=None):
    """One-hot sample of a categorical: arg-max of p / noise with noise ~ Exp(1), exact, and no host sync (multinomial has).

    logp: (..., K) log-probabilities; noise: the same shape, drawn here if None -> (..., K) one-hot, no gradient.
    """
    noise = torch.rand_like(logp).log_().neg_() if noise is None else noise
    index = (logp.detach().exp() / noise).argmax(-1, keepdim=True)
    return torch.zeros_like(logp).scatter_(-1, index, 1.0)


# SHARED(dreamerv3): straight_through
def straight_through(onehot, probs):
    """The value of the sample with the gradient of the probabilities (Bengio et al. 2013). Both (..., K)."""
    return onehot + probs - probs.detach()


# SHARED(dreamerv3): kl_categorical
def kl_categorical(logp, logq):
    """KL(p || q) in nats of S independent categoricals. Both: log-probabilities (..., S, K) -> (...)."""
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def kl_loss(post, prior, free_nats):
    """Eq. 3: (dynamics, representation) losses: one KL, once with each side stopped, never pushed below free_nats.

    post, prior: log-probabilities (..., S, K) -> two of (...). The maximum is taken per step, after the sum over the
    latents and before any mean: below it a step gives no gradient at all.
    """
    dyn = kl_categorical(post.detach(), prior).clamp(min=free_nats)
    rep = kl_categorical(post, prior.detach()).clamp(min=free_nats)
    return dyn, rep


def lambda_return(reward, value, disc, lam):
    """Eq. 5: R_t = r_{t+1} + disc_{t+1} ((1 - lam_{t+1}) v_{t+1} + lam_{t+1} R_{t+1}), with R_T = v_T.

    reward, value, disc: (..., T+1), index t is what belongs to state t; lam: a number or (..., T+1) -> (..., T).
    """
    lam = torch.as_tensor(lam, dtype=value.dtype).expand_as(value) if isinstance(lam, float) else lam
    step = reward + disc * (1 - lam) * value
    decay = disc * lam
    returns = [value[..., -1]]
    for t in range(value.shape[-1] - 1, 0, -1):
        returns.append(step[..., t] + decay[..., t] * returns[-1])
    return torch.stack(returns[:0:-1], -1)


def percentile(x, q):
    """Eq. 7: the q-quantile (0..1) of all entries, linearly interpolated. Sorting keeps it free of host syncs."""
    x = x.flatten().sort().values
    position = q * (len(x) - 1)
    low = int(position)
    return torch.lerp(x[low], x[min(low + 1, len(x) - 1)], position - low)


def actor_loss(logp, entropy, returns, value, weight, scale, entropy_scale):
    """Eq. 6, REINFORCE: -w_t (ln pi(a_t|s_t) sg((R_t - v_t) / scale) + eta H_t), for discrete and continuous actions.

    logp, entropy, returns, value, weight: (N, H); scale: max(1, S) -> (N, H). Only logp and entropy carry gradients.
    """
    advantage = (returns - value) / scale
    return -weight.detach() * (logp * advantage.detach() + entropy_scale * entropy)


def critic_loss(logits, target, slow_value, weight, bins):
    """Eq. 5 plus the slow regulariser: w_t (CE(twohot(R_t)) + CE(twohot(v_slow))). The slow target is a scalar too.

    logits: (N, H, V); target, slow_value, weight: (N, H) -> (N, H).
    """
    return weight.detach() * twohot_loss(logits, bins, target, slow_value)


# --- networks ---------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-4) * scale over the last axis: no mean, no offset, statistics in float32."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), self.scale.shape, self.scale, 1e-4).to(x.dtype)


class ChannelNorm(RMSNorm):
    """RMSNorm over the channels of (N, C, H, W). In channels-last memory the permutes move no data."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BlockLinear(nn.Module):
    """G separate linear layers on G contiguous slices of the features: 1/G of the weights of a full layer."""

    def __init__(self, inputs, outputs, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        blocks, inputs, outputs = self.weight.shape
        groups = x.reshape(-1, blocks, inputs).transpose(0, 1)
        y = torch.baddbmm(self.bias.view(blocks, 1, outputs), groups, self.weight)
        return y.transpose(0, 1).reshape(*x.shape[:-1], blocks * outputs)


def mlp(inputs, units, layers):
    """layers x (Linear, RMSNorm, SiLU): the order used everywhere."""
    sizes = [inputs] + layers * [units]
    parts = [(nn.Linear(a, b), RMSNorm(b), nn.SiLU()) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[module for part in parts for module in part])


def init_weights(module, outscale=1.0):
    """Normal truncated at 2 sigma with standard deviation outscale / sqrt(fan in); biases zero.

    1.1368 undoes what the truncation takes from the deviation. A BlockLinear counts its full input width as fan in (so
    does the code), which makes its weights sqrt(G) smaller than the fan in of one block would.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
    elif isinstance(module, BlockLinear):
        fan_in = module.weight.shape[0] * module.weight.shape[1]
    else:
        return
    sigma = 1.1368 * outscale / fan_in**0.5
    nn.init.trunc_normal_(module.weight, std=sigma, a=-2 * sigma, b=2 * sigma) if sigma else nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)


# SHARED(dreamerv3): is_image
def is_image(space):
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


class Encoder(nn.Module):
    """Observations -> embedding. Vectors: symlog, 3 layers. Images, stacked on channels: 4 x (5x5, pool, norm, SiLU)."""

    def __init__(self, obs_space, args):
        super().__init__()
        self.images = sorted(key for key, space in obs_space.items() if is_image(space))
        self.vectors = sorted(key for key in obs_space if key not in self.images)
        self.size = 0  # E
        if self.vectors:
            self.mlp = mlp(sum(obs_space[key].shape[0] for key in self.vectors), args.units, 3)
            self.size += args.units
        if self.images:
            height, width, _ = obs_space[self.images[0]].shape
            depths = [sum(obs_space[key].shape[-1] for key in self.images)] + [m * args.depth for m in (2, 3, 4, 4)]
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in zip(depths, depths[1:], strict=False))
            self.norms = nn.ModuleList(ChannelNorm(depth) for depth in depths[1:])
            self.convs.to(memory_format=torch.channels_last)
            self.size += depths[-1] * height // 16 * width // 16

    def forward(self, obs):
        """obs: {key: (B, T, ...)} -> (B, T, E)."""
        tokens = []
        if self.vectors:
            vector = torch.cat([symlog(obs[key].float()) for key in self.vectors], -1)
            tokens.append(self.mlp(vector))
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            B, T = image.shape[:2]
            x = image.flatten(0, 1).permute(0, 3, 1, 2) / 255 - 0.5
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.silu(norm(F.max_pool2d(conv(x), 2)))
            tokens.append(x.permute(0, 2, 3, 1).reshape(B, T, -1))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """Features -> predicted observations: vectors in symlog space, images in 0..1."""

    def __init__(self, obs_space, args):
        super().__init__()
        self.shapes = {key: space.shape for key, space in obs_space.items()}
        self.images = sorted(key for key, space in obs_space.items() if is_image(space))
        self.vectors = sorted(key for key in obs_space if key not in self.images)
        self.split = [args.deter, args.stoch * args.classes]  # D, Z
        if self.vectors:
            self.mlp = mlp(sum(self.split), args.units, 3)
            self.heads = nn.ModuleDict({key: nn.Linear(args.units, self.shapes[key][0]) for key in self.vectors})
        if self.images:
            height, width, _ = self.shapes[self.images[0]]
            depths = [m * args.depth for m in (4, 4, 3, 2)] + [sum(self.shapes[key][-1] for key in self.images)]
            self.low = height // 16, width // 16, depths[0]  # the smallest image: rows, columns, channels
            pixels = self.low[0] * self.low[1] * self.low[2]
            self.from_deter = BlockLinear(args.deter, pixels, args.blocks)
            self.from_stoch = nn.Sequential(*mlp(self.split[1], 2 * args.units, 1), nn.Linear(2 * args.units, pixels))
            self.low_norm = ChannelNorm(depths[0])
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in zip(depths, depths[1:], strict=False))
            self.norms = nn.ModuleList(ChannelNorm(depth) for depth in depths[1:-1])
            self.convs.to(memory_format=torch.channels_last)

    def forward(self, feat):
        """feat: (B, T, F) -> {key: (B, T, ...) float32}."""
        B, T = feat.shape[:2]
        deter, stoch = feat.split(self.split, -1)
        out = {}
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))
            out.update({key: head(x).float() for key, head in self.heads.items()})
        if self.images:
            rows, columns, channels = self.low
            blocks = self.from_deter(deter).view(B * T, -1, rows, columns, channels // self.from_deter.weight.shape[0])
            x = blocks.permute(0, 2, 3, 1, 4).reshape(B * T, rows, columns, channels)  # every block owns some channels
            x = (x + self.from_stoch(stoch).view(x.shape)).permute(0, 3, 1, 2)
            x = F.silu(self.low_norm(x))
            for conv, norm in zip(self.convs, self.norms, strict=False):
                x = F.silu(norm(conv(F.interpolate(x, scale_factor=2, mode="nearest"))))
            x = self.convs[-1](F.interpolate(x, scale_factor=2, mode="nearest"))
            image = x.float().sigmoid().permute(0, 2, 3, 1).unflatten(0, (B, T))
            parts = image.split([self.shapes[key][-1] for key in self.images], -1)
            out.update(zip(self.images, parts, strict=True))
        return out


class Head(nn.Module):
    """layers x (Linear, RMSNorm, SiLU), then Linear. feat: (..., F) -> (..., outputs), float32."""

    def __init__(self, inputs, units, layers, outputs, outscale):
        super().__init__()
        self.mlp = mlp(inputs, units, layers)
        self.out = nn.Linear(units, outputs)
        self.apply(init_weights)
        init_weights(self.out, outscale)

    def forward(self, feat):
        return self.out(self.mlp(feat)).float()


class Actor(nn.Module):
    """The policy. Actions are vectors of size A: one-hot for Discrete, raw numbers for Box, where +-1 are the bounds."""

    def __init__(self, feat_size, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.size = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))  # A
        self.mlp = mlp(feat_size, args.units, 3)
        self.out = nn.ModuleList(nn.Linear(args.units, self.size) for _ in range(1 if self.discrete else 2))
        self.mix = args.actor_unimix
        self.apply(init_weights)
        self.out.apply(lambda module: init_weights(module, 0.01))

    def forward(self, feat):
        """feat: (..., F) -> discrete: (log-probabilities (..., A),); Box: (mean, std), each (..., A)."""
        x = self.mlp(feat)
        if self.discrete:
            return (unimix(self.out[0](x), self.mix),)
        mean, std = (layer(x).float() for layer in self.out)
        return mean.tanh(), 0.9 * (std + 2).sigmoid() + 0.1  # std between 0.1 and 1, 0.89 at the start

    def sample(self, feat):
        """-> action (..., A). A Box sample may lie beyond +-1: environment and model clip it, its log-density does not."""
        dist = self(feat)
        return sample_onehot(dist[0]) if self.discrete else torch.normal(*dist)

    def mode(self, feat):
        mean = self(feat)[0]
        return torch.zeros_like(mean).scatter_(-1, mean.argmax(-1, keepdim=True), 1.0) if self.discrete else mean

    def log_prob(self, dist, action):
        """dist: what forward returned; action: (..., A) -> (...), in nats."""
        if self.discrete:
            return (dist[0] * action).sum(-1)
        mean, std = dist
        return (-0.5 * ((action - mean) / std) ** 2 - std.log() - 0.5 * np.log(2 * np.pi)).sum(-1)

    def entropy(self, dist):
        """-> (...), in nats."""
        return -(dist[0] * dist[0].exp()).sum(-1) if self.discrete else (dist[1].log() + 0.5 * np.log(2 * np.pi * np.e)).sum(-1)


# --- world model ------------------------------------------------------------------------------------------------------


class RSSM(nn.Module):
    """Recurrent state-space model, Eq. 1: h_t = f(h, z, a of t-1), posterior z_t ~ q(h_t, x_t), prior z_t ~ p(h_t)."""

    def __init__(self, embed_size, action_size, args):
        super().__init__()
        D, U, Z = args.deter, args.hidden, args.stoch * args.classes
        self.deter, self.stoch, self.classes, self.blocks, self.mix = D, args.stoch, args.classes, args.blocks, args.unimix
        self.deter_in = mlp(D, U, 1)
        self.stoch_in = mlp(Z, U, 1)
        self.action_in = mlp(action_size, U, 1)
        self.core_hidden = BlockLinear(D + self.blocks * 3 * U, D, self.blocks)
        self.core_norm = RMSNorm(D)
        self.core_gates = BlockLinear(D, 3 * D, self.blocks)
        self.post_in = nn.Linear(D + embed_size, U)
        self.post_norm = RMSNorm(U)
        self.post_out = nn.Linear(U, Z)
        self.prior_net = nn.Sequential(*mlp(D, U, 2), nn.Linear(U, Z))
        self.apply(init_weights)

    def initial(self, B):
        """Zeros: {"deter": (B, D), "stoch": (B, S, K)}."""
        zeros = self.core_norm.scale.new_zeros
        return {"deter": zeros(B, self.deter), "stoch": zeros(B, self.stoch, self.classes)}

    def core(self, deter, stoch, action_hidden):
        """h' = f(h, z, a), a GRU whose big matrices are block-diagonal: (N, D), (N, S, K), (N, U) -> (N, D)."""
        N, G = deter.shape[0], self.blocks
        shared = torch.cat([self.deter_in(deter), self.stoch_in(stoch.flatten(1)), action_hidden], -1)  # (N, 3*U)
        own = deter.to(shared.dtype).view(N, G, -1)  # every block sees its own slice of h and all of the shared input
        x = torch.cat([own, shared[:, None].expand(-1, G, -1)], -1).flatten(1)
        x = F.silu(self.core_norm(self.core_hidden(x)))  # (N, D)
        reset, cand, update = self.core_gates(x).float().view(N, G, 3, -1).unbind(2)
        cand = torch.tanh(reset.sigmoid() * cand)
        update = (update - 1).sigmoid()  # the -1 makes a new network remember
        return (update * cand).flatten(1) + (1 - update).flatten(1) * deter

    def prior(self, deter):
        """Logits of p(z | h): (..., D) -> (..., S, K)."""
        return self.prior_net(deter).unflatten(-1, (self.stoch, self.classes))

    def clip(self, action):
        """a / max(1, |a|): a step to [-1, 1] whose divisor carries no gradient."""
        return action / action.abs().clamp(min=1).detach()

    def feat(self, state):
        """[h, z] -> (..., F)."""
        return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)

    def observe(self, embed, action, is_first, state, noise=None):
        """Filter T observations. embed: (B, T, E); action: (B, T, A), the one that led to each step; is_first: (B, T).

        state: that of the step before; noise: (B, T, S, K) ~ Exp(1), drawn if None.
        -> {"deter": (B, T, D), "stoch": (B, T, S, K), "logits": (B, T, S, K) of the posterior}.
        Only what depends on h is in the loop; half of the posterior's first layer and the action layer are not.
        """
        B, T = is_first.shape
        keep = 1 - is_first.float()  # (B, T)
        action_hidden = self.action_in(self.clip(action * keep[..., None]))  # (B, T, U)
        weight_deter, weight_embed = self.post_in.weight.split([self.deter, embed.shape[-1]], 1)
        embed_hidden = F.linear(embed, weight_embed, self.post_in.bias)  # (B, T, U)
        noise = torch.rand(B, T, self.stoch, self.classes, device=embed.device).log_().neg_() if noise is None else noise
        deter, stoch, states = state["deter"], state["stoch"], []
        for t in range(T):
            deter = self.core(deter * keep[:, t, None], stoch * keep[:, t, None, None], action_hidden[:, t])
            x = F.silu(self.post_norm(F.linear(deter, weight_deter) + embed_hidden[:, t]))
            logits = self.post_out(x).view(B, self.stoch, self.classes)
            logp = unimix(logits, self.mix)
            stoch = straight_through(sample_onehot(logp, noise[:, t]), logp.exp())
            states.append((deter, stoch, logits))
        return {key: torch.stack(x, 1) for key, x in zip(("deter", "stoch", "logits"), zip(*states, strict=True), strict=True)}

    def imagine(self, state, policy, horizon):
        """Roll the prior forward. state: N start states; policy: feat (N, F) -> action (N, A).

        -> features (N, H+1, F), the first being the start, and the H actions (N, H, A). REINFORCE needs no gradient
        through the dynamics: call it under no_grad.
        """
        feats, actions = [self.feat(state)], []
        for _ in range(horizon):
            actions.append(policy(feats[-1]))
            deter = self.core(state["deter"], state["stoch"], self.action_in(self.clip(actions[-1])))
            state = {"deter": deter, "stoch": sample_onehot(unimix(self.prior(deter), self.mix))}
            feats.append(self.feat(state))
        return torch.stack(feats, 1), torch.stack(actions, 1)


# --- optimiser --------------------------------------------------------------------------------------------------------


class LaProp:
    """Adaptive gradient clipping, then division by the RMS, then momentum (Ziyin et al. 2020; Table: AGC 0.3, LaProp).

    Per tensor p with gradient g:  g <- g / max(1, |g| / (agc max(1e-3, |p|)))       norms over the whole tensor
                                   v <- beta2 v + (1 - beta2) g^2,   u = g / (sqrt(v / (1 - beta2^t)) + eps)
                                   m <- beta1 m + (1 - beta1) u,     p <- p - lr_t m / (1 - beta1^t)
    with lr_t = lr min(1, (t - 1) / warmup): the first update changes nothing. All counters live on the device.
    """

    def __init__(self, params, lr, warmup, agc, beta1, beta2, eps):
        self.params, self.lr, self.warmup, self.agc = list(params), lr, warmup, agc
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.mean_square = [torch.zeros_like(p) for p in self.params]
        self.momentum = [torch.zeros_like(p) for p in self.params]
        self.count = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

    @torch.no_grad()
    def step(self, grads):
        """grads: one tensor per parameter. -> global gradient norm before clipping, ()."""
        self.count += 1
        norms = torch.stack(torch._foreach_norm(grads))
        limits = self.agc * torch.stack(torch._foreach_norm(self.params)).clamp(min=1e-3)
        grads = torch._foreach_div(grads, list((norms / limits).clamp(min=1).unbind()))
        torch._foreach_mul_(self.mean_square, self.beta2)
        torch._foreach_addcmul_(self.mean_square, grads, grads, 1 - self.beta2)
        rms = torch._foreach_div(self.mean_square, (1 - self.beta2**self.count).float())
        torch._foreach_sqrt_(rms)
        torch._foreach_add_(rms, self.eps)
        torch._foreach_lerp_(self.momentum, torch._foreach_div(grads, rms), 1 - self.beta1)
        rate = self.lr * ((self.count - 1) / self.warmup).clamp(max=1) / (1 - self.beta1**self.count)
        torch._foreach_sub_(self.params, torch._foreach_mul(self.momentum, rate.float()))
        return norms.square().sum().sqrt()

    def state_dict(self):
        return {"mean_square": self.mean_square, "momentum": self.momentum, "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state):
        for mine, saved in zip(self.mean_square + self.momentum, state["mean_square"] + state["momentum"], strict=True):
            mine.copy_(saved)
        self.count.copy_(state["count"])


# --- agent ------------------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """World model, actor and critic, trained together by one loss and one optimiser (Eq. 2, 5, 6).

    obs_space: Dict of uint8 images (H, W, C) and float32 vectors; action_space: Discrete or Box, of one environment.
    """

    context = 1  # rows before the trained window: they give the first state and the first action

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.args, self.action_space = args, action_space
        F_size = args.deter + args.stoch * args.classes
        self.actor = Actor(F_size, action_space, args)
        self.encoder = Encoder(obs_space, args).apply(init_weights)
        self.decoder = Decoder(obs_space, args).apply(init_weights)
        self.rssm = RSSM(self.encoder.size, self.actor.size, args)
        self.reward = Head(F_size, args.units, 1, args.bins, outscale=0.0)
        self.cont = Head(F_size, args.units, 1, 1, outscale=1.0)
        self.critic = Head(F_size, args.units, 3, args.bins, outscale=0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("bin_values", symexp_bins(args.bins))
        self.register_buffer("return_range", torch.zeros(2))  # moving 5th and 95th percentile of the returns, Eq. 7
        self.device = pick_device(args)
        self.to(self.device)
        self.params = [p for p in self.parameters() if p.requires_grad]
        settings = (args.learning_rate, args.warmup, args.agc, args.beta1, args.beta2, args.eps)
        self.optimizer = LaProp(self.params, *settings)
        self.graph, self.eager_updates = None, 0

    def autocast(self):
        """One short region for each use: a weight first cast under no_grad would stay cached without its gradient."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16 and self.device.type == "cuda")

    def initial(self, B):
        """-> state of B environments before their first observation."""
        return {**self.rssm.initial(B), "action": torch.zeros(B, self.actor.size, device=self.device)}

    def action_vector(self, action):
        """Stored actions -> model actions: Discrete (...) -> one-hot (..., A); Box (..., *shape) -> (..., A), float32."""
        if not self.actor.discrete:
            return action.flatten(action.dim() - len(self.action_space.shape)).float()
        return (action[..., None] == torch.arange(self.actor.size, device=action.device)).float()

    @torch.no_grad()
    def act(self, obs, is_first, state, eval=False):
        """obs: {key: (N, ...)} arrays or tensors; is_first: (N,); state: from initial or the last act.

        -> actions for the vector environment (int64 (N,) or float32 (N, *shape)), new state. eval: most likely action.
        """
        obs = {key: torch.as_tensor(obs[key], device=self.device)[:, None] for key in self.decoder.shapes}
        is_first = torch.as_tensor(is_first, device=self.device)[:, None]  # (N, 1)
        with self.autocast():
            post = self.rssm.observe(self.encoder(obs), state["action"][:, None], is_first, state)
            post = {key: x[:, 0] for key, x in post.items()}
            feat = self.rssm.feat(post)  # (N, F)
            vector = self.actor.mode(feat) if eval else self.actor.sample(feat)  # (N, A)
        state = {"deter": post["deter"], "stoch": post["stoch"], "action": vector}
        action = vector.argmax(-1) if self.actor.discrete else vector.reshape(-1, *self.action_space.shape)
        return action.cpu().numpy(), state

    def latents(self, state):
        """What the replay stores of a state, to start training windows from: bfloat16 h and class numbers of z."""
        return {"deter": state["deter"].detach().bfloat16(), "stoch": state["stoch"].argmax(-1).to(torch.uint8)}

    def model_losses(self, batch):
        """Eq. 2 and 3 on rows 1..T of a batch of T+1 rows; row 0 supplies the state and the action before them.

        -> losses, each (B, T); features with gradient (B, T, F); posterior; metrics.
        """
        args = self.args
        obs = {key: batch[key][:, 1:] for key in self.decoder.shapes}
        stored = batch["stoch"][:, 0, :, None]  # (B, S, 1)
        stoch = (stored == torch.arange(args.classes, device=self.device)).float()  # (B, S, K)
        state = {"deter": batch["deter"][:, 0].float(), "stoch": stoch}
        with self.autocast():
            action = self.action_vector(batch["action"][:, :-1])  # (B, T, A)
            post = self.rssm.observe(self.encoder(obs), action, batch["is_first"][:, 1:], state)
            feat = self.rssm.feat(post)  # (B, T, F)
            prior_logits = self.rssm.prior(post["deter"])  # (B, T, S, K)
            recon = self.decoder(feat)
            reward_logits, cont_logit = self.reward(feat), self.cont(feat)[..., 0]
        image = sum((recon[key] - obs[key] / 255).square().sum((2, 3, 4)) for key in self.decoder.images)
        vector = sum((recon[key] - symlog(obs[key])).square().sum(2) for key in self.decoder.vectors)
        post_logp, prior_logp = unimix(post["logits"], args.unimix), unimix(prior_logits, args.unimix)
        dyn, rep = kl_loss(post_logp, prior_logp, args.free_nats)
        # the continue head learns the discounted probability, so imagination needs no gamma of its own
        cont = (1 - batch["is_terminal"][:, 1:].float()) * args.gamma
        losses = {
            "image": image,
            "vector": vector,
            "reward": twohot_loss(reward_logits, self.bin_values, batch["reward"][:, 1:]),
            "cont": F.binary_cross_entropy_with_logits(cont_logit, cont, reduction="none"),
            "dyn": dyn,
            "rep": rep,
        }
        losses = {key: loss for key, loss in losses.items() if torch.is_tensor(loss)}  # no image, or no vector
        assert all(loss.shape == feat.shape[:2] for loss in losses.values())
        metrics = {"stats/kl": kl_categorical(post_logp, prior_logp).mean()}
        metrics["stats/post_entropy"] = -(post_logp.exp() * post_logp).sum((-2, -1)).mean()
        metrics["stats/prior_entropy"] = -(prior_logp.exp() * prior_logp).sum((-2, -1)).mean()
        return losses, feat, post, metrics

    @torch.no_grad()
    def imagine(self, post):
        """From every replayed state, without gradients. -> features (N, H+1, F), actions (N, H, A), and, all (N, H+1),
        reward, discounted continue probability, value of the slow critic.
        """
        start = {key: post[key].detach().flatten(0, 1) for key in ("deter", "stoch")}
        with self.autocast():
            feat, action = self.rssm.imagine(start, self.actor.sample, self.args.imag_horizon)
            reward = twohot_mean(self.reward(feat), self.bin_values)  # (N, H+1)
            cont = self.cont(feat)[..., 0].sigmoid()  # (N, H+1)
            slow_value = twohot_mean(self.slow_critic(feat), self.bin_values)  # (N, H+1)
        return feat, action, reward, cont, slow_value

    def behaviour_losses(self, feat, post, batch):
        """Eq. 5 to 7 in imagination, and the critic on the replayed rows. feat: (B, T, F) with gradient.

        -> losses: actor, critic (N, H), repval (B, T-1); metrics.
        """
        args, bins = self.args, self.bin_values
        imag_feat, action, reward, cont, slow_value = self.imagine(post)
        with self.autocast():
            logits = self.critic(imag_feat)  # (N, H+1, V)
            dist = self.actor(imag_feat[:, :-1])
            replay_logits = self.critic(feat)  # (B, T, V)
            with torch.no_grad():
                replay_slow = twohot_mean(self.slow_critic(feat), bins)  # (B, T)
        value = twohot_mean(logits.detach(), bins)  # (N, H+1); the online critic, not the slow one
        returns = lambda_return(reward, value, cont, args.lam)  # (N, H)
        percentiles = torch.stack([percentile(returns, 0.05), percentile(returns, 0.95)])  # (2)
        self.return_range.lerp_(percentiles, args.return_rate)
        scale = (self.return_range[1] - self.return_range[0]).clamp(min=1)  # S of Eq. 7: small returns are not blown up
        weight = cont.cumprod(1)[:, :-1]  # (N, H); begins with the continue probability of the start state
        entropy = self.actor.entropy(dist)  # (N, H)
        logp = self.actor.log_prob(dist, action)  # (N, H)
        losses = {
            "actor": actor_loss(logp, entropy, returns, value[:, :-1], weight, scale, args.entropy_scale),
            "critic": critic_loss(logits[:, :-1], returns, slow_value[:, :-1], weight, bins),
        }
        # replayed rows: real rewards and ends, bootstrapped by the imagined return of each state; gradient into the model
        boot = returns[:, 0].view(feat.shape[:2])  # (B, T)
        reward, is_last, is_terminal = (batch[key][:, 1:].float() for key in ("reward", "is_last", "is_terminal"))
        target = lambda_return(reward, boot, (1 - is_terminal) * args.gamma, (1 - is_last) * args.lam)  # (B, T-1)
        mask = 1 - is_last[:, :-1]
        losses["repval"] = critic_loss(replay_logits[:, :-1], target, replay_slow[:, :-1], mask, bins)
        assert losses["actor"].shape == losses["critic"].shape == returns.shape and losses["repval"].shape == mask.shape
        metrics = {
            "stats/actor_entropy": entropy.mean(), "stats/return_scale": scale, "stats/return_mean": returns.mean(),
            "stats/value_mean": value.mean(), "stats/imag_reward": reward.mean(), "stats/imag_cont": cont.mean(),
        }  # fmt: skip
        return losses, {key: x.detach() for key, x in metrics.items()}

    def step(self, batch):
        """One update, eagerly; no host sync, so that a CUDA graph can capture it. See update."""
        args = self.args
        losses, feat, post, metrics = self.model_losses(batch)
        more_losses, more_metrics = self.behaviour_losses(feat, post, batch)
        losses = {key: loss.mean() for key, loss in {**losses, **more_losses}.items()}
        scales = {"dyn": args.dyn_scale, "rep": args.rep_scale, "repval": args.repval_scale}  # the others: 1
        total = sum(scales.get(key, 1.0) * loss for key, loss in losses.items())
        grad_norm = self.optimizer.step(torch.autograd.grad(total, self.params))
        torch._foreach_lerp_(list(self.slow_critic.parameters()), list(self.critic.parameters()), args.slow_rate)
        for key, fresh in self.latents(post).items():
            batch[key][:, 1:] = fresh
        metrics = {**metrics, **more_metrics, "stats/grad_norm": grad_norm}
        metrics.update({f"losses/{key}": loss for key, loss in {"total": total, **losses}.items()})
        return {key: x.detach() for key, x in metrics.items()}

    def update(self, batch):
        """One gradient step on a batch of T+1 rows (Replay.sample); the fresh latents replace batch["deter"], ["stoch"].

        -> metrics, 0-d tensors on the device. On a GPU the first three updates run eagerly, while cuDNN and the allocator
        settle; then the whole update is captured and only replayed, which removes thousands of kernel launches.
        """
        if self.device.type != "cuda" or not self.args.cuda_graph:
            return self.step(batch)
        if self.eager_updates < 3:
            self.eager_updates += 1
            return self.step(batch)
        if self.graph is None:
            self.static_batch = {key: x.clone() for key, x in batch.items()}
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static_metrics = self.step(self.static_batch)
        for key, x in batch.items():
            self.static_batch[key].copy_(x)
        self.graph.replay()
        for key in ("deter", "stoch"):
            batch[key].copy_(self.static_batch[key])
        return self.static_metrics


# === Part 2: plumbing =================================================================================================


# SHARED(dreamerv3): fail
def fail(message):
    """Bad input: one line that names the flag, the value and what is allowed; exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# SHARED(dreamerv3): pick_device
def pick_device(args):
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device {args.device}: this PyTorch ({torch.__version__}) sees no CUDA device; use auto or cpu")
    return torch.device(name)


# SHARED(dreamerv3): keep_memory
def keep_memory():
    """Ask glibc not to hand large blocks back to the system: fetching them again page by page was half of an update's time."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not trimmed
    except (OSError, AttributeError):  # another C library, another system: only slower
        pass


# SHARED(dreamerv3): free_memory
def free_memory(device):
    """Bytes that can still be allocated; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


# SHARED(dreamerv3): Replay
class Replay:
    """Ring buffer of rows: capacity // num_envs rows of every environment, which are added together.

    Windows are uniform over all starts and run across episode ends. Every row is trained on at least once: batches begin
    with the windows of each environment that no batch has seen (the online queue), then fill up with uniform ones.
    extras: {key: (shape, dtype)} of what is stored beside the rows and rewritten later, such as latent states.
    """

    def __init__(self, capacity, num_envs, obs_space, action_space, device, extras=None):
        self.length, self.num_envs, self.extras = capacity // num_envs, num_envs, dict(extras or {})
        spec = {key: (space.shape, torch.from_numpy(np.zeros(0, space.dtype)).dtype) for key, space in obs_space.items()}
        spec["action"] = (action_space.shape, torch.from_numpy(np.zeros(0, action_space.dtype)).dtype)
        spec.update({"reward": ((), torch.float32), **self.extras})
        spec.update({key: ((), torch.bool) for key in ("is_first", "is_last", "is_terminal")})
        self.row_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in spec.values())
        self.bytes = self.length * num_envs * self.row_bytes
        if device.type == "cuda" and self.bytes > 0.5 * free_memory(device):
            device = torch.device("cpu")  # leave half of the GPU's memory to the networks
        if self.bytes > free_memory(device):
            free = f"{free_memory(device) / 2**30:.1f} GiB are free"
            fail(f"--buffer-size {capacity}: {capacity:,} rows need {self.bytes / 2**30:.1f} GiB, {free}")
        shape = (self.length, num_envs)
        self.data = {key: torch.zeros(*shape, *size, dtype=dtype, device=device) for key, (size, dtype) in spec.items()}
        self.device, self.rows, self.saved = device, 0, 0  # rows: added so far for each environment, kept or not
        self.online = [0, 0]  # row and environment of the next window for the online queue
        self.files = []  # (first row, end row, name) of what save has written

    def windows(self, T):
        """Number of windows of T rows that could be sampled."""
        return self.num_envs * max(0, min(self.rows, self.length) - T + 1)

    def add(self, row):
        """row: {key: (num_envs, ...)} arrays or tensors, one step of all environments."""
        for key, ring in self.data.items():
            ring[self.rows % self.length] = torch.as_tensor(row[key]).to(self.device, non_blocking=True)
        self.rows += 1

    def sample(self, B, T, online=True):
        """-> {key: (B, T, ...)} and "index" (B, T), the place of each row. is_last also marks an abandoned episode."""
        oldest = max(0, self.rows - self.length)
        start = torch.randint(oldest, self.rows - T + 1, (B,))
        env = torch.randint(self.num_envs, (B,))
        for b in range(B if online else 0):
            self.online[0] = max(self.online[0], oldest)
            if self.online[0] + T > self.rows:
                break
            start[b], env[b] = self.online
            self.online = [self.online[0], env[b].item() + 1] if env[b] + 1 < self.num_envs else [start[b].item() + T, 0]
        index = ((start[:, None] + torch.arange(T)) % self.length * self.num_envs + env[:, None]).to(self.device)
        batch = {key: ring.flatten(0, 1)[index] for key, ring in self.data.items()}
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]
        return {**batch, "index": index}

    def write(self, batch, context):
        """Put the extras of a batch back where they came from, without the context rows. One sequence at a time: where
        windows of a batch overlap the last one wins, always, so that a run can be repeated bit by bit.
        """
        for key in self.extras:
            for index, values in zip(batch["index"][:, context:], batch[key][:, context:], strict=True):
                self.data[key].flatten(0, 1)[index] = values.to(self.device)

    def state_dict(self):
        return {"rows": self.rows, "online": self.online, "saved": self.saved, "files": self.files}

    def save(self, folder):
        """Write the rows added since the last call, and the extras (which change in place) whole. -> state_dict."""
        folder.mkdir(exist_ok=True)
        oldest = max(0, self.rows - self.length)
        self.files = [entry for entry in self.files if entry[1] > oldest and entry[2].startswith("rows")]
        for kind, first in (("rows", max(self.saved, oldest)), ("extras", oldest)):
            place = torch.arange(first, self.rows) % self.length
            data = {key: ring[place].cpu() for key, ring in self.data.items() if (key in self.extras) == (kind == "extras")}
            if len(place) and data:
                self.files.append((first, self.rows, f"{kind}-{first}-{self.rows}.pt"))
                save(folder / self.files[-1][2], **data)
        self.saved = self.rows
        return self.state_dict()

    def load(self, folder, state):
        """Read back what save wrote; capacity and number of environments must be the same."""
        self.rows, self.online, self.saved, self.files = (state[key] for key in ("rows", "online", "saved", "files"))
        for first, end, name in self.files:
            place = torch.arange(first, end) % self.length
            for key, values in load(folder / name, "cpu").items():
                self.data[key][place] = values.to(self.device)


# --- environments -----------------------------------------------------------------------------------------------------


# SHARED(dreamerv3): Adapter
class Adapter(gym.Wrapper):
    """Any environment -> Dict of uint8 images (H, W, C) and float32 vectors, actions in [-1, 1], repeated actions."""

    def __init__(self, env, repeat):
        super().__init__(env)
        self.repeat, space = repeat, env.observation_space
        self.parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"image" if is_image(space) else "vector": space}
        try:
            leaves = {key: part if is_image(part) else spaces.utils.flatdim(part) for key, part in self.parts.items()}
        except (NotImplementedError, ValueError):
            fail(f"--env-id {env.spec and env.spec.id}: observation space {space} has no fixed size; allowed: Box, Discrete, Dict")
        vector = {key: spaces.Box(-np.inf, np.inf, (size,)) for key, size in leaves.items() if isinstance(size, int)}
        self.observation_space = spaces.Dict({**leaves, **vector})
        if isinstance(env.action_space, spaces.Box):
            self.low, self.high = env.action_space.low, env.action_space.high
            if not np.isfinite([self.low, self.high]).all():
                fail(f"--env-id {env.spec and env.spec.id}: action space {env.action_space} needs finite bounds")
            self.action_space = spaces.Box(-1.0, 1.0, env.action_space.shape)

    def observe(self, obs):
        obs = obs if isinstance(self.env.observation_space, spaces.Dict) else {next(iter(self.parts)): obs}
        flat = lambda key, x: x if is_image(self.parts[key]) else spaces.flatten(self.parts[key], x).astype(np.float32)
        return {key: flat(key, obs[key]) for key in self.parts}

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.observe(obs), info

    def step(self, action):
        if isinstance(self.action_space, spaces.Box):
            action = (self.low + (np.clip(action, -1, 1) + 1) / 2 * (self.high - self.low)).astype(self.env.action_space.dtype)
        else:
            action = int(action) + int(self.env.action_space.start)
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return self.observe(obs), total, terminated, truncated, info


# SHARED(dreamerv3): AtariEnvs
class AtariEnvs(gym.vector.VectorWrapper):
    """ale_py's native vector environment (frame skip, max-pool, no-ops, resize in C++) with Dict observations."""

    def __init__(self, env_id, num_envs, args, **kwargs):
        from ale_py.vector_env import AtariVectorEnv

        small = args.atari_protocol == "100k"
        settings = dict(
            img_height=64 if small else 96, img_width=64 if small else 96, grayscale=not small,
            repeat_action_probability=0.0 if small else 0.25, full_action_space=not small,
            frameskip=args.action_repeat, stack_num=1, noop_max=30, reward_clipping=False, use_fire_reset=False,
        )  # fmt: skip
        super().__init__(AtariVectorEnv(gym.spec(env_id).kwargs["game"], num_envs, **{**settings, **kwargs}))
        size = settings["img_height"], settings["img_width"], 3 if small else 1
        self.single_observation_space = spaces.Dict({"image": spaces.Box(0, 255, size, np.uint8)})
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)

    def observe(self, obs):
        return {"image": obs.reshape(self.observation_space["image"].shape)}

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.observe(obs), info

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.env.step(actions)
        return self.observe(obs), reward.astype(np.float64), terminated, truncated, info


# SHARED(dreamerv3): DMControl
class DMControl(gym.Env):
    """dm_control/<domain>-<task>-v0. The end of an episode is a time limit (discount still 1): truncated, not terminated."""

    def __init__(self, env_id, obs, size=64):
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # headless; must be set before the first import
        from dm_control import suite

        self.domain, self.task = env_id.removeprefix("dm_control/").removesuffix("-v0").split("-")
        self.suite, self.obs, self.size, self.camera = suite, obs, size, 2 if self.domain == "quadruped" else 0
        self.reset(seed=0)
        spec = self.env.action_spec()
        self.action_space = spaces.Box(spec.minimum.astype(np.float32), spec.maximum.astype(np.float32))
        bounds = lambda x: (0, 255) if x.dtype == np.uint8 else (-np.inf, np.inf)
        first = self.observe(self.env.reset())
        self.observation_space = spaces.Dict({key: spaces.Box(*bounds(x), x.shape, x.dtype) for key, x in first.items()})

    def observe(self, step):
        vector = {key: np.atleast_1d(x).ravel().astype(np.float32) for key, x in step.observation.items() if np.size(x)}
        image = {"image": self.render()} if self.obs != "vector" else {}
        return {**(vector if self.obs != "image" else {}), **image}

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.env = self.suite.load(self.domain, self.task, task_kwargs={"random": seed})
        return self.observe(self.env.reset()), {}

    def step(self, action):
        step = self.env.step(action)
        terminated = step.last() and step.discount == 0
        return self.observe(step), step.reward or 0.0, terminated, step.last() and not terminated, {}

    def render(self):
        return self.env.physics.render(self.size, self.size, camera_id=self.camera)


# SHARED(dreamerv3): make_envs
def make_envs(env_id, num_envs, seed, args):
    """-> gymnasium vector environment: Dict observations, NEXT_STEP autoreset, Discrete or Box(-1, 1) actions."""
    kwargs, family = json.loads(args.env_kwargs), env_id.split("/")[0]
    if family == "ALE":
        import ale_py

        gym.register_envs(ale_py)

    def make():
        if family == "dm_control":
            return Adapter(DMControl(env_id, args.obs, **kwargs), args.action_repeat)
        mode = {"render_mode": "rgb_array"} if args.capture_video else {}
        return Adapter(gym.make(env_id, **mode, **kwargs), args.action_repeat)

    try:
        if family == "ALE":
            envs = AtariEnvs(env_id, num_envs, args, **kwargs)
        else:
            envs = gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    except (gym.error.Error, ValueError, ImportError) as error:
        near = difflib.get_close_matches(env_id, gym.registry, 3)
        fail(f"--env-id {env_id}: {error}" + (f" Known ids like it: {', '.join(near)}" if near else ""))
    images = {space.shape[:2] for space in envs.single_observation_space.values() if is_image(space)}
    if len(images) > 1 or any(size % 16 or not 48 <= size <= 256 for shape in images for size in shape):
        fail(f"--env-id {env_id}: image size {images}; allowed: one size, both sides a multiple of 16 from 48 to 256")
    if not isinstance(envs.single_action_space, spaces.Discrete | spaces.Box):
        fail(f"--env-id {env_id}: action space {envs.single_action_space}; allowed: Discrete, Box")
    envs.action_space.seed(seed)
    return envs


# --- pictures, checkpoints, evaluation --------------------------------------------------------------------------------


# SHARED(dreamerv3): save_gif
def save_gif(path, frames, writer=None, step=0, fps=15):
    """uint8 (T, H, W, 3) -> animated GIF on disk and in TensorBoard (whose add_video would need moviepy)."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    images = [Image.fromarray(frame).quantize(256, method=Image.Quantize.FASTOCTREE) for frame in frames]
    out = io.BytesIO()  # the default palette would take 15 times as long
    images[0].save(out, format="GIF", save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)
    Path(path).write_bytes(out.getvalue())
    if writer:
        gif = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=out.getvalue())
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=Path(path).stem, image=gif)]), step)


# SHARED(dreamerv3): picture
def picture(obs):
    """{key: (B, T, ...)} predictions or truth -> (B, T, H, W, 3) in 0..255: the first image, else vectors as gray cells."""
    images = [key for key in sorted(obs) if obs[key].dim() == 5]
    if images:
        image = obs[images[0]].float() * (1 if obs[images[0]].dtype == torch.uint8 else 255)
        return image.expand(*image.shape[:-1], 3) if image.shape[-1] == 1 else image[..., :3]
    cells = torch.cat([obs[key].float() for key in sorted(obs)], -1).sigmoid() * 255
    return cells.repeat_interleave(16, -1)[..., None, :, None].expand(-1, -1, 32, -1, 3)


# SHARED(dreamerv3): frame
def frame(image, color):
    """A border of 2 pixels: green while the model sees the observations, red while it dreams. Changes image."""
    for edge in (image[..., :2, :, :], image[..., -2:, :, :], image[..., :2, :], image[..., -2:, :]):
        edge[...] = torch.tensor(color, device=image.device)
    return image


@torch.no_grad()
def open_loop(agent, batch):
    """Six sequences side by side; rows truth, model, error. The model sees a quarter (green), then only the actions (red).

    batch: of Replay.sample -> uint8 (T, 3 * height, 6 * width, 3).
    """
    batch = {key: x[:6].to(agent.device) for key, x in batch.items()}
    obs = {key: batch[key][:, 1:] for key in agent.decoder.shapes}
    T = batch["reward"].shape[1] - 1
    seen = T // 4
    with agent.autocast():
        embed = agent.encoder({key: x[:, :seen] for key, x in obs.items()})
        action = agent.action_vector(batch["action"][:, :-1])  # (B, T, A)
        post = agent.rssm.observe(embed, action[:, :seen], batch["is_first"][:, 1 : seen + 1], agent.rssm.initial(len(action)))
        plan = iter(action[:, seen:].unbind(1))
        feat, _ = agent.rssm.imagine({key: x[:, -1] for key, x in post.items()}, lambda _: next(plan), T - seen)
        model = picture(agent.decoder(torch.cat([agent.rssm.feat(post), feat[:, 1:]], 1)))
    truth = picture({key: x if x.dtype == torch.uint8 else symlog(x) for key, x in obs.items()})
    error = (model - truth + 255) / 2
    rows = torch.cat([truth, model.clone(), error], 2)  # (B, T, 3 * height, width, 3)
    rows = torch.cat([frame(rows[:, :seen], (0.0, 255.0, 0.0)), frame(rows[:, seen:], (255.0, 0.0, 0.0))], 1)
    return rows.permute(1, 2, 0, 3, 4).flatten(2, 3).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def dream(agent, args, steps=64, num_envs=4):
    """What the policy does in imagination only, after one real observation. -> uint8 (1 + steps, height, 4 * width, 3)."""
    envs = make_envs(args.env_id, num_envs, args.seed, args)
    obs, _ = envs.reset(seed=args.seed)
    envs.close()
    _, state = agent.act(obs, np.ones(num_envs, bool), agent.initial(num_envs))
    with agent.autocast():
        feat, _ = agent.rssm.imagine(state, agent.actor.sample, steps)
        video = picture(agent.decoder(feat))  # (B, T, height, width, 3)
    return video.permute(1, 2, 0, 3, 4).flatten(2, 3).to(torch.uint8).cpu().numpy()


# SHARED(dreamerv3): evaluate
def evaluate(agent, args, episodes, video=None):
    """Play whole episodes without exploration noise; random states of training are left as they were.

    -> returns, one per episode. video: path of a GIF of the first environment's first episode.
    """
    N = min(episodes, 8)
    quota = [episodes // N + (n < episodes % N) for n in range(N)]  # fixed per environment: no bias to short episodes
    envs, scores, frames = make_envs(args.env_id, N, args.seed, args), [[] for _ in range(N)], []
    with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
        torch.manual_seed(args.seed + 1_000)
        obs, _ = envs.reset(seed=args.seed + 1_000)
        is_first, is_last, total, state = np.ones(N, bool), np.zeros(N, bool), np.zeros(N), agent.initial(N)
        while any(len(mine) < wanted for mine, wanted in zip(scores, quota, strict=True)):
            if video and not scores[0]:
                frames.append(snapshot(envs, obs))
            action, state = agent.act(obs, is_first, state, eval=True)
            is_first = is_last
            obs, reward, terminated, truncated, _ = envs.step(action)
            is_last, total = terminated | truncated, total * ~is_first + reward
            for n in np.flatnonzero(is_last):
                scores[n].append(float(total[n]))
    envs.close()
    if video:
        save_gif(video, np.stack(frames))
    return [score for mine, wanted in zip(scores, quota, strict=True) for score in mine[:wanted]]


# SHARED(dreamerv3): snapshot
def snapshot(envs, obs):
    """What the first environment shows, uint8 (H, W, 3): its image observation, else its renderer (--capture-video)."""
    image = next((obs[key][0] for key in sorted(obs) if obs[key].ndim == 4), None)
    image = envs.render()[0] if image is None else image
    return np.repeat(image, 3, -1) if image.shape[-1] == 1 else image[..., :3].copy()


# SHARED(dreamerv3): save
def save(path, **state):
    """Atomic: the file is complete under its name, or the one before it still is."""
    temporary = Path(path).with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# SHARED(dreamerv3): load
def load(path, device):
    """Data only: weights_only refuses anything that would run code."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        fail(f"{path}: no checkpoint of this program ({type(error).__name__}); allowed: a checkpoint.pt it has written")


# SHARED(dreamerv3): load_agent
def load_agent(path, device="auto"):
    """-> agent with the weights of a checkpoint, and its Args."""
    device = pick_device(Args(device=device))
    state = load(Path(path) / "checkpoint.pt" if Path(path).is_dir() else path, device)
    args = replace(Args(**state["args"]), device=str(device))
    envs = make_envs(args.env_id, 1, args.seed, args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    envs.close()
    agent.load_state_dict(state["agent"])
    return agent, args


# SHARED(dreamerv3): show
def show(args):
    """--eval and --dream."""
    path = Path(args.eval or args.dream)
    agent, saved = load_agent(path, args.device)
    saved, folder = replace(saved, capture_video=args.capture_video), path if path.is_dir() else path.parent
    if args.dream:
        save_gif(folder / "dream.gif", dream(agent, saved))
        print(f"{folder / 'dream.gif'}: the policy in imagination")
        return {"run_dir": str(folder)}
    picture_at_hand = agent.decoder.images or args.capture_video
    scores = evaluate(agent, saved, args.eval_episodes, folder / "eval.gif" if picture_at_hand else None)
    print("returns: " + " ".join(f"{score:g}" for score in scores))
    print(f"mean {np.mean(scores):.1f}, standard deviation {np.std(scores):.1f}, {len(scores)} episodes of {saved.env_id}")
    return {"run_dir": str(folder), "returns": scores}


# === Part 3: training =================================================================================================


# SHARED(dreamerv3): start_row
def start_row(obs, num_envs):
    """The first row of every environment."""
    flags = {"is_first": np.ones(num_envs, bool), "is_last": np.zeros(num_envs, bool)}
    return {**obs, **flags, "is_terminal": np.zeros(num_envs, bool), "reward": np.zeros(num_envs, np.float32)}


# SHARED(dreamerv3): next_row
def next_row(envs, action, row):
    """Step all environments; an environment whose last row ended an episode ignores its action and resets instead."""
    obs, reward, terminated, truncated, _ = envs.step(action)
    flags = {"is_first": row["is_last"], "is_last": terminated | truncated, "is_terminal": terminated}
    return {**obs, **flags, "reward": reward.astype(np.float32)}


# SHARED(dreamerv3): rebuild
def rebuild(envs, args, replay, origin, row):
    """Bring fresh environments to where the saved ones stood: same seed, same actions, all of them still in the replay.

    -> the pending row, or None where it comes out different (an environment that is not deterministic).
    """
    first, seed = origin
    if first < replay.rows - replay.length:
        return None
    place = torch.arange(first, replay.rows) % replay.length
    fresh = start_row(envs.reset(seed=seed)[0], args.num_envs)
    for action in replay.data["action"][place].cpu().numpy():
        fresh = next_row(envs, action, fresh)
    return fresh if all(np.array_equal(fresh[key], row[key].numpy()) for key in fresh) else None


# SHARED(dreamerv3): describe
def describe(args, agent, replay, run_dir):
    """Say what is about to run, before it takes hours."""
    name = torch.cuda.get_device_name(agent.device) if agent.device.type == "cuda" else "CPU"
    slow = "  <-- slow for images: expect days, not hours" if name == "CPU" and agent.decoder.images else ""
    update = args.batch_size * args.batch_length
    print(f"run      {run_dir}\ndevice   {name}, {torch.get_num_threads()} threads{slow}")
    print(f"agent    {sum(p.numel() for p in agent.params):,} parameters ({args.size}), PyTorch {torch.__version__}")
    print(f"replay   {args.buffer_size:,} rows x {replay.row_bytes / 1024:.1f} KiB = {replay.bytes / 2**30:.1f} GiB ", end="")
    print(f"in {'GPU' if replay.device.type == 'cuda' else 'main'} memory")
    print(f"training 1 gradient step per {update / args.train_ratio:g} policy steps: --train-ratio {args.train_ratio:g} ", end="")
    print(f"replays every step {args.train_ratio:g} times, an update takes {args.batch_size} x {args.batch_length} steps")
    print(f"until    {args.total_timesteps:,} policy steps = {args.total_timesteps * args.action_repeat:,} frames", flush=True)


# SHARED(dreamerv3): open_writer
def open_writer(args, run_dir, step):
    """TensorBoard, mirrored to Weights & Biases with --track."""
    from torch.utils.tensorboard import SummaryWriter

    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track: Weights & Biases is not installed; allowed after: pip install wandb")
        name = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
        wandb.init(**name, config=asdict(args), sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(run_dir, purge_step=step or None)
    table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{table}", step)
    return writer


# SHARED(dreamerv3): resumed
def resumed(args, saved):
    """The flags of a checkpoint, with what --resume may change. Any other flag must agree with the checkpoint."""
    free = ("resume", "total_timesteps", "device", "checkpoint_every", "log_every", "capture_video", "track")
    asked = {field.name: getattr(args, field.name) for field in fields(Args) if getattr(args, field.name) != field.default}
    for name, value in asked.items():
        if name not in free and value != saved[name]:
            flag = f"--{name.replace('_', '-')} {value}"
            fail(f"{flag}: the run to resume has {saved[name]}; allowed to change: --total-timesteps, --device")
    return replace(Args(**saved), **{name: value for name, value in asked.items() if name in free})


# SHARED(dreamerv3): finite
def finite(metrics, step):
    """{name: 0-d tensor} -> {name: float}: the one place where the host waits for the device. Stops on nan and inf."""
    values = dict(zip(metrics, torch.stack([x.float() for x in metrics.values()]).tolist(), strict=True))
    bad = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"policy step {step:,}: {', '.join(bad)}. The last checkpoint holds finite weights.")
    return values


# SHARED(dreamerv3): record
def record(writer, args, now, metrics, spent, last, replay):
    """One progress line, and the scalars of TensorBoard. last: time and step of the record before."""
    steps = max(1, now["step"] - last[1])
    speed = steps / (time.time() - last[0])
    score = np.mean(now["recent"]) if now["recent"] else float("nan")
    left = time.strftime("%H:%M:%S", time.gmtime((args.total_timesteps - now["step"]) / speed))
    line = f"step {now['step']:,}/{args.total_timesteps:,}  return {score:.1f}  {speed:.1f} steps/s  left {left}"
    print(f"{line}  updates {now['updates']:,}  loss {metrics.get('losses/total', float('nan')):.2f}", flush=True)
    scalars = {**metrics, "charts/SPS": speed, "charts/frames": now["step"] * args.action_repeat}
    scalars.update({"charts/gradient_steps": now["updates"], "charts/replay_rows": replay.rows * args.num_envs})
    scalars.update({f"perf/{key}_ms": 1000 * seconds / steps for key, seconds in spent.items()})
    for key, value in scalars.items():
        writer.add_scalar(key, value, now["step"])


# SHARED(dreamerv3): checkpoint_run
def checkpoint_run(args, run_dir, agent, replay, now, row, state, writer, rows, metrics):
    """Dream GIF, then everything that a resumed run needs, written such that a crash at any moment loses nothing."""
    if metrics:
        finite(metrics, now["step"])
        save_gif(run_dir / "open_loop.gif", open_loop(agent, replay.sample(6, rows, online=False)), writer, now["step"])
    if args.capture_video:
        scores = evaluate(agent, args, 1, run_dir / f"episode-{now['step']}.gif")
        writer.add_scalar("eval/episodic_return", scores[0], now["step"])
    cuda = [torch.cuda.get_rng_state(agent.device)] if agent.device.type == "cuda" else []
    save(
        run_dir / "checkpoint.pt",
        replay=replay.save(run_dir / "replay"),  # new files beside those that the old checkpoint names
        agent=agent.state_dict(),
        optimizer=agent.optimizer.state_dict(),
        now=now,
        state=state,
        row={key: torch.as_tensor(x) for key, x in row.items()},
        random=(torch.get_rng_state(), cuda),
        args=asdict(args),
        source=Path(__file__).read_text(encoding="utf-8"),
    )
    keep = {name for _, _, name in replay.files}
    for path in (run_dir / "replay").glob("*"):
        if path.name not in keep:
            path.unlink()
    writer.flush()


def train(args: Args) -> dict:
    """Train as args say. -> {"run_dir", "global_step", "updates", "episodic_return", losses and statistics}."""
    if args.eval or args.dream:
        return show(args)
    saved = None
    if args.resume:
        checkpoint = Path(args.resume) / "checkpoint.pt" if Path(args.resume).is_dir() else Path(args.resume)
        saved = load(checkpoint, "cpu")
        args = resumed(args, saved["args"])
    args = resolve(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.torch_deterministic, not args.torch_deterministic
    keep_memory()
    N, rows = args.num_envs, args.batch_length + Agent.context
    envs = make_envs(args.env_id, N, args.seed, args)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    agent = Agent(obs_space, action_space, args)
    latents = {key: (x.shape[1:], x.dtype) for key, x in agent.latents(agent.initial(1)).items()}
    replay = Replay(args.buffer_size, N, obs_space, action_space, agent.device, latents)
    name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = checkpoint.parent if saved else Path(args.run_root) / name
    run_dir.mkdir(parents=True, exist_ok=bool(saved))
    describe(args, agent, replay, run_dir)

    # all that a run knows beside weights and replay; origin: the row and seed of the last seeded reset
    now = {"step": 0, "updates": 0, "first": None, "origin": (0, args.seed), "returns": [0.0] * N, "lengths": [0] * N}
    now["recent"], state = [], agent.initial(N)
    if saved:
        agent.load_state_dict(saved["agent"])
        agent.optimizer.load_state_dict(saved["optimizer"])
        replay.load(run_dir / "replay", saved["replay"])
        now, state = saved["now"], {key: x.to(agent.device) for key, x in saved["state"].items()}
        row = rebuild(envs, args, replay, now["origin"], saved["row"])
        if row is None:
            print("the environments could not be rebuilt: new episodes begin, the interrupted ones are cut short")
            now.update(origin=(replay.rows, args.seed + replay.rows), returns=[0.0] * N, lengths=[0] * N)
        torch.set_rng_state(saved["random"][0])
        if agent.device.type == "cuda" and saved["random"][1]:
            torch.cuda.set_rng_state(saved["random"][1][0], agent.device)
    if not saved or row is None:
        row = start_row(envs.reset(seed=now["origin"][1])[0], N)
    writer = open_writer(args, run_dir, now["step"])
    metrics, last, spent = {}, (time.time(), now["step"]), {"act": 0.0, "train": 0.0, "env": 0.0}

    while now["step"] < args.total_timesteps:
        times = [time.time()]
        action, state = agent.act(row, row["is_first"], state)
        replay.add({**row, "action": action, **agent.latents(state)})
        times.append(time.time())
        if replay.windows(rows) >= args.learning_starts:
            now["first"] = now["step"] if now["first"] is None else now["first"]
            per_update = args.batch_size * args.batch_length / args.train_ratio  # policy steps
            while now["updates"] < 1 + (now["step"] - now["first"]) // per_update:
                batch = replay.sample(args.batch_size, rows)
                batch = {key: x.to(agent.device, non_blocking=True) for key, x in batch.items()}
                metrics = agent.update(batch)  # on a GPU it goes on while the environments step
                replay.write(batch, Agent.context)
                now["updates"] += 1
                if agent.device.type == "cpu":
                    finite(metrics, now["step"])
        times.append(time.time())
        before = now["step"]
        now["step"] += int((~row["is_last"]).sum())  # the reset that follows an end is no step
        row = next_row(envs, action, row)
        now["returns"] = [float(total) for total in now["returns"] * ~row["is_first"] + row["reward"]]
        now["lengths"] = [(length + 1) * int(not first) for length, first in zip(now["lengths"], row["is_first"], strict=True)]
        for n in np.flatnonzero(row["is_last"]):
            writer.add_scalar("charts/episodic_return", now["returns"][n], now["step"])
            writer.add_scalar("charts/episodic_length", now["lengths"][n], now["step"])
            now["recent"] = [*now["recent"], now["returns"][n]][-20:]
        times.append(time.time())
        spent = {key: spent[key] + b - a for key, a, b in zip(spent, times, times[1:], strict=False)}
        done = now["step"] >= args.total_timesteps
        if time.time() - last[0] > args.log_every or done:
            record(writer, args, now, finite(metrics, now["step"]) if metrics else {}, spent, last, replay)
            last, spent = (time.time(), now["step"]), dict.fromkeys(spent, 0.0)
        if now["step"] // args.checkpoint_every > before // args.checkpoint_every or done:
            checkpoint_run(args, run_dir, agent, replay, now, row, state, writer, rows, metrics)
    envs.close()
    writer.close()
    score = float(np.mean(now["recent"])) if now["recent"] else float("nan")
    result = {"run_dir": str(run_dir), "global_step": now["step"], "updates": now["updates"], "episodic_return": score}
    return {**result, **{key: x.item() for key, x in metrics.items()}}


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
