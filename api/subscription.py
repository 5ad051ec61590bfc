"""Durable subscriptions to Redis channels."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

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


class Waiters:
    """Those that wait for records to change, by the id of the record."""

    def __init__(self) -> None:
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @property
    def ids(self) -> Collection[str]:
        """The ids of the records that somebody waits for."""
        return self._events.keys()

    @contextmanager
    def of(self, id_: str) -> Iterator[asyncio.Event]:
        """Yield an event that `wake` sets."""
        woken = asyncio.Event()
        self._events[id_].add(woken)
        try:
            yield woken
        finally:
            self._events[id_].discard(woken)
            if not self._events[id_]:
                del self._events[id_]

    def wake(self, id_: str) -> None:
        """Set the events of a record."""
        for woken in self._events.get(id_, ()):
            woken.set()
