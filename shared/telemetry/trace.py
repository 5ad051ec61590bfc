"""W3C Trace Context, level 1 (https://www.w3.org/TR/trace-context-1/): which trace a request, and what comes of it,
belongs to.  Of its two headers only `traceparent`: `tracestate` is for vendors of tracing, who may leave it out."""

from __future__ import annotations

import re
import secrets

import msgspec
from msgspec import Struct

FORM = re.compile(r"(?P<version>[0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?P<more>-.*)?")
SAMPLED = 0x01  # the only flag of version 00; the others are to be sent on as zero (3.2.2.5)


class Trace(Struct, frozen=True):
    """A trace, and the span in it that is at work now: to the next one, its parent."""

    trace_id: str
    span_id: str
    is_sampled: bool = False  # our own are not: nothing here records spans

    def child(self) -> Trace:
        """The same trace in a span of its own."""
        return msgspec.structs.replace(self, span_id=secrets.token_hex(8))

    @property
    def ids(self) -> dict[str, str]:
        """What log lines carry, by OpenTelemetry's names for it ("Trace Context in non-OTLP Log Formats")."""
        return {"trace_id": self.trace_id, "span_id": self.span_id}

    def __str__(self) -> str:
        """As a `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.is_sampled else 0:02x}"


def parse(traceparent: str) -> Trace | None:
    """What a `traceparent` says; None where it is invalid.

    A later version than 00 may say more at its end; what it begins with has to read the same (3.2.4).
    """
    found = FORM.fullmatch(traceparent)
    if found is None or found["version"] == "ff" or (found["version"] == "00" and found["more"]):
        return None
    _, trace_id, span_id, flags, _ = found.groups()
    if not trace_id.strip("0") or not span_id.strip("0"):  # all zeros are invalid
        return None
    return Trace(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def begun() -> Trace:
    return Trace(secrets.token_hex(16), secrets.token_hex(8))


def continued(traceparents: list[str]) -> Trace:
    """A span of our own in the trace of the one who asks; in a new trace unless exactly one valid header names it."""
    parent = parse(traceparents[0]) if len(traceparents) == 1 else None
    return parent.child() if parent else begun()
