# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy", "gymnasium>=1.3", "tyro", "tensorboard"]
# ///
"""Soft actor-critic with discrete actions: the critic's gradient reaches the policy through a sampled action.

Papers: Haarnoja et al., arXiv 1812.05905 (SAC); Christodoulou, arXiv 1910.07207 (SAC-Discrete: --estimator exact).

    python sac_discrete.py --obs-scale 1 0.5 0.05 0.4              CartPole-v1 through Gumbel-softmax
    python sac_discrete.py --env-id Acrobot-v1 --estimator exact   any gymnasium id with discrete actions and vectors
    python sac_discrete.py --resume runs/...                       go on where the last checkpoint stands
    python sac_discrete.py --eval runs/...                         mean return of 20 episodes of most likely actions

The critic Q(s, a) takes the action as indicators beside the observation, so that it has values and derivatives in the
whole simplex; but it learns at the vertices only, from actions that were played, and invents the rest.
Symbols in shapes: B transitions, N environments, X numbers of an observation, A actions.

Differs from the papers, on purpose:
- Critics' target and entropy are exact expectations with every estimator: runs differ in the actor's gradient only.
- One step of Adam moves actor, critics and alpha, by gradients taken at the same weights; its rate falls to 0.
- The target entropy is 0.2 ln A: with 0.98 ln A (SAC-Discrete) alpha grows and grows, and sampled actions stay worse.
"""

import copy
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

SOURCE = Path(__file__).read_text(encoding="utf-8")  # goes into every checkpoint: the code that really ran
FREE = ("eval", "eval_episodes", "resume", "total_timesteps", "checkpoint_every", "seed")  # beside --eval or --resume


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # any gymnasium id (module:Id too) with Discrete actions and vectors to see
    obs_scale: tuple[float, ...] = ()  # divisors of the observations, to about 1; CartPole-v1: 1 0.5 0.05 0.4
    num_envs: int = 8  # environments stepped together
    estimator: Literal["exact", "gumbel_softmax", "st_gumbel_softmax", "st", "reinmax"] = "gumbel_softmax"  # of dQ/dpi
    temperature: float = 0.3  # of the relaxation: the two estimators with gumbel in their names
    target_entropy: float = 0.2  # mean entropy that alpha aims at, as a share of ln A
    seed: int = 1  # of weights, sampling and environments
    size: Literal["debug", "short"] = "short"  # presets of the next four
    total_timesteps: int | None = None  # steps of all environments together; 60_000 (debug: 400)
    learning_starts: int | None = None  # steps before the first update; 1000 (debug: 50)
    checkpoint_every: int | None = None  # steps between checkpoints, each with an evaluation; 4000 (debug: 200)
    hidden: int | None = None  # units of both hidden layers; 64 (debug: 16)
    batch_size: int = 128  # B
    update_ratio: float = 0.125  # updates per step
    buffer_size: int = 100_000  # transitions in the replay, all of which a checkpoint holds
    gamma: float = 0.99  # discount
    learning_rate: float = 2e-3  # of actor, critics and alpha; falls linearly to 0 at total_timesteps
    slow_rate: float = 0.05  # of the target critics' moving average, per update
    device: Literal["cpu", "cuda"] = "cpu"  # networks this small are slower on a GPU
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on from
    eval: str | None = None  # run folder or checkpoint to evaluate
    eval_episodes: int = 20  # of an evaluation, played side by side


SIZES = {
    "debug": dict(total_timesteps=400, learning_starts=50, checkpoint_every=200, hidden=16),
    "short": dict(total_timesteps=60_000, learning_starts=1000, checkpoint_every=4000, hidden=64),
}


def resolve(args: Args) -> Args:
    """Fill what was left open (None) from --size; an explicit flag wins. Impossible values stop with exit code 2."""
    args = replace(args, **{key: x for key, x in SIZES[args.size].items() if getattr(args, key) is None})
    limits = dict.fromkeys([*SIZES["debug"], "num_envs", "batch_size", "buffer_size", "eval_episodes"], (1, 10**9))
    limits |= dict.fromkeys(["target_entropy", "gamma", "slow_rate", "learning_rate"], (0, 1)) | dict(seed=(0, 10**9))
    for name, (least, most) in (limits | dict(temperature=(1e-3, 1e3), update_ratio=(0, 100))).items():
        if not least <= getattr(args, name) <= most:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: allowed: {least:,} to {most:,}")
    return args


# === Part 1: the algorithm ============================================================================================


def gumbel(like):
    """Gumbel noise: the arg-max of logits + noise is an exact sample. A uniform number may be 0, hence the clamp."""
    return -torch.rand_like(like).clamp_(min=1e-12).log_().neg_().log_()


def onehot_max(x):
    """One-hot of the arg-max over the last axis. (..., A) -> (..., A), no gradient."""
    return F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)


def straight_through(onehot, probs):
    """The value of the sample with the gradient of the probabilities (Bengio et al. 2013). Both (..., K)."""
    return onehot + (probs - probs.detach())  # with other parentheses the sum is off one-hot by rounding


def gumbel_softmax(logits, temperature):
    """Jang et al. 2017: softmax((logits + g) / temperature), g ~ Gumbel: a point between the vertices."""
    return ((logits + gumbel(logits)) / temperature).softmax(-1)


def st_gumbel_softmax(logits, temperature):
    """Jang et al. 2017: forward one-hot(arg-max y), backward y of gumbel_softmax."""
    y = gumbel_softmax(logits, temperature)
    return straight_through(onehot_max(y), y)


def st(logits, temperature=None):
    """Bengio et al. 2013: forward a one-hot sample, backward softmax(logits). Exact where Q is linear in the action."""
    return straight_through(onehot_max(logits + gumbel(logits)), logits.softmax(-1))


def reinmax(logits, temperature=None):
    """Liu et al. 2023: like st; backward 2 softmax at (p + z) / 2 minus p / 2. Exact where Q is quadratic."""
    probs, z = logits.softmax(-1), onehot_max(logits + gumbel(logits))
    halfway = ((probs + z) / 2).detach().clamp(min=1e-12).log()
    return straight_through(z, 2 * (logits - logits.detach() + halfway).softmax(-1) - probs / 2)


ESTIMATORS = {sample.__name__: sample for sample in (gumbel_softmax, st_gumbel_softmax, st, reinmax)}


class Agent(nn.Module):
    """Actor, twin critics and their slow copies, and alpha, the worth of a nat of entropy."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.args, self.device, X, self.A = args, args.device, obs_space.shape[0], int(action_space.n)
        H, layer, act = args.hidden, nn.Linear, nn.SiLU()  # smoother between the actions than ReLU: less bias
        mlp = lambda inputs, outputs: nn.Sequential(layer(inputs, H), act, layer(H, H), act, layer(H, outputs))
        self.register_buffer("scale", torch.tensor(args.obs_scale or (1.0,) * X))
        if len(self.scale) != X or self.scale.min() <= 0:
            fail(f"--obs-scale {args.obs_scale}: allowed: {X} positive numbers, one for each number of an observation")
        self.actor = mlp(X, self.A)
        self.critics = nn.ModuleList(mlp(X + self.A, 1) for _ in range(2))
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(-2.0))  # from 0 it would take Adam a thousand steps to get here
        self.to(self.device)
        self.groups = list(self.critics.parameters()), list(self.actor.parameters()), [self.log_alpha]
        self.optimizer = torch.optim.Adam(sum(self.groups, []), args.learning_rate, fused=True)

    @torch.no_grad()
    def act(self, obs, eval=False):
        """obs: (B, X) -> actions (B,): samples of the policy, or with eval the most likely ones. Both are arrays."""
        logits = self.actor(torch.as_tensor(obs, dtype=torch.float32, device=self.device) / self.scale)  # (B, A)
        return (logits if eval else logits + gumbel(logits)).argmax(-1).cpu().numpy()

    def value(self, critics, obs, action):
        """Q(s, a) of both critics. obs: (B, X); action: (B, A), indicators or a point between them -> (2, B)."""
        return torch.stack([net(torch.cat([obs, action], -1)).squeeze(-1) for net in critics])

    def values(self, critics, obs):
        """min of both Q(s, a) at every a, as the actor finds what one overrates. (B, X) -> (B, A). Cost: A values."""
        every = torch.eye(self.A, device=self.device).repeat(len(obs), 1)  # (B*A, A)
        return self.value(critics, obs.repeat_interleave(self.A, 0), every).amin(0).unflatten(0, (-1, self.A))

    def gain(self, obs, logits):
        """What the actor climbs: the mean of Q(s, a) over a ~ pi, or Q at one sample. (B, X), (B, A) -> (B,)."""
        if self.args.estimator == "exact":
            return (logits.softmax(-1) * self.values(self.critics, obs).detach()).sum(-1)
        return self.value(self.critics, obs, ESTIMATORS[self.args.estimator](logits, self.args.temperature)).amin(0)

    def update(self, batch):
        """A gradient step on what Replay.sample gives -> {name: 0-d tensor}."""
        args, obs, after = self.args, batch["obs"] / self.scale, batch["next_obs"] / self.scale
        with torch.no_grad():  # r + gamma (1 - terminal) E [min Q(s', a') - alpha ln pi(a'|s')] over a' ~ pi
            alpha, logp = self.log_alpha.exp(), self.actor(after).log_softmax(-1)  # (), (B, A)
            soft = (logp.exp() * (self.values(self.slow_critics, after) - alpha * logp)).sum(-1)  # (B)
            target = batch["reward"] + args.gamma * ~batch["is_terminal"] * soft  # (B)
        value = self.value(self.critics, obs, F.one_hot(batch["action"], self.A))  # (2, B)
        critic_loss = (value - target).square().mean(1).sum()
        logp = self.actor(obs).log_softmax(-1)  # (B, A)
        entropy = -(logp.exp() * logp).sum(-1).mean()  # from p the gradient would be nan where p is 0
        actor_loss = -self.gain(obs, logp).mean() - alpha * entropy
        alpha_loss = self.log_alpha * (entropy.detach() - args.target_entropy * np.log(self.A))  # falls if too random
        self.optimizer.zero_grad()
        for loss, params in zip((critic_loss, actor_loss, alpha_loss), self.groups, strict=True):
            loss.backward(inputs=params)  # the actor's loss goes through the critics, and leaves them alone
        self.optimizer.step()
        torch._foreach_lerp_(list(self.slow_critics.parameters()), self.groups[0], args.slow_rate)
        losses = {"losses/critic": critic_loss, "losses/actor": actor_loss, "losses/alpha": alpha_loss}
        return {key: x.detach() for key, x in {**losses, "stats/entropy": entropy, "stats/alpha": alpha}.items()}


class Replay:
    """Ring of transitions in main memory, drawn uniformly; a batch goes to the device."""

    def __init__(self, capacity, obs_space, device):
        zeros, X = lambda *shape: torch.zeros(capacity, *shape), obs_space.shape[0]
        self.data = {"obs": zeros(X), "action": zeros().long(), "reward": zeros(), "next_obs": zeros(X)}
        self.data["is_terminal"], self.count, self.device = zeros().bool(), 0, device

    def add(self, keep, *transition):
        """keep: (N,), which of N environments made one; transition: arrays (N, ...), in the order that data has."""
        index = (self.count + torch.arange(int(keep.sum()))) % len(self.data["obs"])
        for ring, x in zip(self.data.values(), transition, strict=True):
            ring[index] = torch.as_tensor(x[keep], dtype=ring.dtype)
        self.count += len(index)

    def sample(self, B):
        """-> {"obs", "next_obs": (B, X), "action", "reward", "is_terminal": (B,)}"""
        index = torch.randint(min(self.count, len(self.data["obs"])), (B,))
        return {key: ring[index].to(self.device) for key, ring in self.data.items()}


# === Part 2: training =================================================================================================


def train(args: Args) -> dict:
    """Train as args say. -> {"run_dir", "global_step", "updates", "eval_return", losses}; --eval: {"returns"}."""
    if args.eval is not None:
        agent, args, _ = load_agent(args.eval, args)
        returns = evaluate(agent, args)
        print(f"{args.env_id}: mean {np.mean(returns):.4g}, standard deviation {np.std(returns):.4g} of {len(returns)}")
        return {"returns": returns}
    agent, args, saved = (None, resolve(args), None) if args.resume is None else load_agent(args.resume, args)
    step, updates, recent = saved["now"] if saved else (0, 0, [])
    torch.set_num_threads(1)  # products this small are slower on two threads, many times so beside other work
    torch.manual_seed(args.seed + step)  # a resumed run draws new numbers
    envs = make_envs(args.env_id, args.num_envs)
    agent = agent or Agent(envs.single_observation_space, envs.single_action_space, args)
    replay = Replay(args.buffer_size, envs.single_observation_space, agent.device)
    replay.data, replay.count = saved["replay"] if saved else (replay.data, 0)
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or f"{args.run_root}/{name}")
    run_dir.mkdir(parents=True, exist_ok=bool(saved))
    from torch.utils.tensorboard import SummaryWriter  # imported late: it is slow, and --eval does without

    writer = SummaryWriter(run_dir, purge_step=step + 1 if saved else None)
    print(f"run       {run_dir}\nagent     {sum(p.numel() for p in agent.parameters()):,} parameters, {agent.device}")
    (obs, _), is_last = envs.reset(seed=args.seed + step), np.zeros(args.num_envs, bool)
    returns, stats, began, since = np.zeros(args.num_envs), {}, time.time(), step
    try:
        while step < args.total_timesteps:
            action, is_first, before = agent.act(obs), is_last, step  # where is_first the action is ignored: a reset
            next_obs, reward, is_terminal, truncated, _ = envs.step(action)
            step += int((~is_first).sum())  # a reset is no step and no transition
            finite({"observation": next_obs.sum(), "reward": reward.sum()})
            replay.add(~is_first, obs, action, reward, next_obs, is_terminal)
            obs, is_last, returns = next_obs, is_terminal | truncated, returns * ~is_first + reward
            agent.optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - before / args.total_timesteps)
            while updates < (step - args.learning_starts) * args.update_ratio:
                stats = finite(agent.update(replay.sample(args.batch_size)))
                updates += 1
            for n in np.flatnonzero(is_last):
                recent = [*recent, float(returns[n])][-20:]
                writer.add_scalar("charts/episodic_return", returns[n], step)
            if step < args.total_timesteps and before // args.checkpoint_every == step // args.checkpoint_every:
                continue
            new = dict(agent=agent.state_dict(), optimizer=agent.optimizer.state_dict(), now=(step, updates, recent))
            save(run_dir / "checkpoint.pt", **new, replay=(replay.data, replay.count), args=asdict(args), source=SOURCE)
            speed, score = (step - since) / (time.time() - began), float(np.mean(evaluate(agent, args)))
            for key, x in {**stats, "charts/eval_return": score, "charts/SPS": speed, "charts/frames": step}.items():
                writer.add_scalar(key, x, step)
            line = f"step {step:,}  return {np.mean(recent or [np.nan]):.1f}  evaluation {score:.1f}  {speed:.0f}"
            print(f"{line} steps/s  left {max(0, args.total_timesteps - step) / speed:.0f} s", flush=True)
            began, since = time.time(), step
    except Exception as error:
        raise RuntimeError(f"{run_dir}, step {step:,}: {type(error).__name__}: {error}") from error
    writer.close()
    return {"run_dir": str(run_dir), "global_step": step, "updates": updates, "eval_return": score, **stats}


# === Part 3: plumbing =================================================================================================


def fail(message):
    """Bad input: one line with the flag, the value and what is allowed; exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def make_envs(env_id, num_envs):
    """-> gymnasium vector environment, NEXT_STEP autoreset: observations (N, X), actions 0 ... A - 1."""
    try:
        envs = gym.make_vec(env_id, num_envs, "sync")
    except Exception as error:  # of any kind: users' constructors run here
        fail(f"--env-id {env_id}: {type(error).__name__}: {error}; allowed: ids that gymnasium knows, module:Id")
    space, action = envs.single_observation_space, envs.single_action_space
    discrete = isinstance(action, gym.spaces.Discrete) and action.start == 0
    if not discrete or not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        fail(f"--env-id {env_id}: it has {space} and {action}; allowed: a Box of one axis and Discrete actions from 0")
    return envs


def evaluate(agent, args):
    """An episode, which must have an end, in each of --eval-episodes environments, by likeliest actions -> returns."""
    envs, returns = make_envs(args.env_id, args.eval_episodes), np.zeros(args.eval_episodes)
    (obs, _), going = envs.reset(seed=args.seed + 1_000), returns == 0
    while going.any():
        obs, reward, terminated, truncated, _ = envs.step(agent.act(obs, eval=True))
        returns, going = returns + reward * going, going & ~(terminated | truncated)
    return returns.tolist()


def save(path, **state):
    """Atomic: the whole new file takes the name, or the old one keeps it; an error leaves nothing else."""
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        torch.save(state, Path(folder, "new"))
        os.replace(Path(folder, "new"), path)


def load(path, need=()):
    """path: file that holds the keys of need, or run folder. Only data is read; what would run code is refused."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert all(key in state for key in need), "another kind of file"
        return state
    except Exception as error:
        fail(f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]}); allowed: a run folder")


def load_agent(path, args=None):
    """path: checkpoint or run folder -> agent, its Args, what was saved. args: those of a call; FREE may differ."""
    saved = load(path, need=("agent", "optimizer", "replay", "args", "now"))
    given = {key: x for key, x in asdict(args or Args()).items() if x != getattr(Args, key)}
    for key, x in given.items():
        if key not in FREE and x != saved["args"][key]:
            fail(f"--{key} {x}: the run at {path} has {saved['args'][key]}; allowed to change: {', '.join(FREE)}")
    args = resolve(Args(**{**saved["args"], "resume": None, "eval": None, **given}))
    envs = make_envs(args.env_id, 1)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.load_state_dict(saved["agent"])
    agent.optimizer.load_state_dict(saved["optimizer"])
    return agent, args, saved


def finite(stats):
    """{name: 0-d tensor} -> {name: float}; waits for the device. Stops on nan and inf, before anything is saved."""
    values = {name: float(x) for name, x in stats.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(", ".join(bad))
    return values


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
