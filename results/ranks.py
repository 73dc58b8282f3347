# SPDX-License-Identifier: MIT
"""Several GPUs, or machines: a run of dreamerv3.py, dreamerv2.py, planet.py or merlin.py whose updates are spread.

    torchrun --nproc-per-node 4 results/ranks.py dreamerv3.py --env-id ALE/Pong-v5 --size 50m --batch-size 64
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --master-port 29400 --nproc-per-node 8 results/ranks.py ...

Rank 0, on the first machine, runs the file as it is: environments, replay, progress, checkpoints. A run that began so
goes on with any number of ranks that divides its batch, or without them. The other ranks hold a copy of its agent, and
each computes a part of every batch, with latents that it draws itself. Gradients are averaged before they are clipped,
and what else looks at the whole batch is gathered (SEAMS): with the same noise it is the step of one process with the
whole batch, but for rounding. All ranks take the same step, bit by bit.

Only the updates are shared out: this pays where they, not the environments, take the time, and a part of a batch still
fills a GPU. torchrun gives each process one thread unless OMP_NUM_THREADS is set. On GPUs an update is captured in
pieces, between which its ranks exchange, as a graph cannot wait for another process. One GPU for each rank, gloo on
CPUs. If a rank dies, all end; the last checkpoint is good.
"""

import importlib.util
import io
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

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
}
NEVER = timedelta(days=30)  # others wait while rank 0 plays, evaluates, writes; a death is noticed at once all the same


def load(path, ranks):
    """The file as a module, its SEAMS mended; its updates are RANKS'."""
    path = Path(path)
    source = path.read_text(encoding="utf-8")
    for old, new in SEAMS[path.stem].items():
        assert source.count(old) == 1, f"{path} was changed: {old!r} is not there once"
        source = source.replace(old, new)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(path.stem, path))
    sys.modules[path.stem] = module  # agents are sent as instances of its classes
    exec(compile(source, str(path), "exec"), module.__dict__)
    captured, open_run = module.Captured, module.open_run

    def checked(args, *rest):
        """Before anything is written: can the batch be shared out, and is there a GPU for each rank?"""
        name = "batch_size" if hasattr(args, "batch_size") else "num_envs"
        if getattr(args, name) % ranks.size:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            module.fail(f"{flag}: allowed with {ranks.size} ranks: a multiple of that")
        if args.device not in ("auto", "cpu", "cuda"):
            module.fail(f"--device {args.device}: allowed with ranks: auto, cpu, cuda, as each has its own")
        if ranks.device(args).type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            module.fail(f"--device {args.device}: allowed: {torch.cuda.device_count()} ranks here, one for each GPU")
        return open_run(args, *rest)

    choose = lambda fn, on: Update(fn, on, ranks) if getattr(fn, "__name__", "") == "update" else captured(fn, on)
    module.RANKS, module.Captured, module.open_run = ranks, choose, checked
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
        grad = torch.autograd.grad  # each file calls it once for every step of its optimisers, and nowhere else
        torch.autograd.grad = lambda *args, **kwargs: self.average(grad(*args, **kwargs))

    def device(self, args):
        """-> where this rank computes."""
        return torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else f"cuda:{self.local}")

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says what happened, and the others end with it

    def hear():
        try:
            return ranks.tell()
        except RuntimeError:  # rank 0 is gone, and has said why
            raise SystemExit(1) from None

    message = hear()
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
    while hear() != "end":
        update.compute(None)


def main():
    known = ", ".join(f"{name}.py" for name in SEAMS)
    if Path(sys.argv[1] if len(sys.argv) > 1 else "").stem not in SEAMS or "RANK" not in os.environ:
        print(f"error: allowed: torchrun --nproc-per-node N results/ranks.py FILE FLAGS, with {known}", file=sys.stderr)
        raise SystemExit(2)
    ranks = Ranks()
    sys.path.insert(0, str(Path(sys.argv[1]).resolve().parent))
    module = load(sys.argv[1], ranks)
    args = tyro.cli(module.Args, description=module.__doc__, args=sys.argv[2:])
    if ranks.rank:
        work(module, args, ranks)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # another rank has died: train says where it stopped
        module.train(args)
        ranks.tell("end")
    dist.all_reduce(torch.zeros(1))  # nobody leaves before all have heard
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
