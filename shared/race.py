"""Waiting for the first of several awaitables, and cancelling the others."""

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
    """Run awaitables concurrently, as tasks.  On exit, cancels the unfinished tasks and waits until all have ended.

    To see the exception of a task, read its result inside the `async with` block; otherwise it is discarded.
    """
    tasks = tuple(asyncio.ensure_future(one) for one in work)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def first(tasks: Iterable[asyncio.Future[Any]], within_s: float | None = None) -> bool:
    """Wait up to `within_s` seconds (None: no limit) until one of the tasks is done; return whether one is done."""
    done, _ = await asyncio.wait(tasks, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)
