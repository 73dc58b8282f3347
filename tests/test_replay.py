# SPDX-License-Identifier: MIT
"""Replay on its own: which windows it gives, what it writes back, what it saves."""

import itertools
import time

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import same, stateful, uniform

CPU = torch.device("cpu")
SPACE = spaces.Dict({"vector": spaces.Box(-np.inf, np.inf, (2,)), "image": spaces.Box(0, 255, (2, 2, 1), np.uint8)})
EXTRAS = {"memory": ((3,), torch.bfloat16)}


def numbered(module, rows, capacity=60, num_envs=3, replay=None):
    """A replay whose observations say environment and row; environment n ends an episode every 5 + n rows."""
    extras = [EXTRAS] if hasattr(module.Replay, "write") else []
    replay = replay or module.Replay(capacity, num_envs, SPACE, spaces.Discrete(9), CPU, *extras)
    env = np.arange(num_envs)
    for t in range(replay.rows, replay.rows + rows):
        vector = np.float32(np.stack([env, np.full(num_envs, t)], -1))
        row = {"vector": vector, "image": np.full((num_envs, 2, 2, 1), t % 256, np.uint8), "action": (t + env) % 9}
        row |= {"is_first": t % (5 + env) == 0, "is_last": t % (5 + env) == 4 + env, "reward": 100 * env + t}
        replay.add({**row, "is_terminal": row["is_last"] & (env == 0), "memory": torch.zeros(num_envs, 3)})
    return replay


def places(batch):
    """-> environment (B), first row (B), after a look at whether windows are what numbered wrote."""
    env, row = batch["vector"].unbind(-1)  # (B, T) each
    assert (env == env[:, :1]).all() and (row == row[:, :1] + torch.arange(row.shape[1])).all()
    assert torch.equal(batch["reward"], 100 * env + row) and torch.equal(batch["action"], (row + env).long() % 9)
    assert torch.equal(batch["image"][..., 0, 0, 0].float(), row)
    assert torch.equal(batch["is_first"], row % (5 + env) == 0)
    assert torch.equal(batch["is_last"], row % (5 + env) == 4 + env)
    assert torch.equal(batch["is_terminal"], batch["is_last"] & (env == 0))
    return env[:, 0].long(), row[:, 0].long()


@stateful
@pytest.mark.parametrize("rows", [9, 20, 33, 50])
def test_windows(module, rows):
    """Windows are consecutive rows of one environment, from the oldest to the newest kept, wrapped around or not."""
    replay, T = numbered(module, rows), 7
    env, start = places(uniform(replay, 2000, T))
    oldest = max(0, rows - 20)
    assert replay.windows(T) == 3 * (rows - oldest - T + 1)
    assert set(zip(env.tolist(), start.tolist(), strict=True)) == {
        (n, t) for n in range(3) for t in range(oldest, rows - T + 1)
    }
    assert all(len(x) == 20 for x in replay.data.values())  # the capacity, shared by the environments


@stateful
def test_windows_are_uniform(module):
    """Chi-square over all windows; a right sampler would fail at one seed in a million."""
    replay, draws = numbered(module, 47), 40_000
    torch.manual_seed(0)
    env, start = places(uniform(replay, draws, 6))
    counts = torch.bincount(env * 15 + start - 27, minlength=45).double()
    chi2, df = float(((counts - draws / 45) ** 2).sum() / (draws / 45)), 44
    limit = df * (1 - 2 / (9 * df) + 4.753 * (2 / (9 * df)) ** 0.5) ** 3  # Wilson and Hilferty, p = 1e-6
    assert len(counts) == 45 and chi2 < limit


def test_a_larger_replay(module, tmp_path):
    """Rows that had left the ring when it was saved are not there in a larger one, from the first sample on."""
    replay = numbered(module, 33)
    larger = numbered(module, 0, capacity=90)
    larger.load(tmp_path, replay.save(tmp_path))
    assert larger.length == 30 and larger.windows(7) == replay.windows(7)
    drawn = [set(zip(*(x.tolist() for x in places(uniform(x, 3000, 7))), strict=True)) for x in (replay, larger)]
    assert drawn[0] == drawn[1] and min(start for _, start in drawn[1]) == 13


def test_a_sample_costs_the_same_however_many_episodes(module):
    """A million rows of short episodes are what an Atari run ends with; an update waits for its sample."""
    few, many = numbered(module, 40, 30_000), numbered(module, 8000, 30_000)  # 20 episodes, and 4,000
    times = {}
    for replay in few, many, few, many:  # the least of many, in turn: machines are noisy
        for _ in range(60):
            began = time.perf_counter()
            replay.sample(4, 5)
            times[replay] = min(times.get(replay, 1e9), time.perf_counter() - began)
    assert times[many] < 3 * times[few], times


def test_abandoned_episodes(module):
    """is_last is set where the next row is a first one, in the batch and not in the store."""
    replay = numbered(module, 20)
    replay.data["is_last"][:] = False
    batch = uniform(replay, 50, 7)
    assert batch["is_first"][:, 1:].any() and torch.equal(batch["is_last"][:, :-1], batch["is_first"][:, 1:])
    assert not replay.data["is_last"].any()


@stateful
def test_online_queue(module):
    """New windows come first in a batch, each once, and together they cover every row, also when the ring wraps."""
    replay, T, given = numbered(module, 3), 4, []  # 3: a window is never complete, but for its last row
    for _ in range(30):
        numbered(module, 4, replay=replay)
        env, start = places(replay.sample(5, T))
        given += list(zip(env.tolist(), start.tolist(), strict=True))[:3]
    assert len(set(given)) == len(given)
    assert {(n, t + i) for n, t in given for i in range(T)} == {(n, t) for n in range(3) for t in range(120)}
    env, start = places(replay.sample(64, T))  # nothing new: uniform ones only
    assert (start % T != 0).any() and (start >= 100).all()


@stateful
def test_online_queue_skips_what_is_gone(module):
    """A learner that falls behind gets the windows that are still whole, and none twice."""
    replay, T = numbered(module, 50), 4
    replay.sample(2, T)
    numbered(module, 33, replay=replay)
    env, start = places(replay.sample(12, T))
    assert set(zip(env.tolist(), start.tolist(), strict=True)) == {(n, t) for n in range(3) for t in (64, 68, 72, 76)}


@stateful
def test_write(module):
    """Extras go back to the rows they came from, not to context rows; where windows overlap, the last one wins."""
    replay, context = numbered(module, 26), 2
    batch = uniform(replay, 40, 7)
    env, start = places(batch)
    batch["memory"] = (
        (torch.arange(40.0)[:, None] * 7 + torch.arange(7))[..., None].expand(-1, -1, 3).clone().bfloat16()
    )
    batch["reward"] += 1  # not an extra
    expected = torch.zeros(20, 3, 3, dtype=torch.bfloat16)
    for b, i in itertools.product(range(40), range(context, 7)):
        expected[(start[b] + i) % 20, env[b]] = batch["memory"][b, i]
    before = {key: x.clone() for key, x in replay.data.items() if key != "memory"}
    replay.write(batch["index"][:, context:], {"memory": batch["memory"][:, context:]})
    assert torch.equal(replay.data["memory"], expected) and (expected == 0).any()
    assert same(before, {key: x for key, x in replay.data.items() if key != "memory"})


@pytest.mark.parametrize("first,second", [(8, 5), (12, 15), (30, 9), (5, 45)])
def test_replay_is_saved_in_increments(module, tmp_path, first, second):
    """A second save adds a file with the new rows only, and a new replay reads everything back, wrapped or not: what
    has been rewritten since its row was saved as it was then.
    """
    replay = numbered(module, first)
    replay.save(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    numbered(module, second, replay=replay)
    saved = {key: x.clone() for key, x in replay.data.items()}
    if "memory" in replay.data:
        older = [row % 20 for row in range(max(0, replay.rows - 20), first)]
        replay.data["memory"][older] += 1
    state = replay.save(tmp_path)
    assert state["rows"] == replay.rows == first + second and state.get("online") == getattr(replay, "online", None)
    for path, content in files.items():
        assert path.read_bytes() == content
    new = [path for path in tmp_path.iterdir() if path not in files]
    (content,) = [torch.load(path, weights_only=True) for path in new]
    assert torch.equal(
        content["vector"][:, 0, 1], torch.arange(max(first, first + second - 20), first + second).float()
    )
    assert set(content) == set(replay.data)
    (tmp_path / "rows-7-9.pt").write_bytes(b"left behind by a crash")
    other = numbered(module, 0)
    other.load(tmp_path, state)
    other.save(tmp_path)
    assert not (tmp_path / "rows-7-9.pt").exists()
    kept = torch.arange(max(0, replay.rows - 20), replay.rows) % 20
    for key, x in saved.items():
        assert torch.equal(other.data[key][kept], x[kept]), key
        replay.data[key].copy_(x)
    torch.manual_seed(0)
    batch = replay.sample(9, 4)
    torch.manual_seed(0)
    assert same(batch, other.sample(9, 4))
    numbered(module, 3, replay=other)
    places(other.sample(50, 4))
