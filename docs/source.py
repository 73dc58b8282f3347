# SPDX-License-Identifier: MIT
"""A Python file cut into rows, of which each has prose, docstring and comments, and code in colours."""

import ast
import inspect
import itertools
import re
from dataclasses import dataclass

from prose import CITE, cite
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

BANNER = re.compile(r"# (===|---) (.*?) [=-]+$")


def definitions(node, prefix=""):
    """-> (qualified name, statement): functions and classes at any depth, constants, and fields of classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield prefix + child.name, child
            yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Module | ast.ClassDef):
            for target in getattr(child, "targets", None) or [child.target]:
                yield from ((prefix + x.id, child) for x in ast.walk(target) if isinstance(x, ast.Name))
        elif isinstance(child, ast.stmt):
            yield from definitions(child, prefix)


@dataclass
class Row:
    """Lines start to end of a file: a definition, a banner, imports, or what stands before and behind them all."""

    name: str | None  # of the definition, such as RSSM.step
    label: str  # its name, or what the lines are
    part: int  # of the file; 0: what stands before Part 1
    start: int
    end: int
    text: str = ""  # the whole definition, a class with its methods
    docs: str = ""  # comments above, and the docstring: what goes to the left
    left: tuple = ()  # lines of it, and the blank ones at the end
    level: int = 0  # of a banner: 2 or 3

    @property
    def anchor(self):
        return self.name or re.sub(r"\W+", "-", self.label.partition(":")[0].lower())


class File:
    """A file cut into rows, with its names, and its code in colours."""

    def __init__(self, path):
        self.stem, source = path.stem, path.read_text("utf-8")
        self.html = highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).split("\n")
        self.lines, tree = source.splitlines(), ast.parse(source)
        self.about, self.names, self.rows = ast.get_docstring(tree), {}, []
        for name, node in definitions(tree):
            self.names.setdefault(name, node)
        named = {node: name for name, node in reversed(self.names.items())}  # of several names the first
        inner = [x for node in tree.body if isinstance(node, ast.ClassDef) for x in node.body]
        imports = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        starts = {n: None for n, line in enumerate(self.lines) if BANNER.match(line)} | {0: tree.body[0]}
        for node in [*tree.body[1:], *(x for x in inner if isinstance(x, ast.FunctionDef))]:
            if node in named or node is imports or isinstance(node, ast.If):  # others go with what stands before them
                start = min(x.lineno for x in [node, *getattr(node, "decorator_list", [])]) - 1
                while re.match(r" *# (?!fmt:|===|---)", self.lines[start - 1]):
                    start -= 1
                starts[start] = node
        for start, end in itertools.pairwise([*sorted(starts), len(self.lines)]):
            self.rows.append(self.row(starts[start], named.get(starts[start]), start, end))
        self.texts = {row.name: row.text for row in self.rows if row.name}

    def row(self, node, name, start, end):
        """The row of a statement, or of a banner where there is none."""
        last = max(n for n in range(start, end) if self.lines[n]) + 1
        part, blank = self.rows[-1].part if self.rows else 0, range(last, end)
        if node is None:
            rule, label = BANNER.match(self.lines[start]).groups()
            return Row(None, label, part + (rule == "==="), start, end, left=(start, *blank), level=2 + (rule == "---"))
        above = [n for n in range(start, node.lineno - 1) if re.match(" *# ", self.lines[n])] if start else []
        docs, left = "\n".join(self.lines[n].lstrip()[2:] for n in above), [*above, *blank]
        match getattr(node, "body", [node])[0]:
            case ast.Expr(ast.Constant(str(text))) as string:
                docs += "\n\n" + inspect.cleandoc(text)
                left += range(string.lineno - 1, string.end_lineno)
        label = name or {ast.Expr: "docstring", ast.If: "start"}.get(type(node), "imports")
        return Row(name, label, part, start, end, "\n".join(self.lines[start : node.end_lineno]), docs, tuple(left))

    def source(self, row):
        return "\n".join(self.lines[row.start : row.end])

    def code(self, lines, left=None):
        """HTML of some lines. left: those whose text stands on the left, which are marked; None: without anchors."""
        anchors, out = {}, ""
        for name, node in self.names.items() if left is not None else ():  # the rest are the anchors of rows
            anchor = f'<span id="{name}"></span>' * (name not in self.texts)
            anchors[node.lineno - 1] = anchors.get(node.lineno - 1, "") + anchor
        for n in lines:
            line = anchors.get(n, "") + CITE.sub(lambda match: cite(match, f"{self.stem}.html")[1], self.html[n])
            out += f'<span class="l{" left" * (n in (left or ()))}">{line}\n</span>'
        return f"<pre><code>{out}</code></pre>"
