"""Authentication: bearer tokens if any are configured, otherwise a check of the Host header."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from api.access import OPEN_PATHS
from api.errors import is_below, reply
from shared import paths
from shared.errors import ForbiddenHost, InvalidAPIKey, InvalidRequest, InvalidValue
from shared.settings import is_loopback
from shared.tokens import Token, digest

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

KEY_PATHS = (paths.MESSAGES, paths.V1_MODELS)  # where clients of Anthropic's API send the token as X-API-Key


class Auth:
    """Middleware that refuses requests without authorization.

    If tokens are configured, all paths except those in OPEN_PATHS require one.  Tokens are compared as digests in
    constant time and never logged.  Whether the scope of a token suffices is for the route to say (`api.access`).
    Without tokens, and if the API listens on loopback only, the Host header must name loopback: otherwise a web page
    could make a browser send requests under the name of its own site (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[Token], loopback: bool) -> None:
        self.app = app
        self.tokens = tokens
        self.check_host = loopback and not tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers, path = Headers(scope=scope), scope["path"]
            known = [token for sent in _sent(headers, path) if (token := self._known(sent)) is not None]
            error = self._refusal(headers, path, is_known=bool(known))
            if error is not None:
                await reply(error, path)(scope, receive, send)
                return
            state = scope.setdefault("state", {})
            state["caller"] = known[0].client if known else ""
            state["scope"] = known[0].scope if known else "manage"
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str, *, is_known: bool) -> InvalidRequest | None:
        is_open = path in OPEN_PATHS
        hosts = headers.getlist("host")
        if len(hosts) > 1:  # RFC 9112, 3.2: a proxy in front may have checked another one
            return InvalidValue(f"'Host': expected one header, got {len(hosts)}.", param="Host")
        is_probe = is_open and not hosts  # of HTTP/1.0, which needs no Host; a browser always sends one
        if self.check_host and not is_probe and not _names_loopback("".join(hosts)):
            return ForbiddenHost(
                "The Host header must be a loopback name, such as localhost or 127.0.0.1. "
                "To allow other names, configure API tokens."
            )
        if is_open or not self.tokens:
            return None
        if not _sent(headers, path):
            also = " or 'X-API-Key: TOKEN'" if is_below(path, KEY_PATHS) else ""
            return InvalidAPIKey(f"A bearer token is required: send the header 'Authorization: Bearer TOKEN'{also}.")
        return None if is_known else InvalidAPIKey("The bearer token is invalid.")

    def _known(self, sent: str) -> Token | None:
        its = digest(sent)
        matches = [token for token in self.tokens if hmac.compare_digest(its, token.digest)]
        return matches[0] if matches else None


def _sent(headers: Headers, path: str) -> list[str]:
    """Return the tokens that a client sent."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = headers.get("x-api-key", "") if is_below(path, KEY_PATHS) else ""
    return [sent for sent in (token.strip() if scheme.lower() == "bearer" else "", key.strip()) if sent]


@lru_cache(maxsize=256)  # clients send few different ones
def _names_loopback(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
