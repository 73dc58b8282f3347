# SPDX-License-Identifier: MIT
"""tests/share.py on copies of the files: a shared definition that was changed in one becomes the same in all."""

import shutil
import subprocess
import sys

import pytest
import share
from conftest import ROOT
from test_shared import definitions, shared_by, table

CHANGED = "A checkpoint, changed on purpose"


@pytest.fixture
def root(tmp_path):
    """A folder with copies of all files."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("applications/*.py")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def read(root):
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}


def edit(path, old, new):
    code = path.read_text(encoding="utf-8")
    assert old in code
    path.write_text(code.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("source", ["dreamerv3", None])
@pytest.mark.parametrize("name, old", [("save", "Atomic: either"), ("SOURCE", "goes into every"), ("tune", "make upd")])
def test_a_change_is_copied(root, source, name, old):
    """Changed in one file, it is changed in all that share it; all else stays, to the last character."""
    before = read(root)
    edit(root / "dreamerv3.py", old, CHANGED)
    others = sorted({stem.rpartition("/")[2] for group in table()[name] for stem in group} - {"dreamerv3"})
    assert shared_by(root)[name] != table()[name]
    changed = share.share(root, name, source)
    assert sorted(path.stem for path in changed) == others
    assert shared_by(root)[name] == table()[name] and CHANGED in definitions(root / "merlin.py")[name]
    assert {path: text.replace(CHANGED, old) for path, text in read(root).items()} == before
    assert share.share(root, name, source) == []


def test_back_again(root):
    """--from a file that was not changed takes the change back."""
    before = read(root)
    edit(root / "dreamerv3.py", "Atomic: either", CHANGED)
    assert [path.name for path in share.share(root, "save", "planet")] == ["dreamerv3.py"] and read(root) == before


def test_plumbing(root):
    """All of Part 3: with a new function in it, and a line between two functions."""
    before, new = read(root), "def newer():\n    return 1\n\n\n# a line between\n"
    edit(root / "planet.py", "# --- environments ---", f"{new}# --- environments ---")
    assert sorted(path.name for path in share.share(root, "plumbing")) == ["dreamerv2.py", "dreamerv3.py"]
    assert all(read(root)[path.relative_to(root)].count(new) == 1 for path in root.glob("[dp]*.py"))
    assert {path: text.replace(new, "") for path, text in read(root).items()} == before


def test_groups_of_one_name(root):
    """inherit is shared by two groups of files: one of them changes."""
    edit(root / "merlin.py", "The flags of a run; those", CHANGED)
    before = read(root)
    changed = share.share(root, "inherit", "merlin")
    assert {path.stem for path in changed} == set(next(x for x in table()["inherit"] if "merlin" in x)) - {"merlin"}
    assert all(read(root)[path] == before[path] for path in before if path.stem in ("planet", "dreamerv2", "dreamerv3"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["nonsense"], "nonsense: not shared; allowed: plumbing, "),
        (["inherit"], "inherit: name the file it comes from"),
        (["save", "--from", "nonsense"], "save: name the file it comes from"),
        (["ATARI", "--from", "merlin"], "ATARI: name the file it comes from"),
    ],
)
def test_bad_input(flags, said):
    """One line, exit code 2."""
    result = subprocess.run([sys.executable, ROOT / "tests" / "share.py", *flags], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith(f"error: {said}")


def test_unclear_source(root, capsys):
    """Two files that were changed, or a group of two, need --from; a file that cannot be read, or lacks the name."""
    edit(root / "dreamerv3.py", "Atomic: either", CHANGED)
    edit(root / "merlin.py", "Atomic: either", CHANGED + "!")
    edit(root / "planet.py", "settings of ALE", CHANGED)
    edit(root / "ftw.py", "def tune", "def tune(")
    edit(root / "dreamerv2.py", "def film", "def movie")
    before = read(root)
    for name, said in ("ATARI", "not clear which"), ("tune", "ftw.py: "), ("film", "film: not in dreamerv2"):
        with pytest.raises(SystemExit) as stop:
            share.share(root, name)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    edit(root / "ftw.py", "def tune(", "def tune")
    with pytest.raises(SystemExit):
        share.share(root, "save")
    assert "not clear which" in capsys.readouterr().err
    edit(root / "ftw.py", "def tune", "def tune(")
    assert read(root) == before


def test_command():
    """As CONTRIBUTING.md has it: on files that agree nothing is changed, and said to be the same."""
    command = [sys.executable, ROOT / "tests" / "share.py", "save", "--from", "dreamerv3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "save: the same everywhere\n", "")
