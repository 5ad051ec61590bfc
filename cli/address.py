"""The URL of a server, from what a person types."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from urllib.parse import quote, urlsplit

PORT = 1234  # where a server listens by default
API = re.compile(r"(/api)?/v[01]/*$")  # the end of a base URL that other clients want


def url_of(text: str) -> str | None:
    """Return the URL of a server without a path of the API, or None if the text is none.

    Without a scheme, the text is a host with or without a port, and means http and PORT.  A URL with a scheme has the
    port of that scheme.  A password is refused, since messages show the URL.
    """
    with suppress(ValueError):
        if ipaddress.ip_address(text).version == 6:
            text = f"[{text}]"
    is_host = "://" not in text
    try:
        parts = urlsplit(f"http://{text}" if is_host else text)
        port = parts.port
        host = _host(parts.hostname or "")
    except ValueError:  # of which UnicodeError is one
        return None
    has_more = parts.username is not None or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not host or has_more or port == 0 or _has_spaces(text):
        return None
    if is_host and port is None:
        port = PORT
    path = API.sub("", quote(parts.path, safe="/%:@!$&'()*+,;=~")).rstrip("/")
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"


def _host(name: str) -> str:
    """Return a host name in ASCII, an IPv6 address in brackets.  Raises ValueError, also for a number, as a port."""
    if ":" in name:
        return f"[{ipaddress.IPv6Address(name)}]"
    if name.isdigit():
        raise ValueError("not a host")
    return name.encode("idna").decode()


def _has_spaces(text: str) -> bool:
    """Return whether a text has white space or control characters, which `urlsplit` removes in silence."""
    return any(character.isspace() or not character.isprintable() for character in text)
