"""Translates llama.cpp's grammars (grammars/README.md there) for llguidance.

llguidance splits a text into lexemes, each as long as possible, before it applies rules; GBNF has no lexemes.  So each
character becomes a lexeme of its own: then both describe the same texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

DEEPEST = 64  # nesting of parentheses
MOST_TIMES = 2000  # of a repetition, as in llama.cpp
NAME = re.compile(r"[A-Za-z0-9-]+")
SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
SPACE_OR_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
LINE = re.compile(r"\r\n|\r|\n|\Z")
TIMES = re.compile(r"\{\s*(\d+)\s*(,)?\s*(\d*)\s*\}")
TOKEN = re.compile(r"<(?:\[(\d+)\]|([^\[\]\s>][^>\r\n]*))>")
NUL = "\0"
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
CODES = {"x": 2, "u": 4, "U": 8}  # hexadecimal digits


class GbnfError(Exception):
    """A text is not a grammar; the message says why."""


def to_lark(text: str, tokens: Mapping[str, int]) -> str:
    """Return a grammar in llguidance's form.  Raises GbnfError.

    `tokens`: the control tokens by their text, which is what the grammar may mean by it.
    """
    return _Translation(text, tokens).lark()


@dataclass
class _Translation:
    text: str
    tokens: Mapping[str, int]
    at: int = 0
    names: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)

    def lark(self) -> str:
        self.skip(SPACE_OR_LINES)
        while self.at < len(self.text):
            name = self.taken(NAME, "the name of a rule")
            self.skip(SPACE)
            self.expect("::=")
            self.skip(SPACE_OR_LINES)
            self.rules[self.name(name)] = self.alternatives(0)
            self.taken(LINE, "the end of the line")
            self.skip(SPACE_OR_LINES)
        if "root" not in self.names or self.names["root"] not in self.rules:
            raise GbnfError("it has no rule 'root'")
        for name, short in self.names.items():
            if short not in self.rules:
                raise GbnfError(f"it has no rule '{name}'")
        lines = [f"start: {self.names['root']}", *(f"{name}: {rule}" for name, rule in self.rules.items())]
        return "\n".join(lines)

    def alternatives(self, depth: int) -> str:
        if depth > DEEPEST:
            raise GbnfError(f"it is nested more than {DEEPEST} levels deep")
        alternatives = [self.sequence(depth)]
        while self.text.startswith("|", self.at):
            self.at += 1
            self.skip(SPACE_OR_LINES)
            alternatives.append(self.sequence(depth))
        return " | ".join(alternatives)

    def sequence(self, depth: int) -> str:
        items = []
        space = SPACE_OR_LINES if depth else SPACE  # a rule outside of parentheses ends with its line
        while (item := self.item(depth)) is not None:
            self.skip(space)
            items.append(item)
        return " ".join(items) or '""'

    def item(self, depth: int) -> str | None:
        char = self.text[self.at : self.at + 1]
        if char == '"':
            item = self.literal()
        elif char == "[":
            item = self.characters()
        elif char == ".":
            self.at += 1
            item = r"/[^\x{0}]/"
        elif char == "(":
            self.at += 1
            self.skip(SPACE_OR_LINES)
            item = f"({self.alternatives(depth + 1)})"
            self.expect(")")
        elif char == "<":
            match = TOKEN.match(self.text, self.at)
            if match is None:
                raise self.error("a token")
            self.at = match.end()
            item = self.spelled(match[0]) if match[1] is None else f"<[{match[1]}]>"
        elif char == "!":
            raise GbnfError("negated tokens are not supported")
        elif match := NAME.match(self.text, self.at):
            self.at = match.end()
            item = self.name(match[0])
        else:
            return None
        return self.repeated(item)

    def repeated(self, item: str) -> str:
        while True:
            char = self.text[self.at : self.at + 1]
            if char and char in "*+?":
                self.at += 1
                item = f"({item}){char}"
            elif match := TIMES.match(self.text, self.at):
                self.at = match.end()
                least = int(match[1])
                most = int(match[3]) if match[3] else None if match[2] else least
                if max(least, most or 0) > MOST_TIMES or (most is not None and most < least):
                    raise GbnfError(
                        f"a repetition is at most {MOST_TIMES} times, and its second number the greater one"
                    )
                item = f"({item}){{{least},{'' if most is None else most}}}"
            else:
                return item

    def literal(self) -> str:
        self.at += 1
        chars = []
        while not self.text.startswith('"', self.at):
            chars.append(self.char())
        self.at += 1
        return f"({self.spelled(''.join(chars))})"

    def spelled(self, text: str) -> str:
        """Return what matches a text, also where it is control tokens."""
        parts = []
        while text:
            name = max((n for n in self.tokens if text.startswith(n)), key=len, default="")
            if name:
                parts.append(f"({_chars(name)} | <[{self.tokens[name]}]>)")
            else:
                name = text[0]
                parts.append(_chars(name))
            text = text[len(name) :]
        return " ".join(parts) or '""'

    def characters(self) -> str:
        self.at += 1
        is_negated = self.text.startswith("^", self.at)
        self.at += is_negated
        ranges = []
        while not self.text.startswith("]", self.at):
            first = last = self.char()
            if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                self.at += 1
                last = self.char()
            if last < first:
                raise GbnfError(f"a range of characters ends before it begins: {first}-{last}")
            ranges.append(f"{_code(first)}-{_code(last)}")
        self.at += 1
        if not ranges:
            raise GbnfError("a set of characters is empty")
        nul = rf"^{_code(NUL)}" if is_negated else ""  # no set of llama.cpp has it
        return f"/[{nul}{''.join(ranges)}]/"

    def char(self) -> str:
        char = self.text[self.at : self.at + 1]
        if not char:
            raise self.error("the end of a literal")
        self.at += 1
        if char != "\\":
            return char
        kind = self.text[self.at : self.at + 1]
        self.at += 1
        if kind in CODES:
            digits = self.text[self.at : self.at + CODES[kind]]
            self.at += CODES[kind]
            try:
                return chr(int(digits, 16)).encode().decode()
            except (ValueError, OverflowError):
                raise GbnfError(f"'\\{kind}{digits}' is not a character") from None
        if kind not in ESCAPES or not kind:
            raise GbnfError(f"'\\{kind}' is not a character")
        return ESCAPES[kind]

    def name(self, name: str) -> str:
        return self.names.setdefault(name, f"r{len(self.names)}")

    def skip(self, pattern: re.Pattern[str]) -> None:
        if match := pattern.match(self.text, self.at):
            self.at = match.end()

    def taken(self, pattern: re.Pattern[str], what: str) -> str:
        if (match := pattern.match(self.text, self.at)) is None:
            raise self.error(what)
        self.at = match.end()
        return match[0]

    def expect(self, text: str) -> None:
        if not self.text.startswith(text, self.at):
            raise self.error(f"'{text}'")
        self.at += len(text)

    def error(self, what: str) -> GbnfError:
        line = self.text.count("\n", 0, self.at) + 1
        return GbnfError(f"expected {what} in line {line}, at {self.text[self.at : self.at + 20]!r}")


def _chars(text: str) -> str:
    return " ".join(f"/{_code(char)}/" for char in text)


def _code(char: str) -> str:
    return rf"\x{{{ord(char):x}}}"
