"""Waiting for the first of several things, and ending the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar, overload

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


@overload
def racing(one: Awaitable[A], /) -> AbstractAsyncContextManager[tuple[asyncio.Future[A]]]: ...


@overload
def racing(
    one: Awaitable[A], two: Awaitable[B], /
) -> AbstractAsyncContextManager[tuple[asyncio.Future[A], asyncio.Future[B]]]: ...


@overload
def racing(
    one: Awaitable[A], two: Awaitable[B], three: Awaitable[C], /
) -> AbstractAsyncContextManager[tuple[asyncio.Future[A], asyncio.Future[B], asyncio.Future[C]]]: ...


@overload
def racing(
    one: Awaitable[A], two: Awaitable[B], three: Awaitable[C], four: Awaitable[D], /
) -> AbstractAsyncContextManager[tuple[asyncio.Future[A], asyncio.Future[B], asyncio.Future[C], asyncio.Future[D]]]: ...


@asynccontextmanager
async def racing(*work: Awaitable[Any]) -> AsyncIterator[Any]:
    """Run these side by side, as tasks.  On leaving, those that are not done are cancelled, and all have ended.

    What a task raises is seen by reading its result inside the `async with`; otherwise it is dropped.
    """
    tasks = tuple(asyncio.ensure_future(one) for one in work)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def first(tasks: Iterable[asyncio.Future[Any]], within_s: float | None = None) -> bool:
    """Wait until one of these is done; return whether one was `within_s` seconds, None for as long as it takes."""
    done, _ = await asyncio.wait(tasks, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)
