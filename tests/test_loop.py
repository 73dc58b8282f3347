# SPDX-License-Identifier: MIT
"""The loop of each file as it really runs: train, with spies in the place of its parts, which call the real ones."""

import copy
import functools
import importlib
import inspect
import itertools
import re
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_envs
from helpers import CONTEXT, known, same
from torch.utils.tensorboard import SummaryWriter

REPLAYS = ["planet", "dreamerv2", "dreamerv3"]  # merlin has windows, and no replay
SMALL = dict(batch_size=3, batch_length=5, imag_horizon=3, candidates=5, top=2, horizon=2, deter=16, hidden=8, units=8)
SMALL |= dict(total_timesteps=60, checkpoint_every=25, window=5, train_ratio=6.0, learning_starts=11, stoch=4)
SMALL |= dict(buffer_size=45)  # less than there are steps: rings run full
SMALL |= dict(prefill=14, pretrain=2, train_every=2.5, seed_episodes=2, collect_interval=3)
B, T = SMALL["batch_size"], SMALL["batch_length"]
files = pytest.mark.parametrize("name", [*REPLAYS, "merlin"])
replays = pytest.mark.parametrize("name", REPLAYS)
num_envs = pytest.mark.parametrize("num_envs", [1, 3])

# --- a run, and what was seen of it -----------------------------------------------------------------------------------


def spy(patch, events, owner, method, name):
    """Have a method, or a function of a module, note each call: given, the arguments after the first; left, the same
    when it is done; arguments, all by name; result. What it calls itself comes after it, but for an evaluation.
    """
    real = getattr(owner, method)
    signature = inspect.signature(real)

    def call(*args, **kwargs):
        began, event = len(events), SimpleNamespace(name=name, owner=args[0], given=copy.deepcopy(args[1:]))
        result = real(*args, **kwargs)
        event.left, event.result = copy.deepcopy((args[1:], result))
        event.arguments = signature.bind(*args, **kwargs).arguments
        event.data = copy.deepcopy(args[0].data) if name == "add" else None
        event.seed = torch.initial_seed()
        events[began:] = [event] if name == "evaluate" else [event, *events[began:]]
        return result

    patch.setattr(owner, method, call)


@functools.cache
def play(name, env_id="Tiny-vector-discrete-v0", **flags):
    """Run train of a file, or of a patched one: planet_... -> args, resolved; result; events, in order; ticks."""
    module, events, file = importlib.import_module(name), [], name.split("_")[0]
    args = module.Args(env_id=env_id, size="debug", device="cpu", **known(module, SMALL | flags))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        args.run_root = root
        for method, event in dict(start_row="start", next_row="env", save="save").items():
            spy(patch, events, module, method, event)
        for method in "act", "update":
            spy(patch, events, module.Agent, method, method)
        for method in ("add", "sample", "write") if file in REPLAYS else ():
            if hasattr(module.Replay, method):
                spy(patch, events, module.Replay, method, method)
        if file == "planet":
            spy(patch, events, module, "cem", "plan")
            spy(patch, events, module, "evaluate", "evaluate")
        spy(patch, events, toy_envs.Tiny, "step", "play")
        spy(patch, events, SummaryWriter, "add_scalar", "scalar")
        result = module.train(args)
    events = [x for x in events if x.name != "save" or x.owner.name == "checkpoint.pt"]
    return SimpleNamespace(args=module.resolve(args), result=result, events=events, ticks=ticks(events))


def ticks(events):
    """One for each time that the agent acts. row: what the environments gave last; step, after: the steps before and
    after it; next: what they give then; inputs, action, state: of acting; act, add, env: the calls; updates: the update
    calls, each with drawn, the batch from the replay; plans: planet's; names: of all calls until it acts again.
    """
    (row,), step, found = [x.result for x in events if x.name == "start"], 0, []
    starts = [i for i, x in enumerate(events) if x.name == "act"]
    for a, b in itertools.pairwise([*starts, len(events)]):
        calls = [x for x in events[a:b] if x.name not in ("play", "scalar")]
        of = lambda name, calls=calls: [x for x in calls if x.name == name]
        tick = SimpleNamespace(row=row, step=step, act=events[a], add=(of("add") or [None])[0], updates=of("update"))
        (tick.env,) = of("env")
        tick.plans, tick.names = of("plan"), " ".join(x.name for x in calls if x.name != "plan")
        for update, drawn in zip(tick.updates, of("sample"), strict=False):
            update.drawn = drawn.result
        tick.inputs = {key.removeprefix("state/"): x for key, x in tick.act.given[0].items()}
        tick.action, tick.state = tick.env.given[0], tick.act.result
        tick.next, tick.after = tick.env.result, step + int((~row["is_last"]).sum())
        found.append(tick)
        row, step = tick.next, tick.after
    return found


def stored(run):
    """Rows as the agent learns from them, one for each tick: what replay.add was given, or the windows cut up."""
    if run.ticks[0].add:
        return [tick.add.given[0] for tick in run.ticks]
    windows = [update.given[0] for tick in run.ticks for update in tick.updates]
    rows = range(run.args.window)
    return [{key: x[:, t] for key, x in of.items() if "state/" not in key} for of in windows for t in rows]


def equal(a, b):
    """Equal values, whether arrays or tensors."""
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def rounds(run):
    """-> (first tick, last tick) of each round of the loop: a row; in merlin a window."""
    size = getattr(run.args, "window", 1)
    return [(run.ticks[i], run.ticks[i + size - 1]) for i in range(0, len(run.ticks), size)]


def updates(run):
    """Number of updates until the end of each tick."""
    return np.cumsum([len(tick.updates) for tick in run.ticks]).tolist()


# --- all files --------------------------------------------------------------------------------------------------------


@files
@num_envs
def test_order(name, num_envs):
    """Act, store the row, update as often as is due, step the environments; now and then a video and a checkpoint."""
    order = {"merlin": "act env( update( save)?)?", "dreamerv3": "act add( sample update write)* env( save( sample)?)?"}
    for tick in play(name, num_envs=num_envs).ticks:
        assert re.fullmatch(order.get(name, "act add( sample update)* env( save( sample)?)?"), tick.names), tick.names


@files
@num_envs
def test_steps(name, num_envs):
    """Every action that an environment received is a step, a reset is none, and the run ends as soon as there are
    total_timesteps (merlin: with that window)."""
    run = play(name, num_envs=num_envs)
    taken = len([x for x in run.events if x.name == "play"])
    assert run.result["global_step"] == taken and run.result["updates"] == updates(run)[-1]
    first, last = rounds(run)[-1]
    assert first.step < 60 <= last.after == taken


@files
@num_envs
def test_rows(name, num_envs):
    """What is stored is what each environment itself received and gave: the action beside the row that it was chosen
    on, reward and ends beside the row that they came with; at a reset no reward, and an episode begins.
    """
    run = play(name, num_envs=num_envs)
    rows, keys = stored(run), ("action", "vector", "reward", "is_first", "is_last", "is_terminal")
    assert len(rows) == len(run.ticks)
    plays = {}
    for event in run.events:
        if event.name == "play":
            plays.setdefault(event.owner, []).append((event.given[0], *event.result[:4]))
    assert len(plays) == num_envs
    for n, played in enumerate(plays.values()):
        mine = [{key: np.asarray(row[key])[n] for key in keys} for row in rows]
        played, last = iter(played), True
        for before, row in zip([{}, *mine], mine, strict=False):
            assert row["is_first"] == last
            if last:
                assert not any(row[key].any() for key in ("vector", "reward", "is_last", "is_terminal"))
            else:
                action, obs, reward, terminated, truncated = next(played)
                assert before["action"] == action and equal(row["vector"], obs) and row["reward"] == reward
                assert (row["is_terminal"], row["is_last"]) == (terminated, terminated or truncated)
            last = row["is_last"]
    ends = np.concatenate([np.asarray(row["is_terminal"])[np.asarray(row["is_last"])] for row in rows])
    assert set(ends.tolist()) == {False, True}


@files
@num_envs
def test_states_are_carried(name, num_envs):
    """The agent acts on the newest row, from the state that it returned one row before; at first from an empty one."""
    run = play(name, num_envs=num_envs)
    states = [run.ticks[0].act.owner.initial(num_envs), *[tick.state for tick in run.ticks]]
    for tick, state in zip(run.ticks, states, strict=False):
        assert equal(tick.inputs["vector"], tick.row["vector"]) and equal(tick.inputs["is_first"], tick.row["is_first"])
        keys = state.keys() & tick.inputs.keys()
        assert {"action"} < keys and all(equal(state[key], tick.inputs[key]) for key in keys)


@files
def test_training_explores(name):
    """In training the agent acts with its noise, as evaluation does not."""
    assert not any(tick.act.arguments.get("eval") for tick in play(name, num_envs=3).ticks)


@files
def test_same_flags_same_run(name):
    """The seed decides everything: a second run stores the same rows, another seed others."""
    runs = [play(name, num_envs=3), play.__wrapped__(name, num_envs=3), play.__wrapped__(name, num_envs=3, seed=2)]
    rows = [[(row["vector"], row["action"]) for row in stored(run)] for run in runs]
    assert same(rows[0], rows[1]) and not same(rows[0], rows[2])
    assert [x.seed for run in runs for x in run.events if x.name == "start"] == [1, 1, 2]  # of weights and of sampling


@files
@num_envs
def test_episodes_are_logged(name, num_envs):
    """Return and length of each episode, at the step with which it ended; the result has the mean return."""
    run = play(name, num_envs=num_envs)
    logged = {key: [] for key in ("charts/episodic_return", "charts/episodic_length")}
    for event in run.events:
        if event.name == "scalar" and event.given[0] in logged:
            logged[event.given[0]].append(event.given[1:])
    returns, lengths, total, length = [], [], np.zeros(num_envs), np.zeros(num_envs)
    for tick in run.ticks:
        first = tick.next["is_first"]
        total, length = total * ~first + tick.next["reward"], (length + 1) * ~first
        for n in np.flatnonzero(tick.next["is_last"]):
            returns.append((total[n], tick.after)), lengths.append((length[n], tick.after))
    assert list(logged.values()) == [returns, lengths] and len(returns) > 5
    assert run.result["episodic_return"] == pytest.approx(np.mean([x for x, _ in returns][-20:]))


@files
@num_envs
def test_checkpoints(name, num_envs):
    """One whenever a multiple of checkpoint_every steps has been reached, and one at the end."""
    run = play(name, num_envs=num_envs)
    due = [first.step // 25 < last.after // 25 or last.after >= 60 for first, last in rounds(run)]
    assert [last.names.count("save") for _, last in rounds(run)] == due and sum(due) == 3


@replays
@num_envs
def test_batches(name, num_envs):
    """An update gets what the replay gave, batch_size windows of batch_length rows and what comes before them."""
    run = play(name, num_envs=num_envs)
    context = CONTEXT[name.split("_")[0]]
    for update in [update for tick in run.ticks for update in tick.updates]:
        assert update.drawn["reward"].shape == (B, T + context)
        assert all(equal(x, update.given[0][key]) for key, x in update.drawn.items() if key in update.given[0])
        assert {"vector", "reward", "action", "is_first", "is_last", "is_terminal"} <= update.given[0].keys()


# --- dreamerv3 --------------------------------------------------------------------------------------------------------

ratios = pytest.mark.parametrize("ratio", [6.0, 15.0])


@ratios
@num_envs
def test_dreamerv3_updates(ratio, num_envs):
    """The first update comes with the row that completes learning_starts windows of T + 1 rows; after that each step is
    replayed train_ratio times: an update per B T / train_ratio steps.
    """
    run = play("dreamerv3", num_envs=num_envs, train_ratio=ratio)
    first = T + -(-11 // num_envs) - 1
    since = [tick.step - run.ticks[first].step for tick in run.ticks]
    assert updates(run) == [1 + int(ratio * steps) // (B * T) if k >= first else 0 for k, steps in enumerate(since)]
    assert updates(run)[-1] > 10


@num_envs
def test_dreamerv3_stores_the_state_of_the_row(num_envs):
    """With a row goes the state that has seen it: h in bfloat16, the class numbers of z."""
    run, stoch = play("dreamerv3", num_envs=num_envs), set()
    for tick in run.ticks:
        row = tick.add.given[0]
        assert torch.equal(row["deter"], tick.state["deter"].bfloat16())
        assert torch.equal(row["stoch"], tick.state["stoch"].byte())
        stoch |= {tuple(x) for x in row["stoch"].argmax(-1).tolist()}
    assert len(stoch) > 5 and len({tuple(tick.state["deter"].flatten().tolist()) for tick in run.ticks}) > 15


@ratios
@num_envs
def test_dreamerv3_writes_states_back(ratio, num_envs):
    """After an update its rows hold the states that it computed, the last window speaking where several hold a row; no
    other row has changed, context rows neither, also when the ring is full.
    """
    run, changed = play("dreamerv3", num_envs=num_envs, train_ratio=ratio), 0
    mine = {key: torch.zeros_like(run.ticks[0].add.data[key]) for key in ("deter", "stoch")}
    length = len(mine["deter"])
    for k, tick in enumerate(run.ticks):
        for key, ring in mine.items():
            ring[k % length] = tick.add.given[0][key]
            assert torch.equal(ring, tick.add.data[key])
            before = ring.clone()
            for update in tick.updates:
                values, index = update.result[key].to(ring.dtype), update.drawn["index"]
                assert torch.equal(update.drawn[key], ring.flatten(0, 1)[index])
                for b, t in itertools.product(range(B), range(T)):
                    ring.flatten(0, 1)[index[b, t + 1]] = values[b, t]
            changed += not torch.equal(before, ring)
    assert changed > 5 and len(run.ticks) > length


@num_envs
def test_dreamerv3_replays_every_row(num_envs):
    """Windows that tile the stream of each environment come into the next batch when they are complete."""
    run = play("dreamerv3", num_envs=num_envs, buffer_size=300)
    tiles, given = [(start, n) for start in range(0, 90, T + 1) for n in range(num_envs)], 0
    for k, tick in enumerate(run.ticks):
        for update in tick.updates:
            due = [tile for tile in tiles[given:] if tile[0] + T + 1 <= k + 1][:B]
            first = update.drawn["index"][:, 0]
            assert list(zip((first // num_envs).tolist(), (first % num_envs).tolist(), strict=True))[: len(due)] == due
            given += len(due)
    assert given > 5


# --- dreamerv2 --------------------------------------------------------------------------------------------------------


@num_envs
def test_dreamerv2_prefill(num_envs):
    """Until prefill steps are taken, actions are random and the state is empty; from there on the policy acts."""
    run = play("dreamerv2", num_envs=num_envs)
    empty = [not tick.state["deter"].any() and not tick.state["stoch"].any() for tick in run.ticks]
    assert empty == [tick.step < 14 for tick in run.ticks] and 3 < sum(empty) < len(empty)
    drawn = np.concatenate([tick.action for tick in run.ticks if tick.step < 14])
    assert set(drawn.tolist()) == {0, 1, 2}


@num_envs
@pytest.mark.parametrize("train_every,prefill,pretrain", [(2.5, 14, 2), (1.0, 0, 0), (4.0, 20, 5)])
def test_dreamerv2_updates(num_envs, train_every, prefill, pretrain):
    """The first update, and pretrain more, come with the first row after prefill that completes a window of T rows;
    after that one per train_every steps.
    """
    run = play("dreamerv2", num_envs=num_envs, train_every=train_every, prefill=prefill, pretrain=pretrain)
    first = next(k for k, tick in enumerate(run.ticks) if tick.step >= prefill and k + 1 >= T)
    since = [tick.step - run.ticks[first].step for tick in run.ticks]
    due = [1 + pretrain + int(steps / train_every) if k >= first else 0 for k, steps in enumerate(since)]
    assert updates(run) == due and run.ticks[first - 1].step < max(prefill, num_envs * T)


# --- planet -----------------------------------------------------------------------------------------------------------


def episodes(run):
    """Number of episodes whose last row the agent has seen, at each tick."""
    return np.cumsum([tick.row["is_last"].sum() for tick in run.ticks]).tolist()


@num_envs
@pytest.mark.parametrize("seeds", [1, 3])
def test_planet_seed_episodes(num_envs, seeds):
    """Until seed_episodes episodes are over, actions are random; from there on they are planned."""
    run = play("planet", num_envs=num_envs, seed_episodes=seeds)
    assert [bool(tick.plans) for tick in run.ticks] == [seen >= seeds for seen in episodes(run)]
    drawn = np.concatenate([tick.action for tick in run.ticks if not tick.plans])
    assert set(drawn.tolist()) == {0, 1, 2} and episodes(run)[-1] > 4


@num_envs
@pytest.mark.parametrize("seeds,interval", [(1, 3), (3, 2)])
def test_planet_updates(num_envs, seeds, interval):
    """collect_interval updates when the last seed episode is over, with its last row in the replay, and again for each
    further episode; as soon as there is a window of T + 1 rows.
    """
    run = play("planet", num_envs=num_envs, seed_episodes=seeds, collect_interval=interval)
    due = [interval * max(0, seen - seeds + 1) if k >= T else 0 for k, seen in enumerate(episodes(run))]
    assert updates(run) == due and due[-1] > 3 * interval


@num_envs
@pytest.mark.parametrize("variant", ["planet random_collection"], indirect=True)
def test_planet_random_collection(variant, num_envs):
    """With this patch no action is planned, updates come as ever, and each checkpoint is followed by an
    evaluation of the planner.
    """
    run = play(variant.__name__, num_envs=num_envs, iterations=1)
    assert not any(tick.plans for tick in run.ticks)
    due = [3 * max(0, seen - 1) if k >= T else 0 for k, seen in enumerate(episodes(run))]
    assert updates(run) == due and due[-1] > 0
    assert all(("save" in tick.names) == tick.names.endswith(" save sample evaluate") for tick in run.ticks)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_planet_explores(noise):
    """Collected actions are the first of each plan, with noise of deviation action_noise, clipped."""
    run = play("planet", "Tiny-vector-box-v0", action_noise=noise, num_envs=3)
    pairs = [(tick.action, tick.plans[0].result[:, 0].numpy()) for tick in run.ticks if tick.plans]
    action, plan = (np.concatenate(x) for x in zip(*pairs, strict=True))
    inside = abs(action) < 1
    assert len(plan) > 30 and (np.std((action - plan)[inside]) > 0.1 if noise else equal(action, plan.clip(-1, 1)))


# --- merlin -----------------------------------------------------------------------------------------------------------


def windows(run):
    """-> (ticks of the window, the batch that was learned from) for each update."""
    size, batches = run.args.window, [update.given[0] for tick in run.ticks for update in tick.updates]
    return [(run.ticks[i * size : (i + 1) * size], batch) for i, batch in enumerate(batches)]


@num_envs
@pytest.mark.parametrize("window", [5, 8])
def test_merlin_windows(num_envs, window):
    """Each window is learned from once, when its last action is taken. It has one row more, for its value: that row,
    with a dummy in the place of its action, is the first of the next window.
    """
    run = play("merlin", num_envs=num_envs, window=window)
    assert [len(tick.updates) for tick in run.ticks] == [int(k % window == 0) for k in range(1, len(run.ticks) + 1)]
    assert len(windows(run)) * window == len(run.ticks)
    for acted, batch in windows(run):
        rows, actions = [tick.row for tick in acted] + [acted[-1].next], [tick.action for tick in acted]
        for key in rows[0]:
            assert equal(batch[key], np.stack([row[key] for row in rows], 1)), key
        assert equal(batch["action"], np.stack([*actions, 0 * actions[0]], 1))


@num_envs
def test_merlin_noise(num_envs):
    """A window keeps the noise that its latents were drawn with; that of the row more is drawn anew."""
    run = play("merlin", num_envs=num_envs)
    for acted, batch in windows(run):
        seen = [tick.state["noise"] for tick in acted]
        assert torch.equal(batch["noise"][:, :-1], torch.stack(seen, 1))
        assert len({tuple(x.flatten().tolist()) for x in batch["noise"].unbind(1)}) == run.args.window + 1


@num_envs
def test_merlin_states_are_carried(num_envs):
    """A window begins with the state that the last action of the window before has left, the first with zeros."""
    run = play("merlin", num_envs=num_envs)
    state = {key: torch.zeros_like(x) for key, x in run.ticks[0].state.items()}
    for acted, batch in windows(run):
        start = {key.removeprefix("state/"): x for key, x in batch.items() if key.startswith("state/")}
        assert start.keys() == state.keys() > {"memory", "h", "action"} and same(start, state)
        state = acted[-1].state
        assert state["memory"].any()


@num_envs
def test_merlin_forgets(num_envs):
    """At the first row of an episode the memory is empty: after it one row is in use, and one more after each step."""
    run, age = play("merlin", num_envs=num_envs, rows=20), np.zeros(num_envs, int)
    for tick in run.ticks:
        age = age * ~tick.row["is_first"] + 1
        assert tick.state["memory"].any(-1).sum(-1).tolist() == age.tolist()
