# SPDX-License-Identifier: MIT
"""Time and memory of the agents as a table, nothing asserted: python results/bench.py [--device cuda] [CASE ...]

A case is what measure takes (results/gpu.py has cases of its own), and runs in a process of its own, so that its peak
memory and its time from start to first update are its own.
core s is the processor time of all threads per update: pin the process (taskset -c 0) for figures that compare.
"""

import argparse
import collections
import importlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
IMAGE, GRAY, VECTOR = (64, 64, 3), (64, 64, 1), (24,)
FAST = dict(module="dreamerv2", size="atari-fast", shape=GRAY)
CPU = {
    "update debug": dict(size="debug", batch_size=16, batch_length=64),
    "update 1m": dict(size="1m"),
    "update 12m, 4x16": dict(size="12m", batch_size=4, batch_length=16),
    "update 12m": dict(size="12m"),
    "update 1m, vectors": dict(size="1m", shape=VECTOR),
    "update 1m, vectors, weights at once": dict(size="1m", shape=VECTOR, through=True),
    "update 1m, vectors, compiled": dict(size="1m", shape=VECTOR, compile=True),
    "act 1m, 1 environment": dict(size="1m", act=1),
    "act 1m, 16 environments": dict(size="1m", act=16),
    "act 12m, 1 environment": dict(size="12m", act=1),
    "act 12m, 16 environments": dict(size="12m", act=16),
    "Pong 1m, 4 steps an update": dict(size="1m", pong=True),
    "checkpoint of 10,000 new rows of 10,000, 12m": dict(size="12m", rows=10_000),
    "checkpoint of 10,000 new rows of 1,000,000, 12m": dict(size="12m", rows=1_000_000),
    "DreamerV2 update, atari-fast": FAST,
    "DreamerV2 update, small, vectors": dict(module="dreamerv2", size="small", shape=VECTOR),
    "DreamerV2 update, small, vectors, dynamics": dict(module="dreamerv2", size="small", shape=VECTOR, box=True),
    "DreamerV2 act, atari-fast, 1 environment": {**FAST, "act": 1},
    "DreamerV2 act, atari-fast, 16 environments": {**FAST, "act": 16},
    **{f"MemoryGame-6-v0, {x}": dict(module="merlin", game=x) for x in ("merlin", "rl_mem", "rl_lstm")},
    "FTW, the game alone": dict(population=0, games=64),
    **{f"FTW, {n} in training": dict(population=n, total_games=192 * n) for n in (4, 1)},
    "PlaNet update, 50x50": dict(module="planet"),
    "PlaNet update, 50x50, small, vectors": dict(module="planet", size="small", shape=VECTOR),
    "PlaNet plan, 1 environment": dict(module="planet", shape=VECTOR, act=1),
    "PlaNet plan, small, 1 environment": dict(module="planet", size="small", shape=VECTOR, act=1),
}
GPU = {
    f"update {size}, {kind}, {'bf16' if bf16 else 'fp32'}": dict(size=size, shape=shape, bf16=bf16)
    for size in ("1m", "12m", "50m", "200m")
    for kind, shape in (("images", IMAGE), ("vectors", VECTOR))
    for bf16 in (True, False)
}
GPU |= {f"update {x}, images, bf16, weights at once": dict(size=x, through=True) for x in ("12m", "200m")}
GPU |= {f"update {x}, images, bf16, compiled": dict(size=x, compile=True) for x in ("12m", "200m")}
GPU |= {"update 12m, images, bf16, eager": dict(size="12m", cuda_graph=False)}
GPU |= {
    f"PlaNet update, 50x50, {'bf16' if bf16 else 'fp32'}": dict(module="planet", bf16=bf16) for bf16 in (True, False)
}
GPU |= {
    f"DreamerV2 update, {size}, {'bf16' if bf16 else 'fp32'}": {**FAST, "size": size, "bf16": bf16}
    for size in ("atari", "atari-fast")
    for bf16 in (True, False)
}
GPU["DreamerV2 update, dmc-vision, bf16"] = dict(module="dreamerv2", size="dmc-vision", box=True)
GPU |= {f"DreamerV2 act, atari-fast, {n} environments": {**FAST, "act": n} for n in (1, 16)}
GPU |= {f"PlaNet plan, {n} environments": dict(module="planet", shape=VECTOR, act=n) for n in (1, 16)}
GAME = dict(module="merlin", size="paper", env_id="MemoryGame-16-v0", env_kwargs='{"image": true}')
GPU |= {f"MemoryGame-16-v0 as images, {x}, paper": {**GAME, "game": x} for x in ("merlin", "rl_mem", "rl_lstm")}
GPU |= {f"FTW, {n} in training": dict(population=n, total_games=20 * 128, games=128) for n in (30, 4)}
GPU |= {f"act {size}, {n} environments": dict(size=size, act=n) for size in ("12m", "200m") for n in (1, 16)}


def timed(work, wait, budget):
    """Call work() for budget seconds, 5 times at least -> median ms, processor seconds of one call."""
    times, cpu = [], time.process_time()
    while len(times) < 5 or sum(times) < budget:
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times), (time.process_time() - cpu) / len(times)


def profiled(work, wait, cuda, calls):
    """Where the time of work() goes -> {column: number per call}, and "table": text, the 25 kernels that take most.

    On a CPU operators stand for kernels. The tracer slows the host down: gaps are those between the kernels' time here
    and the median ms of the same case, not the wall time here.
    """
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        wall = 1000 * (time.perf_counter() - began) / calls
    spent, count = collections.Counter(), collections.Counter()
    for event in trace.events():
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            us = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            spent[event.name] += us / 1000 / calls
            count[event.name] += 1 / calls
    lines = [f"{'ms':>9} {'calls':>8} {'us each':>8}  kernel, per update"]
    for name, ms in spent.most_common(25):
        lines.append(f"{ms:9.3f} {count[name]:8.1f} {1000 * ms / count[name]:8.2f}  {name[:110]}")
    numbers = {"kernels": sum(count.values()), "kernel ms": sum(spent.values()), "wall ms, traced": wall}
    return {**numbers, "table": "\n".join(lines)}


def whole_run(module, count, **flags):
    """A run of a file from start to end -> its steps, of that name in what train returns, in a second."""
    with tempfile.TemporaryDirectory() as root:
        cpu, wall = time.process_time(), time.time()
        steps = module.train(module.Args(run_root=root, **flags))[count]
        cpu, wall = time.process_time() - cpu, time.time() - wall
    return {"agent steps / core s": steps / cpu, "steps / s": steps / wall}


def matches(device, budget, population, **flags):
    """ftw.py: steps of all players in a second, of random ones in the game alone, or in a run of a population."""
    import numpy as np

    import ftw

    if not population:
        game, rng = ftw.CaptureTheFlag(flags["games"], 0), np.random.default_rng(0)
        game.reset()
        actions = rng.integers([5, 2], size=(20, game.games, len(game.team), 2))
        ms, core = timed(lambda: [game.step(x) for x in actions], lambda: None, budget)
        steps = actions[..., 0].size
        return {"agent steps / core s": steps / core, "steps / s": 1000 * steps / ms}
    flags = {"rate_every": 10**6, "checkpoint_every": 10**9, "log_every": 1e9, **flags}
    reward = "evolved" if population > 1 else "events"
    return whole_run(ftw, "steps", device=device, population=population, reward=reward, **flags)


def measure(
    began,
    device,
    budget,
    module="dreamerv3",
    shape=IMAGE,
    act=0,
    pong=False,
    rows=0,
    box=False,
    game=None,
    population=None,
    through=False,
    compile=False,
    upsample=False,
    profile=False,
    **flags,
):
    """One case -> {column: number}. began: when the process was started.

    module: file; shape: of the observation; act, rows, pong, game: time acting in so many environments, a checkpoint of
    so many rows, a run of Pong, a run of the memory game instead of updates; population: a run of ftw.py, with 0 its
    game alone; box: continuous actions; through, compile: see kernels.py; upsample: apart, not folded into
    convolutions; profile: see above; flags: of the file.
    """
    import numpy as np
    import torch
    from gymnasium import spaces

    module = importlib.import_module(module)
    if population is not None:
        return matches(device, budget, population, **flags)
    if game:
        flags = {"total_timesteps": 30_000, "log_every": 1e9, **flags}
        return whole_run(module, "global_step", device=device, agent=game, **flags)
    if pong:
        with tempfile.TemporaryDirectory() as root:
            flags |= dict(total_timesteps=340, learning_starts=192, log_every=1e9, run_root=root)
            cpu = time.process_time()
            result = module.train(module.Args(device=device, train_ratio=256, **flags))
            return {"agent steps / core s": result["updates"] * 4 / (time.process_time() - cpu)}
    if upsample:
        double = torch.nn.Upsample(scale_factor=2)
        module.upsample_conv = lambda x, conv: conv(double(x))
    args = module.resolve(module.Args(device=device, **flags))
    module.tune(args)
    image = len(shape) == 3
    space = spaces.Box(0, 255, shape, np.uint8) if image else spaces.Box(-np.inf, np.inf, shape, np.float32)
    obs_space, rng, stateful = spaces.Dict(obs=space), np.random.default_rng(0), hasattr(module.Replay, "write")
    action_space = spaces.Box(-1, 1, (6,)) if box or module.__name__ == "planet" else spaces.Discrete(6)
    agent = module.Agent(obs_space, action_space, args)
    if through or compile:
        import kernels  # beside this file

        if compile == "plainly":
            kernels.compiled_plainly(agent)
        elif compile:
            kernels.compiled(agent, images=compile == "images")
        else:
            kernels.through_time(agent)
    cuda = agent.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    captured = lambda fn: module.Captured(fn, args.cuda_graph and cuda)  # as train does
    N = act or 4
    latents = getattr(agent, "latents", lambda state: {})  # what the replay keeps of a state, if anything
    extras = [{key: (x.shape[1:], x.dtype) for key, x in latents(agent.initial(N)).items()}] if stateful else []
    if rows:
        replay = module.Replay(rows, 1, obs_space, action_space, torch.device("cpu"), *extras)
        replay.rows, replay.files = rows, [(0, rows - 10_000, "rows")]
        with tempfile.TemporaryDirectory() as folder:
            replay.save(pathlib.Path(folder))
            size = sum(path.stat().st_size for path in pathlib.Path(folder).iterdir())
        return {"rows MB": size / 1e6, "replay GiB": rows * replay.row_bytes / 2**30}
    replay = module.Replay(1000 * N, N, obs_space, action_space, agent.device, *extras)
    state, ends = agent.initial(N), np.zeros(N, bool)
    history = []
    for i in range(8):
        obs = rng.integers(0, 256, (N, *shape), np.uint8) if image else rng.normal(size=(N, *shape)).astype(np.float32)
        history.append({"obs": obs, "reward": np.float32(ends), "is_first": ends | (i == 0), "is_last": ends})
    if act:
        run = captured(agent.act)
        work = lambda: run(agent.inputs(history[0], state))
        work()
        ms, core = timed(work, wait, budget)
        return {"median ms": ms, "core s": core}
    for i in range(80):
        blind = {"random": True} if module.__name__ == "planet" else {}  # no plans, which are slow
        state = agent.act(agent.inputs(history[i % 8], state), **blind)
        replay.add({**history[i % 8], "is_terminal": ends, "action": agent.env_action(state), **latents(state)})

    update = captured(agent.update)

    before = 0 if module.__name__ == "dreamerv2" else 1  # rows before the window, for the first action

    def work():
        batch = replay.sample(args.batch_size, args.batch_length + before)
        result = update({key: x.to(agent.device) for key, x in batch.items()})
        if stateful:
            replay.write(batch["index"][:, before:], {key: result[key] for key in extras[0]})

    work()
    wait()
    first = time.time() - began
    for _ in range(4 if cuda else 1):
        work()
    ms, core = timed(work, wait, budget)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        memory = torch.cuda.max_memory_reserved()
    result = {"median ms": ms, "core s": core, "peak GB": memory / 1e9, "first update s": first}
    return {**result, **profiled(work, wait, cuda, 3 if cuda else 1)} if profile else result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of the names of cases; all if none is given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="per case")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = CPU if args.device == "cpu" else GPU
    if args.one:
        case, began = json.loads(args.one)
        print(json.dumps(measure(began, args.device, args.seconds, **case)))
        return
    import torch

    device = torch.cuda.get_device_name() if args.device != "cpu" else f"{len(os.sched_getaffinity(0))} CPU cores"
    print(
        f"{device}, PyTorch {torch.__version__}; batch 16 x 64, images of 64x64x3, 6 actions unless named otherwise\n"
    )
    columns = ["median ms", "core s", "peak GB", "first update s", "agent steps / core s", "steps / s"]
    columns += ["rows MB", "replay GiB"]
    print(f"| case | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in cases:
        if args.cases and not any(name.startswith(text) for text in args.cases):
            continue
        own = ["--device", args.device, "--seconds", str(args.seconds), "--one", json.dumps([cases[name], time.time()])]
        result = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True)
        if result.returncode:
            print(f"| {name} | {(result.stderr.splitlines() or ['failed'])[-1]} |", flush=True)
            continue
        numbers = json.loads(result.stdout.splitlines()[-1])
        cells = [f"{numbers[key]:.3g}" if key in numbers else "" for key in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
