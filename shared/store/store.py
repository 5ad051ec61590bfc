"""The store: access to all data in Redis, over one client."""

from __future__ import annotations

from collections.abc import Callable

from redis.asyncio import Redis

from shared.store import connection
from shared.store.counters import Counters
from shared.store.downloads import Downloads
from shared.store.instances import Instances
from shared.store.queue import Queue
from shared.store.workers import Workers


class Store:
    """The parts of the store.  Pass an object only the parts that it uses.

    `lease_s`: the duration of a worker's lease.  `restores`: whether instances that this process loads stay desired
    until they are unloaded.
    """

    def __init__(self, redis: Redis, lease_s: float, *, restores: bool = True) -> None:
        self.redis = redis
        self.instances = Instances(redis, restores=restores)
        self.workers = Workers(redis, lease_s)
        self.queue = Queue(redis)
        self.downloads = Downloads(redis)
        self.counters = Counters(redis, self.instances, self.workers)

    async def listen(self, channel: str, on_message: Callable[[bytes], None]) -> None:
        """See `shared.store.connection.listen`."""
        await connection.listen(self.redis, channel, on_message)
