"""A request's body becomes a typed value once, here, or one of the declared errors."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import Request

from shared.errors import (
    BodyTooLarge,
    InvalidJSON,
    InvalidType,
    InvalidValue,
    MissingParameter,
    UnrecognizedKeys,
    UnsupportedMediaType,
)

MAX_BODY_BYTES = 1 << 20

T = TypeVar("T", bound=Struct)


async def read_body(request: Request) -> bytes:
    """The body of a JSON request.  Raises UnsupportedMediaType and BodyTooLarge, the latter without reading on."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type must be application/json, not '{media_type}'.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The body is longer than {MAX_BODY_BYTES:,} bytes.")
    return bytes(body)


def decode(body: bytes, kind: type[T], missing: str) -> T:
    """Turn JSON into `kind`, refusing in the contract's order: not JSON, not an object, a missing field, unknown keys
    (all of them), wrong types, wrong values.

    `missing` is the sentence for a missing field, with `{}` for its name.  A float that is a whole number is taken
    for an integer where one is expected, as JavaScript writes them.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise InvalidJSON(f"The body is not valid JSON: {str(e).removeprefix('JSON is malformed: ')}.") from None
    except RecursionError:
        raise InvalidJSON("The body is not valid JSON: it is nested too deeply.") from None
    if not isinstance(found, dict):
        raise InvalidType(f"The body must be a JSON object, not {_name(found)}.")
    fields = _fields(kind)
    for name, field in fields.items():
        if field.required and name not in found:
            raise MissingParameter(missing.format(name), param=name)
    unknown = [key for key in found if key not in fields]
    if unknown:
        raise UnrecognizedKeys("Unrecognized key(s) in object: " + ", ".join(f"'{key}'" for key in unknown))
    out_of_range: InvalidValue | None = None
    for name, value in found.items():
        try:
            found[name] = _convert(value, fields[name].type)
        except msgspec.ValidationError as e:
            if ", got " in str(e):
                raise InvalidType(f"'{name}': {_plain(e)}.", param=name) from None
            out_of_range = out_of_range or InvalidValue(f"'{name}': {_plain(e)}, got {value!r}.", param=name)
    if out_of_range is not None:
        raise out_of_range
    return kind(**found)


@cache
def _fields(kind: type[Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """Kept, since msgspec evaluates the type hints anew each time: 80 us for a load."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _convert(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        if isinstance(value, float) and value.is_integer() and "Expected `int`" in str(e):
            return msgspec.convert(int(value), kind)
        raise


def _plain(error: msgspec.ValidationError) -> str:
    """msgspec's "Expected `int`, got `str`" in JSON's words."""
    text = str(error).partition(" - at ")[0]
    for python, json in (("`int`", "integer"), ("`str`", "string"), ("`bool`", "boolean"), ("`float`", "number")):
        text = text.replace(python, json)
    return text.replace("`null`", "null").replace("`", "").replace("Expected", "expected")


def _name(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
