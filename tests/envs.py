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

    def __init__(self, obs="vector", action="discrete", size=64, channels=3, render_mode=None):
        self.obs, self.size, self.channels, self.discrete = obs, size, channels, action == "discrete"
        self.start = 4 if obs == "odd" else 0
        self.action_space = spaces.Discrete(3, start=self.start) if self.discrete else spaces.Box(LOW, HIGH)
        self.numbers = 5 if self.discrete else 4  # of a vector
        image = spaces.Box(0, 255, (size, size, channels), np.uint8)
        vector = spaces.Box(-np.inf, np.inf, (self.numbers,), np.float32)
        odd = {"grid": spaces.Box(-9, 9, (2, 3), np.float64), "number": spaces.Discrete(10)}
        odd["flags"] = spaces.MultiBinary(2)
        kinds = {"image": image, "vector": vector, "both": {"image": image, "vector": vector}, "odd": odd}
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
        self.count += 1
        reward, end = float(self.np_random.integers(1, 8)) / 2, self.count == self.limit
        truncated = end and bool(self.np_random.integers(2))
        seen = np.eye(3)[action - self.start] if self.discrete else action
        return self.observe(reward, seen), reward, end and not truncated, truncated, {}


for kind in "image", "vector", "both", "odd":
    for action in "discrete", "box":
        gym.register(f"Tiny-{kind}-{action}-v0", entry_point="envs:Tiny", kwargs=dict(obs=kind, action=action))
