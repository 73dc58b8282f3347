# SPDX-License-Identifier: MIT
"""What users' environments give: tasks without an end, odd observations and renderers, runs that turn out longer."""

import pathlib
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers import gif, known, short, uniform

NUMBERS = spaces.Box(-np.inf, np.inf, (2,), np.float32)
PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "environments.md").read_text()
agents = pytest.mark.parametrize("module", ["planet", "dreamerv2", "dreamerv3", "merlin"], indirect=True)


class Made(gym.Env):
    """An environment of parts. see: number of observations so far -> observation; length: steps of an episode, if it
    ends; draw: the same number -> picture.
    """

    metadata, action_space = {"render_modes": ["rgb_array"], "render_fps": 30}, spaces.Discrete(2)

    def __init__(self, space, see, length, draw, render_mode=None):
        self.observation_space, self.see, self.length, self.draw = space, see, length, draw
        self.render_mode, self.seen = render_mode, 0

    def observe(self):
        self.seen += 1
        return self.see(self.seen - 1)

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        return self.observe(), 1.0, False, self.count == self.length, {}

    def render(self):
        return self.draw(self.seen - 1)


@pytest.fixture
def make():
    """make(space, see, length, draw) registers an environment, Made-v0, for the time of a test."""

    def register(space=NUMBERS, see=lambda t: np.float32([t, 0]), length=10, draw=None):
        gym.register("Made-v0", Made, kwargs=dict(space=space, see=see, length=length, draw=draw))

    yield register
    del gym.registry["Made-v0"]


def untrained(module, **flags):
    """-> an agent for Made-v0, its Args."""
    args = module.resolve(module.Args(env_id="Made-v0", size="debug", device="cpu", **flags))
    envs = module.make_envs(args.env_id, 1, 0, args)
    return module.Agent(envs.single_observation_space, envs.single_action_space, args), args


# --- no end -----------------------------------------------------------------------------------------------------------


@agents
def test_an_evaluation_ends(module, make, tmp_path, capsys):
    """Episodes of a task without an end are cut off at --eval-steps; each is told when it is over. Training is not."""
    make(length=None)
    agent, args = untrained(module, eval_steps=30)
    assert module.evaluate(agent, args, 2, tmp_path / "eval.gif") == [30, 30]
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["episode", f"{n}/2", "return", "30", "length", "30"] for n in (1, 2)
    ]
    envs = module.make_envs(args.env_id, 1, 0, args)
    row = module.start_row(envs, 0)
    for _ in range(40):
        row = module.next_row(envs, np.zeros(1, int), row)
        assert not row["is_last"]


def test_a_run_without_an_update_fails(module, make, tmp_path, capsys):
    """It says so, with exit code 2, and where the run lies."""
    make(length=None if module.__name__ == "planet" else 10)
    with pytest.raises(SystemExit) as stop:
        module.train(short(module, "Made-v0", tmp_path, prefill=500, learning_starts=500))
    (folder,) = tmp_path.iterdir()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "not one update" in error and str(folder) in error and error.count("\n") == 1


# --- observations -----------------------------------------------------------------------------------------------------


@agents
def test_what_cannot_be_flattened_is_left_out(module, make, capsys):
    """With a warning that names it; if nothing else is there to see, in one line with exit code 2."""
    graph = spaces.Graph(NUMBERS, None)
    make(spaces.Dict(links=graph, pose=NUMBERS), lambda t: {"links": graph.sample(), "pose": np.zeros(2, np.float32)})
    with pytest.warns(UserWarning, match="left out: .*links"):
        agent, args = untrained(module)
    assert list(agent.decoder.shapes) == ["pose"]
    envs = module.make_envs(args.env_id, 2, 0, args)
    row = module.next_row(envs, np.zeros(2, int), module.start_row(envs, 0))
    assert row["pose"].shape == (2, 2) and "links" not in row
    del gym.registry["Made-v0"]
    make(graph, lambda t: graph.sample())
    with pytest.raises(SystemExit) as stop:
        untrained(module)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Graph" in error and error.count("\n") == 1


@agents
@pytest.mark.parametrize("at", [0, 7])
def test_observations_are_finite(module, make, tmp_path, at):
    """The first one, too: nothing is left behind of a run that cannot begin."""
    make(see=lambda t: np.float32([np.nan if t == at else 0, 0]))
    with pytest.raises((FloatingPointError, RuntimeError), match="vector of an environment is nan"):
        module.train(short(module, "Made-v0", tmp_path))
    assert len(list(tmp_path.iterdir())) == (at > 0)


@agents
def test_header(module, make, tmp_path, capsys):
    """It says of each part of the observation where it goes, and warns of pictures that are taken for numbers."""
    space = spaces.Dict(
        camera=spaces.Box(0, 255, (64, 64, 3), np.uint8), depth=spaces.Box(0, 1, (64, 64), np.float32), pose=NUMBERS
    )
    make(space, lambda t: {key: np.zeros(part.shape, part.dtype) for key, part in space.items()})
    flags = dict(total_timesteps=8, window=1, num_envs=8) if module.__name__ == "merlin" else {}
    module.train(short(module, "Made-v0", tmp_path, **known(module, flags)))
    camera, depth, pose = [line for line in capsys.readouterr().out.splitlines() if line.startswith("observes")]
    assert camera.split() == "observes camera (64, 64, 3) -> convolutions".split()
    numbers = "as numbers" if module.__name__ == "merlin" else "MLP"
    assert pose.split() == f"observes pose (2,) -> {numbers}".split()
    assert depth.startswith(f"observes  depth (4096,) -> {numbers}  <-- WARNING: a picture?")
    assert "gymnasium.wrappers" in depth


# --- pictures ---------------------------------------------------------------------------------------------------------

FIELD = np.zeros((37, 53, 3), np.uint8)
DRAWN = {
    "gray": lambda t: FIELD[..., 0],
    "one channel": lambda t: FIELD[..., :1],
    "rgba": lambda t: np.zeros((37, 53, 4), np.uint8),
    "a list": lambda t: [FIELD],
    "int64": lambda t: FIELD.astype(int),
    "grows": lambda t: np.full((37 + t, 53, 3), 20 * t, np.uint8),  # equal pictures would be one
    "none, later": lambda t: FIELD if t < 3 else None,
    "words": lambda t: "no picture",
    "raises": lambda t: 1 / 0,
}


@agents
@pytest.mark.parametrize("kind", DRAWN)
def test_renderers(module, make, tmp_path, kind):
    """Whatever a renderer gives, an evaluation comes to its end and leaves a film."""
    make(draw=DRAWN[kind])
    agent, args = untrained(module)
    assert module.evaluate(agent, args, 2, tmp_path / "eval.gif") == [10, 10]
    size = gif(tmp_path / "eval.gif")[1]
    assert (size == (53, 37)) == (kind not in ("words", "raises"))


# --- a longer run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 30])
def test_the_replay_grows(module, make, tmp_path, made, length):
    """Of a run that is resumed for longer: to the size that a run of that length has. Rows that had left the ring, as
    they do when an episode has one step, are not drawn. A size that was asked for stays.
    """
    make(length=length)
    seldom = known(module, dict(train_ratio=1, train_every=40, collect_interval=1))  # updates: of no interest
    run = module.train(short(module, "Made-v0", tmp_path, **seldom))["run_dir"]
    rows, kept = made["Replay"][0].rows, made["Replay"][0].length
    assert (rows > kept) == (length == 1)
    module.train(module.Args(resume=run, total_timesteps=200, device="cpu"))
    replay = made["Replay"][1]
    assert replay.length == module.resolve(module.Args(size="debug", total_timesteps=200)).buffer_size == 225
    assert replay.oldest == max(0, rows - kept, replay.rows - replay.length)
    batch = uniform(replay, 300, 4)
    seen = batch["vector"][..., 0]  # a row of environment n has seen one more than the row before, or begins again
    fresh = seen == 0
    assert ((seen[:, 1:] == seen[:, :-1] + 1) | fresh[:, 1:]).all() and (batch["index"] < replay.rows).all()
    assert (fresh.sum(1) <= 1).all() and fresh.any()  # 0: where the first run or the resumed one begins
    asked = module.train(short(module, "Made-v0", tmp_path / "asked", buffer_size=130, **seldom))["run_dir"]
    module.train(module.Args(resume=asked, total_timesteps=200, device="cpu"))
    assert made["Replay"][-1].length == 130
    assert pathlib.Path(asked).is_dir()


# --- actions ----------------------------------------------------------------------------------------------------------


def test_an_action_without_a_shape(module, make, tmp_path, monkeypatch):
    """A Box of shape () is one number."""
    monkeypatch.setattr(Made, "action_space", spaces.Box(-2, 2, ()))
    make()
    assert module.train(short(module, "Made-v0", tmp_path))["updates"] > 0


@pytest.mark.parametrize("module", ["dreamerv3"], indirect=True)
@pytest.mark.parametrize("flag", ["beta1", "beta2"])
def test_decay_of_one(module, flag, capsys):
    """A moving average that never moves would be divided by 0."""
    with pytest.raises(SystemExit) as stop:
        module.resolve(module.Args(**{flag: 1.0}))
    assert stop.value.code == 2 and f"--{flag} 1" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["planet", "dreamerv2", "dreamerv3"], indirect=True)
@pytest.mark.parametrize(
    "kwargs", ['{"frameskip": 2}', '{"stack_num": 4}', '{"continuous": true}', '{"img_height": 3}']
)
def test_settings_of_atari_that_are_fixed(module, kwargs, capsys):
    """They would disagree with a flag, or with what the networks take: one line."""
    args = module.resolve(module.Args(env_id="ALE/Pong-v5", env_kwargs=kwargs, size="debug", device="cpu"))
    with pytest.raises(SystemExit) as stop:
        module.make_envs(args.env_id, 1, 0, args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and kwargs in error and error.count("\n") == 1


RECIPES = {  # of docs/environments.md: a space, an observation, what comes out of it
    "gray": (spaces.Box(0, 255, (64, 64), np.uint8), (64, 64, 1)),
    "from 0 to 1": (spaces.Box(0, 1, (64, 64, 3), np.float32), (64, 64, 3)),
    "channels first": (spaces.Box(0, 255, (3, 64, 64), np.uint8), (64, 64, 3)),
    "stacked": (spaces.Box(0, 255, (4, 64, 64, 3), np.uint8), (64, 64, 3)),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_wrappers_of_the_page(module, make, kind):
    """What they bring into form goes to the convolutions."""
    wrapper = next(line.split("`")[-2] for line in PAGE.splitlines() if line.startswith("|") and kind in line)
    space, shape = RECIPES[kind]
    make(space, lambda t: space.sample())
    names = {**vars(gym.wrappers), **vars(spaces), "np": np}
    gym.register("Wrapped-v0", lambda: eval(wrapper, names, {"env": gym.make("Made-v0")}))
    try:
        args = module.resolve(module.Args(env_id="Wrapped-v0", size="debug", device="cpu"))
        envs = module.make_envs(args.env_id, 1, 0, args)
        assert module.start_row(envs, 0)["image"].shape == (1, *shape)
    finally:
        del gym.registry["Wrapped-v0"]


def test_product_of_actions(module, make, monkeypatch):
    """The wrapper plays each pair of actions."""
    (line,) = [line for line in PAGE.splitlines() if "MultiDiscrete([3, 5])" in line]
    monkeypatch.setattr(Made, "action_space", spaces.MultiDiscrete([3, 5]))
    played = []
    monkeypatch.setattr(
        Made, "step", lambda self, a: played.append(tuple(a)) or (self.observe(), 0.0, False, False, {})
    )
    make()
    names = {**vars(gym.wrappers), **vars(spaces), "np": np}
    gym.register("Wrapped-v0", lambda: eval(line.split("`")[-2], names, {"env": gym.make("Made-v0")}))
    try:
        args = module.resolve(module.Args(env_id="Wrapped-v0", size="debug", device="cpu"))
        envs = module.make_envs(args.env_id, 1, 0, args)
        row = module.start_row(envs, 0)
        for action in range(15):
            row = module.next_row(envs, np.array([action]), row)
        assert sorted(played) == [(i, j) for i in range(3) for j in range(5)]
    finally:
        del gym.registry["Wrapped-v0"]


# --- flags that disagree, or that do not ------------------------------------------------------------------------------


def test_a_flag_as_the_run_has_it(module, make, tmp_path):
    """Is accepted, one that was derived, too: what load_agent returns can be handed to it again."""
    make()
    run = module.train(short(module, "Made-v0", tmp_path))["run_dir"]
    _, args = module.load_agent(run)
    assert args.buffer_size == 135 and module.load_agent(run, args)[1] == args
    again = module.train(module.Args(resume=run, buffer_size=135, total_timesteps=130, device="cpu"))
    assert again["global_step"] == 130


@agents
def test_resume_takes_a_folder(module, make, tmp_path, capsys):
    """A file is refused in one line that says so."""
    make()
    run = module.train(short(module, "Made-v0", tmp_path))["run_dir"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(resume=f"{run}/checkpoint.pt", total_timesteps=200, device="cpu"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "allowed: a run folder" in error and error.count("\n") == 1


@agents
def test_wandb_is_missing(module, make, tmp_path, monkeypatch):
    """Known before anything is written."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    make()
    with pytest.raises(ImportError, match="wandb"):
        module.train(short(module, "Made-v0", tmp_path, track=True))
    assert not list(tmp_path.iterdir())


@agents
def test_seeds(module, capsys):
    """Those that NumPy does not take are refused."""
    with pytest.raises(SystemExit) as stop:
        module.resolve(module.Args(seed=2**32))
    assert stop.value.code == 2 and "--seed 4294967296" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["planet", "dreamerv2", "dreamerv3"], indirect=True)
def test_atari_gives_pixels(module, capsys):
    """--obs, which has no meaning there, is not ignored."""
    args = module.resolve(module.Args(env_id="ALE/Pong-v5", obs="both", size="debug", device="cpu"))
    with pytest.raises(SystemExit) as stop:
        module.make_envs(args.env_id, 1, 0, args)
    assert stop.value.code == 2 and "--obs both" in capsys.readouterr().err
