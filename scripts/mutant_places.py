"""The places in Rust code that a mutant can change, for scripts/mutants: operators, comparisons, numbers, conditions, checks,
calls and returned values. Reads tokens, not types: the compiler drops what is wrong."""

import re

TOKEN = re.compile(r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<text>b?r(?P<hash>\#*)".*?"(?P=hash)|b?"(?:\\.|[^"\\])*"|b?'(?:\\[^']+|[^'\\\x80-\xff]|[\x80-\xff]+)')|(?P<life>'\w+)
    |(?P<number>\d[\d_]*(?:\.\d+)?(?:e[+-]?\d+)?\w*)|(?P<word>[^\W\d]\w*)
    |(?P<sign><<=|>>=|\.\.=|::|->|=>|[=!<>+\-*/%^&|]=|&&|\|\||\.\.|<<|>>|.)""", re.X | re.S)
SWAPS = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "<": "<= >=",
         "<=": "< >", ">": ">= <=", ">=": "> <", "==": "!=", "!=": "==", "&&": "||", "||": "&&"}
# How strongly binary operators bind.
BINDS = {sign: bind for bind, signs in enumerate(["= += -= *= /= %= ^= &= |=", ".. ..=", "||", "&&", "== != < <= > >=", "|", "^",
                                                  "&", "<< >>", "+ -", "* / %"]) for sign in signs.split()}
KEYWORDS = set("as break const continue else enum fn for if impl in let loop match mod move mut pub ref return static struct "
               "trait type unsafe use where while macro_rules".split())
STOPS = {",", ";", "=>", ":", "->"} | KEYWORDS - {"as", "mut"}
OPEN, CLOSE = ("(", "[", "{"), (")", "]", "}")


class Source:
    """The tokens of a file, and the places in it that a mutant can change."""

    def __init__(self, text):
        self.text = text
        self.tokens = [found for found in TOKEN.finditer(self.text) if found.lastgroup != "space"]
        self.words = [token[0] for token in self.tokens]
        self.pair, opened = {}, []
        for at, word in enumerate(self.words):
            if word in OPEN:
                opened.append(at)
            elif word in CLOSE:
                self.pair[at] = opened.pop()
                self.pair[self.pair[at]] = at
        self.dead, self.bars, self.functions = set(), set(), []
        at = 0
        while at < len(self.words):
            end = self.dead_end(at)
            self.dead |= set(range(at, end + 1))
            at = max(at, end) + 1
        self.binary = {at for at, word in enumerate(self.words) if word in BINDS and at not in self.bars and self.is_binary(at)}

    def ends_value(self, at):
        word, kind = self.words[at], self.tokens[at].lastgroup
        return word in (")", "]", "?") or kind in ("text", "number") or kind == "word" and word not in KEYWORDS

    def is_binary(self, at):
        spaced = self.text[self.tokens[at].start() - 1].isspace() and self.text[self.tokens[at].end()].isspace()
        return at > 0 and self.ends_value(at - 1) and (spaced or self.words[at].startswith(".."))

    def until(self, at, *ends):
        """The next token, outside of brackets, that is one of the ends."""
        while at < len(self.words) and self.words[at] not in ends:
            at = self.pair[at] + 1 if self.words[at] in OPEN else at + 1
        return at

    def dead_end(self, at):
        """The end of what holds no mutants and begins here: an attribute, the header of an item, a pattern, a constant, the
        parameters of a closure, a macro, tests; or a position before `at`."""
        word, after = self.words[at], self.words[at + 1] if at + 1 < len(self.words) else ""
        if word == "#":
            return self.pair[at + 1 + (after == "!")]
        if word == "macro_rules" or word == "mod" and "cfg" in self.words[max(0, at - 6) : at]:
            return self.pair[self.until(at, "{")]
        if word in ("use", "static", "type") or word == "const" and after not in ("fn", "{", "unsafe"):
            return self.until(at, ";")
        if word in ("struct", "enum", "impl", "trait") or word == "fn" and after != "(":
            end = self.until(at, "{", ";")
            if word in ("struct", "enum") or "const" in self.words[at - 2 : at]:
                return self.pair.get(end, end)
            if word == "fn" and self.words[end] == "{":
                self.functions.append((at, end))
            return end
        if word == "let":
            return self.until(at, "=", ";")
        if word in ("|", "||") and not self.ends_value(at - 1):
            end = at if word == "||" else self.until(at + 1, "|")
            self.bars |= {at, end}
            return end
        return at - 1

    def operands(self, at):
        """From the first token of the left operand of a binary operator to the last of the right one."""
        words, bind, start, end = self.words, BINDS[self.words[at]], at, at + 1
        while (word := words[start - 1]) not in STOPS | set(OPEN) and start - 1 not in self.bars:
            if start - 1 in self.binary and BINDS[word] < max(bind, 1) or word == "}" and words[start] not in (".", "?"):
                break
            start = self.pair[start - 1] if word in CLOSE else start - 1
        while (word := words[end]) not in (*CLOSE, ",", ";", "=>"):
            if bind and (end in self.binary and BINDS[word] <= bind or word == "{" and self.ends_value(end - 1)):
                break
            end = self.pair[end] + 1 if word in OPEN else end + 1
        return start, end - 1

    def mutants(self):
        """Each as its token, the first and last one that it replaces, the change in words, and the code with ORIGINAL for these."""
        words, either = self.words, "(if crate::mutant::is(ID) {{ {} }} else {{ ORIGINAL }})".format
        for at, word in enumerate(words):
            kind, before = self.tokens[at].lastgroup, words[at - 1]
            if at in self.dead:
                continue
            if word in SWAPS and at in self.binary:
                start, end = self.operands(at)
                left, right = self.code(start, at - 1), self.code(at + 1, end)
                for other in SWAPS[word].split():
                    yield at, start, end, f"{word} becomes {other}", either(f"{left} {other} {right}")
            elif kind == "number" and re.fullmatch(r"\d+([iu]\w+)?", word) and before != ".":
                digits, suffix = re.fullmatch(r"(\d+)(.*)", word).groups()
                other = int(digits) - 1 if at % 2 and int(digits) else int(digits) + 1
                yield at, at, at, f"{word} becomes {other}", either(f"{other}{suffix}")
            elif word in ("if", "while"):
                end = self.until(at + 1, "{", "=>")
                if "let" not in words[at:end]:
                    yield at, at + 1, end - 1, "negated condition", "(crate::mutant::is(ID) != (ORIGINAL))"
            elif before == "(" and words[at - 3 : at - 1] == ["ensure", "!"]:
                yield at, at, self.until(at, ",") - 1, "no check", "(crate::mutant::is(ID) || (ORIGINAL))"
            elif before in (";", "{", "}") and kind == "word" and word not in KEYWORDS and words[at + 1] != "!":
                end = self.until(at, ";", "}")
                assigns = any(i in self.binary and not BINDS[words[i]] for i in range(at, end))
                if words[end] == ";" and words[end - 1] in (")", "?") and not assigns:
                    yield at, at, end, "no call", "if !crate::mutant::is(ID) { ORIGINAL }"
        for name, body in self.functions:
            for value in returned(" ".join(words[name:body])):
                change = f"`{words[name + 1]}` returns {value or 'at once'}"
                yield name, body, body, change, f"ORIGINAL if crate::mutant::is(ID) {{ return {value}; }}"

    def code(self, first, last):
        return self.text[self.tokens[first].start() : self.tokens[last].end()]


def returned(header):
    """Values that a function could return at once."""
    result = re.sub(r" where .*", "", header.rpartition(" -> ")[2]).strip() if " -> " in header else ""
    inner = re.fullmatch(r"Result < (.*) >", result)
    kind = inner[1] if inner else result
    tensor = re.search(r"(\w+) : & Tensor\b", header)
    values = {"": [""], "( )": ["()"], "bool": ["true", "false"], "usize": ["0", "1"],
              "Tensor": [f"{tensor[1] if tensor else 'self'}.clone()"]}
    values = values.get(kind) or ["None" if kind.startswith("Option") else "Default::default()"]
    return [f"Ok({value})" for value in values] if inner else values
