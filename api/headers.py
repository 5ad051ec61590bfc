"""Parses request headers and query parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from msgspec import Struct
from starlette.datastructures import QueryParams

from shared.errors import InvalidType, InvalidValue

LONGEST_WAIT_S = 300
USUAL_JOBS, MOST_JOBS = 100, 1000  # default and maximum length of a list
PREFERENCE = re.compile(r'(?:"[^"]*+"|[^",]++|")++')  # up to the next comma outside of quotes
FIRST = "0"  # precedes all entries of a log
ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}", re.ASCII)


class Preference(Struct, frozen=True, kw_only=True):
    """How long a client waits for a reply (RFC 7240); None: no limit.  `applied` lists the accepted preferences."""

    wait_s: int | None = None
    applied: str = ""


def preference(headers: Iterable[str]) -> Preference:
    """Parse the Prefer headers.  The first preference of each name counts; invalid ones are ignored."""
    preferences: dict[str, str] = {}
    for text in PREFERENCE.findall(",".join(headers)):
        name, _, value = text.partition(";")[0].partition("=")
        preferences.setdefault(name.strip().lower(), re.sub(r'^"(.*)"$', r"\1", value.strip()))
    applied = ["respond-async"] if preferences.get("respond-async") == "" else []
    wait_s = 0 if applied else None
    if re.fullmatch(r"[0-9]+", preferences.get("wait", "")):
        wait_s = min(_number(preferences["wait"]), LONGEST_WAIT_S)
        applied.append(f"wait={wait_s}")
    return Preference(wait_s=wait_s, applied=", ".join(applied))


def accepts_events(accept: Iterable[str]) -> bool:
    """Return whether the Accept headers include an event stream with a quality other than 0."""
    for text in ",".join(accept).split(","):
        media_type, *parameters = (part.strip().lower() for part in text.split(";"))
        if media_type == "text/event-stream":
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


def instance_ids(ids: Iterable[str]) -> str:
    """Format ids as a header value.  Commas, percent signs and all but visible ASCII are percent-encoded."""
    return ", ".join(quote(id_, safe="!#$&'()*+/:;=?@[]^`{|}~\"<>\\") for id_ in ids)


def idempotency_key(headers: list[str]) -> str:
    """Return the Idempotency-Key, "" if there is none.  Raises InvalidValue."""
    if not headers:
        return ""
    if len(headers) > 1 or not re.fullmatch(r"[!-~]{1,255}", headers[0]):
        raise InvalidValue(
            "'Idempotency-Key': expected one header with 1 to 255 visible ASCII characters.", param="Idempotency-Key"
        )
    return headers[0]


def last_event_id(header: str | None) -> str:
    """Return the log entry after which to resume; FIRST if the header is absent or invalid."""
    if header is None or not ENTRY_ID.fullmatch(header) or any(int(n) >= 1 << 64 for n in header.split("-")):
        return FIRST
    return header


def is_after(entry: str, other: str) -> bool:
    """Return whether one log entry comes after another."""
    return [int(n) for n in entry.split("-")] > [int(n) for n in other.split("-")]


def whole_number(query: QueryParams, name: str, default: int, lowest: int, highest: int) -> int:
    """Return an integer query parameter, reduced to `highest` if greater.  Raises InvalidType and InvalidValue."""
    text = query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]+", text):
        raise InvalidType(f"'{name}': expected integer, got '{text}'.", param=name)
    number = _number(text)
    if number < lowest:
        raise InvalidValue(f"'{name}': expected integer >= {lowest}, got {text}.", param=name)
    return min(number, highest)


def _number(text: str) -> int:
    """Parse an integer.  Longer numbers are cut to 18 digits, which keeps their sign and leaves them large."""
    digits = text.lstrip("-0")[:18] or "0"
    return -int(digits) if text.startswith("-") else int(digits)


def one_of(query: QueryParams, name: str, allowed: tuple[str, ...]) -> Any:
    """Return a query parameter that must be one of `allowed`; None if it is absent.  Raises InvalidValue."""
    text = query.get(name)
    if text is not None and text not in allowed:
        raise InvalidValue(f"'{name}': expected one of {', '.join(allowed)}, got '{text}'.", param=name)
    return text
