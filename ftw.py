# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy", "gymnasium>=1.3", "tyro", "tensorboard"]
# ///
"""For The Win: a population that learns to play capture the flag, each agent on a reward of its own, which evolves.

Paper: Jaderberg et al., "Human-level performance in 3D multiplayer games with population-based reinforcement
learning", Science 364 (2019), arXiv 1807.01281. "Lecture" is the course NPFL139, which tells it after MERLIN.

    python ftw.py                                         four agents, 2 against 2 on 9 x 9 boards, on a CPU in an hour
    python ftw.py --population 1 --reward outcome         self-play, paid for winning alone; --reward events: shaped
    python ftw.py --resume runs/...                       go on where the last checkpoint stands
    python ftw.py --eval runs/...                         the best agent against scripted ones, match.gif

Symbols in shapes: G games at once, N players of a game, B places that one agent plays in all games, T steps of a
window, A numbers of an action, E embedding, Z latent variables, U units of the LSTMs, R rows of the memory with W
numbers, K reads, X events, P agents.

A row of experience holds obs_t, the events that came with it, and the action chosen after seeing obs_t. The agent at
row t sees obs[t], its own reward for the events of row t, and action[t-1]. All games of a batch begin and end together.

Differs from the paper, on purpose:
- A game of our own on small boards in the place of Quake III Arena; four agents in the place of 30.
- Matches are played and rated in batches, from all of which an agent learns at once; some are for the rating alone.
- The memory is that of MERLIN by default, where z is stored and read by content; --memory dnc: as in the paper.
- Losses are means over rows, not sums; the gradient norm is bounded, and RMSProp corrected for its first steps.
- First genes lie closer together, those of the KL lower; a capture is worth 3, to be tagged without a flag -1/4.
- At first z has a deviation of 0.05 and a mean three times as large, in the place of 0.1 and 1: learning starts sooner.
- Reward prediction is on the window that is learned from: half of the weight on rows with a reward, no older ones.
- Half of the matches are against the random player: among equals that let nobody pass, none learns to go round walls.
"""

import ctypes
import importlib
import json
import os
import platform
import random
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from torch import nn

SOURCE = Path(__file__).read_text(encoding="utf-8")  # goes into every checkpoint: the code that really ran


@dataclass
class Args:
    env_id: str = "CaptureTheFlag"  # the game of this file, or module:make, called as make(games, seed, **env_kwargs)
    env_kwargs: str = "{}"  # arguments for the game, as JSON; of this one: length, view, image
    players: int = 2  # of each team, 1 to 4; of the game of this file
    map: int = 9  # rows and columns of a board with its border: odd, 9 to 17; of the game of this file
    games: int | None = None  # played at once; by --size, as what else is open below; small: 64 times the agents
    population: int | None = None  # agents; paper 30; 1: self-play
    reward: Literal["evolved", "events", "outcome"] = "evolved"  # w evolves | is the same for all | +-1 at the end
    core: Literal["ftw", "flat", "lstm"] = "ftw"  # two time scales | without the slow unit | an LSTM without latents
    memory: Literal["merlin", "dnc", "none"] = "merlin"  # of the core, but of lstm's; paper: dnc
    seed: int = 1  # of weights, sampling, matches and boards
    size: Literal["debug", "small", "paper"] = "small"  # networks, window, population and matches; small: for a CPU
    total_games: int | None = None  # matches; small 24_000 times the agents, paper 450_000 times
    window: int | None = None  # T, steps through which gradients flow; paper 100
    checkpoint_every: int | None = None  # matches between checkpoints
    log_every: float = 10.0  # seconds between progress lines
    gamma: float | None = None  # discount; paper 0.99
    value_scale: float = 0.5  # of the baseline's loss
    clip: float = 0.2  # largest gradient norm
    decay: float = 0.99  # of the mean square of gradients
    eps: float = 1e-10  # of the optimiser, inside the root; paper 1e-5 for sums, where means have smaller gradients
    elo_step: float = 128.0  # the most points that a place in all matches of a batch is worth
    evolve_every: int | None = None  # matches of an agent between two evolutions of it; paper about 1,000
    evolve_above: float = 0.7  # win probability of a team of another agent from which on it is copied
    mutation: float = 0.2  # largest change of a gene, as a share
    mutation_chance: float | None = None  # that a gene changes when an agent is copied; paper 0.05
    rate_every: int | None = None  # batches of matches between two rounds of rating matches
    random_share: float = 0.5  # share of matches in which one team is the random player; paper 0
    stoch: int | None = None  # Z; paper 256
    units: int | None = None  # U and E, and hidden units of the heads; paper 256
    rows: int | None = None  # R; paper 450
    row_size: int | None = None  # W of --memory dnc; paper 32
    reads: int | None = None  # K
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    bf16: bool = True  # TF32 products on a GPU, bfloat16 ones on a CPU with AMX
    cuda_graph: bool = True  # replay the step of acting, and the whole update, as CUDA graphs on a GPU
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on from
    eval: str | None = None  # run folder or checkpoint to evaluate
    eval_games: int = 400  # matches of --eval against each opponent
    track: bool = False  # mirror TensorBoard to Weights & Biases (pip install wandb; WANDB_PROJECT, WANDB_ENTITY)


# fmt: off
SIZES = {
    "debug": dict(stoch=8, units=16, rows=8, row_size=8, reads=1, games=2, population=3, window=8, gamma=0.95,
                  total_games=8, checkpoint_every=4, evolve_every=8, mutation_chance=0.5, rate_every=3),
    "small": dict(stoch=32, units=64, rows=32, row_size=16, reads=1, games=64, population=4, window=16, gamma=0.9,
                  total_games=24_000, checkpoint_every=2_000, evolve_every=2_000, mutation_chance=0.3, rate_every=20),
    "paper": dict(stoch=256, units=256, rows=450, row_size=32, reads=4, games=8, population=30, window=100, gamma=0.99,
                  total_games=450_000, checkpoint_every=500, evolve_every=1_000, mutation_chance=0.05, rate_every=100),
}
FOR_EACH = ("games", "total_games", "checkpoint_every")  # of these, SIZES has the share of one agent
# fmt: on
GENES = {  # what evolves, with the range of first values, log-uniform; the weights of the events come after these
    "learning_rate": (1e-3, 2e-3),
    "entropy": (1.2e-3, 2.5e-3),  # weights of losses, from here on
    "kl": (1e-6, 1e-4),
    "kl_prior": (1e-7, 1e-5),
    "pixel_control": (0.01, 0.1),
    "reward_prediction": (0.01, 0.1),
    "slow_gradient": (0.1, 1.0),  # factor on the gradient from the fast to the slow unit
    "period": (5, 20),  # tau, steps between two of the slow unit: a whole number, uniform
}
PERIOD = list(GENES).index("period")
WEIGHTS = (0.2, 0.5)  # of w, one for each event; narrow, as the rates above: four agents, not 30


def resolve(args: Args) -> Args:
    """Fill what was left open (None) from the preset of --size. An explicit flag wins."""
    preset = SIZES[args.size]
    times = dict.fromkeys(FOR_EACH, max(1, args.population or preset["population"]))
    args = replace(args, **{key: x * times.get(key, 1) for key, x in preset.items() if getattr(args, key) is None})
    for name, value in asdict(args).items():
        least = 0 if name in ("seed", "log_every", "value_scale", "mutation", "elo_step", "random_share") else 1e-12
        most = 1 if name in "gamma decay mutation mutation_chance evolve_above random_share".split() else 2**31
        if type(value) in (int, float) and not least <= value <= most:
            fail(f"--{name.replace('_', '-')} {value}: allowed: {'more than 0' if least else '0 or more'}, to {most:g}")
    if args.population == 1 and args.reward == "evolved":
        fail("--reward evolved: allowed: with --population 2 or more, as one alone does not evolve")
    return args


# === Part 1: the algorithm ============================================================================================


def onehot(index, count):
    """Integers (...) -> one-hot (..., count); F.one_hot would wait for the device."""
    return (index[..., None] == torch.arange(count, device=index.device)).float()


def mlp(inputs, units, outputs):
    """Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, outputs))


class ImageEncoder(nn.Module):
    """The paper's, but for the last ReLU: 8x8 stride 4, 4x4 stride 2, two 3x3, each with its input added to it."""

    def __init__(self, shape, units):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(shape[2], 32, 8, 4), nn.Conv2d(32, 64, 4, 2)
        self.conv3, self.conv4 = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        rows, columns = (((side - 8) // 4 + 1 - 4) // 2 + 1 for side in shape[:2])
        self.out = nn.Linear(64 * rows * columns, units)

    def forward(self, image):
        """(B, H, W, C) in 0 to 1 -> (B, E)."""
        x = F.relu(self.conv2(F.relu(self.conv1(image.permute(0, 3, 1, 2).contiguous()))))
        total = x + self.conv3(x)  # the second addition takes this sum as it was before its ReLU
        total = total + self.conv4(F.relu(total))
        return F.relu(self.out(F.relu(total).flatten(1)))


def read(memory, keys, strengths):
    """Read by content: softmax over rows of strength times cosine similarity. Empty rows take part, with similarity 0.
    memory: (N, R, W); keys: (N, K, W); strengths: (N, K), above 0 -> what was read (N, K, W), weights (N, K, R).
    """
    lengths = keys.norm(dim=-1)[..., None] * memory.norm(dim=-1)[:, None]  # (N, K, R)
    cosine = keys @ memory.transpose(1, 2) / (lengths + 1e-6)  # (N, K, R)
    weights = (strengths[..., None] * cosine).softmax(-1)  # (N, K, R)
    return weights @ memory, weights


class Nothing(nn.Module):
    """--memory none: what a memory has to offer."""

    def __init__(self, units, args):
        super().__init__()
        self.shapes, self.width = {}, 0  # of its state; numbers that a read gives

    def access(self, h, memory):
        """A unit's output h (B, U), state {key: (B, ...)} -> what is read (B, width), the state after it."""
        return h[:, :0], memory

    def store(self, z, memory):
        """At the end of a step, z (B, Z) -> the state after it."""
        return memory


class Merlin(Nothing):
    """MERLIN's memory, without its retroactive half: a row for each step's z, read by content; when it is full, the
    oldest row gives way. What is stored carries no gradient.
    """

    def __init__(self, units, args):
        super().__init__(units, args)
        self.reads, self.size, self.rows = args.reads, args.stoch, args.rows
        self.width = args.reads * args.stoch
        self.keys = nn.Linear(units, args.reads * (args.stoch + 1))
        self.shapes = {"memory": (args.rows, args.stoch), "count": ()}

    def access(self, h, memory):
        x = self.keys(h).float().unflatten(1, (self.reads, -1))
        found, _ = read(memory["memory"], x[..., :-1], F.softplus(x[..., -1]))
        return found.flatten(1), memory

    def store(self, z, memory):
        row = onehot(memory["count"].long() % self.rows, self.rows)[..., None]  # (B, R, 1)
        kept = memory["memory"] * (1 - row) + row * z.detach()[:, None]
        return {"memory": kept, "count": memory["count"] + 1}


class DNC(Nothing):
    """The memory of the differentiable neural computer (Graves et al. 2016): each access frees and allocates, writes a
    row, and reads by content or along the order of writing. One write head, K read heads. Products are exponentials of
    sums of logs: the gradients of prod and cumprod wait for the device, and so cannot be captured.
    """

    def __init__(self, units, args):
        super().__init__(units, args)
        K, W, R = args.reads, args.row_size, args.rows
        self.reads, self.size, self.width = K, W, K * W
        self.parts = [K * W, K, W, 1, W, W, K, 1, 1, 3 * K]  # of the interface, in the order of access
        self.interface = nn.Linear(units, sum(self.parts))
        self.shapes = {"memory": (R, W), "usage": (R,), "link": (R, R), "order": (R,), "written": (R,), "read": (K, R)}

    def access(self, h, memory):
        K, W = self.reads, self.size
        parts = self.interface(h).float().split(self.parts, -1)
        keys, strengths, key, strength, erase, content, free, allocate, write, modes = parts
        M, usage, before = memory["memory"], memory["usage"], memory["read"]
        retention = (1 - free.sigmoid()[..., None] * before).clamp(min=1e-6).log().sum(1).exp()  # (B, R)
        usage = (usage + memory["written"] - usage * memory["written"]) * retention
        ordered, index = (usage + 1e-6).sort(-1)  # least used first
        room = (1 - ordered) * torch.cat([torch.ones_like(ordered[:, :1]), ordered[:, :-1].log().cumsum(-1).exp()], -1)
        room = torch.zeros_like(room).scatter(-1, index, room)  # (B, R)
        _, similar = read(M, key[:, None], 1 + F.softplus(strength))
        allocate, write = allocate.sigmoid(), write.sigmoid()
        written = write * (allocate * room + (1 - allocate) * similar[:, 0])  # (B, R)
        M = M * (1 - written[..., None] * erase.sigmoid()[:, None]) + written[..., None] * content[:, None]
        link = (1 - written[:, :, None] - written[:, None]) * memory["link"]  # (B, R, R)
        link = (link + written[:, :, None] * memory["order"][:, None]) * (1 - torch.eye(M.shape[1], device=M.device))
        order = (1 - written.sum(-1, keepdim=True)) * memory["order"] + written
        similar = read(M, keys.unflatten(1, (K, W)), 1 + F.softplus(strengths))[1]  # (B, K, R)
        modes = modes.unflatten(1, (K, 3)).softmax(-1)[..., None]  # (B, K, 3, 1)
        weights = modes[:, :, 0] * (before @ link) + modes[:, :, 1] * similar + modes[:, :, 2] * (before @ link.mT)
        new = {"memory": M, "usage": usage, "link": link, "order": order, "written": written, "read": weights}
        return (weights @ M).flatten(1), new


def kl_gaussian(mean, std, mean2, std2):
    """KL(N(mean, std) || N(mean2, std2)) in nats of S independent normals, all (..., S) -> (...)."""
    return (std2.log() - std.log() + (std.square() + (mean - mean2).square()) / (2 * std2.square()) - 0.5).sum(-1)


def scale_gradient(x, factor):
    """x, with its gradient times factor."""
    return factor * x + (1 - factor) * x.detach()


class Unit(nn.Module):
    """A variational unit: an LSTM, what it reads from the memory, and the mean and deviation of a normal over z."""

    def __init__(self, inputs, width, args):
        super().__init__()
        self.lstm = nn.LSTMCell(inputs, args.units)
        self.mean, self.std = (nn.Linear(args.units + width, args.stoch) for _ in range(2))
        self.mean.weight.data.mul_(3)  # at first z would be noise alone, and learning waits until it is not

    def forward(self, x, h, c, access):
        """access: h -> what is read, memory. -> h, c, what was read, mean, deviation (B, Z), memory."""
        h, c = self.lstm(x, (h, c))
        found, memory = access(h)
        out = torch.cat([h, found], -1)
        std = F.softplus(self.std(out).float() - 3) + 1e-6  # 0.05 at first
        return h, c, found, self.mean(out).float(), std, memory


class Core(nn.Module):
    """Two variational units over one memory. The slow one ticks once in tau steps and gives the prior P; the fast one
    gives the posterior Q at each, from which z is drawn. --core flat: no slow unit, P = N(0, 0.1); lstm: z is h.
    """

    def __init__(self, inputs, args):
        super().__init__()
        self.kind, U, Z = args.core, args.units, args.stoch
        memories = {"none": Nothing, "merlin": Merlin, "dnc": DNC}
        self.memory = memories["none" if self.kind == "lstm" else args.memory](U, args)
        width = self.memory.width
        self.size = U if self.kind == "lstm" else Z  # of z
        self.carried = {"h": (U,), "c": (U,)}  # shapes of the state
        if self.kind == "lstm":
            self.lstm = nn.LSTMCell(inputs, U)
            return
        self.carried |= {"z": (Z,), "found": (width,), **{f"memory/{key}": x for key, x in self.memory.shapes.items()}}
        self.fast = Unit(inputs + Z + width + (U + 2 * Z) * (self.kind == "ftw"), width, args)
        if self.kind == "ftw":
            self.slow = Unit(U + width, width, args)
            self.carried |= {"slow_h": (U,), "slow_c": (U,), "prior_mean": (Z,), "prior_std": (Z,)}

    def forward(self, x, state, noise, ticks, factor):
        """One step. x: (B, inputs); noise: (B, Z); ticks: (B) bool; factor: on the gradient into the slow unit.
        -> z (B, size), outputs: mean and deviation of Q and P (B, Z); the next state.
        """
        if self.kind == "lstm":
            h, c = self.lstm(x, (state["h"], state["c"]))
            return h, {}, {"h": h, "c": c}
        inputs, new = [x, state["z"], state["found"]], {}
        memory = {key: state[f"memory/{key}"] for key in self.memory.shapes}
        prior = torch.zeros_like(state["z"]), torch.full_like(state["z"], 0.1)
        if self.kind == "ftw":
            names = "slow_h", "slow_c", "prior_mean", "prior_std"
            new = {key: state[key] for key in names}
            if ticks.is_cuda or ticks.any():  # a captured step cannot ask
                access = partial(self.memory.access, memory=memory)
                seen = torch.cat([state["h"], state["found"]], -1)  # of the step before
                h, c, _, mean, std, changed = self.slow(seen, state["slow_h"], state["slow_c"], access)
                pick = lambda a, b: torch.where(ticks.view(-1, *[1] * (a.dim() - 1)), a, b)  # between ticks b, bitwise
                new = {key: pick(x, state[key]) for key, x in zip(names, (h, c, mean, std), strict=True)}
                memory = {key: pick(value, memory[key]) for key, value in changed.items()}
            prior = new["prior_mean"], new["prior_std"]
            inputs += [scale_gradient(y, factor) for y in (new["slow_h"], *prior)]
        access = partial(self.memory.access, memory=memory)
        h, c, found, mean, std, memory = self.fast(torch.cat(inputs, -1), state["h"], state["c"], access)
        z = mean + std * noise
        memory = self.memory.store(z, memory)
        new |= {"h": h, "c": c, "z": z, "found": found, **{f"memory/{key}": value for key, value in memory.items()}}
        return z, {"mean": mean, "std": std, "prior_mean": prior[0], "prior_std": prior[1]}, new


class PixelControl(nn.Module):
    """UNREAL: z -> values (B, 20, 20, n) of each part of the action, for the change of 4x4 pixels of the middle."""

    def __init__(self, inputs, parts):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, 32 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (32, 7, 7)))
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 32, 9, 2, padding=1), nn.ReLU())  # 19 x 19
        self.heads = nn.ModuleList(nn.ConvTranspose2d(32, n, 4, padding=1) for n in (1, *parts))  # 20 x 20

    def forward(self, z):
        x = self.up(self.trunk(z))
        value, *advantages = (head(x).float().permute(0, 2, 3, 1) for head in self.heads)
        return [value + a - a.mean(-1, keepdim=True) for a in advantages]


def pixel_change(image):
    """uint8 (B, T+1, H, W, C) -> (B, T, 20, 20): mean change of 4x4 cells of the middle 80x80, pixels in 0 to 1."""
    rows, columns = ((side - 80) // 2 for side in image.shape[2:4])
    x = image[:, :, rows : rows + 80, columns : columns + 80].float() / 255
    return F.avg_pool2d((x[:, 1:] - x[:, :-1]).abs().mean(-1), 4)  # of (B, T, 80, 80)


def vtrace(reward, value, logp, logp_then, discount):
    """IMPALA's targets, with both clips at 1: rho_t = c_t = min(1, pi / mu).
    v_t = V_t + rho_t (r_{t+1} + g_{t+1} V_{t+1} - V_t) + g_{t+1} c_t (v_{t+1} - V_{t+1}), and at the end v = V.
    reward, value, discount: (B, T+1), index t belongs to row t; logp, logp_then: (B, T), now and when it acted.
    -> v (B, T), advantages rho_t (r_{t+1} + g_{t+1} v_{t+1} - V_t) (B, T).
    """
    rho = (logp - logp_then).exp().clamp(max=1)  # (B, T)
    delta = rho * (reward[:, 1:] + discount[:, 1:] * value[:, 1:] - value[:, :-1])
    errors = [torch.zeros_like(value[:, 0])]
    for t in range(delta.shape[1] - 1, -1, -1):
        errors.append(delta[:, t] + discount[:, t + 1] * rho[:, t] * errors[-1])
    target = value + torch.stack(errors[::-1], 1)  # (B, T+1)
    return target[:, :-1], rho * (reward[:, 1:] + discount[:, 1:] * target[:, 1:] - value[:, :-1])


class Agent(nn.Module):
    """One of the population: networks, optimiser and genes. Its rewards: w . points . events; w are genes, too."""

    def __init__(self, obs_space, action_space, points, args):
        super().__init__()
        self.args, self.device = args, pick_device(args)
        self.parts = action_space.nvec.tolist()  # choices of each part of an action
        self.image = obs_space.dtype == np.uint8 and len(obs_space.shape) == 3
        if self.image and min(obs_space.shape[:2]) < 80:
            fail(f"images of {obs_space.shape}: allowed: 80 x 80 and larger, as pixel control takes their middle")
        layers = nn.Flatten(), nn.Linear(int(np.prod(obs_space.shape)), args.units), nn.ReLU()
        self.encoder = ImageEncoder(obs_space.shape, args.units) if self.image else nn.Sequential(*layers)
        self.core = Core(args.units + sum(self.parts) + 1, args)
        self.policy = nn.ModuleList(mlp(self.core.size, args.units, n) for n in self.parts)
        self.value = mlp(self.core.size, args.units, 1)
        self.sign_of_reward = mlp(3 * args.units, min(128, args.units), 3)  # UNREAL's reward prediction
        self.pixels = PixelControl(self.core.size, self.parts) if self.image else None
        self.register_buffer("genes", torch.zeros(len(GENES) + len(points)))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))  # updates so far
        self.register_buffer("points", torch.as_tensor(points))
        self.to(self.device)
        self.params = list(self.parameters())
        self.squares = [torch.zeros_like(p) for p in self.params]  # RMSProp

    def gene(self, name):
        """-> (), on the device, where a captured update reads it."""
        return self.genes[list(GENES).index(name)]

    def rewards(self, events, won):
        """(B, X) counts, won (B): +1 or -1 at the end of a match, else 0 -> rewards (B)."""
        return won if self.args.reward == "outcome" else events @ (self.genes[len(GENES) :] * self.points)

    def initial(self, B):
        """State of B places before a match: zeros. The slow unit ticks before anything reads its prior."""
        zeros = lambda *shape: torch.zeros(B, *shape, device=self.device)
        state = {key: zeros(*shape) for key, shape in self.core.carried.items()}
        return {"action": zeros(sum(self.parts)), **state}

    def embed(self, obs):
        """(B, ...) -> (B, E). Images come to 0..1."""
        return self.encoder(obs.float() / 255 if self.image else obs.float())

    def step(self, embed, reward, state, noise, ticks):
        """One step of the core. embed: (B, E) -> z, outputs, the state but for its action."""
        x = torch.cat([embed, state["action"], reward.tanh()[:, None]], -1)
        return self.core(x, state, noise, ticks, self.gene("slow_gradient"))

    @torch.no_grad()
    def act(self, inputs):
        """inputs: "obs" (B, ...), "reward" (B), "ticks" (B) bool, "state/...". -> "state/..." after it, "action"
        (B, parts) int64, its "logp" (B), "noise" (B, Z).
        """
        state = {key.removeprefix("state/"): x for key, x in inputs.items() if key.startswith("state/")}
        noise = torch.randn(len(inputs["reward"]), self.args.stoch, device=self.device)
        z, _, new = self.step(self.embed(inputs["obs"]), inputs["reward"], state, noise, inputs["ticks"])
        logps = [head(z).float().log_softmax(-1) for head in self.policy]
        draws = [(x - torch.rand_like(x).log_().neg_().log_()).argmax(-1) for x in logps]  # Gumbel-max
        logp = sum(x.gather(-1, i[:, None])[:, 0] for x, i in zip(logps, draws, strict=True))
        new["action"] = torch.cat([onehot(i, n) for i, n in zip(draws, self.parts, strict=True)], -1)
        out = {"action": torch.stack(draws, -1), "logp": logp, "noise": noise}
        return out | {f"state/{key}": x for key, x in new.items()}

    def unroll(self, batch):
        """The window again, by the actions and noise of acting, with gradients. -> z (B, T+1, size), embed (B, T+1, E),
        outputs (B, T+1, Z).
        """
        state = {key.removeprefix("state/"): x for key, x in batch.items() if key.startswith("state/")}
        shape, obs = batch["reward"].shape, batch["obs"]
        embed = self.embed(obs.flatten(0, 1)).unflatten(0, shape)  # (B, T+1, E)
        split = zip(batch["action"].unbind(-1), self.parts, strict=True)
        actions = torch.cat([onehot(i, n) for i, n in split], -1)  # (B, T+1, A)
        zs, outs = [], []
        for t in range(shape[1]):
            row = {key: batch[key][:, t] for key in ("reward", "noise", "ticks")}
            z, out, new = self.step(embed[:, t], state=state, **row)
            state = {**new, "action": actions[:, t]}
            zs.append(z)
            outs.append(out)
        return torch.stack(zs, 1), embed, {key: torch.stack([x[key] for x in outs], 1) for key in outs[0]}

    def losses(self, batch):
        """batch: rows 0..T, (B, T+1, ...) each, and "state/...", the state before; "last" (B, T+1): the match is over.
        -> {name: (B, T)}, and statistics.
        """
        z, embed, out = self.unroll(batch)
        logps = [head(z[:, :-1]).float().log_softmax(-1) for head in self.policy]  # (B, T, n) each
        action = batch["action"][:, :-1]
        logp = sum(x.gather(-1, action[..., i, None])[..., 0] for i, x in enumerate(logps))  # (B, T)
        entropy = -sum((x * x.exp()).sum(-1) for x in logps)
        value = self.value(z)[..., 0].float()  # (B, T+1)
        discount = self.args.gamma * (1 - batch["last"].float())
        target, advantage = vtrace(batch["reward"], value.detach(), logp.detach(), batch["logp"][:, :-1], discount)
        losses = {"policy": -logp * advantage, "value": (target - value[:, :-1]).square() / 2, "entropy": -entropy}
        if out:
            posterior, prior = (out["mean"], out["std"]), (out["prior_mean"], out["prior_std"])
            losses["kl"] = kl_gaussian(*posterior, *prior)[:, :-1]
        if self.core.kind == "ftw":  # only where the slow unit ticks
            fixed = torch.zeros_like(prior[0]), torch.full_like(prior[1], 0.1)
            losses["kl_prior"] = (kl_gaussian(*prior, *fixed) * batch["ticks"])[:, :-1]
        losses["reward_prediction"] = self.reward_prediction(embed, batch["reward"], batch["weight"][:, :1])
        if self.image:
            losses["pixel_control"] = self.pixel_control(z, batch)
        stats = {"value": value, "advantage": advantage.abs(), "reward": batch["reward"][:, 1:]}
        return losses, {f"stats/{key}": x.detach().mean() for key, x in stats.items()}

    def reward_prediction(self, embed, reward, real):
        """Three embeddings in a row -> is the reward after them none, good or bad? Half of the weight on each of none
        and some. (B, T+1, E), (B, T+1), real: weight of each place (B, 1) -> (B, T), 0 for the first two rows.
        """
        triples = torch.cat([embed[:, :-3], embed[:, 1:-2], embed[:, 2:-1]], -1)  # (B, T-2, 3*E)
        label = reward[:, 3:].sign().long() % 3  # (B, T-2)
        logp = self.sign_of_reward(triples).float().log_softmax(-1)
        some = (label > 0).float()
        share = (some * real).mean() / real.mean()
        weight = some / share.clamp(min=1e-6) + (1 - some) / (1 - share).clamp(min=1e-6)
        return F.pad(-logp.gather(-1, label[..., None])[..., 0] * weight / 2, (2, 0))

    def pixel_control(self, z, batch):
        """n-step Q-learning of the change of pixels, discount 0.9, each part of the action on its own. -> (B, T)."""
        change = pixel_change(batch["obs"])  # (B, T, 20, 20)
        qs = [q.unflatten(0, z.shape[:2]) for q in self.pixels(z.flatten(0, 1))]  # (B, T+1, 20, 20, n)
        last, loss = batch["last"].float()[..., None, None], 0.0
        for i, q in enumerate(qs):
            target, targets = q[:, -1].detach().amax(-1), []  # (B, 20, 20)
            for t in range(change.shape[1] - 1, -1, -1):
                target = change[:, t] + 0.9 * (1 - last[:, t + 1]) * target
                targets.append(target)
            index = batch["action"][:, :-1, i, None, None, None].expand(*change.shape, 1)
            taken = q[:, :-1].gather(-1, index)[..., 0]
            loss = loss + (torch.stack(targets[::-1], 1) - taken).square().mean((2, 3)) / 2
        return loss

    def update(self, batch):
        """One gradient step, no host sync. batch: see losses -> 0-d statistics."""
        losses, stats = self.losses(batch)
        weight = batch["weight"][:, :1] / batch["weight"].sum(0)[0]  # (B, 1)
        losses = {key: (loss * weight).sum(0).mean() for key, loss in losses.items()}
        fixed = {"policy": 1.0, "value": self.args.value_scale}  # the other weights are genes
        total = sum((self.gene(key) if key in GENES else fixed[key]) * x for key, x in losses.items())
        grads = torch.autograd.grad(total, self.params, materialize_grads=True)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        self.rmsprop(torch._foreach_mul(grads, (self.args.clip / norm.clamp(min=self.args.clip))))
        stats |= {f"losses/{key}": x.detach() for key, x in losses.items()}
        return {**stats, "losses/total": total.detach(), "stats/grad_norm": norm}

    @torch.no_grad()
    def rmsprop(self, grads):
        """v <- decay v + (1 - decay) g^2,  p <- p - lr g / sqrt(v / (1 - decay^t) + eps); lr is a gene. Without the
        correction by t, as in the paper, first steps are ten times as long. All of it lies on the device.
        """
        decay, rate = self.args.decay, self.gene("learning_rate")
        torch._foreach_mul_(self.squares, decay)
        torch._foreach_addcmul_(self.squares, grads, grads, 1 - decay)
        roots = torch._foreach_div(self.squares, (1 - decay ** self.count.add_(1)).float())
        torch._foreach_add_(roots, self.args.eps)
        torch._foreach_sqrt_(roots)
        torch._foreach_sub_(self.params, torch._foreach_mul(torch._foreach_div(grads, roots), rate))

    @torch.no_grad()
    def copy(self, other):
        """Weights, genes and the optimiser of another agent."""
        self.load_state_dict(other.state_dict())
        torch._foreach_copy_(self.squares, other.squares)


def first_genes(count, rng, middle=False):
    """Random genes (GENES and weights of `count` events), or the geometric middle of their ranges. -> float32."""
    ranges = np.log([*GENES.values(), *[WEIGHTS] * count])
    genes = np.exp(ranges.mean(1) if middle else rng.uniform(*ranges.T))
    genes[PERIOD] = 10 if middle else rng.integers(5, 21)
    return np.float32(genes)


def mutate(genes, rng, args):
    """Each gene, by chance, times a factor near 1: no sign flips; tau is drawn anew from 5 to 20. -> float32."""
    changes = rng.random(len(genes)) < args.mutation_chance
    changes[len(GENES) :] &= args.reward == "evolved"
    new = genes * np.where(changes, rng.uniform(1 - args.mutation, 1 + args.mutation, len(genes)), 1)
    new[PERIOD] = rng.integers(5, 21) if changes[PERIOD] else genes[PERIOD]
    return np.float32(new)


def win_probability(own, other):
    """Elo's: ratings -> probability that the first wins."""
    return 1 / (1 + 10 ** ((other - own) / 400))


def elo(ratings, teams, outcome, step):
    """teams: (G, 2, players) index of the rated; outcome: (G) of the first team. A team has the sum of its ratings, and
    each member gets step * (outcome - expected). -> new ratings, with the same sum.
    """
    strength = ratings[teams].sum(-1)  # (G, 2)
    gain = step * (outcome - win_probability(strength[:, 0], strength[:, 1]))  # (G)
    new = ratings.copy()
    np.add.at(new, teams, np.stack([gain, -gain], 1)[..., None])
    return new


def make_matches(ratings, games, places, rng):
    """One agent at random; the others by a normal density (mean 1/2, deviation 1/6) of its estimated probability to win
    against them, nobody twice where there are enough; then all in random order. -> (games, places).
    """
    matches = np.empty((games, places), int)
    for g in range(games):
        chosen = [int(rng.integers(len(ratings)))]
        while len(chosen) < places:
            odds = np.exp(-0.5 * ((win_probability(ratings[chosen[0]], ratings) - 0.5) * 6) ** 2) + 1e-9
            odds[chosen if len(chosen) < len(ratings) else []] = 0  # else all are in it
            chosen.append(int(rng.choice(len(ratings), p=odds / odds.sum())))
        matches[g] = rng.permutation(chosen)
    return matches


class Match:
    """Games in progress. players: agents, or names of scripted players; who: (G, N), which of them plays in each place;
    act: {index of an agent: its act}, captured or not. On a GPU the B places of an agent are padded to a multiple of 32
    by its first one, with weight 0, so that few shapes are captured.
    """

    def __init__(self, game, players, who, act):
        self.game, self.players, self.who, self.act = game, players, who, act
        self.places, self.states, self.period = {}, {}, {}
        for p in np.unique(who).tolist():
            place = np.nonzero(who == p)
            if p in act:
                pad = -len(place[0]) % 32 if players[p].device.type == "cuda" else 0
                place = tuple(np.concatenate([x, np.repeat(x[:1], pad)]) for x in place)
                self.states[p] = {f"state/{key}": x for key, x in players[p].initial(len(place[0])).items()}
                self.period[p] = int(players[p].gene("period"))  # it waits for the device, so but once a match
            self.places[p] = place
        self.obs, self.step, self.outcome = game.reset(), 0, None
        self.events = np.zeros((*who.shape, len(game.points)), np.float32)  # of the last step
        self.totals = np.zeros((len(players), len(game.points)))  # of events, of each player

    def row(self, p):
        """What agent p sees now: {"obs", "reward", "ticks", "last", "weight"}, each (B, ...)."""
        agent, (games, index), over = self.players[p], self.places[p], self.outcome is not None
        won = 2 * self.outcome[games] - 1 if over else np.zeros(len(games))  # of the first team
        row = {"events": self.events[games, index], "won": np.float32(won * (1 - 2 * self.game.team[index]))}
        row |= {"obs": self.obs[games, index], "last": np.full(len(games), over)}
        row["ticks"] = np.full(len(games), self.step % self.period[p] == 0)
        row["weight"] = np.float32(np.arange(len(games)) < (self.who == p).sum())
        row = {key: torch.as_tensor(x).to(agent.device, non_blocking=True) for key, x in row.items()}
        row["reward"] = agent.rewards(row.pop("events"), row.pop("won"))
        return row

    def play(self):
        """One step of all games. -> {agent: its row, with "action", "logp", "noise"}."""
        rows, action = {}, np.zeros((*self.who.shape, len(self.game.action_space.nvec)), int)
        for p, place in self.places.items():
            if p not in self.act:
                action[place] = self.game.scripted[self.players[p]]()[place]
                continue
            row = self.row(p)
            out = self.act[p]({key: row[key] for key in ("obs", "reward", "ticks")} | self.states[p])
            self.states[p] = {key: out[key] for key in self.states[p]}  # in the same order: it names a captured shape
            rows[p] = {**row, **{key: out[key].clone() for key in ("action", "logp", "noise")}}
            chosen, real = out["action"].cpu().numpy(), (self.who == p).sum()
            action[tuple(x[:real] for x in place)] = chosen[:real]
        self.obs, self.events, self.outcome = self.game.step(action)
        self.step += 1
        for p in self.places:
            self.totals[p] += self.events[self.who == p].sum(0)
        return rows

    def window(self, T):
        """T steps, or as many as there are to the end. -> {agent: batch for its update, (B, T+1, ...)}."""
        start = {p: {key: x.clone() for key, x in self.states[p].items()} for p in self.act}
        rows, batches = [], {}
        while len(rows) < T and self.outcome is None:
            rows.append(self.play())
        for p in self.act:  # one row more, the first of the next window or the end, is there for its value
            dummy = {key: torch.zeros_like(rows[-1][p][key]) for key in ("action", "logp", "noise")}
            rows_of_p = [row[p] for row in rows] + [{**self.row(p), **dummy}]
            batches[p] = {key: torch.stack([x[key] for x in rows_of_p], 1) for key in rows_of_p[0]} | start[p]
        return batches


def duel(game, pair, act, frames=None):
    """Matches between teams of copies of two players; the first is the second team in every other game. act: as in
    Match. frames: list that takes the pictures of the first game. -> (G,) 1, 1/2 or 0 for the first player; the Match.
    """
    turned = np.arange(game.games) % 2
    match = Match(game, pair, np.int64(game.team != turned[:, None]), act)
    while match.outcome is None:
        match.play()
        if frames is not None:
            frames.append(game.render(0))
    return np.where(turned, 1 - match.outcome, match.outcome), match


# === Part 2: training =================================================================================================


def train(args: Args) -> dict:
    """Train as args say. -> {"run_dir", "games", "steps", "updates", "elo", and losses and statistics of the best}."""
    if args.eval is not None:
        return show(args)
    saved = None if args.resume is None else load(f"{args.resume}/checkpoint.pt", need=("args", "agents", "states"))
    args = resolve(inherit(args, args.resume, saved["args"], RESUMED) if saved else args)
    tune(args)
    for seed in random.seed, np.random.seed, torch.manual_seed:
        seed(args.seed)
    rng, game = np.random.default_rng(args.seed), make_game(args, args.games, args.seed)
    agents = make_population(args, game, rng)
    P, scripted, cuda = len(agents), list(game.scripted), agents[0].device.type == "cuda"
    update = [Captured(agent.update, args.cuda_graph and cuda) for agent in agents]
    act = [Captured(agent.act, args.cuda_graph and cuda) for agent in agents]
    ratings = np.full(P + len(scripted), 500.0)  # agents, then scripted players: the random one keeps it
    since = np.zeros(P, int)  # matches of each agent, since it could last evolve
    now = dict(games=0, steps=0, updates=0, batches=0)
    if saved:
        ratings, since, now = restore(saved, agents, rng, game)
    run_dir, writer = open_run(args, agents, game, saved)
    began, then, stats, wins = time.time(), now["steps"], {}, np.full((P, len(scripted)), np.nan)
    try:
        while now["games"] < args.total_games:
            # matches among agents about as strong, or against the random player; each learns from all of its places
            who = make_matches(ratings[:P], args.games, len(game.team), rng)  # (G, N)
            weak, side = rng.random((args.games, 1)) < args.random_share, rng.integers(2, size=(args.games, 1))
            who[weak & (game.team == side)] = P  # a team of the random player
            match = Match(game, [*agents, *scripted], who, {p: act[p] for p in range(P) if (who == p).any()})
            while match.outcome is None:
                for p, batch in match.window(args.window).items():
                    stats[p] = update[p](batch)
                    now["updates"] += 1
            for p in stats:  # once a match: what is not finite stops the run before it is saved
                finite(stats[p])
            ratings = elo(ratings, in_teams(who, game), match.outcome, args.elo_step / args.games)
            since += [(who == p).any(1).sum() for p in range(P)]
            before, now["games"], now["batches"] = now["games"], now["games"] + args.games, now["batches"] + 1
            now["steps"] += match.step * who.size

            # rating matches, from which nobody learns, against players whose strength stays
            for p, s in np.ndindex(P, len(scripted)) if now["batches"] % args.rate_every == 0 else ():
                outcome, rated = duel(game, [agents[p], scripted[s]], {0: act[p]})
                teams = np.where(rated.who == 0, p, P + s)
                ratings = elo(ratings, in_teams(teams, game), rated.outcome, args.elo_step / args.games)
                wins[p, s] = outcome.mean()
            ratings[P] = 500

            # evolution: who would lose to another, drawn at random, becomes its mutated copy
            for i in np.flatnonzero(since >= args.evolve_every) if P > 1 else ():
                since[i], j = 0, int(rng.choice(np.delete(np.arange(P), i)))
                if win_probability(*(ratings[[j, i]] * len(game.team) / 2)) >= args.evolve_above:  # teams of copies
                    genes = mutate(agents[j].genes.cpu().numpy(), rng, args)
                    agents[i].copy(agents[j])
                    agents[i].genes.copy_(torch.as_tensor(genes))
                    ratings[i] = ratings[j]

            done, best = now["games"] >= args.total_games, int(ratings[:P].argmax())
            if done or time.time() - began > args.log_every:
                speed = (now["steps"] - then) / (time.time() - began)
                record(writer, game, agents, ratings, wins, match, stats, now, speed)
                left = int((args.total_games - now["games"]) * match.step * len(game.team) / speed / 60)  # minutes
                line = f"games {now['games']:,}/{args.total_games:,}  Elo best {ratings[best]:.0f}, "
                line += f"median {np.median(ratings[:P]):.0f}  {speed:,.0f} steps/s  "
                print(f"{line}left {max(left, 0) // 60}:{max(left, 0) % 60:02} h", flush=True)
                began, then = time.time(), now["steps"]
            if done or before // args.checkpoint_every < now["games"] // args.checkpoint_every:
                write_checkpoint(run_dir, args, agents, ratings, since, now, rng, game)
                write_match(agents, ratings, args, run_dir / "match.gif")
                writer.flush()
    except Exception as error:
        raise RuntimeError(f"{run_dir}, game {now['games']:,}: {type(error).__name__}: {error}") from error
    finally:
        print(f"stopped   at game {now['games']:,}; its checkpoint, if any, goes on by --resume {run_dir}", flush=True)
        writer.close()
    best = int(ratings[:P].argmax())
    return {"run_dir": str(run_dir), **now, "elo": float(ratings[best]), **finite(stats.get(best, {}))}


# === Part 3: plumbing =================================================================================================

RESUMED = ("resume", "total_games", "checkpoint_every", "log_every", "device", "track")  # beside --resume
SHOWN = ("eval", "eval_games", "seed", "device")  # beside --eval
OF_A_CALL = dict(resume=None, eval=None, device="auto", track=False)  # flags that no run hands on


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


# --- the game ---------------------------------------------------------------------------------------------------------
EVENTS = [f"{who} {what}" for what in ("captured", "picked up", "returned") for who in ("I", "mate", "opponent")]
EVENTS += ["I tagged", "I tagged a carrier", "I was tagged", "I was tagged carrying"]  # 13, as in the paper


class CaptureTheFlag:
    """Capture the flag on G boards at once. Two teams of `players`; the first starts below, the second above.

    A step: all move, then tag, then touch flags. Who enters a wall stays; players may share a cell. A tag hits every
    opponent within one cell, diagonals too; the next is COOLDOWN steps later at the earliest. Who is tagged drops the
    flag and stands at home, unseen, until it moves again WAIT steps later. Touching the flag of the others takes it up,
    touching the own one where it was dropped returns it (this comes first); who carries the flag home captures, but
    only while the own flag is there. The match ends after `length` steps; more captures win.

    Actions: move (stay, ahead, back, left, right) and tag (no, yes); both teams see the other's base ahead. Seen are
    the cells around a player as planes of 0 and 1: walls, bases, flags (own, other), mates, opponents; then whether it
    waited, carries, could tag in the step just made. image: the same cells as a picture of 84 x 84 pixels.
    """

    COOLDOWN, WAIT = 4, 10
    MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
    points = np.float32([3, 3, -3, 1, 1, -1, 1, 1, -1, 1, 1, -0.25, -1])  # of EVENTS: what each is worth to a player
    events = EVENTS

    def __init__(self, games, seed, players=2, size=9, view=4, length=128, image=False):
        if not (1 <= players <= 4 and 9 <= size <= 17 and size % 2 and length >= 1):
            raise ValueError(f"players {players}, size {size}, length {length}; allowed: 1 to 4; odd, 9 to 17; above 0")
        if not 1 <= view <= 8 or image and view not in (1, 3):
            raise ValueError(f"view {view}; allowed: 1 to 8, with image 1 or 3, as 84 is a multiple of 2 view + 1")
        self.games, self.players, self.size, self.view, self.length = games, players, size, view, length
        self.image, self.rng = image, np.random.default_rng(seed)
        self.team = np.repeat([0, 1], players)  # (N) of the players of a board
        self.base = np.array([[size - 2, size // 2], [1, size // 2]])  # (team, 2): row, column
        self.home = self.base[self.team]  # of each player
        random_player = lambda: self.rng.integers([5, 2], size=(games, 2 * players, 2))
        self.scripted = {"random": random_player, "greedy": self.greedy}  # name: () -> actions (G, N, 2)
        numbers = spaces.Box(0, 1, (7 * (2 * view + 1) ** 2 + 3,), np.uint8)
        self.observation_space = spaces.Box(0, 255, (84, 84, 3), np.uint8) if image else numbers
        self.action_space = spaces.MultiDiscrete([5, 2])
        self.g, self.p = np.arange(games)[:, None], np.arange(2 * players)[None]  # index of all players
        self.ahead = 1 - 2 * self.team  # of each player: the second team sees everything turned by half

    def maps(self, density=0.25):
        """Walls (G, M, M): the same after half a turn, every cell within reach of both bases, a border."""
        M = self.size
        walls = self.rng.random((self.games, M, M)) < density
        lower = np.arange(M * M).reshape(M, M) > M * M // 2
        walls = np.where(lower, walls[:, ::-1, ::-1], walls)
        for row, column in self.base:
            walls[:, row - 1 : row + 2, column - 1 : column + 2] = False
        walls[:, [0, -1]], walls[:, :, [0, -1]] = True, True
        cut = ~self.flood(walls)[:, self.base[1, 0], self.base[1, 1]]
        walls[cut, 1:-1, M // 2] = False  # a way through the middle
        return walls | ~self.flood(walls)

    def flood(self, walls):
        """Cells (G, M, M) that can be reached from the base of the first team."""
        reached = np.zeros_like(walls)
        reached[:, self.base[0, 0], self.base[0, 1]] = True
        while True:
            wider = spread(reached) & ~walls
            if (wider == reached).all():
                return reached
            reached = wider

    def reset(self):
        """New maps, all at home. -> observations (G, N, ...)."""
        shape = self.games, 2 * self.players
        self.walls, self.far = self.maps(), None
        self.pos = np.broadcast_to(self.home, (*shape, 2)).copy()
        self.wait, self.rest = np.zeros(shape, int), np.zeros(shape, int)  # steps to go
        self.flag = np.broadcast_to(self.base, (self.games, 2, 2)).copy()
        self.carrier = np.full((self.games, 2), -1)  # of the flag of each team
        self.score, self.count = np.zeros((self.games, 2), int), 0
        return self.observe()

    def carrying(self):
        """(G, N): who carries the flag of the others."""
        return self.carrier[:, 1 - self.team] == self.p

    def at_home(self):
        """(G, 2): whose flag lies at its base."""
        return (self.flag == self.base).all(-1) & (self.carrier < 0)

    def step(self, action):
        """action: (G, N, 2) -> observations, events (G, N, 13), outcome: None, or at the end (G,) 1, 1/2 or 0: of the
        first team.
        """
        team, other, g = self.team, 1 - self.team, self.g
        self.count, self.wait, self.rest = self.count + 1, np.maximum(self.wait - 1, 0), np.maximum(self.rest - 1, 0)
        active = self.wait == 0  # (G, N)
        to = self.pos + self.MOVES[action[..., 0]] * (self.ahead[:, None] * active[..., None])
        free = ~self.walls[g, to[..., 0], to[..., 1]]
        self.pos = np.where(free[..., None], to, self.pos)

        fires = (action[..., 1] == 1) & active & (self.rest == 0)
        self.rest = np.where(fires, self.COOLDOWN, self.rest)
        near = np.abs(self.pos[:, :, None] - self.pos[:, None]).max(-1) <= 1  # (G, N, N)
        hits = near & fires[:, :, None] & active[:, None] & (team[:, None] != team)
        tagged, carrying = hits.any(1), self.carrying()  # (G, N)
        events = np.zeros((*active.shape, 13), np.float32)
        events[..., 9] = (hits & ~carrying[:, None]).any(2)
        events[..., 10] = (hits & carrying[:, None]).any(2)
        events[..., 11], events[..., 12] = tagged & ~carrying, tagged & carrying

        moved = np.take_along_axis(self.pos, np.maximum(self.carrier, 0)[..., None], 1)  # (G, 2, 2)
        self.flag = np.where((self.carrier >= 0)[..., None], moved, self.flag)
        fallen = np.take_along_axis(tagged, np.maximum(self.carrier, 0), 1) & (self.carrier >= 0)
        self.carrier = np.where(fallen, -1, self.carrier)  # it lies where it fell
        self.pos = np.where(tagged[..., None], self.home, self.pos)
        self.wait, active = np.where(tagged, self.WAIT, self.wait), active & ~tagged

        actors = {}  # kind: (G, 2) who of each team has done it, or -1
        first = lambda who: np.where(who.any(1), who.argmax(1), -1)  # of a board, -1 if nobody
        here = active[..., None] & (self.pos[:, :, None] == self.flag[:, None]).all(-1)  # (G, N, flag)
        lies = self.carrier < 0
        returns = here & (lies & ~self.at_home())[:, None] & (team[:, None] == [0, 1])
        actors["returned"] = np.stack([first(returns[..., f]) for f in (0, 1)], 1)
        self.flag = np.where((actors["returned"] >= 0)[..., None], self.base, self.flag)
        takes = here & (lies & (actors["returned"] < 0))[:, None] & (team[:, None] != [0, 1])
        taker = np.stack([first(takes[..., f]) for f in (0, 1)], 1)  # of each flag
        self.carrier = np.where(taker >= 0, taker, self.carrier)
        actors["picked up"] = taker[:, ::-1]
        scores = active & self.carrying() & (self.pos == self.home).all(-1) & self.at_home()[:, team]
        actors["captured"] = np.stack([first(scores & (team == t)) for t in (0, 1)], 1)
        captured = actors["captured"] >= 0  # (G, 2)
        self.score += captured
        self.carrier = np.where(captured[:, ::-1], -1, self.carrier)
        self.flag = np.where(captured[:, ::-1, None], self.base, self.flag)
        for i, kind in enumerate(("captured", "picked up", "returned")):
            own, theirs = actors[kind][:, team], actors[kind][:, other]  # (G, N)
            by = own == self.p, (own >= 0) & (own != self.p), theirs >= 0  # me, a mate, an opponent
            events[..., 3 * i : 3 * i + 3] = np.stack(by, -1)
        over = self.count >= self.length
        outcome = 0.5 + 0.5 * np.sign(self.score[:, 0] - self.score[:, 1]) if over else None
        return self.observe(), events, outcome

    def board(self):
        """(G, 7, M, M) uint8: walls, bases of both teams, flags of both, players of both."""
        planes = np.zeros((self.games, 7, self.size, self.size), np.uint8)
        planes[:, 0] = self.walls
        for t in (0, 1):
            planes[:, 1 + t, self.base[t, 0], self.base[t, 1]] = 1
            planes[np.arange(self.games), 3 + t, self.flag[:, t, 0], self.flag[:, t, 1]] = 1
        g, p = np.nonzero(self.wait == 0)  # who waits is not seen
        planes[g, 5 + self.team[p], self.pos[g, p, 0], self.pos[g, p, 1]] = 1
        return planes

    def observe(self):
        """What each player sees: (G, N, ...)."""
        v, planes = self.view, self.board()
        planes = np.pad(planes, ((0, 0), (0, 0), (v, v), (v, v)))
        planes[:, 0, :v], planes[:, 0, -v:], planes[:, 0, :, :v], planes[:, 0, :, -v:] = 1, 1, 1, 1
        around = self.ahead[:, None] * np.arange(-v, v + 1) + v  # (N, cells)
        rows = self.pos[..., 0, None, None] + around[..., None]  # (G, N, cells, 1)
        columns = self.pos[..., 1, None, None] + around[:, None]  # (G, N, 1, cells)
        order = np.where(self.team[:, None] == 0, [0, 1, 2, 3, 4, 5, 6], [0, 2, 1, 4, 3, 6, 5])  # own before theirs
        seen = planes[self.g[..., None, None, None], order[..., None, None], rows[:, :, None], columns[:, :, None]]
        own = np.stack([self.wait > 0, self.carrying(), self.rest == 0], -1).astype(np.uint8)  # (G, N, 3)
        if not self.image:
            return np.concatenate([seen.reshape(*seen.shape[:2], -1), own], -1)
        picture = draw(seen, 84 // seen.shape[-1])
        picture[:, :, :6, :18] = 255 * own.repeat(6, -1)[:, :, None, :, None]  # three lamps
        return picture

    def render(self, g):
        """The whole board g, uint8 (H, W, 3)."""
        return draw(self.board()[g : g + 1, None], 24)[0, 0]

    def greedy(self):
        """Runs to the flag of the others and home with it; with a mate that has it, after the own flag. It knows the
        board, and tags whoever is near. -> actions (G, N, 2).
        """
        theirs = self.flag[:, 1 - self.team]  # (G, N, 2)
        mate_has = (self.carrier[:, 1 - self.team] >= 0) & ~self.carrying()
        goal = np.where(mate_has[..., None], self.flag[:, self.team], theirs)
        goal = np.where(self.carrying()[..., None], self.home, goal)
        to = self.pos[:, :, None] + self.MOVES * self.ahead[:, None, None]  # (G, N, 5, 2)
        far = self.distances()[self.g[..., None], (goal @ [self.size, 1])[..., None], to @ [self.size, 1]]
        near = np.abs(self.pos[:, :, None] - self.pos[:, None]).max(-1) <= 1
        enemy = near & (self.wait == 0)[:, None] & (self.team[:, None] != self.team)
        return np.stack([(far + self.rng.random(far.shape) / 2).argmin(-1), enemy.any(2)], -1)

    def distances(self):
        """Steps between all cells of the present boards, (G, M*M, M*M); in and to walls, far."""
        if self.far is None:
            M = self.size
            start = np.broadcast_to(np.eye(M * M, dtype=bool).reshape(1, M * M, M, M), (self.games, M * M, M, M))
            reached, self.far = start & ~self.walls[:, None], np.full((self.games, M * M, M * M), 10_000)
            for steps in range(M * M):
                self.far[reached.reshape(self.far.shape) & (self.far == 10_000)] = steps
                wider = spread(reached) & ~self.walls[:, None]
                if (wider == reached).all():
                    break
                reached = wider
        return self.far


def spread(cells):
    """Booleans (..., M, M) -> the same with all neighbours."""
    wider = cells.copy()
    wider[..., 1:, :] |= cells[..., :-1, :]
    wider[..., :-1, :] |= cells[..., 1:, :]
    wider[..., 1:] |= cells[..., :-1]
    wider[..., :-1] |= cells[..., 1:]
    return wider


def draw(planes, side):
    """Planes of CaptureTheFlag (G, N, 7, rows, columns) -> pictures (G, N, rows*side, columns*side, 3), uint8."""
    G, N, _, rows, columns = planes.shape
    picture = np.full((G, N, rows, side, columns, side, 3), 25, np.uint8)
    blue, red, white, unit = (60, 110, 255), (255, 70, 60), (255, 255, 255), side // 12
    layers = [(0, (110, 110, 110), 0), (1, (20, 40, 110), 0), (2, (110, 30, 25), 0)]  # plane, colour, margin in units
    layers += [(5, blue, 2), (6, red, 2), (3, white, 3), (3, blue, 4), (4, white, 3), (4, red, 4)]
    for plane, colour, margin in layers:
        inner = slice(margin * unit, side - margin * unit)
        shown = planes[:, :, plane, :, None, :, None, None].astype(bool)
        np.copyto(picture[:, :, :, inner, :, inner], np.uint8(colour), where=shown)
    return picture.reshape(G, N, rows * side, columns * side, 3)


def make_game(args, games, seed):
    """--env-id: the game of this file, or that of module:make. One interface: see CaptureTheFlag."""
    try:
        kwargs = dict(json.loads(args.env_kwargs))
        if args.env_id == "CaptureTheFlag":
            return CaptureTheFlag(games, seed, players=args.players, size=args.map, **kwargs)
        module, _, make = args.env_id.partition(":")
        sys.path.insert(0, os.getcwd())
        game = getattr(importlib.import_module(module), make)(games, seed, **kwargs)
        for name in "games team points events observation_space action_space reset step".split():
            assert hasattr(game, name), f"it lacks {name}"
        assert isinstance(game.observation_space, spaces.Box), f"it shows {game.observation_space}, not a Box"
        choices, game.rng = game.action_space.nvec, getattr(game, "rng", np.random.default_rng(seed))
        random_player = lambda: game.rng.integers(choices, size=(games, len(game.team), len(choices)))
        game.scripted = {"random": random_player, **getattr(game, "scripted", {})}  # the random one comes first
        return game
    except Exception as error:  # of any kind: users' constructors run here
        flags = f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}"
        fail(f"{flags}: {type(error).__name__}: {error}; allowed: CaptureTheFlag or module:make, a JSON object")


def make_population(args, game, rng):
    """-> agents with first genes; one alone has those of the middle."""
    agents = [Agent(game.observation_space, game.action_space, game.points, args) for _ in range(args.population)]
    for agent in agents:
        genes = first_genes(len(game.points), rng, middle=len(agents) == 1)
        if args.reward != "evolved":  # the same for all, and for ever
            genes[len(GENES) :] = np.exp(np.log(WEIGHTS).mean())
        agent.genes.copy_(torch.as_tensor(genes))
    return agents


def in_teams(who, game):
    """(G, N) -> (G, 2, players)."""
    return who[:, np.argsort(game.team, kind="stable")].reshape(len(who), 2, -1)


# --- pictures, evaluation, checkpoints --------------------------------------------------------------------------------
def save_gif(path, frames):
    """Frames, uint8 (H, W, 3), -> animated GIF in the size of the first."""
    from PIL import Image

    size, method = frames[0].shape[1::-1], Image.Quantize.FASTOCTREE  # 15 x as fast as the default
    images = [Image.fromarray(x).resize(size).quantize(256, method=method) for x in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=66, loop=0)


def best_and_median(agents, ratings):
    """-> two agents, the same one if there is but one."""
    order = ratings[: len(agents)].argsort()
    return [agents[order[-1]], agents[order[(len(agents) - 1) // 2]]]


def evaluate(agents, ratings, args):
    """The best agent against each scripted player and the median agent. -> {opponent: shares of (win, draw, loss)}."""
    (best, median), table = best_and_median(agents, ratings), {}
    game = make_game(args, args.eval_games, args.seed + 1_000)
    with torch.random.fork_rng([best.device] if best.device.type == "cuda" else []):
        torch.manual_seed(args.seed + 1_000)
        for name in [*game.scripted, "median agent"]:
            opponent, acts = (name, {}) if name in game.scripted else (median, {1: median.act})
            outcome, _ = duel(game, [best, opponent], {0: best.act, **acts})
            table[name] = tuple(float((outcome == x).mean()) for x in (1, 0.5, 0))
    return table


def write_match(agents, ratings, args, path):
    """A match of best against median agent as a GIF, if the game can be drawn. A failure is one line, not the end."""
    pair, frames = best_and_median(agents, ratings), []
    try:
        game = make_game(args, 1, args.seed + 2_000)
        if hasattr(game, "render"):
            with torch.random.fork_rng([pair[0].device] if pair[0].device.type == "cuda" else []):
                duel(game, pair, {0: pair[0].act, 1: pair[1].act}, frames)
            save_gif(path, frames)
    except (Exception, SystemExit) as error:  # a game that cannot be made for one match ends in fail
        warnings.warn(f"{path} was not made: {error}", stacklevel=1)


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


def write_checkpoint(run_dir, args, agents, ratings, since, now, rng, game):
    """The whole population, between two batches of matches: from here a run goes on bit for bit."""
    parts = [{"agent": agent.state_dict(), "squares": agent.squares} for agent in agents]
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    states |= {key: x.bit_generator.state for key, x in {"rng": rng, "game": game.rng}.items()}
    counts = {"ratings": ratings.tolist(), "since": since.tolist(), **now}
    save(run_dir / "checkpoint.pt", agents=parts, now=counts, states=states, args=asdict(args), source=SOURCE)


def restore(saved, agents, rng, game):
    """-> ratings, since, counters; agents and random states are set."""
    for agent, part in zip(agents, saved["agents"], strict=True):
        agent.load_state_dict(part["agent"])
        torch._foreach_copy_(agent.squares, part["squares"])
    states, now = saved["states"], dict(saved["now"])
    torch.set_rng_state(states["torch"])
    rng.bit_generator.state, game.rng.bit_generator.state = states["rng"], states["game"]
    torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])  # none on a CPU
    return np.array(now.pop("ratings")), np.array(now.pop("since")), now


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


def load_population(path, args=None):
    """path: checkpoint or run folder -> agents, ratings, Args. args: what --eval may change, such as device."""
    saved = load(path, need=("args", "agents", "now"))
    args = resolve(inherit(args or Args(), path, saved["args"], SHOWN))
    game = make_game(args, 1, args.seed)
    agents = make_population(args, game, np.random.default_rng(0))
    for agent, part in zip(agents, saved["agents"], strict=True):
        agent.load_state_dict(part["agent"])
    return agents, np.array(saved["now"]["ratings"]), args


def show(args):
    """--eval: print a table of the best agent, leave match.gif beside the checkpoint."""
    path = Path(args.eval)
    folder, (agents, ratings, args) = path if path.is_dir() else path.parent, load_population(path, args)
    table = evaluate(agents, ratings, args)
    print(f"best agent, {args.eval_games} matches each   win   draw   loss")
    for name, shares in table.items():
        print(f"{name:34}" + "".join(f"{share:7.1%}" for share in shares))
    write_match(agents, ratings, args, folder / "match.gif")
    return {"run_dir": str(folder), "table": table}


def record(writer, game, agents, ratings, wins, match, stats, now, speed):
    """Scalars of TensorBoard, by the number of games: ratings, events of each agent in a match, genes, losses."""
    step, P = now["games"], len(agents)
    scalars = {"charts/SPS": speed, "charts/steps": now["steps"], "charts/updates": now["updates"]}
    scalars |= {f"elo/{name}": x for name, x in zip([*range(P), *game.scripted], ratings, strict=True)}
    for p, agent in enumerate(agents):
        scalars |= {f"wins/{p}_against_{name}": x for name, x in zip(game.scripted, wins[p], strict=True)}
        genes = zip([*GENES, *game.events], agent.genes.tolist(), strict=True)
        events = zip(game.events, match.totals[p] / max(1, (match.who == p).sum()), strict=True)
        scalars |= {f"genes/{name}/{p}": x for name, x in genes} | {f"events/{name}/{p}": x for name, x in events}
        scalars |= {f"{key}/{p}": x for key, x in finite(stats.get(p, {})).items()}
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


def open_run(args, agents, game, saved):
    """Make the run folder, say what is about to run. -> folder, TensorBoard, with --track mirrored to W&B too."""
    from torch.utils.tensorboard import SummaryWriter

    wandb = __import__("wandb") if args.track else None  # missing: known before anything is written
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume) if saved else Path(args.run_root) / name
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(saved))
    except OSError as error:
        fail(f"--run-root {args.run_root}: {error}; allowed: a folder that can be written, and a run of its own")
    agent = agents[0]
    slow = "CPU  <-- WARNING: no GPU; images are slow" if agent.image else "CPU"
    device = torch.cuda.get_device_name(agent.device) if agent.device.type == "cuda" else slow
    print(f"run       {run_dir}\ndevice    {device}; PyTorch {torch.__version__}")
    print(f"observes  {game.observation_space.shape} -> {'convolutions' if agent.image else 'MLP'}")
    print(f"agents    {len(agents)} x {sum(p.numel() for p in agent.params):,} parameters ({args.core}, {args.size})")
    print(f"training  {args.games} games at once, updates on {args.window} steps; reward: {args.reward}", flush=True)
    if wandb:
        wandb.init(name=run_dir.name, id=run_dir.name, config=asdict(args), resume="allow", sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=saved["now"]["games"] + 1 if saved else None)
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
