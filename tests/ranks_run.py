# SPDX-License-Identifier: MIT
"""python tests/ranks_run.py OUT FILE FLAGS, alone, or under torchrun as results/ranks.py: a run whose noise is the same
number everywhere, so that its gradients can be compared. They go into OUT.alone, or OUT.RANK.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results"), str(ROOT / "tests")]
import graphs  # noqa: E402
import ranks  # noqa: E402

torch.rand_like = lambda x, **_: torch.full_like(x, 0.4, dtype=torch.float32)
torch.randn_like = lambda x, **_: torch.full_like(x, 0.3, dtype=torch.float32)
torch.rand = lambda *shape, **kwargs: torch.zeros(*shape, **kwargs) + 0.4
torch.randn = lambda *shape, **kwargs: torch.zeros(*shape, **kwargs) + 0.3
taken = []


def spread(module):
    """Heads of dreamerv3 that begin at zero give returns without a range; these do not."""
    if module.__name__ == "dreamerv3":
        init = module.init_weights
        module.init_weights = lambda layer, outscale=1.0: init(layer, max(outscale, 0.1))
    return module


def record():
    grad = torch.autograd.grad

    def recorded(*args, **kwargs):
        taken.append([x.clone() for x in grad(*args, **kwargs)])
        return taken[-1]

    torch.autograd.grad = recorded


out, file, *flags = sys.argv[1:]
if os.environ.get("GRAPHS"):  # updates are captured in pieces, by the stand-in for CUDA graphs
    graphs.install(pytest.MonkeyPatch())
    update = ranks.Update.__init__
    ranks.Update.__init__ = lambda self, fn, on, r: update(self, fn, True, r)
if "RANK" in os.environ:
    load = ranks.load
    ranks.load = lambda *args: (spread(load(*args)), record())[0]  # around the average
    sys.argv = ["ranks.py", str(ROOT / file), *flags]
    ranks.main()
else:
    record()
    module = spread(importlib.import_module(Path(file).stem))
    module.train(tyro.cli(module.Args, args=flags))
torch.save(taken, f"{out}.{os.environ.get('RANK', 'alone')}")
