# SPDX-License-Identifier: MIT
"""Puts the folders with the scripts on the path: single files, without a package. Fixtures that tests share."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for each other cost more than they give
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "applications"), str(ROOT / "tests"), str(ROOT / "results")]


@pytest.fixture(params=["planet", "dreamerv2", "dreamerv3"], scope="module")
def module(request):
    """Each of the files that act in environments and learn from a replay; or the one that a test names."""
    return importlib.import_module(request.param)


@pytest.fixture
def data(request):
    """The fixture file that parity.case names. At the end everything in it must have been compared."""
    from parity import Data

    data = Data(request.param)
    assert data.open, f"{request.param}: no results"
    yield data
    data.finish()


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


@pytest.fixture
def variant(request, tmp_path):
    """As "planet ssm overshooting": planet.py with these patches of results/ablations, as a module of its own."""
    stem, *patches = request.param.split()
    folder = tmp_path / "patched"
    folder.mkdir()
    shutil.copy(ROOT / f"{stem}.py", folder)
    for patch in patches:
        patch = ROOT / "results" / "ablations" / f"{stem}_{patch}.patch"
        subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    name = request.param.replace(" ", "_")
    spec = importlib.util.spec_from_file_location(name, folder / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclass looks for the annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]
