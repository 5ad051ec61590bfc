"""The clients that have left before the outcome of the load that they requested."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress

from msgspec import msgpack

from shared.beat import BEAT_S
from shared.instance import Instance
from shared.schema.http import LoadRequest
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.instances import Instances


class Departures:
    """Writes to Redis which loads their requesters have left, so that the next identical request joins them.

    Until Redis answers, which may be the reason for leaving, they are kept here.
    """

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self._unwritten: dict[str, str] = {}  # id of the load -> `identity` of its request
        self._added, self._settled = asyncio.Event(), asyncio.Event()
        self._settled.set()

    def add(self, instance: Instance, caller: str) -> None:
        """Note that the caller that requested a load no longer waits for its outcome."""
        self._unwritten[instance.id] = identity(instance.request, caller)
        self._added.set()
        self._settled.clear()

    async def settled(self) -> None:
        """Return once all departures are written, or after a beat.

        A client may leave and send its request again at the same moment.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await self._settled.wait()

    async def run(self) -> None:
        """Write departures as they are added.  Runs until cancelled; then writes the last ones."""
        try:
            while True:
                check_cancelled()
                await self._added.wait()
                try:
                    await self._write()
                except UNAVAILABLE:
                    await asyncio.sleep(BEAT_S)
        finally:
            with suppress(*UNAVAILABLE, TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._write()

    async def _write(self) -> None:
        departures = {**self._unwritten}
        await self._instances.leave(departures)
        for id_ in departures:
            del self._unwritten[id_]
        if not self._unwritten:
            self._added.clear()
            self._settled.set()


def identity(request: LoadRequest, caller: str) -> str:
    """Return a digest that identical requests of one caller have in common."""
    return hashlib.sha256(msgpack.encode((request, caller))).hexdigest()
