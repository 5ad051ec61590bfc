"""The form that a client asks of answers: JSON, a schema or a grammar.

What a schema says is checked by the runner, which enforces it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.decode import depth
from shared.channel.messages import Grammar, Schema
from shared.errors import InvalidValue

MOST_BYTES = 512 << 10  # of a schema or a grammar; most of the time of a request goes into compiling it
DEEPEST = 64  # nesting of a schema: llguidance recurses over it
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def output(response_format: Any, grammar: Any, json_schema: Any) -> Schema | Grammar | None:
    """Return the form of answers, from the fields of a request; None: any text.  Raises InvalidValue."""
    wanted = [
        form
        for form in (_of_format(response_format), _of_grammar(grammar), of_schema(json_schema, "json_schema"))
        if form is not None
    ]
    if len(wanted) > 1:
        raise InvalidValue(
            "'response_format', 'grammar' and 'json_schema' exclude each other.", param="response_format"
        )
    return wanted[0] if wanted else None


def _of_format(response_format: Any) -> Schema | None:
    param = "response_format"
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            schema = response_format.get("schema")
            return of_schema(ANY_OBJECT if schema is None else schema, f"{param}.schema")
        case {"type": "json_schema"}:
            given = response_format.get("json_schema")
            schema = given.get("schema") if isinstance(given, dict) else None
            if schema is None:
                raise InvalidValue(f"'{param}.json_schema.schema' is required.", param=f"{param}.json_schema.schema")
            return of_schema(schema, f"{param}.json_schema.schema")
        case _:
            raise InvalidValue(f"'{param}.type': expected one of 'text', 'json_object', 'json_schema'.", param=param)


def of_schema(schema: Any, param: str) -> Schema | None:
    """Return the form that a schema describes.  `param` is its field, for errors.  Raises InvalidValue."""
    if schema is None:
        return None
    if not isinstance(schema, dict):
        raise InvalidValue(f"'{param}': expected an object, a JSON schema.", param=param)
    if depth(schema) > DEEPEST:
        raise InvalidValue(f"'{param}': a schema is nested at most {DEEPEST} levels deep.", param=param)
    data = msgspec.json.encode(schema)
    _check_size(len(data), param)
    return Schema(data)


def _of_grammar(grammar: Any) -> Grammar | None:
    if grammar is None or grammar == "":
        return None
    if not isinstance(grammar, str):
        raise InvalidValue("'grammar': expected a string, a grammar in GBNF.", param="grammar")
    _check_size(len(grammar.encode()), "grammar")
    return Grammar(grammar)


def _check_size(n_bytes: int, param: str) -> None:
    if n_bytes > MOST_BYTES:
        raise InvalidValue(f"'{param}': expected at most {MOST_BYTES:,} bytes, got {n_bytes:,}.", param=param)
