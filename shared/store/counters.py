"""The counters of the pool, for `GET /metrics`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from msgspec import Struct
from redis.asyncio import Redis

from shared.store import keys
from shared.store.instances import Instances
from shared.store.keys import RETAIN_S
from shared.store.script import Script
from shared.store.workers import Worker, Workers


class Readings(Struct, frozen=True, kw_only=True):
    """The state and the counters of the pool.  `shared.store.keys` describes `counters` and `tallies`."""

    workers: list[Worker]
    counters: dict[str, int]
    tallies: dict[str, int]
    queued: int
    queued_at: dict[str, int]  # by worker
    live: dict[tuple[str, str], int]  # instances by worker and state


class Counters:
    """Updates and reads the counters.  Every method raises what UNAVAILABLE lists if Redis does not answer."""

    def __init__(self, redis: Redis, instances: Instances, workers: Workers) -> None:
        self._redis = redis
        self._instances = instances
        self._workers = workers
        self._count = Script(redis, "count")

    async def add(self, process: str, number: int, counts: Mapping[str, int]) -> None:
        """Add a numbered batch of counts of a process, unless it was added before."""
        await self._count(keys.tallied(process), number=number, retain_s=RETAIN_S, counts=counts)

    async def read(self) -> Readings:
        """Return the state and the counters of the pool."""
        workers = await self._workers.all()
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.COUNTERS)
            pipe.hgetall(keys.TALLIES)
            pipe.scard(keys.QUEUED)
            for worker in workers:
                pipe.scard(keys.queued_at(worker.name))
            counters, tallies, queued, *queued_at = await pipe.execute()
        return Readings(
            workers=workers,
            counters={name.decode(): int(n) for name, n in counters.items()},
            tallies={name.decode(): int(n) for name, n in tallies.items()},
            queued=queued,
            queued_at={worker.name: n for worker, n in zip(workers, queued_at, strict=True)},
            live=Counter((head.worker, head.state.value) for head in await self._instances.heads()),
        )
