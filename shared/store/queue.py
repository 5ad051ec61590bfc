"""The queues of the workers and their jobs, in the format of arq.

Only this module (format of entries and results) and `worker.deliveries` (arq's worker) import arq.  The format was
checked with arq 0.28: tests/integration/test_queue.py compares an entry with the output of `ArqRedis.enqueue_job`.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from arq.connections import ArqRedis
from arq.jobs import Job, serialize_job
from msgspec import msgpack
from redis.asyncio import Redis

from shared.instance import Instance
from shared.schema.memory import Usage
from shared.schema.snapshot import Described, Describing, Sizing
from shared.store import keys
from shared.store.connection import UNAVAILABLE
from shared.store.keys import RETAIN_S
from shared.store.script import Script
from shared.telemetry import log

LOAD, SIZE, DESCRIBE = "load", "size", "describe"  # the functions of a worker, as arq names them
DELIVERY_S = 3600  # expiry of an entry; later, the worker finds the queued record at one of its beats
SIZED_S = 30  # a large vocabulary takes the engine a second, and other requests may come first
DESCRIBED_S = 60  # for a listing and some megabytes, over the internet


def pack_job(value: dict[str, Any]) -> bytes:
    """Serialize a job for arq as msgpack, because unpickling could run code that someone wrote to Redis.

    An exception (of a failed job) becomes its text.
    """
    return msgpack.encode(value, enc_hook=str)


def unpack_job(data: bytes) -> dict[str, Any]:
    job: dict[str, Any] = msgpack.decode(data, type=dict[str, Any])
    return job


def entry(function: str, argument: str | bytes) -> bytes:
    """Return the entry of a function call in the format of arq."""
    return serialize_job(function, (argument,), {}, None, round(time.time() * 1000), serializer=pack_job)


def delivery(id_: str) -> bytes:
    """Return the entry that delivers the load `id_` to its worker."""
    return entry(LOAD, id_)


def as_arq(redis: Redis) -> ArqRedis:
    """Return an arq client that uses the same connections."""
    return ArqRedis(redis.connection_pool, job_serializer=pack_job, job_deserializer=unpack_job)


class Queue:
    """Puts jobs into the workers' queues."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._deliver = Script(redis, "deliver", "enqueue")

    async def deliver(self, instance: Instance) -> None:
        """Put a queued instance into its worker's queue, and wake the worker.

        If Redis does not answer, the worker finds the record at one of its next beats.
        """
        try:
            id_ = f"{instance.id}:{instance.rev}"
            await self._enqueue(instance.worker, id_, delivery(instance.id), DELIVERY_S)
        except UNAVAILABLE as e:
            log.get("store").warning("delivery lost", action="delivery_lost", **instance.ids, error=str(e))

    async def sized(self, worker: str, sizing: Sizing, within_s: float = SIZED_S) -> list[list[Usage]] | None:
        """Return the usage that the worker's engine reports from each dry run; None without a reply within `within_s`.

        Raises what UNAVAILABLE lists.
        """
        answer = await self._asked(worker, SIZE, msgpack.encode(sizing), SIZED_S, within_s)
        return None if answer is None else msgpack.decode(answer, type=list[list[Usage]] | None)

    async def described(self, worker: str, describing: Describing) -> Described | None:
        """Return what a worker learns from the hub; None without a reply.  Raises what UNAVAILABLE lists."""
        answer = await self._asked(worker, DESCRIBE, msgpack.encode(describing), DESCRIBED_S, DESCRIBED_S)
        return None if answer is None else msgpack.decode(answer, type=Described)

    async def _asked(self, worker: str, function: str, argument: bytes, expiry_s: int, within_s: float) -> bytes | None:
        id_ = uuid.uuid4().hex
        await self._enqueue(worker, id_, entry(function, argument), expiry_s)
        job = Job(id_, as_arq(self._redis), keys.queue(worker), unpack_job)
        try:
            answer: bytes = await job.result(timeout=within_s, poll_delay=0.02)
        except TimeoutError:
            return None
        return answer

    async def _enqueue(self, worker: str, id_: str, data: bytes, within_s: int) -> None:
        await self._deliver(worker=worker, id=id_, entry=data, expires_ms=within_s * 1000, retain_s=RETAIN_S)
