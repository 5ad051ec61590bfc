"""Reads this worker's queue through arq: loads from APIs, and requests that have a reply."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, cast

from arq.utils import timestamp_ms
from arq.worker import Worker as ArqWorker
from arq.worker import func
from msgspec import msgpack
from redis.asyncio import Redis

from shared.download import PREFIX, InspectRequest
from shared.store import keys
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.queue import (
    DESCRIBE,
    DESCRIBED_S,
    INSPECT,
    INSPECTED_S,
    LOAD,
    REMOVE,
    SIZE,
    SIZED_S,
    as_arq,
    pack_job,
    unpack_job,
)
from shared.telemetry import log
from worker.agent import Agent

FALLBACK_S = 1.0  # polling interval, in case a notification is lost
END_S = 2.0

_log = log.get("worker")


class Deliveries(ArqWorker):
    """arq's worker on this worker's queue, woken by notifications instead of polling.

    The job of a load only delivers an id to the agent.  The claim of the record decides which worker loads it, so arq's
    retries and results are off.  Only jobs of other kinds have a result.
    """

    def __init__(self, redis: Redis, agent: Agent) -> None:
        async def load(_: dict[Any, Any], id_: str) -> None:
            agent.deliver(id_)
            self.begun.set()

        async def size(_: dict[Any, Any], sizing: bytes) -> bytes:
            self.begun.set()
            return await agent.dry_run.answer(sizing)

        async def describe(_: dict[Any, Any], describing: bytes) -> bytes:
            self.begun.set()
            return await agent.describer.answer(describing)

        async def inspect(_: dict[Any, Any], request: bytes) -> bytes:
            self.begun.set()
            return msgpack.encode(await agent.downloads.inspect(msgpack.decode(request, type=InspectRequest)))

        async def remove(_: dict[Any, Any], key: bytes) -> bytes:
            self.begun.set()
            removed = await agent.downloads.remove(agent.models, agent.holds, msgpack.decode(key, type=str))
            return msgpack.encode(removed)

        super().__init__(
            [
                func(cast(Any, load), name=LOAD),
                func(cast(Any, size), name=SIZE, timeout=SIZED_S, keep_result=SIZED_S),
                func(cast(Any, describe), name=DESCRIBE, timeout=DESCRIBED_S, keep_result=DESCRIBED_S),
                func(cast(Any, inspect), name=INSPECT, timeout=INSPECTED_S, keep_result=SIZED_S),
                func(cast(Any, remove), name=REMOVE, timeout=SIZED_S, keep_result=SIZED_S),
            ],
            queue_name=keys.queue(agent.name),
            redis_pool=as_arq(redis),
            handle_signals=False,
            max_jobs=1000,
            job_timeout=5,
            keep_result=0,
            max_tries=1,
            retry_jobs=False,
            log_results=False,
            job_serializer=pack_job,
            job_deserializer=unpack_job,
        )
        self.woken = asyncio.Event()
        self.begun = asyncio.Event()  # set once the job that was started last runs its function, or has ended

    async def start_jobs(self, job_ids: list[bytes]) -> None:
        """Start jobs without arq's lock per job, which takes four round trips to Redis.

        No lock is needed: no other worker reads this queue, and `tasks` has the jobs that are running.  Each job begins
        once its predecessor has: if they read their entries concurrently, loads would be delivered in another order.
        """
        for id_ in (id_.decode() for id_ in job_ids):
            if id_ not in self.tasks:
                await self._begin(id_)

    async def _begin(self, id_: str) -> None:
        """Start a job, and return once it runs its function or has ended.  Raises what UNAVAILABLE lists."""
        begun = self.begun = asyncio.Event()
        task = self.tasks[id_] = asyncio.create_task(self.run_job(id_, timestamp_ms()))
        task.add_done_callback(lambda _: begun.set())
        await begun.wait()
        if task.done():
            task.result()

    async def main(self) -> None:
        """Run until the connection to Redis is lost.  Raises what UNAVAILABLE lists; the caller starts a new one."""
        while True:
            self.woken.clear()
            await self._poll_iteration()
            check_cancelled()
            with suppress(TimeoutError):
                async with asyncio.timeout(FALLBACK_S):
                    await self.woken.wait()


async def take_deliveries(redis: Redis, agent: Agent) -> None:
    """Run arq and listen on the wake channel.  Restarts both when the connection to Redis is lost."""
    while True:
        deliveries = Deliveries(redis, agent)

        def on_message(data: bytes, deliveries: Deliveries = deliveries) -> None:
            if data.startswith(PREFIX.encode()):
                agent.downloads.wake()
            elif data:
                agent.stop(data.decode())
            else:
                deliveries.woken.set()

        both = {
            asyncio.create_task(deliveries.main()),
            asyncio.create_task(agent.store.listen(f"wake:{agent.name}", on_message)),
        }
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except UNAVAILABLE as e:
            _log.warning("queue connection lost", action="redis_unavailable", error=str(e))
        finally:
            for task in both:
                task.cancel()
            await asyncio.wait(both, timeout=END_S)
            # arq's running jobs are not cancelled: that would leave behind the tasks that arq shields.  `tasks` is read
            # only now, because arq may start jobs until it ends.
            for task in (*both, *deliveries.tasks.values()):
                # Retrieves the exception, which asyncio would log otherwise.
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.sleep(0.2)
