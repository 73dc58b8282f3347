# SPDX-License-Identifier: MIT
"""Copies a shared definition from one file into the others: python tests/share.py save --from dreamerv3

What is shared by which files is the table of test_shared.py; "plumbing" is all of Part 3, where files share it. Without
--from the source is the file that differs from all others. A line is printed for each file that was changed.
"""

import argparse
import re
import sys

from test_shared import ROOT, definitions, table

BANNER = re.compile(r"^# === Part 3: plumbing, the same in .* =+$", re.M)


def fail(message):
    """Bad input: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def text_of(name, path):
    """The text of a definition, or of Part 3, in a file; None if it is not there."""
    source = path.read_text(encoding="utf-8")
    try:
        found = definitions(path)
    except SyntaxError as error:
        fail(f"{path.name}: {error}; allowed: a file that Python can read")
    match = BANNER.search(source)
    return found.get(name) if name != "plumbing" else match and source[match.start() :].rstrip("\n")


def choose(name, texts, source):
    """Which file to copy from. texts: {file: what it has}."""
    if source is not None:
        return source
    different = [file for file, text in texts.items() if list(texts.values()).count(text) == 1]
    if len(set(texts.values())) > 1 and (len(different) != 1 or len(set(texts.values())) > 2):
        fail(f"{name}: not clear which file was changed; allowed: --from {', --from '.join(texts)}")
    return (different or [*texts])[0]


def share(root, name, source=None):
    """Make a definition the same text in all files of its group. -> paths that were changed."""
    paths = {path.stem: path for path in sorted([*root.glob("*.py"), *root.glob("applications/*.py")])}
    groups = table().get(name)
    if name == "plumbing":
        groups = [[stem for stem, path in paths.items() if BANNER.search(path.read_text(encoding="utf-8"))]]
    if groups is None:
        fail(f"{name}: not shared; allowed: plumbing, {', '.join(sorted(table()))}")
    groups = [[file.rpartition("/")[2] for file in files] for files in groups]  # without a folder
    fits = [files for files in groups if source in (None, *files)]
    if len(fits) != 1:  # files that have nothing to do with it, or two groups of files that each share their own
        fail(f"{name}: name the file it comes from; allowed: --from {', --from '.join(sum(groups, []))}")
    texts = {file: text_of(name, paths[file]) for file in fits[0]}
    if None in texts.values():
        missing = ", ".join(file for file, text in texts.items() if text is None)
        fail(f"{name}: not in {missing}; allowed: a definition that stands in all of its files, whatever its text")
    text = texts[choose(name, texts, source)]
    changed = [paths[file] for file in texts if texts[file] != text]
    for path in changed:
        code = path.read_text(encoding="utf-8")
        path.write_text(code.replace(f"\n{texts[path.stem]}\n", f"\n{text}\n", 1), encoding="utf-8")
    return changed


def main(root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the definition, or plumbing")
    parser.add_argument("--from", dest="source", metavar="FILE", help="without .py: the file that has the new text")
    args = parser.parse_args()
    changed = share(root, args.name, args.source)
    print("\n".join(f"{path.name}: {args.name} changed" for path in changed) or f"{args.name}: the same everywhere")


if __name__ == "__main__":
    main()
