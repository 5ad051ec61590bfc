"""A worker process: takes its lease, then runs the agent's beat, arq's worker, and the catalog side by side."""

from __future__ import annotations

import asyncio
import fcntl
import multiprocessing
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from arq.connections import ArqRedis
from arq.utils import timestamp_ms
from arq.worker import Worker as ArqWorker
from arq.worker import func

from shared import log
from shared.lifecycle import State
from shared.schema import Model
from shared.settings import Settings, SettingsError, redis_url
from shared.store import SIZED_S, UNAVAILABLE, Store, check_cancelled, connected, pack_job, queue_of, unpack_job
from worker.agent import Agent, LeaseLost
from worker.devices import locked
from worker.scanner import catalogs

FALLBACK_S = 1.0  # a notification may be lost; the queue is looked at this often without one
FIRST_CATALOG_S = 60.0
END_S = 2.0
TEMPORARY = "loadstone-worker-"  # how the names of our temporary directories begin

_log = log.get("worker")


class Deliveries(ArqWorker):
    """arq's worker on this worker's queue, woken by notification instead of polling.

    A load's job is only a delivery: it hands an id to the agent and is done.  The claim of the record decides who
    loads, so arq's retries and results are off.  Only of the question what a load would take is the result the answer.
    """

    def __init__(self, redis: ArqRedis, agent: Agent) -> None:
        async def load(_: dict[Any, Any], id_: str) -> None:
            agent.deliver(id_)

        async def size(_: dict[Any, Any], sizing: bytes) -> bytes:
            return await agent.sizer.sized(sizing)

        super().__init__(
            [
                func(cast(Any, load), name="load"),
                func(cast(Any, size), name="size", timeout=SIZED_S, keep_result=SIZED_S),
            ],
            queue_name=queue_of(agent.name),
            redis_pool=redis,
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


async def run(settings: Settings, heartbeat: Callable[[], None]) -> None:
    """Work until SIGTERM or SIGINT, then drain; a second signal ends the process where it stands, and runners leave
    at the end of their stream.  Raises SettingsError, and LeaseLost (also in a group)."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, on_signal)
    epoch = uuid.uuid4().hex
    with owned(settings, epoch) as dead_epoch, ExitStack() as locks:
        async with connected(redis_url(settings)) as redis:
            agent = Agent(settings, Store(redis, settings.lease_s, restores=settings.restore == "on"), epoch, heartbeat)
            locks.enter_context(locked(settings.lock_dir or settings.data_dir / "devices", agent.devices.gpus))
            work = asyncio.create_task(_work(settings, redis, agent, dead_epoch))
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
            finally:
                work.cancel()
                await asyncio.wait({work}, timeout=END_S)
                await agent.drain()
                await agent.runners.close()
                with suppress(*UNAVAILABLE):  # last: from then on the pool counts how long we are away
                    await agent.store.release(agent.name, epoch)


@contextmanager
def owned(settings: Settings, epoch: str) -> Iterator[str]:
    """Hold this worker's name on this data directory for life; yields the epoch of its last, dead holder.

    The lock is a `flock`: the kernel drops it when the process dies, however it dies.  Its file names the holder's
    epoch and directory for temporary files, where multiprocessing puts its sockets: what a holder that was killed left
    of it is removed by the next one.  Raises SettingsError.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = settings.data_dir / f"worker-{settings.name}.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"a worker named '{settings.name}' already runs on the data directory {settings.data_dir}."
            ) from None
        file.seek(0)
        dead_epoch, _, left = file.read().strip().partition(" ")
        if left and Path(left).name.startswith(TEMPORARY):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True) as temporary:
            file.truncate(0)
            file.write(f"{epoch} {temporary}")
            file.flush()
            # As multiprocessing.util.get_temp_dir remembers it; one that it made itself would stay after a SIGKILL.
            multiprocessing.current_process()._config["tempdir"] = temporary  # type: ignore[attr-defined]
            yield dead_epoch


async def _work(settings: Settings, redis: ArqRedis, agent: Agent, dead_epoch: str) -> None:
    """Ready means: a catalog is published, a runner is warm, the lease is ours.  In this order."""
    agent.runners.prepare()
    agent.wanted.read()
    found = catalogs(
        settings.models_dir,
        settings.data_dir / f"catalog-{agent.name}.msgpack",
        log_level=settings.log_level,
        log_format=settings.log_format,
    )
    async with aclosing(found) as lists:
        async with asyncio.timeout(FIRST_CATALOG_S):
            first = await anext(lists)
        await agent.warm()
        await _take_lease(agent, first, dead_epoch)
        _log.info("ready", action="ready", models=len(first))
        async with asyncio.TaskGroup() as group:
            group.create_task(agent.beat())
            group.create_task(agent.tell())
            group.create_task(_deliveries(redis, agent))
            group.create_task(agent.wanted.keep())
            group.create_task(agent.watch_files())
            async for models in lists:
                await _published(agent, models)


async def _published(agent: Agent, models: list[Model]) -> None:
    while True:
        try:
            await agent.publish(models)
        except UNAVAILABLE as e:
            _log.warning("catalog not published", action="redis_unavailable", error=str(e))
            await asyncio.sleep(1)
        else:
            return


async def _take_lease(agent: Agent, models: list[Model], dead_epoch: str) -> None:
    """Take the lease at once from our own dead predecessor, or as soon as another's runs out; with it, and not before,
    the catalog is ours.  Raises LeaseLost.

    What the predecessor held is lost, or begun anew if it was not loaded yet: its runners left when it died.
    """
    deadline = asyncio.get_running_loop().time() + agent.store.lease_s + 1
    while True:
        try:
            is_free = await agent.publish(models, dead_epoch)
            if is_free and await agent.store.renew(agent.snapshot(), dead_epoch) != "refused":
                await agent.recall()
                for instance in await agent.store.live_at(agent.name):
                    if instance.state is not State.QUEUED and instance.epoch != agent.epoch:
                        await agent.give_up(instance)
                return
        except UNAVAILABLE as e:
            _log.warning("lease not taken", action="redis_unavailable", error=str(e))
            deadline = asyncio.get_running_loop().time() + agent.store.lease_s + 1
        if asyncio.get_running_loop().time() > deadline:
            raise LeaseLost(f"a worker named '{agent.name}' is alive elsewhere; give this one another name.")
        await asyncio.sleep(0.2)


async def _deliveries(redis: ArqRedis, agent: Agent) -> None:
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
