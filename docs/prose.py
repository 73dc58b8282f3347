# SPDX-License-Identifier: MIT
"""Docstrings -> HTML: paragraphs and lists, shapes and names in monospace, citations with links, formulas as MathML.

A formula stands in a docstring as plain text. It is typeset where the text is certain to be one, else left as it is, in
monospace. The grammar is what the docstrings keep to: known names, x_t, x_{t+1}, x^2, x', |x|, sg(x), KL(p || q), <-,
~; a product is two factors with a space between. Nothing is put in another order and nothing is left out; the text is
the title of what is typeset. A formula that would go on where the grammar ends is not typeset.
"""

import html
import re

from markdown_it import MarkdownIt

CITE = re.compile(r"(?:([\w-]+),? \(?)?\b([Ee]q)\. (\d+(?:(?:, | to | and )\d+)*)")  # eq.: of the paper named before it
SHAPE = r"(?<![\w)])\((?:[A-Z]|(?=[^()]*(?:,|\.\.\.))[A-Zhnw\d*+/,. -]+)\)"
VERBATIM = re.compile(rf"{CITE.pattern}|{SHAPE}|--[a-z][\w-]*|\b\w+\[[^\]\n]*\]|(?<![_^]){{[^{{}}]*}}")
WORD = re.compile(r"\*[\w-]+\*|\b[A-Za-z]\w*(?:\.\w+)*")
GREEK = dict(lam="λ", eta="η", rho="ρ", gamma="γ", beta="β", tau="τ", mu="μ", theta="θ", pi="π", sigma="σ", eps="ε")
FUNCTIONS = "ln exp sqrt sign softmax sigmoid softplus tanh floor min max grad sum KL CE sg Exp".split()
FUNCTIONS += "symlog symexp twohot one-hot arg-max arg-min".split()
FACTORS = "agc all balance bits clip decay disc lr mix scale slope slow std warmup".split()  # words that multiply
WORDS = "bins fake guidance logits mean noise obs outscale post prior real temperature u8 Gumbel".split() + FACTORS
OPERATORS = {"+": "+", "-": "−", "*": "·", "/": "/", "||": "∥", ".": "·", "x": "×"}
SIGNS = {"-": "−", "+-": "±"}
RELATIONS = {"=": "=", "<-": "←", "~": "∼", ">": "&gt;", "<": "&lt;", "<=": "≤", ">=": "≥"}
CLOSING = {"(": ")", "[": "]", "{": "}"}
NUMBER = r"\d+(?:,\d{3})+|\d+(?:\.\d+)?(?:e-?\d+)?"
TOKEN = re.compile(rf"\s+|(?:arg-max|arg-min|one-hot)\b|[A-Za-z]+\d*|{NUMBER}|<-|->|<=|>=|\|\||\+-|.")
NAME = re.compile(r"[A-Za-z]|(?:beta|mean|std)\d|" + "|".join([*GREEK, *WORDS, *FUNCTIONS]))
SPACE = '<mspace width="0.2em"/>'
BREAK = "\0"  # where a line may end: before an operator or a factor outside of scripts and roots


class Parser:
    """Recursive descent. Each method takes the place of a token, and returns (MathML, the place behind it) or None."""

    def __init__(self, tokens):
        self.tokens, self.signs = tokens, 0  # signs: how many signs were seen that words do not have

    def at(self, i):
        return self.tokens[i] if 0 <= i < len(self.tokens) else ""

    def skip(self, i):
        """The place behind a space, if there is one."""
        return i + self.at(i).isspace()

    def relation(self, i):
        """a = b, a <- b, a ~ b, as long as there is a right-hand side."""
        result = self.expression(i)
        while result and self.at(j := self.skip(result[1])) in RELATIONS:
            right = self.expression(self.skip(j + 1))
            if not right:
                break
            self.signs += 1
            result = f'{result[0]}{BREAK}<mo form="infix">{RELATIONS[self.at(j)]}</mo>{right[0]}', right[1]
        return result

    def expression(self, i):
        """Factors with operators or one space between them; a sign in front."""
        sign = f"<mo>{SIGNS[self.at(i)]}</mo>" if self.at(i) in SIGNS else ""
        result = self.factor(i + bool(sign))
        if not result:
            return None
        out, i = sign + result[0], result[1]
        while True:
            last, j = self.at(i - 1), self.skip(i)
            operator, behind = self.at(j), self.skip(j + 1)
            fits = operator in OPERATORS and (behind > j + 1) == (j > i)  # spaces on both sides or on none
            fits &= j > i or operator in "+*/" or operator == "-" and not re.match(NUMBER, last)
            fits &= operator != "x" or re.fullmatch(rf"[A-Z]|{NUMBER}", self.at(behind)) is not None
            if fits and (right := self.factor(behind)):
                out += BREAK * (operator in "+-") + f'<mo form="infix">{OPERATORS[operator]}</mo>{right[0]}'
                i, self.signs = right[1], self.signs + 1
            elif self.at(i) == " " and self.multiplies(last, j) and (right := self.factor(j)):
                out, i = out + BREAK + SPACE + right[0], right[1]
            else:
                return out, i

    def multiplies(self, last, i):
        """Is what begins at a token a factor of what ends with last, and not the next word?"""
        token, hangs = self.at(i), self.at(i + 1) in ("_", "^", "'", "(")
        prose = last not in FACTORS and {last, token} & set(WORDS) - set(FACTORS)
        return not prose and not re.match(NUMBER, token) and (hangs or token not in ("a", "A", "I"))

    def factor(self, i):
        """A number, a name, a call, or a bracket, with what hangs on it: _x, ^x, '."""
        token, result = self.at(i), None
        if re.fullmatch(NUMBER, token) and not re.match(r"[A-Za-z_]", self.at(i + 1)):
            result = f"<mn>{token}</mn>", i + 1
        elif token == "|":
            inner = self.relation(i + 1)
            if inner and self.at(inner[1]) == "|":
                bar = "<mo stretchy='false'>|</mo>"
                result = f"<mrow>{bar}{inner[0].replace(BREAK, '')}{bar}</mrow>", inner[1] + 1
        elif token in ("(", "["):
            result = self.bracket(i, several=token == "[")
        elif NAME.fullmatch(token):
            result = self.named(i, token)
        return result and self.scripts(*result, len(token))

    def named(self, i, name):
        """A variable, or a function with its arguments; without brackets a function is of the factor behind it."""
        word, digit = re.fullmatch(r"(.*?)(\d?)", name).groups() if name != "u8" else (name, "")
        out = f"<mi>{GREEK.get(word, word)}</mi>"
        out = f"<msub>{out}<mn>{digit}</mn></msub>" if digit else out
        if self.at(i + 1) == "(":
            inner, self.signs = self.bracket(i + 1, several=True, shown=name != "sqrt"), self.signs + 1
            root = inner and f"<msqrt>{inner[0].replace(BREAK, '')}</msqrt>"
            return inner and (root if name == "sqrt" else out + inner[0], inner[1])
        if name in FUNCTIONS and self.at(i + 1) not in ("_", "^"):
            inner = self.factor(i + 2) if self.at(i + 1) == " " else None
            return inner and (out + SPACE + inner[0], inner[1])
        return out, i + 1

    def scripts(self, base, i, length):
        """Sub- and superscripts and primes, directly behind a factor; length: of its name. Words have short ones."""
        plain = re.compile(rf"\d|[A-Za-z]{{1,{3 if length == 1 else 1}}}|bits")
        while self.at(i) and self.at(i) in "_^'":
            kind, place = self.at(i), i + 1 + (self.at(i + 1) == "-")
            inner = self.bracket(i + 1, several=True, shown=False) if self.at(i + 1) in CLOSING else None
            if kind == "'" and not self.at(i + 1).isalpha():
                base, i = f"<msup>{base}<mo>′</mo></msup>", i + 1
            elif kind != "'" and inner:
                base, i = self.script(kind, base, inner[0]), inner[1]
            elif kind != "'" and plain.fullmatch(self.at(place)):
                sign = "<mo>−</mo>" * (place > i + 1)
                base, i = self.script(kind, base, f"{sign}<mi>{self.at(place)}</mi>"), place + 1
            else:
                return None
            self.signs += 1
        return base, i

    def script(self, kind, base, inner):
        if kind == "^" and base.startswith("<msub>") and base.find("</msub>") == len(base) - len("</msub>"):
            return f"<msubsup>{base[len('<msub>') : -len('</msub>')]}<mrow>{inner}</mrow></msubsup>".replace(BREAK, "")
        tag = {"_": "msub", "^": "msup"}[kind]
        return f"<{tag}><mrow>{base}</mrow><mrow>{inner}</mrow></{tag}>".replace(BREAK, "")

    def bracket(self, i, several, shown=True):
        """( ... ), [ ... ], { ... } with one relation, or several with commas, semicolons or a bar between them."""
        opening, out, i = self.at(i), "", i + 1
        while inner := self.relation(self.skip(i)):
            out, i = out + inner[0], self.skip(inner[1])
            if self.at(i) == CLOSING[opening]:
                mo = "<mo stretchy='false' form='{}'>{}</mo>".format
                return mo("prefix", opening) + out + mo("postfix", self.at(i)) if shown else out, i + 1
            if not several or self.at(i) not in (",", ";", "|"):
                return None
            out, i = f"{out}<mo>{self.at(i)}</mo>", i + 1
        return None


def clause_end(text, start):
    """Where a clause ends: before , ; : . or two spaces outside of brackets, or before the bracket around it closes."""
    depth = 0
    for n in range(start, len(text)):
        depth += (text[n] in "([{") - (text[n] in ")]}")
        if depth < 0 or depth == 0 and re.compile(r"[,;:.](?=\s|$)|\s\s|\n").match(text, n):
            return n
    return len(text)


def find(text):
    """-> [(start, end, MathML)] of the formulas in a text; MathML is "" where one begins that is not certain."""
    tokens, starts, found, i = TOKEN.findall(text), [0], [], 0
    for token in tokens:
        starts.append(starts[-1] + len(token))
    while i < len(tokens):
        parser, end = Parser(tokens), i + 1
        begins = not tokens[i].isspace() and not (i and re.search(r"[\w'\"`.)\]-]$", tokens[i - 1]))
        begins &= tokens[i] not in ("a", "A", "I") or parser.at(i + 1) in ("_", "'", "(")
        result = parser.relation(i) if begins else None
        call = begins and NAME.fullmatch(tokens[i]) and parser.at(i + 1) == "("
        if call or result and parser.signs and re.search("[A-Za-z]", "".join(tokens[i : result[1]])):
            end = result[1] if result else i + 1
            after = parser.at(parser.skip(end))  # a formula that would go on has not been understood
            certain = result and not re.match(r"[\w(\[{'\"`^]", parser.at(end))
            certain = certain and after not in {*OPERATORS, *RELATIONS, *FUNCTIONS} - {".", "x"}
            if not certain:
                stop = clause_end(text, starts[i])
                end = next(n for n, start in enumerate(starts) if start >= stop)
            source = html.escape(text[starts[i] : starts[end]])
            maths = f"<math>{result[0]}</math>".replace(BREAK, "</math><wbr><math>") if certain else ""
            typeset = f'<span class="formula" title="{source}">{maths}</span>' if certain else ""
            found.append((starts[i], starts[end], typeset))
        i = end
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
    maths = lambda x: replaced(x, [(start, end, math or code(x[start:end])) for start, end, math in find(x)], words)
    spans = [(m.start(), m.end(), cite(m)[1] if m[3] else code(m[0])) for m in VERBATIM.finditer(text)]
    return replaced(text, spans, maths)


def prose(text, names):
    """Docstring -> HTML. A line that is an assignment stands alone; other lines flow."""
    text = re.sub(r"(?m)^ *(\w+ <- .*)$", r"\n\1\n", text)
    return MARKDOWN.render(text, {"names": names})


MARKDOWN = MarkdownIt("zero").enable(["list", "code"])
MARKDOWN.add_render_rule("text", lambda self, tokens, i, options, env: inline(tokens[i].content, env["names"]))
