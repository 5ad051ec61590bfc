"""Decoding a body: any bytes give a request or one of the declared errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.requests import Request

from api.decode import MAX_BODY_BYTES, decode, read_body
from api.errors import reply
from api.replies import Bodies
from shared import paths
from shared.errors import (
    BodyTooLarge,
    BodyTooSlow,
    InvalidJSON,
    InvalidRequest,
    InvalidType,
    InvalidValue,
    MissingParameter,
    TooManyWaiting,
    UnrecognizedKeys,
    UnsupportedEncoding,
    UnsupportedMediaType,
)
from shared.schema.http import DownloadRequest, LoadRequest, UnloadRequest

LOAD, UNLOAD = '"{}" is required', "Missing required field '{}'"
FIELDS = [*LoadRequest.__struct_fields__]
INTEGERS = ["context_length", "eval_batch_size", "physical_batch_size", "num_experts", "parallel"]
BOOLEANS = ["flash_attention", "offload_kv_cache_to_gpu", "echo_load_config"]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=[]))  # lone surrogates too
    | st.sampled_from(["p/m", 1, 64, 65, 8192.0, 0, -1, 2**63, 2**64, 1e400, 1e18]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
integers = st.integers(-(2**70), 2**70) | st.floats(-1e300, 1e300).map(round).map(float) | st.integers(-1, 70)
nearly_requests = st.fixed_dictionaries(
    {"model": st.just("p/m") | json_values},
    optional=dict.fromkeys(INTEGERS, integers | json_values) | dict.fromkeys(BOOLEANS, st.booleans() | json_values),
)
with_strange_keys = st.fixed_dictionaries({}, optional=dict.fromkeys([*FIELDS, "instance_id", "ttl"], json_values))


def load(body: Any) -> LoadRequest:
    return decode(body if isinstance(body, bytes) else json.dumps(body).encode(), LoadRequest, LOAD)


def refused(body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        load(body)
    return caught.value


def is_decided(body: bytes) -> None:
    """Check that a body gives a request that msgpack can encode, or an error that can be sent."""
    for kind, missing in ((LoadRequest, LOAD), (UnloadRequest, UNLOAD)):
        try:
            decoded = decode(body, kind, missing)
        except InvalidRequest as e:
            assert e.code in {  # noqa: PT017
                "invalid_json",
                "unrecognized_keys",
                "missing_required_parameter",
                "invalid_type",
                "invalid_value",
            }
            assert msgspec.json.decode(reply(e, paths.LOAD).body)["error"]["message"] == str(e)  # noqa: PT017
        else:
            assert isinstance(decoded, kind)
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(decoded), type=kind) == decoded


# ---- any body


@given(json_values | nearly_requests | with_strange_keys)
def test_any_json_is_a_request_or_a_refusal(value: Any) -> None:
    is_decided(json.dumps(value).encode())
    is_decided(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


@given(st.binary() | st.text().map(str.encode))
@example(b"")
@example(b"\xff\xfe{\x00}\x00")
@example(b"\xef\xbb\xbf{}")
@example(b'{"model": "\xed\xa0\x80"}')
@example(b'{"model": "\\ud800"}')
@example(b'{"\\ud800": 1, "model": "m"}')
@example(b'{"model": "m", "context_length": 1e999}')
@example(b'{"model": "m", "context_length": ' + b"9" * 5000 + b"}")
@example(b"[" * 100_000)
@example(b'{"model":' * 50_000)
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    is_decided(body)


@given(st.binary(max_size=12), st.integers(0, 60))
def test_a_damaged_request_is_a_request_or_a_refusal(damage: bytes, at: int) -> None:
    body = b'{"model": "p/m", "context_length": 4096, "flash_attention": true}'
    is_decided(body[:at] + damage + body[at + len(damage) :])


# ---- bodies that are not JSON, or not an object


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'model': 'm'}",
        b'{"model": "m",}',
        b'{"model": "m"} x',
        b'{"model": NaN}',
        b'{"model": "m", "context_length": Infinity}',
        b'{"model": "m", "context_length": -Infinity}',
        b'{"model": "\xff"}',
    ],
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    error = refused(body)
    assert isinstance(error, InvalidJSON)
    assert str(error).startswith("The body is not valid JSON: ")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"model": "m\xff"}', "The body is not valid JSON: it is not UTF-8 (byte 12)."),
        (b'{"model": "\\ud800"}', "The body is not valid JSON: it has half of a surrogate pair."),
        (b'{"model": "\\ud800"', "The body is not valid JSON: Input data was truncated."),
        (b'{"model": NaN}', "The body is not valid JSON: invalid character (byte 10)."),
        (b'[{"model": -Infinity}]', "The body is not valid JSON: invalid character (byte 12)."),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"model": "m"}', "The body is not valid JSON: invalid character (byte 0)."),
        (b"\xff\xfe{\0}\0", "The body is not valid JSON: invalid character (byte 0)."),
        (b'{"model": "m", "ttl_seconds": 1e999}', "A number in the body is out of range."),
        (b'{"gpu": {"offload": [-1e999]}}', "A number in the body is out of range."),
        (b'{"model": 1' + b"0" * 5000 + b"}", "A number in the body is out of range."),
    ],
)
def test_the_reason_is_that_of_the_body(body: bytes, reason: str) -> None:
    assert str(refused(body)) == reason


def test_a_byte_order_mark_is_ignored() -> None:
    assert load(b'\xef\xbb\xbf{"model": "m"}') == LoadRequest(model="m")


def test_deep_nesting_is_refused() -> None:
    error = refused(b'{"model": ' + b"[" * 500_000 + b"]" * 500_000 + b"}")
    assert str(error) == "The body is not valid JSON: it is nested too deeply."


@pytest.mark.parametrize(
    ("body", "what"),
    [(b"[]", "an array"), (b'"x"', "a string"), (b"1", "a number"), (b"1.5", "a number"), (b"true", "a boolean")],
)
def test_a_body_that_is_not_an_object_is_refused(body: bytes, what: str) -> None:
    error = refused(body)
    assert isinstance(error, InvalidType)
    assert str(error) == f"The body must be a JSON object, not {what}."
    assert str(refused(b"null")) == "The body must be a JSON object, not null."


# ---- the contract's sentences


def test_a_missing_field_gives_the_message_of_lm_studio() -> None:
    error = refused({})
    assert isinstance(error, MissingParameter)
    assert (str(error), error.param) == ('"model" is required', "model")
    with pytest.raises(MissingParameter) as caught:
        decode(b"{}", UnloadRequest, UNLOAD)
    assert (str(caught.value), caught.value.param) == ("Missing required field 'instance_id'", "instance_id")


@pytest.mark.parametrize("keys", [["ttl"], ["identifier"], ["stream"], ["ttl", "identifier"], ["a", "b", "c"]])
def test_all_unknown_keys_are_named(keys: list[str]) -> None:
    error = refused({"model": "m", **dict.fromkeys(keys, 1)})
    assert isinstance(error, UnrecognizedKeys)
    assert str(error) == "Unrecognized key(s) in object: " + ", ".join(f"'{key}'" for key in keys)


@pytest.mark.parametrize(
    ("field", "value", "code", "message"),
    [
        ("context_length", "4096", "invalid_type", "'context_length': expected integer, got string."),
        ("context_length", None, "invalid_type", "'context_length': expected integer, got null."),
        ("context_length", True, "invalid_type", "'context_length': expected integer, got boolean."),
        ("context_length", 1.5, "invalid_type", "'context_length': expected integer, got number."),
        ("context_length", [], "invalid_type", "'context_length': expected integer, got array."),
        ("context_length", {}, "invalid_type", "'context_length': expected integer, got object."),
        ("flash_attention", 1, "invalid_type", "'flash_attention': expected boolean, got integer."),
        ("flash_attention", None, "invalid_type", "'flash_attention': expected boolean, got null."),
        ("model", 5, "invalid_type", "'model': expected string, got integer."),
        ("context_length", 0, "invalid_value", "'context_length': expected integer >= 1, got 0."),
        ("context_length", -5, "invalid_value", "'context_length': expected integer >= 1, got -5."),
        ("parallel", 65, "invalid_value", "'parallel': expected integer <= 64, got 65."),
        ("num_experts", 0, "invalid_value", "'num_experts': expected integer >= 1, got 0."),
    ],
)
def test_an_error_names_the_expected_value(field: str, value: Any, code: str, message: str) -> None:
    error = refused({"model": "m", field: value})
    assert (error.code, str(error), error.param) == (code, message, field)


# ---- the order of errors


def test_errors_have_a_fixed_order() -> None:
    """Not an object, then a missing field, then all unknown keys, then types, then values."""
    wrong = {"ttl": 1, "parallel": 65, "context_length": "x"}
    assert isinstance(refused([wrong]), InvalidType)
    assert isinstance(refused(wrong), MissingParameter)
    assert isinstance(refused({**wrong, "model": "m"}), UnrecognizedKeys)
    assert isinstance(refused({"parallel": 65, "context_length": "x", "model": "m"}), InvalidType)
    assert isinstance(refused({"parallel": 65, "context_length": 0, "model": "m"}), InvalidValue)


@given(
    order=st.permutations(["model", "ttl", "parallel", "context_length"]),
    present=st.sets(st.sampled_from(["model", "ttl", "parallel", "context_length"])),
)
def test_the_order_of_keys_does_not_change_the_error(order: list[str], present: set[str]) -> None:
    values = {"model": "m", "ttl": 60, "parallel": 0, "context_length": "x"}
    body = {key: values[key] for key in order if key in present}
    expected = (
        MissingParameter
        if "model" not in present
        else UnrecognizedKeys
        if "ttl" in present
        else InvalidType
        if "context_length" in present
        else InvalidValue
        if "parallel" in present
        else None
    )
    if expected is None:
        assert load(body) == LoadRequest(model="m")
    else:
        assert type(refused(body)) is expected


# ---- numbers


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("text", ["8.0", "8.00", "8e0", "0.8e1", "80E-1"])
def test_a_whole_float_is_an_integer(field: str, text: str) -> None:
    value = getattr(load(f'{{"model": "m", "{field}": {text}}}'.encode()), field)
    assert (value, type(value)) == (8, int)


@given(st.integers(1, 2**31 - 1))
def test_every_whole_float_keeps_its_value(n: int) -> None:
    assert load({"model": "m", "context_length": float(n)}).context_length == n


@pytest.mark.parametrize("field", BOOLEANS)
@pytest.mark.parametrize("text", ["1.0", "1", "0", '"true"', "null"])
def test_a_boolean_is_true_or_false(field: str, text: str) -> None:
    assert isinstance(refused(f'{{"model": "m", "{field}": {text}}}'.encode()), InvalidType)


@pytest.mark.parametrize("digits", [19, 20, 100, 308, 309, 4299, 4300, 4301, 5000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_an_integer_of_any_length_is_accepted_or_refused(digits: int, sign: str) -> None:
    is_decided(f'{{"model": "m", "eval_batch_size": {sign}{"9" * digits}}}'.encode())


@pytest.mark.parametrize("field", ["eval_batch_size", "num_experts", "context_length"])
@pytest.mark.parametrize("text", ["1e300", "18446744073709551616", "1e20"])
def test_an_integer_too_large_for_a_record_is_refused(field: str, text: str) -> None:
    """msgpack integers have 64 bits: a larger value would fail as an internal error when the record is written."""
    assert isinstance(refused(f'{{"model": "m", "{field}": {text}}}'.encode()), InvalidValue)


@pytest.mark.parametrize("text", ["0.0", "-1.0", "-0.0"])
def test_a_whole_float_out_of_range_is_refused(text: str) -> None:
    assert isinstance(refused(f'{{"model": "m", "context_length": {text}}}'.encode()), InvalidValue)


def test_parallel_accepts_its_bounds() -> None:
    assert [load({"model": "m", "parallel": n}).parallel for n in (1, 64)] == [1, 64]


# ---- strings and keys


def test_the_last_of_two_equal_keys_counts() -> None:
    assert load(b'{"model": "a", "model": "b"}') == LoadRequest(model="b")
    assert isinstance(refused(b'{"model": "a", "model": 1}'), InvalidType)


@pytest.mark.parametrize("model", ["", "p/m@q4_k_m", "P/M", "mod\u00e8le", "\U0001f9f2", "a\x00b", "x" * 10_000])
def test_any_string_is_decoded_as_a_model_key(model: str) -> None:
    assert load({"model": model}).model == model


def test_a_field_may_be_left_out_but_not_null() -> None:
    assert load({"model": "m"}) == LoadRequest(model="m")
    for field in FIELDS:
        assert isinstance(refused({"model": "m", field: None}), InvalidType), field


# ---- the body itself


def request(body: list[bytes], content_type: str | None, *encodings: str) -> tuple[Request, list[bytes]]:
    """Return a request whose body comes in chunks, and the list of chunks that were not received yet."""
    rest = list(body)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": rest.pop(0), "more_body": bool(rest)}

    headers = [] if content_type is None else [(b"content-type", content_type.encode("latin-1"))]
    headers += [(b"content-encoding", encoding.encode()) for encoding in encodings]
    return Request(
        {"type": "http", "method": "POST", "headers": headers, "state": {"bodies": Bodies(), "caller": ""}}, receive
    ), rest


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON", "application/json; charset=utf-8", " application/json ;"]
)
async def test_a_json_body_is_read(content_type: str) -> None:
    assert await read_body(request([b"{", b"}"], content_type)[0]) == b"{}"


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/jsonl", "text/json", "application/x\xff"]
)
async def test_a_body_of_another_content_type_is_not_read(content_type: str | None) -> None:
    http_request, rest = request([b"{}"], content_type)
    with pytest.raises(UnsupportedMediaType, match="must be application/json"):
        await read_body(http_request)
    assert rest == [b"{}"]


@pytest.mark.parametrize("encodings", [("gzip",), ("br",), ("identity, gzip",), ("identity", "deflate")])
async def test_a_compressed_body_is_not_read(encodings: tuple[str, ...]) -> None:
    http_request, rest = request([b"\x1f\x8b"], "application/json", *encodings)
    with pytest.raises(UnsupportedEncoding, match="must not be compressed") as caught:
        await read_body(http_request)
    assert rest
    answer = reply(caught.value, paths.LOAD)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")


@pytest.mark.parametrize("encodings", [("",), ("identity",), ("Identity",), ("identity, identity",), ("identity", "")])
async def test_a_body_without_an_encoding_is_read(encodings: tuple[str, ...]) -> None:
    assert await read_body(request([b"{}"], "application/json", *encodings)[0]) == b"{}"


async def test_a_body_is_read_up_to_its_limit() -> None:
    assert len(await read_body(request([b" " * MAX_BODY_BYTES], "application/json")[0])) == MAX_BODY_BYTES
    http_request, rest = request([b" " * MAX_BODY_BYTES, b" ", b"never read"], "application/json")
    with pytest.raises(BodyTooLarge):
        await read_body(http_request)
    assert rest == [b"never read"]


async def test_a_body_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.decode.BODY_S", 0.01)
    http_request, _ = request([], "application/json")

    async def receive() -> dict[str, Any]:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    http_request._receive = receive
    with pytest.raises(BodyTooSlow, match=r"did not arrive within 0\.01 s"):
        await read_body(http_request)


async def test_the_bodies_that_are_being_read_are_limited() -> None:
    """A client may send many of them, and the last byte of none."""
    bodies = Bodies(100)
    with bodies.reading("") as one, bodies.reading("") as other:
        one(60)
        other(40)
        http_request, rest = request([b"{}", b"never read"], "application/json")
        http_request.scope["state"]["bodies"] = bodies
        with pytest.raises(TooManyWaiting, match="too many large bodies"):
            await read_body(http_request)
        assert rest == [b"never read"]
    assert bodies.taken.total() == 0


@pytest.mark.parametrize("body", ['{"model": ""}', '{"model": "", "revision": ""}'])
def test_an_invalid_value_of_a_required_field_is_refused(body: str) -> None:
    with pytest.raises(InvalidValue, match="'model': "):
        decode(body.encode(), DownloadRequest, LOAD)
