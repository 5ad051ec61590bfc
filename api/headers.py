"""What a request asks for outside its body: preferences, event streams, keys for safe retries, query parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from msgspec import Struct
from starlette.datastructures import QueryParams

from shared.errors import InvalidType, InvalidValue

LONGEST_WAIT_S = 300
USUAL_JOBS, MOST_JOBS = 100, 1000  # of a list
PREFERENCE = re.compile(r'(?:"[^"]*+"|[^",]++|")++')  # up to a comma that is not quoted
FIRST = "0"  # before any entry of a log
ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}", re.ASCII)


class Preference(Struct, frozen=True, kw_only=True):
    """How long a client would wait for a reply (RFC 7240); None: until the end.  `applied` says which were heard."""

    wait_s: int | None = None
    applied: str = ""


def preference(headers: Iterable[str]) -> Preference:
    """What the Prefer headers ask for: the first of each name counts, one that cannot be read is ignored."""
    found: dict[str, str] = {}
    for text in PREFERENCE.findall(",".join(headers)):
        name, _, value = text.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), re.sub(r'^"(.*)"$', r"\1", value.strip()))
    applied = ["respond-async"] if found.get("respond-async") == "" else []
    wait_s = 0 if applied else None
    if re.fullmatch(r"[0-9]+", found.get("wait", "")):
        wait_s = min(_number(found["wait"]), LONGEST_WAIT_S)
        applied.append(f"wait={wait_s}")
    return Preference(wait_s=wait_s, applied=", ".join(applied))


def accepts_events(accept: Iterable[str]) -> bool:
    """Whether the Accept headers name an event stream, and do not refuse it."""
    for text in ",".join(accept).split(","):
        media_type, *parameters = (part.strip().lower() for part in text.split(";"))
        if media_type == "text/event-stream":
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


def instance_ids(ids: Iterable[str]) -> str:
    """A list of ids as a header's value: what is not visible ASCII, a comma or a percent sign is percent-encoded."""
    return ", ".join(quote(id_, safe="!#$&'()*+/:;=?@[]^`{|}~\"<>\\") for id_ in ids)


def idempotency_key(headers: list[str]) -> str:
    """The Idempotency-Key, "" where there is none.  Raises InvalidValue."""
    if not headers:
        return ""
    if len(headers) > 1 or not re.fullmatch(r"[!-~]{1,255}", headers[0]):
        raise InvalidValue(
            "'Idempotency-Key': expected one of 1 to 255 visible ASCII characters.", param="Idempotency-Key"
        )
    return headers[0]


def last_event_id(header: str | None) -> str:
    """The entry of a load's log after which to go on: the first one where the header names none."""
    if header is None or not ENTRY_ID.fullmatch(header) or any(int(n) >= 1 << 64 for n in header.split("-")):
        return FIRST
    return header


def is_after(entry: str, other: str) -> bool:
    """Whether one entry of a log comes after another."""
    return [int(n) for n in entry.split("-")] > [int(n) for n in other.split("-")]


def whole_number(query: QueryParams, name: str, default: int, lowest: int, highest: int) -> int:
    """A query parameter; more than `highest` counts as that.  Raises InvalidType and InvalidValue."""
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
    """An integer; one of more than 18 digits only keeps its sign, and is still a large one."""
    digits = text.lstrip("-0")[:18] or "0"
    return -int(digits) if text.startswith("-") else int(digits)


def one_of(query: QueryParams, name: str, allowed: tuple[str, ...]) -> Any:
    """A query parameter that is one of `allowed`, None where it is not given.  Raises InvalidValue."""
    text = query.get(name)
    if text is not None and text not in allowed:
        raise InvalidValue(f"'{name}': expected one of {', '.join(allowed)}, got '{text}'.", param=name)
    return text
