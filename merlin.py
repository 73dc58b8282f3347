# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy", "gymnasium>=1.3", "tyro", "tensorboard"]
# ///
"""MERLIN: a memory whose contents are learned by prediction, read by a policy that cannot write. With its baselines.

Paper: Wayne et al., "Unsupervised Predictive Memory in a Goal-Directed Agent", arXiv 1803.10760 (2018). "Algorithm 1"
is that of the paper, "lecture" the course NPFL139, whose memory game this file plays.

    python merlin.py                                      MERLIN on the memory game with 6 cards, on a CPU in minutes
    python merlin.py --agent rl_mem                       the same memory, trained by reinforcement alone; or rl_lstm
    python merlin.py --resume runs/...                    go on where the last checkpoint stands
    python merlin.py --eval runs/.../checkpoint.pt        play 10 episodes, print the returns, save eval.gif

Symbols in shapes: N environments, T steps of a window, A actions, E embedding, Z latent variables, W = 2*Z numbers of a
memory row, R rows of the memory, K read keys of the predictor, L layers and U units of the LSTMs.

A row of experience holds obs_t, the reward that arrived with it, is_first, is_last, is_terminal, and the action chosen
after seeing obs_t. The agent at row t sees obs[t], reward[t] and action[t-1]; at is_first it forgets everything.

Differs from the paper, on purpose:
- Many environments in step with each other, instead of asynchronous workers; windows of T steps, through which
  gradients flow, while state is carried from window to window.
- What is written to memory has no gradient in MERLIN: latents are shaped by their own decoder. In RL-MEM it has one.
- A time-out bootstraps, as everywhere in this repository; the paper does not speak of it.
- A full memory gives up the row read least per step since it was written; the paper's sum of reads would give up the
  newest, always. The predictor's reads count, not the policy's. Both matter in episodes longer than the memory only.
- The image decoder doubles its resolution by repeating pixels before a block, not by transposed convolutions.
- The image encoder has a layer norm before its tanh, which Adam drives into saturation within 100 updates otherwise.
- All alphas are ours, as are rates, discount and entropy of size small: found on the memory game. Text is left out.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
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
    env_id: str = "MemoryGame-6-v0"  # MemoryGame-<cards>-v0, or any id (module:Id too) with Discrete actions
    env_kwargs: str = "{}"  # arguments for the environment, as JSON
    agent: Literal["merlin", "rl_mem", "rl_lstm"] = "merlin"  # the baselines learn by reinforcement alone
    num_envs: int | None = None  # environments stepped together; by --size
    vector: Literal["sync", "async"] = "sync"  # environments in this process, or each in a process of its own
    action_repeat: int = 1  # frames per policy step
    seed: int = 1  # of weights, sampling and environments
    size: Literal["debug", "small", "paper"] = "small"  # networks, window and rates; small: the memory game on a CPU
    total_timesteps: int | None = None  # steps of all environments together; small 500_000
    window: int | None = None  # T, steps through which gradients flow; small: 2 a card of the memory game; paper 20
    checkpoint_every: int | None = None  # steps between checkpoints; 100_000
    log_every: float = 10.0  # seconds between progress lines and between records of scalars
    gamma: float | None = None  # discount, of rewards and of the retroactive memory; paper 0.96
    lam: float | None = None  # lambda of the advantages; paper 0.9
    entropy_scale: float | None = None  # of the policy; paper 0.01
    learning_rate: float | None = None  # of the predictor (Adam); size paper 1e-4, the paper's own is not known
    policy_learning_rate: float | None = None  # of the policy, and of the baselines
    clip: float = 10.0  # largest gradient norm of the policy, and of the baselines
    predictor_clip: float = 500.0  # largest gradient norm of the predictor
    value_scale: float = 0.5  # of the baselines' value error
    alpha_image: float = 10.0  # half the squared error of pixels in 0 to 1, summed; the KL has weight 1
    alpha_obs: float = 50.0  # of other observations; with 1, random symbols are not worth their nats: nothing is stored
    alpha_action: float = 50.0  # of the previous action
    alpha_reward: float = 50.0  # of the previous reward
    alpha_return: float = 1.0  # of value and advantage; with 20 symbols are forgotten for it
    stoch: int | None = None  # Z; by --size, as the six below: paper 200
    hidden: int | None = None  # U; paper 256
    units: int | None = None  # of the hidden layers of policy, value and decoder; paper 200
    depth: int | None = None  # channels of the residual blocks; paper 64
    keys: int | None = None  # K; paper 3
    rows: int | None = None  # R; small: as many as an episode of the memory game has; paper 1350
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    bf16: bool = True  # TF32 products on a GPU, bfloat16 ones on a CPU with AMX
    cuda_graph: bool = True  # replay the step of acting, and the whole update, as CUDA graphs on a GPU
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on from
    eval: str | None = None  # run folder or checkpoint to evaluate
    eval_episodes: int = 10  # episodes of --eval
    eval_steps: int = 30_000  # policy steps after which an episode of --eval is cut off
    track: bool = False  # mirror TensorBoard to Weights & Biases (pip install wandb; WANDB_PROJECT, WANDB_ENTITY)


# fmt: off
GAME = dict(gamma=0.8, lam=0.9, entropy_scale=0.04, learning_rate=3e-3, policy_learning_rate=1e-3)
PAPER = dict(gamma=0.96, lam=0.9, entropy_scale=0.01, learning_rate=1e-4, policy_learning_rate=1e-4)
SIZES = {
    "debug": dict(stoch=4,   hidden=8,   units=8,   depth=4,  keys=2, rows=10,    num_envs=8,  window=8,
                  total_timesteps=2_000, checkpoint_every=1_000, **GAME),
    "small": dict(stoch=16,  hidden=64,  units=64,  depth=16, keys=3, rows=64,    num_envs=32, window=16,
                  total_timesteps=500_000, checkpoint_every=100_000, **GAME),
    "paper": dict(stoch=200, hidden=256, units=200, depth=64, keys=3, rows=1_350, num_envs=32, window=20,
                  total_timesteps=100_000_000, checkpoint_every=1_000_000, **PAPER),
}
# fmt: on
ALPHAS = [field.name for field in fields(Args) if field.name.startswith("alpha_")]
FOREIGN = {  # of no use to an agent
    "merlin": ["value_scale"],
    "rl_mem": ["learning_rate", "predictor_clip", *ALPHAS],
    "rl_lstm": ["learning_rate", "predictor_clip", *ALPHAS, "rows", "keys", "stoch"],
}


def resolve(args: Args) -> Args:
    """Fill what was left open (None) from the preset of --size and the number of cards. An explicit flag wins."""
    game = re.fullmatch(r"MemoryGame-([1-9]\d*)-v0", args.env_id)
    if game and '"cards"' in args.env_kwargs:
        fail(f"--env-kwargs {args.env_kwargs}: allowed: cards in --env-id, as in MemoryGame-{game[1]}-v0")
    preset = dict(SIZES[args.size])
    if game and args.size == "small":  # a whole episode
        preset |= {"window": 2 * int(game[1]), "rows": 2 * int(game[1]) + 2}
    for name in FOREIGN[args.agent]:
        if getattr(args, name) not in (getattr(Args, name), preset.get(name)):
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: is of no use with --agent {args.agent}")
    args = replace(args, **{key: value for key, value in preset.items() if getattr(args, key) is None})
    for name, value in asdict(args).items():
        least = 0 if name in (*ALPHAS, "entropy_scale", "value_scale", "gamma", "lam", "seed", "log_every") else 1e-12
        most = 1 if name in ("gamma", "lam") else 2**31
        if type(value) in (int, float) and not least <= value <= most:
            fail(f"--{name.replace('_', '-')} {value}: allowed: {'more than 0' if least else '0 or more'}, to {most:g}")
    return args


# === Part 1: the algorithm ============================================================================================


def onehot(index, count):
    """Integers (...) -> one-hot (..., count); F.one_hot would wait for the device."""
    return (index[..., None] == torch.arange(count, device=index.device)).float()


def memory_shapes(R, W):
    """What a memory is made of; all zero before the first write. count: rows written so far."""
    return {"memory": (R, W), "retro": (R,), "last": (R,), "usage": (R,), "age": (R,), "count": ()}


def read(memory, keys, strengths):
    """Read by content: softmax over rows of strength times cosine similarity. Empty rows take part, with similarity 0.
    memory: (N, R, W); keys: (N, K, W); strengths: (N, K), above 0 -> what was read (N, K, W), weights (N, K, R).
    """
    lengths = keys.norm(dim=-1)[..., None] * memory.norm(dim=-1)[:, None]  # (N, K, R)
    cosine = keys @ memory.transpose(1, 2) / (lengths + 1e-6)  # (N, K, R)
    weights = (strengths[..., None] * cosine).softmax(-1)  # (N, K, R)
    return weights @ memory, weights


def write(state, content, read_weights, gamma):
    """Store content in the first half of one row, and add it to the second halves of the rows written before, fading:
    row i ends as [z_i, (1 - gamma) sum over t > i of gamma^(t-i-1) z_t], a summary of what came after it.
        v_ret <- gamma v_ret + (1 - gamma) v_wr of the step before;  M <- M + v_wr [z, 0]^T + v_ret [0, z]^T
    In the order of the lecture, v_wr is that of this step, and the sum begins with z_i itself. state: memory_shapes;
    content: (N, Z); read_weights: (N, K, R), summed as usage -> new state. Without gradients memory is overwritten.
    """
    R = state["memory"].shape[1]
    usage, age = state["usage"] + read_weights.detach().sum(1), state["age"] + 1  # (N, R) each
    free = state["count"]  # (N): room left: the next free row
    least = (usage / age).argmin(1)  # (N): full: the row read least per step gives way; a sum would pick the newest
    chosen = onehot(torch.where(free < R, free, least), R)  # (N, R)
    kept = 1 - chosen  # (N, R): the chosen row is emptied; a free one is empty
    retro = (gamma * state["retro"] + (1 - gamma) * state["last"]) * kept  # (N, R)
    z = content[:, None]  # (N, 1, Z)
    first, second = chosen[..., None], retro[..., None]  # (N, R, 1) each
    if torch.is_grad_enabled():  # products by element: those of matrices are rounded on a GPU (TF32)
        added = torch.cat([first * z, second * z], -1)  # (N, R, W)
        memory = torch.addcmul(added, state["memory"], kept[..., None])  # (N, R, W)
    else:  # in place, as most of it stays; Agent.forget has made a copy of what act was given
        memory = state["memory"].mul_(kept[..., None])  # (N, R, W)
        contents, summaries = memory.chunk(2, -1)
        contents.addcmul_(first, z)
        summaries.addcmul_(second, z)
    new = {"memory": memory, "count": free + 1, "retro": retro, "last": chosen}
    return {**new, "usage": usage * kept, "age": age * kept}


def is_image(space):
    """uint8 of rank 3 goes to the convolutions, but for symbols on a small grid; all else is numbers."""
    bytes3 = isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3
    return bytes3 and min(space.shape[:2]) > 16


def mlp(inputs, units, outputs, layers=1):
    """layers x (Linear, tanh), and a linear output."""
    parts = []
    for _ in range(layers):
        parts += [nn.Linear(inputs, units), nn.Tanh()]
        inputs = units
    return nn.Sequential(*parts, nn.Linear(inputs, outputs))


class Bottleneck(nn.Module):
    """Residual block: 1x1, 3x3 to half the channels, 1x1 back; stride 2 halves the resolution, -2 doubles it. No batch
    norm, hence weights of the variance ReLUs need (He): PyTorch's is a sixth, and two boards look alike for ever.
    """

    def __init__(self, inputs, channels, stride):
        super().__init__()
        scale = nn.Upsample(scale_factor=2) if stride < 0 else nn.Identity()
        one = lambda: nn.Conv2d(inputs, channels, 1, max(stride, 1))
        inner = [one(), nn.ReLU(), nn.Conv2d(channels, channels // 2, 3, padding=1), nn.ReLU()]
        self.inner = nn.Sequential(scale, *inner, nn.Conv2d(channels // 2, channels, 1))
        self.short = nn.Sequential(scale, one())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x):
        return F.relu(self.inner(x) + self.short(x))


class Encoder(nn.Module):
    """Observations, previous action and reward -> embedding. Images: 6 residual blocks; integers: one-hot vectors."""

    def __init__(self, obs_space, action_size, args):
        super().__init__()
        self.shapes = {key: space.shape for key, space in obs_space.items()}
        self.images = sorted(key for key, space in obs_space.items() if is_image(space))
        self.numbers = {key: x.nvec.tolist() for key, x in obs_space.items() if isinstance(x, spaces.MultiDiscrete)}
        self.vectors = sorted(key for key in obs_space if key not in self.images and key not in self.numbers)
        self.channels = sum(self.shapes[key][-1] for key in self.images)
        self.widths = {key: sum(counts) for key, counts in self.numbers.items()}
        self.widths |= {key: self.shapes[key][0] for key in self.vectors}
        self.size = action_size + 1 + sum(self.widths.values()) + (500 if self.images else 0)  # E
        if self.images:
            C = args.depth
            blocks = [Bottleneck(self.channels, C, 2)] + [Bottleneck(C, C, stride) for stride in (1, 2, 1, 2, 1)]
            self.image_net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * C, 500), nn.LayerNorm(500), nn.Tanh())

    def forward(self, obs, action, reward):
        """{key: (N, ...)}, (N, A), (N,) -> (N, E)."""
        parts = [action, reward[..., None]]
        for key in sorted(self.numbers):
            parts += [onehot(obs[key][..., i], count) for i, count in enumerate(self.numbers[key])]
        parts += [obs[key].float() for key in self.vectors]
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            image = (image.permute(0, 3, 1, 2) / 255).contiguous()  # channels-last, oneDNN fails in 1x1 of stride 2
            parts.append(self.image_net(image))
        return torch.cat(parts, -1)


class Decoder(nn.Module):
    """Latents -> what was seen: images, logits of integers, vectors, and the previous action and reward."""

    def __init__(self, encoder, action_size, args):
        super().__init__()
        self.shapes, self.images = encoder.shapes, encoder.images
        self.numbers, self.vectors = encoder.numbers, encoder.vectors
        self.trunk = nn.Sequential(nn.Linear(args.stoch, args.units), nn.Tanh())
        widths = {**encoder.widths, "action": action_size, "reward": 1}
        self.heads = nn.ModuleDict({key: nn.Linear(args.units, width) for key, width in widths.items()})
        if self.images:
            C = args.depth
            dense = [nn.Linear(args.stoch, 500), nn.ReLU(), nn.Linear(500, 64 * C), nn.ReLU()]
            blocks = [Bottleneck(C, C, stride) for stride in (1, -2, 1, -2, 1, -2)]
            image = [nn.Conv2d(C, encoder.channels, 1), nn.Sigmoid()]
            self.image_net = nn.Sequential(*dense, nn.Unflatten(1, (C, 8, 8)), *blocks, *image)

    def forward(self, z):
        """(N, Z) -> {key: (N, ...)}, with "action" (N, A) and "reward" (N,)."""
        x = self.trunk(z)
        out = {key: head(x).float() for key, head in self.heads.items()}
        if self.images:
            image = self.image_net(z).float().permute(0, 2, 3, 1)
            out |= dict(zip(self.images, image.split([self.shapes[key][-1] for key in self.images], -1), strict=True))
        return {**out, "reward": out["reward"][..., 0]}

    def losses(self, z, obs, action, reward):
        """-> {"image", "obs": where there are such, "action", "reward": (N,)}, summed. action: zero at a beginning."""
        out = self(z)
        losses = {"reward": (out["reward"] - reward).square() / 2}
        losses["action"] = -(out["action"].log_softmax(-1) * action).sum(-1)
        if self.images:
            losses["image"] = sum((out[key] - obs[key] / 255).square().flatten(1).sum(1) / 2 for key in self.images)
        parts = [(out[key] - obs[key]).square().sum(-1) / 2 for key in self.vectors]
        for key, counts in self.numbers.items():
            for i, logits in enumerate(out[key].split(counts, -1)):
                parts.append(-(logits.log_softmax(-1) * onehot(obs[key][..., i], counts[i])).sum(-1))
        return {**losses, "obs": sum(parts)} if parts else losses


class DeepLSTM(nn.Module):
    """L layers, each of which sees the input too; all of their outputs count."""

    def __init__(self, inputs, units, layers=2):
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTMCell(inputs + (units if i else 0), units) for i in range(layers))

    def forward(self, x, h, c):
        """(N, inputs), (N, L, U), (N, L, U) -> h, c."""
        hs, cs = [], []
        for i, cell in enumerate(self.cells):
            new_h, new_c = cell(torch.cat([x, *hs[-1:]], -1), (h[:, i], c[:, i]))  # below the first: no layer
            hs.append(new_h)
            cs.append(new_c)
        return torch.stack(hs, 1), torch.stack(cs, 1)


class Keys(nn.Module):
    """h (N, L, U) -> K keys (N, K, W) and their strengths (N, K)."""

    def __init__(self, inputs, count, width):
        super().__init__()
        self.linear, self.count = nn.Linear(inputs, count * (width + 1)), count

    def forward(self, h):
        x = self.linear(h.flatten(1)).float().unflatten(1, (self.count, -1))
        return x[..., :-1], F.softplus(x[..., -1])


def kl_gaussian(mean, std, mean2, std2):
    """KL(N(mean, std) || N(mean2, std2)) in nats of S independent normals, all (..., S) -> (...)."""
    return (std2.log() - std.log() + (std.square() + (mean - mean2).square()) / (2 * std2.square()) - 0.5).sum(-1)


def sample_onehot(probs, noise=None):
    """Exact categorical sample, no host sync: arg-max of p / noise, noise ~ Exp(1). (..., K) -> one-hot (..., K)."""
    noise = torch.rand_like(probs, dtype=torch.float32).log_().neg_() if noise is None else noise
    index = (probs.detach() / noise).argmax(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, index, 1.0)


def advantages(reward, value, is_last, is_terminal, gamma, lam):
    """Algorithm 1: d_t = r_{t+1} + gamma v_{t+1} - v_t, A_t = d_t + gamma lam A_{t+1}. All (N, T+1), index t belongs to
    row t -> (N, T). A terminal state is worth 0, no sum runs across an end; an is_last row, which acts no more, has 0.
    """
    going = 1 - is_last.float()  # (N, T+1)
    delta = reward[:, 1:] + gamma * value[:, 1:] * (1 - is_terminal[:, 1:].float()) - value[:, :-1]
    out = [torch.zeros_like(value[:, 0])]
    for t in range(delta.shape[1] - 1, -1, -1):
        out.append((delta[:, t] + gamma * lam * out[-1]) * going[:, t])
    return torch.stack(out[:0:-1], 1)


def window_returns(reward, value, is_last, is_terminal, gamma):
    """R_t: rewards to the end of episode or window, bootstrapped there: advantages with lam 1, plus value. (N, T)."""
    value = value * (1 - is_terminal.float())  # (N, T+1)
    return value[:, :-1] + advantages(reward, value, is_last, is_terminal, gamma, 1.0)


def policy_loss(logp, entropy, advantage, entropy_scale):
    """-(ln pi(a) sg(A) + eta H). All (N, T) -> (N, T)."""
    return -(logp * advantage.detach() + entropy_scale * entropy)


def state_of(inputs):
    """What lies under "state/..." in a flat {key: tensor}, where a key of an observation may be that of a state."""
    return {key.removeprefix("state/"): x for key, x in inputs.items() if key.startswith("state/")}


class Agent(nn.Module):
    """MERLIN: a predictor fills the memory, a policy only reads it. Baselines: RLAgent. Spaces: as make_envs gives."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.args, self.action_space, self.device = args, action_space, pick_device(args)
        self.actions = int(action_space.n)  # A
        self.encoder = Encoder(obs_space, self.actions, args)
        groups = self.networks(self.actions, self.encoder.size, args.stoch, args.hidden, 2 * args.stoch, args.keys)
        self.to(self.device)
        self.params = list(self.parameters())
        self.optimizer = torch.optim.Adam(groups, foreach=True, capturable=self.device.type == "cuda")

    def networks(self, A, E, Z, U, W, K):
        """Make them; self.carried: shapes of the state; self.scales: of losses. -> groups for the optimiser."""
        args = self.args
        self.carried = {"action": (A,), "noise": (Z,), "read": (K, W), "policy_read": (1, W)}
        self.carried |= dict.fromkeys(("h", "c", "policy_h", "policy_c"), (2, U)) | memory_shapes(args.rows, W)
        self.decoder = Decoder(self.encoder, A, args)
        self.prior = mlp(2 * U + K * W, W, W, layers=2)
        self.posterior = mlp(E + 2 * U + K * W + W, W, W, layers=2)
        self.lstm, self.keys = DeepLSTM(Z + A + K * W, U), Keys(2 * U, K, W)
        self.value, self.advantage = mlp(Z + A, args.units, 1), mlp(Z + A, 50, 1)
        nn.init.zeros_(self.posterior[-1].weight)  # begins as the prior
        nn.init.zeros_(self.posterior[-1].bias)
        predictor = list(self.parameters())
        self.policy_lstm, self.policy_keys = DeepLSTM(Z + W, U), Keys(2 * U, 1, W)
        self.policy = mlp(Z + 2 * U + W, args.units, A)
        policy = list(nn.ModuleList([self.policy_lstm, self.policy_keys, self.policy]).parameters())
        # all in one sum: no gradient passes between policy and predictor
        self.scales = {"policy": 1.0, "kl": 1.0, "value": args.alpha_return, "advantage": args.alpha_return}
        self.scales |= {key: getattr(args, f"alpha_{key}") for key in ("image", "obs", "action", "reward")}
        group = dict(params=policy, lr=args.policy_learning_rate, clip=args.clip, name="policy")
        return [group, dict(params=predictor, lr=args.learning_rate, clip=args.predictor_clip, name="predictor")]

    def initial(self, B):
        """State of B environments before their first observation: zeros."""
        return {key: torch.zeros(B, *shape, device=self.device) for key, shape in self.carried.items()}

    def gaussian(self, params):
        """(..., W) -> mean, deviation (..., Z). Deviations neither vanish nor explode."""
        mean, log_std = params.chunk(2, -1)
        return mean, log_std.clamp(-6, 3).exp()

    def tick(self, embed, state, noise, choose):
        """One step, Algorithm 1. embed: (N, E); noise: (N, Z); choose: logits -> (N, A). -> outputs; the next state."""
        past = torch.cat([state["h"].flatten(1), state["read"].flatten(1)], -1)
        prior = self.prior(past).float()  # (N, W): mean and log of the deviation
        post = prior + self.posterior(torch.cat([embed, past, prior], -1)).float()  # (N, W)
        mean, std = self.gaussian(post)
        z = mean + std * noise  # (N, Z)
        seen = z.detach()  # the policy reads and does not shape
        inputs = torch.cat([seen, state["policy_read"].flatten(1)], -1)
        h, c = self.policy_lstm(inputs, state["policy_h"], state["policy_c"])
        policy_read, policy_weights = read(state["memory"], *self.policy_keys(h))
        logits = self.policy(torch.cat([seen, h.flatten(1), policy_read.flatten(1)], -1)).float()
        action = choose(logits)
        new = {"policy_h": h, "policy_c": c, "policy_read": policy_read, "action": action}
        inputs = torch.cat([z, action, state["read"].flatten(1)], -1)
        new["h"], new["c"] = self.lstm(inputs, state["h"], state["c"])
        new["read"], weights = read(state["memory"], *self.keys(new["h"]))
        new |= write(state, seen, weights, self.args.gamma)  # reads come before the write
        outputs = dict(logits=logits, z=z, post=post, prior=prior, weights=weights, policy_weights=policy_weights)
        return outputs, new

    def forget(self, state, is_first):
        """Zeros for the environments that begin an episode; bit by bit the same for all others."""
        shape = lambda x: is_first.view(-1, *[1] * (x.dim() - 1))
        return {key: x.masked_fill(shape(x), 0) for key, x in state.items()}

    def inputs(self, row, state):
        """What act takes: observations, reward and is_first of a row, and the state of initial or of the last act."""
        keys = (*self.encoder.shapes, "reward", "is_first")
        seen = {key: torch.as_tensor(row[key]).to(self.device, non_blocking=True) for key in keys}
        return seen | {f"state/{key}": x for key, x in state.items()}

    @torch.no_grad()
    def act(self, inputs, eval=False):
        """-> the next state, with "action" (N, A), and "noise" (N, Z) for unroll. eval: the most likely action."""
        state = self.forget(state_of(inputs), inputs["is_first"])
        embed = self.encoder(inputs, state["action"], inputs["reward"])  # (N, E)
        noise = torch.randn_like(state["noise"])  # (N, Z)
        choose = lambda logits: onehot(logits.argmax(-1), self.actions) if eval else sample_onehot(logits.softmax(-1))
        return {**self.tick(embed, state, noise, choose)[1], "noise": noise}

    def env_action(self, state):
        """State of act -> actions for the vector environment, int64 (N,). Waits for the device."""
        return state["action"].argmax(-1).cpu().numpy()

    def unroll(self, batch):
        """The window again, by the actions and noise of acting, with gradients. -> outputs (N, T+1, ...)."""
        state = state_of(batch)
        is_first, action = batch["is_first"], onehot(batch["action"], self.actions)
        before = torch.cat([state["action"][:, None], action[:, :-1]], 1) * ~is_first[..., None]  # (N, T+1, A)
        inputs = {key: batch[key].flatten(0, 1) for key in self.encoder.shapes}
        embed = self.encoder(inputs, before.flatten(0, 1), batch["reward"].flatten()).unflatten(0, is_first.shape)
        steps = []
        for t in range(is_first.shape[1]):
            state = self.forget(state, is_first[:, t])
            choose = lambda logits, t=t: action[:, t]
            outputs, state = self.tick(embed[:, t], state, batch["noise"][:, t], choose)
            steps.append(outputs)
        return {**{key: torch.stack([x[key] for x in steps], 1) for key in steps[0]}, "before": before}

    def reinforce(self, batch, out, logp, value):
        """What all agents share. logp: (N, T+1, A); value: (N, T+1) -> losses, returns, what acts (N, T); stats."""
        args, ends, fixed = self.args, (batch["is_last"], batch["is_terminal"]), value.detach()
        acts = (~batch["is_last"][:, :-1]).float()  # (N, T)
        returns = window_returns(batch["reward"], fixed, *ends, args.gamma)  # (N, T)
        advantage = advantages(batch["reward"], fixed, *ends, args.gamma, args.lam)  # (N, T)
        entropy = -(logp * logp.exp()).sum(-1)[:, :-1]  # (N, T)
        taken = (logp[:, :-1] * onehot(batch["action"][:, :-1], self.actions)).sum(-1)  # (N, T)
        losses = {"policy": policy_loss(taken, entropy, advantage, args.entropy_scale) * acts}
        losses["value"] = (returns - value[:, :-1]).square() / 2 * acts
        stats = {"policy_entropy": entropy, "value_mean": fixed, "return_mean": returns}
        for key in out.keys() & {"weights", "policy_weights"}:  # of reads: 0 where one row is read, ln R: all alike
            w = out[key][:, :-1]
            stats[key.replace("weights", "read_entropy")] = -(w * (w + 1e-9).log()).sum(-1)
        return losses, returns, acts, stats

    def losses(self, batch):
        """-> losses of each row that acts or is seen, (N, T) each; statistics. See unroll for the batch."""
        out = self.unroll(batch)
        logp = out["logits"].log_softmax(-1)  # (N, T+1, A)
        z = out["z"]  # (N, T+1, Z)
        value = self.value(torch.cat([z, logp.detach()], -1))[..., 0]  # (N, T+1)
        losses, returns, acts, stats = self.reinforce(batch, out, logp, value)
        action = onehot(batch["action"][:, :-1], self.actions)  # (N, T, A)
        more = self.advantage(torch.cat([z[:, :-1], action], -1))[..., 0]  # (N, T)
        losses["advantage"] = (returns - value.detach()[:, :-1] - more).square() / 2 * acts
        losses["kl"] = kl_gaussian(*self.gaussian(out["post"][:, :-1]), *self.gaussian(out["prior"][:, :-1]))
        obs = {key: batch[key][:, :-1].flatten(0, 1) for key in self.encoder.shapes}
        seen = out["before"][:, :-1].flatten(0, 1), batch["reward"][:, :-1].flatten()
        recon = self.decoder.losses(out["z"][:, :-1].flatten(0, 1), obs, *seen)
        losses |= {key: loss.unflatten(0, acts.shape) for key, loss in recon.items()}
        return losses, stats

    def update(self, batch):
        """One gradient step, no host sync. batch: T+1 rows, and "state/...", the state before -> 0-d statistics."""
        losses, stats = self.losses(batch)
        losses = {key: loss.mean() for key, loss in losses.items()}
        losses["total"] = sum(self.scales[key] * loss for key, loss in losses.items())
        grads = torch.autograd.grad(losses["total"], self.params, materialize_grads=True)
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        stats = {f"stats/{key}": x.detach().mean() for key, x in stats.items()}
        for group in self.optimizer.param_groups:
            stats[f"stats/{group['name']}_grad_norm"] = nn.utils.clip_grad_norm_(group["params"], group["clip"])
        self.optimizer.step()
        return stats | {f"losses/{key}": x.detach() for key, x in losses.items()}


class RLAgent(Agent):
    """RL-LSTM: an LSTM over the embedding; RL-MEM: with a memory, written from h. Trained by reinforcement alone."""

    def networks(self, A, E, Z, U, W, K):
        args, self.remembers = self.args, self.args.agent == "rl_mem"
        self.carried = {"action": (A,), "noise": (Z,), "policy_h": (2, U), "policy_c": (2, U)}
        self.decoder = self.encoder  # there is none; who asks wants to know what is seen
        self.policy_lstm = DeepLSTM(E + K * W * self.remembers, U)
        self.policy, self.value = mlp(E + 2 * U, args.units, A), mlp(E + 2 * U, args.units, 1)
        if self.remembers:
            self.carried |= {"policy_read": (K, W), **memory_shapes(args.rows, W)}
            self.policy_keys, self.content = Keys(2 * U, K, W), nn.Linear(2 * U, Z)
        self.scales = {"policy": 1.0, "value": args.value_scale}
        return [dict(params=list(self.parameters()), lr=args.policy_learning_rate, clip=args.clip, name="policy")]

    def tick(self, embed, state, noise, choose):
        inputs = [embed, state["policy_read"].flatten(1)] if self.remembers else [embed]
        h, c = self.policy_lstm(torch.cat(inputs, -1), state["policy_h"], state["policy_c"])
        feat = torch.cat([embed, h.flatten(1)], -1)
        logits = self.policy(feat).float()
        outputs, new = {"logits": logits, "feat": feat}, {"policy_h": h, "policy_c": c, "action": choose(logits)}
        if self.remembers:
            new["policy_read"], weights = read(state["memory"], *self.policy_keys(h))
            new |= write(state, self.content(h.flatten(1)).float(), weights, self.args.gamma)
            outputs["policy_weights"] = weights
        return outputs, new

    def losses(self, batch):
        out = self.unroll(batch)
        value = self.value(out["feat"])[..., 0]  # (N, T+1)
        losses, _, _, stats = self.reinforce(batch, out, out["logits"].log_softmax(-1), value)
        return losses, stats


AGENTS = {"merlin": Agent, "rl_mem": RLAgent, "rl_lstm": RLAgent}  # --agent


# === Part 2: training =================================================================================================


def train(args: Args) -> dict:
    """Train as args say. -> {"run_dir", "global_step", "updates", "episodic_return", losses and statistics}."""
    if args.eval is not None:
        return show(args)
    saved = None if args.resume is None else load(Path(args.resume) / "checkpoint.pt", need=("args", "agent", "now"))
    args = resolve(inherit(args, args.resume, saved["args"], RESUMED) if saved else args)
    tune(args)
    now = saved["now"] if saved else dict(step=0, updates=0, recent=[])
    step, updates, recent = (now[key] for key in ("step", "updates", "recent"))
    for seed in random.seed, np.random.seed, torch.manual_seed:
        seed(args.seed + step)  # a resumed run draws new numbers
    envs = make_envs(args.env_id, args.num_envs, args.seed, args)
    agent = AGENTS[args.agent](envs.single_observation_space, envs.single_action_space, args)
    device, cuda, state = agent.device, agent.device.type == "cuda", agent.initial(args.num_envs)
    update, act = (Captured(fn, args.cuda_graph and cuda) for fn in (agent.update, agent.act))
    if saved:  # new episodes begin: the interrupted ones are lost
        agent.load_state_dict(saved["agent"])
        for group in saved["optimizer"]["param_groups"]:
            group["capturable"] = cuda  # the run may have begun on another device
        agent.optimizer.load_state_dict(saved["optimizer"])
    row, stats, began, since = start_row(envs, args.seed + step), {}, time.time(), step
    run_dir, writer = open_run(args, agent, saved)
    returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)  # of the episodes that go on
    try:
        while step < args.total_timesteps:
            before, rows = step, []
            start = {f"state/{key}": x.clone() for key, x in state.items()}  # a captured act overwrites its results
            for _ in range(args.window):
                state = act(agent.inputs(row, state))
                action = agent.env_action(state)
                rows.append({**row, "action": action, "noise": state["noise"].clone()})
                step += int((~row["is_last"]).sum())  # a reset is no step
                row = next_row(envs, action, row)
                returns, lengths = returns * ~row["is_first"] + row["reward"], (lengths + 1) * ~row["is_first"]
                for n in np.flatnonzero(row["is_last"]):
                    recent = [*recent, float(returns[n])][-100:]
                    writer.add_scalar("charts/episodic_return", returns[n], step)
                    writer.add_scalar("charts/episodic_length", lengths[n], step)

            # one row more, the first of the next window, is there for its value; its action is a dummy
            rows.append({**row, "action": np.zeros_like(action), "noise": torch.randn_like(state["noise"])})
            batch = {key: torch.stack([torch.as_tensor(x[key]) for x in rows], 1).to(device) for key in rows[0]}
            stats = update({**batch, **start})
            updates += 1
            if not cuda:  # a GPU would be waited for: there nan stops the run at the next record or checkpoint
                finite(stats)

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
                now = dict(step=step, updates=updates, recent=recent)
                parts = {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict(), "now": now}
                save(run_dir / "checkpoint.pt", **parts, args=asdict(args), source=SOURCE)
                writer.flush()
    except Exception as error:
        raise RuntimeError(f"{run_dir}, policy step {step:,}: {type(error).__name__}: {error}") from error
    finally:
        print(f"stopped   at step {step:,}; its checkpoint, if any, goes on by --resume {run_dir}", flush=True)
        writer.close()
        with suppress(Exception):  # the environments of a broken simulator may raise again
            envs.close()
    score = float(np.mean(recent or [np.nan]))
    return {"run_dir": str(run_dir), "global_step": step, "updates": updates, "episodic_return": score, **finite(stats)}


# === Part 3: plumbing =================================================================================================

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


def tune(args):
    """Settings of the process that make updates fast."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")  # it gives large blocks back, and to fetch them again is half of a CPU update
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map no block on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the heap
    torch.set_float32_matmul_precision("medium" if args.bf16 else "highest")  # medium: oneDNN on a CPU
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = args.bf16, True


# --- environments -----------------------------------------------------------------------------------------------------
class MemoryGame(gym.Env):
    """Concentration: cards lie face down, two of each symbol, and each step turns one for a moment. The partner of the
    card turned just before earns 2 and removes both; any other step costs 1. It ends when all are removed, or after two
    steps for each card. Action 0 turns the next card that was never turned (or the last one), action i card i - 1.
    Seen is the card that was turned and its symbol; image: the board of 64 x 64 pixels, with that card open.
    """

    def __init__(self, cards, image=False):
        if cards < 2 or cards % 2 or cards > 64:
            raise ValueError(f"{cards} cards; allowed: an even number, at most 64")
        self.cards, self.image = cards, image
        self.action_space = spaces.Discrete(cards + 1)
        board, numbers = spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.MultiDiscrete([cards, cards // 2])
        self.observation_space = board if image else numbers
        self.side = int(np.ceil(cards**0.5))  # of the board, in cards
        pixels = 64 // self.side - 2
        rng = np.random.default_rng(0)  # symbols are the same in every game: 5 x 5 patterns in many colours
        patterns = rng.integers(0, 2, (cards // 2, 5, 5, 1)) * rng.integers(100, 256, (cards // 2, 1, 1, 3))
        index = np.arange(pixels) * 5 // pixels
        self.pictures = patterns[:, index][:, :, index].astype(np.uint8)

    def observe(self):
        return self.render() if self.image else np.array([self.open, self.symbols[self.open]])

    def render(self):
        board, step, size = np.zeros((64, 64, 3), np.uint8), 64 // self.side, 64 // self.side - 2
        for card in range(self.cards):
            y, x = (step * place + 1 for place in divmod(card, self.side))
            board[y : y + size, x : x + size] = self.pictures[self.symbols[card]] if card == self.open else 60
        return board

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.symbols = self.np_random.permutation(self.cards) // 2
        self.turned, self.removed = np.zeros(self.cards, bool), np.zeros(self.cards, bool)
        self.open, self.turned[0], self.count = 0, True, 0
        return self.observe(), {}

    def step(self, action):
        never = [*np.flatnonzero(~self.turned), self.cards - 1]
        card = int(action) - 1 if action else int(never[0])
        pair = card != self.open and self.symbols[card] == self.symbols[self.open] and not self.removed[card]
        if pair:
            self.removed[[card, self.open]] = True
        self.open, self.turned[card], self.count = card, True, self.count + 1
        over = bool(self.removed.all())
        return self.observe(), 2.0 if pair else -1.0, over, self.count == 2 * self.cards and not over, {}


def adapt(env):
    """One environment -> Dict of uint8 images (H, W, C), integers (MultiDiscrete), and flat float32 vectors."""
    space, action = env.observation_space, env.action_space
    named = isinstance(space, spaces.Dict)
    parts = dict(space.spaces) if named else {"image" if is_image(space) else "vector": space}
    if not isinstance(action, spaces.Discrete):
        raise ValueError(f"action space {action}; allowed: Discrete")
    numeric = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    left_out = [key for key, part in parts.items() if not isinstance(part, numeric) or 0 in (part.shape or ())]
    assert len(left_out) < len(parts), f"observation space {space}; allowed: Box, Discrete, MultiDiscrete, MultiBinary"
    if left_out:
        warnings.warn(f"left out: {left_out}; allowed: Box, Discrete, MultiDiscrete, MultiBinary", stacklevel=1)
    taken = {"action", "reward", "is_first", "is_last", "is_terminal", "noise"}
    if any(key in taken or "." in key or hasattr(nn.ModuleDict, key) for key in parts):
        raise ValueError(f"observations {list(parts)}; allowed: no dots, no attributes of nn.ModuleDict, not {taken}")

    def adapted(part):
        if isinstance(part, spaces.Discrete | spaces.MultiDiscrete):
            counts = np.ravel(part.n if isinstance(part, spaces.Discrete) else part.nvec)
            return spaces.MultiDiscrete(counts), lambda x: np.ravel(x - part.start).astype(np.int64)
        if is_image(part):
            return part, lambda x: x
        return spaces.Box(-np.inf, np.inf, (spaces.flatdim(part),)), lambda x: np.float32(spaces.flatten(part, x))

    inner = {key: adapted(part) for key, part in parts.items() if key not in left_out}
    as_dict = lambda obs: {key: fn(obs[key] if named else obs) for key, (_, fn) in inner.items()}
    env = gym.wrappers.TransformAction(env, lambda a: a + action.start, spaces.Discrete(action.n))
    return gym.wrappers.TransformObservation(env, as_dict, spaces.Dict({key: part for key, (part, _) in inner.items()}))


def make_env(env_id, args, kwargs, evaluation):
    """One environment of gymnasium's registry."""
    game = re.fullmatch(r"MemoryGame-(\d+)-v0", env_id)
    env = MemoryGame(int(game[1]), **kwargs) if game else gym.make(env_id, **kwargs)
    if evaluation:
        env.unwrapped.render_mode = "rgb_array"  # afterwards: a constructor need not know this mode
    env = gym.wrappers.RepeatAction(env, args.action_repeat)
    return adapt(gym.wrappers.TimeLimit(env, args.eval_steps) if evaluation else env)  # a task need not end by itself


def make_envs(env_id, num_envs, seed, args, evaluation=False):
    """-> gymnasium vector environment: Dict observations, NEXT_STEP autoreset, Discrete actions."""
    try:
        kwargs = dict(json.loads(args.env_kwargs))
        make, mode = partial(make_env, env_id, args, kwargs, evaluation), gym.vector.AutoresetMode.NEXT_STEP
        spawn = partial(gym.vector.AsyncVectorEnv, context="spawn")  # a forked process may hang in CUDA or OpenGL
        several = gym.vector.SyncVectorEnv if evaluation or args.vector == "sync" else spawn
        envs = several([make] * num_envs, autoreset_mode=mode)
        envs._add_info = lambda infos, *_: infos  # nobody reads them, and they need not fit together
        sizes = {space.shape[:2] for space in envs.single_observation_space.values() if is_image(space)}
        if sizes - {(64, 64)}:
            raise ValueError(f"images of {sizes}; allowed: 64 x 64")
    except Exception as error:  # of any kind: users' constructors run here
        place = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{type(error).__name__} at {place.filename}:{place.lineno}"
        fail(f"--env-id {env_id} --env-kwargs {args.env_kwargs}: {error} ({at}); allowed: a known id, a JSON object")
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
    flags = {**asdict(Args()), **saved, **OF_A_CALL}
    given = {key: value for key, value in asdict(args).items() if value != getattr(Args, key)}
    if flags.keys() != asdict(args).keys():
        fail(f"{path}: its flags are those of another version of this file; allowed: the version stored in it (source)")
    for key, value in given.items():
        if key not in free and value != flags[key]:
            flag, allowed = f"--{key.replace('_', '-')} {value}", ", ".join(free).replace("_", "-")
            fail(f"{flag}: the run at {path} has {flags[key]}; allowed to change: {allowed}")
    return Args(**{**flags, **given})


def load_agent(path, args=None):
    """path: checkpoint or run folder -> the agent, its Args. args: what --eval may change, such as device."""
    saved = load(path, need=("args", "agent"))
    args = resolve(inherit(args or Args(), path, saved["args"], SHOWN))
    envs = make_envs(args.env_id, 1, args.seed, args)
    agent = AGENTS[args.agent](envs.single_observation_space, envs.single_action_space, args)
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


def open_run(args, agent, saved):
    """Make the run folder, say what is about to run. -> folder, TensorBoard, with --track mirrored to W&B too."""
    from torch.utils.tensorboard import SummaryWriter

    wandb = __import__("wandb") if args.track else None  # missing: known before anything is written
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume) if saved else Path(args.run_root) / name
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(saved))
    except OSError as error:
        fail(f"--run-root {args.run_root}: {error}; allowed: a folder that can be written, and a run of its own")
    slow = "CPU  <-- WARNING: no GPU; images are slow" if agent.decoder.images else "CPU (vectors: fine)"
    device = torch.cuda.get_device_name(agent.device) if agent.device.type == "cuda" else slow
    print(f"run       {run_dir}\ndevice    {device}; PyTorch {torch.__version__}")
    for key, shape in agent.decoder.shapes.items():
        hint = "  <-- WARNING: a picture? It has to be uint8 (H, W, C): gymnasium.wrappers" if shape[0] > 1000 else ""
        print(f"observes  {key} {shape} -> {'convolutions' if key in agent.decoder.images else 'as numbers'}{hint}")
    print(f"agent     {args.agent}, {sum(p.numel() for p in agent.params):,} parameters ({args.size})")
    print(f"training  {args.window} steps of {args.num_envs} environments an update, each window once", flush=True)
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
