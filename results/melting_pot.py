# SPDX-License-Identifier: MIT
"""DeepMind's Melting Pot as a game for ftw.py: paintball__capture_the_flag, from pixels of 88 x 88.

    PYTHONPATH=results python ftw.py --env-id melting_pot:make --games 2 --eval-games 4 --total-games 8

--env-kwargs '{"players": 4}': of each team, 1 to 4; 2 if nothing is said.

pip install dm-meltingpot, which also loads the saved bots of other players from the net; without the net: an archive
meltingpot-assets-2.3.0.tar.gz with an empty folder assets in the folder for temporary files stands in for them.
One simulator for each game, in this process; a match takes 1,000 steps. READY_TO_SHOOT is not shown to the agents.
"""

import sys
from unittest.mock import MagicMock

import numpy as np
from gymnasium import spaces

EVENTS = [f"{who} {what}" for what in ("captured", "picked up", "returned") for who in ("I", "mate", "opponent")]
EVENTS += ["I tagged", "I tagged a carrier", "I was tagged", "I was tagged carrying"]  # as in ftw.py
KINDS = {"flag_captured": 0, "flag_picked_up": 3, "flag_returned": 6}


class MeltingPot:
    """G games of 2 * players each: the first player is red, the second blue, and so on."""

    points = np.float32([3, 3, -3, 1, 1, -1, 1, 1, -1, 1, 1, -0.25, -1])
    events = EVENTS
    observation_space, action_space = spaces.Box(0, 255, (88, 88, 3), np.uint8), spaces.MultiDiscrete([9])

    def __init__(self, games, seed, players=2):
        known = sys.modules.get("tensorflow")
        sys.modules["tensorflow"] = known or MagicMock()  # only the saved bots need it
        from meltingpot import substrate

        if not known:
            del sys.modules["tensorflow"]  # TensorBoard must not find it
        self.games, self.team = games, np.arange(2 * players) % 2
        config, roles = substrate.get_config("paintball__capture_the_flag"), ("default",) * (2 * players)
        self.envs = [substrate.build_from_config(config, roles=roles) for _ in range(games)]

    def reset(self):
        self.score = np.zeros((self.games, 2), int)
        return self.observe([env.reset() for env in self.envs])

    def step(self, action):
        """action: (G, N, 1) -> observations, events (G, N, 13), outcome: None, or at the end (G,) of the first team."""
        steps = [env.step(x[:, 0].tolist()) for env, x in zip(self.envs, action, strict=True)]
        events = np.stack([self.count(env.events(), score) for env, score in zip(self.envs, self.score, strict=True)])
        over = steps[0].last()  # all take equally long
        outcome = 0.5 + 0.5 * np.sign(self.score[:, 0] - self.score[:, 1]) if over else None
        return self.observe(steps), events, outcome

    def observe(self, steps):
        return np.stack([[seen["RGB"] for seen in step.observation] for step in steps])

    def count(self, events, score):
        """Events of one game in one step; score: (2,), counts on. -> (N, 13)."""
        counts, zap = np.zeros((len(self.team), 13), np.float32), None
        for name, (_, *pairs) in events:
            values = dict(zip(pairs[::2], pairs[1::2], strict=True))
            who = {key.decode(): int(x) - 1 for key, x in values.items() if key != b"team"}  # players count from 1
            if name in KINDS:
                player, kind = who["player_index"], KINDS[name]
                mine = self.team == self.team[player]
                counts[:, kind + 1] += mine
                counts[:, kind + 2] += ~mine
                counts[player, kind : kind + 2] += 1, -1
                score[self.team[player]] += name == "flag_captured"
            elif name == "zap":
                zap = who["source"], who["target"]
                counts[zap[0], 9] += 1
                counts[zap[1], 11] += 1
            elif name == "zapped_flag_carrier":  # comes right after the zap that it was
                counts[zap[0], 9:11] += -1, 1
                counts[zap[1], 11:13] += -1, 1
        return counts

    def render(self, g):
        """The whole world of game g, as spectators see it."""
        return np.asarray(self.envs[g].observation()[0]["WORLD.RGB"])


make = MeltingPot  # of games, seed and what --env-kwargs says
