"""Cancels loads and unloads instances."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from api.loads.follow import Follower
from api.loads.jobs import is_over
from api.loads.records import Records
from shared.errors import JobAlreadyFinished, ModelNotFound, QueueUnavailable
from shared.instance import Instance
from shared.lifecycle import TERMINAL, Event, State
from shared.lookup import folded
from shared.store.instances import Fenced, Instances

STOP_DEADLINE_S = 60.0


class Stopper:
    """Stops loads and instances, and waits until their memory is free.

    Every method raises what UNAVAILABLE lists if Redis does not answer, and QueueUnavailable after STOP_DEADLINE_S.
    """

    def __init__(self, instances: Instances, records: Records, follower: Follower) -> None:
        self._instances = instances
        self._records = records
        self._follower = follower

    async def cancel(self, job_id: str) -> Instance:
        """Cancel a load; return its record once its runner has exited.

        Raises JobNotFound, and JobAlreadyFinished if the load has ended or ends in another way first.
        """
        instance = await self._records.get(job_id)
        if is_over(instance):
            raise _finished(job_id)
        ended = await self._stop(instance, unless_loaded=True)
        if ended.state is not State.CANCELLED:  # ended in another way; a lost instance may still hold memory
            raise _finished(job_id)
        return ended

    async def unload(self, instance_id: str) -> str:
        """Unload an instance; return its id once its runner has exited.

        An id that is not loaded means the same id in lower case and without `-gguf`: a client may use the name by which
        it loaded the model.  If the instance is not loaded yet, its load is cancelled.  If its worker is unavailable or
        dies meanwhile, the instance is not restored when the worker returns.  Raises ModelNotFound.
        """
        for spelled in dict.fromkeys((instance_id, folded(instance_id))):
            if await self._unloaded(spelled):
                return spelled
        raise ModelNotFound(f"Model with instance identifier '{instance_id}' is not loaded.", param="instance_id")

    async def _unloaded(self, instance_id: str) -> bool:
        """Unload an instance; return whether there was one."""
        # This comes first, so that no worker restores the instance from now on.
        was_desired = await self._instances.forget_desired_everywhere(instance_id)
        id_ = await self._instances.named(instance_id)
        instance = await self._instances.get(id_) if id_ else None
        is_gone = instance is None or (await self._stop(instance)).state is State.LOST
        return was_desired or not is_gone

    async def _stop(self, instance: Instance, *, unless_loaded: bool = False) -> Instance:
        """Request a stop; return the terminal revision, or with `unless_loaded` the loaded one, if it comes first."""
        await self._instances.request_stop(instance.id, unless_loaded=unless_loaded)
        if instance.state is State.QUEUED:
            with suppress(Fenced):  # its worker was faster
                return (await self._instances.commit(instance, instance.after(Event.STOP)))[0]

        def is_stopped(revision: Instance) -> bool:
            return revision.state in TERMINAL or (unless_loaded and revision.loaded_at is not None)

        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_DEADLINE_S):
                return await self._follower.until(instance.id, is_stopped)
        raise QueueUnavailable(f"'{instance.instance_id}' is still stopping. Try again shortly.")


def _finished(job_id: str) -> JobAlreadyFinished:
    return JobAlreadyFinished(f"Job '{job_id}' has already finished.", param="job_id")
