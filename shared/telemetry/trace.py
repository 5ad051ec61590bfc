"""W3C Trace Context, level 1 (https://www.w3.org/TR/trace-context-1/): propagation of traces.

Only the header `traceparent` is supported; `tracestate` is for tracing vendors and may be dropped.
"""

from __future__ import annotations

import re
import secrets

import msgspec
from msgspec import Struct

FORM = re.compile(r"(?P<version>[0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?P<more>-.*)?")
SAMPLED = 0x01  # the only flag of version 00; other flags must be set to zero (3.2.2.5)


class Trace(Struct, frozen=True):
    """A trace and its current span, which is the parent of the next span."""

    trace_id: str
    span_id: str
    is_sampled: bool = False  # traces that start here are not sampled: no spans are recorded
    parent_id: str = ""  # of the span, "" if it is not known

    def child(self) -> Trace:
        """Return the same trace with a new span."""
        return msgspec.structs.replace(self, span_id=secrets.token_hex(8), parent_id=self.span_id)

    @property
    def ids(self) -> dict[str, str]:
        """The ids for log lines, under their OpenTelemetry names ("Trace Context in non-OTLP Log Formats")."""
        parent = {"parent_span_id": self.parent_id} if self.parent_id else {}
        return {"trace_id": self.trace_id, "span_id": self.span_id, **parent}

    def __str__(self) -> str:
        """Return the value of a `traceparent` header."""
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.is_sampled else 0:02x}"


def parse(traceparent: str) -> Trace | None:
    """Parse a `traceparent`; return None if it is invalid.

    Versions after 00 may append fields; the first four fields must have the same form (3.2.4).
    """
    match = FORM.fullmatch(traceparent)
    if match is None or match["version"] == "ff" or (match["version"] == "00" and match["more"]):
        return None
    _, trace_id, span_id, flags, _ = match.groups()
    if not trace_id.strip("0") or not span_id.strip("0"):  # all zeros are invalid
        return None
    return Trace(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def root() -> Trace:
    """Start a new trace."""
    return Trace(secrets.token_hex(16), secrets.token_hex(8))


def continued(traceparents: list[str]) -> Trace:
    """Start a span in the trace of the request; in a new trace unless there is exactly one header, which is valid."""
    parent = parse(traceparents[0]) if len(traceparents) == 1 else None
    return parent.child() if parent else root()
