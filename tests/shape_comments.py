# SPDX-License-Identifier: MIT
"""Holds trailing shape comments, `x = f(y)  # (B, T, D)`, against the shapes seen while the code really runs.

check(path, fn, known) -> (errors, lines checked, lines never reached). A dimension is a sum, product or quotient such
as 3*U, T-1 or D/G. Symbols are unified within a call: an upper-case int among the local variables binds its name, and
so does the first comment that leaves only one symbol open. known: symbols with the same value in every call.
"""

import ast
import io
import re
import sys
import tokenize

SHAPE = re.compile(r"#\s*\(((?:[A-Z\d][\w*/+-]*(?:, ?)?)+)\)\s*(?:$|[;:,.-])")


def annotations(path):
    """-> ({(first line, last line): (names, [dims])} of commented assignments, lines whose comment has no name)."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = SHAPE.match(token.string) if token.type == tokenize.COMMENT else None
        if match and token.line[: token.start[1]].strip():  # not on a line of its own
            comments[token.start[0]] = [dim.strip() for dim in match[1].split(",") if dim.strip()]
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AugAssign) and node.end_lineno in comments:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in getattr(target, "elts", [target])]
            if all(isinstance(name, ast.Name) for name in names):
                found[node.lineno, node.end_lineno] = [name.id for name in names], comments.pop(node.end_lineno)
    return found, sorted(comments)


def mismatch(dims, shape, bound):
    """None, or what is wrong. A symbol that alone is open in its dimension is solved for, and bound."""
    if len(dims) != len(shape):
        return f"rank {len(shape)}, comment says {len(dims)}"
    for dim, size in zip(dims, shape, strict=True):
        names = {node.id for node in ast.walk(ast.parse(dim)) if isinstance(node, ast.Name)}
        unknown = names - bound.keys()
        if len(unknown) > 1:
            continue
        at = lambda x, dim=dim, unknown=unknown: eval(dim, {}, {**bound, **dict.fromkeys(unknown, x)})
        if unknown and at(1) != at(0) and (size - at(0)) % (at(1) - at(0)) == 0:  # linear in its only open symbol
            bound[unknown.pop()] = (size - at(0)) // (at(1) - at(0))
        elif unknown or at(0) != size:
            return f"{dim} with { ({name: bound.get(name) for name in sorted(names)}) }, but the axis has {size}"
    return None


def check(path, fn, known=None):
    """Run fn() and compare every commented assignment of the file at path, each time it is executed."""
    wanted, nameless = annotations(path)
    errors, checked = {f"{path}:{line}: a shape comment that belongs to no plain name" for line in nameless}, set()
    at_line = {line: span for span in wanted for line in range(span[0], span[1] + 1)}

    def compare(span, values, bound):
        names, dims = wanted[span]
        bound.update({name: x for name, x in values.items() if name.isupper() and type(x) is int})
        for name in names:
            if hasattr(values.get(name), "shape"):
                checked.add(span[0])
                error = mismatch(dims, tuple(values[name].shape), bound)
                if error:
                    errors.add(f"{path}:{span[0]}: {name}: {error}")

    def on_call(frame, event, arg):
        if frame.f_code.co_filename != path:
            return None
        bound, last = dict(known or {}), None

        def on_line(frame, event, arg):
            nonlocal last
            here = at_line.get(frame.f_lineno) if event == "line" else None
            if last and here != last and event in ("line", "return"):  # that statement is over
                compare(last, frame.f_locals, bound)
            last = here if event == "line" else last
            return on_line

        return on_line

    sys.settrace(on_call)
    try:
        fn()
    finally:
        sys.settrace(None)
    return sorted(errors), checked, {first for first, _ in wanted} - checked
