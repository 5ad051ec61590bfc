"""The leases, snapshots and catalogs that workers publish."""

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
    """A worker in Redis.  `snapshot` is None if the worker holds no lease."""

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
        """Take or renew the lease of a worker, and publish its snapshot.

        Returns "refused" if another epoch than `dead_epoch` holds the lease, and "no catalog" if the lease is held but
        Redis has lost the catalog.
        """
        name = snapshot.name
        outcome = await self._renew(
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
        return ("refused", "no catalog", "held")[outcome]

    async def announce(self, snapshot: WorkerSnapshot) -> None:
        """Publish a new snapshot of a worker between two beats, without renewing its lease."""
        name = snapshot.name
        await self._announce(
            keys.lease(name), keys.snapshot(name), epoch=snapshot.epoch, snapshot=msgpack.encode(snapshot)
        )

    async def release(self, worker: str, epoch: str) -> None:
        """Release the lease of a worker if `epoch` holds it."""
        await self._release(keys.lease(worker), keys.snapshot(worker), epoch=epoch)

    async def all(self) -> list[Worker]:
        """Return all workers of the last RETAIN_S seconds, alive or not.

        Also raises what UNAVAILABLE lists if Redis can be read but not written to, for example because its disk is
        full: workers cannot renew their leases then, and would be considered dead.  In this state, Redis refuses PING
        like a write command (src/server.c of Redis and Valkey: MISCONF, "write commands or PING").
        """
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.ping()
            pipeline.zrange(keys.WORKERS, 0, -1)
            _, members = await pipeline.execute()
        names = [name.decode() for name in members]
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
        """Publish the catalog of a worker.

        Returns its digest, for the worker's snapshot; None if another process than `epoch` or `dead_epoch` holds the
        lease.
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
        """Return the catalog that a worker published last; None if Redis has none."""
        data = await self._redis.get(keys.catalog(worker))
        return None if data is None else msgpack.decode(data, type=list[Model])
