"""Questions that are asked while another is answered share the next reading, and none gets an older one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence

import pytest

from api.loads.coalesce import Batch


class Source:
    """Answers a reading when it is told to, with the number of the reading."""

    def __init__(self) -> None:
        self.readings: list[tuple[list[str], asyncio.Future[None]]] = []

    async def read(self, keys: Sequence[str]) -> dict[str, int]:
        self.readings.append(([*keys], asyncio.get_running_loop().create_future()))
        n, (_, told) = len(self.readings), self.readings[-1]
        await told
        return dict.fromkeys(keys, n)

    def answer(self) -> None:
        self.readings[-1][1].set_result(None)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_asks_during_a_reading_gets_the_next_one_which_all_of_them_share() -> None:
    async def ask() -> tuple[list[int], list[list[str]]]:
        source = Source()
        batch = Batch(source.read)
        first = asyncio.create_task(batch("a"))
        await settle()
        others = [asyncio.create_task(batch(key)) for key in ("a", "b", "b", "c")]
        await settle()
        assert len(source.readings) == 1
        source.answer()
        await settle()
        source.answer()
        return await asyncio.gather(first, *others), [keys for keys, _ in source.readings]

    assert asyncio.run(ask()) == ([1, 2, 2, 2, 2], [["a"], ["a", "b", "c"]])


def test_a_failure_is_everybodys_and_the_next_reading_is_another() -> None:
    async def ask() -> int:
        source = Source()
        batch = Batch(source.read)
        both = [asyncio.create_task(batch(key)) for key in ("a", "b")]
        await settle()
        source.readings[0][1].set_exception(ConnectionError("gone"))
        for one in both:
            with pytest.raises(ConnectionError, match="gone"):
                await one
        again = asyncio.create_task(batch("a"))
        await settle()
        source.answer()
        return await again

    assert asyncio.run(ask()) == 2


def test_one_who_goes_away_takes_nothing_from_the_others() -> None:
    async def ask() -> int:
        source = Source()
        batch = Batch(source.read)
        gone, stays = (asyncio.create_task(batch("a")) for _ in range(2))
        await settle()
        gone.cancel()
        await settle()
        source.answer()
        return await stays

    assert asyncio.run(ask()) == 1


def test_a_failure_that_nobody_waits_for_any_more_is_reported_by_nobody() -> None:
    reported: list[object] = []

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        source = Source()
        batch = Batch(source.read)
        gone = asyncio.create_task(batch("a"))
        await settle()
        gone.cancel()
        await settle()
        source.readings[0][1].set_exception(ConnectionError("gone"))
        await settle()
        del batch, source, gone
        gc.collect()

    asyncio.run(ask())
    assert reported == []
