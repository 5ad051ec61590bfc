"""The answer to one request: what a runner sent and the client has not read yet."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import assert_never

from msgspec import UNSET

from shared.channel.messages import (
    Delta,
    Deltas,
    Described,
    Ended,
    Failed,
    FromRunner,
    Progress,
    Queued,
    Refused,
    Started,
    Text,
    Tokens,
    Usage,
    Vectors,
    size_of,
)
from shared.errors import ClientTooSlow, ServiceError

MOST_BYTES = 1 << 20  # of deltas that the client has not read


class Answer(AsyncIterator[FromRunner]):
    """Iterates over the messages of a request, up to Refused, Ended, Failed, or the reply to a lookup; its deltas are
    those of this request.

    Raises ServiceError, after the messages that arrived before: ModelUnloaded, RunnerLost, NoRoute or, at once,
    ClientTooSlow.
    """

    def __init__(self) -> None:
        self._messages: deque[FromRunner] = deque()
        self._bytes = 0
        self._arrived = asyncio.Event()
        self._error: ServiceError | None = None
        self.is_complete = False  # nothing more will arrive
        self.first_at: float | None = None  # when the first delta arrived, by the monotonic clock
        self.outcome = "cancelled"  # for the metrics: "completed" or why there is no complete answer
        self.usage: Usage | None = None
        self.prompt_tokens: int | None = None  # once they are counted
        self.cached_tokens: int | None = None  # once it has begun

    def put(
        self, message: Refused | Queued | Started | Progress | Vectors | Text | Tokens | Described | Ended | Failed
    ) -> None:
        """Add a message of the runner."""
        match message:
            case Refused():
                self.is_complete, self.outcome = True, message.code
                self.prompt_tokens = message.prompt_tokens or None
            case Failed():
                self.is_complete, self.outcome = True, message.code
            case Ended():
                self.is_complete, self.outcome, self.usage = True, "completed", message.usage
            case Queued():
                self.prompt_tokens = message.prompt_tokens
            case Started():
                self.cached_tokens = message.cached_tokens
            case Text() | Tokens() | Described():
                self.is_complete, self.outcome = True, "completed"
            case Progress() | Vectors():
                pass
            case _:
                assert_never(message)
        self._messages.append(message)
        self._arrived.set()

    def extend(self, deltas: list[Delta]) -> bool:
        """Add deltas of the runner, to the last ones if these were not read yet.

        Returns False if the client has left too much unread: the answer then ends.
        """
        if self.first_at is None:
            self.first_at = time.monotonic()
        self._bytes += sum(map(size_of, deltas))
        if self._bytes > MOST_BYTES:
            self._messages.clear()
            self.fail(ClientTooSlow(f"The client left more than {MOST_BYTES:,} bytes of the answer unread."))
            return False
        if self._messages and isinstance(last := self._messages[-1], Deltas):
            last.deltas.extend(deltas)
        else:
            self._messages.append(Deltas(deltas))
            self._arrived.set()
        return True

    def fail(self, error: ServiceError) -> None:
        """End the answer with an error, unless it is complete."""
        if not self.is_complete:
            self.is_complete = True
            self.outcome = error.type if error.code is UNSET else error.code
            self._error = error
            self._arrived.set()

    async def __anext__(self) -> FromRunner:
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self.is_complete:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        message = self._messages.popleft()
        if isinstance(message, Deltas):
            self._bytes = 0  # there is at most one of them
        return message
