"""Polling on an event loop, for conditions without an event; `tests.support.service.until` does it without a loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import pytest

from tests.support.service import below

POLL_S = 0.005


async def until(condition: Callable[[], Awaitable[bool] | bool], what: str, within_s: float = 60.0) -> None:
    """Poll a condition until it is true; fail if that does not happen in time."""
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
    """Return whether no runner exists: the parent of a runner is the forkserver, not this process."""
    return all(process.parent == os.getpid() for process in below(os.getpid()))
