# SPDX-License-Identifier: MIT
"""make_envs and its adapters: the rows that they give and that train stores, Atari, the DeepMind Control Suite."""

import dataclasses
import itertools
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from gymnasium import spaces
from helpers import same, short

# --- rows of experience -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_rows_are_aligned(module, tmp_path, made, action, num_envs):
    """In what train stores, a reward lies beside the observation it came with, an action beside the one it followed.

    The observation tells reward, step and the action as the environment got it. Box: from [-1, 1] to the bounds.
    """
    flags = dict(num_envs=num_envs, buffer_size=1000)
    result = module.train(short(module, f"Tiny-vector-{action}-v0", tmp_path, **flags))
    replay = made["Replay"][0]
    rows = {key: x[: replay.rows].numpy() for key, x in replay.data.items() if x.dtype != torch.bfloat16}
    first, last, terminal = rows["is_first"], rows["is_last"], rows["is_terminal"]
    reward, step, seen = rows["vector"][..., 0], rows["vector"][..., 1], rows["vector"][..., 2:]
    assert np.array_equal(rows["reward"], reward) and (reward[~first] > 0).all() and (reward[first] == 0).all()
    assert first[0].all() and np.array_equal(first[1:], last[:-1]) and np.array_equal(first, step == 0)
    assert np.array_equal(step[1:][~first[1:]], step[:-1][~first[1:]] + 1)
    sent = rows["action"]
    if action == "discrete":
        sent = np.eye(3)[sent]
    else:
        # samples of a policy beyond the bounds are stored as they are, and clipped on the way
        assert (abs(sent) > 1).any() == (module.__name__ == "dreamerv3")
        sent = toy_envs.LOW + (sent.clip(-1, 1) + 1) / 2 * (toy_envs.HIGH - toy_envs.LOW)
    assert np.allclose(seen[1:][~first[1:]], sent[:-1][~first[1:]], atol=1e-5) and (seen[first] == 0).all()
    assert terminal.any() and (last & ~terminal).any() and not (terminal & ~last).any()
    assert result["global_step"] == (~first[1:]).sum() + (~last[-1]).sum()  # reset rows are no steps
    if num_envs > 1:  # each environment has episodes of its own
        assert not np.array_equal(first[:, 0], first[:, 1]) and not np.array_equal(reward[:, 0], reward[:, 1])


def test_ends_are_told_apart(module):
    """is_terminal only where the environment terminated: the same episodes as in the bare environment."""
    args = module.resolve(module.Args(env_id="Tiny-vector-discrete-v0"))
    envs = module.make_envs(args.env_id, 2, 5, args)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    row, ends = module.start_row(envs, 5), [[], []]
    for _ in range(80):
        row = module.next_row(envs, np.array([0, 1]), row)
        for n in np.flatnonzero(row["is_last"]):
            ends[n].append(bool(row["is_terminal"][n]))
    for n, mine in enumerate(ends):
        env, expected = gym.make(args.env_id), []
        env.reset(seed=5 + n)
        while len(expected) < len(mine):
            _, _, terminated, truncated, _ = env.step(0)
            if terminated or truncated:
                expected.append(terminated)
                env.reset()
        assert mine == expected and len(set(mine)) == 2


# --- environments -----------------------------------------------------------------------------------------------------


def atari(module, n, steps, game="Pong", **flags):
    """-> spaces, rows of n environments that all get the same random actions."""
    args = module.resolve(module.Args(env_id=f"ALE/{game}-v5", **flags))
    envs = module.make_envs(args.env_id, n, 7, args)
    row, actions = module.start_row(envs, 7), np.random.default_rng(0).integers(envs.single_action_space.n, size=steps)
    rows = [row]
    for action in actions:
        rows.append(module.next_row(envs, np.full(n, action), rows[-1]))
    envs.close()
    rows = {key: np.stack([row[key] for row in rows]) for key in row}
    return envs.single_observation_space["image"], envs.single_action_space, rows


def test_atari_100k(module):
    """64 x 64 RGB, minimal actions, no sticky ones: without no-ops, seeds make no difference."""
    space, actions, rows = atari(module, 3, 80, atari_protocol="100k", env_kwargs='{"noop_max": 0}')
    assert space.shape == (64, 64, 3) and space.dtype == np.uint8 and actions == spaces.Discrete(6)
    image = rows["image"]
    assert image.shape == (81, 3, 64, 64, 3) and image.dtype == np.uint8 and image.std() > 10
    assert (image == image[:, :1]).all()
    assert (image[..., 0] != image[..., 1]).any()  # colours


def test_atari_200m(module):
    """Gray, 64 x 64 or 96 x 96, all 18 actions, sticky ones: the same actions lead apart."""
    flags = dict(atari_protocol="200m", env_kwargs='{"noop_max": 0}', size="debug")
    if module.__name__ == "planet":
        with pytest.raises(SystemExit):
            atari(module, 3, 80, **flags)
        return
    space, actions, rows = atari(module, 3, 80, **flags)
    side = 96 if 96 in module.SIDES else 64
    assert space.shape == (side, side, 1) and space.dtype == np.uint8 and actions == spaces.Discrete(18)
    image = rows["image"]
    assert (image[0] == image[0, :1]).all() and (image[-1, 0] != image[-1, 1]).any()
    assert same(rows, atari(module, 3, 80, **flags)[2])  # the same seeds repeat it


def test_atari_noops(module):
    """Up to 30 no-ops at the start, by seed: environments begin at different moments."""
    rows = atari(module, 4, 1)[2]
    assert len({image.tobytes() for image in rows["image"][0]}) > 1


def test_atari_actions_matter(module):
    """Another action shows another picture."""
    args = module.resolve(module.Args())
    envs = module.make_envs("ALE/Pong-v5", 2, 0, dataclasses.replace(args, env_kwargs='{"noop_max": 0}'))
    row = module.start_row(envs, 0)
    for _ in range(20):
        row = module.next_row(envs, np.array([2, 3]), row)
    envs.close()
    assert (row["image"][0] != row["image"][1]).any()


def test_atari_rewards_and_ends(module):
    """Rewards are not clipped; the frame limit counts repeated frames and truncates; the row after it is a reset."""
    rows = atari(module, 2, 130, "Skiing", env_kwargs='{"max_num_frames_per_episode": 240}')[2]
    assert rows["reward"].dtype == np.float32 and rows["reward"].min() < -1
    last, first = rows["is_last"], rows["is_first"]
    assert np.flatnonzero(last[:, 0]).tolist() == [60, 121] and not rows["is_terminal"].any()
    assert first[0].all() and np.array_equal(first[1:], last[:-1]) and (rows["reward"][first] == 0).all()


def dmc(module, task, actions, **flags):
    """-> Args, envs, rows after each of the actions."""
    args = module.resolve(module.Args(env_id=f"dm_control/{task}-v0", **flags))
    envs = module.make_envs(args.env_id, len(actions[0]), 3, args)
    rows = [module.start_row(envs, 3)]
    for action in actions:
        rows.append(module.next_row(envs, np.float32(action), rows[-1]))
    envs.close()
    return envs, rows


class Odd(gym.Env):
    """Random bounds; every action has to lie within them, in their type. Infos that do not fit together."""

    observation_space, places = spaces.Box(-1, 1, (2,)), itertools.count()

    def __init__(self, low, high, dtype="float32"):
        self.action_space = spaces.Box(np.asarray(low, dtype), np.asarray(high, dtype), dtype=np.dtype(dtype))
        self.place = next(self.places)

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.zeros(2, np.float32), {"x": None}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.count += 1
        info = {"x": [np.zeros(self.count), "text", None, 3][(self.count + self.place) % 4]}
        return np.zeros(2, np.float32), float(np.abs(action - self.action_space.low).max()), False, False, info


@pytest.fixture
def odd():
    gym.register("Odd-v0", Odd)
    yield
    del gym.registry["Odd-v0"]


def odd_envs(module, num_envs, **kwargs):
    args = module.resolve(module.Args(env_id="Odd-v0", env_kwargs=json.dumps(kwargs), size="debug", device="cpu"))
    return module.make_envs(args.env_id, num_envs, 0, args)


def test_actions_lie_in_their_space(module, odd):
    """For random bounds, equal ones and both types: within the bounds, in their type; -1 is the lower one."""
    rng = np.random.default_rng(0)
    for i in range(60):
        low = rng.normal(size=3).astype(np.float32)
        high = low + np.abs(rng.normal(size=3)).astype(np.float32) * (i % 3 > 0)
        dtype = ("float32", "float64")[i % 2]
        envs = odd_envs(module, 2, low=low.tolist(), high=high.tolist(), dtype=dtype)
        row = module.start_row(envs, 0)
        for action in -np.ones((2, 3)), np.ones((2, 3)), rng.normal(size=(2, 3)), 0 * rng.normal(size=(2, 3)):
            row = module.next_row(envs, np.float32(action), row)
            if (action == -1).all():
                assert (row["reward"] == 0).all()
        envs.close()


def test_integer_actions(module, odd, capsys):
    """A Box of integers, which would get fractions, is refused in one line."""
    with pytest.raises(SystemExit) as stop:
        odd_envs(module, 1, low=[0], high=[3], dtype="int64")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Box of floats" in error and error.count("\n") == 1


def test_infos_are_not_read(module, odd):
    """Whatever environments say beside their observations, several of them step together."""
    envs = odd_envs(module, 3, low=[-1], high=[1])
    row = module.start_row(envs, 0)
    for _ in range(9):
        row = module.next_row(envs, np.zeros((3, 1), np.float32), row)
    envs.close()


def test_dm_control_vectors(module):
    """float32 vectors, scalars lifted; a time limit truncates after 1000 frames; repeated frames add up rewards."""
    envs, rows = dmc(module, "walker-stand", [np.ones((2, 6))] * 22, action_repeat=50, obs="vector")
    space = envs.single_observation_space
    assert {key: x.shape for key, x in space.items()} == {"height": (1,), "orientations": (14,), "velocity": (9,)}
    assert all(x.dtype == np.float32 for x in space.values()) and all(rows[0][key].dtype == np.float32 for key in space)
    assert envs.single_action_space == spaces.Box(-1, 1, (6,))
    last = np.stack([row["is_last"] for row in rows])
    assert np.flatnonzero(last[:, 0]).tolist() == [20] and last[20].all()
    assert not any(row["is_terminal"].any() for row in rows)
    assert rows[21]["is_first"].all() and (rows[21]["reward"] == 0).all() and not rows[22]["is_first"].any()
    assert 1 < rows[1]["reward"].min() and rows[1]["reward"].max() <= 50  # a sum of 50, each at most 1
    assert (rows[0]["orientations"][0] != rows[0]["orientations"][1]).any()  # seeds differ


def test_dm_control_actions(module):
    """Actions beyond the bounds are clipped to them, others are not."""
    positions = []
    for force in 1.0, 5.0, 0.5:
        _, rows = dmc(module, "cartpole-swingup", [[[force]]] * 3, obs="vector")
        positions.append(rows[-1]["position"])
    assert np.array_equal(positions[0], positions[1]) and not np.array_equal(positions[0], positions[2])


def test_dm_control_pixels(module):
    """Real pixels beside the vectors, or alone: 64 x 64 RGB, not blank, and they move."""
    envs, rows = dmc(module, "cartpole-balance", [[[1.0]]] * 8, obs="both", action_repeat=4)
    assert set(envs.single_observation_space) == {"image", "position", "velocity"}
    images = np.stack([row["image"][0] for row in rows])
    assert images.shape == (9, 64, 64, 3) and images.dtype == np.uint8 and images.std() > 5
    assert (images[0] != images[-1]).any()
    envs, _ = dmc(module, "cartpole-balance", [[[1.0]]], obs="image")
    assert set(envs.single_observation_space) == {"image"}
