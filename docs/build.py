# SPDX-License-Identifier: MIT
"""Pages made from the files: python docs/build.py [FOLDER] writes docs/site/, to be opened as it is, without a server.

One page a file, prose on the left, code on the right; two files side by side where one grew out of the other; an index.
Nothing is written twice: prose is docstrings and comments, and what is shared is what is equal. Only equations.md is
beside them: the papers' numbered equations, typeset. Needs: pip install -r docs/requirements.txt
"""

import difflib
import itertools
import pathlib
import re
import sys

from prose import CITE, cite, inline, mathml, prose
from pygments.formatters import HtmlFormatter
from source import File

DOCS = pathlib.Path(__file__).resolve().parent
ORDER = "planet dreamerv2 dreamerv3 merlin ftw gumbel_softmax".split()  # what else there is: behind them
DIFFS = [("dreamerv2", "dreamerv3"), ("planet", "dreamerv2"), ("merlin", "ftw")]
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="stylesheet" href="style.css"></head>
<body><header><a href="index.html">cleandream</a> {links}</header><main><h1>{title}</h1>
{body}</main></body></html>
"""


def slug(label):
    return re.sub(r"\W+", "-", label.partition(":")[0].lower())


def elsewhere(row, file, files):
    """Notes on a name that other files have, too, and whether the definition (or its class) is the same in one."""
    same, other, (top, *_) = [], [], row.name.split(".")
    for x in files:
        if x is not file and row.name in x.texts:
            link = f'<a href="{x.stem}.html#{row.name}">{x.stem}</a>'
            (same if x.texts[row.name] == row.text else other).append(link)
    notes = [f"the same in {', '.join(same)}"] * bool(same) + [f"another in {', '.join(other)}"] * bool(other)
    return "; ".join(notes), any(x is not file and x.texts.get(top) == file.texts[top] for x in files)


def equations(file):
    """The equations that a file cites, each as the paper has it, where equations.md does, and with links to where."""
    known, out = re.search(rf"(?ms)^## {file.stem}$(.*?)(?=^## |\Z)", (DOCS / "equations.md").read_text("utf-8")), ""
    for match in re.finditer(r"(?m)^- (.*?): \$(.*)\$$", known[1] if known else ""):
        (key,), name = cite(CITE.search(match[1]))[0], match[1]
        places = ", ".join(f'<a href="#{x}">{x}</a>' for x in file.cites.get(key, {}))
        out += f'<li id="{key}"><b>{name}</b> {places}<div class="eq">{mathml(match[2])}</div></li>\n'
    return f'<section id="equations"><h2>Equations cited</h2><ul>{out}</ul></section>' if out else ""


def page(file, files):
    """A file: contents, equations, then row by row prose and code. What other files have word for word is folded."""
    contents, body = "", ""
    for row in file.rows:
        code, note, heading = file.code(range(row.start, row.end), row.left), "", ""
        anchor, kind = row.name or slug(row.label), "wide" if row.label == "docstring" else ""
        if row.level:
            kind = "banner"
            heading = f"<h{row.level}>{row.label}</h{row.level}>"
            contents += f'</p>\n<p><a href="#{anchor}"><b>{row.label}</b></a> '
        elif row.name:
            heading = f'<h4><a href="#{row.name}">{row.name}</a></h4>'
            note, shared = elsewhere(row, file, files)
            if shared:
                count = len(row.text.splitlines())
                count = f"{count} line{'s' * (count > 1)}"
                code = f"<details><summary>{row.name}: {count}, {note}</summary>{code}</details>"
            note = f'<p class="note">{note}</p>' * bool(note and not shared)
            if "." not in row.name or not row.name.endswith(("__init__", "forward")):
                shown = row.name if "." not in row.name else row.name[row.name.index(".") :]
                contents += f'<a href="#{row.name}">{shown}</a> '
        text = prose(row.docs, file.names)
        body += f'<section class="row {kind}" id="{anchor}">'
        body += f'<div class="prose">{heading}{text}{note}</div>{code}</section>\n'
    raw = '<label><input type="checkbox" id="raw"> docstrings in the code, too</label>'
    links = " ".join(f'<a href="#{slug(x.label)}">{x.label.partition(":")[0]}</a>' for x in file.rows if x.level == 2)
    links = f'<a href="#contents">Contents</a> {links} {raw}'
    body = f'<nav id="contents"><p>{contents}</p></nav>\n{equations(file)}{body}'
    return PAGE.format(title=f"{file.stem}.py", links=links, body=body)


def hunks(old, a, new, b, paired):
    """Rows of two files side by side, line by line if they are paired. Equal lines far from a change are folded."""
    left, right = (range(rows[0].start, rows[-1].end) if rows else range(0) for rows in (a, b))
    matcher = difflib.SequenceMatcher(None, [old.lines[n] for n in left], [new.lines[n] for n in right], False)
    out, side = "", lambda file, lines: file.code(lines) if lines else "<pre></pre>"
    for kind, i, j, k, m in matcher.get_opcodes() if paired else [("replace", 0, len(left), 0, len(right))]:
        for first, last in ((0, 3), (3, -3), (-3, None)) if kind == "equal" and j - i > 10 else ((0, None),):
            pair = side(old, left[i:j][first:last]), side(new, right[k:m][first:last])
            part = f'<div class="pair {kind}"><div class="old">{pair[0]}</div><div class="new">{pair[1]}</div></div>\n'
            out += f"<details><summary>{j - i - 6} equal lines</summary>{part}</details>" if last == -3 else part
    return out


def paired(old, a, new, b):
    """Rows of a part of two files, by their names -> ("same", "changed" or "unpaired", rows, rows)."""
    labels = [[slug(row.label) if row.level else row.label for row in rows] for rows in (a, b)]
    text = lambda file, row: file.lines[row.start : row.end]
    for kind, i, j, k, m in difflib.SequenceMatcher(None, *labels, False).get_opcodes():
        if kind != "equal":
            yield "unpaired", a[i:j], b[k:m]
            continue
        both = zip(a[i:j], b[k:m], strict=True)
        for same, run in itertools.groupby(both, lambda pair: text(old, pair[0]) == text(new, pair[1])):
            run = list(run)
            if same:
                yield "same", [x for x, _ in run], [y for _, y in run]
            else:
                yield from (("changed", [x], [y]) for x, y in run)


def diff(old, new):
    """What one file changed in another: Part 1 first, what stands before it last."""
    body, link = "", lambda file, row: f'<a href="{file.stem}.html#{row.name or slug(row.label)}">{row.label}</a>'
    for part in 1, 2, 3, 0:
        a, b = ([row for row in file.rows if row.part == part] for file in (old, new))
        body += f'<section data-part="{part}"><h2>{a[0].label if part else "What stands before Part 1"}</h2>\n'
        for how, x, y in paired(old, a, new, b):
            code = hunks(old, x, new, y, how != "unpaired")
            if how == "same":
                names = ", ".join(row.label for row in x if row.level != 2) or "this heading"
                body += f"<details><summary>The same: {names}</summary>{code}</details>\n"
            else:
                names = (", ".join(link(file, row) for row in rows) for file, rows in ((old, x), (new, y)))
                body += '<div class="pair"><h4>{}</h4><h4>{}</h4></div>\n'.format(*names) + code
        body += "</section>\n"
    links = " ".join(f'<a href="{x.stem}.html">{x.stem}.py</a>' for x in (old, new))
    return PAGE.format(title=f"{old.stem}.py → {new.stem}.py", links=links, body=body)


def build(site):
    """Write all pages into a folder. -> their paths."""
    paths = [*DOCS.parent.glob("*.py"), *DOCS.parent.glob("applications/*.py")]
    paths.sort(key=lambda path: (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem))
    files = {path.stem: File(path) for path in paths}
    pages = {f"{stem}.html": page(file, files.values()) for stem, file in files.items()}
    pages |= {f"{a}-{b}.html": diff(files[a], files[b]) for a, b in DIFFS}
    table = ""
    for stem, file in files.items():
        first = inline(file.about.partition("\n")[0], {})
        table += (
            f'<tr><td><a href="{stem}.html">{stem}.py</a></td><td>{first}</td><td>{len(file.lines):,} lines</td></tr>\n'
        )
    table = f"<p>Single files, each with its prose beside its code.</p><table>{table}</table>"
    table += "<h2>What one file changed in another</h2><ul>"
    table += "".join(f'<li><a href="{a}-{b}.html">{a}.py → {b}.py</a></li>' for a, b in DIFFS) + "</ul>"
    pages["index.html"] = PAGE.format(title="cleandream", links="", body=table)
    site.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (site / name).write_text(text, encoding="utf-8")
    colours = [HtmlFormatter(style=style).get_style_defs("code") for style in ("xcode", "github-dark")]
    colours = f"{colours[0]}\n@media screen and (prefers-color-scheme: dark) {{\n{colours[1]}\n}}\n"
    (site / "style.css").write_text(colours + (DOCS / "style.css").read_text("utf-8"), encoding="utf-8")
    return sorted(site.iterdir())


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "site"
    print(f"{len(build(folder))} files in {folder}")
