# SPDX-License-Identifier: MIT
"""All that minutes of a GPU can tell: python results/gpu.py --minutes 8 --out DIR [--only NAME ...] [--resume DIR]

    machine   card, driver, versions; for scale a matrix product, a copy, a small kernel alone and in a graph
    smoke     each file debug-sized: eager float32, bfloat16, captured. Later stages use the best form that works
    tests     pytest -m gpu
    speed     ms per update, time to the first, peak memory, the kernels of an update; processes side by side
    learn     Pong by the 100k protocol with as many updates as fit the time left, then dm_control from vectors

A stage is a process with a limit of its own, and so is each of its parts. What it finds is in DIR at once, so that a
failure, a hang or the end of the machine's time loses nothing that was known before: gpu.jsonl (all records), log.txt,
pong.csv, pong.png, swingup.csv, swingup.png, dream.gif, weights.pt (at most 16 MiB, for dreamerv3.load_agent).
Time that a stage leaves goes to those after it. --resume takes over what worked in an earlier DIR, so that --only learn
knows what works and how fast it is; what is recorded there is not done again, and runs whose folders exist go on.
--device cpu: everything at debug size in two minutes, to see that this script works.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARES = {  # of the time; on a CPU starting a process is what takes long
    "cuda": dict(machine=0.06, smoke=0.17, tests=0.19, speed=0.27, learn=0.31),
    "cpu": dict(machine=0.06, smoke=0.36, tests=0.08, speed=0.13, learn=0.37),
}
PACKAGES = "torch triton numpy gymnasium ale-py shimmy imageio dm_control mujoco".split()
PACKAGES += "tyro tensorboard matplotlib pytest pillow".split()
VECTOR = [24]


# --- processes and records --------------------------------------------------------------------------------------------


def kill(process):
    """End a process, all that it started, and what these started, whatever sessions they opened."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    family = [process.pid]
    for member in family:
        family += children.get(member, [])
    for member in family:
        for end in [os.killpg] if process.poll() is not None else [os.killpg, os.kill]:
            with suppress(OSError):
                end(member, signal.SIGKILL)
    process.wait()


def start(command, file, **env):
    """Start a command of Python's in a session of its own, its output into an open file. -> the process."""
    quiet = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}  # dm_control's with numpy 2.5: megabytes of log
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **quiet, **os.environ, **env}
    streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env)
    return subprocess.Popen([sys.executable, *map(str, command)], **streams, cwd=ROOT, start_new_session=True)


def run(command, until, **env):
    """Run a command to its end, or to the time until. -> exit code (None: ended at its limit), seconds, its output."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:  # a pipe would be kept open by what it leaves behind
        began, process = time.time(), start(command, file, **env)
        code = finish(process, until)
        file.seek(0)
        return code, round(time.time() - began, 1), file.read()


def finish(process, until):
    """-> exit code, or None where the process had to be ended. Nothing that it started lives on."""
    try:
        return process.wait(max(0.1, until - time.time()))
    except subprocess.TimeoutExpired:
        return None
    finally:  # an interrupt, too
        kill(process)


def tail(code, text, lines=30):
    """What to keep of a failure."""
    return "\n".join(text.splitlines()[-lines:] + ["ended at its limit"] * (code is None))[-4000:]


def note(args, stage, **record):
    """Append a record; one write, so that processes do not mix."""
    line = json.dumps({"stage": stage, "time": round(time.time()), **record}, default=str)
    with open(args.out / "gpu.jsonl", "a") as file:
        file.write(line + "\n")
    print(line[:300], flush=True)


def records(args, stage):
    """What the stage has noted so far."""
    path = args.out / "gpu.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


# --- machine ----------------------------------------------------------------------------------------------------------


def machine(args):
    """What it is, and three figures for scale: a large matrix product, a large copy, a small kernel."""
    versions = {}
    for name in PACKAGES:
        versions[name] = "missing"
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    note(args, "machine", python=sys.version.split()[0], cores=len(os.sched_getaffinity(0)), **versions)
    import torch

    cuda = args.device == "cuda"
    if cuda:
        card, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,temperature.gpu", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else ""
        libraries = dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), smi=smi)
        sizes = dict(processors=card.multi_processor_count, free_gb=free / 1e9, total_gb=total / 1e9)
        note(args, "machine", card=card.name, capability=f"{card.major}.{card.minor}", **sizes, **libraries)
    wait = torch.cuda.synchronize if cuda else lambda: None

    def seconds(work):
        times = []
        for _ in range(8):
            wait()
            began = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[3:])

    side = 8192 if cuda else 512
    a, b = torch.randn(2, side, side, device=args.device, dtype=torch.bfloat16)  # zeros would be faster than real data
    rate = 2 * side**3 / seconds(lambda: a @ b) / 1e12
    source = torch.randn(2**28 if cuda else 2**22, device=args.device)
    target = torch.empty_like(source)
    copied = 8 * source.numel() / seconds(lambda: target.copy_(source)) / 1e12  # bytes read and written
    note(args, "machine", bf16_tflops=rate, copy_tb_per_s=copied)
    if cuda:
        x, graph = torch.randn(1024, device="cuda"), torch.cuda.CUDAGraph()
        many = lambda: [x.mul_(1.0) for _ in range(1000)]
        eager = seconds(many)
        with torch.cuda.graph(graph):
            many()
        note(args, "machine", small_kernel_us=1e3 * eager, small_kernel_in_a_graph_us=1e3 * seconds(graph.replay))


# --- smoke ------------------------------------------------------------------------------------------------------------

# in the order in which they are tried; the last only if the one before it fails
FORMS = {"eager": dict(bf16=False, cuda_graph=False), "bf16": dict(bf16=True, cuda_graph=False)}
FORMS |= {"graph": dict(bf16=True, cuda_graph=True), "graph, float32": dict(bf16=False, cuda_graph=True)}
FORMS |= {"compiled": FORMS["graph"]}  # for learn, where speed has found it faster
BEST = ["graph", "graph, float32", "bf16", "eager"]
TOY = "--size debug --total-timesteps 120 --checkpoint-every 120 --log-every 1e9 --env-id toy_envs:Tiny-both-"
SMOKE = {
    "dreamerv3": TOY + "discrete-v0 --learning-starts 20",
    "dreamerv2": TOY + "discrete-v0 --prefill 20",
    "planet": TOY + "box-v0 --seed-episodes 1 --collect-interval 2",
    "merlin": "--size debug --total-timesteps 600",
    "gumbel_softmax": "--size debug --total-steps 20",
    "ftw": "--size debug --total-games 8",
}
PONG = ["--env-id", "ALE/Pong-v5", "--env-kwargs", '{"max_num_frames_per_episode": 400}']  # episodes of 100 steps


def switches(file, form):
    """Command-line flags of a form. gumbel_softmax computes in float32 always."""
    flags = {key: on for key, on in FORMS[form].items() if (file, key) != ("gumbel_softmax", "bf16")}
    return [f"--{'' if on else 'no-'}{key.replace('_', '-')}" for key, on in flags.items()]


def best(args, file):
    """The best form of a file that smoke has seen working; the product's own, captured in bfloat16, if it saw none."""
    worked = {x["form"] for x in records(args, "smoke") if x["file"] == file and x["ok"]}
    return next((form for form in BEST if form in worked), BEST[0])


def smoke(args):
    """A whole run of each file, in each form, on a toy; and of dreamerv3 on Pong, with its default form."""

    def attempt(file, form, flags, root):
        if args.until - time.time() < 5:
            return False
        until = min(args.until - 1, time.time() + (60 if cuda else 25))
        command = [f"{file}.py", *flags, "--device", args.device, "--run-root", root]
        code, seconds, text = run(command, until, PYTHONPATH=f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}")
        error = "" if code == 0 else tail(code, text)
        note(args, "smoke", file=file, form=form, ok=code == 0, seconds=seconds, error=error)
        return code == 0

    def go(file):
        with tempfile.TemporaryDirectory() as root:
            if file == "Pong":
                flags = [*PONG, "--size", "debug", "--total-timesteps", "300"]
                if attempt("dreamerv3", "Pong", flags, root):
                    played = ["--eval", *Path(root).glob("*"), "--eval-episodes", 2]
                    attempt("dreamerv3", "Pong, evaluated", played, root)
                return
            for form in ["eager", "bf16", "graph"] if cuda else ["eager"]:
                works = attempt(file, form, SMOKE[file].split() + switches(file, form), root)
            if not works and cuda:
                attempt(file, "graph, float32", SMOKE[file].split() + switches(file, "graph, float32"), root)

    cuda = args.device == "cuda"
    with ThreadPoolExecutor(6 if cuda else 2) as pool:
        list(pool.map(go, [*SMOKE, "Pong"]))


# --- tests ------------------------------------------------------------------------------------------------------------


class Report:
    """For pytest: part i of n, of that the tests without a record, and a record of each as it begins and as it ends."""

    def __init__(self, args):
        self.args, (self.part, self.parts) = args, map(int, args.part.split("/"))

    def pytest_collection_finish(self, session):  # after the marker's selection
        done = {record["test"] for record in records(self.args, "tests")}
        mine = session.items[self.part :: self.parts]
        session.items[:] = [item for item in mine if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid):
        note(self.args, "tests", test=nodeid, outcome="begun")
        signal.alarm(40)  # seconds, then the process ends: a test that hangs

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        error = report.longreprtext[-3000:] if report.failed else ""
        note(self.args, "tests", test=report.nodeid, outcome=report.outcome, seconds=report.duration, error=error)
        if report.failed and self.args.device == "cuda":
            import torch

            try:
                torch.cuda.synchronize()
            except RuntimeError:  # all that follows in this process would fail, too
                os._exit(70)


def tests(args):
    """On a GPU in four processes. One that crashes or hangs is started again and goes on after the test that did it."""
    if args.part:
        import pytest

        files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
        asked = ["-m", "gpu", *map(str, files)] if args.device == "cuda" else ["tests/test_aggregate.py"]
        sys.exit(pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", *asked], plugins=[Report(args)]))
    parts = 4 if args.device == "cuda" else 1

    def go(part):
        code = -1
        while code not in (None, 0, 1, 2, 3, 4, 5):  # those of pytest itself
            code, _, text = run([__file__, *sys.argv[1:], "--part", f"{part}/{parts}"], args.until - 1)
            print(text, flush=True)

    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(go, range(parts)))
    last = {record["test"]: record["outcome"] for record in records(args, "tests")}
    note(args, "tests", test="all", outcome={x: list(last.values()).count(x) for x in sorted(set(last.values()))})


# --- speed ------------------------------------------------------------------------------------------------------------

GRAY = [64, 64, 1]
V2, PLANET = dict(module="dreamerv2", size="atari-fast", shape=GRAY), dict(module="planet", size="paper")
GAME = dict(module="merlin", game="merlin", size="paper", env_id="MemoryGame-16-v0", env_kwargs='{"image": true}')
SHORT = dict(batch_length=32)
CASES = {  # of bench.py; what matters most comes first. copies: so many processes side by side
    "update 12m": dict(size="12m"),
    "update 12m, weights at once": dict(size="12m", through=True),
    "update 12m, compiled step": dict(size="12m", compile=True),
    "update 12m, compiled step and images": dict(size="12m", compile="images"),
    "update 12m, steps compiled plainly": dict(size="12m", compile="plainly"),
    "update 12m, eager": dict(size="12m", cuda_graph=False),
    "act 12m, 16 environments": dict(size="12m", act=16),
    "update 12m, kernels": dict(size="12m", profile=True),
    "update 12m, compiled step, kernels": dict(size="12m", compile=True, profile=True),
    "update 1m, 16x32, compiled step": dict(size="1m", **SHORT, compile=True),
    "update 12m, 16x32, compiled step": dict(size="12m", **SHORT, compile=True),
    "update 12m, 16x32": dict(size="12m", **SHORT),
    "update 1m, 16x32": dict(size="1m", **SHORT),
    "update 12m, upsampling": dict(size="12m", upsample=True),
    "update 12m, 2 side by side": dict(size="12m", copies=2),
    "update 1m, vectors": dict(size="1m", shape=VECTOR),
    "update 50m": dict(size="50m"),
    "update 200m": dict(size="200m"),
    "DreamerV2 update, atari-fast": V2,
    "PlaNet update, 50x50": PLANET,
    "PlaNet plan, 1 environment": dict(**PLANET, shape=VECTOR, act=1),
    "MERLIN, 16 cards as images, paper": GAME,
    "FTW, 30 in training": dict(module="ftw", population=30, games=128, total_games=1280),
    "update 12m, 4 side by side": dict(size="12m", copies=4),
}
CPU_CASES = {
    "update debug": dict(size="debug", shape=VECTOR),
    "update debug, 2 side by side": dict(size="debug", shape=VECTOR, copies=2),
    "update debug, kernels": dict(size="debug", shape=VECTOR, profile=True),
}


def speed(args):
    """The cases, each in the form that works, one after the other."""
    cuda, failed = args.device == "cuda", []
    known = {x["name"] for x in records(args, "speed") if "error" not in x}
    for name, case in (CASES if cuda else CPU_CASES).items():
        left = args.until - time.time()
        if name in known or left < 8:
            continue
        case = {**FORMS[best(args, case.get("module", "dreamerv3"))], **case}
        copies = case.pop("copies", 1)
        limit = time.time() + min(left - 1, 90 if case.get("compile") else 50)
        command = [HERE / "bench.py", "--device", args.device, "--seconds", 3 * copies**0.5 if cuda else 0.2]
        command += ["--one", json.dumps([case, time.time()])]
        with ThreadPoolExecutor(copies) as pool:
            results = list(pool.map(run, [command] * copies, [limit] * copies))
        for code, seconds, text in results:
            lines = [line for line in text.splitlines() if line.startswith("{")]
            if code or not lines:
                note(args, "speed", name=name, seconds=seconds, error=tail(code, text))
                failed.append(name)
                continue
            numbers = json.loads(lines[-1])
            note(args, "speed", name=name, seconds=seconds, case=case, **numbers)
            print(numbers.get("table", ""), flush=True)
    if failed:  # the others stand, but the stage says so
        sys.exit(f"failed: {', '.join(failed)}")


# --- learn ------------------------------------------------------------------------------------------------------------

STEPS, ENVS, ENOUGH = 100_000, 16, 25_000
# How to spend the time on Pong: the first of these with which ENOUGH updates fit, by the speed of the case of its name,
# else the one with most. First the paper's batch on the default size; then sequences of half the length, since most of
# an update's time is its recurrent steps; a small net last. Published: 12,500 updates of the 200m network end at -4,
# 100,000 of a small one at 18 to 20. Table's learning rate, 4e-5, is that of the 200m network; 3e-4 at 1m lay in the
# published band on a CPU and has learned Pong (gpu/), 1e-4 at 12m lies between and is untried. 16 environments,
# Table's number for all but this protocol (1): acting must not take longest.
MEDIUM, SMALL = dict(size="12m", learning_rate=1e-4), dict(size="1m", learning_rate=3e-4, **SHORT)
PLANS = {
    "update 12m, compiled step": dict(MEDIUM, compiled=True),  # of kernels.py, if it pays
    "update 12m": MEDIUM,
    "update 12m, 16x32, compiled step": dict(MEDIUM, **SHORT, compiled=True),
    "update 12m, 16x32": dict(MEDIUM, **SHORT),
    "update 1m, 16x32, compiled step": dict(SMALL, compiled=True),
    "update 1m, 16x32": SMALL,
}
SWINGUP = dict(env_id="dm_control/cartpole-swingup-v0", num_envs=4, total_timesteps=STEPS)  # ratio: the paper's
CARTPOLE = dict(env_id="CartPole-v1", size="1m", learning_rate=3e-4, warmup=200, total_timesteps=5000)
PUBLISHED = {"pong": "atari100k,dreamerv3,atari_pong", "swingup": "dmc_proprio,dreamerv3,dmc_cartpole_swingup"}


def measured(args, name, default=None):
    """Median ms of a case, over its processes."""
    times = [x["median ms"] for x in records(args, "speed") if x["name"] == name and "error" not in x]
    return statistics.mean(times) if times else default


def plan(args, seconds, slower):
    """Flags of Pong. slower: by how much other processes beside it slow an update down."""
    acting = STEPS / ENVS * (measured(args, "act 12m, 16 environments", 2.5) + 1.5) / 1000  # 1.5: the games, the replay
    unknown, options = 1e9 if records(args, "speed") else 30, []
    for name, flags in PLANS.items():
        ms = slower * measured(args, name, unknown)
        if flags.get("compiled") and ms > 0.9 * slower * measured(args, name.removesuffix(", compiled step"), unknown):
            continue
        options.append((0.93 * (seconds - 20 - acting) * 1000 / ms, ms, flags))  # 20: start; 0.93: checkpoints
    updates, ms, flags = next((x for x in options if x[0] >= ENOUGH), max(options, key=lambda x: x[0]))
    updates = min(STEPS, max(STEPS / 16, updates))  # if too few fit, the run is cut, and that is its curve
    flags = {**flags, "num_envs": ENVS, "total_timesteps": STEPS, "env_id": "ALE/Pong-v5"}
    flags["train_ratio"] = round(updates * 16 * flags.get("batch_length", 64) / STEPS)
    flags["checkpoint_every"] = int(STEPS * min(0.2, 40 / seconds))  # every 40 seconds
    note(args, "learn", plan=flags, updates=int(updates), ms=ms, acting_s=acting, seconds=seconds)
    return flags


def jobs(args, seconds):
    """-> {name: flags of a run}, in the order of their worth; how many run side by side."""
    if args.device == "cpu":
        flags = {"env_id": PONG[1], "env_kwargs": PONG[3], "size": "debug", "total_timesteps": 3000, "num_envs": 2}
        return {"pong": {**flags, "checkpoint_every": 200, "log_every": 1}}, 1
    width, slower, alone = 1, 1.0, measured(args, "update 12m")
    for n in 2, 4:  # it must pay: each of them keeps three quarters of its speed
        beside = measured(args, f"update 12m, {n} side by side")
        if alone and beside and beside < alone / 0.75:
            width, slower = n, beside / alone
    pong = plan(args, seconds, slower)
    runs = {"pong": pong, "swingup": SWINGUP, "pong2": {**pong, "seed": 2}}
    for name, package in ("pong", "ale_py"), ("pong2", "ale_py"), ("swingup", "shimmy"):
        if not util.find_spec(package):
            note(args, "learn", missing=package, left_out=name)
            del runs[name]
    return runs or {"cartpole": CARTPOLE}, width


def newest(folder):
    """The youngest run in a folder, if any."""
    return max(Path(folder).glob("*/events*"), key=os.path.getmtime, default=Path()).parent if folder else Path()


def show(args, folders):
    """Bring what the runs have written so far to DIR."""
    for name in {job.strip("2") for job in folders}:
        runs = [newest(folder) for job, folder in folders.items() if job.startswith(name)]
        published = ["--published", PUBLISHED[name]] if name in PUBLISHED else []
        command = [HERE / "plot.py", args.out / name, *runs, *published, "--window", 20]
        run(command, time.time() + 30)  # fails until a first episode has ended
    saved, mine = newest(next(iter(folders.values()))) / "checkpoint.pt", args.out / "weights.pt"
    if saved.exists() and (not mine.exists() or saved.stat().st_mtime > mine.stat().st_mtime):
        from agents import shrink

        shrink(saved, mine, most=15 * 2**20)


def learn(args):
    """Runs until the time is almost over, then pictures and scores of what the first has learned."""
    left = args.until - time.time()
    score = left > 240  # else what an evaluation costs is better spent on learning
    stop = args.until - (45 if score else 22)
    queue, width = jobs(args, stop - time.time())
    forms = BEST[BEST.index(best(args, "dreamerv3")) :]  # if a run breaks, it begins again in the next one
    queue = [(name, flags, ["compiled"] * flags.pop("compiled", False) + forms) for name, flags in queue.items()]
    old = {record["job"]: record["folder"] for record in records(args, "learn") if "folder" in record}
    base, running, folders, shown = ROOT / "runs" / f"gpu-{int(time.time())}", {}, {}, time.time()
    while time.time() < stop:
        if queue and len(running) < width and (not folders or stop - time.time() > 45):
            name, flags, forms = queue.pop(0)
            folders[name] = base / f"{name}-{len(forms)}"
            command = [x for key, value in flags.items() for x in (f"--{key.replace('_', '-')}", value)]
            command += ["--run-root", folders[name], *switches("dreamerv3", forms[0])]
            if args.resume and (newest(old.get(name)) / "checkpoint.pt").exists():
                folders[name] = Path(old.pop(name))
                command = ["--resume", newest(folders[name])]
            note(args, "learn", job=name, folder=folders[name], command=" ".join(map(str, command)))
            with open(args.out / "log.txt", "a") as log:
                script = ["results/kernels.py", "train"] if forms[0] == "compiled" else ["dreamerv3.py"]
                process = start([*script, *command, "--device", args.device], log)
            running[name] = process, flags, forms
        for name, (process, flags, forms) in list(running.items()):
            if process.poll() is not None:
                note(args, "learn", job=name, code=process.returncode, what="see log.txt" if process.returncode else "")
                del running[name]
                if process.returncode and forms[1:]:
                    queue.insert(0, (name, flags, forms[1:]))
        if not running and (not queue or stop - time.time() < 45):
            break
        time.sleep(1)
        if time.time() - shown > 15 and stop - time.time() > 5:
            shown = time.time()
            safely(show, args, folders)
    for process, *_ in running.values():
        kill(process)
    note(args, "learn", ended=[name for name in folders if name not in running], cut=list(running))
    run_dir = newest(next(iter(folders.values())))

    def after(command):
        code, seconds, text = run([*command, "--device", args.device], args.until - 1)
        note(args, "learn", after=command[1], code=code, seconds=seconds, output=tail(code, text, 8))
        with suppress(OSError):
            shutil.copy(run_dir / "dream.gif", args.out)

    with ThreadPoolExecutor(3) as pool:
        pool.submit(safely, show, args, folders)
        pool.submit(after, ["results/dream.py", "dreamerv3", run_dir])
        if score:
            pool.submit(after, ["dreamerv3.py", "--eval", run_dir, "--eval-episodes", 4])


def safely(work, *inputs):
    """Nothing that only shows results may end a run."""
    try:
        work(*inputs)
    except Exception:
        traceback.print_exc()


# --- all of them ------------------------------------------------------------------------------------------------------

STAGES = {stage.__name__: stage for stage in (machine, smoke, tests, speed, learn)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="these stages")
    parser.add_argument("--device", choices=SHARES, default="cuda")
    parser.add_argument("--resume", type=Path, help="folder of an earlier call: its records hold, its runs go on")
    for name in "stage", "part":  # the script's own calls
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.stage:
        return STAGES[args.stage](args)
    end = time.time() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume and args.resume.resolve() != args.out:
        with open(args.out / "gpu.jsonl", "a") as file:
            for line in (args.resume / "gpu.jsonl").read_text().splitlines():
                record = json.loads(line)
                if record.get("ok", True) and record.get("outcome", "passed") == "passed" and not record.get("error"):
                    file.write(line + "\n")
    chosen, shares = [name for name in STAGES if name in args.only], SHARES[args.device]
    for i, name in enumerate(chosen):
        before, left = len(records(args, name)), end - time.time()
        until = time.time() + left * shares[name] / sum(shares[x] for x in chosen[i:])
        command = [__file__, *sys.argv[1:], "--stage", name, "--until", until]
        with open(args.out / "log.txt", "a") as log:
            code = finish(start(command, log), until + 3)
        for record in records(args, name)[before:]:
            print(json.dumps(record)[:300])
        what = "ended at its limit" if code is None else "see log.txt" if code else ""
        note(args, "stage", name=name, seconds=round(time.time() - end + left), code=code, what=what)
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
