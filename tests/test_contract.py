# SPDX-License-Identifier: MIT
"""What every agent promises: the same suite over the same contract. A further file: add its name in helpers.py."""

import copy
import dataclasses
import importlib
import itertools
import json
import pathlib
import shutil

import dream
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import (
    AGENTS,
    APPLICATIONS,
    CONTEXT,
    FILES,
    Evil,
    act,
    experience,
    gif,
    host_waits,
    known,
    same,
    short,
    stateful,
    uniform,
    window,
)
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pong(module, tmp_path_factory):
    """The public debug run on a real environment, with episodes of 100 steps."""
    args = module.Args(size="debug", device="cpu", run_root=str(tmp_path_factory.mktemp("pong")))
    args = dataclasses.replace(args, env_id="ALE/Pong-v5", env_kwargs='{"max_num_frames_per_episode": 400}')
    return module.train(args)


@pytest.fixture
def run_dir(pong, tmp_path):
    """A copy of that run, to do what one likes with."""
    return shutil.copytree(pong["run_dir"], tmp_path / "run")


def test_debug_run(module, pong):
    """--size debug trains, ends with finite figures, and leaves a checkpoint and the video of its predictions."""
    assert pong["global_step"] == 400 and pong["updates"] > 20
    figures = {key: x for key, x in pong.items() if key != "run_dir"}
    assert {"losses/total", "losses/image", "losses/reward", "episodic_return"} <= figures.keys()
    assert np.isfinite(list(figures.values())).all()
    folder = pathlib.Path(pong["run_dir"])
    assert folder.name.startswith(f"ALE-Pong-v5__{module.__name__}__1__")
    frames, (width, height) = gif(folder / "open_loop.gif")
    assert frames > 1 and width % 64 == 0 and height >= 3 * 64
    saved = module.load(folder)
    assert pathlib.Path(module.__file__).read_text(encoding="utf-8") == saved["source"]
    assert saved["args"]["env_id"] == "ALE/Pong-v5" and not list(folder.rglob("*.tmp"))


def test_tensorboard(module, pong):
    """The event file has the scalars, the last picture of the GIF on disk, and the flags."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = pathlib.Path(pong["run_dir"])
    events = EventAccumulator(str(folder)).Reload()
    names = {"charts/SPS", "charts/frames", "charts/episodic_return", "charts/episodic_length", "charts/updates"}
    names |= {"losses/total", "losses/image", "losses/reward"}
    assert names <= set(events.Tags()["scalars"])
    frames, lengths = events.Scalars("charts/frames")[-1], events.Scalars("charts/episodic_length")
    assert (frames.step, frames.value) == (400, 1600) and events.Scalars("charts/SPS")[-1].value > 0
    assert [(x.step, x.value) for x in lengths] == [(100, 100), (200, 100), (300, 100), (400, 100)]
    image = events.Images("open_loop")[-1]
    assert gif(folder / "open_loop.gif") == (8, (384, 198)) and (image.width, image.height) == (384, 198)
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.strip("`\n")) == module.load(folder)["args"]


def test_eval_flag(module, run_dir, capsys):
    """--eval takes a run folder or a checkpoint, prints the returns, and leaves a GIF."""
    for path in run_dir, run_dir / "checkpoint.pt":
        result = module.train(module.Args(eval=str(path), eval_episodes=1, device="cpu"))
        (score,) = result["returns"]
        assert -21 <= score <= 21 and f"{score:g}" in capsys.readouterr().out
    assert gif(run_dir / "eval.gif")[0] > 50  # equal frames are merged


def test_dream(module, run_dir):
    """results/dream.py leaves a GIF of the policy in imagination; other files stay as they were."""
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    dream.main(dream.Args(module.__name__, str(run_dir / "checkpoint.pt"), device="cpu", steps=40))
    assert gif(run_dir / "dream.gif")[0] > 16
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir() if path.name != "dream.gif"} == before


def test_resume_flag(module, run_dir, pong):
    """--resume goes on in the same folder, with more steps if asked."""
    result = module.train(module.Args(resume=str(run_dir), total_timesteps=440, device="cpu"))
    assert result["run_dir"] == str(run_dir) and result["global_step"] == 440
    assert pong["updates"] < result["updates"] <= pong["updates"] + 10
    assert module.load(run_dir)["args"]["total_timesteps"] == 440


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("action", ["discrete", "box"])
@pytest.mark.parametrize("obs", ["image", "vector", "both", "odd"])
def test_matrix(module, tmp_path, made, obs, action, num_envs):
    """Every kind of observation and action trains: gray and RGB, 64 and 96 pixels, module:Id, odd spaces flattened."""
    size, channels = 96 if (obs, num_envs) == ("image", 3) and 96 in module.SIDES else 64, 1 if action == "box" else 3
    kwargs = json.dumps(dict(size=size, channels=channels))
    env_id = f"toy_envs:Tiny-{obs}-{action}-v0" if obs == "odd" else f"Tiny-{obs}-{action}-v0"
    result = module.train(short(module, env_id, tmp_path, num_envs=num_envs, env_kwargs=kwargs))
    losses = {key: x for key, x in result.items() if key.startswith(("losses/", "stats/"))}
    assert ("losses/image" in losses) == (obs in ("image", "both"))
    assert ("losses/vector" in losses) == (obs != "image")
    assert np.isfinite(list(losses.values())).all() and np.isfinite(result["episodic_return"])
    assert 120 <= result["global_step"] < 120 + num_envs and result["updates"] > 8
    folder = pathlib.Path(result["run_dir"])
    assert gif(folder / "open_loop.gif")[0] > 1 and (folder / "checkpoint.pt").exists()
    data, numbers = made["Replay"][0].data, 5 if action == "discrete" else 4
    shapes = {"image": (size, size, channels), "vector": (numbers,), "grid": (6,), "number": (10,), "flags": (2,)}
    keys = {"both": ["image", "vector"], "odd": ["grid", "number", "flags"]}.get(obs, [obs])
    for key in keys:
        assert tuple(data[key].shape[1:]) == (num_envs, *shapes[key])
        assert data[key].dtype == (torch.uint8 if key == "image" else torch.float32)
    assert not set(shapes) & set(data) - set(keys)


def test_evaluate(module, tmp_path, monkeypatch):
    """evaluate returns the true sums of reward of whole episodes, repeats itself, and leaves random states alone."""
    agent, _ = experience(module)
    torch.manual_seed(3)
    asked, real = [], agent.act
    monkeypatch.setattr(agent, "act", lambda *x, **flags: (asked.append(flags), real(*x, **flags))[1])
    state, scores = torch.get_rng_state(), module.evaluate(agent, agent.args, 11)
    assert all(flags == {"eval": True} for flags in asked) and torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert module.evaluate(agent, agent.args, 11, tmp_path / "eval.gif") == scores
    assert gif(tmp_path / "eval.gif")[0] > 3
    # rewards depend on the seed only, so that any policy gets the same: play by hand
    env, expected = gym.make("Tiny-vector-discrete-v0"), []
    env.reset(seed=agent.args.seed + 1000)
    for _ in range(11):
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(0)
            total, over = total + reward, terminated or truncated
        expected.append(total)
        env.reset()
    assert scores == expected and len(set(scores)) > 5


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_eval_is_noiseless(module, monkeypatch, action):
    """For equal states, eval=True gives one action, where acting in training gives many."""
    agent, replay = experience(module, f"Tiny-both-{action}-v0")
    if hasattr(agent, "actor"):
        real, mode = module.sample_onehot, lambda probs: torch.eye(probs.shape[-1])[probs.argmax(-1)]
        latents_without_noise = lambda probs, noise=None: real(probs) if noise is None else mode(probs)
        monkeypatch.setattr(module, "sample_onehot", latents_without_noise)
    else:  # a plan rests on random candidates: the same plan for all
        monkeypatch.setattr(agent, "plan", lambda state: {"action": torch.zeros(64, agent.action_size)})
    row = {key: replay.data[key][9, :1].expand(64, *replay.data[key].shape[2:]) for key in ("image", "vector")}
    row["is_first"] = np.ones(64, bool)
    actions = [act(agent, row, agent.initial(64), eval=noiseless)[0] for noiseless in (True, False)]
    distinct = [len({x.tobytes() for x in of.round(3)}) for of in actions]
    assert distinct[0] == 1 and distinct[1] > 2


def test_open_loop(module):
    """The video has a frame for each step, and shows the true images above those of the model."""
    agent, replay = experience(module)
    batch = window(module, agent, replay, 6)
    truth = batch["image"][:, CONTEXT[module.__name__.split("_")[0]] :].clone()
    video = module.open_loop(agent, batch)
    assert video.dtype == np.uint8 and video.ndim == 4 and video.shape[3] == 3 and len(video) == truth.shape[1]
    side_by_side = truth.permute(1, 2, 0, 3, 4).flatten(2, 3).numpy()
    assert np.array_equal(video[:, -3 * 64 : -2 * 64], side_by_side)
    assert not np.array_equal(video[:, -2 * 64 : -64], side_by_side)
    bar = video[:, : -3 * 64].reshape(len(video), -1)
    assert not np.array_equal(bar[0], bar[-1])  # seen frames are marked, predicted ones are not


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_losses_fall_on_one_batch(module, action):
    """Updates on one batch again and again: all figures finite, what is reconstructed fits several times better."""
    agent, replay = experience(module, f"Tiny-both-{action}-v0", learning_rate=3e-3, warmup=1)
    batch = window(module, agent, replay)
    history = [agent.update({key: x.clone() for key, x in batch.items()}) for _ in range(100)]
    table = {key: [float(stats[key]) for stats in history] for key, x in history[0].items() if x.dim() == 0}
    assert all(np.isfinite(values).all() for values in table.values())
    factors = {"image": 4, "vector": 4, "reward": 2, "cont": 2}
    for key, factor in [(key, x) for key, x in factors.items() if f"losses/{key}" in table]:
        first, last = table[f"losses/{key}"][0], np.mean(table[f"losses/{key}"][-5:])
        assert last < first / factor, f"{key}: {first:.3f} -> {last:.3f}"


def test_gradients_reach_the_encoder(module):
    """What is reconstructed or predicted shapes the encoder, through the sampled latents and the recurrence."""
    agent, replay = experience(module, learning_rate=1e-3, warmup=1)
    batch = window(module, agent, replay)
    for _ in range(4):  # some heads begin with zeros
        agent.update({key: x.clone() for key, x in batch.items()})
    losses, parameters = agent.model_losses(batch)[0], list(agent.encoder.parameters())
    for key in "image", "vector", "reward", "cont":
        if key in losses:
            for loss in losses[key][:, 0].mean(), losses[key][:, -1].mean():
                grads = torch.autograd.grad(loss, parameters, retain_graph=True)
                assert all(grad.abs().max() > 0 for grad in grads), key


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_update_never_waits_for_the_host(module, action):
    """Neither does an update, nor acting, but for its result."""
    agent, replay = experience(module, f"Tiny-both-{action}-v0")
    batch = window(module, agent, replay)
    agent.update({key: x.clone() for key, x in batch.items()})
    assert host_waits(lambda: agent.update(batch)) == set()
    inputs = agent.inputs({key: x[:, 0] for key, x in batch.items()}, agent.initial(len(batch["is_first"])))
    for eval in (False, True):
        assert host_waits(lambda eval=eval: agent.act(inputs, eval=eval)) == set()


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_acting_forgets_at_is_first(module, action):
    """After is_first, state and action are the same whatever was before; without it, they are not."""
    agent, replay = experience(module, f"Tiny-both-{action}-v0")
    rows = {key: replay.data[key] for key in ("image", "vector")}
    states = []
    for is_first, history in itertools.product((True, False), (range(3), range(10, 20))):
        torch.manual_seed(0)
        state = agent.initial(2)
        for t in history:
            row = {key: x[t].numpy() for key, x in rows.items()} | {"is_first": np.array([t == history[0]] * 2)}
            _, state = act(agent, row, state)
        torch.manual_seed(1)
        row = {key: x[30].numpy() for key, x in rows.items()} | {"is_first": np.array([is_first, is_first])}
        states.append(act(agent, row, state))
    assert same(states[0], states[1])
    assert not same(states[2][1], states[3][1]) and not same(states[0][1], states[2][1])


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_training_forgets_at_is_first(module, action):
    """Whatever lies before an is_first row in a window changes neither losses nor features from there on."""
    agent, replay = experience(module, f"Tiny-both-{action}-v0")
    batch, start, context = window(module, agent, replay), 5, CONTEXT[module.__name__.split("_")[0]]
    keys = [key for key in batch if key not in ("index", "is_first", "is_last", "is_terminal")]
    differences = []
    for marked in True, False:
        batch["is_first"][:], batch["is_first"][:, start] = False, marked
        other = {key: x.clone() for key, x in batch.items()}
        for key in keys:
            x = other[key][:, :start]
            other[key][:, :start] = x + torch.randn(x.shape) if x.is_floating_point() else x.max() - x
        results = []
        for version in batch, other:
            torch.manual_seed(2)
            with torch.no_grad():
                losses, feat, *_ = agent.model_losses(version)
            results.append({**{key: x for key, x in losses.items() if x.dim()}, "feat": feat})  # those of each step
        pairs = {key: [result[key][:, start - context :] for result in results] for key in results[0]}
        differences.append({key: float((a - b).abs().max()) for key, (a, b) in pairs.items()})
        assert not same(*[result["feat"][:, : start - context] for result in results])
    assert set(differences[0].values()) == {0.0}
    assert differences[1]["feat"] > 0 and differences[1]["vector"] > 0


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_training_sees_the_action_before(module, action):
    """The model at row t sees action[t-1]: action[k] changes features from k+1 on, the last action none at all."""
    agent, replay = experience(module, f"Tiny-both-{action}-v0")
    batch, context = window(module, agent, replay), CONTEXT[module.__name__.split("_")[0]]
    batch["is_first"][:] = False
    feats = []
    for k in None, 4, agent.args.batch_length + context - 1:
        other = {key: x.clone() for key, x in batch.items()}
        if k is not None:
            other["action"][:, k] = (other["action"][:, k] + 1) % 3 if action == "discrete" else 0.3
        torch.manual_seed(2)
        feats.append(agent.model_losses(other)[1])
    changed = (feats[1] != feats[0]).any(-1).any(0).tolist()
    assert changed == [t + context > 4 for t in range(len(changed))] and torch.equal(feats[2], feats[0])


@stateful
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_acting_and_training_agree(module, monkeypatch, action):
    """Without sampling noise, training on stored rows gives the states that acting went through, across resets."""
    mode = lambda probs, noise=None: torch.zeros_like(probs).scatter_(-1, probs.argmax(-1, keepdim=True), 1.0)
    monkeypatch.setattr(module, "sample_onehot", mode)
    agent, replay = experience(module, f"Tiny-both-{action}-v0", rows=80, num_envs=1)
    resets = replay.data["is_first"][:60, 0].nonzero()[1:6, 0]
    index = resets[:, None] + torch.arange(-CONTEXT[module.__name__.split("_")[0]], 16)
    batch = {key: x[index, 0] for key, x in replay.data.items()}
    post = agent.model_losses(batch)[2]
    stored = {key: x[:, CONTEXT[module.__name__.split("_")[0]] :] for key, x in batch.items()}
    assert torch.allclose(post["deter"], stored["deter"].float(), rtol=2**-7, atol=1e-4)
    assert torch.equal(post["stoch"].byte(), stored["stoch"])
    assert float(stored["deter"].float().std(1).mean()) > 0.01  # states do move


class Painted(gym.Env):
    """Three steps an episode; sees one number, and renders itself as a red field of 30 x 40."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (2,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.zeros(1, np.float32), 1.0, self.count == 3, False, {}

    def render(self):
        return np.full((30, 40, 3), (255, 0, 0), np.uint8) if self.render_mode else None


def test_evaluation_is_filmed_as_rendered(module, tmp_path):
    """eval.gif shows the environment as it renders itself; training does not ask it to."""
    gym.register("Painted-v0", Painted)
    try:
        agent, _ = experience(module, "Painted-v0")
        assert module.evaluate(agent, agent.args, 1, tmp_path / "eval.gif") == [3.0]
        film = Image.open(tmp_path / "eval.gif")
        assert film.size == (40, 30) and film.convert("RGB").getpixel((5, 5)) == (255, 0, 0)
        envs = module.make_envs("Painted-v0", 1, 0, agent.args)
        assert envs.envs[0].unwrapped.render_mode is None
    finally:
        del gym.registry["Painted-v0"]


# --- saving and going on ----------------------------------------------------------------------------------------------


def played(module, agent, steps=12):
    """-> the actions of an agent in two environments, for a given seed."""
    envs = module.make_envs(agent.args.env_id, 2, 0, agent.args)
    torch.manual_seed(0)
    row, state, actions = module.start_row(envs, 0), agent.initial(2), []
    for _ in range(steps):
        action, state = act(agent, row, state)
        actions.append(action)
        row = module.next_row(envs, action, row)
    return actions, state


@pytest.mark.parametrize("env_id", ["Tiny-both-discrete-v0", "Tiny-vector-box-v0"])
def test_loaded_agent_acts_the_same(module, tmp_path, made, env_id):
    """load_agent, from a folder or a file, gives the agent that train had in memory, and its flags."""
    result = module.train(short(module, env_id, tmp_path))
    expected = played(module, made["Agent"][0])
    for path in result["run_dir"], pathlib.Path(result["run_dir"]) / "checkpoint.pt":
        agent, args = module.load_agent(path, module.Args(device="cpu"))
        assert same(played(module, agent), expected)
        assert args.env_id == env_id and args.total_timesteps == 120
    untrained = module.Agent(*spaces_of(module, args), args)
    assert not same(played(module, untrained), expected)


def spaces_of(module, args):
    envs = module.make_envs(args.env_id, 1, 0, args)
    return envs.single_observation_space, envs.single_action_space


def test_checkpoints_are_data(module, tmp_path, capsys):
    """Code in a checkpoint is refused with one line and not run; so is a file that is none, or missing."""
    torch.save({"args": {}, "agent": Evil(tmp_path / "harm")}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for path in tmp_path / "evil.pt", tmp_path / "text.pt", tmp_path / "missing.pt", tmp_path:
        for flag in "eval", "resume":
            with pytest.raises(SystemExit) as stop:
                module.train(module.Args(**{flag: str(path)}, device="cpu"))
            error = capsys.readouterr().err
            assert stop.value.code == 2 and str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "harm").exists()  # the file would have done it


def test_save_is_atomic(module, tmp_path, monkeypatch):
    """A crash while a checkpoint is written leaves the old one whole."""
    path = tmp_path / "checkpoint.pt"
    module.save(path, x=torch.arange(3))
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: (real({"x": 1}, file), file.flush(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        module.save(path, x=torch.arange(4))
    assert torch.equal(module.load(path)["x"], torch.arange(3))


def final(module, made, result):
    """All that makes up the future of a run."""
    saved = module.load(result["run_dir"])
    saved = {key: x for key, x in saved.items() if key not in ("args", "source")}
    saved["replay"] = {key: x for key, x in saved["replay"].items() if key != "files"}
    agent, replay = made["Agent"][-1], made["Replay"][-1]
    return {"saved": saved, "data": dict(replay.data), "played": played(module, agent)}


def everything(made):
    """A copy of what a checkpoint must bring back, but for the counters of train, which it holds as they are."""
    agent, replay = made["Agent"][-1], made["Replay"][-1]
    parts = agent.state_dict(), agent.optimizer.state
    return copy.deepcopy([*parts, replay.rows, getattr(replay, "online", None), dict(replay.data)])


@pytest.mark.parametrize("env_id,where", [("Tiny-vector-box-v0", "step"), ("Tiny-image-discrete-v0", "save")])
def test_resume_is_exact(module, tmp_path, made, monkeypatch, env_id, where):
    """All that was saved is restored bit for bit, and two resumes of one checkpoint end alike, bit for bit: weights,
    optimiser, replay, actions. Random numbers are new ones, the same for both.

    step: killed long after the checkpoint. save: killed while the next one is written, after the files of the replay.
    """
    flags = dict(num_envs=3, total_timesteps=160, checkpoint_every=80)
    steps, saves, restores, ends = itertools.count(), [], [], []
    next_row, save, start_row = module.next_row, module.save, module.start_row

    def killed_step(*args):
        if where == "step" and next(steps) == 50:
            raise KeyboardInterrupt
        return next_row(*args)

    def killed_save(path, **parts):
        if path.name == "checkpoint.pt":
            saves.append(everything(made))
            if where == "save" and len(saves) == 2:
                raise KeyboardInterrupt
        save(path, **parts)

    def restored(*args):
        restores.append(everything(made))
        assert torch.initial_seed() == saved["args"]["seed"] + saved["now"]["step"]  # new random numbers
        return start_row(*args)

    monkeypatch.setattr(module, "next_row", killed_step)
    monkeypatch.setattr(module, "save", killed_save)
    with pytest.raises(KeyboardInterrupt):
        module.train(short(module, env_id, tmp_path / "killed", **flags))
    monkeypatch.setattr(module, "next_row", next_row)
    monkeypatch.setattr(module, "save", save)
    (run,) = (tmp_path / "killed").iterdir()
    saved = module.load(run)
    assert 80 <= saved["now"]["step"] < 83 and saved["now"]["updates"] > 3
    for copied in tmp_path / "a", tmp_path / "b":
        shutil.copytree(run, copied)
        torch.manual_seed(123)
        with monkeypatch.context() as patch:
            patch.setattr(module, "start_row", restored)
            result = module.train(module.Args(resume=str(copied), device="cpu"))
        ends.append(final(module, made, result))
    assert same(saves[0], restores[0]) and same(restores[0], restores[1])
    assert ends[0]["saved"]["now"]["step"] >= 160 and same(*ends)
    now, later = saved["now"], ends[0]["saved"]["now"]
    whole = module.train(module.Args(resume=str(run), total_timesteps=now["step"], device="cpu"))  # has ended already
    assert (whole["global_step"], whole["updates"]) == (now["step"], now["updates"])
    assert whole["episodic_return"] == np.mean(now["recent"])
    ended = int(made["Replay"][-2].data["is_last"][made["Replay"][-1].rows : made["Replay"][-2].rows].sum())
    assert later.get("first_step") == now.get("first_step")
    assert "episodes" not in now or 0 <= later["episodes"] - now["episodes"] - ended <= 3  # 3: with the last row


def test_resume_begins_new_episodes(module, tmp_path, made, monkeypatch):
    """The interrupted episodes are marked as abandoned, returns are counted from the new start, resets are new ones."""
    first = module.train(short(module, "Tiny-vector-discrete-v0", tmp_path, num_envs=2, buffer_size=60))
    rows, before, lengths = made["Replay"][-1].rows, made["Replay"][-1].data, []
    assert rows > 30
    real = SummaryWriter.add_scalar
    note = lambda self, key, x, step: (lengths.append(x) if key.endswith("_length") else None, real(self, key, x, step))
    monkeypatch.setattr(SummaryWriter, "add_scalar", note)
    module.train(module.Args(resume=first["run_dir"], total_timesteps=150, device="cpu"))
    replay = made["Replay"][-1]
    assert replay.data["is_first"][rows % 30].all() and rows < replay.rows < rows + 30
    assert not torch.equal(replay.data["vector"][rows % 30], before["vector"][0])
    last = replay.data["is_last"][torch.arange(rows, replay.rows) % 30]
    assert lengths[0] == min(int(last[:, n].nonzero()[0, 0]) for n in range(2))  # counted from the new start
    batch = uniform(replay, 400, 9)
    assert torch.equal(batch["is_last"][:, :-1], batch["is_first"][:, 1:])


def test_bad_input(module, tmp_path, capsys):
    """One line that names flag and value, exit code 2, and no run folder."""
    bad = {
        "CartPol-v1": "`CartPol` doesn't exist",
        "nomodule:X-v0": "nomodule",
        "ALE/Pongg-v5": "--env-id ALE/Pongg-v5",
        "dm_control/walker-fly-v0": "--env-id dm_control/walker-fly-v0",
    }
    cases = [(dict(env_id=env_id), text) for env_id, text in bad.items()]
    cases += [(dict(env_id="Tiny-image-discrete-v0", env_kwargs='{"size": 50}'), "sides among")]
    cases += [(dict(env_id="CartPole-v1", env_kwargs='{"no_such": 1}'), "no_such")]
    cases += [(dict(num_envs=0), "--num-envs 0"), (dict(train_ratio=0.0), "--train-ratio 0")]
    cases += [(dict(device="gpu"), "--device gpu"), (dict(learning_starts=0), "--learning-starts 0")]
    cases += [(dict(warmup=0), "--warmup 0"), (dict(bins=4), "--bins 4"), (dict(batch_length=1), "--batch-length 1")]
    cases += [(dict(num_envs=3, buffer_size=44, learning_starts=20), "--buffer-size 44")]  # 14 rows each: 18 windows
    for text in "{size: 3}", "[1]", "3":
        cases += [(dict(env_id="CartPole-v1", env_kwargs=text), f"--env-kwargs {text}: ")]
    cases += [(dict(env_id="CartPole-v1", buffer_size=7), "--buffer-size 7")]  # would never train
    if not torch.cuda.is_available():
        cases += [(dict(env_id="CartPole-v1", device="cuda"), "--device cuda")]
    for flags, text in cases:
        takers = [name for name in AGENTS if known(importlib.import_module(name), flags) == flags]
        assert takers, f"no file has these flags any more: {flags}"
        if module.__name__ not in takers:
            continue
        with pytest.raises(SystemExit) as stop:
            module.train(module.Args(**{"size": "debug", "device": "cpu", "run_root": str(tmp_path), **flags}))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and text in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_resume_refuses_other_flags(module, run_dir, capsys):
    """A flag that disagrees with the run to resume is an error, not silently dropped."""
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(resume=str(run_dir), eps=0.5, device="cpu"))
    assert stop.value.code == 2 and "--eps 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES + APPLICATIONS)
def test_every_number(name, capsys):
    """Each flag that is a number refuses -1, nan and inf in one line that names it, with exit code 2."""
    module = importlib.import_module(name)
    full = module.resolve(module.Args(size="debug", device="cpu"))
    numbers = {key: type(x) for key, x in dataclasses.asdict(full).items() if type(x) in (int, float)}
    for key, kind in numbers.items():
        for value in kind(-1), float("nan"), float("inf"):
            with pytest.raises(SystemExit) as stop:
                module.resolve(dataclasses.replace(full, **{key: value}))
            error = capsys.readouterr().err
            assert stop.value.code == 2 and f"--{key.replace('_', '-')} {value}:" in error and error.count("\n") == 1, (
                error
            )


@pytest.mark.parametrize("name", FILES + APPLICATIONS)
@pytest.mark.parametrize("flag", ["resume", "eval"])
def test_empty_paths(name, flag, tmp_path, capsys, monkeypatch):
    """An empty path, as of a variable that is not set, is no path: nothing is trained instead."""
    module = importlib.import_module(name)
    if known(module, {flag: ""}):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            module.train(module.Args(size="debug", device="cpu", **{flag: ""}))
        assert stop.value.code == 2 and "cannot be read" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dreamerv2", "dreamerv3", "merlin", "gumbel_softmax"])
def test_samples_in_bfloat16(name):
    """Rare classes come as often as they should, also where logits are of few bits: within 6 standard errors."""
    module, logits, n = importlib.import_module(name), torch.tensor([0.0, -7.0], dtype=torch.bfloat16), 1_000_000
    torch.manual_seed(0)
    p = logits.double().softmax(-1)[1]
    if name == "gumbel_softmax":
        given = logits.float().log_softmax(-1).bfloat16().expand(n, 2)
        shares = [module.sample_onehot(given), module.st_gumbel_softmax(logits.expand(n, 2), 1.0)]
    else:
        shares = [module.sample_onehot(logits.float().softmax(-1).bfloat16().expand(n, 2))]
    for share in shares:
        assert abs(share[:, 1].double().mean() - p) < 6 * (p / n) ** 0.5 + 0.01 * p  # the probability is rounded, too


def test_resolve(module):
    """Presets fill what was left open, an explicit flag wins, nothing is changed in place, and twice is as once."""
    for size in module.SIZES:
        args = module.Args(size=size, batch_size=7, env_id="dm_control/walker-walk-v0")
        before = dataclasses.asdict(args)
        full = module.resolve(args)
        assert dataclasses.asdict(args) == before and module.resolve(full) == full
        assert full.batch_size == 7 and full.action_repeat == 2
        open_flags = {field.name for field in dataclasses.fields(full) if getattr(full, field.name) is None}
        assert open_flags <= {"resume", "eval", "rho"}  # rho: by action space
        for key, value in module.SIZES[size].items():
            assert key == "batch_size" or getattr(full, key) == value
