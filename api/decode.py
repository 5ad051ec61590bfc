"""Decodes request bodies into typed values, or raises the declared errors."""

from __future__ import annotations

import codecs
import json
import re
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

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
    UnsupportedEncoding,
    UnsupportedMediaType,
)

MAX_BODY_BYTES = 1 << 20

T = TypeVar("T", bound=Struct)


async def read_body(request: Request[Any]) -> bytes:
    """Return the body of a JSON request.

    Raises UnsupportedMediaType, UnsupportedEncoding, and BodyTooLarge without reading the rest.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type must be application/json, not '{media_type}'.")
    return await read_any(request, MAX_BODY_BYTES)


async def read_any(request: Request[Any], most_bytes: int) -> bytes:
    """Return the body of a request, whatever its type.

    Raises UnsupportedEncoding, and BodyTooLarge without reading the rest.
    """
    encodings = ", ".join(request.headers.getlist("content-encoding"))
    if {name.strip().lower() for name in encodings.split(",")} - {"", "identity"}:
        raise UnsupportedEncoding(f"The body must not be compressed: Content-Encoding is '{encodings}'.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise BodyTooLarge(f"The body exceeds the limit of {most_bytes:,} bytes.")
    return bytes(body)


def decode(body: bytes, kind: type[T], missing: str) -> T:
    """Decode JSON into a struct.

    Problems are reported in this order: not JSON, not an object, missing field, unknown keys (all of them), wrong type,
    invalid value.  `missing` is the message for a missing field, with `{}` for its name.  A float without a fraction is
    accepted as an integer, because JavaScript clients send these.
    """
    value = object_of(body)
    for name, field in _fields(kind).items():
        if field.required and name not in value:
            raise MissingParameter(missing.format(name), param=name)
    if unknown := _unknown(value, kind, ""):
        raise UnrecognizedKeys("Unrecognized key(s) in object: " + ", ".join(f"'{key}'" for key in unknown))
    out_of_range: list[InvalidValue] = []
    made = _made(value, kind, "", out_of_range)
    if out_of_range:
        raise out_of_range[0]
    return made


def object_of(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.  Raises InvalidJSON, and InvalidType if it is something else."""
    value = _json(body.removeprefix(codecs.BOM_UTF8))
    if not isinstance(value, dict):
        raise InvalidType(f"The body must be a JSON object, not {_name(value)}.")
    return value


def converted(value: dict[str, Any], kind: type[T]) -> T:
    """Convert an object of which unknown keys are ignored.  A float without a fraction is accepted as an integer.

    Raises MissingParameter, InvalidType and InvalidValue, which name the place, such as "messages[0].role".
    """
    whole = {key: int(one) if isinstance(one, float) and one.is_integer() else one for key, one in value.items()}
    try:
        return msgspec.convert(whole, kind)
    except msgspec.ValidationError as e:
        problem, _, place = str(e).partition(" - at `$.")
        path = place.removesuffix("`")
        missing = re.fullmatch(r"Object missing required field `(\w+)`.*", problem)
        if missing is not None:
            path = f"{path}.{missing[1]}" if path else missing[1]
            raise MissingParameter(f"'{path}' is required.", param=path) from None
        error = InvalidType if ", got " in problem else InvalidValue
        raise error(f"'{path}': {_plain(e)}.", param=path) from None


def _json(body: bytes) -> Any:
    """Decode JSON.  Raises InvalidJSON with the reason, which msgspec does not always know."""
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError:
        why = _not_utf8(body)
    except RecursionError:
        why = "it is nested too deeply"
    except msgspec.ValidationError:  # of no schema: a float beyond a double, or an integer with thousands of digits
        raise InvalidJSON("A number in the body is out of range.") from None
    except msgspec.DecodeError as e:
        why = "it has half of a surrogate pair" if _has_lone_surrogate(body) else str(e)
    raise InvalidJSON(f"The body is not valid JSON: {why.removeprefix('JSON is malformed: ')}.")


def _not_utf8(body: bytes) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as e:
        return f"it is not UTF-8 (byte {e.start})"
    raise AssertionError("a part of the body is not UTF-8")


def _has_lone_surrogate(body: bytes) -> bool:
    """Return whether an escape such as \\ud800 is all that is wrong, which msgspec takes for the end of the body."""
    try:
        json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python's decoder accepts."""
    raise ValueError(name)


def _unknown(values: dict[str, Any], kind: type[Struct], prefix: str) -> list[str]:
    """Return the unknown keys; those of nested objects are prefixed with their path."""
    fields, keys = _fields(kind), []
    for key, value in values.items():
        if key not in fields:
            keys.append(prefix + key)
        elif (inner := _inner(fields[key].type)) is not None and isinstance(value, dict):
            keys += _unknown(value, inner, f"{prefix}{key}.")
    return keys


def _made(raw: dict[str, Any], kind: type[T], prefix: str, out_of_range: list[InvalidValue]) -> T:
    """Convert to a struct.  Raises InvalidType; collects invalid values, since wrong types are reported first."""
    fields, values = _fields(kind), {}
    for key, value in raw.items():
        name = prefix + key
        if (inner := _inner(fields[key].type)) is not None and isinstance(value, dict):
            values[key] = _made(value, inner, f"{name}.", out_of_range)
            continue
        try:
            values[key] = _convert(value, fields[key].type)
        except msgspec.ValidationError as e:
            if ", got " in str(e):
                raise InvalidType(f"'{name}': {_plain(e)}.", param=name) from None
            problem = _plain(e)
            if problem.startswith("Invalid enum value"):
                problem = f"expected one of {', '.join(map(repr, _choices(fields[key].type)))}"
            out_of_range.append(InvalidValue(f"'{name}': {problem}, got {value!r}.", param=name))
    return kind(**values)


@cache
def _fields(kind: type[Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """Return the fields by name.  Cached: msgspec evaluates the type hints each time, which takes 80 us for a load."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


@cache
def _inner(kind: Any) -> type[Struct] | None:
    """Return the struct that a field may hold, if there is one."""
    return next((one for one in _members(kind) if isinstance(one, type) and issubclass(one, Struct)), None)


def _choices(kind: Any) -> list[str]:
    """Return the string literals that a field may hold."""
    return [word for one in _members(kind) if get_origin(one) is Literal for word in get_args(one)]


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a field's union, or the type itself, without the description of the field."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _convert(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        if isinstance(value, float) and value.is_integer() and "Expected `int`" in str(e):
            return msgspec.convert(int(value), kind)
        raise


def _plain(error: msgspec.ValidationError) -> str:
    """Translate a msgspec message, such as "Expected `int`, got `str`", into JSON terms."""
    text = str(error).partition(" - at ")[0]
    return re.sub(r"`([^`]*)`", lambda types: _in_json(types[1]), text).replace("Expected", "expected")


def _in_json(types: str) -> str:
    """Translate a msgspec type expression, such as "float | str", into JSON terms."""
    names = {"int": "integer", "str": "string", "bool": "boolean", "float": "number"}
    kinds = types.split(" | ")
    return " or ".join(names.get(name, name) for name in kinds if name != "null" or len(kinds) == 1)


def _name(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
