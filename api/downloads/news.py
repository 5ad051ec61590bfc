"""Wakes those that wait for a download to change."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager

from api.subscription import Waiters, subscribed
from shared.store.connection import Listen
from shared.store.keys import DOWNLOAD_NEWS


class News:
    """The changes of downloads, for one API process: one subscription wakes all that wait."""

    def __init__(self, listen: Listen) -> None:
        self._listen = listen
        self._waiters = Waiters()

    async def run(self) -> None:
        """Run the subscription until cancelled."""
        await subscribed(self._listen, DOWNLOAD_NEWS, lambda data: self._waiters.wake(data.decode()))

    def of(self, id_: str) -> AbstractContextManager[asyncio.Event]:
        """Set the event whenever the download with this id changes."""
        return self._waiters.of(id_)
