# SPDX-License-Identifier: MIT
"""Tensor operations of one update of dreamerv3.py by part, counted on a CPU: python results/kernels.py [--compile]
And dreamerv3.py with its recurrent steps through torch.compile: python results/kernels.py train FLAGS

Two forms of the recurrent steps that only a GPU can judge live here, not in the file: the gradients of their weights
for all steps at once (through_time), and with that the steps through torch.compile (compiled).

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
from functools import partial

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import dreamerv3 as d3

VIEWS = set("view _unsafe_view reshape permute transpose t slice select split split_with_sizes unsqueeze".split())
VIEWS |= set("squeeze expand detach alias unbind as_strided movedim flatten unflatten narrow chunk lift_fresh".split())
VIEWS |= {"empty", "empty_like", "new_empty", "empty_strided"}  # move no data either
IMAGINED = ("rssm", "core"), ("rssm.prior", "forward"), ("rssm", "draw"), ("actor", "dist")  # of an imagined step
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
    """-> {part: {operation: number}} of one update. The loop's own backward pass is told apart by through_time only."""
    counter, B = Count(), len(batch["reward"])
    for (owner, method), part in PARTS.items():
        counter.tag(getattr(agent, owner), method, lambda *_, part=part: part)
    counter.tag(agent.rssm, "step", lambda deter, *_: FILTER if len(deter) == B else "filter, all steps again")
    for owner, method in IMAGINED:
        counter.tag(agent.get_submodule(owner), method, lambda *_: None if torch.is_grad_enabled() else DREAM)
    undo = counter.tag(torch.autograd, "grad", lambda *_, **kw: BACK if kw else "backward, the rest")
    try:
        with counter:
            agent.update(batch)
    finally:
        undo()
    return counter.counts


def stack_steps(steps):
    """T tuples of tensors (B, ...) -> one tuple of tensors (B, T, ...)."""
    return tuple(torch.stack(x, 1) for x in zip(*steps, strict=True))


class ThroughTime(torch.autograd.Function):
    """Backpropagation through time in two passes. Forward hands on the states of a loop whose steps are detached from
    each other and from all weights. Backward first goes back over these steps, and adds to the gradient of each state
    what later steps pass back. The sums then go into the same steps computed again, all T at once and with the weights:
    there a layer is one product in each direction, where the loop would have T small ones and T additions.
    """

    @staticmethod
    def forward(ctx, steps, deter, stoch, logits, *again):
        """steps: T x (states before the step, states after it), each step a graph of its own; others: (B, T, ...)."""
        ctx.steps = steps
        return deter, stoch, logits

    @staticmethod
    def backward(ctx, deter, stoch, logits):
        totals, passed = [], (0, 0)
        for t in reversed(range(len(ctx.steps))):
            before, after = ctx.steps[t]
            totals.append((deter[:, t] + passed[0], stoch[:, t] + passed[1], logits[:, t]))
            passed = torch.autograd.grad(after, before, totals[-1], retain_graph=True)
        return None, None, None, None, *stack_steps(totals[::-1])


def observe(rssm, embed, action, is_first, state, noise=None):
    """RSSM.observe with ThroughTime: the same arguments, the same result, the same gradients."""
    (B, T), S, K = is_first.shape, rssm.args.stoch, rssm.args.classes
    keep = 1 - is_first.float()[..., None]  # (B, T, 1)
    action_hidden = rssm.action_in((action * keep).clamp(-1, 1))  # (B, T, U)
    post_weight, embed_weight = d3.cast(rssm.post_in.weight).split([rssm.args.deter, embed.shape[-1]], 1)
    embed_hidden = F.linear(embed, embed_weight, rssm.post_in.bias)  # (B, T, U)
    noise = torch.rand(B, T, S, K, device=embed.device).log_().neg_() if noise is None else noise
    inputs, weights = (keep, action_hidden, embed_hidden, noise), (d3.cast(rssm.core_hidden.weight), post_weight)
    after, steps = (state["deter"], state["stoch"]), []
    for t in range(T):
        before = [x.detach().requires_grad_(torch.is_grad_enabled()) for x in after[:2]]
        after = rssm.step(*before, *(x[:, t].detach() for x in inputs), *(x.detach() for x in weights))
        steps.append((before, after))
    before, after = (stack_steps(x) for x in zip(*steps, strict=True))
    if torch.is_grad_enabled():
        flat = (x.flatten(0, 1) for x in (*(x.detach() for x in before), *inputs))
        again = (x.unflatten(0, (B, T)) for x in rssm.step(*flat, *weights))
        after = ThroughTime.apply(steps, *(x.detach() for x in after), *again)
    return dict(zip(("deter", "stoch", "logits"), after, strict=True))


def through_time(agent):
    """The agent, with the gradients of the filter's weights for all steps at once."""
    agent.rssm.observe = partial(observe, agent.rssm)
    return agent


class Part(torch.nn.Module):
    """A method of a module as a module, so that functional_call can run it with other weights."""

    def __init__(self, owner, method):
        super().__init__()
        self.owner, self.method = owner, getattr(owner, method)

    def forward(self, *inputs):
        return self.method(*inputs)


def compiled(agent, images=False):
    """through_time, and torch.compile for the recurrent steps, products included; images: for encoder and decoder, too.

    The steps get their weights as arguments, cast once per update as autocast would, and without gradient: that follows
    in plain code, for all steps at once. Everything else, other batch sizes too, stays as it is.
    """
    frozen, B, T = {}, agent.args.batch_size, agent.args.batch_length
    through_time(agent)

    def refresh(*args, real=agent.model_losses, **kwargs):
        with agent.autocast():
            for owner in agent.rssm, agent.rssm.prior, agent.actor:
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
        replace(agent.get_submodule(owner), method, learns=False)
    for part in (agent.encoder, agent.decoder) if images else ():
        plain, fast = part.forward, torch.compile(part.forward, dynamic=False)
        part.forward = lambda x, plain=plain, fast=fast: (fast if torch.is_grad_enabled() else plain)(x)


def compiled_plainly(agent):
    """torch.compile for the recurrent steps as they stand, weights cast and their gradients summed in each of them: all
    that dreamerv3.py itself would need, should it be fast enough. Other batch sizes stay as they are.
    """
    sizes = {agent.args.batch_size, agent.args.batch_size * agent.args.batch_length}

    def replace(owner, method):
        plain, fast = getattr(owner, method), torch.compile(getattr(owner, method), dynamic=False)
        setattr(owner, method, lambda *x: (fast if len(x[0]) in sizes else plain)(*x))

    for owner, method in ("rssm", "step"), *IMAGINED:
        replace(agent.get_submodule(owner), method)


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
    fused = count_compiled(*case()) if parser.parse_args().compile else {}
    agent, batch = case()
    plain, rows = count(agent, batch), count(through_time(case()[0]), batch)
    print("| part | operations | compiled | most frequent |\n|---|---|---|---|")
    total = {part: names.total() for part, names in rows.items()}
    for part, names in sorted(rows.items(), key=lambda row: -row[1].total()):
        often = ", ".join(f"{name} {n:,}" for name, n in names.most_common(7) if n)
        print(f"| {part} | {total[part]:,} | {fused.get(part, '') or ''} | {often} |")
    least = f"{sum({**total, **fused}.values()):,}" if fused else ""
    print(f"| in all | {sum(total.values()):,} | {least} | |")
    parts = ", ".join(f"{part} {names.total():,}" for part, names in plain.items())
    print(f"\nWithout through_time: {sum(names.total() for names in plain.values()):,} ({parts}).")


if __name__ == "__main__":
    main()
