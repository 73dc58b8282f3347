# SPDX-License-Identifier: MIT
"""Several GPUs, or machines: a run of dreamerv3.py, dreamerv2.py, planet.py or merlin.py whose updates are spread, or
one of ftw.py whose population is.

    torchrun --nproc-per-node 4 results/ranks.py dreamerv3.py --env-id ALE/Pong-v5 --size 50m --batch-size 64
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --master-port 29400 --nproc-per-node 8 results/ranks.py ...
    torchrun --nproc-per-node 2 results/ranks.py ftw.py --population 8

The Dreamers, PlaNet, MERLIN: rank 0, on the first machine, runs the file as it is: environments, replay, progress,
checkpoints. A run that began so goes on with any number of ranks that divides its batch, or without them. The other
ranks hold a copy of its agent, and each computes a part of every batch, with latents that it draws itself. Gradients
are averaged before they are clipped, and what else looks at the whole batch is gathered (SEAMS): with the same noise
it is the step of one process with the whole batch, but for rounding. All ranks take the same step, bit by bit.

Only the updates are shared out: this pays where they, not the environments, take the time, and a part of a batch still
fills a GPU. torchrun gives each process one thread unless OMP_NUM_THREADS is set. On GPUs an update is captured in
pieces, between which its ranks exchange, as a graph cannot wait for another process.

FTW: every batch of matches, the agents are dealt out anew. Each rank plays and trains its part in its share of the
games (--games counts all); then all ranks have all agents, as their owners left them, and rate and evolve them alike.
So the rows of an update, and what an agent meets over time, are those of one process; the players of one match are of
one part. To go on with --resume on several machines, each needs the run folder.

One GPU for each rank, gloo on CPUs. If a rank dies, all end; the last checkpoint is good.
"""

import contextlib
import importlib.util
import io
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import tyro

SEAMS = {  # where an update looks at the whole batch at once, and what stands there with ranks
    "dreamerv3": {  # percentiles of all returns, Eq. 7
        "returns.flatten().sort().values": "RANKS.gather(returns.flatten()).sort().values",
        "(returns.numel() - 1)": "(RANKS.size * returns.numel() - 1)",
    },
    "dreamerv2": {  # free nats bound the mean KL
        "kl_categorical(post.detach(), prior).mean()": "RANKS.mean(kl_categorical(post.detach(), prior))",
        "kl_categorical(post, prior.detach()).mean()": "RANKS.mean(kl_categorical(post, prior.detach()))",
    },
    "planet": {},
    "merlin": {},
    "ftw": {  # where a batch of matches, or what came of it, is of all agents
        "make_game(args, args.games, args.seed)": "make_game(args, args.games // RANKS.size, args.seed + RANKS.rank)",
        "who = make_matches(": "who = RANKS.deal(make_matches, ",
        "who, {p: act[p] for p in range(P) if (who == p).any()})": "*RANKS.mine(who, act))",
        "for p in stats:  # once": "RANKS.collect(agents, stats, who, match, now)\n            for p in stats:  # once",
        "rated = duel(game, [agents[p], scripted[s]], {0: act[p]})": (
            "rated = RANKS.rated(duel(game, [agents[p], scripted[s]], {0: act[p]}))"
        ),
    },
}
NEVER = timedelta(days=30)  # others wait while rank 0 plays, evaluates, writes; a death is noticed at once all the same


def load(path, ranks):
    """The file as a module, its SEAMS mended; RANKS is known in it."""
    path = Path(path)
    source = path.read_text(encoding="utf-8")
    for old, new in SEAMS[path.stem].items():
        assert source.count(old) == 1, f"{path} was changed: {old!r} is not there once"
        source = source.replace(old, new)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(path.stem, path))
    sys.modules[path.stem] = module  # agents are sent as instances of its classes
    exec(compile(source, str(path), "exec"), module.__dict__)
    module.RANKS, open_run = ranks, module.open_run

    def checked(args, *rest):
        """Before anything is written: can what all ranks share be shared out?"""
        shared = {"merlin": ["num_envs"], "ftw": ["population", "games"]}.get(path.stem, ["batch_size"])
        for name in [name for name in shared if getattr(args, name) % ranks.size]:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            say(f"{flag}: allowed with {ranks.size} ranks: a multiple of that")
        ranks.updates = rest[-1]["now"]["updates"] if rest[-1] else 0
        return open_run(args, *rest) if ranks.rank == 0 else ranks.stand_by(args, *rest)

    module.open_run = checked
    if path.stem == "ftw":
        for name in ("write_checkpoint", "write_match", "record", "show") if ranks.rank else ():
            setattr(module, name, lambda *_: {})  # rank 0 does
    else:
        captured = module.Captured
        ours = lambda fn: getattr(fn, "__name__", "") == "update"
        module.Captured = lambda fn, on: Update(fn, on, ranks) if ours(fn) else captured(fn, on)
        ranks.average_gradients()
    return module


class Ranks:
    """All processes of a run, and what they tell each other. In a graph that is being captured, an exchange ends one
    piece, happens, and begins the next.
    """

    def __init__(self):
        self.local, self.cuts, self.graph = int(os.environ["LOCAL_RANK"]), None, None
        cuda = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=NEVER)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def average_gradients(self):
        """From here on. Each file calls autograd.grad once for every step of its optimisers, and nowhere else."""
        grad = torch.autograd.grad
        torch.autograd.grad = lambda *args, **kwargs: self.average(grad(*args, **kwargs))

    def device(self, args):
        """-> where this rank computes."""
        return torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else f"cuda:{self.local}")

    def together(self, fn):
        """A call that all ranks make -> its result. Where one is gone, rank 0 says what happened."""
        try:
            return fn()
        except RuntimeError as error:
            if self.rank and "onnection" in str(error):
                raise SystemExit(1) from None
            raise

    def exchange(self, fn):
        """fn: () -> None, which only writes into tensors that stay where they are."""
        if self.graph is not None:
            self.graph.capture_end()
            self.cuts.append((self.graph, fn))
        fn()
        if self.graph is not None:
            self.begin()

    def begin(self):
        """Begin a piece; all of them share one pool of memory."""
        self.graph = torch.cuda.CUDAGraph()
        pool = self.cuts[0][0].pool() if self.cuts else None
        self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")

    def average(self, tensors):
        """-> the same tensors, each the mean over all ranks; one exchange."""
        flat = torch.cat([x.detach().float().flatten() for x in tensors])
        self.exchange(lambda: dist.all_reduce(flat))
        parts = (flat / self.size).split([x.numel() for x in tensors])
        return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]

    def gather(self, x):
        """(n, ...) -> (ranks * n, ...), without gradient."""
        x = x.detach().contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.exchange(lambda: dist.all_gather(parts, x))
        return torch.cat(parts)

    def mean(self, x):
        """The mean over the elements of all ranks, with a gradient into those of this one."""
        own = x.mean()
        return own + (self.average([own])[0] - own.detach())

    def tell(self, message=None):
        """Rank 0's object -> for all."""
        box = [message]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def share(self, batch, shapes, device):
        """Rank 0's {key: (B, ...)} -> each rank's {key: (B / ranks, ...)}. shapes: (key, shape of a part, dtype)."""
        parts = {}
        for key, shape, dtype in shapes:
            part = torch.empty(shape, dtype=dtype, device=device)
            chunks = [x.contiguous().view(torch.uint8) for x in batch[key].chunk(self.size)] if batch else None
            dist.scatter(part.view(torch.uint8), chunks)  # as bytes: of any type
            parts[key] = part
        return parts


class Parts(Ranks):
    """A population that is spread: ftw.py runs on every rank, and only what it does with its matches is its own."""

    def stand_by(self, args, agents, game, saved):
        """All ranks but 0, in the place of open_run: noise and boards of their own. -> no folder, no TensorBoard."""
        games = saved["now"]["games"] if saved else 0
        torch.manual_seed(args.seed + games + 10**12 * self.rank)
        if hasattr(game, "rng"):
            game.rng = np.random.default_rng([args.seed, games, self.rank])
        return Path(os.devnull), SimpleNamespace(flush=lambda: None, close=lambda: None)

    def deal(self, make_matches, ratings, games, places, rng):
        """Like make_matches, within the parts of the population, dealt anew. -> who, (G, N), the same on all ranks."""
        parts = rng.permutation(len(ratings)).reshape(self.size, -1)
        self.owner = {int(p): rank for rank, part in enumerate(parts) for p in part}
        whos = [part[make_matches(ratings[part], games // self.size, places, rng)] for part in parts]
        return np.concatenate(whos)

    def mine(self, who, act):
        """-> this rank's rows of who, and who of its agents acts there."""
        own = np.split(who, self.size)[self.rank]
        return own, {p: act[p] for p in range(len(act)) if (own == p).any()}

    def collect(self, agents, stats, who, match, now):
        """After a batch of matches: all agents as their owners have them, and what all ranks know of the matches."""
        for p, agent in enumerate(agents):
            tensors = [*agent.state_dict().values(), *agent.squares]
            flat = torch.cat([x.flatten() for x in tensors])
            self.together(lambda flat=flat, p=p: dist.broadcast(flat, self.owner[p]))
            for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
                x.copy_(part.view_as(x))
        own = {p: {key: float(x) for key, x in stats[p].items()} for p in match.act}
        told = self.gather_objects((match.outcome, match.totals, own, now["updates"] - self.updates))
        outcomes, totals, every, updates = zip(*told, strict=True)
        match.who, match.outcome, match.totals = who, np.concatenate(outcomes), sum(totals)
        for own in every:
            stats.update(own)
        self.updates += sum(updates)
        now["updates"] = self.updates

    def rated(self, duel):
        """What duel gives, of all ranks."""
        outcome, match = duel
        outcomes, whos, results = zip(*self.gather_objects((outcome, match.who, match.outcome)), strict=True)
        match.who, match.outcome = np.concatenate(whos), np.concatenate(results)
        return np.concatenate(outcomes), match

    def gather_objects(self, message):
        """-> those of all ranks."""
        box = [None] * self.size
        self.together(lambda: dist.all_gather_object(box, message))
        return box


class Update:
    """In the place of Captured, for the update of an agent: on rank 0 as it is called, on the others by work."""

    def __init__(self, fn, on, ranks):
        self.fn, self.on, self.ranks, self.device = fn, on, ranks, fn.__self__.device
        self.shapes, self.calls, self.static, self.result, self.cuts = None, 0, None, None, None

    def __call__(self, batch):
        """Rank 0: {key: (B, ...)} -> what the update of the whole batch gives."""
        ranks = self.ranks
        if self.calls == 0:  # a resumed run has loaded its weights by now
            agent = io.BytesIO()
            torch.save(self.fn.__self__, agent)
            self.shapes = [(key, (len(x) // ranks.size, *x.shape[1:]), x.dtype) for key, x in sorted(batch.items())]
            ranks.tell((agent.getvalue(), self.on, self.shapes, torch.initial_seed()))
        ranks.tell("go")
        return self.compute(batch)

    def compute(self, batch):
        """All ranks at the same time -> statistics as means over ranks, whole latents."""
        ranks = self.ranks
        result = self.run(ranks.share(batch, self.shapes, self.device))
        names = [key for key, x in result.items() if x.dim() == 0]
        stats = dict(zip(names, ranks.average([result[key] for key in names]), strict=True))
        for key in [key for key in result if key not in stats]:  # in the same order on all ranks
            stats[key] = ranks.gather(result[key].view(torch.uint8)).view(result[key].dtype)
        return stats

    def run(self, part):
        """The update of this rank's part; on a GPU, from the fourth on, its pieces are replayed."""
        self.calls += 1
        if not self.on or self.calls <= 3:
            return self.fn(part)
        if self.cuts is None:
            self.static, ranks = {key: x.clone() for key, x in part.items()}, self.ranks
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what eager updates took; during a capture nothing is given back
            with torch.cuda.stream(side):
                ranks.cuts = []
                ranks.begin()
                self.result = self.fn(self.static)
                ranks.graph.capture_end()
                self.cuts, ranks.graph = [*ranks.cuts, (ranks.graph, lambda: None)], None
            torch.cuda.current_stream().wait_stream(side)
            return self.run(part)
        for key, x in part.items():
            self.static[key].copy_(x)
        for graph, exchange in self.cuts:
            graph.replay()
            exchange()
        return self.result


def work(module, args, ranks):
    """All ranks but 0: updates of a copy of the agent, until rank 0 has no more."""
    message = ranks.together(ranks.tell)
    if message == "end":
        return
    saved, on, shapes, seed = message
    device = ranks.device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    agent = torch.load(io.BytesIO(saved), map_location=device, weights_only=False)
    agent.device = device
    module.tune(agent.args)
    torch.manual_seed(seed + 10**12 * ranks.rank)  # rank 0 has the flag's and the step's
    update = Update(agent.update, on, ranks)
    update.shapes = shapes
    while ranks.together(ranks.tell) != "end":
        update.compute(None)


def say(message):
    """Bad input: one line of rank 0. The others wait for torchrun to end them, as the first to go ends all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    else:
        time.sleep(60)
    raise SystemExit(2)


def main():
    if Path(sys.argv[1] if len(sys.argv) > 1 else "").stem not in SEAMS or "RANK" not in os.environ:
        files = ", ".join(f"{name}.py" for name in SEAMS)
        say(f"allowed: torchrun --nproc-per-node N results/ranks.py FILE FLAGS, with {files}")
    population = Path(sys.argv[1]).stem == "ftw"
    ranks = Parts() if population else Ranks()
    sys.path.insert(0, str(Path(sys.argv[1]).resolve().parent))
    module = load(sys.argv[1], ranks)
    args = tyro.cli(module.Args, description=module.__doc__, args=sys.argv[2:])
    if args.device not in ("auto", "cpu", "cuda"):
        say(f"--device {args.device}: allowed with ranks: auto, cpu, cuda, as each has its own")
    if ranks.device(args).type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        allowed = f"{torch.cuda.device_count()} ranks here, one for each GPU"
        say(f"--device {args.device}: allowed: {allowed}")
    if ranks.rank == 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # another rank has died: train says where it stopped
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says what happened, and the others end with it
    if population:
        with contextlib.redirect_stdout(open(os.devnull, "w") if ranks.rank else sys.stdout):
            module.train(replace(args, device=str(ranks.device(args))))
    elif ranks.rank == 0:
        module.train(args)
        ranks.tell("end")
    else:
        work(module, args, ranks)
    dist.all_reduce(torch.zeros(1))  # nobody leaves before all have heard
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
