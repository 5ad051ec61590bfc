"""Server-sent events of a load: one event per revision of its record, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from api.loads.follow import Follower
from api.loads.jobs import event, is_over
from api.waiting import HEARTBEAT_S
from shared.errors import QueueUnavailable
from shared.instance import Instance
from shared.race import first, racing
from shared.schema.http import LoadError, LoadEvent
from shared.store.connection import UNAVAILABLE


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
