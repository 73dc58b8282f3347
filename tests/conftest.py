# SPDX-License-Identifier: MIT
"""Puts the folder with the scripts on the path: single files, without a package. A fixture that all tests share."""

import os
import pathlib
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other cost more than they give
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture
def data(request):
    """The fixture file that parity.case names. At the end everything in it must have been compared."""
    from parity import Data

    data = Data(request.param)
    yield data
    assert data.open == set(), f"not compared: {data.open}"


@pytest.fixture
def made(module, monkeypatch):
    """{"Agent": [...], "Replay": [...]}: the objects that train makes."""
    seen = {"Agent": [], "Replay": []}

    def spy(base, objects):
        class Spy(base):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                objects.append(self)

        return Spy

    for name, objects in seen.items():
        monkeypatch.setattr(module, name, spy(getattr(module, name), objects))
    return seen
