"""Restores the desired instances that a worker does not hold, and preloads models."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Literal, assert_never

from shared.instance import Instance
from shared.lifecycle import State
from shared.lookup import by_name, of_instance
from shared.memory.plan import with_settings
from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.store.instances import Crashed, Instances, NameTaken, NoLease, NotDesired
from shared.telemetry import log, trace
from worker.desired import Desired
from worker.timing import Timing

TRIES = 5  # attempts per restoration

_log = log.get("worker")


class Restorer:
    """Loads the desired instances that the worker does not hold."""

    def __init__(
        self,
        name: str,
        instances: Instances,
        desired: Desired,
        deliver: Callable[[str, float], None],
        has_files: Callable[[Instance], bool],
        models: Mapping[str, Model],
        timing: Timing,
    ) -> None:
        """`deliver` takes the id of a load and its earliest start, in seconds since the epoch.

        `has_files` returns whether the files of an instance can be loaded now.  `models` is the catalog, by key.
        """
        self._name = name
        self._instances = instances
        self._desired = desired
        self._deliver = deliver
        self._has_files = has_files
        self._models = models
        self._preloaded: set[str] = set()  # models that were considered
        self._timing = timing

    async def recall(self) -> None:
        """Add the desired instances that Redis knows and the file does not.

        If the worker does not restore, clears them in Redis instead.  Raises what UNAVAILABLE lists.
        """
        if not self._desired.is_on:
            await self._instances.clear_desired(self._name)
            return
        known = {desired.id for desired in self._desired.instances.values()}
        for record in await self._instances.many([*set((await self._instances.desired(self._name)).values()) - known]):
            self._desired.add(record)

    async def restore(self, held: Collection[str]) -> None:
        """Start to load each desired instance that is not in `held` (ids of loads), the most recently used first.

        Raises what UNAVAILABLE lists.
        """
        if self._desired.uses().keys() <= {*held}:
            return
        self._desired.use(await self._instances.uses(self._name))  # as the worker's last process wrote them
        missing = [desired for desired in self._desired.instances.values() if desired.id not in held]
        records = {record.id: record for record in await self._instances.many([desired.id for desired in missing])}
        known = await self._instances.desired(self._name)
        for desired in sorted(missing, key=lambda instance: instance.used_at or 0.0, reverse=True):
            record = records.get(desired.id)
            known_id = known.get(desired.instance_id)
            decision = decide(desired, record, known_id, has_files=self._has_files(desired))
            if decision == "wait":
                continue
            if decision == "drop":
                await self._forget(desired, record if known_id == desired.id else None)
                continue
            new = restoration(desired, f"load_{uuid.uuid4().hex}", decision, self._timing.first_pause_s)
            try:
                new = await self._instances.create(new, restores=desired.id if record else "")
            except (NameTaken, NotDesired):  # it was loaded again, or unloaded, while this worker was down
                await self._forget(desired, None)
            except NoLease:
                return
            else:
                with log.about(new):
                    _log.info("restoring", action="restoring", number=decision)
                self._desired.add(new)
                self._deliver(new.id, new.not_before)

    async def preload(self) -> None:
        """Load each model with the setting `preload` of which the worker has no instance, once in the life of a worker.

        Raises what UNAVAILABLE lists.
        """
        wanted = [
            model
            for model in self._models.values()
            if model.settings.preload and model.problem is None and model.full_key not in self._preloaded
        ]
        if not wanted:
            return
        records = [*await self._instances.live_at(self._name), *self._desired.instances.values()]
        present = [of_instance(self._models, record) for record in records]
        names = by_name([*self._models.values()])
        for model in wanted:
            if not any(one is model for one in present):
                name = model.base if names[model.base] is model else model.full_key
                try:
                    new = await self._instances.create(
                        preloading(model, name, self._name), fingerprint=model.fingerprint
                    )
                except NoLease:
                    return
                except Crashed as e:
                    _log.error("model not preloaded", action="not_preloaded", model=name, reason=e.reason)
                else:
                    with log.about(new):
                        _log.info("preloading", action="preloading", model=name)
                    self._deliver(new.id, new.not_before)
            self._preloaded.add(model.full_key)

    async def _forget(self, desired: Instance, record: Instance | None) -> None:
        await self._instances.forget_desired(desired)
        self._desired.discard(desired)
        if record is not None and record.state is State.FAILED:
            reason = record.error.message if record.error else ""
            with log.about(desired):
                _log.error("instance not restored", action="restore_given_up", reason=reason)


def decide(
    desired: Instance, record: Instance | None, known: str | None, *, has_files: bool = True
) -> Literal["wait", "drop"] | int:
    """Decide what to do about a desired instance that its worker does not hold.

    Returns "wait" to decide again later, "drop" to remove it from the desired instances, or the number of the next
    attempt to load it.  `record` is the record of its load in Redis.  `known` is the id of the load that Redis has as
    desired under its `instance_id`.  `has_files`: whether its files can be loaded now.  If not, only the first attempt
    is made, which reports the reason; the next one waits for the files, such as those of a share that is mounted late.
    """
    if desired.idle_at is not None and time.time() >= desired.idle_at:  # its idle TTL expired meanwhile
        return "drop"
    if record is None:  # Redis was emptied, or the worker was down for longer than records are retained
        return 1
    if record.worker != desired.worker:
        return "drop"
    is_restoration = record.restoring > 0 and record.loaded_at is None
    match record.state:
        case State.QUEUED | State.LOADING | State.LOADED | State.UNLOADING:
            return "wait"
        case State.LOST:
            is_desired = known == desired.id and not record.stop_requested
            return (record.restoring if is_restoration else 1) if is_desired else "drop"
        case State.FAILED:
            if not is_restoration or record.restoring >= TRIES:
                return "drop"
            if has_files:
                return record.restoring + 1
            return "wait" if known == desired.id else "drop"
        case State.UNLOADED | State.CANCELLED:
            return "drop"
        case _:
            assert_never(record.state)


def preloading(model: Model, name: str, worker: str) -> Instance:
    """Return the record of a load of a model that its worker begins by itself."""
    return Instance(
        id=f"load_{uuid.uuid4().hex}",
        model=name,
        key=model.key,
        source=model.source,
        type=model.type,
        worker=worker,
        request=with_settings(LoadRequest(model=name), model),
        traceparent=str(trace.root()),
        total_size_bytes=model.size_bytes,
    )


def restoration(desired: Instance, id_: str, number: int, first_pause_s: float) -> Instance:
    """Return the record of a new load that restores `desired`.

    From the second attempt on, `not_before` delays it by a pause that starts at `first_pause_s` and doubles.
    """
    pause_s = first_pause_s * 2 ** (number - 2) if number > 1 else 0.0
    return Instance(
        id=id_,
        model=desired.model,
        key=desired.key,
        source=desired.source,
        type=desired.type,
        worker=desired.worker,
        request=desired.request,
        traceparent=str(trace.root()),  # a new trace: no client requested it
        total_size_bytes=desired.total_size_bytes,
        restoring=number,
        not_before=time.time() + pause_s if pause_s else 0.0,
        used_at=desired.used_at,
        instance_id=desired.instance_id,
    )
