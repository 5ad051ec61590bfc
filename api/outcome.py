"""What became of each request to a model: one line in the log, when the request has ended.

The line has numbers and names of this server, and nothing that a client wrote or a model answered.  It is also the
record of the request's span: the ids of the span and its parent, and how long it took.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from msgspec import UNSET
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access import ACCESS
from api.channel.answer import Answer
from shared.errors import ErrorBody, ServiceError
from shared.instance import Instance
from shared.telemetry import log

PATHS = frozenset(path for (method, path), access in ACCESS.items() if method == "POST" and access == "infer")

_log = log.get("api")


@dataclass(slots=True)
class Outcome:
    """What is known of a request.  A request that was sent again has the outcome of its last attempt."""

    name: str = ""  # "completed", "cancelled", or the code of an error
    instance: Instance | None = None
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def answered(self, instance: Instance, answer: Answer) -> None:
        """Note the end of an answer.  A request may have several, whose tokens and times are added up."""
        self.name, self.instance, usage = answer.outcome, instance, answer.usage
        if usage is not None:
            self.tokens.update(
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                generated_tokens=usage.generated_tokens,
            )
            for name in ("wait_s", "prompt_s", "generation_s"):
                self.seconds[name] += getattr(usage, name)
            return
        if answer.prompt_tokens:  # a request that generates nothing has none
            self.tokens.update(prompt_tokens=answer.prompt_tokens)
        if answer.cached_tokens is not None:
            self.tokens.update(cached_tokens=answer.cached_tokens)

    def refused(self, error: ErrorBody) -> None:
        """Note the error of the reply.  What the answer had is kept if that is more precise."""
        if not self.name or error.type != ServiceError.type:
            self.name = error.type if error.code is UNSET else error.code


_outcome: ContextVar[Outcome | None] = ContextVar("outcome", default=None)


def current() -> Outcome:
    """Return the outcome of the request that this task works for.  Outside of a request, what is noted is forgotten.

    It travels as the ids of log lines do: a request is refused, answered and left in many places.
    """
    return _outcome.get() or Outcome()


class Logged:
    """Middleware: writes the line of each request to a model."""

    def __init__(self, app: ASGIApp, names: Mapping[str, str]) -> None:
        """`names` has the names of clients' tokens."""
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        outcome = Outcome()
        _outcome.set(outcome)

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception:
            outcome.name = ServiceError.type
            status = status or 500  # of the reply that is sent further out
            raise
        finally:
            token = self.names.get(scope["state"].get("caller", ""))
            _log.info(
                "request ended",
                action="request_ended",
                route=scope["path"],
                outcome=outcome.name or ("completed" if 200 <= status < 300 else "cancelled"),
                status=status,
                **({} if outcome.instance is None else {"model": outcome.instance.key, **outcome.instance.ids}),
                **({} if token is None else {"token": token}),
                **outcome.tokens,
                **{name: round(value, 4) for name, value in outcome.seconds.items()},
                seconds=round(time.monotonic() - began, 4),
            )
