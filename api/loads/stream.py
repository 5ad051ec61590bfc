"""Server-sent events of a load: one event per revision of its record, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractContextManager, aclosing
from types import MappingProxyType

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.loads.follow import Follower
from api.loads.jobs import event, is_over
from shared.errors import QueueUnavailable
from shared.instance import Instance
from shared.race import first, racing
from shared.schema.http import LoadError, LoadEvent
from shared.store.connection import UNAVAILABLE

HEARTBEAT_S = 10.0  # interval of comments, because proxies close silent connections
LAST_WORDS_S = 0.5  # to send the last data when the process closes


class EventStream(StreamingResponse):
    """Sends the events of a load to one client and occupies `place` meanwhile.  Ends soon after `closing` is set.

    Calls `left` if the client disconnects or `closing` is set before the end.

    The kernel disconnects a client that does not read (`cli.listener`).
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        place: AbstractContextManager[object],
        closing: asyncio.Event,
        headers: Mapping[str, str] = MappingProxyType({}),
        left: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        self.place, self.closing, self.left = place, closing, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream.  Starlette's method cancels repeatedly, which would interrupt the cleanup of `events`."""
        with self.place:
            async with racing(self.stream_response(send), self.closing.wait(), self._gone(receive)) as (
                streaming,
                closing,
                gone,
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


async def events(
    follower: Follower,
    instance: Instance,
    after: str,
    closing: asyncio.Event,
    left: Callable[[], None] = lambda: None,
) -> AsyncGenerator[bytes, None]:
    """Yield the events after entry `after` of the log of a load, and comments, up to the terminal event.

    The stream ends without a terminal event if this process closes or Redis does not answer: the client reconnects,
    with the id of the last event, to this or another process.  If Redis has lost the record, an error is the last
    event.  Calls `left` if Redis does not answer.
    """
    async with aclosing(follower.follow(instance, after)) as revisions, racing(closing.wait()) as (ending,):
        try:
            while not ending.done():
                async with racing(anext(revisions, None)) as (coming,):
                    while not await first((coming, ending), HEARTBEAT_S):
                        yield b": nothing new\n\n"
                    if not coming.done():
                        yield b": shutting down\n\n"
                        return
                    step = coming.result()
                next_event = step and event(step[1])
                if step is None or next_event is None:
                    return
                yield encode(next_event, step[0])
                if is_over(step[1]):
                    return
        except UNAVAILABLE:
            left()
            yield b": the queue (Redis) does not answer\n\n"
        except QueueUnavailable as e:
            yield encode(LoadError(error=e.body()))


def encode(load_event: LoadEvent, entry: str = "") -> bytes:
    """Encode an event in the format of server-sent events.  Its name is the `type` of its data."""
    data = msgspec.json.encode(load_event)
    name = type(load_event).__struct_config__.tag
    return (f"id: {entry}\n" if entry else "").encode() + b"event: %b\ndata: %b\n\n" % (str(name).encode(), data)
