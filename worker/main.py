"""A worker process: takes its lease, then runs the agent's beat, the deliveries and the catalog concurrently."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Callable
from contextlib import ExitStack, aclosing, suppress
from functools import partial

import msgspec
from redis.asyncio import Redis

from shared.race import first, racing
from shared.schema.model import Model
from shared.settings import Settings, redis_url, variable
from shared.store.connection import UNAVAILABLE, connected
from shared.store.steady import local_host
from shared.store.store import Store
from shared.telemetry import log
from worker.agent import Agent
from worker.catalog.scanner import catalogs
from worker.deliveries import take_deliveries
from worker.hub.client import Access
from worker.lease import owned, take_lease
from worker.listener.port import opened
from worker.memory.devices import locked
from worker.sandbox import landlock, seccomp

FIRST_CATALOG_S = 60.0
END_S = 2.0

_log = log.get("worker")


class CatalogLate(Exception):
    """The first catalog did not arrive in time."""


async def run(settings: Settings, heartbeat: Callable[[], None], hub: Access | None = None) -> None:
    """Run the worker until SIGTERM or SIGINT, then drain.  `hub`: where models are downloaded from, None: nowhere.

    A second signal exits at once; the runners then exit at the end of their streams.  Raises SettingsError,
    LeaseLost, CatalogLate, RunnerDied and RunnerStuck, also in a group.
    """
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, on_signal)
    epoch = uuid.uuid4().hex
    with owned(settings, epoch) as name, ExitStack() as stack:
        async with connected(redis_url(settings)) as redis:
            store = Store(redis, settings.lease_s, restores=settings.restore == "on")
            agent = Agent(settings, store, epoch, heartbeat, hub=hub)
            stack.enter_context(locked(settings.lock_dir or settings.data_dir / "devices", agent.devices.gpus))
            sockets = settings.data_dir / f"worker-{agent.name}.sock", name.directory / "worker.sock"
            port = stack.enter_context(opened(settings, partial(local_host, redis)))
            stack.enter_context(agent.listener.bound(sockets, port))
            work = asyncio.create_task(_work(settings, redis, agent, name.dead_epoch))
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    async with racing(agent.finish(), asyncio.shield(work)) as ends:
                        await first(ends)
                if work.done():
                    work.result()
            finally:
                work.cancel()
                await asyncio.wait({work}, timeout=END_S)
                await agent.drain()
                await agent.runners.close()
                with suppress(*UNAVAILABLE):  # last: the pool measures the worker's absence from here on
                    await agent.store.workers.release(agent.name, epoch)


async def _work(settings: Settings, redis: Redis, agent: Agent, dead_epoch: str) -> None:
    """Become ready, then work: read the first catalog, wait for a warm runner, publish and take the lease."""
    agent.runners.prepare()
    agent.desired.read()
    scanned = catalogs(
        settings.roots,
        settings.data_dir / f"catalog-{agent.name}.msgpack",
        log_level=settings.log_level,
        log_format=settings.log_format,
    )
    async with aclosing(scanned) as lists, asyncio.TaskGroup() as group:
        group.create_task(agent.listener.run())
        try:
            async with asyncio.timeout(FIRST_CATALOG_S):
                first = await anext(lists)
        except TimeoutError:
            where = f"{variable('models_dir')} is '{settings.models_dir}'"
            raise CatalogLate(f"{where}: it could not be read within {FIRST_CATALOG_S:g} s.") from None
        await agent.warm()
        agent.problems = first.problems
        await take_lease(agent, first.models, dead_epoch)
        engine = msgspec.to_builtins(agent.runners.engine)
        _log.info("ready", action="ready", models=len(first.models), **engine)
        _log_confinement()
        for task in (
            agent.beat(),
            agent.announce_changes(),
            take_deliveries(redis, agent),
            agent.downloads.run(),
            agent.desired.keep(),
            agent.watch_files(),
        ):
            group.create_task(task)
        async for listed in lists:
            agent.problems = listed.problems
            await _publish(agent, listed.models)


def _log_confinement() -> None:
    """Log which protections against an attacker in a runner are in force on this host."""
    known, filters = landlock.version(), seccomp.is_available()
    write = _log.info if known >= landlock.COMPLETE and filters else _log.warning
    write("runners are confined", action="confined", landlock=known, seccomp=filters)


async def _publish(agent: Agent, models: list[Model]) -> None:
    while True:
        try:
            await agent.publish(models)
        except UNAVAILABLE as e:
            _log.warning("catalog not published", action="redis_unavailable", error=str(e))
            await asyncio.sleep(1)
        else:
            return
