"""The `traceparent` header, by the W3C recommendation and examples of its test suite (w3c/trace-context)."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.telemetry.trace import Trace, continued, parse, root

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE_ID}-{SPAN_ID}-01"
PIECES = st.sampled_from(
    ["00", "01", "ff", "cc", TRACE_ID, SPAN_ID, "0" * 32, "0" * 16, "-", "--", "g", "A", "\n", "٣"]
)
HEX = "0123456789abcdef"


def ids(length: int) -> st.SearchStrategy[str]:
    return st.text(HEX, min_size=length, max_size=length).filter(lambda text: bool(text.strip("0")))


TRACES = st.builds(Trace, ids(32), ids(16), st.booleans())


@pytest.mark.parametrize(
    ("header", "is_sampled"),
    [
        (HEADER, True),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", False),
        (f"00-{TRACE_ID}-{SPAN_ID}-03", True),  # other flags may be set and are ignored
        (f"00-{TRACE_ID}-{SPAN_ID}-fe", False),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01", True),  # later versions
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-", True),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-the-future-will-be-like", True),
    ],
)
def test_a_valid_header_is_parsed(header: str, is_sampled: bool) -> None:
    assert parse(header) == Trace(TRACE_ID, SPAN_ID, is_sampled)


@pytest.mark.parametrize(
    "header",
    [
        "",
        f"ff-{TRACE_ID}-{SPAN_ID}-01",  # the invalid version
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID.upper()}-01",
        f"00-{TRACE_ID[:-1]}.-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID[:-1]}.-01",
        f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
        f"00-{TRACE_ID}0-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID[:-1]}-01",
        f"00-{TRACE_ID}-{SPAN_ID}0-01",
        f"00-{TRACE_ID}-{SPAN_ID}-1",
        f"00-{TRACE_ID}-{SPAN_ID}-001",
        f"00-{TRACE_ID}-{SPAN_ID}-.0",
        f"0-{TRACE_ID}-{SPAN_ID}-01",
        f".0-{TRACE_ID}-{SPAN_ID}-01",
        f"000-{TRACE_ID}-{SPAN_ID}-01",
        f"00{TRACE_ID}{SPAN_ID}01",
        f"00-{TRACE_ID}-{SPAN_ID}",
        f"00-{TRACE_ID}-{SPAN_ID}-01-",  # version 00 has no further fields
        f"00-{TRACE_ID}-{SPAN_ID}-01-what-the-future-will-be-like",
        f"cc-{TRACE_ID}-{SPAN_ID}-01.what-the-future-will-not-be-like",
        f"{HEADER}\n",
        f" {HEADER}",
        f"{HEADER},{HEADER}",
    ],
)
def test_an_invalid_header_starts_a_new_trace(header: str) -> None:
    assert parse(header) is None
    assert continued([header]).trace_id != TRACE_ID


@given(st.text() | st.lists(PIECES, max_size=10).map("".join))
@example("00-٣bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01")
def test_any_header_is_parsed_exactly_or_refused(header: str) -> None:
    trace = parse(header)
    if trace is not None:
        assert str(trace)[2:-3] == header[2:52]


@given(TRACES)
def test_a_written_trace_is_parsed_again(trace: Trace) -> None:
    assert parse(str(trace)) == trace


@given(TRACES)
def test_a_request_gets_its_own_span_in_the_callers_trace(trace: Trace) -> None:
    own = continued([str(trace)])
    assert (own.trace_id, own.is_sampled) == (trace.trace_id, trace.is_sampled)
    assert own.span_id != trace.span_id


@pytest.mark.parametrize("headers", [[], [HEADER, HEADER]])
def test_no_header_or_two_headers_start_a_new_trace(headers: list[str]) -> None:
    first, second = continued(headers), continued(headers)
    assert len({TRACE_ID, first.trace_id, second.trace_id}) == 3
    assert parse(str(first)) == first


def test_a_new_trace_is_valid_and_not_sampled() -> None:
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", str(root()))
