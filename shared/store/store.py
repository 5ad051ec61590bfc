"""The store: everything that is in Redis, by noun, on one client."""

from __future__ import annotations

from collections.abc import Callable

from redis.asyncio import Redis

from shared.store import connection
from shared.store.counters import Counters
from shared.store.instances import Instances
from shared.store.queue import Queue
from shared.store.workers import Workers


class Store:
    """Holds the parts of the store.  Give an object the parts that it uses, not the store.

    `lease_s`: how long a worker's lease lasts.  `restores`: whether what this process has loaded is desired until it
    is unloaded.
    """

    def __init__(self, redis: Redis, lease_s: float, *, restores: bool = True) -> None:
        self.redis = redis
        self.instances = Instances(redis, restores=restores)
        self.workers = Workers(redis, lease_s)
        self.queue = Queue(redis)
        self.counters = Counters(redis, self.instances, self.workers)

    async def listen(self, channel: str, on_message: Callable[[bytes], None]) -> None:
        """See `shared.store.connection.listen`."""
        await connection.listen(self.redis, channel, on_message)
