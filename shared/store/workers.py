"""What workers publish: their leases, snapshots and catalogs."""

from __future__ import annotations

import hashlib
import time
from typing import Literal

from msgspec import Struct, msgpack
from redis.asyncio import Redis

from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.store import keys
from shared.store.keys import RETAIN_S
from shared.store.pages import pages
from shared.store.script import Script

Renewal = Literal["held", "no catalog", "refused"]


class Worker(Struct, frozen=True, kw_only=True):
    """A worker as Redis knows it: `snapshot` is None while it holds no lease."""

    name: str
    epoch: str | None
    snapshot: WorkerSnapshot | None
    lease_left_s: float = 0.0


class Workers:
    """Reads and writes what workers publish.  Every method raises what UNAVAILABLE lists if Redis does not answer."""

    def __init__(self, redis: Redis, lease_s: float) -> None:
        self.lease_s = lease_s
        self._redis = redis
        self._renew = Script(redis, "renew")
        self._announce = Script(redis, "announce")
        self._release = Script(redis, "release")
        self._catalog = Script(redis, "catalog")
        self._workers = Script(redis, "workers")

    async def renew(self, snapshot: WorkerSnapshot, dead_epoch: str = "") -> Renewal:
        """Hold the lease of a name for this epoch; refused if another epoch holds it (`dead_epoch` may be replaced).

        "no catalog": held, but Redis was emptied of what was published.
        """
        name = snapshot.name
        found = await self._renew(
            keys.lease(name),
            keys.snapshot(name),
            keys.catalog(name),
            keys.WORKERS,
            name=name,
            epoch=snapshot.epoch,
            dead_epoch=dead_epoch,
            lease_ms=round(self.lease_s * 1000),
            snapshot=msgpack.encode(snapshot),
            now_s=round(time.time()),
            retain_s=RETAIN_S,
        )
        return ("refused", "no catalog", "held")[found]

    async def announce(self, snapshot: WorkerSnapshot) -> None:
        """Publish what is new of a worker between two beats; its lease stays as it is."""
        name = snapshot.name
        await self._announce(
            keys.lease(name), keys.snapshot(name), epoch=snapshot.epoch, snapshot=msgpack.encode(snapshot)
        )

    async def release(self, worker: str, epoch: str) -> None:
        """Give up the lease of a worker, if `epoch` holds it."""
        await self._release(keys.lease(worker), keys.snapshot(worker), epoch=epoch)

    async def all(self) -> list[Worker]:
        """Return every worker of the last RETAIN_S, alive or not.

        Raises what UNAVAILABLE lists also if Redis can be read but not written to, as with a full disk: workers
        cannot renew their leases then, and would be taken for dead.  It refuses a PING there as it does a write
        (src/server.c of Redis and Valkey: MISCONF, "write commands or PING").
        """
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.ping()
            pipeline.zrange(keys.WORKERS, 0, -1)
            _, found = await pipeline.execute()
        names = [name.decode() for name in found]
        rows = [row for page in pages(names) for row in await self._workers(names=page)]
        return [
            Worker(
                name=name,
                epoch=lease.decode() if lease else None,
                snapshot=msgpack.decode(snapshot, type=WorkerSnapshot) if lease and snapshot else None,
                lease_left_s=max(0, left_ms) / 1000,
            )
            for name, (lease, snapshot, left_ms) in zip(names, rows, strict=True)
        ]

    async def publish_catalog(self, worker: str, models: list[Model], epoch: str, dead_epoch: str = "") -> str | None:
        """Publish what a worker has on its disk.

        Returns the digest that its snapshot is to carry; None if another process holds its lease (`dead_epoch` does
        not count).
        """
        data = msgpack.encode(models)
        is_published = await self._catalog(
            keys.lease(worker),
            keys.catalog(worker),
            epoch=epoch,
            dead_epoch=dead_epoch,
            catalog=data,
            retain_s=RETAIN_S,
        )
        return hashlib.sha256(data).hexdigest()[:16] if is_published else None

    async def catalog(self, worker: str) -> list[Model] | None:
        """Return what a worker published last; None if Redis has nothing of it."""
        data = await self._redis.get(keys.catalog(worker))
        return None if data is None else msgpack.decode(data, type=list[Model])
