"""The queue of this worker: loads and questions that APIs put into it, through arq."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, cast

from arq.utils import timestamp_ms
from arq.worker import Worker as ArqWorker
from arq.worker import func
from redis.asyncio import Redis

from shared.store import keys
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.queue import LOAD, SIZE, SIZED_S, as_arq, pack_job, unpack_job
from shared.telemetry import log
from worker.agent import Agent

FALLBACK_S = 1.0  # a notification may be lost; the queue is looked at this often without one
END_S = 2.0

_log = log.get("worker")


class Deliveries(ArqWorker):
    """arq's worker on this worker's queue, woken by notification instead of polling.

    A load's job is only a delivery: it hands an id to the agent and is done.  The claim of the record decides who
    loads, so arq's retries and results are off.  Only of the question what a load would take is the result the answer.
    """

    def __init__(self, redis: Redis, agent: Agent) -> None:
        async def load(_: dict[Any, Any], id_: str) -> None:
            agent.deliver(id_)

        async def size(_: dict[Any, Any], sizing: bytes) -> bytes:
            return await agent.dry_run.answer(sizing)

        super().__init__(
            [
                func(cast(Any, load), name=LOAD),
                func(cast(Any, size), name=SIZE, timeout=SIZED_S, keep_result=SIZED_S),
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

    async def start_jobs(self, job_ids: list[bytes]) -> None:
        """Without arq's lock of each job, which takes four trips to Redis: no other worker reads this queue, and what
        has begun here and is not over is in `tasks`."""
        for id_ in (id_.decode() for id_ in job_ids):
            if id_ not in self.tasks:
                self.tasks[id_] = asyncio.create_task(self.run_job(id_, timestamp_ms()))

    async def main(self) -> None:
        """Runs until Redis drops it: then it raises one of UNAVAILABLE, and a new one is started."""
        while True:
            self.woken.clear()
            await self._poll_iteration()
            check_cancelled()
            with suppress(TimeoutError):
                async with asyncio.timeout(FALLBACK_S):
                    await self.woken.wait()


async def take_deliveries(redis: Redis, agent: Agent) -> None:
    """arq and the wake channel, restarted here whenever Redis drops them."""
    while True:
        deliveries = Deliveries(redis, agent)

        def heard(data: bytes, deliveries: Deliveries = deliveries) -> None:
            if data:
                agent.stop(data.decode())
            else:
                deliveries.woken.set()

        both = {
            asyncio.create_task(deliveries.main()),
            asyncio.create_task(agent.store.listen(f"wake:{agent.name}", heard)),
        }
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except UNAVAILABLE as e:
            _log.warning("queue dropped", action="redis_unavailable", error=str(e))
        finally:
            for task in both:
                task.cancel()
            await asyncio.wait(both, timeout=END_S)
            # What arq still does with deliveries is not cancelled: that would leave behind what it shields.  Not looked
            # at earlier: until its end it may begin more.
            for task in (*both, *deliveries.tasks.values()):
                task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, or asyncio reports it
        await asyncio.sleep(0.2)
