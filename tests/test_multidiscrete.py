# SPDX-License-Identifier: MIT
"""The patches multidiscrete of results/ablations: actions of several choices at once."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import experience, known, merlin_agent, merlin_window, short, window


def several(*names):
    """These files, patched."""
    return pytest.mark.parametrize("variant", [f"{name} multidiscrete" for name in names], indirect=True)


dreamers, every = several("dreamerv3", "dreamerv2"), several("dreamerv3", "dreamerv2", "merlin")


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


@dreamers
def test_several_choices(variant):
    """Against independent categoricals: log-probability, entropy, frequencies; what model and task are given."""
    flags = known(variant, dict(actor_unimix=0.1))
    args, mix = variant.resolve(variant.Args(size="debug", device="cpu", **flags)), sum(flags.values())
    space = spaces.MultiDiscrete([3, 2, 5])
    torch.manual_seed(0)
    agent = variant.Agent(spaces.Dict(vector=spaces.Box(-1, 1, (3,))), space, args)
    feat = torch.randn(1, args.deter + args.stoch * args.classes)
    torch.nn.init.normal_(agent.actor.out.weight, std=1 / agent.actor.mlp(feat).norm().item())
    logits = agent.actor.out(agent.actor.mlp(feat))[0].split([3, 2, 5])
    probs = [(1 - mix) * x.softmax(-1) + mix / len(x) for x in logits]
    exact = [torch.distributions.Categorical(p) for p in probs]
    action = agent.actor.sample(feat.expand(20_000, -1))  # (N, A)
    assert torch.allclose(action.mean(0), torch.cat(probs), atol=0.02)
    dist, played = agent.actor.dist(feat), torch.from_numpy(agent.env_action({"action": action}))  # (N, 3)
    logp = sum(d.log_prob(played[:, i]) for i, d in enumerate(exact))
    assert torch.allclose(agent.actor.log_prob(dist, action), logp, atol=1e-5)
    assert torch.allclose(agent.actor.entropy(dist), sum(d.entropy() for d in exact), atol=1e-5)
    if hasattr(agent, "action_vector"):
        assert torch.equal(agent.action_vector(played[None]), action[None])
    else:  # one row later: the action that led to it
        batch = {"action": played[None], "is_first": torch.zeros(1, len(played), dtype=torch.bool)}
        assert torch.equal(agent.previous(batch)[0][0, 1:], action[:-1].detach())
        uniform = agent.act({"action": torch.zeros(20_000, 10)}, random=True)["action"].mean(0)
        assert torch.allclose(uniform, torch.cat([torch.ones(n) / n for n in (3, 2, 5)]), atol=0.02)
    best = agent.actor.sample(feat, mode=True)[0].split([3, 2, 5])
    assert [x.argmax() for x in best] == [p.argmax() for p in probs]


@dreamers
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_other_actions_are_as_they_were(variant, kind):
    """With the patch, Discrete and Box agents act and learn as without it, bit for bit."""
    results = []
    for module in importlib.import_module(variant.__name__.split("_")[0]), variant:
        agent, replay = experience(module, f"Tiny-both-{kind}-v0")
        torch.manual_seed(5)
        results.append(agent.update(window(module, agent, replay)))
    assert all(torch.equal(x, results[1][key]) for key, x in results[0].items())


def merlin_losses(module, env_id, **flags):
    """-> agent, batch, losses and statistics of its first window."""
    envs, agent = merlin_agent(env_id, module, **flags)
    batch, *_ = merlin_window(envs, agent, merlin=module)
    return agent, batch, *agent.losses(batch)


@several("merlin")
@pytest.mark.parametrize("name", ["merlin", "rl_mem", "rl_lstm"])
def test_several_choices_of_merlin(variant, pair, name):
    """Probabilities of independent choices; the loss of a decoder that predicts each; the actions that were played."""
    pair(spaces.MultiDiscrete([3, 2, 5]))
    agent, batch, losses, stats = merlin_losses(variant, "Pair-v0", agent=name)
    logits, counts = agent.unroll(batch)["logits"], [3, 2, 5]
    parts = [torch.distributions.Categorical(logits=x) for x in logits.split(counts, -1)]
    entropy = sum(part.entropy() for part in parts)[:, :-1]
    assert torch.allclose(stats["policy_entropy"], entropy, atol=1e-5)
    assert agent.log_probs(logits).exp().sum(-1).sub(3).abs().max() < 1e-5
    vector = agent.action_vector(batch["action"])  # (N, T+1, A)
    played = torch.stack([x.argmax(-1) for x in vector.split(counts, -1)], -1)
    assert torch.equal(played, batch["action"]) and (vector.sum(-1) == 3).all()
    assert all(len(batch["action"][..., i].unique()) == count for i, count in enumerate(counts))
    if name == "merlin":
        z, obs = torch.randn(1, agent.args.stoch), {key: batch[key][0, :1] for key in agent.decoder.shapes}
        loss = agent.decoder.losses(z, obs, vector[0, :1], torch.zeros(1))["action"]
        parts = agent.decoder(z)["action"].split(counts, -1)
        exact = sum(torch.nn.functional.cross_entropy(x, played[0, :1, i]) for i, x in enumerate(parts))
        assert torch.allclose(loss, exact)


@several("merlin")
def test_one_choice_of_merlin_is_as_it_was(variant):
    """With the patch, a Discrete agent acts and learns as without it, bit for bit."""
    results = [merlin_losses(module, "MemoryGame-6-v0") for module in (importlib.import_module("merlin"), variant)]
    assert all(torch.equal(x, results[1][2][key]) for key, x in results[0][2].items())


SEVERAL = {  # each with three values for each of two parts
    "MultiDiscrete": spaces.MultiDiscrete([3, 3]),
    "start": spaces.MultiDiscrete([3, 3], start=[1, -2]),
    "integers": spaces.Box(-1, 1, (2, 1), np.int8),
}


@every
@pytest.mark.parametrize("kind", [*SEVERAL, "MultiBinary"])
def test_several_choices_are_played(variant, pair, tmp_path, kind):
    """A whole run: each action lies in its space, in its type; the evaluation, too."""
    pair(SEVERAL.get(kind, spaces.MultiBinary(4)))
    result = variant.train(short(variant, "Pair-v0", tmp_path))
    assert result["updates"] > 1 and np.isfinite(result["losses/total"])
    agent, args = variant.load_agent(result["run_dir"])
    assert len(variant.evaluate(agent, args, 1)) == 1


@every
def test_too_many_choices(variant, pair, capsys):
    """Integers without bounds: one line."""
    pair(spaces.Box(-(2**60), 2**60, (2,), np.int64))
    args = variant.resolve(variant.Args(env_id="Pair-v0", size="debug", device="cpu"))
    with pytest.raises(SystemExit) as stop:
        variant.make_envs("Pair-v0", 1, 0, args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "10,000 classes" in error and error.count("\n") == 1


@pytest.mark.slow
@several("dreamerv3", "merlin")
def test_parts_of_an_action_agree(variant, pair, tmp_path):
    """Both parts come to name the symbol that is seen: 10 an episode, where chance gives 1.6 and one right part 1."""
    pair(SEVERAL["MultiDiscrete"])
    flags = dict(total_timesteps=3000, train_ratio=256, batch_size=16, batch_length=16, learning_rate=1e-3, warmup=200)
    if variant.__name__.startswith("merlin"):
        flags = dict(total_timesteps=80_000)
    result = variant.train(short(variant, "Pair-v0", tmp_path, checkpoint_every=3000, **flags))
    agent, args = variant.load_agent(result["run_dir"])
    scores = variant.evaluate(agent, args, 20)
    print(result["episodic_return"], scores)
    assert np.mean(scores) > 8
