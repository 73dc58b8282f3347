# SPDX-License-Identifier: MIT
"""Docstrings -> HTML: paragraphs and lists, shapes and names in monospace, citations with links, formulas as MathML.

A formula stands in a docstring as plain text: known names, x_t, x_{t+1}, x^2, x', |x|, sg(x), KL(p || q), <-, ~; a
product is two terms with a space between. The longest run of these with its brackets closed is one if it has a sign
that words do not have. A run that goes on with what is not known stays text, in monospace: it may mean something else.
"""

import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown_it import MarkdownIt

CITE = re.compile(r"(?:([\w-]+),? \(?)?\b([Ee]q)\. (\d+(?:(?:, | to | and )\d+)*)")  # eq.: of the paper named before it
SHAPE = r"(?<![\w)])\((?:[A-Z]|(?=[^()]*(?:,|\.\.\.))[A-Zhnw\d*+/,. -]+)\)"
VERBATIM = re.compile(rf"{CITE.pattern}|{SHAPE}|--[a-z][\w-]*|\b\w+\[[^\]\n]*\]|(?<![_^]){{[^{{}}]*}}")
WORD = re.compile(r"\*[\w-]+\*|\b[A-Za-z]\w*(?:\.\w+)*")

GREEK = dict(lam="λ", eta="η", rho="ρ", gamma="γ", beta="β", tau="τ", mu="μ", theta="θ", pi="π", sigma="σ", eps="ε")
FUNCTION = "(?:ln|exp|sqrt|sign|softmax|sigmoid|softplus|tanh|floor|min|max|grad|sum|KL|CE|sg|Exp|symlog|symexp|twohot"
FUNCTION += "|one-hot|arg-max|arg-min)"
FACTOR = "agc|all|balance|bits|clip|decay|disc|logits|lr|mix|scale|slope|slow|std|warmup"
NOUN = "bins|fake|guidance|mean|noise|obs|outscale|post|prior|real|temperature|u8|Gumbel"  # no factor of a product
NAME = rf"(?:[A-Za-z]|(?:beta|mean|std)\d|{'|'.join(GREEK)}|{FACTOR}|{NOUN}|(?<=_)[A-Za-z]{{2,3}})(?![A-Za-z\d])"
NUMBER = r"(?:\d+(?:,\d{3})+|\d+(?:\.\d+)?(?:e-?\d+)?)(?![A-Za-z_\d])"
ENGLISH = r"(?:a|A|I)(?![\w^'(])"  # words, unless something hangs on them
JOINTS = (  # what may stand between two terms
    r"\s?(?:<-|[<>]=?|[=~])\s?",
    r"\s(?:[-+*/.]|\|\||x(?=\s(?:[A-Z]\b|\d)))\s|[+*/]|(?<!\d)-",  # spaces on both sides or on none
    r"[_^](?=[({]|-?(?:\d|bits|[A-Za-z]\b))|(?<=\b[A-Za-z])_(?=[A-Za-z]{2,3}\b)",  # short, unlike the names of code
    r"(?<=[A-Za-z])(?=\()",  # a function and its arguments
    rf"(?<!{NOUN.replace('|', ')(?<!')}) (?![-+\d]|{ENGLISH}|(?:{NOUN})\b|\([A-Z],)",  # two factors
)
JOINT = f"(?:{'|'.join(JOINTS)})"
term = lambda inside: (
    rf"-?(?:{FUNCTION}\s)*(?:{NUMBER}|{FUNCTION}(?=[(_^])|{NAME}(?:'(?![A-Za-z]))*|[(\[{{]{inside}[)\]}}]|\|{inside}\|)"
)
INSIDE, CLAUSE = "(?!)", r"[^()\[\]{}]"
for _ in range(4):  # brackets within brackets, as deep as formulas are
    INSIDE = rf"(?:(?:(?<=[(\[{{|])|(?<![(\[{{])(?:[,;|]\s?|{JOINT})){term(INSIDE)})+"
    CLAUSE = rf"(?:[^()\[\]{{}}]|[(\[{{]{CLAUSE}*[)\]}}])"
FORMULA = re.compile(rf"(?<![\w'\"`.)\]-])(?!{ENGLISH}){term(INSIDE)}(?:{JOINT}{term(INSIDE)})*")
CLAUSE = re.compile(rf"(?:(?![,;:.](?:\s|$)|\s\s|\n){CLAUSE})*")
SIGN = re.compile(r"\w\(|[_^'+*/=~<>]|\|\||(?<!one)(?<!arg)(?<!\de)-| \. | x (?=[A-Z\d])")
GOES_ON = re.compile(rf"[\w(\[{{'\"`^]|\s?(?:[+*/=~<>]|-(?!>)|\|\|)|\s{FUNCTION}\b")
SIGNS = {"<-": "←", r"\|\|": "∥", "<=": "≤", ">=": "≥", "~": "∼", r"\*| \. ": "·", r" x (?=[A-Z\d])": "×"}
LATEX = (  # (plain text, LaTeX), one after the other
    (rf"(?<![\w)\]}}'|])\|({INSIDE})\|", r"{|\1|}"),  # not the bar of p(a|b)
    (rf"\bsqrt\(({INSIDE})\)", r"\\sqrt{\1}"),
    (rf"([_^])\(({INSIDE})\)", r"\1{\2}"),
    *SIGNS.items(),
    (r"\b(beta|mean|std)(\d)", r"\1_\2"),
    (r"([_^])(-?[A-Za-z\d]+)", r"\1{\2}"),
    (rf"\b({'|'.join(GREEK)})(?![A-Za-z])", lambda match: GREEK[match[1]]),
    (rf"\b({FUNCTION}) (?=[\w(|])", r"\1\\,"),
    (r"(?<=[\w)\]}']) (?=[\w(\[{\\])", r"\\hspace{0em}\\,"),  # a product
    (r" (?=[-+=←∼<>≤≥] )", r"\\hspace{0em}"),  # a line may end before a sign
    (r"(?<![\\\w.])(u8|[a-z]+-(?:hot|max|min)|[A-Za-z]{2,}|[\d.]+e-?\d+|\d+(?:,\d{3})+)(?![A-Za-z\d])", r"\\text{\1}"),
)


def mathml(latex):
    """LaTeX -> MathML, cut where a space of no width, outside of scripts and roots, lets a line end."""
    row = ElementTree.fromstring(re.sub(' xmlns="[^"]*"', "", convert(latex.replace(r"\ln ", r"\ln\,"))))[0]
    for sign in row.iter("mi"):  # the library takes a sign that it does not know for a name
        if not sign.text.isalnum() and sign.text != "…":
            sign.tag, sign.text = "mo", sign.text.replace("~", "∼")
    parts = (ElementTree.tostring(part, "unicode") for part in row)
    maths = "".join("</math><wbr><math>" if part == '<mspace width="0em" />' else part for part in parts)
    return "<math>{}</math>".format(maths.replace("<wbr><math><mo>", '<wbr><math><mo form="infix">'))


def typeset(plain):
    """A formula -> HTML. Nothing is put in another order and nothing is left out; the text is its title."""
    latex = plain
    for old, new in LATEX:
        latex = re.sub(old, new, latex)
    return f'<span class="formula" title="{html.escape(plain)}">{mathml(latex)}</span>'


def find(text):
    """-> [(start, end, HTML)] of the formulas in a text; what is not certain to be one, up to the end of its clause."""
    found, end = [], 0
    while match := FORMULA.search(text, end):
        start, end = match.span()
        plain = " ".join(match[0].split())
        if text.startswith("(", end) or SIGN.search(plain.lstrip("-")) and re.search("[A-Za-z]", plain):
            goes_on = GOES_ON.match(text, end)
            end = max(end, CLAUSE.match(text, start).end()) if goes_on else end
            found.append((start, end, code(text[start:end]) if goes_on else typeset(plain)))
    return found


def cite(match, page=""):
    """A citation, such as Eq. 5 to 7 -> keys of its equations, such as eq-5 or (of a paper) eq-vq-vae-3; its HTML."""
    paper = f"eq-{match[1]}-".lower() if match[2] == "eq" else "eq-"
    numbers = [int(n) for n in re.findall(r"\d+", match[3])]
    numbers = range(numbers[0], numbers[1] + 1) if " to " in match[3] else numbers
    links = re.sub(r"\d+", lambda n: f'<a href="{page}#{paper}{n[0]}">{n[0]}</a>', match[3])
    return [f"{paper}{n}" for n in numbers], match[0].removesuffix(match[3]) + links


def code(text):
    short = ' class="short"' * (len(text) < 24)  # is not broken across lines
    return f"<code{short}>{html.escape(text, quote=False)}</code>"


def replaced(text, spans, rest):
    """Spans (start, end, HTML) of a text are put in place, rest is applied to what lies between them."""
    out, last = "", 0
    for start, end, new in spans:
        out, last = out + rest(text[last:start]) + new, end
    return out + rest(text[last:])


def inline(text, names):
    """Text without structure -> HTML. names: of the file, to which words are linked that can be nothing else."""

    def word(match):
        if match[0][0] == "*":
            return f"<em>{match[0][1:-1]}</em>"
        known = match[0] in names and not (match[0].isalpha() and match[0].islower())  # train, load: may be English
        shown = code(match[0]) if "_" in match[0] or known else match[0]
        return f'<a href="#{match[0]}">{shown}</a>' if known else shown

    words = lambda x: WORD.sub(word, html.escape(x, quote=False)).replace("-&gt;", "→")
    spans = [(m.start(), m.end(), cite(m)[1] if m[3] else code(m[0])) for m in VERBATIM.finditer(text)]
    return replaced(text, spans, lambda x: replaced(x, find(x), words))


def prose(text, names):
    """Docstring -> HTML. A line that is an assignment stands alone; other lines flow."""
    text = re.sub(r"(?m)^ *(\w+ <- .*)$", r"\n\1\n", text)
    return MARKDOWN.render(text, {"names": names})


MARKDOWN = MarkdownIt("zero").enable(["list", "code"])
MARKDOWN.add_render_rule("text", lambda self, tokens, i, options, env: inline(tokens[i].content, env["names"]))
