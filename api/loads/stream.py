"""Server-sent events: the log of a load, one event for each revision, in the order in which they were written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing

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

HEARTBEAT_S = 10.0  # a comment this often while nothing happens, for proxies that cut what is silent
LAST_WORDS_S = 0.5  # for what is still to be sent when the process comes to its end


class EventStream(StreamingResponse):
    """Sends the events of a load to one client, and holds `place` meanwhile; ends soon after `closing` is set.

    The kernel cuts off a client that takes nothing (`cli.listener`).
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], place: AbstractContextManager[object], closing: asyncio.Event
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.place, self.closing = place, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Not Starlette's: its task group cancels again and again, and would interrupt the cleaning up of `events`."""
        with self.place:
            async with racing(self.stream_response(send), self.closing.wait(), self.listen_for_disconnect(receive)) as (
                streaming,
                closing,
                gone,
            ):
                await first((streaming, closing, gone))
                if self.closing.is_set():
                    await first((streaming,), LAST_WORDS_S)
        if not streaming.cancelled():
            streaming.result()


async def events(
    follower: Follower, instance: Instance, after: str, closing: asyncio.Event
) -> AsyncGenerator[bytes, None]:
    """Yield the events since entry `after` of a load's log, with comments in between, up to the terminal one.

    Without a terminal one it ends when this process ends or Redis does not answer: the client reconnects with the id
    that it saw last, to this or another process.  If Redis lost the record, the last event is an error.
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
                found = step and event(step[1])
                if step is None or found is None:
                    return
                yield encode(found, step[0])
                if is_over(step[1]):
                    return
        except UNAVAILABLE:
            yield b": the queue (Redis) does not answer\n\n"
        except QueueUnavailable as e:
            yield encode(LoadError(error=e.body()))


def encode(found: LoadEvent, entry: str = "") -> bytes:
    """Return an event as it goes over the wire; its name is the `type` of its data."""
    data = msgspec.json.encode(found)
    name = type(found).__struct_config__.tag
    return (f"id: {entry}\n" if entry else "").encode() + b"event: %b\ndata: %b\n\n" % (str(name).encode(), data)
