"""A channel for tests of a Follower: the test sends the notifications."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from api.loads.follow import Follower


class Channel:
    """A channel to which only the test sends; pass `listen` to a Follower."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[bytes], None]] = []

    async def listen(self, _: str, on_message: Callable[[bytes], None]) -> None:
        self._listeners.append(on_message)
        await asyncio.Event().wait()

    def send(self, id_: str) -> None:
        assert self._listeners, "there is no listener"
        for on_message in self._listeners:
            on_message(id_.encode())


@asynccontextmanager
async def running(follower: Follower) -> AsyncIterator[None]:
    """Run a follower during the block; it is listening when the block starts."""
    task = asyncio.create_task(follower.run())
    try:
        for _ in range(3):  # the task, its group, the listener
            await asyncio.sleep(0)
        yield
        assert not task.done(), "only a cancellation may end the follower"
    finally:
        task.cancel()
        await asyncio.wait({task})
