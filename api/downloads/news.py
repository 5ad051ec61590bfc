"""Wakes those that wait for a download to change."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from api.subscription import subscribed
from shared.store.connection import Listen
from shared.store.keys import DOWNLOAD_NEWS


class News:
    """The changes of downloads, for one API process: one subscription wakes all that wait."""

    def __init__(self, listen: Listen) -> None:
        self._listen = listen
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    async def run(self) -> None:
        """Run the subscription until cancelled."""
        await subscribed(self._listen, DOWNLOAD_NEWS, lambda data: self._heard(data.decode()))

    @contextmanager
    def of(self, id_: str) -> Iterator[asyncio.Event]:
        """Set the event whenever the download with this id changes."""
        woken = asyncio.Event()
        self._waiting[id_].add(woken)
        try:
            yield woken
        finally:
            self._waiting[id_].discard(woken)
            if not self._waiting[id_]:
                del self._waiting[id_]

    def _heard(self, id_: str) -> None:
        for woken in self._waiting.get(id_, ()):
            woken.set()
