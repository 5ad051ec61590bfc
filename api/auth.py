"""Authentication: bearer tokens if any are configured, otherwise a check of the Host header."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from api.errors import reply
from shared import paths
from shared.errors import ForbiddenHost, InvalidAPIKey
from shared.settings import is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({paths.HEALTHZ, paths.READYZ})


class Auth:
    """Middleware that refuses requests without authorization.

    If tokens are configured, all paths except the health checks require one.  Tokens are compared as digests in
    constant time and never logged.  Without tokens, and if the API listens on loopback only, the Host header must name
    loopback: otherwise a web page could make a browser send requests under the name of its own site (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, tokens: frozenset[bytes], loopback: bool) -> None:
        self.app = app
        self.digests = [hashlib.sha256(token).digest() for token in tokens]
        self.check_host = loopback and not tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if self.check_host and not _names_loopback(headers.get("host", "")):
                error = ForbiddenHost(
                    "The Host header must be a loopback name, such as localhost or 127.0.0.1. "
                    "To allow other names, configure API tokens."
                )
                await reply(error)(scope, receive, send)
                return
            if self.digests and scope["path"] not in OPEN_PATHS:
                problem = self._refusal(headers.get("authorization"))
                if problem is not None:
                    await reply(InvalidAPIKey(problem))(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _refusal(self, authorization: str | None) -> str | None:
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return "A bearer token is required: send the header 'Authorization: Bearer TOKEN'."
        digest = hashlib.sha256(token.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return None if any(matches) else "The bearer token is invalid."


@lru_cache(maxsize=256)  # clients send few different ones
def _names_loopback(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
