# SPDX-License-Identifier: MIT
"""dreamerv3.py with results/ablations/dreamerv3_multidiscrete.patch: actions of several choices at once."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import experience, short, window

import dreamerv3 as d3

several = pytest.mark.parametrize("variant", ["dreamerv3 multidiscrete"], indirect=True)


class Pair(gym.Env):
    """Shown is one of three symbols; an action of two parts earns 1 if both name it, 0.1 if one does. Ten steps."""

    observation_space = spaces.Discrete(3)

    def __init__(self, space):
        self.action_space = space
        self.least = np.ravel(getattr(space, "low", getattr(space, "start", 0)))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.symbol = 0, int(self.np_random.integers(3))
        return self.symbol, {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        right = np.sum(np.ravel(action) - self.least == self.symbol)
        self.count, self.symbol = self.count + 1, int(self.np_random.integers(3))
        return self.symbol, (0.0, 0.1, 1.0)[min(right, 2)], False, self.count == 10, {}


@pytest.fixture
def pair():
    """pair(action space) registers the task, Pair-v0, for the time of a test."""
    yield lambda space: gym.register("Pair-v0", Pair, kwargs=dict(space=space))
    del gym.registry["Pair-v0"]


@several
def test_several_choices(variant):
    """Against independent categoricals: log-probability, entropy, frequencies; what model and task are given."""
    args = variant.resolve(variant.Args(size="debug", device="cpu", actor_unimix=0.1))
    space = spaces.MultiDiscrete([3, 2, 5])
    torch.manual_seed(0)
    agent = variant.Agent(spaces.Dict(vector=spaces.Box(-1, 1, (3,))), space, args)
    torch.nn.init.normal_(agent.actor.out.weight)
    feat = torch.randn(1, args.deter + args.stoch * args.classes)
    logits = agent.actor.out(agent.actor.mlp(feat))[0].split([3, 2, 5])
    probs = [0.9 * x.softmax(-1) + 0.1 / len(x) for x in logits]
    exact = [torch.distributions.Categorical(p) for p in probs]
    action = agent.actor.sample(feat.expand(20_000, -1))  # (N, A)
    assert torch.allclose(action.mean(0), torch.cat(probs), atol=0.02)
    dist, played = agent.actor.dist(feat), torch.from_numpy(agent.env_action({"action": action}))  # (N, 3)
    logp = sum(d.log_prob(played[:, i]) for i, d in enumerate(exact))
    assert torch.allclose(agent.actor.log_prob(dist, action), logp, atol=1e-5)
    assert torch.allclose(agent.actor.entropy(dist), sum(d.entropy() for d in exact), atol=1e-5)
    assert torch.equal(agent.action_vector(played[None]), action[None])
    best = agent.actor.sample(feat, mode=True)[0].split([3, 2, 5])
    assert [x.argmax() for x in best] == [p.argmax() for p in probs]


@several
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_other_actions_are_as_they_were(variant, kind):
    """With the patch, Discrete and Box agents act and learn as without it, bit for bit."""
    results = []
    for module in d3, variant:
        agent, replay = experience(module, f"Tiny-both-{kind}-v0")
        torch.manual_seed(5)
        results.append(agent.update(window(module, agent, replay)))
    assert all(torch.equal(x, results[1][key]) for key, x in results[0].items())


SEVERAL = {  # each with three values for each of two parts
    "MultiDiscrete": spaces.MultiDiscrete([3, 3]),
    "start": spaces.MultiDiscrete([3, 3], start=[1, -2]),
    "integers": spaces.Box(-1, 1, (2, 1), np.int8),
}


@several
@pytest.mark.parametrize("kind", [*SEVERAL, "MultiBinary"])
def test_several_choices_are_played(variant, pair, tmp_path, kind):
    """A whole run: each action lies in its space, in its type; the evaluation, too."""
    pair(SEVERAL.get(kind, spaces.MultiBinary(4)))
    result = variant.train(short(variant, "Pair-v0", tmp_path))
    assert result["updates"] > 1 and np.isfinite(result["losses/total"])
    agent, args = variant.load_agent(result["run_dir"])
    assert len(variant.evaluate(agent, args, 1)) == 1


@several
def test_too_many_choices(variant, pair, capsys):
    """Integers without bounds: one line."""
    pair(spaces.Box(-(2**60), 2**60, (2,), np.int64))
    args = variant.resolve(variant.Args(env_id="Pair-v0", size="debug", device="cpu"))
    with pytest.raises(SystemExit) as stop:
        variant.make_envs("Pair-v0", 1, 0, args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "10,000 classes" in error and error.count("\n") == 1


@pytest.mark.slow
@several
def test_parts_of_an_action_agree(variant, pair, tmp_path):
    """Both parts come to name the symbol that is seen: 10 an episode, where chance gives 1.6 and one right part 1."""
    pair(SEVERAL["MultiDiscrete"])
    flags = dict(total_timesteps=3000, train_ratio=256, batch_size=16, batch_length=16, learning_rate=1e-3, warmup=200)
    result = variant.train(short(variant, "Pair-v0", tmp_path, checkpoint_every=3000, **flags))
    agent, args = variant.load_agent(result["run_dir"])
    scores = variant.evaluate(agent, args, 20)
    print(result["episodic_return"], scores)
    assert np.mean(scores) > 8
