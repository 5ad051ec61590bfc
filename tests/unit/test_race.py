"""Waiting for the first of several tasks, and ending the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from shared.race import first, racing


async def forever(ended: Callable[[], object] = lambda: None) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)  # cleanup may take a turn of the loop
        ended()


async def value(number: int) -> int:
    return number


async def failure() -> None:
    raise ValueError("why")


async def test_the_first_result_is_read_and_the_others_end() -> None:
    ended: list[str] = []
    async with racing(value(7), forever(lambda: ended.append("the other"))) as (seven, other):
        assert await first((seven, other))
        assert seven.result() == 7
        assert not other.done()
    assert other.cancelled()
    assert ended == ["the other"], "the cleanup of the other task was awaited"


async def test_leaving_ends_a_single_task_too() -> None:
    ended: list[str] = []
    async with racing(forever(lambda: ended.append("it"))) as (one,):
        assert not await first((one,), 0.0)
    assert one.cancelled()
    assert ended == ["it"]


async def test_a_timeout_returns_false() -> None:
    async with racing(forever(), forever()) as tasks:
        assert not await first(tasks, 0.0)


async def test_a_cancelled_waiter_ends_its_tasks() -> None:
    ended: list[int] = []

    async def wait() -> None:
        async with racing(forever(lambda: ended.append(1)), forever(lambda: ended.append(2))) as tasks:
            await first(tasks)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert sorted(ended) == [1, 2]


async def test_a_failure_is_raised_when_its_result_is_read() -> None:
    async with racing(failure(), forever()) as (failing, other):
        assert await first((failing, other))
        with pytest.raises(ValueError, match="why"):
            failing.result()


async def test_an_unread_failure_does_not_replace_the_outcome() -> None:
    async with racing(value(1), failure()) as (one, failing):
        await asyncio.gather(one, failing, return_exceptions=True)
    assert one.result() == 1
