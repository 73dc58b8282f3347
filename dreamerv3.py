# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "numpy", "gymnasium>=1.3", "ale-py", "shimmy[dm-control]", "mujoco>=3.17,<4", "tensorboard", "tyro"
# ]
# ///
"""DreamerV3: learn a model of the world, then learn to act inside it, with one set of hyperparameters for every domain.

Paper: Hafner et al., "Mastering Diverse Domains through World Models", arXiv 2301.04104v2 (Nature 640, 2025). "Eq. n"
is an equation of the arXiv text, "Table" its hyperparameter table, "code" the authors' release of December 2024 on.

    python dreamerv3.py --env-id ALE/Pong-v5              train: size 12m, 400,000 policy steps = 1.6M frames
    python dreamerv3.py --env-id CartPole-v1 --size 1m --learning-rate 3e-4 --warmup 200 --total-timesteps 5_000
    python dreamerv3.py --resume runs/...                 go on where the last checkpoint stands, replay included
    python dreamerv3.py --eval runs/.../checkpoint.pt     play 10 episodes, print the returns, save eval.gif

Symbols in shapes: B sequences of a batch, T steps trained on, H imagination horizon, N = B*T start states (in acting:
the environments), A action size, E embedding, D deterministic state, S latent variables, K classes of each, Z = S*K,
F = D + Z features, U hidden units, G blocks of the recurrent layer, V bins of the two-hot distributions.

A row of experience holds obs_t, the reward that arrived with it, is_first, is_last, is_terminal, and the action chosen
after seeing obs_t. The model at row t thus sees obs[t] and action[t-1]; at is_first it forgets both state and action.

Differs from the paper, on purpose:
- Size 12m and train ratio 512 by default, where Table has 200m and 128 for Atari100k: one affordable GPU.
- Stored latents are bfloat16 and bytes, 4.6 kB a row at 12m instead of 10; the recurrent state stays float32.
- Reset rows are not counted as steps by the train ratio; the code counts them.
- Fresh latents are written back, and weights used for acting, at once; in the code one update or policy call later.
- Discrete observations become one-hot vectors like any other: symlog and squared error, where the code takes a softmax.
- An Atari episode cut at 108,000 frames bootstraps, as every time-out does here; in the code it is terminal.
- ALE's vector environment resizes images by area, the code with Pillow's bilinear filter.
- Evaluation takes the most likely action; published scores are returns of training episodes, which sample.
- Weights are cast to bfloat16 once per update on a GPU, so their gradients over the T steps add up in bfloat16.
"""

import copy
import ctypes
import json
import os
import platform
import random
import re
import sys
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from torch import nn
from torch.distributions import Normal

SOURCE = Path(__file__).read_text(encoding="utf-8")  # goes into every checkpoint: the code that really ran


@dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # ALE/*, dm_control/<domain>-<task>-v0, or any gymnasium id (module:Id too)
    env_kwargs: str = "{}"  # arguments for the environment, as JSON
    num_envs: int = 1  # environments stepped together; Table: 1 for Atari100k, 16 elsewhere
    vector: Literal["sync", "async"] = "sync"  # environments in this process, or each in a process of its own
    action_repeat: int | None = None  # frames per policy step; Atari 4, dm_control 2, else 1
    atari_protocol: Literal["100k", "200m"] = "100k"  # 64x64 RGB, minimal actions | 96x96 gray, all 18, sticky 0.25
    obs: Literal["vector", "image", "both"] = "vector"  # what the environment gives, its camera, or both; not Atari
    seed: int = 1  # of weights, sampling and environments
    size: Literal["debug", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "12m"  # parameters; Table: 200m
    total_timesteps: int | None = None  # policy steps of all environments together; 400_000 (debug: 400)
    batch_size: int | None = None  # B, sequences per update; Table: 16 (debug: 4)
    batch_length: int | None = None  # T, steps per sequence; Table: 64 (debug: 8)
    train_ratio: float | None = None  # replayed steps per policy step; 512 (debug: 4). Atari100k: paper 128, code 256
    learning_starts: int | None = None  # windows in the replay before the first update; code: 1024 (debug: 64)
    buffer_size: int | None = None  # replay rows; 9/8 of the steps (resets are rows), at most 1_000_000. Table: 5e6
    checkpoint_every: int | None = None  # policy steps between checkpoints; 10_000 (debug: 200)
    log_every: float = 10.0  # seconds between progress lines and between records of scalars
    imag_horizon: int = 15  # H, Table
    gamma: float = 1 - 1 / 333  # discount, Table: horizon 333
    lam: float = 0.95  # lambda of the returns, Table
    learning_rate: float = 4e-5  # Table, every domain and size
    warmup: int = 1000  # updates of linear learning-rate ramp; code
    agc: float = 0.3  # largest gradient norm of a tensor, relative to the norm of the tensor; Table
    beta1: float = 0.9  # decay of the momentum; code
    beta2: float = 0.999  # decay of the mean square of gradients; code
    eps: float = 1e-20  # of the optimiser; Table
    free_nats: float = 1.0  # a KL below this is not optimised, per step; Table
    dyn_scale: float = 1.0  # Eq. 2, Table
    rep_scale: float = 0.1  # Eq. 2, Table
    repval_scale: float = 0.3  # critic loss on replayed rows, Table
    entropy_scale: float = 3e-4  # Eq. 6, Table
    unimix: float = 0.01  # uniform share of every latent categorical, Table
    actor_unimix: float = 0.01  # the same for discrete actions: 0.01 in the paper, in effect 0 in the code
    slow_rate: float = 0.02  # of the slow critic's moving average, per update; Table: decay 0.98
    return_rate: float = 0.01  # of the return range's moving average, per update; Table: decay 0.99
    stoch: int = 32  # S, Table
    blocks: int = 8  # G, Table
    bins: int = 255  # V, Table
    deter: int | None = None  # D; by --size, as the four below
    hidden: int | None = None  # U inside the RSSM
    units: int | None = None  # U of encoder, decoder and heads
    classes: int | None = None  # K
    depth: int | None = None  # half the channels of the first convolution
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    bf16: bool = True  # bfloat16 products and convolutions on a GPU; products only on a CPU with AMX
    cuda_graph: bool = True  # replay the step of acting, and the whole update, as CUDA graphs on a GPU
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on from
    eval: str | None = None  # run folder or checkpoint to evaluate
    eval_episodes: int = 10  # episodes of --eval
    eval_steps: int = 30_000  # policy steps after which an episode of --eval is cut off
    track: bool = False  # mirror TensorBoard to Weights & Biases (pip install wandb; WANDB_PROJECT, WANDB_ENTITY)


DEBUG = dict(total_timesteps=400, batch_size=4, batch_length=8, train_ratio=4, learning_starts=64, checkpoint_every=200)
RUN = dict(total_timesteps=400_000, batch_size=16, batch_length=64, train_ratio=512, learning_starts=1024)
SIZES = {  # Table: all widths follow from one number
    "debug": dict(hidden=32, units=32, deter=256, depth=2, classes=2, **DEBUG),
    "1m": dict(hidden=64, units=64, deter=512, depth=4, classes=4, **RUN),
    "12m": dict(hidden=256, units=256, deter=2_048, depth=16, classes=16, **RUN),
    "25m": dict(hidden=384, units=384, deter=3_072, depth=24, classes=24, **RUN),
    "50m": dict(hidden=512, units=512, deter=4_096, depth=32, classes=32, **RUN),
    "100m": dict(hidden=768, units=768, deter=6_144, depth=48, classes=48, **RUN),
    "200m": dict(hidden=1_024, units=1_024, deter=8_192, depth=64, classes=64, **RUN),
    "400m": dict(hidden=1_536, units=1_536, deter=12_288, depth=96, classes=96, **RUN),
}
ATARI = {  # settings of ALE by --atari-protocol
    "100k": dict(img_height=64, img_width=64, grayscale=False, full_action_space=False, repeat_action_probability=0.0),
    "200m": dict(img_height=96, img_width=96, grayscale=True, full_action_space=True, repeat_action_probability=0.25),
}
SIDES = range(48, 257, 16)  # of images: four halvings, and a smallest image that is not too small


def resolve(args: Args) -> Args:
    """Fill what was left open (None) from the preset of --size and the kind of environment. An explicit flag wins."""
    family = args.env_id.split("/")[0]
    preset = {"checkpoint_every": 10_000, **SIZES[args.size]}
    preset["action_repeat"] = {"ALE": 4, "dm_control": 2}.get(family, 1)
    preset["buffer_size"] = min((args.total_timesteps or preset["total_timesteps"]) * 9 // 8, 1_000_000)
    args = replace(args, **{key: value for key, value in preset.items() if getattr(args, key) is None})
    least = dict(batch_length=2, bins=3, seed=0) | dict.fromkeys(("train_ratio", "learning_rate", "agc", "eps"), 1e-30)
    ones = "gamma", "lam", "unimix", "actor_unimix", "slow_rate", "return_rate"
    for name, value in asdict(args).items():
        low, high = least.get(name, int(type(value) is int)), 1 if name in ones else 0.9999 if "beta" in name else 2**31
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: allowed: {low:g} to {high:g}")
    if args.bins % 2 == 0 or args.deter % args.blocks:
        fail(f"--bins {args.bins} must be odd; --blocks {args.blocks} must divide --deter {args.deter}")
    needed = args.num_envs * (-(-args.learning_starts // args.num_envs) + args.batch_length)  # rows at the first update
    if args.buffer_size // args.num_envs * args.num_envs < min(needed, args.total_timesteps):
        fail(f"--buffer-size {args.buffer_size}: training starts with {needed:,} rows; allowed: that many or more")
    if args.atari_protocol != Args.atari_protocol and family != "ALE":
        fail(f"--atari-protocol {args.atari_protocol}: allowed: with --env-id ALE/... only")
    return args


# === Part 1: the algorithm ============================================================================================


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-4) * scale over one axis: no mean, no offset, in float32."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x, dim=-1):
        y = F.rms_norm(x.float().movedim(dim, -1), self.scale.shape, self.scale, 1e-4)
        return y.movedim(-1, dim).to(x.dtype)


class BlockLinear(nn.Module):
    """G separate linear layers on G contiguous slices of the features, 1/G of the weights of one layer."""

    def __init__(self, inputs, outputs, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        y = torch.bmm(x.flatten(0, -2).unflatten(-1, (len(self.weight), -1)).transpose(0, 1), self.weight)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1) + self.bias


def cast(weight):
    """A weight as autocast would cast it. Autocast remembers casts of parameters, but would cast parts at each use."""
    device = weight.device.type
    return weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight


def mlp(inputs, units, layers):
    """layers x (Linear, RMSNorm, SiLU), the order used everywhere."""
    sizes = [inputs] + layers * [units]
    parts = [(nn.Linear(a, b), RMSNorm(b), nn.SiLU()) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[module for part in parts for module in part])


def init_weights(module, outscale=1.0):
    """Normal of deviation outscale / sqrt(fan in), truncated at 2 sigma (1.1368 makes up for the truncation); biases 0.
    A BlockLinear counts its full input width as fan in, as the code does: its weights are sqrt(G) smaller than usual.
    """
    if not isinstance(module, nn.Linear | nn.Conv2d | BlockLinear):
        return
    weight = module.weight
    fan_in = weight[..., 0].numel() if isinstance(module, BlockLinear) else weight[0].numel()
    nn.init.trunc_normal_(weight, a=-2, b=2).data.mul_(1.1368 * outscale / fan_in**0.5)
    nn.init.zeros_(module.bias)


def is_image(space):
    """uint8 of rank 3 goes to the convolutions, everything else to the MLP."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def symlog(x):
    """Eq. 9: sign(x) ln(1 + |x|), a logarithm for both signs, the identity near 0. Any shape."""
    return x.sign() * x.abs().log1p()


def symexp(x):
    """Eq. 9: sign(x) (exp|x| - 1), the inverse of symlog. Any shape."""
    return x.sign() * x.abs().expm1()


class Encoder(nn.Module):
    """Observations -> embedding. Vectors: symlog, 3 layers. Images, stacked on channels: 4 x (5x5, max-pool, norm)."""

    def __init__(self, obs_space, args):
        super().__init__()
        self.images = sorted(key for key, space in obs_space.items() if is_image(space))
        self.vectors = sorted(key for key in obs_space if key not in self.images)
        self.size = args.units if self.vectors else 0  # E
        if self.vectors:
            self.mlp = mlp(sum(obs_space[key].shape[0] for key in self.vectors), args.units, 3)
        if self.images:
            height, width, _ = obs_space[self.images[0]].shape
            depths = [sum(obs_space[key].shape[-1] for key in self.images)] + [m * args.depth for m in (2, 3, 4, 4)]
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in zip(depths, depths[1:], strict=False))
            self.convs.to(memory_format=torch.channels_last)
            self.norms = nn.ModuleList(RMSNorm(depth) for depth in depths[1:])
            self.size += depths[-1] * (height // 16) * (width // 16)
        self.apply(init_weights)

    def forward(self, obs):
        """{key: (B, T, ...)} -> (B, T, E)."""
        tokens = []
        if self.vectors:
            tokens.append(self.mlp(torch.cat([symlog(obs[key].float()) for key in self.vectors], -1)))
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            x = image.flatten(0, 1).permute(0, 3, 1, 2) / 255 - 0.5  # channels-last memory: the permutes move no data
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.silu(norm(F.max_pool2d(conv(x), 2), dim=1))
            tokens.append(x.permute(0, 2, 3, 1).reshape(*image.shape[:2], -1))
        return torch.cat(tokens, -1)


def upsample_conv(x, conv):
    """conv(nearest-neighbour upsampling of x): (B, C, h, w) -> (B, O, 2h, 2w), for a 5x5 kernel with padding 2.
    5 neighbours are copies of 3 pixels; of which, depends on whether the output's row is even or odd. So each of the
    2x2 phases is a 3x3 convolution of the small image, with sums of taps as weights: 9 products, not 25.
    """

    def fold(w):
        """(..., 5) taps -> (..., 2, 3): which of them meet the same pixel, for even and for odd positions."""
        a, b, c, d, e = w.unbind(-1)
        return torch.stack([a + b, c + d, e, a, b + c, d + e], -1).unflatten(-1, (2, 3))

    taps = fold(fold(conv.weight).movedim(2, -1))  # (O, C, 2, 3, 2, 3): columns, then rows
    weight = taps.permute(4, 2, 0, 1, 5, 3).flatten(0, 2)  # (4*O, C, 3, 3)
    y = F.conv2d(x, weight, conv.bias.repeat(4), padding=1).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """Features -> predicted observations: vectors as symlog, images in 0 to 1."""

    blocks = 8  # of the layer from h to the smallest image; a number of its own in the code, whatever --blocks is

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
            self.low = height // 16, width // 16, depths[0]  # rows, columns, channels of the smallest image
            pixels = int(np.prod(self.low))
            if args.deter % self.blocks or depths[0] % self.blocks:
                fail(f"--deter {args.deter} --depth {args.depth}: allowed with images: multiples of 8, of 2")
            self.from_deter = BlockLinear(args.deter, pixels, self.blocks)
            self.from_stoch = nn.Sequential(*mlp(self.split[1], 2 * args.units, 1), nn.Linear(2 * args.units, pixels))
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in zip(depths, depths[1:], strict=False))
            self.norms = nn.ModuleList(RMSNorm(depth) for depth in depths[:-1])
        self.apply(init_weights)

    def forward(self, feat):
        """(B, T, F) -> {key: (B, T, ...) float32}."""
        deter, stoch = feat.split(self.split, -1)
        out = {}
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))
            out = {key: head(x).float() for key, head in self.heads.items()}
        if self.images:
            x = self.from_deter(deter).flatten(0, 1).unflatten(-1, (self.blocks, *self.low[:2], -1))
            x = x.permute(0, 2, 3, 1, 4).flatten(3)  # each block of the layer owns some of the channels
            x = (x + self.from_stoch(stoch).view(x.shape)).permute(0, 3, 1, 2)
            for norm, conv in zip(self.norms, self.convs, strict=True):
                x = upsample_conv(F.silu(norm(x, dim=1)), conv)
            image = x.float().sigmoid().permute(0, 2, 3, 1).unflatten(0, feat.shape[:2])
            parts = image.split([self.shapes[key][-1] for key in self.images], -1)
            out.update(zip(self.images, parts, strict=True))
        return out


def symexp_bins(count):
    """Eq. 10: bin positions symexp(-20 ... 20), exactly antisymmetric. count: odd -> (count,)."""
    half = symexp(torch.linspace(-20, 0, count // 2 + 1))
    return torch.cat([half, -half[:-1].flip(0)])


def twohot(x, bins):
    """Eq. 11: the two bins around x, and weights linear in the raw (not symlog) distance, so that their mean is x.
    x: any shape; bins: (V,) -> index, weight, each x.shape + (2,). Beyond the last bin all weight lies on the last bin.
    """
    x = x.float().contiguous()
    below = (torch.searchsorted(bins, x, right=True) - 1).clamp(0, len(bins) - 2)
    upper = ((x - bins[below]) / (bins[below + 1] - bins[below])).clamp(0, 1)
    return torch.stack([below, below + 1], -1), torch.stack([1 - upper, upper], -1)


def twohot_loss(logits, bins, *targets):
    """Eq. 11: cross-entropy of softmax(logits) with twohot(x), summed over the targets x.
    logits: (..., V); targets: (...) each -> (...). Two gathered logits are cheaper than a dense (..., V) target.
    """
    logp = logits.float().log_softmax(-1)
    pairs = [twohot(x.detach(), bins) for x in targets]
    return -sum((logp.gather(-1, index) * weight).sum(-1) for index, weight in pairs)


def twohot_mean(logits, bins):
    """Eq. 10: softmax(logits) . bins. logits: (..., V) -> (...). Bins reach 4.85e8, so that a plain sum over uniform
    probabilities gives noise of +-40; the difference of mirrored probabilities first, and it gives exactly 0.
    """
    half = len(bins) // 2
    probs = logits.float().softmax(-1)
    return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :]).sum(-1)


class Head(nn.Module):
    """MLP with a linear output: (..., F) -> (..., outputs), float32."""

    def __init__(self, inputs, units, layers, outputs, outscale):
        super().__init__()
        self.mlp, self.out = mlp(inputs, units, layers).apply(init_weights), nn.Linear(units, outputs)
        init_weights(self.out, outscale)

    def forward(self, feat):
        return self.out(self.mlp(feat)).float()


def unimix(logits, mix):
    """ln((1 - mix) softmax(logits) + mix / K), float32: no KL or log-probability explodes. (..., K) -> (..., K)."""
    logp = logits.float().log_softmax(-1)
    return ((1 - mix) * logp.exp() + mix / logits.shape[-1]).log() if mix else logp


def sample_onehot(probs, noise=None):
    """Exact categorical sample, no host sync: arg-max of p / noise, noise ~ Exp(1). (..., K) -> one-hot (..., K)."""
    noise = torch.rand_like(probs, dtype=torch.float32).log_().neg_() if noise is None else noise
    index = (probs.detach() / noise).argmax(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, index, 1.0)


class Actor(Head):
    """The policy. An action is a vector of size A: one-hot for Discrete, raw numbers for Box, whose bounds are +-1."""

    def __init__(self, inputs, action_space, args):
        discrete = isinstance(action_space, spaces.Discrete)
        size = int(action_space.n if discrete else np.prod(action_space.shape))
        super().__init__(inputs, args.units, 3, size, outscale=0.01)
        self.discrete, self.size, self.mix = discrete, size, args.actor_unimix  # size: A
        if not discrete:
            self.std_out = nn.Linear(args.units, size).apply(partial(init_weights, outscale=0.01))

    def dist(self, feat):
        """(..., F) -> discrete: log-probabilities (..., A); Box: a normal, mean within +-1, deviation 0.1 to 1."""
        x = self.mlp(feat)
        if self.discrete:
            return unimix(self.out(x), self.mix)
        std = 0.9 * (self.std_out(x).float() + 2).sigmoid() + 0.1
        return Normal(self.out(x).float().tanh(), std, validate_args=False)  # a check would wait for the device

    def sample(self, feat, mode=False):
        """-> action (..., A), the most likely one if mode. A Box sample may exceed +-1, and is clipped where used."""
        dist = self.dist(feat)
        if not self.discrete:
            return dist.mean if mode else dist.rsample()
        return sample_onehot(dist.exp(), torch.ones_like(dist) if mode else None)

    def log_prob(self, dist, action):
        """dist: what dist has returned; action: (..., A) -> (...), in nats."""
        return (dist * action if self.discrete else dist.log_prob(action)).sum(-1)

    def entropy(self, dist):
        """-> (...), in nats."""
        return (-dist * dist.exp() if self.discrete else dist.entropy()).sum(-1)


def straight_through(onehot, probs):
    """The value of the sample with the gradient of the probabilities (Bengio et al. 2013). Both (..., K)."""
    return onehot + (probs - probs.detach())  # with other parentheses the sum is off one-hot by rounding


class RSSM(nn.Module):
    """Recurrent state-space model, Eq. 1: h_t = f(h, z, a of t-1), posterior z_t ~ q(h_t, x_t), prior z_t ~ p(h_t)."""

    def __init__(self, embed_size, action_size, args):
        super().__init__()
        D, U, G, Z = args.deter, args.hidden, args.blocks, args.stoch * args.classes
        self.args = args
        self.deter_in, self.stoch_in, self.action_in = mlp(D, U, 1), mlp(Z, U, 1), mlp(action_size, U, 1)
        self.core_hidden, self.core_norm = BlockLinear(D + G * 3 * U, D, G), RMSNorm(D)
        self.core_gates = BlockLinear(D, 3 * D, G)
        self.post_in, self.post_norm, self.post_out = nn.Linear(D + embed_size, U), RMSNorm(U), nn.Linear(U, Z)
        self.prior = nn.Sequential(*mlp(D, U, 2), nn.Linear(U, Z), nn.Unflatten(-1, (args.stoch, args.classes)))
        self.apply(init_weights)

    def initial(self, B):
        """Zeros: {"deter": (B, D), "stoch": (B, S, K)}."""
        zeros = self.core_norm.scale.new_zeros
        return {"deter": zeros(B, self.args.deter), "stoch": zeros(B, self.args.stoch, self.args.classes)}

    def core(self, deter, stoch, action_hidden, weight):
        """h' = f(h, z, a), a GRU with block-diagonal matrices: (N, D), (N, S, K), (N, U) -> (N, D).
        weight: of core_hidden, cast. Each block sees its own slice of h, and all of the shared input.
        """
        (G, _, size), h = weight.shape, deter.to(weight.dtype)
        shared = torch.cat([self.deter_in(h), self.stoch_in(stoch.flatten(1)), action_hidden], -1)  # (N, 3*U)
        x = torch.bmm(shared.expand(G, -1, -1), weight[:, size:])  # (G, N, D/G)
        x = x.baddbmm_(h.view(-1, G, size).transpose(0, 1), weight[:, :size]).transpose(0, 1).flatten(1)  # (N, D)
        x = F.silu(self.core_norm(x + self.core_hidden.bias).to(h.dtype))
        gates = torch.bmm(x.view(-1, G, size).transpose(0, 1), self.core_gates.weight)  # (G, N, 3*D/G)
        reset, cand, update = (gates + self.core_gates.bias.view(G, 1, -1)).chunk(3, -1)
        cand = torch.tanh(reset.sigmoid() * cand)  # (G, N, D/G)
        own = deter.view(-1, G, size).transpose(0, 1)  # (G, N, D/G)
        return torch.lerp(own, cand, (update - 1).sigmoid()).transpose(0, 1).flatten(1)  # -1: at first h is mostly kept

    def step(self, deter, stoch, keep, action_hidden, embed_hidden, noise, core_weight, post_weight):
        """One step of the filter: h' = f(h, z, a), z' ~ q(h', x). -> h' (N, D), z' and its logits (N, S, K)."""
        deter = self.core(deter * keep, stoch * keep[..., None], action_hidden, core_weight)
        x = F.silu(self.post_norm(F.linear(deter, post_weight) + embed_hidden))
        logits = self.post_out(x).view(noise.shape)
        return deter, self.draw(logits, noise), logits

    def draw(self, logits, noise):
        """z ~ softmax of the logits, mixed, with the gradient of its probabilities. Both (N, S, K); noise ~ Exp(1)."""
        probs = unimix(logits, self.args.unimix).exp()
        return straight_through(sample_onehot(probs, noise), probs)

    def feat(self, state):
        """[h, z]: (..., D), (..., S, K) -> (..., F)."""
        return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)

    def observe(self, embed, action, is_first, state, noise=None):
        """Filter T observations; what does not depend on h is computed for all T at once. embed: (B, T, E); action:
        (B, T, A), the one that led to each step; is_first: (B, T); state: of the step before; noise: (B, T, S, K)
        ~ Exp(1), drawn if None. -> posterior, {"deter": (B, T, D), "stoch": (B, T, S, K), "logits": (B, T, S, K)}.
        """
        (B, T), S, K = is_first.shape, self.args.stoch, self.args.classes
        keep = 1 - is_first.float()[..., None]  # (B, T, 1), 0 where an episode begins
        action_hidden = self.action_in((action * keep).clamp(-1, 1))  # (B, T, U)
        core_weight, post_in = cast(self.core_hidden.weight), cast(self.post_in.weight)  # once, not in each step
        post_weight, embed_weight = post_in.split([self.args.deter, embed.shape[-1]], 1)
        embed_hidden = F.linear(embed, embed_weight, self.post_in.bias)  # (B, T, U)
        noise = torch.rand(B, T, S, K, device=embed.device).log_().neg_() if noise is None else noise
        deter, stoch, steps = state["deter"], state["stoch"], []
        for t in range(T):
            now = keep[:, t], action_hidden[:, t], embed_hidden[:, t], noise[:, t]
            steps.append(self.step(deter, stoch, *now, core_weight, post_weight))
            deter, stoch, _ = steps[-1]
        deter, stoch, logits = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return {"deter": deter, "stoch": stoch, "logits": logits}

    def imagine(self, state, policy, horizon):
        """Roll the prior forward; policy: (N, F) -> (N, A). -> feat (N, H+1, F) with the start, actions (N, H, A)."""
        deter, stoch, feats, actions = state["deter"], state["stoch"], [self.feat(state)], []
        noise = torch.rand(horizon, *stoch.shape, device=stoch.device).log_().neg_()
        weight = cast(self.core_hidden.weight)
        for t in range(horizon):
            actions.append(policy(feats[-1]))
            deter = self.core(deter, stoch, self.action_in(actions[-1].clamp(-1, 1)), weight)
            stoch = self.draw(self.prior(deter), noise[t])
            feats.append(self.feat({"deter": deter, "stoch": stoch}))
        return torch.stack(feats, 1), torch.stack(actions, 1)


class LaProp:
    """Adaptive gradient clipping, then division by the RMS, then momentum. For each tensor p with gradient g:
    g <- g / max(1, |g| / (agc max(1e-3, |p|)))              norms over the whole tensor
    v <- beta2 v + (1 - beta2) g^2,  u = g / (sqrt(v / (1 - beta2^t)) + eps)
    m <- beta1 m + (1 - beta1) u,    p <- p - lr min(1, (t - 1) / warmup) m / (1 - beta1^t)
    The first update changes nothing. Counters live on the device, where a CUDA graph can advance them.
    """

    def __init__(self, params, args):
        self.params, self.args = params, args
        self.mean_square, self.momentum = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.count = torch.zeros((), dtype=torch.float64, device=params[0].device)  # t
        self.state = [*self.mean_square, *self.momentum, self.count]  # what a checkpoint holds

    @torch.no_grad()
    def step(self, grads):
        """grads: one tensor per parameter. -> global gradient norm before clipping, ()."""
        args, t = self.args, self.count.add_(1)
        norms = torch.stack(torch._foreach_norm(grads))
        limits = args.agc * torch.stack(torch._foreach_norm(self.params)).clamp(min=1e-3)
        grads = torch._foreach_div(grads, list((norms / limits).clamp(min=1).unbind()))
        torch._foreach_mul_(self.mean_square, args.beta2)
        torch._foreach_addcmul_(self.mean_square, grads, grads, 1 - args.beta2)
        rms = torch._foreach_div(self.mean_square, (1 - args.beta2**t).float())
        torch._foreach_sqrt_(rms)
        torch._foreach_add_(rms, args.eps)
        torch._foreach_lerp_(self.momentum, torch._foreach_div(grads, rms), 1 - args.beta1)
        rate = args.learning_rate * ((t - 1) / args.warmup).clamp(max=1) / (1 - args.beta1**t)
        torch._foreach_sub_(self.params, torch._foreach_mul(self.momentum, rate.float()))
        return norms.square().sum().sqrt()


def kl_categorical(logp, logq):
    """KL(p || q) in nats of S independent categoricals. Log-probabilities (..., S, K) -> (...)."""
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def kl_loss(post, prior, free_nats):
    """Eq. 3: (dynamics, representation) loss, one KL with either side stopped and never pushed below free_nats: the
    maximum is taken per step, below it a step gives no gradient. post, prior: ln p (..., S, K) -> two of (...).
    """
    dyn = kl_categorical(post.detach(), prior).clamp(min=free_nats)
    rep = kl_categorical(post, prior.detach()).clamp(min=free_nats)
    return dyn, rep


def lambda_return(reward, value, disc, lam):
    """Eq. 5: R_t = r_{t+1} + disc_{t+1} ((1 - lam_{t+1}) v_{t+1} + lam_{t+1} R_{t+1}), R_T = v_T; paper: r_t, c_t, v_t.
    reward, value, disc: (..., T+1), index t is what belongs to state t; lam: a number or (..., T+1) -> (..., T).
    """
    step, decay = reward + disc * (1 - lam) * value, disc * lam
    returns = [value[..., -1]]
    for t in range(value.shape[-1] - 1, 0, -1):
        returns.append(torch.addcmul(step[..., t], decay[..., t], returns[-1]))
    return torch.stack(returns[:0:-1], -1)


def actor_loss(logp, entropy, returns, value, weight, scale, entropy_scale):
    """Eq. 6, REINFORCE for all actions: -w_t (ln pi(a_t|s_t) sg((R_t - v_t) / scale) + eta H_t), scale = max(1, S).
    logp, entropy, returns, value, weight: (N, H) -> (N, H). Gradients flow through logp and entropy only.
    """
    advantage = ((returns - value) / scale).detach()
    return -weight.detach() * (logp * advantage + entropy_scale * entropy)


def critic_loss(logits, bins, returns, slow_value, weight):
    """Eq. 5, slow regulariser: w_t (CE(v_t, sg R_t) + CE(v_t, sg slow v_t)). logits: (..., V); others: (...)."""
    return weight.detach() * twohot_loss(logits, bins, returns, slow_value)


class Agent(nn.Module):
    """World model, actor and critic: one loss, one optimiser. Spaces: of one environment, as make_envs gives them."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.args, self.action_space, self.device = args, action_space, pick_device(args)
        bf16 = args.bf16 and self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        # one region per use: a weight first cast under no_grad would stay cached there without its gradient
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, bf16)
        size = args.deter + args.stoch * args.classes  # F
        self.encoder, self.decoder = Encoder(obs_space, args), Decoder(obs_space, args)
        self.actor = Actor(size, action_space, args)
        self.rssm = RSSM(self.encoder.size, self.actor.size, args)
        self.reward, self.cont = Head(size, args.units, 1, args.bins, 0.0), Head(size, args.units, 1, 1, 1.0)
        self.critic = Head(size, args.units, 3, args.bins, outscale=0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("bin_values", symexp_bins(args.bins))
        self.register_buffer("return_range", torch.zeros(2))  # moving 5th and 95th percentile of the returns, Eq. 7
        self.to(self.device)
        self.params = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = LaProp(self.params, args)

    def initial(self, B):
        """State of B environments before their first observation."""
        return {**self.rssm.initial(B), "action": torch.zeros(B, self.actor.size, device=self.device)}

    def action_vector(self, action):
        """Stored actions to model actions. Discrete: (B, T) -> (B, T, A) one-hot; Box: (B, T, ...) -> (B, T, A)."""
        onehot = torch.eye(self.actor.size, device=self.device)  # F.one_hot would wait for the device
        return onehot[action] if self.actor.discrete else action.reshape(*action.shape[:2], -1).float()

    def inputs(self, row, state):
        """What act takes: observations and is_first of a row, and the state of initial or of the last act."""
        keys = (*self.decoder.shapes, "is_first")
        return {key: torch.as_tensor(row[key]).to(self.device, non_blocking=True) for key in keys} | state

    @torch.no_grad()
    def act(self, inputs, eval=False):
        """-> the next state, with "action" (N, A) for what to do now. eval: the most likely action."""
        obs = {key: inputs[key][:, None] for key in self.decoder.shapes}
        with self.autocast():
            post = self.rssm.observe(self.encoder(obs), inputs["action"][:, None], inputs["is_first"][:, None], inputs)
            state = {key: post[key][:, 0] for key in ("deter", "stoch")}
            feat = self.rssm.feat(state)  # (N, F)
            return {**state, "action": self.actor.sample(feat, mode=eval)}

    def env_action(self, state):
        """State of act -> actions for the vector environment, int64 (N,) or float32 (N, ...). Waits for the device."""
        action = state["action"].cpu().numpy()  # (N, A)
        return action.argmax(-1) if self.actor.discrete else action.reshape(-1, *self.action_space.shape)

    def latents(self, state):
        """What the replay keeps of a state, to start windows from: bfloat16 h, one-hot z as bytes."""
        return {"deter": state["deter"].detach().bfloat16(), "stoch": state["stoch"].detach().to(torch.uint8)}

    def model_losses(self, batch):
        """Eq. 2, 3 on rows 1..T; row 0: state and action before them. -> losses (B, T), feat, posterior, stats."""
        args = self.args
        obs = {key: batch[key][:, 1:] for key in self.decoder.shapes}
        state = {key: batch[key][:, 0].float() for key in ("deter", "stoch")}
        with self.autocast():
            action = self.action_vector(batch["action"][:, :-1])  # (B, T, A)
            post = self.rssm.observe(self.encoder(obs), action, batch["is_first"][:, 1:], state)
            feat = self.rssm.feat(post)  # (B, T, F)
            prior_logits = self.rssm.prior(post["deter"])  # (B, T, S, K)
            recon = self.decoder(feat)
            reward_logits = self.reward(feat)
            cont_logit = self.cont(feat)[..., 0]
        post_logp, prior_logp = unimix(post["logits"], args.unimix), unimix(prior_logits, args.unimix)
        losses = {"reward": twohot_loss(reward_logits, self.bin_values, batch["reward"][:, 1:])}
        if self.decoder.images:  # summed over pixels: no mean, no 1/2
            losses["image"] = sum((recon[key] - obs[key] / 255).square().sum((2, 3, 4)) for key in self.decoder.images)
        if self.decoder.vectors:
            losses["vector"] = sum((recon[key] - symlog(obs[key])).square().sum(2) for key in self.decoder.vectors)
        cont = (1 - batch["is_terminal"][:, 1:].float()) * args.gamma  # (B, T), so imagination needs no gamma
        losses["cont"] = F.binary_cross_entropy_with_logits(cont_logit, cont, reduction="none")
        losses["dyn"], losses["rep"] = kl_loss(post_logp, prior_logp, args.free_nats)
        assert all(loss.shape == feat.shape[:2] for loss in losses.values())
        stats = {"stats/kl": kl_categorical(post_logp, prior_logp).mean()}
        stats["stats/post_entropy"] = -(post_logp.exp() * post_logp).sum((-2, -1)).mean()
        stats["stats/prior_entropy"] = -(prior_logp.exp() * prior_logp).sum((-2, -1)).mean()
        return losses, feat, post, stats

    @torch.no_grad()
    def imagine(self, post):
        """H steps from every replayed state: features, actions (N, H, A), reward, discounted continue, slow value."""
        with self.autocast():
            start = {key: post[key].flatten(0, 1) for key in ("deter", "stoch")}
            feat, action = self.rssm.imagine(start, self.actor.sample, self.args.imag_horizon)
            reward = twohot_mean(self.reward(feat), self.bin_values)  # (N, H+1)
            cont = self.cont(feat)[..., 0].sigmoid()  # (N, H+1)
            return feat, action, reward, cont, twohot_mean(self.slow_critic(feat), self.bin_values)

    def behaviour_losses(self, feat, post, batch):
        """Eq. 5 to 7 imagined, the critic on replayed rows. -> losses actor, critic (N, H), repval (B, T-1); stats."""
        args, bins = self.args, self.bin_values
        imag_feat, action, reward, cont, slow_value = self.imagine(post)
        with self.autocast():
            logits = self.critic(imag_feat)  # (N, H+1, V)
            dist = self.actor.dist(imag_feat[:, :-1])
            replay_logits = self.critic(feat)  # (B, T, V), with a gradient into the world model
            replay_slow = twohot_mean(self.slow_critic(feat.detach()), bins)  # (B, T)
        value = twohot_mean(logits.detach(), bins)  # (N, H+1); of the online critic, not the slow one
        returns = lambda_return(reward, value, cont, args.lam)  # (N, H)
        ranked, places = returns.flatten().sort().values, [q * (returns.numel() - 1) for q in (0.05, 0.95)]
        percentiles = torch.stack([ranked[int(x)].lerp(ranked[int(x) + 1], x % 1) for x in places])  # (2)
        self.return_range.lerp_(percentiles, args.return_rate)
        scale = (self.return_range[1] - self.return_range[0]).clamp(min=1)  # max(1, S of Eq. 7): noise is not blown up
        weight = cont.cumprod(1)[:, :-1]  # (N, H), beginning with the continue probability of the start itself
        logp, entropy = self.actor.log_prob(dist, action), self.actor.entropy(dist)
        actor = actor_loss(logp, entropy, returns, value[:, :-1], weight, scale, args.entropy_scale)
        critic = critic_loss(logits[:, :-1], bins, returns, slow_value[:, :-1], weight)
        boot = returns[:, 0].view(feat.shape[:2])  # (B, T): replayed rows go on with what is imagined from them
        real, is_last, is_terminal = (batch[key][:, 1:].float() for key in ("reward", "is_last", "is_terminal"))
        target = lambda_return(real, boot, (1 - is_terminal) * args.gamma, (1 - is_last) * args.lam)  # (B, T-1)
        repval = critic_loss(replay_logits[:, :-1], bins, target, replay_slow[:, :-1], 1 - is_last[:, :-1])
        assert actor.shape == critic.shape == returns.shape and repval.shape == target.shape
        stats = {"actor_entropy": entropy, "return_scale": scale, "return_mean": returns, "value_mean": value}
        stats.update(imag_reward=reward, imag_cont=cont, advantage=((returns - value[:, :-1]) / scale).abs())
        stats = {f"stats/{key}": x.detach().mean() for key, x in stats.items()}
        return {"actor": actor, "critic": critic, "repval": repval}, stats

    def update(self, batch):
        """One gradient step, without host sync. batch: Replay.sample -> 0-d statistics, fresh latents (B, T, ...)."""
        args = self.args
        model, feat, post, stats = self.model_losses(batch)
        behaviour, more_stats = self.behaviour_losses(feat, post, batch)
        losses = {key: loss.mean() for key, loss in {**model, **behaviour}.items()}
        scales = {"dyn": args.dyn_scale, "rep": args.rep_scale, "repval": args.repval_scale}  # the others: 1
        losses["total"] = sum(scales.get(key, 1.0) * loss for key, loss in losses.items())
        stats["stats/grad_norm"] = self.optimizer.step(torch.autograd.grad(losses["total"], self.params))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.slow_critic.parameters()), list(self.critic.parameters()), args.slow_rate)
        stats = {**stats, **more_stats, **{f"losses/{key}": loss for key, loss in losses.items()}}
        return {**{key: x.detach() for key, x in stats.items()}, **self.latents(post)}


class Replay:
    """Ring buffer of capacity // num_envs rows for each environment; all environments add a row at a time together.
    Windows of rows are uniform over all starts and run across episode ends; first in each batch comes the online queue,
    the windows that tile each stream, as they become complete. extras: {key: (shape, dtype)} of what is stored beside a
    row and rewritten later, such as latent states. T: rows of a window, with the one of context.
    """

    def __init__(self, capacity, num_envs, obs_space, action_space, device, extras=None):
        self.length, self.num_envs = capacity // num_envs, num_envs
        spec = {**(extras or {}), "reward": ((), torch.float32)}
        for key, space in {**obs_space.spaces, "action": action_space}.items():
            spec[key] = space.shape, torch.from_numpy(np.zeros(0, space.dtype)).dtype
        spec |= {key: ((), torch.bool) for key in ("is_first", "is_last", "is_terminal")}
        self.row_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in spec.values())
        self.device = replay_device(capacity, self.row_bytes, device)
        zeros = partial(torch.zeros, self.length, num_envs, device=self.device)
        self.data = {key: zeros(*shape, dtype=dtype) for key, (shape, dtype) in spec.items()}
        self.rows, self.oldest = 0, 0  # added so far for each environment; the first of them that is still kept
        self.online = 0  # windows that the online queue has handed out
        self.files = []  # (first row, end row, name) of what save has written

    def windows(self, T):
        """Number of windows of T rows that there are to sample from."""
        return self.num_envs * max(0, self.rows - self.oldest - T + 1)

    def add(self, row):
        """row: {key: (num_envs, ...)}, arrays or tensors."""
        for key, ring in self.data.items():
            ring[self.rows % self.length].copy_(torch.as_tensor(row[key]), non_blocking=self.device.type != "cpu")
        self.rows, self.oldest = self.rows + 1, max(self.oldest, self.rows + 1 - self.length)

    def sample(self, B, T, online=True):
        """-> {key: (B, T, ...)}, and "index" (B, T) for write. is_last also marks an episode that was abandoned."""
        N = self.num_envs
        start, env = torch.randint(self.oldest, self.rows - T + 1, (B,)), torch.randint(N, (B,))
        for b in range(B if online else 0):
            self.online = max(self.online, -(-self.oldest // T) * N)
            if self.online // N * T + T > self.rows:
                break
            start[b], env[b] = self.online // N * T, self.online % N
            self.online += 1
        index = ((start[:, None] + torch.arange(T)) % self.length * N + env[:, None]).to(self.device, non_blocking=True)
        batch = {key: ring.flatten(0, 1)[index] for key, ring in self.data.items()}
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]
        return {**batch, "index": index}

    def write(self, index, extras):
        """Put fresh extras, {key: (B, T, ...)}, back to rows index (B, T); where windows overlap, the last one wins."""
        index = index.flatten().to(self.device)  # (B*T)
        order = torch.arange(len(index), device=self.device)
        last = order.new_zeros(self.length * self.num_envs).scatter_reduce_(0, index, order, "amax")[index]  # (B*T)
        for key, values in extras.items():
            self.data[key].flatten(0, 1)[index] = values.flatten(0, 1).to(self.device)[last]

    def save(self, folder):
        """Write the rows added since the last call; extras written to older ones are lost. -> what load needs.
        First it deletes what the last checkpoint does not name: rows that left the ring, what a crash left behind.
        """
        folder.mkdir(exist_ok=True)
        for path in set(folder.iterdir()) - {folder / name for _, _, name in self.files}:
            path.unlink()
        self.files = [file for file in self.files if file[1] > self.oldest]
        first = max([self.oldest] + [end for _, end, _ in self.files])
        if first < self.rows:
            places = torch.arange(first, self.rows, device=self.device) % self.length
            self.files.append((first, self.rows, f"rows-{first}-{self.rows}.pt"))
            save(folder / self.files[-1][2], **{key: ring[places].cpu() for key, ring in self.data.items()})
        return {key: getattr(self, key) for key in ("rows", "oldest", "online", "files")}

    def load(self, folder, state):
        """Read back what save wrote, into a replay of the same size or a larger one."""
        vars(self).update(state)
        for first, end, name in self.files:
            for key, values in load(folder / name).items():
                self.data[key][torch.arange(first, end) % self.length] = values.to(self.device)


# === Part 2: training =================================================================================================


def train(args: Args) -> dict:
    """Train as args say. -> {"run_dir", "global_step", "updates", "episodic_return", losses and statistics}."""
    if args.eval is not None:
        return show(args)
    saved = None if args.resume is None else load(Path(args.resume) / "checkpoint.pt", need=("args", "agent", "now"))
    args = resolve(inherit(args, args.resume, saved["args"], RESUMED) if saved else args)
    tune(args)
    now = saved["now"] if saved else dict(step=0, updates=0, first_step=None, recent=[])
    step, updates, first_step, recent = (now[key] for key in ("step", "updates", "first_step", "recent"))
    for seed in random.seed, np.random.seed, torch.manual_seed:
        seed(args.seed + step)  # a resumed run draws new numbers
    envs = make_envs(args.env_id, args.num_envs, args.seed, args)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    agent = Agent(obs_space, action_space, args)
    device, cuda, state = agent.device, agent.device.type == "cuda", agent.initial(args.num_envs)
    latents = {key: (x.shape[1:], x.dtype) for key, x in agent.latents(state).items()}
    replay = Replay(args.buffer_size, args.num_envs, obs_space, action_space, device, latents)
    update, act = (Captured(fn, args.cuda_graph and cuda) for fn in (agent.update, agent.act))
    if saved:  # new episodes begin: the interrupted ones stand in the replay as abandoned
        agent.load_state_dict(saved["agent"])
        torch._foreach_copy_(agent.optimizer.state, saved["optimizer"])
        replay.load(Path(args.resume) / "replay", saved["replay"])
    row, stats, began, since = start_row(envs, args.seed + step), {}, time.time(), step
    run_dir, writer = open_run(args, agent, replay, saved)
    rows, replayed = args.batch_length + 1, args.batch_size * args.batch_length  # in a window; by an update
    print(f"training  an update on {replayed:,} steps per {replayed / args.train_ratio:g} policy steps", flush=True)
    returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)  # of the episodes that go on
    try:
        while step < args.total_timesteps:
            state = act(agent.inputs(row, state))
            action = agent.env_action(state)
            replay.add({**row, "action": action, **agent.latents(state)})

            ready = replay.windows(rows) >= args.learning_starts
            first_step = step if ready and first_step is None else first_step
            while ready and updates < 1 + (step - first_step) * args.train_ratio // replayed:
                batch = replay.sample(args.batch_size, rows)
                batch = {key: x.to(device, non_blocking=True) for key, x in batch.items()}
                stats = dict(update(batch))  # a GPU works on it while the environments step; dict: to pop from
                replay.write(batch["index"][:, 1:], {key: stats.pop(key) for key in latents})
                updates += 1
                if not cuda:  # a GPU would be waited for: there nan stops the run at the next record or checkpoint
                    finite(stats)

            before, step = step, step + int((~row["is_last"]).sum())  # a reset is no step
            row = next_row(envs, action, row)
            returns, lengths = returns * ~row["is_first"] + row["reward"], (lengths + 1) * ~row["is_first"]
            for n in np.flatnonzero(row["is_last"]):
                recent = [*recent, float(returns[n])][-20:]
                writer.add_scalar("charts/episodic_return", returns[n], step)
                writer.add_scalar("charts/episodic_length", lengths[n], step)

            done = step >= args.total_timesteps
            if done or time.time() - began > args.log_every:
                passed = time.time() - began
                speed, share = max(1, step - since) / passed, envs.seconds / passed
                charts = {"charts/SPS": speed, "charts/env_share": share, "charts/frames": step * args.action_repeat}
                for key, value in {**finite(stats), **charts, "charts/updates": updates}.items():
                    writer.add_scalar(key, value, step)
                left = int(max(0, args.total_timesteps - step) / speed / 60)  # minutes
                line = f"step {step:,}/{args.total_timesteps:,}  return {np.mean(recent or [np.nan]):.1f}  "
                line += f"updates {updates:,}  {speed:.1f} steps/s, {share:.0%} in environments  "
                print(f"{line}left {left // 60}:{left % 60:02} h", flush=True)
                began, since, envs.seconds = time.time(), step, 0.0
            if done or before // args.checkpoint_every < step // args.checkpoint_every:
                finite(stats)  # what is broken is not saved
                now = dict(step=step, updates=updates, first_step=first_step, recent=recent)
                parts = {"agent": agent.state_dict(), "optimizer": agent.optimizer.state, "now": now}
                parts |= {"replay": replay.save(run_dir / "replay"), "args": asdict(args), "source": SOURCE}
                save(run_dir / "checkpoint.pt", **parts)
                if replay.windows(rows):
                    write_open_loop(agent, replay.sample(6, rows, online=False), run_dir, writer, step)
                writer.flush()
    except Exception as error:
        raise RuntimeError(f"{run_dir}, policy step {step:,}: {type(error).__name__}: {error}") from error
    finally:
        print(f"stopped   at step {step:,}; its checkpoint, if any, goes on by --resume {run_dir}", flush=True)
        writer.close()
        with suppress(Exception):  # the environments of a broken simulator may raise again
            envs.close()
    if not updates:
        fail(f"--total-timesteps {step}: not one update, {run_dir} has learned nothing; allowed: more steps")
    score = float(np.mean(recent or [np.nan]))
    return {"run_dir": str(run_dir), "global_step": step, "updates": updates, "episodic_return": score, **finite(stats)}


@torch.no_grad()
def open_loop(agent, batch):
    """What the model knows: up to six windows side by side, with truth, model and error from top to bottom. It observes
    a quarter (green bar) and predicts the rest from the actions (red). batch: Replay.sample -> uint8 (T, H, W, 3).
    """
    batch = {key: x[:6].to(agent.device) for key, x in batch.items()}
    obs, is_first = {key: batch[key][:, 1:] for key in agent.decoder.shapes}, batch["is_first"][:, 1:]
    seen = max(1, is_first.shape[1] // 4)
    with agent.autocast():
        embed = agent.encoder({key: x[:, :seen] for key, x in obs.items()})
        action = agent.action_vector(batch["action"][:, :-1])  # (B, T, A)
        post = agent.rssm.observe(embed, action[:, :seen], is_first[:, :seen], agent.rssm.initial(len(embed)))
        last, plan = {key: x[:, -1] for key, x in post.items()}, iter(action[:, seen:].unbind(1))
        feat, _ = agent.rssm.imagine(last, lambda _: next(plan), is_first.shape[1] - seen)
        model = picture(agent.decoder(torch.cat([agent.rssm.feat(post), feat[:, 1:]], 1)))
    truth = picture({key: x if x.dtype == torch.uint8 else symlog(x) for key, x in obs.items()})
    return film(torch.cat([truth, model, (model - truth + 255) / 2], 2), seen)


# === Part 3: plumbing, the same in planet, dreamerv2 and dreamerv3 ====================================================

RESUMED = ("resume", "total_timesteps", "checkpoint_every", "log_every", "device", "track", "vector")  # beside --resume
SHOWN = ("eval", "eval_episodes", "eval_steps", "seed", "device")  # beside --eval
OF_A_CALL = dict(resume=None, eval=None, device="auto", track=False, vector="sync")  # flags that no run hands on


class Captured:
    """A function from {key: tensor} to {key: tensor}, on a GPU as a CUDA graph: one launch, not thousands. For new
    shapes the first three calls run eagerly, while cuDNN and the allocator settle; then the function is captured and
    only replayed. The next call overwrites the results. What else the function reads, such as flags, is frozen.
    """

    def __init__(self, fn, on):
        self.fn, self.on, self.calls, self.graphs = fn, on, {}, {}
        self.side = torch.cuda.Stream() if on else None

    def __call__(self, inputs):
        if not self.on:
            return self.fn(inputs)
        key = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:  # on the stream of the capture, where cuBLAS takes its workspace only once
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                result = self.fn(inputs)
            main.wait_stream(self.side)
            return result
        if key not in self.graphs:
            static, graph = {name: x.clone() for name, x in inputs.items()}, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.side, capture_error_mode="thread_local"):  # no other thread's
                result = self.fn(static)
            self.graphs[key] = static, graph, result
        static, graph, result = self.graphs[key]
        for name, x in inputs.items():
            static[name].copy_(x)
        graph.replay()
        return result


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


def replay_device(capacity, row_bytes, device):
    """Where a replay lies: on a GPU if half of its free memory will do, else in main memory, if that is enough."""
    size, memory = capacity * row_bytes, Path("/proc/meminfo")
    if device.type == "cuda" and size > 0.5 * torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")  # the other half of a GPU's memory is for the networks
    found = re.search(r"MemAvailable: +(\d+)", memory.read_text()) if memory.exists() else None
    free = 1024 * int(found[1]) if found else float("inf")  # where the system does not tell
    for name in "memory.max", "memory/memory.limit_in_bytes":  # of a container: cgroup v2, v1
        with suppress(OSError, ValueError):  # no such file; "max" in place of a number
            free = min(free, int(Path("/sys/fs/cgroup", name).read_text()))
    if device.type == "cpu" and size > free:
        fail(f"--buffer-size {capacity}: takes {size / 2**30:.1f} of {free / 2**30:.1f} free GiB; allowed: fewer rows")
    return device


def tune(args):
    """Settings of the process that make updates fast."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")  # it gives large blocks back, and to fetch them again is half of a CPU update
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map no block on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the heap
    torch.set_float32_matmul_precision("medium" if args.bf16 else "highest")  # medium: oneDNN on a CPU
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = args.bf16, True


# --- environments -----------------------------------------------------------------------------------------------------
def adapt(env):
    """One environment -> Dict of uint8 images (H, W, C), flat float32 vectors; actions from [-1, 1] to the bounds."""
    space, action = env.observation_space, env.action_space
    named, box = isinstance(space, spaces.Dict), isinstance(action, spaces.Box) and action.dtype.kind == "f"
    parts = dict(space.spaces) if named else {"image" if is_image(space) else "vector": space}
    if not (np.isfinite([action.low, action.high]).all() if box else isinstance(action, spaces.Discrete)):
        raise ValueError(f"action space {action}; allowed: Discrete, or Box of floats with finite bounds")
    taken = {"action", "reward", "is_first", "is_last", "is_terminal", "deter", "stoch", "index"}
    if any(key in taken or "." in key or hasattr(nn.ModuleDict, key) for key in parts):
        raise ValueError(f"observations {list(parts)}; allowed: no dots, no attributes of nn.ModuleDict, not {taken}")
    rescale = lambda a: np.clip(action.low + (a + 1) / 2 * (action.high - action.low), action.low, action.high)
    fit = (lambda a: rescale(a).astype(action.dtype)) if box else lambda a: a + action.start
    env = gym.wrappers.TransformAction(env, fit, spaces.Box(-1, 1, action.shape) if box else spaces.Discrete(action.n))
    views = {}  # as the agent sees them
    for key, part in parts.items():
        with suppress(NotImplementedError, ValueError):  # a part that gymnasium cannot flatten
            views[key] = part if is_image(part) else spaces.Box(-np.inf, np.inf, (spaces.flatdim(part),))
    views = {key: view for key, view in views.items() if view.shape != (0,)}
    assert views, f"observation space {space}; allowed: what gymnasium can flatten"
    if parts.keys() - views.keys():
        warnings.warn(f"left out: {parts.keys() - views.keys()}: empty, or not for gymnasium to flatten", stacklevel=1)
    flatten = lambda part, x: x if is_image(part) else spaces.flatten(part, x).astype(np.float32)
    as_dict = lambda obs: {key: flatten(parts[key], obs[key] if named else obs) for key in views}
    return gym.wrappers.TransformObservation(env, as_dict, spaces.Dict(views))


def make_env(env_id, args, kwargs, evaluation):
    """One environment of gymnasium's registry, of dm_control's by shimmy with a camera of 64x64."""
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")  # read when it is first imported
    if env_id.startswith("dm_control/"):
        import shimmy

        gym.register_envs(shimmy)
        kwargs = {"render_kwargs": dict(width=64, height=64, camera_id=2 if "quadruped" in env_id else 0), **kwargs}
    env = gym.make(env_id, **kwargs)
    if evaluation or args.obs != "vector":
        env.unwrapped.render_mode = "rgb_array"  # afterwards: a constructor need not know this mode
    env = gym.wrappers.RepeatAction(env, args.action_repeat)
    env = gym.wrappers.TimeLimit(env, args.eval_steps) if evaluation else env  # a task need not end by itself
    if args.obs != "vector":  # outside of the repetition: only the last frame is rendered
        env = gym.wrappers.AddRenderObservation(env, args.obs == "image", "image")
    return adapt(env)


def atari_envs(env_id, num_envs, args, **kwargs):
    """ale_py's native vector environment: frame skip, max-pool, no-ops and resize in C++. Rewards are not clipped."""
    import ale_py  # noqa: F401, it registers its games

    assert args.obs != "both" and args.vector == "sync", "allowed with ALE: --obs image, --vector sync"
    settings = dict(maxpool=True, noop_max=30, episodic_life=False, reward_clipping=False, use_fire_reset=False)
    settings |= ATARI[args.atari_protocol] | kwargs  # without what is fixed below: given twice is an error
    envs = gym.make_vec(env_id, num_envs, frameskip=args.action_repeat, stack_num=1, continuous=False, **settings)
    size = settings["img_height"], settings["img_width"], 1 if settings["grayscale"] else 3
    single = spaces.Dict({"image": spaces.Box(0, 255, size, np.uint8)})
    as_dict = lambda obs: {"image": obs.reshape(num_envs, *size)}
    return gym.wrappers.vector.TransformObservation(envs, as_dict, single_observation_space=single)


def make_envs(env_id, num_envs, seed, args, evaluation=False):
    """-> gymnasium vector environment: Dict observations, NEXT_STEP autoreset, Discrete or Box(-1, 1) actions."""
    try:
        kwargs = dict(json.loads(args.env_kwargs))
        if env_id.startswith("ALE/"):
            envs = atari_envs(env_id, num_envs, args, **kwargs)
        else:
            make, mode = partial(make_env, env_id, args, kwargs, evaluation), gym.vector.AutoresetMode.NEXT_STEP
            spawn = partial(gym.vector.AsyncVectorEnv, context="spawn")  # a forked process may hang in CUDA or OpenGL
            several = gym.vector.SyncVectorEnv if evaluation or args.vector == "sync" else spawn
            envs = several([make] * num_envs, autoreset_mode=mode)
            envs._add_info = lambda infos, *_: infos  # nobody reads them, and they need not fit together
        sizes = {space.shape[:2] for space in envs.single_observation_space.values() if is_image(space)}
        if len(sizes) > 1 or any(side not in SIDES for size in sizes for side in size):
            raise ValueError(f"images of {sizes}; allowed: one size, sides among {list(SIDES)}")
    except Exception as error:  # of any kind: users' constructors run here
        place = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{type(error).__name__} at {place.filename}:{place.lineno}"
        flags = f"--env-id {env_id} --obs {args.obs} --env-kwargs {args.env_kwargs}"
        fail(f"{flags}: {error} ({at}); allowed: a known id, a JSON object, a renderer by MUJOCO_GL")
    return envs


def start_row(envs, seed):
    """Reset all environments -> their first rows. envs.seconds: spent in environments, since it was last set to 0."""
    envs.seconds, (obs, _) = 0.0, envs.reset(seed=seed)
    finite({f"{key} of an environment": np.abs(x).max() for key, x in obs.items()})
    no, yes = np.zeros(envs.num_envs, bool), np.ones(envs.num_envs, bool)
    return {**obs, "reward": np.float32(no), "is_first": yes, "is_last": no, "is_terminal": no}


def next_row(envs, action, row):
    """Step all environments -> their next rows. After an is_last row the action is ignored: a new episode begins."""
    began = time.perf_counter()
    obs, reward, terminated, truncated, _ = envs.step(action)
    envs.seconds += time.perf_counter() - began
    finite({f"{key} of an environment": np.abs(x).max() for key, x in {**obs, "reward": np.float32(reward)}.items()})
    ends = {"is_first": row["is_last"], "is_last": terminated | truncated, "is_terminal": terminated}
    return {**obs, **ends, "reward": reward.astype(np.float32)}


# --- pictures, evaluation, checkpoints --------------------------------------------------------------------------------
def save_gif(path, frames):
    """Frames, uint8 (H, W, 3), -> animated GIF in the size of the first."""
    from PIL import Image

    size, method = frames[0].shape[1::-1], Image.Quantize.FASTOCTREE  # 15 x as fast as the default
    images = [Image.fromarray(x).resize(size).quantize(256, method=method) for x in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=66, loop=0)


def picture(obs):
    """{key: (B, T, ...)} -> (B, T, H, W, 3), 0 to 255: the first image, or else the first 64 numbers as cells."""
    images = [obs[key] for key in sorted(obs) if obs[key].dim() == 5]
    if images:
        image = images[0].float() if images[0].dtype == torch.uint8 else 255 * images[0].clamp(0, 1)
        return image[..., :1].expand(*image.shape[:-1], 3) if image.shape[-1] < 3 else image[..., :3]
    cells = torch.cat([obs[key].float() for key in sorted(obs)], -1)[..., :64].sigmoid() * 255
    return cells.repeat_interleave(16, -1)[..., None, :, None].expand(-1, -1, 32, -1, 3)


def film(video, seen):
    """(B, T, H, W, 3) -> uint8 (T, 6 + H, B * W, 3): side by side; a bar above is green for seen frames, then red."""
    B, T, _, W, _ = video.shape
    bar = torch.zeros(B, T, 6, W, 3, device=video.device)
    bar[:, :seen, :4, :, 1], bar[:, seen:, :4, :, 0] = 255, 255
    return torch.cat([bar, video], 2).permute(1, 2, 0, 3, 4).flatten(2, 3).to(torch.uint8).cpu().numpy()


def write_open_loop(agent, batch, run_dir, writer, step):
    """open_loop as a GIF and in TensorBoard. Only for the eye: a failure is one line, never the end of a run."""
    try:
        video = open_loop(agent, batch)
        save_gif(run_dir / "open_loop.gif", video)
        writer.add_image("open_loop", video[-1], step, dataformats="HWC")  # the farthest prediction
    except Exception as error:
        warnings.warn(f"open_loop.gif is not of policy step {step:,}: {error}", stacklevel=1)


def evaluate(agent, args, episodes, video=None):
    """Play episodes without exploration noise. -> returns. The caller's random state is left as it was.
    video: path for a GIF of the first, as the environment renders itself, where it can, else as the agent sees it.
    """
    envs, scores, frames = make_envs(args.env_id, 1, args.seed, args, evaluation=True), [], []
    act = Captured(partial(agent.act, eval=True), args.cuda_graph and agent.device.type == "cuda")
    with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
        torch.manual_seed(args.seed + 1_000)
        row, state, total, length = start_row(envs, args.seed + 1_000), agent.initial(1), 0.0, 0
        while len(scores) < episodes:
            if video and not scores and len(frames) < 3000:
                image = picture({key: torch.as_tensor(row[key][:, None]) for key in agent.decoder.shapes})[0, 0]
                frames.append(np.asarray(image, np.uint8))
                with suppress(Exception):  # there is no end to what renderers give
                    image = np.atleast_3d(np.squeeze(np.asarray(envs.render()[0], np.uint8)))[..., :3]
                    frames[-1] = np.broadcast_to(image, (*image.shape[:2], 3))
            state = act(agent.inputs(row, state))
            row = next_row(envs, agent.env_action(state), row)
            total = float(row["reward"][0]) + (0.0 if row["is_first"][0] else total)
            length = 0 if row["is_first"][0] else length + 1
            if row["is_last"][0]:
                scores.append(total)
                if video:
                    print(f"episode {len(scores)}/{episodes}  return {total:g}  length {length}", flush=True)
    envs.close()
    if video:
        save_gif(video, frames)
    return scores


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
    flags = {**asdict(Args()), **{key: x for key, x in saved.items() if x is not None}, **OF_A_CALL}  # None: not given
    given = {key: value for key, value in asdict(args).items() if value != getattr(Args, key)}
    if flags.keys() != asdict(args).keys():
        fail(f"{path}: its flags are those of another version of this file; allowed: the version stored in it (source)")
    for key, value in given.items():
        if key not in free and value != flags[key]:
            flag, allowed = f"--{key.replace('_', '-')} {value}", ", ".join(free).replace("_", "-")
            fail(f"{flag}: the run at {path} has {flags[key]}; allowed to change: {allowed}")
    if resolve(Args(**{**flags, "buffer_size": None})).buffer_size == flags["buffer_size"]:
        flags["buffer_size"] = None  # it was derived, and is again
    return Args(**{**flags, **given})


def load_agent(path, args=None):
    """path: checkpoint or run folder -> the agent, its Args. args: what --eval may change, such as device."""
    saved = load(path, need=("args", "agent"))
    args = resolve(inherit(args or Args(), path, saved["args"], SHOWN))
    envs = make_envs(args.env_id, 1, args.seed, args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    envs.close()
    agent.load_state_dict(saved["agent"])
    return agent, args


def show(args):
    """--eval: print the returns, leave a GIF beside the checkpoint."""
    path = Path(args.eval)
    folder, (agent, args) = path if path.is_dir() else path.parent, load_agent(path, args)
    scores = evaluate(agent, args, args.eval_episodes, folder / "eval.gif")
    print(f"{args.env_id}: mean {np.mean(scores):.4g}, standard deviation {np.std(scores):.4g}; {folder}/eval.gif")
    return {"run_dir": str(folder), "returns": scores}


def open_run(args, agent, replay, saved):
    """Make the run folder, say what is about to run. -> folder, TensorBoard, with --track mirrored to W&B too."""
    from torch.utils.tensorboard import SummaryWriter

    wandb = __import__("wandb") if args.track else None  # missing: known before anything is written
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume) if saved else Path(args.run_root) / name
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(saved))
    except OSError as error:
        fail(f"--run-root {args.run_root}: {error}; allowed: a folder that can be written, and a run of its own")
    slow = "CPU  <-- WARNING: no GPU; images will take days" if agent.decoder.images else "CPU (vectors: fine)"
    device = torch.cuda.get_device_name(agent.device) if agent.device.type == "cuda" else slow
    size, place = args.buffer_size * replay.row_bytes / 2**30, "main" if replay.device.type == "cpu" else "GPU"
    print(f"run       {run_dir}\ndevice    {device}; PyTorch {torch.__version__}")
    for key, shape in agent.decoder.shapes.items():
        hint = "  <-- WARNING: a picture? It has to be uint8 (H, W, C): gymnasium.wrappers" if shape[0] > 1000 else ""
        print(f"observes  {key} {shape} -> {'convolutions' if key in agent.decoder.images else 'MLP'}{hint}")
    print(f"agent     {sum(p.numel() for p in agent.params):,} parameters ({args.size})")
    print(f"replay    {args.buffer_size:,} rows x {replay.row_bytes / 1024:.1f} KiB = {size:.1f} GiB of {place} memory")
    if wandb:
        wandb.init(name=run_dir.name, id=run_dir.name, config=asdict(args), resume="allow", sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=saved["now"]["step"] + 1 if saved else None)
    writer.add_text("hyperparameters", f"```\n{json.dumps(asdict(args), indent=1)}\n```")
    return run_dir, writer


def finite(stats):
    """{name: 0-d tensor} -> {name: float}; waits for the device. Stops on nan and inf, before anything is saved."""
    values = {name: float(x) for name, x in stats.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(", ".join(bad))
    return values


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
