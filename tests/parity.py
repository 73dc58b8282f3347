# SPDX-License-Identifier: MIT
"""Numbers to hold a file against. Keys are [case/]role/name with roles cfg, in, param, out, grad, state, upd.

The folder in the environment variable FIXTURES (default: fixtures beside this file) holds them; all sizes are read from
there. A missing file is a failure, and so is a result that no test has compared.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

FIXTURES = Path(os.environ.get("FIXTURES") or Path(__file__).parent / "fixtures")
TOLERANCE = dict(rtol=3e-5, atol=3e-6)
SUMMED = 1e-5  # absolute, times the largest entry: of sums over many terms, which may cancel to an entry near zero
ROLES = ("cfg", "in", "param", "out", "grad", "state", "upd")


class Data:
    """Arrays of a file, or of one case of it, as tensors. It remembers which results no test has compared yet.

    data[key]: what the case lacks is looked up in the whole file. cfg: the settings, those of the case before others.
    """

    def __init__(self, name, case=""):
        self.name, self.prefix = name, f"{case}/" if case else ""
        with np.load(FIXTURES / f"{name}.npz") as arrays:
            self.arrays = dict(arrays)
        role = lambda key: next((part for part in key.split("/") if part in ROLES), None)
        self.open = {key for key in self.names() if role(key) in ("out", "grad", "upd")}
        assert self.open or not case, f"{name}: no results of {case}"
        settings = [key for key in self.arrays if key.startswith(("cfg/", f"{self.prefix}cfg/"))]
        settings.sort(key=lambda key: not key.startswith("cfg/"))  # those of the case win
        self.cfg = {key.split("cfg/")[1]: self.arrays[key].tolist() for key in settings}

    def names(self, prefix=""):
        """Keys of the case that begin with prefix, without it."""
        prefix = self.prefix + prefix
        return [key.removeprefix(prefix) for key in self.arrays if key.startswith(prefix)]

    def __getitem__(self, key):
        own = self.prefix + key
        return torch.from_numpy(self.arrays[own if own in self.arrays else key])

    def leaf(self, key):
        """A copy of the array with gradient."""
        return self[key].clone().requires_grad_()

    def check(self, key, actual, summed=False, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"]):
        """Compare a result. summed: its entries are sums over many terms, as gradients of convolutions are."""
        expected, actual = self[key].double(), torch.as_tensor(actual).detach().double()
        if summed:
            atol = max(atol, SUMMED * float(expected.abs().max()))
        assert actual.shape == expected.shape, f"{self.name} {key}: {actual.shape}, expected {expected.shape}"
        worst = float(((actual - expected).abs() / (rtol * expected.abs() + atol)).max())
        assert worst <= 1, f"{self.name} {self.prefix}{key}: error is {worst:.3g} times the tolerance"
        self.open.discard(key)

    def finish(self):
        """Everything must have been compared."""
        assert not self.open, f"{self.name}: not compared: {sorted(self.open)}"


def case(name):
    """Gives a test the Data of a file, as the argument data (conftest.py)."""
    return pytest.mark.parametrize("data", [name], indirect=True)
