"""Exclusive ownership of a worker's name: by a lock file in its data directory, and by a lease in Redis."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec import Struct

from shared import filelock
from shared.lifecycle import State
from shared.schema.model import Model
from shared.settings import Settings, SettingsError, variable
from shared.store.connection import UNAVAILABLE
from shared.telemetry import log
from worker.agent import Agent, LeaseLost
from worker.runner.sockets import place_sockets

TEMPORARY = "loadstone-worker-"  # prefix of a worker's temporary directory

_log = log.get("worker")


class Owned(Struct, frozen=True):
    """The name of a worker, as this process owns it."""

    dead_epoch: str  # of the previous holder
    directory: Path  # temporary, of this process alone


@contextmanager
def owned(settings: Settings, epoch: str) -> Iterator[Owned]:
    """Hold the lock of this worker's name in the data directory.

    The lock file contains the holder's epoch and its temporary directory, in which multiprocessing puts its sockets.
    Removes the directory that a killed holder left behind.  Raises SettingsError if another process holds the lock, or
    if the data directory is not writable.
    """
    path = settings.data_dir / f"worker-{settings.name}.lock"
    with ExitStack() as stack:
        try:
            settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = stack.enter_context(filelock.lock(path))
        except filelock.Held:
            raise SettingsError(
                f"a worker named '{settings.name}' already runs on the data directory {settings.data_dir}."
            ) from None
        except OSError as e:
            where = f"{variable('data_dir')} is '{settings.data_dir}'"
            raise SettingsError(f"{where}: it must be a writable directory ({e.strerror}).") from None
        file.seek(0)
        dead_epoch, _, left = file.read().strip().partition(" ")
        if left and Path(left).name.startswith(TEMPORARY):
            shutil.rmtree(left, ignore_errors=True)
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True))
        file.truncate(0)
        file.write(f"{epoch} {temporary}")
        file.flush()
        place_sockets(temporary)
        yield Owned(dead_epoch, Path(temporary))


async def take_lease(agent: Agent, models: list[Model], dead_epoch: str) -> None:
    """Take the lease and publish the catalog: at once from this worker's dead predecessor (`dead_epoch`), from another
    process once its lease expires.

    The predecessor's instances are marked lost, or requeued if they were not loaded yet: its runners exited with it.
    Raises LeaseLost.
    """
    deadline = asyncio.get_running_loop().time() + agent.store.workers.lease_s + 1
    while True:
        try:
            is_free = await agent.publish(models, dead_epoch)
            if is_free and await agent.store.workers.renew(agent.snapshot(), dead_epoch) != "refused":
                await agent.restorer.recall()
                for instance in await agent.store.instances.live_at(agent.name):
                    if instance.state is not State.QUEUED and instance.epoch != agent.epoch:
                        await agent.reconciler.give_up(instance)
                return
        except UNAVAILABLE as e:
            _log.warning("lease not acquired", action="redis_unavailable", error=str(e))
            deadline = asyncio.get_running_loop().time() + agent.store.workers.lease_s + 1
        if asyncio.get_running_loop().time() > deadline:
            raise LeaseLost(f"another live worker is named '{agent.name}'; give this worker a different name.")
        await asyncio.sleep(0.2)
