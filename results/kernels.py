# SPDX-License-Identifier: MIT
"""Tensor operations of one update of dreamerv3.py by part, counted on a CPU: python results/kernels.py [--compile]
And dreamerv3.py with its recurrent steps through torch.compile: python results/kernels.py train FLAGS

An estimate of the kernels that a GPU launches: views cost nothing, a foreach operation is one kernel per 30 tensors,
unless its factors are numbers on the device: then one per tensor. A norm counts as six operations forward and about
ten backward; on a GPU it is one or two. --compile counts the recurrent steps as torch.compile fuses them, too: a
minute or two, and a C++ compiler. 16 x 64 images of 64 x 64; the size of the network changes no number.
"""

import argparse
import collections
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import tyro
from gymnasium import spaces
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import dreamerv3 as d3

VIEWS = set("view _unsafe_view reshape permute transpose t slice select split split_with_sizes unsqueeze".split())
VIEWS |= set("squeeze expand detach alias unbind as_strided movedim flatten unflatten narrow chunk lift_fresh".split())
VIEWS |= {"empty", "empty_like", "new_empty", "empty_strided"}  # move no data either
IMAGINED = ("rssm", "core"), ("rssm", "prior"), ("rssm", "draw"), ("actor", "dist")  # methods of an imagined step
FILTER, BACK, DREAM = "filter, its steps", "backward, through these steps", "imagination, networks of its steps"
PARTS = {("encoder", "forward"): "encoder", ("decoder", "forward"): "decoder", ("optimizer", "step"): "optimiser"}
PARTS |= {("rssm", "observe"): "filter, around its steps", ("rssm", "imagine"): "imagination, around these"}


class Count(TorchDispatchMode):
    """Operations by part: counts[part][operation]."""

    def __init__(self):
        super().__init__()
        self.part, self.counts = "losses, returns, heads", collections.defaultdict(collections.Counter)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, number = func._schema.name.split("::")[1], 1
        if name.startswith("_foreach") and isinstance(args[0], list | tuple):
            factors = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else [1.0]
            slow = isinstance(factors[0], torch.Tensor) and factors[0].dim() == 0 < args[0][0].dim()
            number = len(args[0]) if slow else max(1, len(args[0]) // 30)
        self.counts[self.part][name] += 0 if name in VIEWS else number
        return func(*args, **(kwargs or {}))

    def tag(self, owner, method, part):
        """Count what owner.method does under part(arguments), unless that is None."""
        real = getattr(owner, method)

        def tagged(*args, **kwargs):
            before, self.part = self.part, part(*args, **kwargs) or self.part
            try:
                return real(*args, **kwargs)
            finally:
                self.part = before

        setattr(owner, method, tagged)
        return lambda: setattr(owner, method, real)


def case(**flags):
    """-> an untrained agent, and a batch of zeros."""
    args = d3.resolve(d3.Args(size="debug", device="cpu", batch_size=16, batch_length=64, **flags))
    B, T = args.batch_size, args.batch_length + 1
    agent = d3.Agent(spaces.Dict(image=spaces.Box(0, 255, (64, 64, 3), np.uint8)), spaces.Discrete(6), args)
    batch = {"image": torch.zeros(B, T, 64, 64, 3, dtype=torch.uint8), "reward": torch.zeros(B, T)}
    batch |= {key: torch.zeros(B, T, dtype=torch.bool) for key in ("is_first", "is_last", "is_terminal")}
    state = {"deter": torch.zeros(B, T, args.deter), "stoch": torch.zeros(B, T, args.stoch, args.classes)}
    return agent, {**batch, **agent.latents(state), "action": torch.zeros(B, T, dtype=torch.int64)}


def count(agent, batch):
    """-> {part: {operation: number}} of one update."""
    counter, B = Count(), len(batch["reward"])
    for (owner, method), part in PARTS.items():
        counter.tag(getattr(agent, owner), method, lambda *_, part=part: part)
    counter.tag(agent.rssm, "step", lambda deter, *_: FILTER if len(deter) == B else "filter, all steps again")
    for owner, method in IMAGINED:
        counter.tag(getattr(agent, owner), method, lambda *_: None if torch.is_grad_enabled() else DREAM)
    undo = counter.tag(torch.autograd, "grad", lambda *_, **kw: BACK if kw else "backward, the rest")
    try:
        with counter:
            agent.update(batch)
    finally:
        undo()
    return counter.counts


class Part(torch.nn.Module):
    """A method of a module as a module, so that functional_call can run it with other weights."""

    def __init__(self, owner, method):
        super().__init__()
        self.owner, self.method = owner, getattr(owner, method)

    def forward(self, *inputs):
        return self.method(*inputs)


def compiled(agent):
    """torch.compile for the recurrent steps, products included: a switch of the measurements, not of the files, until a
    GPU shows its worth.

    The steps get their weights as arguments, cast once per update as autocast would, and without gradient: that follows
    in plain code, for all steps at once. Everything else, other batch sizes too, stays as it is.
    """
    frozen, B, T = {}, agent.args.batch_size, agent.args.batch_length

    def refresh(*args, real=agent.model_losses, **kwargs):
        with agent.autocast():
            for owner in agent.rssm, agent.actor:
                weights = {f"owner.{name}": p.detach() for name, p in owner.named_parameters()}
                frozen[owner] = {name: d3.cast(p) if p.dim() > 1 else p for name, p in weights.items()}
        return real(*args, **kwargs)

    def replace(owner, method, learns):
        part, plain = Part(owner, method), getattr(owner, method)
        fast = torch.compile(lambda weights, *inputs: functional_call(part, weights, inputs), dynamic=False)

        def step(*inputs):
            if owner in frozen and torch.is_grad_enabled() == learns and len(inputs[0]) == (B if learns else B * T):
                return fast(frozen[owner], *inputs)
            return plain(*inputs)

        setattr(owner, method, step)

    agent.model_losses = refresh
    replace(agent.rssm, "step", learns=True)
    for owner, method in IMAGINED:
        replace(getattr(agent, owner), method, learns=False)


def count_compiled(agent, batch):
    """-> {part: operations} of the parts that compiled(agent) replaces, read from the code that the compiler makes."""
    from torch._inductor.utils import run_and_get_code

    compiled(agent)
    numbers = collections.Counter({BACK: 2 * agent.args.batch_length})  # sums with what later steps pass back
    for i, code in enumerate(run_and_get_code(agent.update, batch)[1]):
        calls = re.findall(r"(?m)^ +(?:extern_kernels\.|aten\.|cpp_)\w+\(", code[code.index("def call(") :])
        part = FILTER if i == 0 else BACK if "backward" in code else DREAM
        numbers[part] += len(calls) * (agent.args.imag_horizon if part == DREAM else agent.args.batch_length)
    return numbers


class Compiled(d3.Agent):
    """The agent of dreamerv3.py with compiled steps."""

    def __init__(self, *args):
        super().__init__(*args)
        compiled(self)


def main():
    if sys.argv[1:2] == ["train"]:
        d3.Agent = Compiled
        d3.train(tyro.cli(d3.Args, args=sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="count the recurrent steps as compiled, too")
    rows, fused = count(*case()), count_compiled(*case()) if parser.parse_args().compile else {}
    print("| part | operations | compiled | most frequent |\n|---|---|---|---|")
    total = {part: names.total() for part, names in rows.items()}
    for part, names in sorted(rows.items(), key=lambda row: -row[1].total()):
        often = ", ".join(f"{name} {n:,}" for name, n in names.most_common(7) if n)
        print(f"| {part} | {total[part]:,} | {fused.get(part, '') or ''} | {often} |")
    least = f"{sum({**total, **fused}.values()):,}" if fused else ""
    print(f"| in all | {sum(total.values()):,} | {least} | |")


if __name__ == "__main__":
    main()
