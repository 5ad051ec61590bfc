"""Server-sent events: the log of a load, one event for each revision, in the order in which they were written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.loads.follow import Follower
from api.loads.jobs import event, is_over
from shared.errors import QueueUnavailable
from shared.instance import Instance
from shared.schema.http import LoadError, LoadEvent
from shared.store.connection import UNAVAILABLE

HEARTBEAT_S = 10.0  # a comment this often while nothing happens, for proxies that cut what is silent
LAST_WORDS_S = 0.5  # for what is still to be sent when the process comes to its end


class EventStream(StreamingResponse):
    """The events of a load to one client, for which `place` is held; ends soon after `closing` is set.

    A reader that takes nothing is cut off by the kernel (`cli.listener`).
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], place: AbstractContextManager[object], closing: asyncio.Event
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.place, self.closing = place, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Not Starlette's: its way to cancel comes again and again, and would cut off what `events` has to tidy up."""
        streaming = asyncio.ensure_future(self.stream_response(send))
        others = [
            asyncio.ensure_future(self.listen_for_disconnect(receive)),
            asyncio.ensure_future(self.closing.wait()),
        ]
        with self.place:
            try:
                await asyncio.wait([streaming, *others], return_when=asyncio.FIRST_COMPLETED)
                if self.closing.is_set():
                    await asyncio.wait([streaming], timeout=LAST_WORDS_S)
            finally:
                for task in (streaming, *others):
                    task.cancel()
                results = await asyncio.gather(streaming, *others, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]


async def events(
    follower: Follower, instance: Instance, after: str, closing: asyncio.Event
) -> AsyncGenerator[bytes, None]:
    """The events since entry `after` of a load's log, with comments in between, up to the terminal one.

    Without one it ends when this process comes to its end or Redis goes away: the client reconnects with the id it
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
