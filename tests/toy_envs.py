# SPDX-License-Identifier: MIT
"""Tiny environments, in which all that matters can be read off the observations."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

LOW, HIGH = np.float32([-3, 0]), np.float32([1, 10])  # of the Box actions


class Tiny(gym.Env):
    """Episodes of 3 to 9 steps, by seed, which end by chance through termination or truncation.

    A vector holds the reward that came with it, the step in the episode, and the action that led to it (one-hot, or in
    the bounds of the Box); an image the same as gray squares, and a bar that moves. Rewards do not depend on actions.
    """

    def __init__(self, obs="vector", action="discrete", size=64, channels=3, render_mode=None, raise_at=None):
        self.obs, self.size, self.channels, self.discrete = obs, size, channels, action == "discrete"
        self.start = 4 if obs == "odd" else 0
        self.action_space = spaces.Discrete(3, start=self.start) if self.discrete else spaces.Box(LOW, HIGH)
        self.action_space = spaces.MultiBinary(3) if action == "multi" else self.action_space
        self.numbers = 5 if self.discrete else 4  # of a vector
        image = spaces.Box(0, 255, (size, size, channels), np.uint8)
        vector = spaces.Box(-np.inf, np.inf, (self.numbers,), np.float32)
        odd = {"grid": spaces.Box(-9, 9, (2, 3), np.float64), "number": spaces.Discrete(10)}
        odd["flags"] = spaces.MultiBinary(2)
        kinds = {"image": image, "vector": vector, "both": {"image": image, "vector": vector}, "odd": odd}
        kinds["sequence"] = spaces.Sequence(vector)
        self.steps, self.raise_at = 0, raise_at
        self.observation_space = spaces.Dict(kinds[obs]) if obs in ("both", "odd") else kinds[obs]

    def observe(self, reward, action):
        vector = np.float32([reward, self.count, *action])
        image = np.zeros((self.size, self.size, self.channels), np.uint8)
        for i, value in enumerate(vector):
            image[:8, 8 * i : 8 * i + 8] = np.uint8(128 + 8 * value)
        image[16:, 4 * self.count : 4 * self.count + 4] = 255
        odd = {"grid": np.full((2, 3), reward), "number": self.count, "flags": np.int8([1, self.count % 2])}
        return {"image": image, "vector": vector, "both": {"image": image, "vector": vector}, "odd": odd}[self.obs]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.limit = 0, int(self.np_random.integers(3, 10))
        return self.observe(0.0, np.zeros(self.numbers - 2)), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.count, self.steps = self.count + 1, self.steps + 1
        if self.steps == self.raise_at:
            raise ValueError("the simulator broke")
        reward, end = float(self.np_random.integers(1, 8)) / 2, self.count == self.limit
        truncated = end and bool(self.np_random.integers(2))
        seen = np.eye(3)[action - self.start] if self.discrete else action
        return self.observe(reward, seen), reward, end and not truncated, truncated, {}


class Recall(gym.Env):
    """Take it or leave it, by what was seen two frames ago. Four frames: cue, dark, question (gray bar), dark.

    Only the action at the question counts: 0 leaves (reward 0), 1 takes. kind "image": the cue is a square on the left
    (taking pays -1) or on the right (+1). kind "both": beside it a vector is -1 or +1 in the first frame only; taking
    pays 3 if the square is on the right and the vector +1, else -1. All cues are equally likely, so that who takes
    blindly gets 0, and the optimum is 1/2 (image) and 3/4 (both); who misses one of the two cues gets 1/2 at most.
    """

    def __init__(self, kind="image"):
        self.kind = kind
        image, sign = spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = image if kind == "image" else spaces.Dict({"image": image, "sign": sign})
        self.action_space = spaces.Discrete(2)

    def observe(self):
        image = np.zeros((64, 64, 3), np.uint8)
        if self.count == 0:
            left = 40 if self.side > 0 else 8
            image[24:40, left : left + 16] = 128
        if self.count == 2:
            image[:8] = 128
        return image if self.kind == "image" else {"image": image, "sign": np.float32([self.sign * (self.count == 0)])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, (self.side, self.sign) = 0, (2 * self.np_random.integers(2, size=2) - 1).tolist()
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        worth = self.side if self.kind == "image" else 3 if self.side + self.sign == 2 else -1
        return self.observe(), float(worth * action * (self.count == 3)), self.count == 3, False, {}


class Reach(gym.Env):
    """Steer a disc to the centre of a dark image, by its velocity, in 30 steps. Cheap to render; nothing to remember.
    kind "vector": its two coordinates are seen instead.

    The disc starts 0.8 away from the centre, in any direction, and moves by 0.1 at most in x and in y; each step pays
    1 - distance, at least 0. Straight to the centre: 27.6; random actions: 6.1.
    """

    def __init__(self, kind="image"):
        image, vector = spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.Box(-1, 1, (2,))
        self.kind, self.observation_space, self.action_space = kind, image if kind == "image" else vector, vector

    def observe(self):
        if self.kind == "vector":
            return np.float32(self.place)
        rows, columns = np.ogrid[-1:1:64j, -1:1:64j]
        disc = (rows - self.place[0]) ** 2 + (columns - self.place[1]) ** 2 < 0.03
        image = np.zeros((64, 64, 3), np.uint8)
        image[30:34, 30:34, 0], image[disc] = 255, 255
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        angle, self.count = self.np_random.uniform(0, 2 * np.pi), 0
        self.place = 0.8 * np.array([np.sin(angle), np.cos(angle)])
        return self.observe(), {}

    def step(self, action):
        self.place, self.count = (self.place + 0.1 * np.asarray(action)).clip(-1, 1), self.count + 1
        reward = max(0.0, 1 - float(np.linalg.norm(self.place)))
        return self.observe(), reward, False, self.count == 30, {}


for kind in "image", "vector":
    gym.register(f"Reach-{kind}-v0", entry_point="toy_envs:Reach", kwargs=dict(kind=kind))
for kind in "image", "both":
    gym.register(f"Recall-{kind}-v0", entry_point="toy_envs:Recall", kwargs=dict(kind=kind))

for kind in "image", "vector", "both", "odd":
    for action in "discrete", "box":
        gym.register(f"Tiny-{kind}-{action}-v0", entry_point="toy_envs:Tiny", kwargs=dict(obs=kind, action=action))
gym.register("Tiny-multi-v0", entry_point="toy_envs:Tiny", kwargs=dict(action="multi"))
gym.register("Tiny-sequence-v0", entry_point="toy_envs:Tiny", kwargs=dict(obs="sequence"))
gym.register("Tiny-raises-v0", entry_point="toy_envs:Tiny", kwargs=dict(raise_at=60))
