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

from shared.download import InspectRequest, Offer, Refusal, Removed
from shared.instance import Instance
from shared.schema.memory import Usage
from shared.schema.snapshot import Described, Sizing
from shared.store import keys
from shared.store.connection import UNAVAILABLE
from shared.store.keys import RETAIN_S
from shared.store.script import Script
from shared.telemetry import log

LOAD, SIZE = "load", "size"  # the functions of a worker, as arq names them
INSPECT, REMOVE, DESCRIBE = "inspect", "remove", "describe"
DELIVERY_S = 3600  # expiry of an entry; later, the worker finds the queued record at one of its beats
INSPECTED_S = 60  # of the hub
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
        data = await self._answered(worker, SIZE, sizing, within_s, SIZED_S)
        return None if data is None else msgpack.decode(data, type=list[list[Usage]] | None)

    async def inspected(self, worker: str, request: InspectRequest) -> Offer | Refusal | None:
        """Return what a download by a worker would fetch; None without a reply.  Raises what UNAVAILABLE lists."""
        data = await self._answered(worker, INSPECT, request, INSPECTED_S, INSPECTED_S)
        return None if data is None else msgpack.decode(data, type=Offer | Refusal)

    async def described(self, worker: str, request: InspectRequest) -> Described | None:
        """Return what a worker learns of a model from the hub; None without a reply.  Raises what UNAVAILABLE lists."""
        data = await self._answered(worker, DESCRIBE, request, DESCRIBED_S, DESCRIBED_S)
        return None if data is None else msgpack.decode(data, type=Described)

    async def removed(self, worker: str, key: str) -> Removed | Refusal | None:
        """Have a worker remove the files of a model; None without a reply.

        Raises what UNAVAILABLE lists.
        """
        data = await self._answered(worker, REMOVE, key, SIZED_S, SIZED_S)
        return None if data is None else msgpack.decode(data, type=Removed | Refusal)

    async def _answered(
        self, worker: str, function: str, argument: object, within_s: float, expires_s: int
    ) -> bytes | None:
        """Call a function of a worker; return its result, None without one within `within_s`."""
        id_ = uuid.uuid4().hex
        await self._enqueue(worker, id_, entry(function, msgpack.encode(argument)), expires_s)
        job = Job(id_, as_arq(self._redis), keys.queue(worker), unpack_job)
        try:
            data: bytes = await job.result(timeout=within_s, poll_delay=0.02)
        except TimeoutError:
            return None
        return data

    async def _enqueue(self, worker: str, id_: str, data: bytes, within_s: int) -> None:
        await self._deliver(worker=worker, id=id_, entry=data, expires_ms=within_s * 1000, retain_s=RETAIN_S)
