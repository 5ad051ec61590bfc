"""Durable subscriptions to Redis channels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared.store.connection import UNAVAILABLE, Listen
from shared.telemetry import log

PAUSE_S = 0.2  # before a broken subscription is renewed


async def subscribed(listen: Listen, channel: str, on_message: Callable[[bytes], None]) -> None:
    """Call `on_message` with each message of a channel, and with b"" whenever the subscription is (re-)established.

    Messages that are sent while it is broken are lost.  Runs until cancelled.
    """
    while True:
        try:
            await listen(channel, on_message)
        except UNAVAILABLE as e:
            log.get("api").warning("subscription lost", action="redis_unavailable", error=str(e))
        await asyncio.sleep(PAUSE_S)
