# SPDX-License-Identifier: MIT
"""The pages that docs/build.py makes: whole files, links that lead somewhere, formulas as they are in the files."""

import ast
import collections
import html.parser
import itertools
import re
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT
from test_shared import table

for library in "latex2mathml", "markdown_it", "pygments":
    pytest.importorskip(library, reason=f"{library} is missing: pip install -r docs/requirements.txt")
sys.path.append(str(ROOT / "docs"))
import build  # noqa: E402
import prose  # noqa: E402
import source  # noqa: E402

PATHS = {path.stem: path for path in [*ROOT.glob("*.py"), *ROOT.glob("applications/*.py")]}
file = pytest.mark.parametrize("stem", PATHS)


class Page(html.parser.HTMLParser):
    """What the tests read from a page. Text of lines of code is kept by column: "code", "old", "new"."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.formulas = [], [], []
        self.code = collections.defaultdict(str)  # {(part of a diff or None, column): text}
        self.folded = set()  # anchors of the sections that hold a fold
        self.external = re.findall(r"https?://(?!www\.w3\.org)|<script|<img|@import", text)
        self.text = ""
        self.open, self.part, self.section, self.column = [], None, None, "code"
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        kind = attributes.get("class", "").split()
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if kind == ["formula"]:
            self.formulas.append([attributes["title"], ""])  # the text that it was, and what is seen of it
        if tag == "section":
            self.section, self.part = attributes.get("id"), attributes.get("data-part")
        if tag == "details":
            self.folded.add(self.section)
        if tag == "div" and kind in (["old"], ["new"]):
            self.column = kind[0]
        if tag not in ("meta", "link", "wbr", "input", "mspace"):
            self.open.append((tag, kind))

    def handle_endtag(self, tag):
        assert tag in ("mspace",) or self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if ("span", ["formula"]) in self.open:
            self.formulas[-1][1] += data
        if any("l" in kind for _, kind in self.open):
            self.code[self.part, self.column] += data


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: page} of the whole site."""
    site = tmp_path_factory.mktemp("site") / "site"
    build.build(site)
    assert (site / "style.css").read_text(encoding="utf-8").count("{") > 50
    return {path.name: Page(path.read_text(encoding="utf-8")) for path in site.glob("*.html")}


@pytest.fixture(scope="module")
def files():
    """{stem: file}, as the pages are made of them."""
    return {stem: build.File(path) for stem, path in PATHS.items()}


def defined(tree):
    """Names of functions, classes and methods at any depth, of constants and of fields of classes, by another way."""
    found, scopes = [], [("", tree)]
    for prefix, scope in scopes:
        inner = list(scope.body)
        while inner:
            node = inner.pop()
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append(prefix + node.name)
                scopes.append((f"{prefix}{node.name}.", node))
            else:
                inner += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        for node in scope.body if not isinstance(scope, ast.FunctionDef) else ():
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = itertools.chain.from_iterable(getattr(target, "elts", [target]) for target in targets)
                found += [prefix + name.id for name in names if isinstance(name, ast.Name)]
    return found


def test_links(pages):
    """Every link leads to a page and an anchor of the site; nothing is fetched from elsewhere, and no script is run."""
    count = 0
    for name, page in pages.items():
        assert page.external == [] and len(page.ids) == len(set(page.ids)), name
        for link in set(page.links) - {"style.css"}:
            target, _, anchor = link.partition("#")
            assert (target or name) in pages, f"{name}: {link}"
            assert not anchor or anchor in pages[target or name].ids, f"{name}: {link}"
            count += 1
    assert count > 1000
    reached, new = set(), {"index.html"}
    while new := {link.partition("#")[0] for name in new for link in pages[name].links} & set(pages) - reached:
        reached |= new
    assert reached == set(pages)


@file
def test_code_is_complete(pages, stem):
    """The text of the code column is the file, to the last character."""
    assert pages[f"{stem}.html"].code[None, "code"] == PATHS[stem].read_text(encoding="utf-8")


@file
def test_anchors(pages, stem):
    """Each definition has an anchor of its name, once."""
    ids = collections.Counter(pages[f"{stem}.html"].ids)
    names = set(defined(ast.parse(PATHS[stem].read_text(encoding="utf-8"))))
    assert len(names) > 30 and {"Args", "Args.seed", "train", "SOURCE"} <= names
    assert {name: ids[name] for name in names if ids[name] != 1} == {}


def test_definitions():
    """Those of functions within statements, several names of one statement, but no variables of functions."""
    code = "A, B = 1, 2\nclass C:\n    d: int = 1\n    def e(self):\n        if d:\n            def f(): pass\n"
    code += "        g = 1\n"
    assert [name for name, _ in source.definitions(ast.parse(code))] == ["A", "B", "C", "C.d", "C.e", "C.e.f"]


def test_shared_definitions_are_folded(pages, files):
    """What test_shared.py lists is folded in each of the files; what else is folded has a copy in an application."""
    listed, copied = {stem: set() for stem in PATHS}, {stem: set() for stem in PATHS}
    for name, groups in table().items():
        for stem in itertools.chain.from_iterable(groups):
            listed[stem.rpartition("/")[2]].add(name)
    texts = {stem: file.texts for stem, file in files.items()}
    for one, other in itertools.permutations(PATHS, 2):
        if "applications" in (PATHS[one].parent.name, PATHS[other].parent.name):
            copied[one] |= {name for name, text in texts[one].items() if texts[other].get(name) == text}
    for stem in PATHS:
        folded = {anchor.partition(".")[0] for anchor in pages[f"{stem}.html"].folded}
        assert listed[stem] <= folded <= listed[stem] | copied[stem], stem


def test_plumbing_is_folded(pages, files):
    """All of Part 3, where its banner says that it is the same in three files."""
    for stem in "planet", "dreamerv2", "dreamerv3":
        ids = pages[f"{stem}.html"].ids
        names = [x for x in ids[ids.index("part-3") + 1 :] if x in files[stem].texts]
        assert len(names) > 20 and set(names) <= pages[f"{stem}.html"].folded


@pytest.mark.parametrize("old, new", build.DIFFS)
def test_diff(pages, old, new):
    """Part 1 comes first; the two columns, put back into the order of the files, are the files."""
    page = pages[f"{old}-{new}.html"]
    assert [part for part, column in page.code if column == "old"] == ["1", "2", "3", "0"]
    for column, stem in ("old", old), ("new", new):
        text = "".join(page.code[part, column] for part in "0123")
        assert text == PATHS[stem].read_text(encoding="utf-8")


@file
def test_equations(pages, stem):
    """Each equation that a file cites is listed once and typeset, and no other one is listed."""
    cited = set()
    for match in prose.CITE.finditer(PATHS[stem].read_text(encoding="utf-8")):
        cited |= set(prose.cite(match)[0])
    ids = [x for x in pages[f"{stem}.html"].ids if re.fullmatch(r"eq-.*\d", x)]
    assert sorted(ids) == sorted(cited)
    assert cited or stem not in ("planet", "dreamerv2", "dreamerv3")


def test_citations():
    """Ranges, lists, and papers that are named before."""
    keys = lambda text: [prose.cite(match)[0] for match in prose.CITE.finditer(text)]
    assert keys("Eq. 5 to 7 imagined") == [["eq-5", "eq-6", "eq-7"]] and keys("Eq. 2, 3 on rows") == [["eq-2", "eq-3"]]
    assert keys("max(1, S of Eq. 7): noise") == [["eq-7"]] and keys("VQ-VAE, eq. 3: the") == [["eq-vq-vae-3"]]
    assert prose.cite(prose.CITE.search("Eq. 9: sign"))[1] == 'Eq. <a href="#eq-9">9</a>'


def signs(text):
    """A formula without brackets, spaces and what raises or lowers, and with one form of each sign."""
    text = re.sub(r"(?<=[A-Z0-9]) x (?=[A-Z0-9])", "×", text)
    text = re.sub(r"\b({})(?=\b|_|\d)".format("|".join(prose.GREEK)), lambda match: prose.GREEK[match[1]], text)
    for plain, sign in (
        ("<-", "←"),
        ("||", "∥"),
        ("+-", "±"),
        ("-", "−"),
        ("*", "·"),
        (" . ", "·"),
        ("'", "′"),
        ("~", "∼"),
    ):
        text = text.replace(plain, sign)
    return re.sub(r"sqrt|[()\[\]{}_^\s]", "", text)


@file
def test_formulas(pages, stem):
    """What is typeset stands in the file, in these words; of it nothing is left out, and nothing moved."""
    text = " ".join(re.sub(r"(?m)^ *(# )?", "", PATHS[stem].read_text(encoding="utf-8")).split())
    formulas = pages[f"{stem}.html"].formulas
    assert len(formulas) > 5
    for plain, seen in formulas:
        assert " ".join(plain.split()) in text and signs(plain) == signs(seen)


@pytest.mark.parametrize(
    "text, typeset",
    [
        ("Eq: symlog, sign(x) ln(1 + |x|), a logarithm", ["sign(x) ln(1+|x|)"]),
        ("R_t = r_{t+1} + disc_{t+1} ((1 - lam) v_{t+1}), with", ["R_t=r_{t+1}+disc_{t+1} ((1−λ) v_{t+1})"]),
        ("-w_t (ln pi(a_t|s_t) sg(R_t - v_t)). All (N, H)", ["−w_t (ln π(a_t|s_t) sg(R_t−v_t))"]),
        ("balance KL(sg(post) || prior), the mean", ["balance KL(sg(post)∥prior)"]),
        ("v <- beta2 v + (1 - beta2^t) g^2,  u = g", ["v←β_2 v+(1−β_2^t) g^2", "u=g"]),
        ("p - lr sqrt(1 - 0.9^t) / (sqrt(v) + eps)", ["p−lr √(1−0.9^t)/(√(v)+ε)"]),
        ("floor(u8 / 2^(8 - bits)) + U(0, 2^-bits), x * 1e-4", ["floor(u8/2^{8−bits})+U(0,2^{−bits})", "x·1e-4"]),
        ("S x K = 20 x 10 classes, h' of a step", ["S×K=20×10", "h^′"]),
        ("a of t-1), noise ~ Exp(1), drawn", ["t−1", "noise∼Exp(1)"]),
        ("the mean of T steps, a scale, 4 x (5x5, norm), 784-200-784, arXiv 1811.04551, 0-d and one-hot", []),
        ("Adam, 1e-3, -m, and then exp (>= 0.5) or one-hot z; x's minimum, A - B, I (x) and so on (a) (B) e-mail", []),
        ("h_t = f(h, a of t-1), then max(0, KL(p) - free)  y", ["`h_t = f(h, a of t-1)`", "`max(0, KL(p) - free)`"]),
        ("and (f(sample(x)) of y), x_t + the rest", ["`f(sample(x)) of y`", "`x_t + the rest`"]),
        ("f = x^2(y + 1), so b = x_first; p = n  x_t", ["`f = x^2(y + 1)`", "`b = x_first`", "p=n", "x_t"]),
        ("g / max(1, |g| / (agc max(1e-3, |p|))) (see x_{t_0})", ["g/max(1,|g|/(agc max(1e-3,|p|)))", "x_{t_0}"]),
        ("posterior z_t ~ q(h_t), prior z_t ~ p(h_t), Exp(1) noise", ["z_t∼q(h_t)", "z_t∼p(h_t)", "Exp(1)"]),
        ("p + free_nats, x_t (B, 2) is_first T_max", ["x_t", "T_{max}"]),
        ("v_t = V_t + rho_t (r_{t+1} +\ng_{t+1} V_{t+1})\nh_t", ["v_t=V_t+ρ_t (r_{t+1}+g_{t+1} V_{t+1})", "h_t"]),
    ],
)
def test_conversion(text, typeset):
    """Signs keep their order; what is no formula is left alone, what may be one but does not parse is not typeset."""

    def plain(part):
        base, *scripts = inner = [plain(x) for x in part] or [part.text or ""]
        if signs := {"msub": "_", "msup": "^", "msubsup": "_^"}.get(part.tag):
            scripts = [f"{{{x}}}" if len(x) > 1 else x for x in scripts]
            return base + "".join(sign + x for sign, x in zip(signs, scripts, strict=True))
        forms = {"msqrt": f"√({''.join(inner)})", "mspace": " " * (part.get("width") != "0em"), "code": f"`{base}`"}
        return forms.get(part.tag, "".join(inner))

    parts = [ElementTree.fromstring(found.replace("<wbr>", "")) for _, _, found in prose.find(text)]
    assert [plain(part) for part in parts] == typeset


def test_mathml():
    """What the library does not do: signs are no names, and ln stands off from what follows."""
    maths = prose.mathml(r"z \sim x_{\le t} \ln p")
    assert "<mo>∼</mo>" in maths and "<mo>≤</mo>" in maths and "<mi>ln</mi><mspace" in maths
    assert prose.mathml(r"a\hspace{0em} - b").count('<wbr><math><mo form="infix">') == 1


def test_index(pages, files):
    """Every file is in the table, in its first line's words."""
    rows = [link for link in pages["index.html"].links if link.endswith(".html")]
    assert {f"{stem}.html" for stem in PATHS} <= set(rows)
    assert {f"{old}-{new}.html" for old, new in build.DIFFS} <= set(rows)
    for stem in PATHS:
        about = files[stem].about.partition("\n")[0]
        assert " ".join(about.split()[:5]) in pages["index.html"].text
