"""Decodes request bodies into typed values, or raises the declared errors."""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import Callable, Collection, Iterable
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Struct
from starlette.requests import Request

from shared.errors import (
    BodyTooLarge,
    BodyTooSlow,
    InvalidJSON,
    InvalidType,
    InvalidValue,
    MissingParameter,
    UnrecognizedKeys,
    UnsupportedEncoding,
    UnsupportedMediaType,
)

MAX_BODY_BYTES = 1 << 20
BODY_S = 120.0  # from the head of a request to the end of its body
OUT_OF_RANGE = ("Number out of range", "Integer value out of range")  # what msgspec says
NUMBER = re.compile(rb"-?\d{1,15}(\.\d{1,15})?([eE][-+]?\d{1,2})?")  # one that a float holds exactly enough

T = TypeVar("T", bound=Struct)


async def read_body(request: Request[Any]) -> bytes:
    """Return the body of a JSON request.

    Raises UnsupportedMediaType, UnsupportedEncoding, and what `read_any` raises without reading the rest.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type must be application/json, not '{media_type}'.")
    return await read_any(request, MAX_BODY_BYTES)


async def read_any(request: Request[Any], most_bytes: int) -> bytes:
    """Return the body of a request, whatever its type.

    Raises UnsupportedEncoding, and BodyTooLarge, BodyTooSlow and TooManyWaiting without reading the rest.
    """
    encodings = ", ".join(request.headers.getlist("content-encoding"))
    if {name.strip().lower() for name in encodings.split(",")} - {"", "identity"}:
        raise UnsupportedEncoding(f"The body must not be compressed: Content-Encoding is '{encodings}'.")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            with request.state["bodies"].reading(request.state["caller"]) as reserve:
                async for chunk in request.stream():
                    reserve(len(chunk))
                    body += chunk
                    if len(body) > most_bytes:
                        raise BodyTooLarge(f"The body exceeds the limit of {most_bytes:,} bytes.")
    except TimeoutError:
        raise BodyTooSlow(f"The body did not arrive within {BODY_S:g} s.") from None
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
        raise UnrecognizedKeys(unrecognized(unknown))
    out_of_range: list[InvalidValue] = []
    made = _made(value, kind, "", out_of_range)
    if made is None:
        raise out_of_range[0]
    return made


def object_of(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.  Raises InvalidJSON, and InvalidType if it is something else."""
    value = _json(body.removeprefix(codecs.BOM_UTF8))
    if not isinstance(value, dict):
        raise InvalidType(f"The body must be a JSON object, not {_name(value)}.")
    return value


def known(body: bytes, kind: type[T], large: Collection[str], within: str = "") -> T:
    """Decode a JSON object of which unknown keys are ignored, at any depth.  A float without a fraction is accepted as
    an integer, at the top level.  `within` is the place of the object in the body, for errors.

    What is ignored is not kept, because millions of small values would occupy this process for seconds.  For the same
    reason the fields that are not in `large` are bounded.  Raises InvalidJSON, BodyTooLarge, and MissingParameter,
    InvalidType and InvalidValue, which name the place, such as "messages[0].role".
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    if len(body) > MAX_BODY_BYTES:
        small = sum(len(raw) for name, raw in _raw(body).items() if name not in large and name in _fields(kind))
        if small > MAX_BODY_BYTES:
            names = " and ".join(f"'{name}'" for name in large)
            raise BodyTooLarge(f"The fields other than {names} exceed the limit of {MAX_BODY_BYTES:,} bytes.")
    problem = _problem(body, kind)
    if isinstance(problem, str) and ", got `float`" in problem:
        problem = _problem(_with_whole_numbers(body), kind)
    if not isinstance(problem, str):
        return problem
    text, _, place = problem.partition(" - at `$.")
    path = ".".join(filter(None, (within, place.removesuffix("`"))))
    missing = re.fullmatch(r"Object missing required field `(\w+)`.*", text)
    if missing is not None:
        path = f"{path}.{missing[1]}" if path else missing[1]
        raise MissingParameter(f"'{path}' is required.", param=path)
    if not path:
        raise InvalidType(f"The body must be a JSON object: {_plain(text)}.")
    error = InvalidType if ", got " in text else InvalidValue
    raise error(f"'{path}': {_plain(text)}.", param=path)


def strict(body: bytes, kind: type[T], large: Collection[str]) -> T:
    """Decode a JSON object as `known` does, but refuse unknown keys.

    Raises UnrecognizedKeys, and what `known` raises.
    """
    fields = _fields(kind)
    if unknown := [name for name in _raw(body.removeprefix(codecs.BOM_UTF8)) if name not in fields]:
        raise UnrecognizedKeys(unrecognized(unknown))
    return known(body, kind, large)


def unrecognized(keys: Iterable[str]) -> str:
    """Return LM Studio's sentence about unknown keys."""
    return "Unrecognized key(s) in object: " + ", ".join(f"'{key}'" for key in keys)


def _problem(body: bytes, kind: type[T]) -> T | str:
    """Decode JSON into a struct; return the message of msgspec if it does not fit.  Raises InvalidJSON."""
    try:
        value: T = _decoder(kind)(body)
    except msgspec.ValidationError as e:
        if str(e).startswith(OUT_OF_RANGE):
            raise _invalid_json(body, e) from None
        return str(e)
    except (UnicodeDecodeError, RecursionError, msgspec.DecodeError) as e:
        raise _invalid_json(body, e) from None
    else:
        return value


@cache
def _decoder(kind: type[Any]) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(kind).decode


def _raw(body: bytes) -> dict[str, msgspec.Raw]:
    """Return the values of a JSON object as they are; nothing if it is not one."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (UnicodeDecodeError, RecursionError, msgspec.DecodeError):
        return {}


def _with_whole_numbers(body: bytes) -> bytes:
    """Write numbers without a fraction as integers, at the top level of an object."""
    values: dict[str, msgspec.Raw | int] = {**_raw(body)}
    for name, raw in values.items():
        text = bytes(raw) if isinstance(raw, msgspec.Raw) else b""
        if NUMBER.fullmatch(text) and (number := float(text)).is_integer():
            values[name] = int(number)
    return msgspec.json.encode(values)


def _json(body: bytes) -> Any:
    """Decode JSON.  Raises InvalidJSON."""
    try:
        return msgspec.json.decode(body)
    except (UnicodeDecodeError, RecursionError, msgspec.DecodeError) as e:
        raise _invalid_json(body, e) from None


def _invalid_json(body: bytes, error: Exception) -> InvalidJSON:
    """Return the error with the reason, which msgspec does not always know."""
    if isinstance(error, msgspec.ValidationError):  # a float beyond a double, or an integer with thousands of digits
        return InvalidJSON("A number in the body is out of range.")
    why = str(error)
    if isinstance(error, UnicodeDecodeError):
        why = _not_utf8(body)
    elif isinstance(error, RecursionError):
        why = "it is nested too deeply"
    elif len(body) <= MAX_BODY_BYTES and _has_lone_surrogate(body):
        why = "it has half of a surrogate pair"
    return InvalidJSON(f"The body is not valid JSON: {why.removeprefix('JSON is malformed: ')}.")


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


def _made(raw: dict[str, Any], kind: type[T], prefix: str, out_of_range: list[InvalidValue]) -> T | None:
    """Convert to a struct.  Raises InvalidType; collects invalid values, since wrong types are reported first.

    Returns None if there are invalid values: a required field may be among them.
    """
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
                raise InvalidType(f"'{name}': {_plain(str(e))}.", param=name) from None
            problem = _plain(str(e))
            if problem.startswith("Invalid enum value"):
                problem = f"expected one of {', '.join(map(repr, _choices(fields[key].type)))}"
            out_of_range.append(InvalidValue(f"'{name}': {problem}, got {value!r}.", param=name))
    return None if out_of_range else kind(**values)


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


def _plain(text: str) -> str:
    """Translate a message of msgspec, such as "Expected `int`, got `str`", into JSON terms."""
    text = text.partition(" - at ")[0]
    return re.sub(r"`([^`]*)`", lambda types: _in_json(types[1]), text).replace("Expected", "expected")


def _in_json(types: str) -> str:
    """Translate a msgspec type expression, such as "float | str", into JSON terms."""
    names = {"int": "integer", "str": "string", "bool": "boolean", "float": "number"}
    kinds = types.split(" | ")
    return " or ".join(names.get(name, name) for name in kinds if name != "null" or len(kinds) == 1)


def _name(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def depth(value: Any) -> int:
    """Return how deeply lists and objects are nested, without recursion."""
    level, n = [value], 0
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        n += 1
    return n - 1
