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
opcodes = lambda old, new: difflib.SequenceMatcher(None, old, new, False).get_opcodes()
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="stylesheet" href="style.css"></head>
<body><header><a href="index.html">cleandream</a> {links}</header><main><h1>{title}</h1>
{body}</main></body></html>
"""


def elsewhere(row, file, files):
    """A note on where else a name is, and whether its definition, or that of its class, is the same in another file."""
    same, other, (top, *_) = [], [], row.name.split(".")
    for x in files:
        if x is not file and row.name in x.texts:
            link = f'<a href="{x.stem}.html#{row.name}">{x.stem}</a>'
            (same if x.texts[row.name] == row.text else other).append(link)
    notes = (f"{how} in {', '.join(links)}" for how, links in (("the same", same), ("another", other)) if links)
    return "; ".join(notes), any(x is not file and x.texts.get(top) == file.texts[top] for x in files)


def equations(file):
    """The equations that a file cites, each as the paper has it, where equations.md does, and with links to where."""
    known, out = re.search(rf"(?ms)^## {file.stem}$(.*?)(?=^## |\Z)", (DOCS / "equations.md").read_text("utf-8")), ""
    cites = lambda row: [key for match in CITE.finditer(file.source(row)) for key in cite(match)[0]]
    for name, latex in re.findall(r"(?m)^- (.*?): \$(.*)\$$", known[1] if known else ""):
        (key,) = cite(CITE.search(name))[0]
        places = ", ".join(f'<a href="#{row.anchor}">{row.label}</a>' for row in file.rows if key in cites(row))
        out += f'<li id="{key}"><b>{name}</b> {places}<div class="eq">{mathml(latex)}</div></li>\n'
    return f'<section id="equations"><h2>Equations cited</h2><ul>{out}</ul></section>' if out else ""


def page(file, files):
    """A file: contents, equations, then row by row prose and code. What other files have word for word is folded."""
    contents, body, parts = "", "", ""
    for row in file.rows:
        code, note, heading = file.code(range(row.start, row.end), row.left), "", ""
        kind = "banner" if row.level else "wide" if row.label == "docstring" else ""
        if row.level:
            heading = f"<h{row.level}>{row.label}</h{row.level}>"
            contents += f'</p>\n<p><a href="#{row.anchor}"><b>{row.label}</b></a> '
            parts += f'<a href="#{row.anchor}">{row.label.partition(":")[0]}</a> ' * (row.level == 2)
        elif row.name:
            heading, (note, shared) = f'<h4><a href="#{row.name}">{row.name}</a></h4>', elsewhere(row, file, files)
            if shared:
                count = len(row.text.splitlines())
                summary = f"{row.name}: {count} line{'s' * (count > 1)}, {note}"
                code = f"<details><summary>{summary}</summary>{code}</details>"
            note = f'<p class="note">{note}</p>' * bool(note and not shared)
            top, dot, rest = row.name.partition(".")
            if rest not in ("__init__", "forward"):
                contents += f'<a href="#{row.name}">{dot + rest or top}</a> '
        text = f'<div class="prose">{heading}{prose(row.docs, file.names)}{note}</div>'
        body += f'<section class="row {kind}" id="{row.anchor}">{text}{code}</section>\n'
    raw = '<label><input type="checkbox" id="raw"> docstrings in the code, too</label>'
    body = f'<nav id="contents"><p>{contents}</p></nav>\n{equations(file)}{body}'
    return PAGE.format(title=f"{file.stem}.py", links=f'<a href="#contents">Contents</a> {parts}{raw}', body=body)


def paired(old, a, new, b):
    """Rows of a part of two files -> ("same", "changed" or "unpaired", rows, rows): by their names, in their order."""
    changed = lambda pair: old.source(pair[0]) != new.source(pair[1]) and pair[0].anchor  # each of these by itself
    for kind, i, j, k, m in opcodes([row.anchor for row in a], [row.anchor for row in b]):
        if kind != "equal":
            yield "unpaired", a[i:j], b[k:m]
            continue
        for change, run in itertools.groupby(zip(a[i:j], b[k:m], strict=True), changed):
            yield "changed" if change else "same", *zip(*run, strict=True)


def hunks(old, a, new, b, how):
    """Rows of two files side by side, line by line if they are paired. Equal lines far from a change are folded."""
    left, right = (range(rows[0].start, rows[-1].end) if rows else range(0) for rows in (a, b))
    codes = opcodes([old.lines[n] for n in left], [new.lines[n] for n in right])
    out, side = "", lambda file, lines: file.code(lines) if lines else "<pre></pre>"
    for kind, i, j, k, m in [("replace", 0, len(left), 0, len(right))] if how == "unpaired" else codes:
        for first, last in ((0, 3), (3, -3), (-3, None)) if kind == "equal" and j - i > 10 else ((0, None),):
            x, y = side(old, left[i:j][first:last]), side(new, right[k:m][first:last])
            pair = f'<div class="pair {kind}"><div class="old">{x}</div><div class="new">{y}</div></div>\n'
            out += f"<details><summary>{j - i - 6} equal lines</summary>{pair}</details>" if last == -3 else pair
    return out


def diff(old, new):
    """What one file changed in another: Part 1 first, what stands before it last."""
    body, link = "", lambda file, row: f'<a href="{file.stem}.html#{row.anchor}">{row.label}</a>'
    for part in 1, 2, 3, 0:
        a, b = ([row for row in file.rows if row.part == part] for file in (old, new))
        body += f'<section data-part="{part}"><h2>{a[0].label if part else "What stands before Part 1"}</h2>\n'
        for how, x, y in paired(old, a, new, b):
            code = hunks(old, x, new, y, how)
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
    paths.sort(key=lambda path: ([*ORDER, path.stem].index(path.stem), path.stem))
    files = {path.stem: File(path) for path in paths}
    pages = {f"{stem}.html": page(file, files.values()) for stem, file in files.items()}
    pages |= {f"{a}-{b}.html": diff(files[a], files[b]) for a, b in DIFFS}
    body = "<p>Single files, each with its prose beside its code.</p><table>"
    for stem, file in files.items():
        first, count = inline(file.about.partition("\n")[0], {}), f"{len(file.lines):,} lines"
        body += f'<tr><td><a href="{stem}.html">{stem}.py</a></td><td>{first}</td><td>{count}</td></tr>\n'
    body += "</table><h2>What one file changed in another</h2><ul>"
    body += "".join(f'<li><a href="{a}-{b}.html">{a}.py → {b}.py</a></li>' for a, b in DIFFS) + "</ul>"
    pages["index.html"] = PAGE.format(title="cleandream", links="", body=body)
    light, dark = (HtmlFormatter(style=style).get_style_defs("code") for style in ("xcode", "github-dark"))
    colours = f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    pages["style.css"] = colours + (DOCS / "style.css").read_text("utf-8")
    site.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (site / name).write_text(text, encoding="utf-8")
    return sorted(site.iterdir())


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "site"
    print(f"{len(build(folder))} files in {folder}")
