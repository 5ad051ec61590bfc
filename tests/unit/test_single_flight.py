"""Coalescing of concurrent reads: a caller gets a read that started after its call."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence

import pytest

from api.single_flight import SingleFlight


class Source:
    """Completes a read on demand, with the number of the read as its value."""

    def __init__(self) -> None:
        self.readings: list[tuple[list[str], asyncio.Future[None]]] = []

    async def read(self, keys: Sequence[str]) -> dict[str, int]:
        self.readings.append(([*keys], asyncio.get_running_loop().create_future()))
        n, (_, answered) = len(self.readings), self.readings[-1]
        await answered
        return dict.fromkeys(keys, n)

    def answer(self) -> None:
        self.readings[-1][1].set_result(None)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_callers_that_arrive_during_a_read_share_the_next() -> None:
    async def ask() -> tuple[list[int], list[list[str]]]:
        source = Source()
        flight = SingleFlight(source.read)
        first = asyncio.create_task(flight("a"))
        await settle()
        others = [asyncio.create_task(flight(key)) for key in ("a", "b", "b", "c")]
        await settle()
        assert len(source.readings) == 1
        source.answer()
        await settle()
        source.answer()
        return await asyncio.gather(first, *others), [keys for keys, _ in source.readings]

    assert asyncio.run(ask()) == ([1, 2, 2, 2, 2], [["a"], ["a", "b", "c"]])


def test_a_failure_reaches_every_caller_and_is_not_kept() -> None:
    async def ask() -> int:
        source = Source()
        flight = SingleFlight(source.read)
        both = [asyncio.create_task(flight(key)) for key in ("a", "b")]
        await settle()
        source.readings[0][1].set_exception(ConnectionError("gone"))
        for one in both:
            with pytest.raises(ConnectionError, match="gone"):
                await one
        again = asyncio.create_task(flight("a"))
        await settle()
        source.answer()
        return await again

    assert asyncio.run(ask()) == 2


def test_a_cancelled_caller_does_not_cancel_the_shared_read() -> None:
    async def ask() -> int:
        source = Source()
        flight = SingleFlight(source.read)
        gone, stays = (asyncio.create_task(flight("a")) for _ in range(2))
        await settle()
        gone.cancel()
        await settle()
        source.answer()
        return await stays

    assert asyncio.run(ask()) == 1


def test_a_failure_without_callers_is_not_reported() -> None:
    reported: list[object] = []

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        source = Source()
        flight = SingleFlight(source.read)
        gone = asyncio.create_task(flight("a"))
        await settle()
        gone.cancel()
        await settle()
        source.readings[0][1].set_exception(ConnectionError("gone"))
        await settle()
        del flight, source, gone
        gc.collect()

    asyncio.run(ask())
    assert reported == []
