"""Turns constraints on answers into grammars of llguidance.

What llguidance would take for less than it says is refused here: facts about it were measured with version 1.9.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, assert_never

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from worker.chat.gbnf import GbnfError, to_lark
from worker.chat.protocol import Constraint

NO_TOKENS: Mapping[str, int] = {}

# The defaults bound the time of a token to about 20 ms.  An optional property takes four items of a row.
LIMITS = LLParserLimits(verbose_errors=False, max_items_in_row=10_000)
MOST_REASON = 500  # characters; a regular expression is quoted
EXACT = 2**53  # integers beyond are rounded
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")  # characters that only \uXXXX spells
# Compact JSON: with free white space, a model may write nothing else.  Without \uXXXX, a key has only one spelling.
OPTIONS: Any = {"whitespace_flexible": False, "json_allowed_escapes": 'nrbtf\\"'}
NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions"))  # keywords with schemas by name
VALUES = frozenset(("const", "default", "enum", "example", "examples"))  # keywords with any JSON
NUMBERS = frozenset(("maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum", "multipleOf"))
UNCHECKED = ("contentEncoding", "contentMediaType", "contentSchema")


class ConstraintError(Exception):
    """A constraint cannot be enforced; the message says why."""


def grammar(constraint: Constraint, tokens: Mapping[str, int] = NO_TOKENS) -> str:
    """Return the grammar of a constraint.  Raises ConstraintError, but not for all faults: see `matcher`.

    `tokens`: the control tokens that GBNF means by their text.
    """
    match constraint.kind:
        case "json_schema":
            return _of_schema(constraint.text)
        case "lark":
            return LLMatcher.grammar_from_lark(constraint.text)
        case "gbnf":
            try:
                return LLMatcher.grammar_from_lark(to_lark(constraint.text, tokens))
            except GbnfError as e:
                raise ConstraintError(str(e)) from None
        case _:
            assert_never(constraint.kind)


def matcher(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Compile a grammar.  Raises ConstraintError."""
    compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not compiled.is_error():
        compiled.compute_bitmask()  # may find an error too
    if compiled.is_error():
        raise ConstraintError(reason(compiled.get_error()))
    if compiled.is_stopped() and not compiled.is_accepting():
        raise ConstraintError("no text satisfies it")
    return compiled


def check(constraint: Constraint) -> None:
    """Raise ConstraintError for a constraint that cannot be enforced.  May take long, and end the process."""
    matcher(grammar(constraint), bytewise())


class _Bytes:
    """A vocabulary whose tokens are the bytes, and an end."""

    tokens: ClassVar = [*(bytes([i]) for i in range(256)), b"\xff<end>"]
    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def bytewise() -> LLTokenizer:
    """Return a tokenizer for those who have no model."""
    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=len(_Bytes.tokens))


def reason(error: str) -> str:
    """Return an error of llguidance for people."""
    if error.startswith("panic"):
        return "it is too complex"
    if error.startswith("NoExtension"):
        return "no text satisfies it"
    return " ".join(error.removesuffix("<non-verbose/>").split())[:MOST_REASON]


# ---- JSON schemas


def _of_schema(text: str) -> str:
    schema = msgspec.json.decode(text)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ConstraintError("no JSON satisfies it" if schema is False else "a schema must be an object")
    trim(schema)
    return LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)


def tidy(schema: dict[str, Any]) -> None:
    """Remove `x-guidance` from a schema, options of llguidance that could widen it; and `$schema`: llguidance does not
    report keywords that the schema's version does not have."""
    schema.pop("x-guidance", None)
    for each in _schemas(schema):
        each.pop("$schema", None)


def trim(schema: dict[str, Any]) -> None:
    """Tidy a schema, and raise ConstraintError for what llguidance does not enforce, and does not report."""
    tidy(schema)
    for each in _schemas(schema):
        for keyword in UNCHECKED:
            if keyword in each:
                raise ConstraintError(f"'{keyword}' is not supported")
        format_, types = each.get("format"), each.get("type", "string")
        if format_ is not None and "string" not in (types if isinstance(types, list) else [types]):
            raise ConstraintError(f"'format' {format_!r} is only supported for strings")
        least, required = each.get("minProperties", 0), each.get("required", [])
        names = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > max(1, names):  # a property that comes twice would count twice
            raise ConstraintError("'minProperties' above 1 is not supported, beyond the number of required properties")
        fixed = [*_leaves([each.get("const"), each.get("enum")])]
        numbers = [each.get(keyword) for keyword in NUMBERS] + fixed
        if any(isinstance(number, int) and abs(number) > EXACT for number in numbers):
            raise ConstraintError(f"integers beyond {EXACT:,} are not supported")
        if any(isinstance(text, str) and CONTROL.search(text) for text in fixed):
            raise ConstraintError("control characters in 'const' and 'enum' are not supported")


def _schemas(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema and those in it, also where only a reference leads to them."""
    todo: list[Any] = [root]
    while todo:
        each = todo.pop()
        if isinstance(each, list):
            todo += each
        elif isinstance(each, dict):
            yield each
            for keyword, value in each.items():
                if keyword in NAMED and isinstance(value, dict):
                    todo += value.values()
                elif keyword not in VALUES:
                    todo.append(value)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values in lists and objects that are neither, and keys."""
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, list):
            todo += each
        elif isinstance(each, dict):
            todo += [*each, *each.values()]
        else:
            yield each
