# SPDX-License-Identifier: MIT
"""Numbers to hold a file against. Keys are [case/]role/name with roles cfg, in, param, out, grad, upd.

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
ROLES = ("cfg", "in", "param", "out", "grad", "upd")


class Data:
    """Arrays of a file as tensors. It remembers which results no test has compared yet."""

    def __init__(self, name):
        with np.load(FIXTURES / f"{name}.npz") as arrays:
            self.arrays = dict(arrays)
        role = lambda key: next(part for part in key.split("/") if part in ROLES)
        self.open = {key for key in self.arrays if role(key) in ("out", "grad", "upd")}
        assert self.open

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])

    def leaf(self, key):
        return self[key].requires_grad_()

    def check(self, key, actual, summed=False, **tolerance):
        """Compare a result. summed: its entries are sums over many terms, as gradients of convolutions are."""
        expected, tolerance = self[key], {**TOLERANCE, **tolerance}
        if summed:
            tolerance["atol"] = max(tolerance["atol"], SUMMED * float(expected.abs().max()))
        assert actual.shape == expected.shape, key
        assert torch.allclose(actual.detach().to(expected.dtype), expected, **tolerance), key
        self.open.discard(key)


def case(name):
    """Gives a test the Data of a file, as the argument data (conftest.py)."""
    return pytest.mark.parametrize("data", [name], indirect=True)
