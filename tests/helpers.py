# SPDX-License-Identifier: MIT
"""What several test files use: short runs, experience of untrained agents, comparisons."""

import dataclasses
import functools
import importlib
import itertools
import os

import numpy as np
import pytest
import torch
import toy_envs  # noqa: F401 (its environments, by their short names)
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_softmax
import merlin

AGENTS = ["planet", "dreamerv2", "dreamerv3"]  # these act in environments
CONTEXT = {"planet": 1, "dreamerv2": 0, "dreamerv3": 1}  # rows before the trained window: they give the first action
FILES = [*AGENTS, "merlin", "ftw", "gumbel_softmax"]  # merlin and ftw act, without replay: suites of their own
APPLICATIONS = ["vqgan", "sac_discrete"]  # in a folder of their own
STATEFUL = [name for name in AGENTS if hasattr(importlib.import_module(name).Replay, "write")]
# Of files whose replay keeps latent states beside its rows, has an online queue, and windows that run across episodes.
stateful = pytest.mark.parametrize("module", STATEFUL, indirect=True, scope="module")


def known(module, flags):
    """Those of the flags that the file has."""
    return {key: x for key, x in flags.items() if key in {field.name for field in dataclasses.fields(module.Args)}}


def short(module, env_id, root, **flags):
    """Args of a run of about a second. learning_starts, seed_episodes: updates begin soon."""
    flags = dict(total_timesteps=120, learning_starts=20, prefill=20, seed_episodes=1, checkpoint_every=120) | flags
    flags = known(module, {"device": "cpu", **flags})
    return module.Args(env_id=env_id, size="debug", run_root=str(root), **flags)


def uniform(replay, B, T):
    """Windows that are drawn, not those of the online queue."""
    return replay.sample(B, T, **({"online": False} if hasattr(replay, "online") else {}))


def experience(module, env_id="Tiny-both-discrete-v0", rows=40, num_envs=2, **flags):
    """-> an untrained agent, and a replay of what it did."""
    args = module.resolve(
        module.Args(env_id=env_id, size="debug", device="cpu", num_envs=num_envs, **known(module, flags))
    )
    envs = module.make_envs(env_id, num_envs, args.seed, args)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    torch.manual_seed(0)
    agent = module.Agent(obs_space, action_space, args)
    latents = getattr(agent, "latents", lambda state: {})  # what the file keeps of a state, if anything
    row, state = module.start_row(envs, args.seed), agent.initial(num_envs)
    extras = {key: (x.shape[1:], x.dtype) for key, x in latents(state).items()}
    replay = module.Replay(1000, num_envs, obs_space, action_space, agent.device, *([extras] if extras else []))
    for _ in range(rows):
        action, state = act(agent, row, state)
        replay.add({**row, "action": action, **latents(state)})
        row = module.next_row(envs, action, row)
    envs.close()
    return agent, replay


def act(agent, row, state, **flags):
    """-> actions for the environments, next state."""
    state = agent.act(agent.inputs(row, state), **flags)
    return agent.env_action(state), state


def captured(module, agent, eval=False):
    """The agent, with its update and its acting as CUDA graphs, as train and evaluate make them."""
    on = agent.args.cuda_graph and agent.device.type == "cuda"
    agent.update = module.Captured(agent.update, on)
    agent.act = module.Captured(functools.partial(agent.act, eval=eval), on)
    return agent


def window(module, agent, replay, B=4):
    torch.manual_seed(1)
    return replay.sample(B, agent.args.batch_length + CONTEXT[module.__name__.split("_")[0]])


def same(a, b):
    """Equal bit by bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b)


def full_disk(monkeypatch, which=lambda target: True):
    """torch.save finds no space in the middle of the second file that counts. which: target -> does it?"""
    real, calls = torch.save, itertools.count()

    def save(state, target):
        if which(target) and next(calls) == 1:
            (target.write if hasattr(target, "write") else target.write_bytes)(b"half")
            raise OSError(28, "No space left on device")
        return real(state, target)

    monkeypatch.setattr(torch, "save", save)
    return real


def gif(path_or_bytes):
    """-> number of frames, size. Decodes the last frame too."""
    image = Image.open(path_or_bytes)
    image.seek(image.n_frames - 1)
    image.load()
    return image.n_frames, image.size


def host_waits(call):
    """What call() does that reads a value on the host, makes a shape depend on one, or copies from host memory.

    These are what a CUDA graph cannot capture, and what stalls a GPU; torch.normal(mean, std) checks std on the host.
    """
    reads = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero"}
    waits = "_local_scalar_dense nonzero masked_select item multinomial lift_fresh unique bincount equal is_nonzero"
    waits = set(waits.split()) | {"_unique2", "unique_dim", "unique_consecutive", "histc", "normal"}
    found = set()

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in reads:
                found.add(func.__name__)
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name, masks = func._schema.name.removeprefix("aten::"), args[1] if len(args) > 1 else None
            if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                name += " by mask" * any(x is not None and x.dtype == torch.bool for x in masks)
            if name in waits or "by mask" in name:
                found.add(str(func))
            return func(*args, **(kwargs or {}))

    with Functions(), Operations():
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()  # once more: under a mode of Python, gradients of prod and cumprod take a way that reads nothing
    return found | {event.key for event in profile.key_averages() if event.key.removeprefix("aten::") in waits}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def merlin_agent(env_id="MemoryGame-6-v0", merlin=merlin, **flags):
    """-> environments, an agent of merlin.py with weights that are not zero anywhere."""
    args = merlin.resolve(merlin.Args(env_id=env_id, **{"size": "debug", "device": "cpu", **flags}))
    envs = merlin.make_envs(env_id, args.num_envs, args.seed, args)
    torch.manual_seed(0)
    agent = merlin.AGENTS[args.agent](envs.single_observation_space, envs.single_action_space, args)
    if args.agent == "merlin":
        torch.nn.init.normal_(agent.posterior[-1].weight, std=0.3)
    return envs, agent


def merlin_window(envs, agent, windows=1, merlin=merlin):
    """-> batch of the last of some windows, row and state after it."""
    row, state = merlin.start_row(envs, 0), agent.initial(envs.num_envs)
    for _ in range(windows):
        start, rows = {f"state/{key}": x.clone() for key, x in state.items()}, []
        for _ in range(agent.args.window):
            state = agent.act(agent.inputs(row, state))
            rows.append({**row, "action": agent.env_action(state), "noise": state["noise"].clone()})
            row = merlin.next_row(envs, rows[-1]["action"], row)
        rows.append({**row, "action": 0 * rows[-1]["action"], "noise": torch.randn_like(state["noise"])})
        batch = {key: torch.stack([torch.as_tensor(x[key]) for x in rows], 1).to(agent.device) for key in rows[0]}
    return {**batch, **start}, row, state


def gumbel_agent(module=gumbel_softmax, **flags):
    """-> an agent of gumbel_softmax.py, or of a patched one."""
    torch.manual_seed(0)
    return module.Agent(module.resolve(module.Args(size="debug", device="cpu", **flags)))
