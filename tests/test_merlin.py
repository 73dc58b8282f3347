# SPDX-License-Identifier: MIT
"""merlin.py: the memory in closed form, who learns from what, targets by hand, the game, runs of all three agents."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import shape_comments
import torch
from conftest import ROOT
from gymnasium import spaces
from helpers import host_waits, same
from helpers import merlin_agent as made
from helpers import merlin_window as window
from PIL import Image

import merlin

AGENTS = ["merlin", "rl_mem", "rl_lstm"]
PATCHES = ["lecture_order", "multidiscrete", "no_prior", "no_retroactive", "no_return_grad"]


@pytest.fixture
def ablated(request, tmp_path):
    """merlin.py with one patch of results/ablations, as a module of its own; with None as it is."""
    if request.param is None:
        yield merlin
        return
    name = f"merlin_{request.param}"
    shutil.copy(ROOT / "merlin.py", tmp_path)
    subprocess.run(["git", "apply", ROOT / "results" / "ablations" / f"{name}.patch"], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location(name, tmp_path / "merlin.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where dataclass looks for the annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


# --- memory -----------------------------------------------------------------------------------------------------------


def empty(N, R, W):
    """A memory before the first write."""
    return {key: torch.zeros(N, *shape) for key, shape in merlin.memory_shapes(R, W).items()}


def written(merlin, grad, T=9, R=20, gamma=0.8, N=3, Z=4):
    """Write T random contents without reads that matter. -> contents (N, T, Z), memory (N, R, 2*Z), state."""
    torch.manual_seed(0)
    z, state = torch.randn(N, T, Z), empty(N, R, 2 * Z)
    with torch.set_grad_enabled(grad):
        for t in range(T):
            state = merlin.write(state, z[:, t], torch.zeros(N, 1, R), gamma)
    return z, state["memory"], state


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("ablated", [None, "lecture_order", "no_retroactive"], indirect=True)
def test_memory_in_closed_form(ablated, grad):
    """Row i: z_i, and (1 - gamma) sum of gamma^(t-i-1) z_t over t > i; lecture: gamma^(t-i) over t >= i."""
    z, memory, state = written(ablated, grad)
    assert torch.equal(memory[:, :9, :4], z) and (memory[:, 9:] == 0).all()  # first halves are never touched again
    for i in range(9):
        terms = {"merlin": [(0.8 ** (t - i - 1), t) for t in range(i + 1, 9)], "merlin_no_retroactive": []}
        terms["merlin_lecture_order"] = [(0.8 ** (t - i), t) for t in range(i, 9)]
        expected = sum((0.2 * weight * z[:, t] for weight, t in terms[ablated.__name__]), torch.zeros(3, 4))
        assert torch.allclose(memory[:, i, 4:], expected, atol=1e-6), i
    assert (state["count"] == 9).all()


def test_rows_are_reused():
    """A full memory gives up the row read least per step, with its usage and its share of what comes; others stay."""
    R, N, gamma = 4, 2, 0.5
    z = torch.randn(N, 6, 3)
    state = empty(N, R, 6)
    reads = torch.tensor([[0.4, 0.35, 0.5, 0.9], [0.1, 0.4, 0.9, 0.9]])[:, None]  # the sum is least in rows 3 and 0
    kept = []
    for t in range(5):
        before = state["memory"].clone()
        state = merlin.write({**state, "memory": before.clone()}, z[:, t], reads, gamma)
        kept.append((before, state["memory"].clone(), {key: x.clone() for key, x in state.items()}))
    # usage at the fifth step: rows 0 to 3 were written at steps 0 to 3, and read since then
    since = reads[:, 0] * torch.tensor([4, 3, 2, 1])
    least = reads[:, 0].argmin(1)
    assert least.tolist() == [1, 0]
    before, after, state = kept[-1]
    for n in range(N):
        i = int(least[n])
        assert torch.equal(after[n, i], torch.cat([z[n, 4], torch.zeros(3)]))
        others = [j for j in range(R) if j != i]
        assert torch.equal(after[n, others, :3], before[n, others, :3])
        assert state["usage"][n, i] == 0 and state["retro"][n, i] == 0 and state["last"][n].argmax() == i
        assert torch.allclose(state["usage"][n, others], since[n, others])


def test_full_memory_goes_on_changing():
    """Many rows of a full memory are taken over, by what is read and not by how young they are."""
    torch.manual_seed(0)
    N, R, Z = 4, 20, 5
    state, taken = empty(N, R, 2 * Z), []
    for _ in range(4 * R):
        weights = merlin.read(state["memory"], torch.randn(N, 3, 2 * Z), torch.full((N, 3), 3.0))[1]
        state = merlin.write(state, torch.randn(N, Z), weights, 0.9)
        taken.append(state["last"].argmax(1))
    assert all(len(set(column.tolist())) > R // 4 for column in torch.stack(taken[R:], 1))


def test_read():
    """Weights sum to 1, a strong key finds its row, a weak one reads all alike, and empty rows have similarity 0."""
    memory = torch.eye(4)[None].repeat(2, 1, 1) * torch.tensor([1, 5, 0.2, 0])[:, None]
    keys = torch.tensor([[[0, 3.0, 0, 0], [0, 0, 0.1, 0]]]).repeat(2, 1, 1)
    for strength, expected in (50.0, [[0, 1, 0, 0], [0, 0, 1, 0]]), (0.0, [[0.25] * 4] * 2):
        reads, weights = merlin.read(memory, keys, torch.full((2, 2), strength))
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2))
        assert torch.allclose(weights[0], torch.tensor(expected).float())
        assert torch.allclose(reads, weights @ memory)
    weights = merlin.read(memory, keys, torch.full((2, 2), 1.0))[1][0, 0]
    assert torch.allclose(weights, torch.tensor([0, 1.0, 0, 0]).softmax(0), atol=1e-5)
    keys = torch.zeros(1, 1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(merlin.read(torch.zeros(1, 3, 4), keys, torch.ones(1, 1))[0].sum(), keys)
    assert torch.isfinite(grad).all()


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """A window with a time-out and a termination. Rows: 0, 1 end by time-out, 2 reset, 3, 4 terminal, 5 reset."""
    reward = torch.tensor([[0, 1.0, 0, 2, 3, 0]])
    value = torch.tensor([[10.0, 20, 30, 40, 50, 60]])
    last = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    terminal = torch.tensor([[0, 0, 0, 0, 1, 0]]).bool()
    gamma, lam = 0.5, 0.8
    deltas = [1 + 0.5 * 20 - 10, 0, 2 + 0.5 * 40 - 30, 3 + 0 - 40, 0]
    expected = [deltas[0], 0, deltas[2] + 0.4 * deltas[3], deltas[3], 0]
    out = merlin.advantages(reward, value, last, terminal, gamma, lam)
    assert torch.allclose(out, torch.tensor([expected]))
    returns = merlin.window_returns(reward, value, last, terminal, gamma)
    assert torch.allclose(returns, torch.tensor([[1 + 0.5 * 20, 20, 2 + 0.5 * 3, 3, 0]]))
    open_end = torch.zeros_like(last)
    returns = merlin.window_returns(reward, value, open_end, open_end, gamma)
    assert float(returns[0, 3]) == 3 + 0.5 * (0 + 0.5 * 60)


def test_kl():
    """Zero for a residual of zero, which is where a new agent begins; in closed form otherwise."""
    _, agent = made()
    torch.nn.init.zeros_(agent.posterior[-1].weight)
    envs, _ = made()
    losses, _ = agent.losses(window(envs, agent)[0])
    assert (losses["kl"] == 0).all()
    envs, agent = made()
    batch = window(envs, agent)[0]
    out = agent.unroll(batch)
    normal = [torch.distributions.Normal(*agent.gaussian(out[key][:, :-1])) for key in ("post", "prior")]
    expected = torch.distributions.kl_divergence(*normal).sum(-1)
    assert torch.allclose(agent.losses(batch)[0]["kl"], expected, rtol=1e-4, atol=1e-5) and expected.mean() > 0.1
    assert not torch.allclose(torch.distributions.kl_divergence(*normal[::-1]).sum(-1), expected, rtol=0.05)
    prior, shift = torch.randn(5, 8), torch.randn(5, 8) / 2
    post = agent.gaussian(prior + shift)
    (dm, dl), var = shift.chunk(2, -1), (2 * prior.chunk(2, -1)[1]).exp()
    expected = 0.5 * (dm**2 / var + (2 * dl).exp() - 2 * dl - 1).sum(-1)
    assert torch.allclose(merlin.kl_gaussian(*post, *agent.gaussian(prior)), expected, rtol=1e-4)


def test_losses_by_hand():
    """Cross-entropies of card and symbol, of the action before, squared error of the reward; nothing at the start."""
    envs, agent = made()
    batch = window(envs, agent, windows=3)[0]
    out = agent.unroll(batch)
    losses, _ = agent.losses(batch)
    T = losses["obs"].shape[1]
    recon = agent.decoder(out["z"][:, :T].flatten(0, 1))
    recon = {key: x.unflatten(0, (-1, T)) for key, x in recon.items()}
    card, symbol = recon["vector"].split([6, 3], -1)
    expected = sum(
        torch.nn.functional.cross_entropy(x.flatten(0, 1), batch["vector"][:, :T, i].flatten(), reduction="none")
        for i, x in enumerate((card, symbol))
    )
    assert torch.allclose(losses["obs"].flatten(), expected, atol=1e-5)
    assert torch.allclose(losses["reward"], (recon["reward"] - batch["reward"][:, :T]) ** 2 / 2)
    before = torch.cat([torch.zeros_like(batch["action"][:, :1]), batch["action"][:, : T - 1]], 1)
    ce = -recon["action"].log_softmax(-1).gather(-1, before[..., None])[..., 0] * ~batch["is_first"][:, :T]
    assert torch.allclose(losses["action"][:, 1:], ce[:, 1:], atol=1e-5) and batch["is_first"].any()
    ends = batch["is_last"][:, :T]
    assert ends.any() and (losses["policy"][ends] == 0).all() and (losses["value"][ends] == 0).all()
    assert (losses["policy"][~ends] != 0).all()


# --- who learns from what ---------------------------------------------------------------------------------------------


def test_policy_loss():
    """By hand: actions that did well become likelier, entropy is rewarded, the advantage has no gradient."""
    logp, entropy, advantage = (torch.tensor([[x]], requires_grad=True) for x in (-2.0, 0.5, 3.0))
    loss = merlin.policy_loss(logp, entropy, advantage, 0.1)
    assert loss.item() == pytest.approx(-(-2 * 3 + 0.1 * 0.5))
    grads = torch.autograd.grad(loss.sum(), (logp, entropy, advantage), allow_unused=True)
    assert grads[0].item() == -3 and grads[1].item() == pytest.approx(-0.1) and grads[2] is None


def test_who_sees_what():
    """Policy: its last read. Predictor: action, its last read. Value: the policy's probabilities. Layers: the input."""
    envs, agent = made()
    _, row, state = window(envs, agent)
    N, Z = envs.num_envs, agent.args.stoch
    inputs = {"embed": torch.randn(N, agent.encoder.size), "noise": torch.randn(N, Z), "chosen": 0}

    def tick(**changed):
        own = {**state, **{key: x for key, x in changed.items() if key in state}}
        given = {**inputs, **{key: x for key, x in changed.items() if key in inputs}}
        with torch.no_grad():
            choose = lambda logits: merlin.onehot(torch.full((N,), given["chosen"]), agent.actions)
            out, new = agent.tick(given["embed"], {key: x.clone() for key, x in own.items()}, given["noise"], choose)
        return {**out, **new}

    plain = tick()
    differs = lambda key, **changed: not torch.allclose(plain[key], tick(**changed)[key], atol=1e-6)
    assert differs("policy_h", policy_read=state["policy_read"] + 1) and differs(
        "policy_h", policy_h=state["policy_h"] + 1
    )
    assert differs("h", chosen=3) and differs("h", read=state["read"] + 1) and differs("prior", read=state["read"] + 1)
    assert differs("post", embed=inputs["embed"] + 1) and not differs("prior", embed=inputs["embed"] + 1)
    assert differs("logits", noise=inputs["noise"] + 1) and not differs("logits", chosen=3)
    z, logp = torch.randn(5, Z), torch.randn(5, agent.actions)
    values = [agent.value(torch.cat([z, x], -1)) for x in (logp, logp + 1)]
    assert not torch.allclose(*values)
    batch = window(envs, agent)[0]
    seen = []
    agent.value.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    agent.losses(batch)
    assert torch.allclose(seen[0][..., Z:].exp().sum(-1), torch.ones(()), atol=1e-5)  # log-probabilities, beside z
    lstm, x, zeros = merlin.DeepLSTM(3, 4), torch.randn(2, 3), torch.zeros(2, 2, 4)
    with torch.no_grad():
        for p in lstm.cells[1].parameters():
            if p.shape[-1] == 7:
                p[:, 3:] = 0  # the second layer no longer sees the first
    assert not torch.allclose(lstm(x, zeros, zeros)[0][:, 1], lstm(x + 1, zeros, zeros)[0][:, 1])


def test_weights_of_losses():
    """Each loss with its own flag, images too."""
    alphas = dict(alpha_image=2.0, alpha_obs=3.0, alpha_action=5.0, alpha_reward=7.0, alpha_return=11.0)
    envs, agent = made("Tiny-both-discrete-v0", **alphas)
    stats = agent.update(window(envs, agent)[0])
    scaled = dict(kl=1, image=2, obs=3, action=5, reward=7, value=11, advantage=11, policy=1)
    total = sum(weight * float(stats[f"losses/{key}"]) for key, weight in scaled.items())
    assert float(stats["losses/total"]) == pytest.approx(total, rel=1e-4)


def reached(agent, loss):
    grads = torch.autograd.grad(loss, agent.params, allow_unused=True, retain_graph=True)
    names = [name for name, _ in agent.named_parameters()]
    return {name.split(".")[0] for name, g in zip(names, grads, strict=True) if g is not None and g.abs().max() > 0}


def test_policy_and_predictor_are_apart():
    """The policy's loss reaches the policy alone; every loss of the predictor, the predictor alone."""
    envs, agent = made()
    losses, _ = agent.losses(window(envs, agent, windows=2)[0])
    policy = {"policy", "policy_lstm", "policy_keys"}
    assert reached(agent, losses["policy"].mean()) == policy
    predictor = {"encoder", "decoder", "prior", "posterior", "lstm", "keys", "value", "advantage"}
    found = set()
    for key in losses.keys() - {"policy"}:
        mine = reached(agent, losses[key].mean())
        assert mine <= predictor, key
        found |= mine
    assert found == predictor - {"encoder"}  # which only concatenates integers
    assert "posterior" in reached(agent, losses["obs"].mean()) & reached(agent, losses["value"].mean())
    assert {"lstm", "keys"} <= reached(agent, losses["obs"].mean())  # through the prior, over time


def test_every_patch_is_tested():
    """The list of this file is that of the folder."""
    found = sorted(path.name for path in (ROOT / "results" / "ablations").glob("merlin_*"))
    assert found == [f"merlin_{name}.patch" for name in PATCHES]


@pytest.mark.parametrize("ablated", PATCHES, indirect=True)
def test_ablated_file_runs(ablated, tmp_path):
    """The patch applies, and the file trains, saves and evaluates."""
    flags = dict(size="debug", device="cpu", total_timesteps=200, num_envs=3, run_root=str(tmp_path))
    result = ablated.train(ablated.Args(**flags))
    assert result["updates"] > 5 and np.isfinite(result["losses/total"])
    agent, args = ablated.load_agent(result["run_dir"])
    assert len(ablated.evaluate(agent, args, 1)) == 1


@pytest.mark.parametrize("ablated", [None, *PATCHES], indirect=True)
def test_ablations(ablated):
    """No gradient of returns, no prior, no retroactive half: each leaves out what it says, and nothing else."""
    envs, agent = made(merlin=ablated)
    batch, _, state = window(envs, agent, merlin=ablated)
    losses, _ = agent.losses(batch)
    alone = [reached(agent, losses[key].mean()) == {key} for key in ("value", "advantage")]
    assert alone == [ablated.__name__ == "merlin_no_return_grad"] * 2
    plain = [bool((agent.unroll(batch)["prior"] == 0).all()), "prior" not in reached(agent, losses["kl"].mean())]
    assert plain == [ablated.__name__ == "merlin_no_prior"] * 2
    assert (state["memory"][..., 4:] == 0).all() == (ablated.__name__ == "merlin_no_retroactive")
    assert state["memory"][..., :4].abs().max() > 0


def test_no_reconstruction():
    """A weight of 0 leaves a loss out."""
    envs, agent = made(alpha_obs=0.0)
    stats = agent.update(window(envs, agent)[0])
    scaled = {"kl": 1, "action": 50, "reward": 50, "value": 1, "advantage": 1, "policy": 1}
    total = sum(weight * float(stats[f"losses/{key}"]) for key, weight in scaled.items())
    assert float(stats["losses/total"]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("alpha,kl,obs", [(1.0, (0, 0.05), (0.6, 1.5)), (50.0, (3, 30), (0, 0.5))])
def test_latents_collapse_where_symbols_are_cheap(alpha, kl, obs, tmp_path):
    """With weight 1 a random symbol costs as many nats to store as it saves: nothing is stored, ln 2 stays unknown."""
    small = dict(stoch=8, hidden=16, units=32, num_envs=16, total_timesteps=20_000, checkpoint_every=10**9)
    weights = dict(alpha_obs=alpha, alpha_action=alpha, alpha_reward=alpha)
    args = merlin.Args("MemoryGame-4-v0", size="debug", device="cpu", run_root=str(tmp_path), **small, **weights)
    result = merlin.train(args)
    assert kl[0] <= result["losses/kl"] <= kl[1]
    assert obs[0] <= result["losses/obs"] <= obs[1]


def test_images_reach_the_latents():
    """What tells two boards apart passes the encoder of a new agent undamped, and is not squashed by its tanh."""
    game, boards = merlin.MemoryGame(4, image=True), []
    for card in range(4):
        game.reset(seed=0)
        game.open = card
        boards.append(game.observe())
    for size in "debug", "small", "paper":
        _, agent = made("MemoryGame-4-v0", env_kwargs='{"image": true}', size=size)
        image = torch.as_tensor(np.stack(boards)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            out = agent.encoder.image_net(image)
        assert out.std(0).mean() > 0.1 and (out.abs() > 0.98).float().mean() < 0.1


def test_baselines_learn_what_they_store():
    """RL-MEM: the content of rows has a gradient, over time. RL-LSTM has neither memory nor decoder."""
    envs, agent = made(agent="rl_mem")
    losses, _ = agent.losses(window(envs, agent, windows=2)[0])
    assert losses.keys() == {"policy", "value"}
    assert {"content", "policy_keys", "policy_lstm", "policy"} <= reached(agent, losses["policy"].mean())
    envs, agent = made(agent="rl_lstm")
    assert "memory" not in agent.initial(2)
    names = {name.split(".")[0] for name, _ in agent.named_parameters()}
    assert names == {"policy_lstm", "policy", "value"}


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("env_id", ["MemoryGame-6-v0", "Tiny-both-discrete-v0"])
def test_window_repeats_what_acting_did(name, env_id):
    """unroll gives the logits and latents of acting, across episode ends, from a state carried over a window."""
    envs, agent = made(env_id, agent=name)
    seen, states, tick = [], [], agent.tick

    def noted(*given):
        out, state = tick(*given)
        seen.append(out)
        states.append({key: x.clone() for key, x in state.items()})
        return out, state

    agent.tick = noted
    batch = window(envs, agent, windows=2)[0]
    agent.tick = tick
    assert batch["is_first"][:, 1:].any()
    with torch.no_grad():
        out = agent.unroll(batch)
    T = agent.args.window
    for key in {"logits", "z", "post", "prior", "weights"} & out.keys():
        acted = torch.stack([x[key] for x in seen[-T:]], 1)
        assert torch.allclose(out[key][:, :T], acted, atol=1e-5), key
    assert all(torch.equal(batch[f"state/{key}"], x) for key, x in states[-T - 1].items())


@pytest.mark.parametrize("name", AGENTS)
def test_nothing_waits_for_the_host(name):
    """Neither do the losses of an update, nor what is captured of acting."""
    envs, agent = made("Tiny-both-discrete-v0", agent=name)
    batch, row, state = window(envs, agent)
    inputs = agent.inputs(row, state)
    assert host_waits(lambda: agent.losses(batch)) == set()
    for eval in False, True:
        assert host_waits(lambda eval=eval: agent.act(inputs, eval)) == set()


@pytest.mark.parametrize("name", AGENTS)
def test_reset_of_one_environment(name):
    """What is_first forgets is that environment's alone: the others are the same bit by bit."""
    envs, agent = made(agent=name)
    _, row, state = window(envs, agent)
    results = []
    for first in (0, 0, 0), (0, 1, 0):
        is_first = np.resize(np.array(first, bool), envs.num_envs) * (np.arange(envs.num_envs) < 3)
        torch.manual_seed(1)
        results.append(agent.act(agent.inputs({**row, "is_first": is_first}, state)))
    others = [n for n in range(envs.num_envs) if n != 1]
    for key, x in results[0].items():
        assert torch.equal(x[others], results[1][key][others]), key
    fresh = agent.initial(envs.num_envs)
    torch.manual_seed(1)
    begun = agent.act(agent.inputs({**row, "is_first": np.ones(envs.num_envs, bool)}, fresh))
    assert all(torch.equal(x[1], begun[key][1]) for key, x in results[1].items())
    assert not same(results[0], results[1])


def test_policy_sees_the_memory_before_the_write():
    """The row of a step is not there when the step reads: the first reads are of nothing."""
    envs, agent = made()
    row = merlin.start_row(envs, 0)
    state = agent.act(agent.inputs(row, agent.initial(envs.num_envs)))
    assert (state["read"] == 0).all() and (state["policy_read"] == 0).all() and (state["memory"][:, 0] != 0).any()
    before = {key: x.clone() for key, x in state.items()}
    after = agent.act(agent.inputs({**row, "is_first": ~row["is_first"]}, state))
    assert same(state, before)  # memory is overwritten in a copy
    state = after
    assert (state["read"] != 0).any() and (state["memory"][:, 1] != 0).any() and (state["memory"][:, 2] == 0).all()


# --- the game ---------------------------------------------------------------------------------------------------------


def play(cards, policy, games=400, **kwargs):
    """-> mean return."""
    game, scores = merlin.MemoryGame(cards, **kwargs), []
    for seed in range(games):
        obs, _ = game.reset(seed=seed)
        scores.append(0.0)
        partner_of, over = {}, False
        while not over:
            action = policy(game, obs, partner_of)
            obs, reward, terminated, truncated, _ = game.step(action)
            scores[-1] += reward
            over = terminated or truncated
    return np.mean(scores)


def remembering(game, obs, partner_of):
    """Turn the partner of the open card if it was seen and is still there, else the next card."""
    card, symbol = int(obs[0]), int(obs[1])
    partner_of.setdefault(symbol, set()).add(card)
    known = [x for x in partner_of[symbol] if x != card and not game.removed[x]]
    return known[0] + 1 if known else 0


@pytest.mark.parametrize(
    "cards,random,zero", [(6, -7.2, -8.6), (8, -11.2, -13.1), (12, -18.9, -21.1), (16, -26.8, -29.0)]
)
def test_game_returns(cards, random, zero):
    """Random actions and always the next card earn what they earn in the course's game; a memory earns 2."""
    rng = np.random.default_rng(0)
    assert play(cards, lambda *_: rng.integers(cards + 1)) == pytest.approx(random, abs=0.5)
    assert play(cards, lambda *_: 0) == pytest.approx(zero, abs=0.5)
    assert play(cards, remembering) == pytest.approx(2.0, abs=0.25)


def test_game_by_hand():
    """Cards 0 1 0 1: the first is open at once; a card has no second partner; the end is an end, the limit is none."""
    game = merlin.MemoryGame(4)
    while game.reset(seed=np.random.randint(10**6)) and game.symbols.tolist() != [0, 1, 0, 1]:
        pass
    steps = [(0, [1, 1], -1, False), (0, [2, 0], -1, False), (1, [0, 0], 2, False), (3, [2, 0], -1, False)]
    steps += [(0, [3, 1], -1, False), (2, [1, 1], 2, True)]
    for action, obs, reward, terminated in steps:
        out = game.step(action)
        assert out[0].tolist() == obs and out[1] == reward and out[2] == terminated and not out[3]
    game.reset(seed=0)
    ends = [game.step(1)[2:4] for _ in range(8)]
    assert ends == [(False, False)] * 7 + [(False, True)]


def test_game_as_image():
    """64 x 64 pixels; the open card shows its symbol, the same for both cards of a pair, others for other pairs."""
    for cards in (4, 6, 12, 16, 36):
        game, seen = merlin.MemoryGame(cards, image=True), {}
        obs, _ = game.reset(seed=1)
        for card in range(cards):
            obs = game.step(card + 1)[0]
            assert game.observation_space.contains(obs) and obs.shape == (64, 64, 3)
            y, x = (64 // game.side * place + 1 for place in divmod(card, game.side))
            size = 64 // game.side - 2
            tile = obs[y : y + size, x : x + size]
            assert (tile != 60).any() and (np.delete(obs.reshape(-1, 3), [], 0) == 60).sum() == (
                cards - 1
            ) * size**2 * 3
            seen.setdefault(int(game.symbols[card]), []).append(tile.tobytes())
        assert all(a == b for a, b in seen.values()) and len({a for a, _ in seen.values()}) == cards // 2
    with pytest.raises(ValueError):
        merlin.MemoryGame(5)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize(
    "env_id,kwargs",
    [
        ("MemoryGame-6-v0", "{}"),
        ("MemoryGame-4-v0", '{"image": true}'),
        ("Tiny-both-discrete-v0", "{}"),
        ("Tiny-odd-discrete-v0", "{}"),
    ],
)
def test_runs(name, env_id, kwargs, tmp_path):
    """Integers, images, vectors and all at once: finite figures, a checkpoint, evaluation that repeats itself."""
    flags = dict(env_id=env_id, env_kwargs=kwargs, agent=name, size="debug", device="cpu", run_root=str(tmp_path))
    result = merlin.train(merlin.Args(**flags, total_timesteps=200, num_envs=3))
    assert np.isfinite([x for key, x in result.items() if key != "run_dir"]).all() and result["updates"] > 5
    agent, args = merlin.load_agent(result["run_dir"], merlin.Args(device="cpu"))
    state = torch.get_rng_state()
    scores = merlin.evaluate(agent, args, 5, tmp_path / "eval.gif")
    assert torch.equal(state, torch.get_rng_state()) and scores == merlin.evaluate(agent, args, 5) and len(scores) == 5
    assert ("losses/image" in result) == (name == "merlin" and ("image" in kwargs or "both" in env_id))


@pytest.mark.parametrize("name", AGENTS)
def test_resume_is_exact(name, tmp_path, monkeypatch):
    """All that was saved is restored, and two resumes of one checkpoint end alike, bit for bit: weights, optimiser,
    counters. A checkpoint in the midst of episodes changes nothing in the run that goes on.
    """
    flags = dict(agent=name, size="debug", device="cpu", num_envs=3, checkpoint_every=200)
    results, act = [], merlin.Agent.act
    for i, every in enumerate((200, 10_000)):
        more = dict(total_timesteps=400, checkpoint_every=every, run_root=str(tmp_path / f"{i}"))
        results.append(merlin.load(merlin.train(merlin.Args(**{**flags, **more}))["run_dir"]))
    keys = "agent", "optimizer", "now"
    assert all(same(results[0][key], results[1][key]) for key in keys if key != "optimizer")
    half = merlin.train(merlin.Args(**flags, total_timesteps=200, run_root=str(tmp_path / "half")))
    run = Path(half["run_dir"])
    saved, ends, begun = merlin.load(run), [], set()

    def first(agent, inputs):
        if agent.args.resume not in begun:  # nothing has been played yet
            assert same(agent.state_dict(), saved["agent"])
            optimizer = agent.optimizer.state_dict()["state"]
            assert optimizer.keys() == saved["optimizer"]["state"].keys()
            assert all(same(optimizer[i], saved["optimizer"]["state"][i]) for i in optimizer)
        begun.add(agent.args.resume)
        return act(agent, inputs)

    # what is saved before a step is taken is what was loaded: counters, too
    kept = merlin.train(merlin.Args(resume=str(shutil.copytree(run, tmp_path / "kept")), device="cpu"))
    counted = kept["global_step"], kept["updates"], kept["episodic_return"]
    assert counted == (half["global_step"], half["updates"], half["episodic_return"])
    monkeypatch.setattr(merlin.Agent, "act", first)
    for folder in tmp_path / "a", tmp_path / "b":
        shutil.copytree(run, folder)
        torch.manual_seed(99)
        merlin.train(merlin.Args(resume=str(folder), device="cpu", total_timesteps=400))
        ends.append(merlin.load(folder))
    assert all(same(ends[0][key], ends[1][key]) for key in keys if key != "optimizer") and len(begun) == 2
    pairs = zip(ends[0]["optimizer"]["state"].values(), ends[1]["optimizer"]["state"].values(), strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_long_episodes_end(tmp_path, monkeypatch):
    """Checkpoints do not cut episodes: one that is longer than the steps between them is seen to its end."""
    ends, real = [], merlin.next_row
    monkeypatch.setattr(merlin, "next_row", lambda *x: ends.append((row := real(*x))["is_last"].any()) or row)
    flags = dict(size="debug", device="cpu", num_envs=1, total_timesteps=600, checkpoint_every=3, window=3)
    merlin.train(merlin.Args(**flags, run_root=str(tmp_path)))
    assert sum(ends) >= 3


def test_update_learns_one_window():
    """Again and again on one window: reconstruction falls, the latents come to say what was seen."""
    envs, agent = made(learning_rate=1e-2)
    batch = window(envs, agent, windows=2)[0]
    history = [{key: float(x) for key, x in agent.update(batch).items()} for _ in range(150)]
    assert all(np.isfinite(list(x.values())).all() for x in history)
    assert history[-1]["losses/obs"] < history[0]["losses/obs"] / 2 and history[-1]["losses/kl"] > 0.3


@pytest.mark.parametrize("env_id,kwargs", [("MemoryGame-6-v0", "{}"), ("MemoryGame-4-v0", '{"image": true}')])
def test_analysis(env_id, kwargs, tmp_path, capsys):
    """results/merlin_analyse.py leaves a picture of one whole episode beside the checkpoint."""
    pytest.importorskip("matplotlib")
    import merlin_analyse

    flags = dict(env_id=env_id, env_kwargs=kwargs, size="debug", device="cpu", total_timesteps=60, num_envs=3)
    run = merlin.train(merlin.Args(**flags, run_root=str(tmp_path)))["run_dir"]
    merlin_analyse.main([run, "--device", "cpu"])
    path = Path(run) / "analysis.png"
    assert path.stat().st_size > 10_000 and str(path) in capsys.readouterr().out
    agent, args = merlin.load_agent(run, merlin.Args(device="cpu"))
    steps = merlin_analyse.episode(agent, args)
    weights, key = steps["weights"], "image" if "image" in kwargs else "vector"
    assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2])) and len(weights) == len(steps[key]) > 3
    assert torch.equal(steps["count"], torch.arange(1.0, len(weights) + 1))  # one write a step, from the first on
    seen = merlin_analyse.shown(steps[key], agent.decoder, key, seen=True)
    assert seen.shape == ((64, 64 * len(weights), 3) if key == "image" else (9, len(weights)))
    assert seen.min() >= 0 and seen.max() <= 1 and (key == "image" or (seen.sum(0) == 2).all())


def test_analysis_of_a_baseline(tmp_path, capsys):
    """Refused in one line: it predicts nothing."""
    pytest.importorskip("matplotlib")
    import merlin_analyse

    flags = dict(agent="rl_mem", size="debug", device="cpu", total_timesteps=60, run_root=str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        merlin_analyse.main([merlin.train(merlin.Args(**flags))["run_dir"]])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "a baseline" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags,text",
    [
        (dict(env_id="MemoryGame-5-v0"), "5 cards"),
        (dict(env_id="Pendulum-v1"), "allowed: Discrete"),
        (dict(env_id="CartPol-v1"), "CartPole"),
        (dict(window=0), "--window 0"),
        (dict(agent="rl_lstm", stoch=7), "--stoch 7"),
        (dict(agent="rl_mem", predictor_clip=1.0), "--predictor-clip 1"),
        (dict(agent="rl_mem", learning_rate=1e-2), "--learning-rate 0.01"),
        (dict(agent="rl_mem", alpha_obs=1.0), "--alpha-obs 1"),
        (dict(value_scale=1.0), "--value-scale 1"),
        (dict(agent="rl_lstm", rows=7), "--rows 7"),
        (dict(alpha_obs=-1.0), "--alpha-obs -1"),
        (dict(entropy_scale=-1.0), "--entropy-scale -1"),
        (dict(gamma=1.5), "--gamma 1.5"),
        (dict(policy_learning_rate=0.0), "--policy-learning-rate 0"),
        (dict(env_kwargs='{"cards": 8}'), "--env-kwargs"),
        (dict(env_id="MemoryGame-0-v0"), "0 cards"),
        (dict(env_id="Tiny-sequence-v0"), "Sequence"),
        (dict(device="gpu"), "--device gpu"),
        (dict(eval="nothing.pt"), "nothing.pt"),
        (dict(env_id="ALE/Pong-v5"), "ALE"),
    ],
)
def test_bad_input(flags, text, capsys, tmp_path):
    """One line, exit code 2, no run folder."""
    with pytest.raises(SystemExit) as stop:
        merlin.train(merlin.Args(**{"size": "debug", "device": "cpu", "run_root": str(tmp_path / "runs"), **flags}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and text in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_nan_stops(tmp_path, monkeypatch):
    """A loss that is not finite stops the run with the step and the cause."""
    real = merlin.window_returns
    monkeypatch.setattr(merlin, "window_returns", lambda *x: real(*x) * np.nan)
    with pytest.raises(RuntimeError, match="policy step .*losses/value is nan"):
        merlin.train(merlin.Args(size="debug", device="cpu", run_root=str(tmp_path)))


def test_presets():
    """The paper's sizes; the memory game has a window and a memory for a whole episode, where not told otherwise."""
    args = merlin.resolve(merlin.Args(size="paper"))
    assert (args.stoch, args.hidden, args.keys, args.rows, args.window) == (200, 256, 3, 1350, 20)
    assert (args.gamma, args.lam, args.entropy_scale, args.learning_rate) == (0.96, 0.9, 0.01, 1e-4)
    args = merlin.resolve(merlin.Args(env_id="MemoryGame-8-v0"))
    assert (args.window, args.rows) == (16, 18) and merlin.resolve(args) == args
    assert merlin.resolve(merlin.Args(env_id="MemoryGame-8-v0", window=5)).window == 5
    assert merlin.resolve(merlin.Args(env_id="CartPole-v1")).window == 16
    for name, size in (("merlin", "paper"), ("rl_mem", "paper")):
        args = merlin.resolve(merlin.Args(size=size, agent=name, device="cpu"))
        image = spaces.Dict(image=spaces.Box(0, 255, (64, 64, 3), np.uint8))
        agent = merlin.AGENTS[name](image, spaces.Discrete(5), args)
        assert agent.encoder.image_net[-3].in_features == 64 * 8 * 8 and agent.encoder.image_net[-3].out_features == 500


def test_shape_comments(tmp_path):
    """Every trailing shape comment holds in a real run, with sizes chosen to be told apart, and each one is reached."""
    flags = dict(hidden=11, units=13, window=5, num_envs=4)
    missed = []
    for name in AGENTS:
        own = dict(agent=name, run_root=str(tmp_path / name), total_timesteps=60)
        own |= dict(stoch=6, keys=3, rows=17) if name != "rl_lstm" else {}

        def run(own=own):
            merlin.train(merlin.Args("toy_envs:Tiny-both-discrete-v0", size="debug", device="cpu", **own, **flags))

        known = dict(Z=4, A=3) if name == "rl_lstm" else dict(Z=6, W=12, R=17, A=3)
        errors, checked, unreached = shape_comments.check(merlin.__file__, run, known)
        assert errors == [] and len(checked) > 10
        missed.append(unreached)
    assert set.intersection(*missed) == set()


def test_cards_on_video(tmp_path):
    """eval.gif shows the board, whatever the agent sees."""
    envs, agent = made()
    merlin.evaluate(agent, agent.args, 1, tmp_path / "eval.gif")
    with Image.open(tmp_path / "eval.gif") as film:
        colours = [colour for _, colour in film.convert("RGB").getcolors()]
        assert film.size == (64, 64) and any(len(set(colour)) == 3 for colour in colours)  # no row of gray cells


def test_text_is_left_out(tmp_path):
    """Of a Dict with text and with symbols on a small grid, the text goes, and the grid is numbers."""

    class Grid(gym.Env):
        observation_space = spaces.Dict(
            image=spaces.Box(0, 255, (7, 7, 3), np.uint8), mission=spaces.Text(20), direction=spaces.Discrete(4)
        )
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.count = 0
            return {"image": np.full((7, 7, 3), 3, np.uint8), "mission": "go", "direction": 1}, {}

        def step(self, action):
            self.count += 1
            return self.reset()[0] if self.count < 0 else self.seen(), 1.0, self.count == 5, False, {}

        def seen(self):
            return {"image": np.full((7, 7, 3), 4, np.uint8), "mission": "on", "direction": 2}

    gym.register("Grid-v0", Grid)
    envs, agent = made("Grid-v0")
    assert set(agent.decoder.shapes) == {"image", "direction"} and agent.decoder.shapes["image"] == (147,)
    assert agent.encoder.numbers == {"direction": [4]} and not agent.encoder.images
    losses, _ = agent.losses(window(envs, agent)[0])
    assert torch.isfinite(losses["obs"]).all()


def test_names_of_the_game():
    """The game is made by its cards, and gymnasium's registry is left as it was."""
    before = {*gym.registry}
    envs, _ = made("MemoryGame-10-v0")
    assert envs.single_action_space == spaces.Discrete(11)
    with pytest.raises(SystemExit):
        made("MemoryGame-x-v0")
    assert {*gym.registry} == before
