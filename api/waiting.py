"""Replies that take a while: they end with the work, with the client, or with this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.state import State
from shared.errors import QueueUnavailable
from shared.race import first, racing

HEARTBEAT_S = 10.0  # interval of comments, because proxies close silent connections
LAST_WORDS_S = 0.5  # to send the last data when the process closes

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Sends events to one client, and holds `held` meanwhile.  Ends soon after `closing` is set.

    Calls `left` if the client disconnects or `closing` is set before the end.

    The kernel disconnects a client that does not read (`cli.listener`).
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        held: AbstractAsyncContextManager[object],
        closing: asyncio.Event,
        headers: Mapping[str, str] = MappingProxyType({}),
        left: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache, no-store", "X-Accel-Buffering": "no", **headers})
        self.held, self.closing, self.left = held, closing, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream.  Starlette's method cancels repeatedly, which would interrupt the cleanup of `events`."""
        async with (
            self.held,
            racing(self.stream_response(send), self.closing.wait(), self._gone(receive)) as (
                streaming,
                closing,
                gone,
            ),
        ):
            await first((streaming, closing, gone))
            if self.closing.is_set():
                if not gone.done():
                    self.left()
                await first((streaming,), LAST_WORDS_S)
        if not streaming.cancelled():
            streaming.result()

    async def _gone(self, receive: Receive) -> None:
        await self.listen_for_disconnect(receive)
        self.left()


def encoded(event: Struct) -> bytes:
    """Return an event of a stream: its name is the tag of its type."""
    return b"event: %b\ndata: %b\n\n" % (str(event.__struct_config__.tag).encode(), msgspec.json.encode(event))


async def waited_for(
    request: Request[State], work: Coroutine[Any, Any, T], left: Callable[[], None] = lambda: None
) -> T:
    """Return the result of `work`; call `left` and stop waiting if the client disconnects or this process closes.

    A load itself goes on, since its worker runs it.  Raises what `work` raises,
    ClientDisconnect and QueueUnavailable.
    """
    async with racing(work, request.state["closing"].wait(), _gone(request, left)) as (working, closing, gone):
        await first((working, closing, gone))
        if working.done():
            return working.result()
        if gone.done():
            raise ClientDisconnect  # not an outcome of the work
        left()
        raise QueueUnavailable("The server is shutting down. Loads that it has accepted continue.")


async def _gone(request: Request[State], left: Callable[[], None]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    left()  # at once: the client may be sending its request again
