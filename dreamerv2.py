# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "numpy", "gymnasium>=1.3", "ale-py", "shimmy[dm-control]", "mujoco>=3.17,<4", "tensorboard", "tyro"
# ]
# ///
"""DreamerV2: learn a world model with discrete latents, and an actor and a critic purely from its imagination.

Paper: Hafner et al., "Mastering Atari with Discrete World Models", arXiv 2010.02193 (ICLR 2021). "Eq. n" is an equation
of it, "Table" its hyperparameter table D.1, "code" the authors' release in its last state (May 2022).

    python dreamerv2.py --env-id ALE/Pong-v5              train with the code's last settings: 5M policy steps
    python dreamerv2.py --env-id dm_control/walker-walk-v0                     from pixels; --obs vector: from states
    python dreamerv2.py --resume runs/...                 go on where the last checkpoint stands, replay included
    python dreamerv2.py --eval runs/.../checkpoint.pt     play 10 episodes, print the returns, save eval.gif

Symbols in shapes: B sequences of a batch, T steps trained on, H imagination horizon, N = B*T start states (in acting:
the environments), A action size, E embedding, D deterministic state, S latent variables, K classes of each, Z = S*K,
F = Z + D features, U hidden units.

A row of experience holds obs_t, the reward that arrived with it, is_first, is_last, is_terminal, and the action chosen
after seeing obs_t. The model at row t thus sees obs[t] and action[t-1]; at is_first it forgets both state and action.

Where sources disagree:
- rho weighs REINFORCE in Eq. 6: 1 for Atari, 0 for continuous control. A lecture has it reversed. The code's variable
  weighs the other side; "annealed from 0.1 to 0" in the paper speaks of that one.
- The discount of Atari is 0.999, in the text and in every released configuration; 0.995 in the table only.
- A reward comes with the state it leads to, and a return begins with the reward of its own state. The code then pairs
  an action with V_{t+1} - v_t, the paper with V_t - v_t: --advantage. Code: V_H = v_H; Eq. 4: V_H = r_H + disc_H v_H.
- All 18 Atari actions (paper, --atari-protocol 200m) or those that the game knows (code, fast).
- One update per 4 policy steps (paper, --size atari); the code counts so that it is one per 16 (--size atari-fast).

Differs from paper and code, on purpose:
- Size atari-fast by default, and 5M policy steps of it. bfloat16 in place of float16 with loss scaling.
- Episodes shorter than a window, which the code drops, are used from their start, and the window runs on into the next
  one; near the newest row, the last window there is. Windows begin without a state, as in the code; the paper's keep
  their first action.
- Until an episode has finished, those under way are sampled; then never one that has not ended, as in the code.
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

SOURCE = Path(__file__).read_text(encoding="utf-8")  # goes into every checkpoint: the code that really ran

Size = Literal["auto", "debug", "small", "atari", "atari-fast", "dmc-vision", "dmc-proprio", "crafter"]


@dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # ALE/*, dm_control/<domain>-<task>-v0, or any gymnasium id (module:Id too)
    env_kwargs: str = "{}"  # arguments for the environment, as JSON
    num_envs: int = 1  # environments stepped together; code: 1
    vector: Literal["sync", "async"] = "sync"  # environments in this process, or each in a process of its own
    action_repeat: int | None = None  # frames per policy step; Atari 4, dm_control 2, else 1
    atari_protocol: Literal["100k", "200m", "fast"] | None = None  # RGB | gray, sticky, 18 actions | the same, few
    obs: Literal["vector", "image", "both"] | None = None  # own observations, camera, both; dm_control: image, else own
    seed: int = 1  # of weights, sampling and environments
    size: Size = "auto"  # networks, losses, schedule; auto: atari-fast for ALE, dmc-* for dm_control, else small
    total_timesteps: int | None = None  # policy steps of all environments together; by --size, as all that says None
    batch_size: int | None = None  # B, sequences per update; Table: 50, code: 16
    batch_length: int | None = None  # T, steps per sequence; Table: 50
    train_every: float | None = None  # policy steps per update; Table: 4, code: 16 (Atari), 5
    prefill: int | None = None  # random policy steps before the first update; code: 50_000 (Atari), 1000 (dm_control)
    pretrain: int | None = None  # updates after the first, before the next step; code: 1, dm_control 100
    buffer_size: int | None = None  # replay rows; 9/8 of total_timesteps (resets are rows), at most 2_000_000, Table
    checkpoint_every: int | None = None  # policy steps between checkpoints
    log_every: float = 10.0  # seconds between progress lines and between records of scalars
    imag_horizon: int = 15  # H, Table
    gamma: float | None = None  # discount; Atari 0.999, dm_control 0.99
    lam: float = 0.95  # lambda of the returns, Table
    rho: float | None = None  # Eq. 6: 1 REINFORCE, 0 dynamics backpropagation; by default 1 for Discrete, 0 for Box
    advantage: Literal["paper", "code"] | None = None  # V_t - v_t | V_{t+1} - slow v_t; code, but for size atari
    entropy_scale: float | None = None  # Eq. 6; Atari 1e-3, dm_control 1e-4
    slow_every: int = 100  # updates between copies of the critic to the slow critic, Table
    learning_rate: float | None = None  # of the world model; Atari 2e-4
    actor_learning_rate: float | None = None  # Atari 4e-5
    critic_learning_rate: float | None = None  # Atari 1e-4
    eps: float = 1e-5  # of Adam, added as TensorFlow does; Table
    clip: float = 100.0  # largest global gradient norm, Table
    weight_decay: float = 1e-6  # share of every parameter lost per update, whatever the learning rate; Table
    kl_scale: float | None = None  # Eq. 2; Atari 0.1, dm_control 1
    kl_balance: float = 0.8  # share of the KL that trains the prior, Algorithm 2; 0.5: the plain KL
    free_nats: float | None = None  # a KL below this, on average, is not optimised; 0, dm_control 1
    cont_scale: float | None = None  # of the loss of the discount predictor; 0: there is none. Atari 5; code
    tanh_reward: bool | None = None  # squash rewards before they are predicted; True for Atari, crafter
    ends: bool | None = None  # favour the last window of an episode, T + 1 fold; code: not for dm_control
    norm: bool | None = None  # layer norm beyond the GRU cell; crafter True; code
    stoch: int | None = None  # S; Table: 32
    classes: int | None = None  # K; Table: 32
    deter: int | None = None  # D; Table: 600
    hidden: int | None = None  # U inside the RSSM; Table: 600
    units: int | None = None  # U of the heads and of vectors; Table: 400
    depth: int | None = None  # channels of the first convolution; Table: 48
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


# fmt: off
PRESETS = {  # debug and small are ours: for a CPU
    #                         debug    small    atari        atari-fast  dmc-*     crafter
    "total_timesteps":       (400,     50_000,  50_000_000,  5_000_000,  500_000,  1_000_000),
    "batch_size":            (4,       16,      50,          16,         16,       16),
    "batch_length":          (8,       50,      50,          50,         50,       50),
    "train_every":           (8.0,     5.0,     4.0,         16.0,       5.0,      5.0),
    "prefill":               (64,      1_000,   50_000,      50_000,     1_000,    10_000),
    "pretrain":              (1,       1,       1,           1,          100,      1),
    "atari_protocol":        ("200m",  "200m",  "200m",      "fast",     "200m",   "200m"),
    "checkpoint_every":      (200,     10_000,  50_000,      50_000,     10_000,   50_000),
    "gamma":                 (0.99,    0.99,    0.999,       0.999,      0.99,     0.999),
    "entropy_scale":         (2e-3,    2e-3,    1e-3,        1e-3,       1e-4,     3e-3),
    "advantage":             ("code",  "code",  "paper",     "code",     "code",   "code"),
    "learning_rate":         (1e-4,    1e-3,    2e-4,        2e-4,       3e-4,     1e-4),
    "actor_learning_rate":   (8e-5,    3e-4,    4e-5,        4e-5,       8e-5,     1e-4),
    "critic_learning_rate":  (2e-4,    3e-4,    1e-4,        1e-4,       8e-5,     1e-4),
    "kl_scale":              (1.0,     1.0,     0.1,         0.1,        1.0,      1.0),
    "free_nats":             (0.0,     0.0,     0.0,         0.0,        1.0,      0.0),
    "cont_scale":            (1.0,     1.0,     5.0,         5.0,        0.0,      1.0),
    "tanh_reward":           (False,   False,   True,        True,       False,    True),
    "ends":                  (True,    True,    True,        True,       False,    True),
    "norm":                  (False,   False,   False,       False,      False,    True),
    "stoch":                 (8,       16,      32,          32,         32,       32),
    "classes":               (8,       16,      32,          32,         32,       32),
    "deter":                 (32,      128,     600,         600,        200,      1_024),
    "hidden":                (32,      128,     600,         600,        200,      1_024),
    "units":                 (32,      128,     400,         400,        400,      400),
    "depth":                 (4,       16,      48,          48,         48,       48),
}
COLUMNS = "debug", "small", "atari", "atari-fast", "dmc-vision", "crafter"
SIZES = {size: {flag: row[i] for flag, row in PRESETS.items()} for i, size in enumerate(COLUMNS)}
SIZES["dmc-proprio"] = SIZES["dmc-vision"]
# fmt: on
ATARI = {  # settings of ALE by --atari-protocol; fast: as in the code's last state
    "100k": dict(img_height=64, img_width=64, grayscale=False, full_action_space=False, repeat_action_probability=0.0),
    "200m": dict(img_height=64, img_width=64, grayscale=True, full_action_space=True, repeat_action_probability=0.25),
    "fast": dict(img_height=64, img_width=64, grayscale=True, full_action_space=False, repeat_action_probability=0.25),
}
SIDES = (64,)  # of images: the transposed convolutions end at 64


def resolve(args: Args) -> Args:
    """Fill what was left open (None) from the preset of --size and the kind of environment. An explicit flag wins."""
    family = args.env_id.split("/")[0]
    auto = {"ALE": "atari-fast", "dm_control": "dmc-proprio" if args.obs == "vector" else "dmc-vision"}
    args = replace(args, size=auto.get(family, "small") if args.size == "auto" else args.size)
    preset = {**SIZES[args.size], "action_repeat": {"ALE": 4, "dm_control": 2}.get(family, 1)}
    preset["obs"] = "image" if family == "dm_control" else "vector"
    preset["buffer_size"] = min((args.total_timesteps or preset["total_timesteps"]) * 9 // 8, 2_000_000)
    args = replace(args, **{key: value for key, value in preset.items() if getattr(args, key) is None})
    positive = "train_every", "learning_rate", "actor_learning_rate", "critic_learning_rate", "clip", "eps"
    least = dict(batch_length=2, imag_horizon=2, seed=0, prefill=0, pretrain=0) | dict.fromkeys(positive, 1e-12)
    for name, value in asdict(args).items():
        low = least.get(name, 1 if type(value) is int else 0)
        high = 1 if name in ("rho", "kl_balance", "gamma", "lam") else 2**31
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: allowed: {low:g} to {high:g}")
    if args.buffer_size // args.num_envs < args.batch_length:
        fail(f"--buffer-size {args.buffer_size}: allowed: --num-envs windows of --batch-length rows, or more")
    if args.atari_protocol != preset["atari_protocol"] and family != "ALE":
        fail(f"--atari-protocol {args.atari_protocol}: allowed: with --env-id ALE/... only")
    return args


# === Part 1: the algorithm ============================================================================================


def layer_norm(size, on=True):
    """Keras' layer norm, or nothing."""
    return nn.LayerNorm(size, eps=1e-3) if on else nn.Identity()


def mlp(inputs, units, layers, norm):
    """layers x (Linear, layer norm where asked for, ELU)."""
    sizes = [inputs] + layers * [units]
    parts = [(nn.Linear(a, b), layer_norm(b, norm), nn.ELU()) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[module for part in parts for module in part])


def init_weights(module):
    """Glorot-uniform weights, biases 0, as TensorFlow's layers."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def is_image(space):
    """uint8 of rank 3 goes to the convolutions, everything else to the MLP."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


class Encoder(nn.Module):
    """Observations -> embedding. Images: 4 x (4x4 convolution of stride 2, ELU): 64, 31, 14, 6, 2. Vectors: an MLP."""

    def __init__(self, obs_space, args):
        super().__init__()
        self.images = sorted(key for key, space in obs_space.items() if is_image(space))
        self.vectors = sorted(key for key in obs_space if key not in self.images)
        self.size = args.units if self.vectors else 0  # E
        if self.vectors:
            self.mlp = mlp(sum(obs_space[key].shape[0] for key in self.vectors), args.units, 4, args.norm)
        if self.images:
            depths = [sum(obs_space[key].shape[-1] for key in self.images)] + [m * args.depth for m in (1, 2, 4, 8)]
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2) for a, b in zip(depths, depths[1:], strict=False))
            self.norms = nn.ModuleList(layer_norm(depth, args.norm) for depth in depths[1:])
            self.size += 2 * 2 * depths[-1]
        self.apply(init_weights)

    def forward(self, obs):
        """{key: (B, T, ...)} -> (B, T, E)."""
        tokens = []
        if self.vectors:
            tokens.append(self.mlp(torch.cat([obs[key].float() for key in self.vectors], -1)))
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            x = image.flatten(0, 1).permute(0, 3, 1, 2) / 255 - 0.5  # channels-last memory: the permutes move no data
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.elu(norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            tokens.append(x.permute(0, 2, 3, 1).reshape(*image.shape[:2], -1))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """Features -> means of unit-variance normals; images from 0 to 1, by 4 transposed convolutions: 5, 13, 30, 64."""

    def __init__(self, obs_space, size, args):
        super().__init__()
        self.shapes = {key: space.shape for key, space in obs_space.items()}
        self.images = sorted(key for key, space in obs_space.items() if is_image(space))
        self.vectors = sorted(key for key in obs_space if key not in self.images)
        if self.vectors:
            self.mlp = mlp(size, args.units, 4, args.norm)
            self.heads = nn.ModuleDict({key: nn.Linear(args.units, self.shapes[key][0]) for key in self.vectors})
        if self.images:
            depths = [m * args.depth for m in (32, 4, 2, 1)] + [sum(self.shapes[key][-1] for key in self.images)]
            self.linear, kernels = nn.Linear(size, depths[0]), (5, 5, 6, 6)
            self.convs = nn.ModuleList(nn.ConvTranspose2d(*depths[i : i + 2], k, 2) for i, k in enumerate(kernels))
            self.norms = nn.ModuleList(layer_norm(depth, args.norm) for depth in depths[1:-1])
        self.apply(init_weights)

    def forward(self, feat):
        """(B, T, F) -> {key: (B, T, ...) float32}."""
        out = {}
        if self.vectors:
            x = self.mlp(feat)
            out = {key: head(x).float() for key, head in self.heads.items()}
        if self.images:
            first, x = self.convs[0], self.linear(feat).flatten(0, 1)  # on an image of 1 x 1 a plain product: faster
            x = F.linear(x, first.weight.permute(2, 3, 1, 0).flatten(0, 2)).unflatten(1, (5, 5, -1)) + first.bias
            for norm, conv in zip(self.norms, self.convs[1:], strict=True):
                x = conv(F.elu(norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # between layers: (N, H, W, C)
            parts = x.float().unflatten(0, feat.shape[:2]) + 0.5
            out.update(zip(self.images, parts.split([self.shapes[key][-1] for key in self.images], -1), strict=True))
        return out


class Head(nn.Module):
    """MLP of 4 layers with a linear output: (..., F) -> (..., outputs), float32."""

    def __init__(self, inputs, outputs, args):
        super().__init__()
        self.mlp, self.out = mlp(inputs, args.units, 4, args.norm), nn.Linear(args.units, outputs)
        self.apply(init_weights)

    def forward(self, feat):
        x = self.mlp(feat)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round a value of 150 to whole numbers
            return self.out(x.float())


def sample_onehot(probs, noise=None):
    """Exact categorical sample, no host sync: arg-max of p / noise, noise ~ Exp(1). (..., K) -> one-hot (..., K)."""
    noise = torch.rand_like(probs, dtype=torch.float32).log_().neg_() if noise is None else noise
    index = (probs.detach() / noise).argmax(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, index, 1.0)


def straight_through(onehot, probs):
    """The value of the sample with the gradient of the probabilities (Bengio et al. 2013). Both (..., K)."""
    return onehot + (probs - probs.detach())  # with other parentheses the sum is off one-hot by rounding


def truncated_mass(mean, std):
    """The normal distribution's probability below -1 and below 1. (...) -> (...), (...)."""
    return torch.special.ndtr((-1 - mean) / std), torch.special.ndtr((1 - mean) / std)


def truncated_icdf(u, mean, std):
    """Where N(mean, std), cut off at -1 and 1, has the probability u below it. (...) -> (...)."""
    low, high = truncated_mass(mean, std)
    return mean + std * torch.special.ndtri(low + u * (high - low))


def truncated_sample(u, mean, std):
    """The same within the bounds, with the code's gradient: that of mean + std e at fixed e, as if unbounded. (...)."""
    value = truncated_icdf(u, mean, std).clamp(-1 + 1e-6, 1 - 1e-6)  # which rounding makes infinite, once in millions
    sample = mean + std * ((value - mean) / std).detach()
    return sample + (value - sample).detach()


def truncated_logp(x, mean, std):
    """ln of the density at x. (...) -> (...)."""
    low, high = truncated_mass(mean, std)
    return -((x - mean) / std).square() / 2 - (std * np.sqrt(2 * np.pi) * (high - low)).log()


def truncated_entropy(mean, std):
    """In nats. (...) -> (...)."""
    (low, high), a, b = truncated_mass(mean, std), (-1 - mean) / std, (1 - mean) / std
    edges = a * (-a.square() / 2).exp() - b * (-b.square() / 2).exp()
    return (np.sqrt(2 * np.pi * np.e) * std * (high - low)).log() + edges / (2 * np.sqrt(2 * np.pi) * (high - low))


class Actor(Head):
    """The policy. An action is a vector of size A: one-hot for Discrete, numbers in -1 to 1 for Box."""

    def __init__(self, inputs, action_space, args):
        discrete = isinstance(action_space, spaces.Discrete)
        size = int(action_space.n if discrete else np.prod(action_space.shape))
        super().__init__(inputs, size, args)
        self.discrete, self.size = discrete, size  # size: A
        if not discrete:
            self.std_out = nn.Linear(args.units, size).apply(init_weights)

    def dist(self, feat):
        """(..., F) -> discrete: (log-probabilities,); Box: (mean, std between 0.1 and 2.1). Each (..., A)."""
        x = self.mlp(feat)
        if self.discrete:
            return (self.out(x).float().log_softmax(-1),)
        return self.out(x).float().tanh(), 2 * (self.std_out(x).float() / 2).sigmoid() + 0.1

    def sample(self, feat, mode=False):
        """-> action (..., A), with a gradient: straight-through, or that of truncated_sample. mode: the most likely."""
        dist = self.dist(feat)
        if not self.discrete:
            return dist[0] if mode else truncated_sample(torch.rand_like(dist[0]), *dist)
        probs = dist[0].exp()
        return straight_through(sample_onehot(probs, torch.ones_like(probs) if mode else None), probs)

    def log_prob(self, dist, action):
        """dist: of the method above; action: (..., A) -> (...), in nats."""
        return ((dist[0] * action) if self.discrete else truncated_logp(action, *dist)).sum(-1)

    def entropy(self, dist):
        """-> (...), in nats."""
        return (-dist[0] * dist[0].exp() if self.discrete else truncated_entropy(*dist)).sum(-1)


class GRU(nn.Module):
    """r, c, u = layer norm(W [x, h]), one over all three; h' = h + sigmoid(u - 1) (tanh(sigmoid(r) c) - h)."""

    def __init__(self, inputs, size):
        super().__init__()
        self.gates, self.norm = nn.Linear(inputs + size, 3 * size), layer_norm(3 * size)

    def forward(self, x, h):
        """(N, inputs), (N, D) -> (N, D). Here r comes after the product with h; -1 makes a new network remember."""
        reset, cand, update = self.norm(self.gates(torch.cat([x, h.to(x.dtype)], -1))).to(h.dtype).chunk(3, -1)
        return torch.lerp(h, torch.tanh(reset.sigmoid() * cand), (update - 1).sigmoid())


class RSSM(nn.Module):
    """Recurrent state-space model, Eq. 1: h_t = f(h, z, a of t-1), posterior z_t ~ q(h_t, x_t), prior z_t ~ p(h_t)."""

    def __init__(self, embed_size, action_size, args):
        super().__init__()
        D, U, S, K = args.deter, args.hidden, args.stoch, args.classes
        self.args, self.split = args, [S * K, action_size]  # Z, A
        self.inputs, self.inputs_norm = nn.Linear(sum(self.split), U), layer_norm(U, args.norm)
        self.post_in, self.post_norm = nn.Linear(D + embed_size, U), layer_norm(U, args.norm)
        self.post_out = nn.Linear(U, S * K)
        self.prior = nn.Sequential(*mlp(D, U, 1, args.norm), nn.Linear(U, S * K), nn.Unflatten(-1, (S, K)))
        self.cell = GRU(U, D)
        self.apply(init_weights)

    def initial(self, B):
        """Zeros: {"deter": (B, D), "stoch": (B, S, K)}."""
        zeros, args = self.inputs.weight.new_zeros, self.args
        return {"deter": zeros(B, args.deter), "stoch": zeros(B, args.stoch, args.classes)}

    def draw(self, logits, noise=None):
        """z ~ softmax of the logits, with the gradient of its probabilities. Both (..., S, K); noise ~ Exp(1)."""
        probs = logits.float().softmax(-1)
        return straight_through(sample_onehot(probs, noise), probs)

    def feat(self, state):
        """[z, h]: (..., S, K), (..., D) -> (..., F)."""
        return torch.cat([state["stoch"].flatten(-2), state["deter"]], -1)

    def observe(self, embed, action, is_first, state, noise=None):
        """Filter T observations; what does not depend on h is computed for all T at once. embed: (B, T, E); action:
        (B, T, A), the one that led to each step; is_first: (B, T); state: of the step before; noise: (B, T, S, K)
        ~ Exp(1), drawn if None. -> posterior, {"deter": (B, T, D), "stoch": (B, T, S, K), "logits": (B, T, S, K)}.
        """
        (B, T), S, K = is_first.shape, self.args.stoch, self.args.classes
        keep = 1 - is_first.float()  # (B, T)
        weight_stoch, weight_action = self.inputs.weight.split(self.split, 1)
        weight_deter, weight_embed = self.post_in.weight.split([self.args.deter, embed.shape[-1]], 1)
        action_hidden = F.linear(action * keep[..., None], weight_action, self.inputs.bias)  # (B, T, U)
        embed_hidden = F.linear(embed, weight_embed, self.post_in.bias)  # (B, T, U)
        dtype = action_hidden.dtype
        weight_stoch, weight_deter = weight_stoch.to(dtype), weight_deter.to(dtype)  # autocast would, at each step
        noise = torch.rand(B, T, S, K, device=embed.device).log_().neg_() if noise is None else noise
        deter, stoch, states = state["deter"], state["stoch"], []
        for t in range(T):
            deter, stoch = deter * keep[:, t, None], stoch * keep[:, t, None, None]
            x = F.linear(stoch.flatten(1).to(dtype), weight_stoch) + action_hidden[:, t]
            deter = self.cell(F.elu(self.inputs_norm(x)), deter)
            x = F.linear(deter.to(dtype), weight_deter) + embed_hidden[:, t]
            logits = self.post_out(F.elu(self.post_norm(x))).unflatten(-1, (S, -1))
            stoch = self.draw(logits, noise[:, t])
            states.append((deter, stoch, logits))
        deter, stoch, logits = (torch.stack(x, 1) for x in zip(*states, strict=True))
        return {"deter": deter, "stoch": stoch, "logits": logits}

    def imagine(self, state, policy, horizon):
        """Roll the prior forward; policy: (N, F) -> (N, A). -> feat (N, H+1, F) with the start, actions (N, H, A)."""
        feats, actions = [self.feat(state)], []
        for _ in range(horizon):
            actions.append(policy(feats[-1]))
            x = self.inputs(torch.cat([state["stoch"].flatten(1), actions[-1]], -1))
            deter = self.cell(F.elu(self.inputs_norm(x)), state["deter"])
            state = {"deter": deter, "stoch": self.draw(self.prior(deter))}
            feats.append(self.feat(state))
        return torch.stack(feats, 1), torch.stack(actions, 1)


class Adam:
    """TensorFlow's Adam after clipping and decay, for groups of parameters that are stepped one by one: eps is added
    before the second moment is corrected, and decay is not multiplied by the learning rate. For each p with gradient g:
    g <- g min(1, clip / |all g|),  p <- (1 - decay) p,  m <- 0.9 m + 0.1 g,  v <- 0.999 v + 0.001 g^2
    p <- p - lr sqrt(1 - 0.999^t) / (1 - 0.9^t) m / (sqrt(v) + eps)
    Counters live on the device, where a CUDA graph can advance them. groups: {name: (parameters, learning rate)}.
    """

    def __init__(self, groups, args):
        self.groups, self.args, self.moments, self.state = groups, args, {}, []  # state: what a checkpoint holds
        for name, (params, _) in groups.items():
            momentum, mean_square = ([torch.zeros_like(p) for p in params] for _ in range(2))
            count = torch.zeros((), dtype=torch.float64, device=params[0].device)  # t
            self.moments[name] = momentum, mean_square, count
            self.state += [*momentum, *mean_square, count]

    @torch.no_grad()
    def step(self, name, grads):
        """grads: one tensor per parameter of the group. -> its gradient norm before clipping, ()."""
        (params, rate), (momentum, mean_square, count), args = self.groups[name], self.moments[name], self.args
        norm, t = torch.stack(torch._foreach_norm(grads)).square().sum().sqrt(), count.add_(1)
        grads = torch._foreach_mul(grads, (args.clip / norm).clamp(max=1))
        torch._foreach_mul_(params, 1 - args.weight_decay)
        torch._foreach_lerp_(momentum, grads, 0.1)
        torch._foreach_mul_(mean_square, 0.999)
        torch._foreach_addcmul_(mean_square, grads, grads, 0.001)
        scale = torch._foreach_sqrt(mean_square)
        torch._foreach_add_(scale, args.eps)
        change = torch._foreach_div(momentum, scale)
        rate = rate * (1 - 0.999**t).sqrt() / (1 - 0.9**t)
        torch._foreach_sub_(params, torch._foreach_mul(change, rate.float()))
        return norm


def kl_categorical(logp, logq):
    """KL(p || q) in nats of S independent categoricals. Log-probabilities (..., S, K) -> (...)."""
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def kl_loss(post, prior, free_nats, balance):
    """Algorithm 2: balance KL(sg(post) || prior) + (1 - balance) KL(post || sg(prior)), the mean over steps -> ().
    Both: ln p (..., S, K). free_nats bounds the mean from below; at balance 0.5, the plain KL in the code, each step.
    """
    if balance == 0.5:
        return kl_categorical(post, prior).clamp(min=free_nats).mean()
    dyn = kl_categorical(post.detach(), prior).mean().clamp(min=free_nats)
    rep = kl_categorical(post, prior.detach()).mean().clamp(min=free_nats)
    return balance * dyn + (1 - balance) * rep  # so the prior learns faster than the posterior is pulled towards it


def lambda_return(reward, value, disc, lam):
    """Eq. 4: V_t = r_t + disc_t ((1 - lam) v_{t+1} + lam V_{t+1}), V_H = v_H. Each (..., H+1) -> V_0 to V_{H-1}."""
    returns = [value[..., -1]]  # index t: what belongs to state t. DreamerV3's returns begin with r_{t+1}
    for t in range(value.shape[-1] - 2, -1, -1):
        returns.append(reward[..., t] + disc[..., t] * ((1 - lam) * value[..., t + 1] + lam * returns[-1]))
    return torch.stack(returns[:0:-1], -1)


def actor_loss(logp, entropy, returns, baseline, weight, rho, entropy_scale):
    """Eq. 6: -w_t (rho ln pi(a_t|z_t) sg(V_t - v_t) + (1 - rho) V_t + eta H_t). All (N, H-1) -> (N, H-1). REINFORCE has
    no bias; the gradient of V_t through the learned dynamics, straight through discrete samples, has little variance.
    """
    objective = rho * logp * (returns - baseline).detach() + (1 - rho) * returns
    return -weight.detach() * (objective + entropy_scale * entropy)


def critic_loss(value, returns, weight):
    """Eq. 5: w_t (v_t - sg(V_t))^2 / 2. All (N, H) -> (N, H)."""
    return weight.detach() * (value - returns.detach()).square() / 2


class Agent(nn.Module):
    """World model, actor and critic: own losses, own optimiser steps. Spaces: of one environment, by make_envs."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.args, self.action_space, self.device = args, action_space, pick_device(args)
        bf16 = args.bf16 and self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        # one region per use: a weight first cast under no_grad would stay cached there without its gradient
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, bf16)
        size = args.deter + args.stoch * args.classes  # F
        self.encoder, self.decoder = Encoder(obs_space, args), Decoder(obs_space, size, args)
        self.actor, self.critic = Actor(size, action_space, args), Head(size, 1, args)
        self.rssm = RSSM(self.encoder.size, self.actor.size, args)
        self.reward, self.cont = Head(size, 1, args), Head(size, 1, args) if args.cont_scale else None
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.rho = float(self.actor.discrete) if args.rho is None else args.rho
        self.to(self.device, memory_format=torch.channels_last)
        self.params = [p for p in self.parameters() if p.requires_grad]
        groups = {"actor": (list(self.actor.parameters()), args.actor_learning_rate)}
        groups["critic"] = list(self.critic.parameters()), args.critic_learning_rate
        parts = [self.encoder, self.decoder, self.rssm, self.reward] + ([self.cont] if self.cont else [])
        groups["model"] = list(nn.ModuleList(parts).parameters()), args.learning_rate
        self.optimizer = Adam(groups, args)

    def initial(self, B):
        """State of B environments before their first observation."""
        return {**self.rssm.initial(B), "action": torch.zeros(B, self.actor.size, device=self.device)}

    def previous(self, batch):
        """The action that led to each row (B, T, A), zero in the first, where the state begins; is_first (B, T)."""
        onehot = torch.eye(self.actor.size, device=self.device)  # F.one_hot would wait for the device
        action = onehot[batch["action"]] if self.actor.discrete else batch["action"][..., None].flatten(2).float()
        action = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)  # (B, T, A)
        is_first = torch.cat([torch.ones_like(batch["is_first"][:, :1]), batch["is_first"][:, 1:]], 1)  # (B, T)
        return action, is_first

    def inputs(self, row, state):
        """What act takes: observations and is_first of a row, and the state of initial or of the last act."""
        keys = (*self.decoder.shapes, "is_first")
        return {key: torch.as_tensor(row[key]).to(self.device, non_blocking=True) for key in keys} | state

    @torch.no_grad()
    def act(self, inputs, eval=False, random=False):
        """-> the next state, with "action" (N, A): a sample; eval: the most likely; random: uniform, without a look."""
        if random:
            like = inputs["action"]  # (N, A)
            action = sample_onehot(torch.ones_like(like)) if self.actor.discrete else 2 * torch.rand_like(like) - 1
            return {**self.rssm.initial(len(like)), "action": action}
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

    def model_losses(self, batch):
        """Eq. 2. -> losses (B, T), the KL (), as its bound is one of the mean; feat (B, T, F); posterior; stats."""
        args, (action, is_first) = self.args, self.previous(batch)
        with self.autocast():
            post = self.rssm.observe(self.encoder(batch), action, is_first, self.rssm.initial(len(action)))
            feat = self.rssm.feat(post)  # (B, T, F)
            prior_logits = self.rssm.prior(post["deter"])  # (B, T, S, K)
            recon = self.decoder(feat)
            reward = self.reward(feat)[..., 0]  # (B, T)
            cont_logit = self.cont(feat)[..., 0] if self.cont else None
        target = batch["reward"].tanh() if args.tanh_reward else batch["reward"]  # (B, T)
        losses = {"reward": (reward - target).square() / 2}
        if self.decoder.images:  # -ln N(x; mean, 1) without its constant: half the squared error, summed
            losses["image"] = sum((recon[x] - batch[x] / 255).square().sum((2, 3, 4)) / 2 for x in self.decoder.images)
        if self.decoder.vectors:
            losses["vector"] = sum((recon[x] - batch[x]).square().sum(2) / 2 for x in self.decoder.vectors)
        if self.cont:  # it learns the discounted probability, so imagination needs no gamma of its own
            cont = (1 - batch["is_terminal"].float()) * args.gamma  # (B, T)
            losses["cont"] = F.binary_cross_entropy_with_logits(cont_logit, cont, reduction="none")
        assert all(loss.shape == feat.shape[:2] for loss in losses.values())
        post_logp, prior_logp = (x.float().log_softmax(-1) for x in (post["logits"], prior_logits))  # (B, T, S, K)
        losses["kl"] = kl_loss(post_logp, prior_logp, args.free_nats, args.kl_balance)
        entropy = lambda logp: -(logp.exp() * logp).sum((-2, -1)).mean()
        stats = {"stats/post_entropy": entropy(post_logp), "stats/prior_entropy": entropy(prior_logp)}
        return losses, feat, post, stats

    def imagine(self, post, is_terminal):
        """H steps from every replayed state. -> features, actions (N, H, A), reward, discount, slow value (N, H+1)."""
        start = {key: post[key].detach().flatten(0, 1) for key in ("deter", "stoch")}
        with self.autocast():
            policy = lambda feat: self.actor.sample(feat.detach())  # what gradient there is, is of the dynamics
            feat, action = self.rssm.imagine(start, policy, self.args.imag_horizon)
            reward, slow_value = self.reward(feat)[..., 0], self.slow_critic(feat)[..., 0]  # (N, H+1)
            disc = self.cont(feat)[..., 0].sigmoid() if self.cont else torch.full_like(reward, self.args.gamma)
        if self.cont:  # whether a replayed state is an end is known
            known = (1 - is_terminal.float().view(-1, 1)) * self.args.gamma  # (N, 1)
            disc = torch.cat([known, disc[:, 1:]], 1)  # (N, H+1)
        return feat, action, reward, disc, slow_value

    def behaviour_losses(self, post, batch):
        """Eq. 4 to 6 in imagination. post: of model_losses. -> losses actor (N, H-1), critic (N, H); statistics."""
        args, H = self.args, self.args.imag_horizon
        with torch.set_grad_enabled(self.rho < 1):  # REINFORCE alone needs none
            feat, action, reward, disc, slow_value = self.imagine(post, batch["is_terminal"])
            returns = lambda_return(reward, slow_value, disc, args.lam)  # (N, H)
        weight = torch.cat([torch.ones_like(disc[:, :1]), disc[:, :-1]], 1).cumprod(1).detach()  # (N, H+1)
        feat = feat.detach()  # (N, H+1, F)
        with self.autocast():
            value = self.critic(feat[:, :-1])[..., 0]  # (N, H)
            dist = self.actor.dist(feat[:, : H - 1])
        logp = self.actor.log_prob(dist, action[:, : H - 1].detach())  # (N, H-1), with actions stopped, as elsewhere
        entropy = self.actor.entropy(dist)  # (N, H-1)
        paper, code = (returns[:, :-1], value[:, :-1]), (returns[:, 1:], slow_value[:, : H - 1])
        target, baseline = code if args.advantage == "code" else paper  # (N, H-1)
        actor = actor_loss(logp, entropy, target, baseline, weight[:, : H - 1], self.rho, args.entropy_scale)
        critic = critic_loss(value, returns, weight[:, :-1])
        assert actor.shape == target.shape and critic.shape == returns.shape
        stats = {"actor_entropy": entropy, "return_mean": returns, "value_mean": value, "imag_reward": reward}
        stats |= {"imag_disc": disc, "advantage": (target - baseline).abs()}
        return {"actor": actor, "critic": critic}, {f"stats/{key}": x.detach().mean() for key, x in stats.items()}

    def update(self, batch):
        """A gradient step of each of the three, without host sync. batch: Replay.sample -> 0-d statistics."""
        args = self.args
        model, _, post, stats = self.model_losses(batch)
        losses = {key: loss.mean() for key, loss in model.items()}
        scales = {"kl": args.kl_scale, "cont": args.cont_scale}  # the others: 1
        losses["total"] = sum(scales.get(key, 1.0) * loss for key, loss in losses.items())
        grads = torch.autograd.grad(losses["total"], self.optimizer.groups["model"][0])
        stats["stats/grad_norm"] = self.optimizer.step("model", grads)
        behaviour, more_stats = self.behaviour_losses(post, batch)  # with the world model as it is now
        behaviour = {key: loss.mean() for key, loss in behaviour.items()}
        grads = {key: torch.autograd.grad(loss, self.optimizer.groups[key][0]) for key, loss in behaviour.items()}
        for key in behaviour:
            stats[f"stats/{key}_grad_norm"] = self.optimizer.step(key, grads[key])
        with torch.no_grad():
            due = (self.optimizer.moments["critic"][2] - 1) % args.slow_every == 0  # the first one, too
            for slow, p in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
                slow.copy_(torch.where(due, p, slow))
        stats |= more_stats | {f"losses/{key}": loss for key, loss in {**losses, **behaviour}.items()}
        return {key: x.detach() for key, x in stats.items()}


class Replay:
    """Ring buffer of capacity // num_envs rows for each environment; all environments add a row at a time together.
    Windows lie within one finished episode: it is drawn uniformly, then a place in it, with ends=True as if the last
    place existed T more times. One that is too short is used from its start, and the window runs on into what follows.
    """

    def __init__(self, capacity, num_envs, obs_space, action_space, device, ends=False):
        self.length, self.num_envs, self.ends = capacity // num_envs, num_envs, ends
        spec = {"reward": ((), torch.float32)}
        for key, space in {**obs_space.spaces, "action": action_space}.items():
            spec[key] = space.shape, torch.from_numpy(np.zeros(0, space.dtype)).dtype
        spec |= {key: ((), torch.bool) for key in ("is_first", "is_last", "is_terminal")}
        self.row_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in spec.values())
        self.device = replay_device(capacity, self.row_bytes, device)
        zeros = partial(torch.zeros, self.length, num_envs, device=self.device)
        self.data = {key: zeros(*shape, dtype=dtype) for key, (shape, dtype) in spec.items()}
        self.rows, self.oldest = 0, 0  # added so far for each environment; the first of them that is still kept
        self.starts = [[] for _ in range(num_envs)]  # rows at which the episodes of each environment begin
        self.files = []  # (first row, end row, name) of what save has written

    def windows(self, T):
        """Number of windows of T rows that there are to sample from, if episodes did not matter."""
        return self.num_envs * max(0, self.rows - self.oldest - T + 1)

    def add(self, row):
        """row: {key: (num_envs, ...)}, arrays or tensors."""
        for key, ring in self.data.items():
            ring[self.rows % self.length].copy_(torch.as_tensor(row[key]), non_blocking=self.device.type != "cpu")
        self.rows, self.oldest = self.rows + 1, max(self.oldest, self.rows + 1 - self.length)
        for starts, is_first in zip(self.starts, row["is_first"], strict=True):
            if is_first:
                starts.append(self.rows - 1)
            while len(starts) > 1 and starts[1] <= self.oldest:
                starts.pop(0)  # the whole episode has left the ring

    def episodes(self, B):
        """Draw B of the finished episodes, or of those under way if none has ended: environment, first row, end."""
        ends = self.starts if max(map(len, self.starts)) > 1 else [[*starts, self.rows] for starts in self.starts]
        envs = torch.multinomial(torch.tensor([len(x) - 1.0 for x in ends]), B, True).tolist()
        places = [(n, int(u * (len(ends[n]) - 1))) for n, u in zip(envs, torch.rand(B).tolist(), strict=True)]
        return torch.tensor([(n, *ends[n][k : k + 2]) for n, k in places])

    def sample(self, B, T):
        """-> {key: (B, T, ...)}, and "index" (B, T). is_last also marks an episode that was abandoned."""
        env, first, end = self.episodes(B).T  # (B)
        low = first.clamp(min=self.oldest)  # (B)
        high = torch.maximum(low, end - T)  # (B)
        places = high - low + 1 + (T if self.ends else 0)  # (B)
        start = low + (torch.rand(B, dtype=torch.float64) * places).long().minimum(high - low)  # (B)
        index = start.clamp(max=self.rows - T)[:, None] + torch.arange(T)  # (B, T)
        index = (index % self.length * self.num_envs + env[:, None]).to(self.device, non_blocking=True)
        batch = {key: ring.flatten(0, 1)[index] for key, ring in self.data.items()}
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]
        return {**batch, "index": index}

    def save(self, folder):
        """Delete files that the last checkpoint does not name, write the rows added since. -> what load needs."""
        folder.mkdir(exist_ok=True)
        for path in set(folder.iterdir()) - {folder / name for _, _, name in self.files}:
            path.unlink()
        self.files = [file for file in self.files if file[1] > self.oldest]
        first = max([self.oldest] + [end for _, end, _ in self.files])
        if first < self.rows:
            places = torch.arange(first, self.rows, device=self.device) % self.length
            self.files.append((first, self.rows, f"rows-{first}-{self.rows}.pt"))
            save(folder / self.files[-1][2], **{key: ring[places].cpu() for key, ring in self.data.items()})
        return {key: getattr(self, key) for key in ("rows", "oldest", "starts", "files")}

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
    replay = Replay(args.buffer_size, args.num_envs, obs_space, action_space, device, args.ends)
    update, act = (Captured(fn, args.cuda_graph and cuda) for fn in (agent.update, agent.act))
    if saved:  # new episodes begin: the interrupted ones stand in the replay as abandoned
        agent.load_state_dict(saved["agent"])
        torch._foreach_copy_(agent.optimizer.state, saved["optimizer"])
        replay.load(Path(args.resume) / "replay", saved["replay"])
    row, stats, began, since = start_row(envs, args.seed + step), {}, time.time(), step
    run_dir, writer = open_run(args, agent, replay, saved)
    rows, replayed = args.batch_length, args.batch_size * args.batch_length  # in a window; by an update
    print(f"training  after {args.prefill:,} random steps: {replayed:,} replayed per {args.train_every:g}", flush=True)
    returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)  # of the episodes that go on
    try:
        while step < args.total_timesteps:
            inputs = agent.inputs(row, state)
            state = agent.act(inputs, random=True) if step < args.prefill else act(inputs)
            action = agent.env_action(state)
            replay.add({**row, "action": action})

            ready = step >= args.prefill and replay.windows(rows) > 0
            first_step = step if ready and first_step is None else first_step
            while ready and updates < 1 + args.pretrain + (step - first_step) // args.train_every:
                batch = replay.sample(args.batch_size, rows)
                batch = {key: x.to(device, non_blocking=True) for key, x in batch.items()}
                stats = update(batch)  # a GPU works on it while the environments step
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
                    write_open_loop(agent, replay.sample(6, rows), run_dir, writer, step)
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
    obs, (action, is_first) = {key: batch[key] for key in agent.decoder.shapes}, agent.previous(batch)
    seen = max(1, is_first.shape[1] // 4)
    with agent.autocast():
        embed = agent.encoder({key: x[:, :seen] for key, x in obs.items()})
        post = agent.rssm.observe(embed, action[:, :seen], is_first[:, :seen], agent.rssm.initial(len(embed)))
        last, plan = {key: x[:, -1] for key, x in post.items()}, iter(action[:, seen:].unbind(1))
        feat, _ = agent.rssm.imagine(last, lambda _: next(plan), is_first.shape[1] - seen)
        model = picture(agent.decoder(torch.cat([agent.rssm.feat(post), feat[:, 1:]], 1)))
    return film(torch.cat([picture(obs), model, (model - picture(obs) + 255) / 2], 2), seen)


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
