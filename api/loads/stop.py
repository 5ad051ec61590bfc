"""Cancels loads and unloads instances."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import NamedTuple

from api.loads.follow import Follower
from api.loads.jobs import is_over
from api.loads.records import Records
from shared.errors import JobAlreadyFinished, ModelNotFound, QueueUnavailable
from shared.instance import Instance
from shared.lifecycle import TERMINAL, Event, State
from shared.lookup import folded
from shared.store.instances import Fenced, Instances

STOP_DEADLINE_S = 60.0


class Unloading(NamedTuple):
    """An instance to be unloaded; `instance` is None, or is lost, if only its restoration had to be prevented."""

    instance_id: str
    instance: Instance | None
    was_desired: bool


class Stopper:
    """Stops loads and instances, and waits until their memory is free.

    A stop and the wait for it are separate, so that a client that leaves ends the wait and does not interrupt a stop
    that is half done.

    Every method raises what UNAVAILABLE lists if Redis does not answer.  The waits raise QueueUnavailable
    STOP_DEADLINE_S after the requests of an instance had to end.
    """

    def __init__(self, instances: Instances, records: Records, follower: Follower, unload_wait_s: float) -> None:
        """`unload_wait_s`: the time that requests get to end when their instance is unloaded."""
        self._deadline_s = unload_wait_s + STOP_DEADLINE_S
        self._instances = instances
        self._records = records
        self._follower = follower

    async def cancel(self, job_id: str) -> Instance:
        """Cancel a load; return its record, for `cancelled`.  Raises JobNotFound, and JobAlreadyFinished."""
        instance = await self._records.get(job_id)
        if is_over(instance):
            raise _finished(job_id)
        return await self._stop(instance, unless_loaded=True)

    async def cancelled(self, instance: Instance) -> Instance:
        """Wait until the runner of a cancelled load has exited; return the record.

        Raises JobAlreadyFinished if the load ended in another way first.
        """
        ended = await self._ended(instance, unless_loaded=True)
        if ended.state is not State.CANCELLED:  # ended in another way; a lost instance may still hold memory
            raise _finished(instance.id)
        return ended

    async def unload(self, instance_id: str) -> Unloading:
        """Unload an instance; return what `unloaded` waits for.

        An id that is not loaded means the same id in lower case and without `-gguf`: a client may use the name by which
        it loaded the model.  If the instance is not loaded yet, its load is cancelled.  If its worker is unavailable or
        dies meanwhile, the instance is not restored when the worker returns.  Raises ModelNotFound.
        """
        for spelled in dict.fromkeys((instance_id, folded(instance_id))):
            # This comes first, so that no worker restores the instance from now on.
            was_desired = await self._instances.forget_desired_everywhere(spelled)
            id_ = await self._instances.named(spelled)
            instance = await self._instances.get(id_) if id_ else None
            if instance is not None or was_desired:
                return Unloading(spelled, instance and await self._stop(instance), was_desired)
        raise _not_loaded(instance_id)

    async def unloaded(self, unloading: Unloading) -> None:
        """Wait until the runner of an unloaded instance has exited.  Raises ModelNotFound if it was lost before."""
        instance_id, instance, was_desired = unloading
        if instance is not None and (await self._ended(instance)).state is State.LOST and not was_desired:
            raise _not_loaded(instance_id)

    async def _stop(self, instance: Instance, *, unless_loaded: bool = False) -> Instance:
        """Request a stop; return the record, which is terminal if no worker had begun the load."""
        await self._instances.request_stop(instance.id, unless_loaded=unless_loaded)
        if instance.state is State.QUEUED:
            with suppress(Fenced):  # its worker was faster
                return (await self._instances.commit(instance, instance.after(Event.STOP)))[0]
        return instance

    async def _ended(self, instance: Instance, *, unless_loaded: bool = False) -> Instance:
        """Return the terminal revision, or with `unless_loaded` the loaded one, if it comes first."""

        def is_stopped(revision: Instance) -> bool:
            return revision.state in TERMINAL or (unless_loaded and revision.loaded_at is not None)

        if is_stopped(instance):
            return instance
        with suppress(TimeoutError):
            async with asyncio.timeout(self._deadline_s):
                return await self._follower.until(instance.id, is_stopped)
        raise QueueUnavailable(f"'{instance.instance_id}' is still stopping. Try again shortly.")


def _not_loaded(instance_id: str) -> ModelNotFound:
    return ModelNotFound(f"Model with instance identifier '{instance_id}' is not loaded.", param="instance_id")


def _finished(job_id: str) -> JobAlreadyFinished:
    return JobAlreadyFinished(f"Job '{job_id}' has already finished.", param="job_id")
