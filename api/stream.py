"""Server-sent events: the log of a load, one event for each revision, in the order in which they were written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api.follow import Follower
from api.jobs import event, is_over
from shared import log
from shared.errors import QueueUnavailable
from shared.schema import Instance, LoadError, LoadEvent
from shared.store import UNAVAILABLE

HEARTBEAT_S = 10.0  # a comment this often while nothing happens, for proxies that cut what is silent
SEND_DEADLINE_S = 30.0  # for a reader that takes nothing; what it has not taken waits in Redis, not here


class EventStream(StreamingResponse):
    """The events of a load to one client, for which `place` is held."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], place: AbstractContextManager[object]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.events, self.place = events, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.place:
            async with aclosing(self.events):
                await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_DEADLINE_S):
                await send(message)

        try:
            await super().stream_response(in_time)
        except TimeoutError:  # uvicorn closes the connection of a response that was not completed
            log.get("api").warning("an event stream's reader takes nothing", action="stream_stalled")


async def events(
    follower: Follower, instance: Instance, after: str, closing: asyncio.Event
) -> AsyncGenerator[bytes, None]:
    """The events since entry `after` of a load's log, with comments in between, up to the terminal one.

    Without one it ends when this process is told to stop or Redis goes away: the client reconnects with the id it
    saw last, here or at another process.  Where Redis lost the record, there is nothing to come back to: an error.
    """
    ending: asyncio.Future[Any] = asyncio.ensure_future(closing.wait())
    coming: asyncio.Future[Any] | None = None
    async with aclosing(follower.follow(instance, after)) as revisions:
        try:
            while not ending.done():
                coming = coming or asyncio.ensure_future(anext(revisions, None))
                await asyncio.wait([coming, ending], timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    yield b": shutting down\n\n" if ending.done() else b": nothing new\n\n"
                    continue
                step: tuple[str, Instance] | None = coming.result()
                coming = None
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
        finally:
            ending.cancel()
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})


def encode(found: LoadEvent, entry: str = "") -> bytes:
    """One event on the wire; its name is the `type` of its data."""
    data = msgspec.json.encode(found)
    name = type(found).__struct_config__.tag
    return (f"id: {entry}\n" if entry else "").encode() + b"event: %b\ndata: %b\n\n" % (str(name).encode(), data)
