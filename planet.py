# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "numpy", "gymnasium>=1.3", "ale-py", "shimmy[dm-control]", "mujoco>=3.17,<4", "tensorboard", "tyro"
# ]
# ///
"""PlaNet: learn a latent model of the world from pixels, and act by planning in it. No policy, no value function.

Paper: Hafner et al., "Learning Latent Dynamics for Planning from Pixels", arXiv 1811.04551 (ICML 2019). "Eq. n" is an
equation of it, "code" the authors' release in its last state (August 2019).

    python planet.py --env-id dm_control/cartpole-swingup-v0               train from pixels: 1,000 episodes
    python planet.py --env-id dm_control/cartpole-swingup-v0 --obs vector --size small      a CPU will do
    python planet.py --iterations 1 --top 1               Figure 5: random shooting, the best of 1000 plans
    python planet.py --resume runs/...                    go on where the last checkpoint stands, replay included
    python planet.py --eval runs/.../checkpoint.pt        play 10 episodes, print the returns, save eval.gif

Symbols in shapes: B sequences of a batch, T steps trained on, N environments (or start states), H planning horizon,
J candidate plans, A action size, E embedding, D deterministic state (belief), S latent variables, F = D + S features,
U hidden units.

A row of experience holds obs_t, the reward that arrived with it, is_first, is_last, is_terminal, and the action chosen
after seeing obs_t. The model at row t thus sees obs[t] and action[t-1]; at is_first it forgets both state and action.

Differs from the paper, on purpose:
- Where paper and code disagree the code's last state counts: reward network 3 x 300 (paper 2 x 200), deviations of the
  refit (paper: mean absolute), reward loss times 10 (paper: silent), clipped candidates, means over T (paper: sums).
- Vectors go through two layers of U units on both sides: the paper has pixels only.
- Discrete actions are no part of the paper: candidates are scores of the actions, the largest is played and modelled.
- Episodes shorter than a window are used from their start, and the window runs on into the next one.
- Several environments may collect at once. Each finished episode is followed by its 100 updates, as with one; episodes
  that are under way can be sampled, and there may be a few more seed episodes.
- Logged returns are of collected episodes, with noise; the paper's are of noiseless ones: --eval. There is no test set.
- Episode ends are not modelled, as in the paper: no use where an early end is what matters.
"""

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
from bisect import bisect
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


@dataclass
class Args:
    env_id: str = "dm_control/cartpole-swingup-v0"  # dm_control/<domain>-<task>-v0, ALE/*, or any gymnasium id
    env_kwargs: str = "{}"  # arguments for the environment, as JSON
    num_envs: int = 1  # environments stepped together
    vector: Literal["sync", "async"] = "sync"  # environments in this process, or each in a process of its own
    action_repeat: int | None = None  # frames per policy step; by task, see REPEATS
    atari_protocol: Literal["100k", "200m"] = "100k"  # 64x64 RGB, minimal actions; 200m: 96x96, which planet refuses
    obs: Literal["vector", "image", "both"] | None = None  # own observations, camera, both; dm_control: image, else own
    seed: int = 1  # of weights, sampling and environments
    size: Literal["debug", "small", "paper"] = "paper"  # networks, batch and planner; small: vectors on a CPU
    total_timesteps: int | None = None  # policy steps of all environments together; 125_000: 1,000 episodes of cartpole
    batch_size: int | None = None  # B, sequences per update; paper: 50
    batch_length: int | None = None  # T, steps per sequence; paper: 50
    seed_episodes: int | None = None  # random episodes before the first update; paper: 5
    collect_interval: int | None = None  # updates per episode; paper: 100
    buffer_size: int | None = None  # replay rows; 9/8 of total_timesteps (a reset is a row, too), at most 1_000_000
    checkpoint_every: int = 5_000  # policy steps between checkpoints
    log_every: float = 10.0  # seconds between progress lines and between records of scalars
    horizon: int = 12  # H, steps of a plan
    iterations: int | None = None  # refits of the plan's distribution; paper: 10
    candidates: int | None = None  # J, plans per iteration; paper: 1000
    top: int | None = None  # elites that the refit keeps; paper: 100
    action_noise: float = 0.3  # deviation of the noise on collected actions
    free_nats: float = 3.0  # a KL below this is not optimised, per step
    kl_scale: float = 1.0  # of the KL
    reward_scale: float = 10.0  # of the reward loss; code
    learning_rate: float = 1e-3  # of Adam
    eps: float = 1e-4  # of Adam, added as TensorFlow does
    clip: float = 1000.0  # largest global gradient norm
    bits: int = 5  # of the image that the model sees
    min_std: float = 0.1  # least deviation of the latents
    stoch: int | None = None  # S; by --size, as the four below: paper 30
    deter: int | None = None  # D; paper: 200
    hidden: int | None = None  # U; paper: 200
    units: int | None = None  # units of the three layers of the reward network; code: 300
    depth: int | None = None  # channels of the first convolution; paper: 32
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    bf16: bool = True  # bfloat16 products and convolutions on a GPU; products only on a CPU with AMX
    cuda_graph: bool = True  # replay the whole update, and acting with its plan, as CUDA graphs on a GPU
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on from
    eval: str | None = None  # run folder or checkpoint to evaluate
    eval_episodes: int = 10  # episodes of --eval
    eval_steps: int = 30_000  # policy steps after which an episode of --eval is cut off
    track: bool = False  # mirror TensorBoard to Weights & Biases (pip install wandb; WANDB_PROJECT, WANDB_ENTITY)


DEBUG = dict(total_timesteps=400, batch_size=4, batch_length=8, seed_episodes=1, collect_interval=10)
RUN = dict(total_timesteps=125_000, batch_size=50, batch_length=50, seed_episodes=5, collect_interval=100)
SIZES = {  # debug and small are ours: for a CPU
    "debug": dict(stoch=6, deter=16, hidden=16, units=16, depth=4, iterations=2, candidates=20, top=4, **DEBUG),
    "small": dict(stoch=16, deter=64, hidden=64, units=64, depth=16, iterations=5, candidates=300, top=30, **RUN),
    "paper": dict(stoch=30, deter=200, hidden=200, units=300, depth=32, iterations=10, candidates=1000, top=100, **RUN),
}
ATARI = {  # settings of ALE by --atari-protocol
    "100k": dict(img_height=64, img_width=64, grayscale=False, full_action_space=False, repeat_action_probability=0.0),
    "200m": dict(img_height=96, img_width=96, grayscale=True, full_action_space=True, repeat_action_probability=0.25),
}
REPEATS = {"cartpole": 8, "reacher": 4, "cheetah": 4, "finger": 2, "ball_in_cup": 4, "walker": 2}  # the paper's
SIDES = (64,)  # of images: the transposed convolutions end at 64


def resolve(args: Args) -> Args:
    """Fill what was left open (None) from the preset of --size and the kind of environment. An explicit flag wins."""
    family, _, task = args.env_id.partition("/")
    repeat = {"ALE": 4, "dm_control": REPEATS.get(task.split("-")[0], 2)}.get(family, 1)
    preset = {**SIZES[args.size], "action_repeat": repeat, "obs": "image" if family == "dm_control" else "vector"}
    preset["buffer_size"] = min((args.total_timesteps or preset["total_timesteps"]) * 9 // 8, 1_000_000)
    args = replace(args, **{key: value for key, value in preset.items() if getattr(args, key) is None})
    least = dict(batch_length=2, seed=0) | dict.fromkeys(("learning_rate", "eps", "clip", "min_std"), 1e-12)
    for name, value in asdict(args).items():
        low = least.get(name, 1 if type(value) is int else 0)
        high = {"top": args.candidates, "bits": 8}.get(name, 2**31)
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: allowed: {low:g} to {high:g}")
    if args.buffer_size // args.num_envs <= args.batch_length:
        fail(f"--buffer-size {args.buffer_size}: allowed: --num-envs windows of --batch-length + 1 rows, or more")
    if args.atari_protocol != Args.atari_protocol and family != "ALE":
        fail(f"--atari-protocol {args.atari_protocol}: allowed: with --env-id ALE/... only")
    return args


# === Part 1: the algorithm ============================================================================================


def init_weights(module):
    """Glorot-uniform weights, biases 0, as TensorFlow's layers."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def mlp(sizes):
    """Linear layers with ReLU after each."""
    parts = [(nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[module for part in parts for module in part])


def is_image(space):
    """uint8 of rank 3 goes to the convolutions, everything else to the MLP."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def preprocess(image, bits, noise=None):
    """Images of few bits, dequantised: floor(u8 / 2^(8 - bits)) / 2^bits + U(0, 2^-bits) - 0.5 in +-0.5. Few bits:
    small objects weigh as much as the texture of the ground. Noise, always new: a density cannot grow without bound.
    """
    noise = torch.rand(image.shape, device=image.device) / 2**bits if noise is None else noise
    return torch.div(image, 2 ** (8 - bits), rounding_mode="floor").float() / 2**bits + noise - 0.5


class Encoder(nn.Module):
    """Observations -> embedding. Images: 4 x (4x4 convolution of stride 2, ReLU): 64, 31, 14, 6, 2 pixels wide."""

    def __init__(self, obs_space, args):
        super().__init__()
        self.images = sorted(key for key, space in obs_space.items() if is_image(space))
        self.vectors = sorted(key for key in obs_space if key not in self.images)
        self.bits, self.size = args.bits, args.hidden if self.vectors else 0  # E
        if self.vectors:
            self.mlp = mlp([sum(obs_space[key].shape[0] for key in self.vectors), args.hidden, args.hidden])
        if self.images:
            channels = [sum(obs_space[key].shape[-1] for key in self.images)] + [m * args.depth for m in (1, 2, 4, 8)]
            convs = [(nn.Conv2d(a, b, 4, 2), nn.ReLU()) for a, b in zip(channels, channels[1:], strict=False)]
            self.convs = nn.Sequential(*[module for part in convs for module in part], nn.Flatten())
            self.size += 2 * 2 * channels[-1]
        self.apply(init_weights)

    def preprocess(self, obs):
        """{key: (B, T, ...)} -> what the model sees and predicts: quantised, noisy images; vectors as they are."""
        return {key: preprocess(x, self.bits) if key in self.images else x.float() for key, x in obs.items()}

    def forward(self, obs):
        """Preprocessed {key: (B, T, ...)} -> (B, T, E)."""
        tokens = []
        if self.vectors:
            tokens.append(self.mlp(torch.cat([obs[key] for key in self.vectors], -1)))
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            x = self.convs(image.flatten(0, 1).permute(0, 3, 1, 2))
            tokens.append(x.unflatten(0, image.shape[:2]))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """Features -> means of unit-variance normals. Images: linear, then 4 transposed convolutions: 1, 5, 13, 30, 64."""

    def __init__(self, obs_space, size, args):
        super().__init__()
        self.shapes = {key: space.shape for key, space in obs_space.items()}
        self.images = sorted(key for key, space in obs_space.items() if is_image(space))
        self.vectors = sorted(key for key in obs_space if key not in self.images)
        if self.vectors:
            self.mlp = mlp([size, args.hidden, args.hidden])
            self.heads = nn.ModuleDict({key: nn.Linear(args.hidden, self.shapes[key][0]) for key in self.vectors})
        if self.images:
            channels = [m * args.depth for m in (32, 4, 2, 1)] + [sum(self.shapes[key][-1] for key in self.images)]
            self.linear, parts = nn.Linear(size, channels[0]), []
            for i, kernel in enumerate((5, 5, 6, 6)):
                parts += [nn.ConvTranspose2d(channels[i], channels[i + 1], kernel, 2), nn.ReLU()]
            self.convs = nn.Sequential(*parts[:-1]).to(memory_format=torch.channels_last)
        self.apply(init_weights)

    def forward(self, feat):
        """(B, T, F) -> {key: (B, T, ...) float32}."""
        out = {}
        if self.vectors:
            x = self.mlp(feat)
            out = {key: head(x).float() for key, head in self.heads.items()}
        if self.images:
            first, x = self.convs[0], self.linear(feat).flatten(0, 1)  # on an image of 1 x 1 a plain product: faster
            x = F.linear(x, first.weight.flatten(1).T).unflatten(1, (-1, 5, 5)) + first.bias[:, None, None]
            x = self.convs[1:](x.contiguous(memory_format=torch.channels_last)).float()
            parts = x.permute(0, 2, 3, 1).unflatten(0, feat.shape[:2])
            out.update(zip(self.images, parts.split([self.shapes[key][-1] for key in self.images], -1), strict=True))
        return out


class GRU(nn.Module):
    """r, u = sigmoid(W [x, h] + 1), h' = u h + (1 - u) tanh(W [x, r h]): unlike torch's, r comes before the product."""

    def __init__(self, inputs, size):
        super().__init__()
        self.gates, self.cand = nn.Linear(inputs + size, 2 * size), nn.Linear(inputs + size, size)
        self.apply(init_weights)
        nn.init.ones_(self.gates.bias)  # both gates open: a new network remembers

    def forward(self, x, h):
        """(N, inputs), (N, D) -> (N, D)."""
        reset, update = self.gates(torch.cat([x, h.to(x.dtype)], -1)).float().sigmoid().chunk(2, -1)
        cand = self.cand(torch.cat([x, (reset * h).to(x.dtype)], -1)).float().tanh()
        return torch.lerp(cand, h, update)


class Normal(nn.Module):
    """Linear layers for mean and deviation: (..., U) -> (..., S) twice, the deviation softplus + min_std."""

    def __init__(self, inputs, size, min_std):
        super().__init__()
        self.mean, self.std, self.min_std = nn.Linear(inputs, size), nn.Linear(inputs, size), min_std

    def forward(self, x):
        return self.mean(x).float(), F.softplus(self.std(x).float()) + self.min_std


class RSSM(nn.Module):
    """Recurrent state-space model, Eq. 4: h_t = f(h, s, a of t-1), prior s_t ~ p(h_t), posterior s_t ~ q(h_t, o_t)."""

    def __init__(self, embed_size, action_size, args):
        super().__init__()
        D, S, U = args.deter, args.stoch, args.hidden
        self.args, self.sizes = args, {"deter": D, "stoch": S}
        self.inputs = nn.Linear(S + action_size, U)
        self.prior = nn.Sequential(nn.Linear(D, U), nn.ReLU(), Normal(U, S, args.min_std))  # h -> mean, deviation
        self.post_hidden, self.post_out = nn.Linear(D + embed_size, U), Normal(U, S, args.min_std)
        self.apply(init_weights)
        self.cell = GRU(U, D)  # which has its own initial weights

    def initial(self, B):
        """Zeros: {"deter": (B, D), "stoch": (B, S)}."""
        return {key: self.inputs.weight.new_zeros(B, size) for key, size in self.sizes.items()}

    def feat(self, state):
        """[s, h]: (..., S), (..., D) -> (..., F)."""
        return torch.cat([state["stoch"], state["deter"]], -1)

    def split_inputs(self, action):
        """Weight of the latents (U, S), and for all steps the actions' share of the input layer, (..., U)."""
        weight_stoch, weight_action = self.inputs.weight.split([self.args.stoch, action.shape[-1]], 1)
        action_hidden = F.linear(action, weight_action, self.inputs.bias)
        return weight_stoch.to(action_hidden.dtype), action_hidden  # cast once: autocast would cast it at each step

    def step(self, deter, stoch, weight_stoch, action_hidden):
        """h' = f(h, s, a), a given by its share of the input layer: (N, D), (N, S), (U, S), (N, U) -> (N, D)."""
        x = F.relu(F.linear(stoch.to(action_hidden.dtype), weight_stoch) + action_hidden)
        return self.cell(x, deter)

    def observe(self, embed, action, is_first, state, noise=None):
        """Filter T observations; what does not depend on the latents is computed for all T at once. embed: (B, T, E);
        action: (B, T, A), the one that led to each step; is_first: (B, T); state: of the step before; noise: (B, T, S),
        drawn if None. -> {"deter": (B, T, D), "stoch", "mean", "std", "prior_mean", "prior_std": (B, T, S)}.
        """
        keep = 1 - is_first.float()  # (B, T)
        noise = torch.randn(*is_first.shape, self.args.stoch, device=embed.device) if noise is None else noise
        weight_stoch, action_hidden = self.split_inputs(action * keep[..., None])
        weight_deter, weight_embed = self.post_hidden.weight.split([self.args.deter, embed.shape[-1]], 1)
        embed_hidden = F.linear(embed, weight_embed, self.post_hidden.bias)  # (B, T, U)
        weight_deter = weight_deter.to(embed.dtype)
        deter, stoch, states = state["deter"], state["stoch"], []
        for t in range(is_first.shape[1]):
            deter, stoch = deter * keep[:, t, None], stoch * keep[:, t, None]
            deter = self.step(deter, stoch, weight_stoch, action_hidden[:, t])
            mean, std = self.post_out(F.relu(F.linear(deter.to(embed.dtype), weight_deter) + embed_hidden[:, t]))
            stoch = mean + std * noise[:, t]  # reparameterised; the posterior's sample is what is carried on
            states.append((deter, stoch, mean, std))
        deter, stoch, mean, std = (torch.stack(x, 1) for x in zip(*states, strict=True))
        prior_mean, prior_std = self.prior(deter)
        post = {"deter": deter, "stoch": stoch, "mean": mean, "std": std}
        return {**post, "prior_mean": prior_mean, "prior_std": prior_std}

    def imagine(self, state, action, noise=None):
        """Roll the prior forward. state: N start states; action: (N, H, A); noise: (N, H, S), drawn if None.
        -> {"deter": (N, H, D), "stoch", "mean", "std": (N, H, S)}, the states after each action.
        """
        noise = torch.randn(*action.shape[:2], self.args.stoch, device=action.device) if noise is None else noise
        weight_stoch, action_hidden = self.split_inputs(action)
        deter, stoch, states = state["deter"], state["stoch"], []
        for t in range(action.shape[1]):
            deter = self.step(deter, stoch, weight_stoch, action_hidden[:, t])
            mean, std = self.prior(deter)
            stoch = mean + std * noise[:, t]  # reparameterised
            states.append((deter, stoch, mean, std))
        deter, stoch, mean, std = (torch.stack(x, 1) for x in zip(*states, strict=True))
        return {"deter": deter, "stoch": stoch, "mean": mean, "std": std}


class Adam:
    """TensorFlow's Adam after clipping by the global norm: eps is added before the second moment is corrected, which
    early on makes it up to 30 times as large as in PyTorch's form. For each parameter p with gradient g:
    g <- g min(1, clip / |all g|),  m <- 0.9 m + 0.1 g,  v <- 0.999 v + 0.001 g^2
    p <- p - lr sqrt(1 - 0.999^t) / (1 - 0.9^t) m / (sqrt(v) + eps)
    Counters live on the device, where a CUDA graph can advance them.
    """

    def __init__(self, params, args):
        self.params, self.args = params, args
        self.momentum, self.mean_square = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.count = torch.zeros((), dtype=torch.float64, device=params[0].device)  # t
        self.state = [*self.momentum, *self.mean_square, self.count]  # what a checkpoint holds

    @torch.no_grad()
    def step(self, grads):
        """grads: one tensor per parameter. -> global gradient norm before clipping, ()."""
        args, t = self.args, self.count.add_(1)
        norm = torch.stack(torch._foreach_norm(grads)).square().sum().sqrt()
        grads = torch._foreach_mul(grads, (args.clip / norm).clamp(max=1))
        torch._foreach_lerp_(self.momentum, grads, 0.1)
        torch._foreach_mul_(self.mean_square, 0.999)
        torch._foreach_addcmul_(self.mean_square, grads, grads, 0.001)
        scale = torch._foreach_sqrt(self.mean_square)
        torch._foreach_add_(scale, args.eps)
        change = torch._foreach_div(self.momentum, scale)
        rate = args.learning_rate * (1 - 0.999**t).sqrt() / (1 - 0.9**t)
        torch._foreach_sub_(self.params, torch._foreach_mul(change, rate.float()))
        return norm


def kl_gaussian(mean, std, mean2, std2):
    """KL(N(mean, std) || N(mean2, std2)) in nats of S independent normals, all (..., S) -> (...)."""
    return (std2.log() - std.log() + (std.square() + (mean - mean2).square()) / (2 * std2.square()) - 0.5).sum(-1)


def kl_loss(post, prior, free_nats):
    """max(0, KL(post || prior) - free nats), per step and before any mean. post, prior: (mean, std) -> (...)."""
    return (kl_gaussian(*post, *prior) - free_nats).clamp(min=0)


def refit(candidates, returns, top):
    """The best candidates' mean and deviation. candidates: (N, J, H, A), returns: (N, J) -> (N, 1, H, A) twice."""
    best = returns.topk(top, 1, sorted=False).indices  # (N, K)
    elites = candidates.gather(1, best[..., None, None].expand(-1, -1, *candidates.shape[2:]))  # (N, K, H, A)
    mean = elites.mean(1, keepdim=True)  # (N, 1, H, A)
    return mean, ((elites - mean).square().mean(1, keepdim=True) + 1e-6).sqrt()


def cem(score, shape, iterations, top, like):
    """Cross-entropy method, Algorithm 2: draw plans, keep the best, fit a normal distribution to them, repeat.
    score: plans (N, J, H, A) in -1 to 1 -> returns (N, J); shape: (N, J, H, A); like: a tensor of the device.
    -> the mean of the last fit (N, H, A). Each of the N problems has candidates of its own. Fits see clipped plans.
    """
    N, _, H, A = shape
    mean, std = like.new_zeros(N, 1, H, A), like.new_ones(N, 1, H, A)
    for _ in range(iterations):
        candidates = (mean + std * torch.randn(shape, device=like.device)).clamp(-1, 1)  # (N, J, H, A)
        mean, std = refit(candidates, score(candidates), top)
    return mean[:, 0]


class Agent(nn.Module):
    """World model and planner. Spaces: of one environment, as make_envs gives them."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.args, self.action_space, self.device = args, action_space, pick_device(args)
        bf16 = args.bf16 and self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        # one region per use: a weight first cast under no_grad would stay cached there without its gradient
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, bf16)
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.action_size = int(action_space.n if self.discrete else np.prod(action_space.shape))  # A
        self.encoder = Encoder(obs_space, args)
        self.rssm = RSSM(self.encoder.size, self.action_size, args)
        size = sum(self.rssm.sizes.values())  # F
        self.decoder = Decoder(obs_space, size, args)
        self.reward = nn.Sequential(mlp([size] + 3 * [args.units]), nn.Linear(args.units, 1)).apply(init_weights)
        self.to(self.device)
        self.params = list(self.parameters())
        self.optimizer = Adam(self.params, args)

    def initial(self, B):
        """State of B environments before their first observation."""
        return {**self.rssm.initial(B), "action": torch.zeros(B, self.action_size, device=self.device)}

    def onehot(self, index):
        """(...) -> (..., A); F.one_hot would wait for the device."""
        return torch.eye(self.action_size, device=self.device)[index]

    def action_vector(self, action):
        """Stored actions to model actions. Discrete: (B, T) -> (B, T, A) one-hot; Box: (B, T, ...) -> (B, T, A)."""
        return self.onehot(action) if self.discrete else action.reshape(*action.shape[:2], -1).float().clamp(-1, 1)

    def played(self, scores):
        """Planned numbers (..., A) to model actions: clipped; Discrete: one-hot of the largest."""
        return self.onehot(scores.argmax(-1)) if self.discrete else scores.clamp(-1, 1)

    def inputs(self, row, state):
        """What act takes: observations and is_first of a row, and the state of initial or of the last act."""
        keys = (*self.decoder.shapes, "is_first")
        return {key: torch.as_tensor(row[key]).to(self.device, non_blocking=True) for key in keys} | state

    @torch.no_grad()
    def act(self, inputs, eval=False, random=False):
        """Filter, plan, add noise (eval: none; random: uniform actions). -> new state, its "action" (N, A) to play."""
        obs = {key: inputs[key][:, None] for key in self.decoder.shapes}
        with self.autocast():
            embed = self.encoder(self.encoder.preprocess(obs))
            post = self.rssm.observe(embed, inputs["action"][:, None], inputs["is_first"][:, None], inputs)
        state = {key: post[key][:, 0] for key in ("deter", "stoch")}
        uniform = 2 * torch.rand(len(embed), self.action_size, device=self.device) - 1
        scores = uniform if random else self.plan(state)["action"]
        noise = 0.0 if eval or random else self.args.action_noise
        return {**state, "action": self.played(scores + noise * torch.randn_like(scores))}

    def env_action(self, state):
        """State of act -> actions for the vector environment, int64 (N,) or float32 (N, ...). Waits for the device."""
        action = state["action"].cpu().numpy()  # (N, A)
        return action.argmax(-1) if self.discrete else action.reshape(-1, *self.action_space.shape)

    @torch.no_grad()
    def plan(self, state):
        """Algorithm 2 from N states {"deter": (N, D), "stoch": (N, S)}. -> {"action": (N, A)}, the first of each plan.
        Samples of the prior, means of the reward, their plain sum: no discount, no value at the end.
        """
        args, N, J = self.args, len(state["stoch"]), self.args.candidates
        start = {key: state[key].repeat_interleave(J, 0) for key in ("deter", "stoch")}  # J copies of each in turn

        def score(plans):  # plans (N, J, H, A) -> returns (N, J)
            future = self.rssm.imagine(start, self.played(plans).flatten(0, 1))
            reward = self.reward(self.rssm.feat(future)).float()  # (N*J, H, 1)
            return reward.sum((1, 2)).view(N, J)

        with self.autocast():
            plan = cem(score, (N, J, args.horizon, self.action_size), args.iterations, args.top, state["stoch"])
        return {"action": plan[:, 0]}

    def model_losses(self, batch):
        """Eq. 3 on rows 1..T from a zero state; row 0: the action before. -> losses (B, T), feat, posterior, stats."""
        args, is_first = self.args, batch["is_first"][:, 1:]
        with self.autocast():
            obs = self.encoder.preprocess({key: batch[key][:, 1:] for key in self.decoder.shapes})
            action = self.action_vector(batch["action"][:, :-1])  # (B, T, A)
            post = self.rssm.observe(self.encoder(obs), action, is_first, self.rssm.initial(len(action)))
            feat = self.rssm.feat(post)  # (B, T, F)
            recon, reward = self.decoder(feat), self.reward(feat)[..., 0].float()
        losses = {"reward": (reward - batch["reward"][:, 1:]).square() / 2}
        for kind, keys in ("image", self.decoder.images), ("vector", self.decoder.vectors):
            if keys:  # -ln N(x; mean, 1) without its constant: half the squared error, summed
                losses[kind] = sum((recon[key] - obs[key]).square().flatten(2).sum(2) / 2 for key in keys)
        pair = (post["mean"], post["std"]), (post["prior_mean"], post["prior_std"])
        losses["kl"] = kl_loss(*pair, args.free_nats)
        assert all(loss.shape == feat.shape[:2] for loss in losses.values())
        stats = {"kl": kl_gaussian(*pair[0], *pair[1]), "post_std": post["std"], "prior_std": post["prior_std"]}
        return losses, feat, post, {f"stats/{key}": x.detach().mean() for key, x in stats.items()}

    def update(self, batch):
        """One gradient step, without host sync. batch: Replay.sample -> 0-d statistics."""
        losses, _, _, stats = self.model_losses(batch)
        losses = {key: loss.mean() for key, loss in losses.items()}
        scales = {"kl": self.args.kl_scale, "reward": self.args.reward_scale}  # the others: 1
        losses["total"] = sum(scales.get(key, 1.0) * loss for key, loss in losses.items())
        stats["stats/grad_norm"] = self.optimizer.step(torch.autograd.grad(losses["total"], self.params))
        return {**stats, **{f"losses/{key}": loss.detach() for key, loss in losses.items()}}


class Replay:
    """Ring buffer of capacity // num_envs rows for each environment; all environments add a row at a time together.
    Windows lie within one episode: it is drawn uniformly, then a place in it. An episode that is too short is used from
    its start, and the window runs on into what follows.
    """

    def __init__(self, capacity, num_envs, obs_space, action_space, device):
        self.length, self.num_envs = capacity // num_envs, num_envs
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

    def episodes(self, B, T):
        """Draw B episodes of those with T rows stored since their context: environment, first row, end. -> (B, 3)"""
        counts = [bisect(starts, self.rows - T + 1) for starts in self.starts]  # later ones have less than T rows yet
        envs = torch.multinomial(torch.tensor(counts, dtype=torch.float), B, True).tolist()
        places = [(n, int(u * counts[n])) for n, u in zip(envs, torch.rand(B).tolist(), strict=True)]
        return torch.tensor([(n, *self.starts[n][k : k + 2], self.rows)[:3] for n, k in places])

    def sample(self, B, T):
        """-> {key: (B, T, ...)}, "index" (B, T). Row 0 is context. is_last also marks an episode that was abandoned."""
        env, first, end = self.episodes(B, T).T  # (B)
        low = (first - 1).clamp(min=self.oldest)  # (B)
        high = torch.maximum(low, end - T).clamp(max=self.rows - T)  # (B)
        start = low + (torch.rand(B, dtype=torch.float64) * (high - low + 1)).long()  # (B)
        index = (start[:, None] + torch.arange(T)) % self.length * self.num_envs + env[:, None]  # (B, T)
        index = index.to(self.device, non_blocking=True)  # (B, T)
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
    """Algorithm 1. -> {"run_dir", "global_step", "updates", "episodic_return", losses and statistics}."""
    if args.eval is not None:
        return show(args)
    saved = None if args.resume is None else load(Path(args.resume) / "checkpoint.pt", need=("args", "agent", "now"))
    args = resolve(inherit(args, args.resume, saved["args"], RESUMED) if saved else args)
    tune(args)
    now = saved["now"] if saved else dict(step=0, updates=0, episodes=0, recent=[])
    step, updates, episodes, recent = (now[key] for key in ("step", "updates", "episodes", "recent"))
    for seed in random.seed, np.random.seed, torch.manual_seed:
        seed(args.seed + step)  # a resumed run draws new numbers
    envs = make_envs(args.env_id, args.num_envs, args.seed, args)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    agent = Agent(obs_space, action_space, args)
    device, cuda, state = agent.device, agent.device.type == "cuda", agent.initial(args.num_envs)
    replay = Replay(args.buffer_size, args.num_envs, obs_space, action_space, device)
    update, act = (Captured(fn, args.cuda_graph and cuda) for fn in (agent.update, agent.act))
    if saved:  # new episodes begin: the interrupted ones stand in the replay as abandoned
        agent.load_state_dict(saved["agent"])
        torch._foreach_copy_(agent.optimizer.state, saved["optimizer"])
        replay.load(Path(args.resume) / "replay", saved["replay"])
    row, stats, began, since = start_row(envs, args.seed + step), {}, time.time(), step
    run_dir, writer = open_run(args, agent, replay, saved)
    print(f"training  {args.seed_episodes} random episodes, {args.collect_interval} updates per episode", flush=True)
    rows = args.batch_length + 1  # in a window: the first gives the action before the second
    returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)  # of the episodes that go on
    try:
        while step < args.total_timesteps:
            # seed episodes: random actions; data collection: filter, plan, exploration noise
            inputs = agent.inputs(row, state)
            state = agent.act(inputs, random=True) if episodes < args.seed_episodes else act(inputs)
            action = agent.env_action(state)
            replay.add({**row, "action": action})

            # model fitting: after the last seed episode, and after each later one, once its last row is stored
            due = args.collect_interval * (episodes - args.seed_episodes + 1)
            while updates < due and replay.windows(rows):
                batch = replay.sample(args.batch_size, rows)
                stats = update({key: x.to(device, non_blocking=True) for key, x in batch.items()})
                updates += 1
                if not cuda:  # a GPU would be waited for: there nan stops the run at the next record or checkpoint
                    finite(stats)

            before, step = step, step + int((~row["is_last"]).sum())  # a reset is no step
            row = next_row(envs, action, row)
            returns, lengths = returns * ~row["is_first"] + row["reward"], (lengths + 1) * ~row["is_first"]
            for n in np.flatnonzero(row["is_last"]):
                episodes, recent = episodes + 1, [*recent, float(returns[n])][-20:]
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
                now = dict(step=step, updates=updates, episodes=episodes, recent=recent)
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
    obs, is_first = {key: batch[key][:, 1:] for key in agent.decoder.shapes}, batch["is_first"][:, 1:]
    seen = max(1, is_first.shape[1] // 4)
    with agent.autocast():
        embed = agent.encoder(agent.encoder.preprocess({key: x[:, :seen] for key, x in obs.items()}))
        action = agent.action_vector(batch["action"][:, :-1])  # (B, T, A)
        post = agent.rssm.observe(embed, action[:, :seen], is_first[:, :seen], agent.rssm.initial(len(embed)))
        last = {key: post[key][:, -1] for key in ("deter", "stoch")}
        future = agent.rssm.imagine(last, action[:, seen:])
        model = picture(shown(agent.decoder(torch.cat([agent.rssm.feat(post), agent.rssm.feat(future)], 1))))
    truth = picture({key: x if x.dtype == torch.uint8 else x.float() for key, x in obs.items()})
    return film(torch.cat([truth, model, (model - truth + 255) / 2], 2), seen)


def shown(recon):
    """Predicted images, in -0.5 to 0.5, to 0 to 1."""
    return {key: (x + 0.5).clamp(0, 1) if x.dim() == 5 else x for key, x in recon.items()}


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
