"""Headers and query parameters of a request: any value is parsed, ignored or refused."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from api.headers import (
    LONGEST_WAIT_S,
    Preference,
    accepts_events,
    idempotency_key,
    last_event_id,
    one_of,
    preference,
    whole_number,
)
from shared.errors import InvalidType, InvalidValue

# valid preferences and fragments of preferences
PIECES = st.sampled_from(["wait", "respond-async", *'=,;"\\\t 07²٣é\x00', "300", "99999999999999"])
HEADERS = st.lists(st.text() | st.lists(PIECES, max_size=12).map("".join), max_size=4)


# ---- Prefer


def test_without_a_preference_a_request_waits_for_the_end() -> None:
    assert preference([]) == Preference(wait_s=None, applied="")


@pytest.mark.parametrize(
    ("headers", "wait_s", "applied"),
    [
        (["respond-async"], 0, "respond-async"),
        (["wait=10"], 10, "wait=10"),
        (["wait=0"], 0, "wait=0"),
        (["wait=007"], 7, "wait=7"),
        (["respond-async, wait=10"], 10, "respond-async, wait=10"),
        (["wait=10, respond-async"], 10, "respond-async, wait=10"),
        (["respond-async, wait=0"], 0, "respond-async, wait=0"),
        (["Respond-Async"], 0, "respond-async"),
        (["WAIT=10"], 10, "wait=10"),
        (["  respond-async\t, \twait = 10  "], 10, "respond-async, wait=10"),
        ([",, ,respond-async,"], 0, "respond-async"),
        (["respond-async", "wait=10"], 10, "respond-async, wait=10"),
        (["return=minimal", "", "wait=10"], 10, "wait=10"),
        (['wait="10"'], 10, "wait=10"),
        (['respond-async=""'], 0, "respond-async"),
        (["respond-async; foo=bar; baz"], 0, "respond-async"),
        (['wait=10; foo="bar"'], 10, "wait=10"),
        (["wait=10 ;foo"], 10, "wait=10"),
        (["respond-async;wait=10"], 0, "respond-async"),  # a parameter of a preference is not a preference
        (["foo; respond-async, wait=10"], 10, "wait=10"),
        (['foo="respond-async; wait=1"'], None, ""),
        (["respond-asynchronous, await=10, wait-=10"], None, ""),
    ],
)
def test_preferences_are_parsed_as_rfc_7240_defines(headers: list[str], wait_s: int | None, applied: str) -> None:
    assert preference(headers) == Preference(wait_s=wait_s, applied=applied)


@pytest.mark.parametrize("headers", [["wait=5, wait=10"], ["wait=5", "wait=10"], ["Wait=5", "wAIT=10"]])
def test_the_first_of_several_equal_preferences_counts(headers: list[str]) -> None:
    assert preference(headers).wait_s == 5


@pytest.mark.parametrize("value", ["301", "86400", "9" * 11, "9" * 12, "1" + "0" * 12, "9" * 5000])
def test_a_too_long_wait_is_shortened_and_reported(value: str) -> None:
    assert preference([f"wait={value}"]) == Preference(wait_s=300, applied="wait=300")
    assert preference(["wait=300"]).wait_s == 300 == LONGEST_WAIT_S


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.5", "1e2", "0x10", "1_0", "soon", "²", "٣", '"10', '10"', "1 0"])
def test_an_invalid_wait_is_ignored(value: str) -> None:
    assert preference([f"wait={value}"]) == Preference(wait_s=None, applied="")
    assert preference([f"respond-async, wait={value}"]) == Preference(wait_s=0, applied="respond-async")


@pytest.mark.parametrize(
    "junk", ["=", "=5", "@", "wait:5", "re spond", "\x00", "é", "respond-async)", '"respond-async"']
)
def test_an_invalid_preference_is_ignored(junk: str) -> None:
    assert preference([junk]) == Preference()
    assert preference([junk, "wait=10"]) == preference([f"{junk}, wait=10"]) == preference(["wait=10"])


@given(headers=HEADERS)
@example(headers=["wait=" + "9" * 100_000])
def test_any_preference_gives_a_bounded_wait(headers: list[str]) -> None:
    parsed = preference(headers)
    applied = parsed.applied.split(", ") if parsed.applied else []
    assert parsed.wait_s is None or 0 <= parsed.wait_s <= 300
    assert (parsed.wait_s is None) == (applied == [])
    assert set(applied) <= {"respond-async", f"wait={parsed.wait_s}"}


@pytest.mark.parametrize("text", ['wait={}"', 'wait{}"', 'wait{0}={0}"'])
def test_a_long_header_is_parsed_quickly(text: str) -> None:
    """Parsing blocks the event loop, and uvicorn accepts headers of any size."""

    def cpu_seconds(length: int) -> float:
        header = text.format(" " * length)
        began = time.process_time()
        preference([header])
        return time.process_time() - began

    short_s = min(cpu_seconds(4_000) for _ in range(5))
    assert cpu_seconds(40_000) < 30 * short_s + 0.001, "ten times the length takes about ten times as long"


@pytest.mark.parametrize(("header", "wait_s"), [("wait=000000000000005", 5), ('foo="a, wait=5, b", wait=7', 7)])
def test_unusual_preferences_are_parsed_as_rfc_7240_defines(header: str, wait_s: int) -> None:
    assert preference([header]).wait_s == wait_s


@given(
    wait_s=st.integers(0, 300), before=st.lists(st.sampled_from(["foo", "foo=1", 'foo="bar"', "wa", ""]), max_size=3)
)
def test_a_wait_is_parsed_at_any_position(wait_s: int, before: list[str]) -> None:
    assert preference([*before, f"wait={wait_s}"]).wait_s == wait_s
    assert preference([", ".join([*before, f"wait={wait_s}"])]).wait_s == wait_s


# ---- Accept


@pytest.mark.parametrize(
    "accept",
    [
        ["text/event-stream"],
        ["Text/Event-Stream"],
        ["application/json, text/event-stream"],
        ["application/json", " text/event-stream "],
        ["text/event-stream;charset=utf-8"],
        ["text/event-stream ; q=0.5, */*"],
        ["text/event-stream;q=0.001"],
        ["text/event-stream;q=1.0"],
    ],
)
def test_accept_with_event_streams_asks_for_events(accept: list[str]) -> None:
    assert accepts_events(accept)


@pytest.mark.parametrize(
    "accept",
    [
        [],
        [""],
        ["*/*"],  # every client sends this
        ["text/*"],
        ["application/json"],
        ["text/event-stream-x"],
        ["x-text/event-stream"],
        ["application/json;x=text/event-stream"],
        ["text/event-stream;q=0"],
        ["application/json, text/event-stream; Q=0.000"],
        ["text/event-stream; charset=utf-8; q=0."],
    ],
)
def test_accept_without_event_streams_asks_for_no_events(accept: list[str]) -> None:
    assert not accepts_events(accept)


@given(accept=st.lists(st.text(), max_size=3))
def test_any_accept_header_can_be_parsed(accept: list[str]) -> None:
    assert accepts_events([*accept, "text/event-stream"]) or any("text/event-stream" in one.lower() for one in accept)


# ---- Idempotency-Key


@pytest.mark.parametrize("key", ["k", "~!", '"8e03978e-40d5"', "a,b;c=d", "x" * 255])
def test_an_idempotency_key_is_kept_as_sent(key: str) -> None:
    assert idempotency_key([key]) == key


def test_an_idempotency_key_is_optional() -> None:
    assert idempotency_key([]) == ""


@pytest.mark.parametrize("headers", [[""], [" "], ["a b"], ["x" * 256], ["é"], ["a\x7f"], ["k\n"], ["k", "k"]])
def test_an_invalid_idempotency_key_is_refused(headers: list[str]) -> None:
    with pytest.raises(InvalidValue, match="1 to 255 visible ASCII") as refused:
        idempotency_key(headers)
    assert refused.value.body().param == "Idempotency-Key"


# ---- Last-Event-ID


@pytest.mark.parametrize("header", ["0-0", "1732560000000-0", f"{2**64 - 1}-{2**64 - 1}"])
def test_a_stream_continues_after_the_last_event_id(header: str) -> None:
    assert last_event_id(header) == header


@pytest.mark.parametrize(
    "header",
    [None, "", "5", "5-", "-5", "5-5-5", "-5-5", "a-b", " 5-5", "5-5\n", "٣-٣", "$", "+", f"{2**64}-0", f"0-{2**64}"],
)
def test_an_invalid_last_event_id_means_the_start(header: str | None) -> None:
    """Redis would refuse the text as an ID, or read it as another ID."""
    assert last_event_id(header) == "0"


@given(header=st.text() | st.from_regex(r"\A\d{1,22}-\d{1,22}\Z"))
@example(header="9" * 10_000 + "-0")
def test_any_last_event_id_gives_a_valid_redis_id(header: str) -> None:
    numbers = last_event_id(header).split("-")
    assert len(numbers) <= 2
    assert all(number.isascii() and number.isdigit() and int(number) < 2**64 for number in numbers)


# ---- query parameters


def query(**fields: str) -> QueryParams:
    return QueryParams(fields)


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1), ("10", 10), ("11", 10), ("007", 7), ("9" * 39, 10), ("9" * 9000, 10)]
)
def test_a_number_above_the_maximum_counts_as_the_maximum(text: str, number: int) -> None:
    assert whole_number(query(n=text), "n", 5, 1, 10) == number


def test_a_missing_number_is_the_default() -> None:
    assert whole_number(query(m="7"), "n", 5, 1, 10) == 5


@pytest.mark.parametrize("text", ["0", "-1", "-" + "9" * 9000])
def test_a_number_below_the_minimum_is_refused(text: str) -> None:
    with pytest.raises(InvalidValue, match="'n': expected integer >= 1, got ") as refused:
        whole_number(query(n=text), "n", 5, 1, 10)
    assert refused.value.body().param == "n"


@pytest.mark.parametrize("text", ["", " ", "1.0", "1e2", "+1", "--1", "1 ", "1_0", "٣", "²", "ten"])
def test_a_text_that_is_not_a_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidType, match="'n': expected integer, got ") as refused:
        whole_number(query(n=text), "n", 5, 1, 10)
    assert refused.value.body().param == "n"


@given(text=st.text() | st.from_regex(r"\A-?[0-9]+\Z"))
def test_any_text_is_a_number_within_limits_or_refused(text: str) -> None:
    try:
        number = whole_number(query(n=text), "n", 5, 0, 300)
    except (InvalidType, InvalidValue):
        return
    assert number == min(int(text), 300) >= 0


def test_an_unknown_word_is_refused_with_the_allowed_words() -> None:
    allowed = ("queued", "loading")
    assert one_of(query(status="loading"), "status", allowed) == "loading"
    assert one_of(query(limit="1"), "status", allowed) is None
    for text in ("", "Loading", "loading,queued", "queued "):
        with pytest.raises(InvalidValue, match=f"'status': expected one of queued, loading, got '{text}'") as refused:
            one_of(query(status=text), "status", allowed)
        assert refused.value.body().param == "status"
