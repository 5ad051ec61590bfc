"""Waiting for what no event tells of, on an event loop; `tests.support.service.until` is the same without one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import pytest

from tests.support.service import below

POLL_S = 0.005


async def until(condition: Callable[[], Awaitable[bool] | bool], what: str, within_s: float = 10.0) -> None:
    """Ask again and again until it is so; fails where that is not in time."""
    try:
        async with asyncio.timeout(within_s):
            while True:
                answer = condition()
                if answer if isinstance(answer, bool) else await answer:
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        pytest.fail(f"not in time: {what}")


def no_runners() -> bool:
    """Their parent is the server that forked them, not we."""
    return all(process.parent == os.getpid() for process in below(os.getpid()))
