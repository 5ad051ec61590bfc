"""Reading for many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Batch(Generic[K, V]):
    """Answers each question from a reading that began after it was asked, as a reading of its own would: whoever asks
    while one is under way shares the next.  One command to Redis costs this process as much as half a request."""

    def __init__(self, read: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]]) -> None:
        """`read` answers everything that it is asked."""
        self._read = read
        self._asked: dict[K, None] = {}
        self._current: asyncio.Task[Mapping[K, V]] | None = None
        self._next: asyncio.Task[Mapping[K, V]] | None = None

    async def __call__(self, key: K) -> V:
        """Raises what `read` raises."""
        self._asked[key] = None
        if self._next is None:
            self._next = asyncio.create_task(self._read_after(self._current))
            self._next.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if all have gone
        return (await asyncio.shield(self._next))[key]  # others may wait for it too

    async def _read_after(self, previous: asyncio.Task[Mapping[K, V]] | None) -> Mapping[K, V]:
        if previous is not None and not previous.done():
            await asyncio.wait([previous])
        asked, self._asked = [*self._asked], {}
        self._current, self._next = self._next, None
        return await self._read(asked)
