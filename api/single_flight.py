"""Sharing of reads between concurrent callers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Coalesces concurrent reads.

    A caller gets a read that started after its call; callers that arrive during a read share the next one.  A command
    to Redis costs this process half as much as serving a request.
    """

    def __init__(self, read: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]]) -> None:
        """`read` returns a value for each key that it is given."""
        self._read = read
        self._asked: dict[K, None] = {}
        self._current: asyncio.Task[Mapping[K, V]] | None = None
        self._next: asyncio.Task[Mapping[K, V]] | None = None

    async def __call__(self, key: K) -> V:
        """Return the value of `key`.  Raises what `read` raises."""
        self._asked[key] = None
        if self._next is None:
            self._next = asyncio.create_task(self._read_after(self._current))
            # Retrieves the exception of a read whose callers have all gone: asyncio would report it otherwise.
            self._next.add_done_callback(lambda done: done.cancelled() or done.exception())
        return (await asyncio.shield(self._next))[key]  # a cancelled caller must not cancel the shared read

    async def _read_after(self, previous: asyncio.Task[Mapping[K, V]] | None) -> Mapping[K, V]:
        if previous is not None and not previous.done():
            await asyncio.wait([previous])
        asked, self._asked = [*self._asked], {}
        self._current, self._next = self._next, None
        return await self._read(asked)
