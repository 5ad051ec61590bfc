"""The right to a worker's name: on this host by a lock on its data directory, in the pool by a lease in Redis."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shared import filelock
from shared.lifecycle import State
from shared.schema.model import Model
from shared.settings import Settings, SettingsError
from shared.store.connection import UNAVAILABLE
from shared.telemetry import log
from worker.agent import Agent, LeaseLost
from worker.runner.sockets import place_sockets

TEMPORARY = "loadstone-worker-"  # how the names of our temporary directories begin

_log = log.get("worker")


@contextmanager
def owned(settings: Settings, epoch: str) -> Iterator[str]:
    """Hold this worker's name on this data directory until the process ends; yields the epoch of the last holder.

    The lock's file names the holder's epoch and its directory for temporary files, where multiprocessing puts its
    sockets.  Removes the directory that a killed holder left.  Raises SettingsError when another process has the name.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = settings.data_dir / f"worker-{settings.name}.lock"
    with ExitStack() as stack:
        try:
            file = stack.enter_context(filelock.lock(path))
        except filelock.Held:
            raise SettingsError(
                f"a worker named '{settings.name}' already runs on the data directory {settings.data_dir}."
            ) from None
        file.seek(0)
        dead_epoch, _, left = file.read().strip().partition(" ")
        if left and Path(left).name.startswith(TEMPORARY):
            shutil.rmtree(left, ignore_errors=True)
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True))
        file.truncate(0)
        file.write(f"{epoch} {temporary}")
        file.flush()
        place_sockets(temporary)
        yield dead_epoch


async def take_lease(agent: Agent, models: list[Model], dead_epoch: str) -> None:
    """Take the lease at once from our own dead predecessor, or as soon as another's runs out; with it, and not before,
    the catalog is ours.  Raises LeaseLost.

    What the predecessor held is lost, or begun anew if it was not loaded yet: its runners left when it died.
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
            _log.warning("lease not taken", action="redis_unavailable", error=str(e))
            deadline = asyncio.get_running_loop().time() + agent.store.workers.lease_s + 1
        if asyncio.get_running_loop().time() > deadline:
            raise LeaseLost(f"a worker named '{agent.name}' is alive elsewhere; give this one another name.")
        await asyncio.sleep(0.2)
