"""The use cases: load a model, unload an instance, list what there is."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing, suppress

import msgspec

from api.headers import FIRST, is_after
from api.loads.follow import RECORD_LOST, Follower
from api.loads.jobs import event, is_over, outcome, status
from api.pool.listing import nowhere
from api.pool.roster import Candidate, Roster
from api.single_flight import SingleFlight
from shared.errors import (
    ErrorBody,
    IdempotencyKeyReused,
    InvalidValue,
    JobAlreadyFinished,
    JobNotFound,
    LoadFailed,
    ModelNotFound,
    NoWorker,
    QueueFull,
    QueueUnavailable,
    ServiceError,
    crashed_lately,
)
from shared.instance import Instance
from shared.lifecycle import TERMINAL, Event, State
from shared.memory.placement import Placement
from shared.schema.http import HeldInstance, JobStatus, ListedWorker, LoadedInstance, LoadRequest, ModelList
from shared.settings import Settings
from shared.store.instances import Crashed, Fenced, Full, KeyTaken, NoLease, Remembered
from shared.store.store import Store
from shared.telemetry import log

STOP_DEADLINE_S = 60.0

_log = log.get("api")


class ReportedFailure(ServiceError):
    """A failure that a worker already put into words."""

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self._body = body
        if body.type == NoWorker.type:
            self.retry_after_s = NoWorker.retry_after_s

    def body(self) -> ErrorBody:
        return self._body


class Loads:
    def __init__(self, settings: Settings, store: Store, roster: Roster, follower: Follower) -> None:
        self.settings = settings
        self.store = store
        self.roster = roster
        self.follower = follower
        self._records = SingleFlight(self._read)
        self._lists = SingleFlight(self._list)

    async def submit(self, request: LoadRequest, idempotency_key: str = "", traceparent: str = "") -> Instance:
        """Accept a load: choose a worker, write the record, put the delivery into the worker's queue; or, where the
        key was sent before with the same request, return the load that it made, which keeps the trace of the first.

        Raises ModelNotFound, NoWorker, QueueFull, InvalidValue (against the model's limits), LoadFailed for a file
        that its worker could not read or that crashed the engine lately, and IdempotencyKeyReused.  Then nothing was
        accepted.
        """
        key = digest = ""
        if idempotency_key:
            key, digest = _digest(idempotency_key.encode()), _digest(msgspec.msgpack.encode(request))
            if (found := await self.store.instances.remembered(key)) is not None:
                return await self._joined(found, digest)
        full: Full | None = None
        gone: set[str] = set()  # workers that could not take it
        for last in (False, True):
            try:
                while (chosen := self._choose(request, gone)) is not None:
                    try:
                        return await self._create(request, *chosen, key, digest, traceparent)
                    except NoLease:
                        pass
                    except KeyTaken as e:
                        return await self._joined(e.remembered, digest)
                    except Full as e:
                        full = e if full is None else min(full, e, key=lambda f: f.retry_after_s)
                    gone.add(chosen[0].worker)
            except InvalidValue:  # against what was published a beat ago
                if last:
                    raise
            if not last and full is None:
                await self.roster.refresh()
                gone.clear()
        if full is not None:
            raise QueueFull(f"{full.limit} loads wait already, and no more may.", full.retry_after_s)
        raise nowhere(request, self.roster.candidates(request)[1])

    def _choose(self, request: LoadRequest, without: Collection[str]) -> tuple[Candidate, Placement | None] | None:
        """The worker that is to take a load, of those that are left.  Raises InvalidValue."""
        candidates, _ = self.roster.candidates(request, without)
        return self.roster.choose(candidates, request) if candidates else None

    async def _create(
        self,
        request: LoadRequest,
        candidate: Candidate,
        placement: Placement | None,
        key: str,
        digest: str,
        traceparent: str,
    ) -> Instance:
        """Write the record and its delivery, at once.  Raises NoLease if the worker has just gone, KeyTaken, Full, and
        LoadFailed for a file that its worker could not read or that crashed the engine lately."""
        model = candidate.model
        if model.problem is not None:
            raise LoadFailed(model.problem.code, model.type, request.model, model.problem.message)
        try:
            made = await self.store.instances.create(
                Instance(
                    id=f"load_{uuid.uuid4().hex}",
                    model=request.model,
                    key=model.key,
                    type=model.type,
                    worker=candidate.worker,
                    request=request,
                    traceparent=traceparent,
                    total_size_bytes=model.size_bytes,
                ),
                at_most=(self.settings.worker_queue_limit, self.settings.queue_limit),
                key=key,
                digest=digest,
                fingerprint=model.fingerprint,
                deliver=True,
            )
        except Crashed as e:
            raise crashed_lately(model.type, request.model, e.reason, e.left_s) from e
        self.roster.placed(made, placement)
        log.bind(**made.ids)
        _log.info("accepted", action="accepted", model=made.key)
        return made

    async def _joined(self, found: Remembered, digest: str) -> Instance:
        """The load that an Idempotency-Key stands for.  Raises IdempotencyKeyReused."""
        if found.digest != digest:
            raise IdempotencyKeyReused(
                "This Idempotency-Key was sent before with another request. Send a new key with a new request.",
                param="Idempotency-Key",
            )
        instance = await self.job(found.id)
        log.bind(**instance.ids)
        _log.info("joined", action="joined")
        return instance

    # ---- following

    async def loaded(self, instance: Instance) -> Instance:
        """Follow a load to its end.  Returns the record at `loaded`; raises what became of it otherwise."""
        async with aclosing(self.follower.follow(instance)) as revisions:
            async for _, revision in revisions:
                if revision.state is State.LOADED:
                    return revision
                if (error := outcome(revision)) is not None:
                    raise ReportedFailure(error)
        raise QueueUnavailable("The log of this load ended without an outcome.")

    async def job(self, job_id: str) -> Instance:
        """The record of a load.  Raises JobNotFound."""
        instance = await self._records(job_id)
        if instance is None:
            raise JobNotFound(f"Job '{job_id}' not found.", param="job_id")
        return instance

    async def _read(self, ids: Sequence[str]) -> dict[str, Instance | None]:
        return {**dict.fromkeys(ids), **{instance.id: instance for instance in await self.store.instances.many(ids)}}

    async def settled(self, instance: Instance, within_s: float) -> Instance:
        """The record once its load is over, or as it is when the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                return await self._until(instance.id, is_over)
        return await self.job(instance.id)

    async def _until(self, id_: str, is_wanted: Callable[[Instance], bool]) -> Instance:
        """The record as soon as it is as wanted.  What the log held before is in the record, and not read again."""
        last = await self.store.instances.last_entry(id_)
        record = await self.store.instances.get(id_)
        if record is None:
            raise QueueUnavailable(RECORD_LOST)
        if is_wanted(record):
            return record
        async with aclosing(self.follower.follow(record, last)) as revisions:
            async for _, revision in revisions:
                if is_wanted(revision):
                    return revision
        raise QueueUnavailable("The log of this load ended without an outcome.")

    async def resumed(self, instance: Instance, after: str) -> str | None:
        """The entry of a load's log after which its events go on for a client that saw `after` last; None where it
        has seen them all."""
        if after == FIRST or is_after(after, await self.store.instances.last_entry(instance.id)):
            return FIRST  # what it saw was of another load, or of none
        if is_over(instance):
            left = await self.store.instances.history(instance, after)
            if all(event(revision) is None for _, revision in left):
                return None
        return after

    async def jobs(self, status_wanted: JobStatus | None, limit: int) -> list[Instance]:
        """Loads of the last day, newest first."""
        found: list[Instance] = []
        async with aclosing(self.store.instances.newest()) as newest:
            async for instance in newest:
                if status_wanted is None or status(instance) == status_wanted:
                    found.append(instance)
                if len(found) == limit:
                    break
        return found

    async def engine_log(self, job_id: str) -> bytes:
        """What the engine said in a load, empty before it said anything.  Raises JobNotFound."""
        found = await self.store.instances.engine_log(job_id)
        if found is None:
            await self.job(job_id)
        return found or b""

    # ---- stopping

    async def cancel(self, job_id: str) -> Instance:
        """Stop a load; returns its record once its runner is gone.

        Raises JobNotFound, JobAlreadyFinished, also where the load comes to another end first, and QueueUnavailable
        after STOP_DEADLINE_S.
        """
        instance = await self.job(job_id)
        if is_over(instance):
            raise _finished(job_id)
        ended = await self._stop(instance, unless_loaded=True)
        if ended.state is not State.CANCELLED:  # another end came first; of a lost one nobody knows the memory
            raise _finished(job_id)
        return ended

    async def unload(self, instance_id: str) -> None:
        """Stop an instance and return once its runner is gone; one that is not loaded yet is cancelled, and one whose
        worker is away, or dies meanwhile, is not loaded again when that comes back.

        Raises ModelNotFound, and QueueUnavailable after STOP_DEADLINE_S.
        """
        was_wanted = await self.store.instances.forget_desired_everywhere(
            instance_id
        )  # first: nothing is restored from now on
        id_ = await self.store.instances.named(instance_id)
        instance = await self.store.instances.get(id_) if id_ else None
        is_gone = instance is None or (await self._stop(instance)).state is State.LOST
        if is_gone and not was_wanted:
            raise ModelNotFound(f"Model with instance identifier '{instance_id}' is not loaded.", param="instance_id")

    async def _stop(self, instance: Instance, *, unless_loaded: bool = False) -> Instance:
        """Ask for a stop and follow it to the terminal revision, or to `loaded` where that is to stay."""
        await self.store.instances.request_stop(instance.id, unless_loaded=unless_loaded)
        if instance.state is State.QUEUED:
            with suppress(Fenced):  # its worker was quicker
                return (await self.store.instances.commit(instance, instance.after(Event.STOP)))[0]
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_DEADLINE_S):
                return await self._until(
                    instance.id, lambda i: i.state in TERMINAL or (unless_loaded and i.loaded_at is not None)
                )
        raise QueueUnavailable(f"'{instance.instance_id}' was asked to stop and has not yet. Try again shortly.")

    async def workers(self) -> list[ListedWorker]:
        """Every worker that is alive, with what it holds or is to hold."""
        await self.roster.refresh()  # who sees a worker here can load onto it
        held: dict[str, list[HeldInstance]] = {}
        for instance in sorted(await self.store.instances.live(), key=lambda i: (i.created_at, i.id)):
            held.setdefault(instance.worker, []).append(
                HeldInstance(
                    id=instance.instance_id, state=instance.state, model=instance.model, devices=instance.devices
                )
            )
        return [
            ListedWorker(
                name=worker.name,
                state=snapshot.state,
                devices=snapshot.devices,
                instances=held.get(worker.name, []),
                lease_age_seconds=round(max(0.0, snapshot.lease_s - worker.lease_left_s), 3),
                version=snapshot.version,
            )
            for worker in self.roster.workers
            if (snapshot := worker.snapshot) is not None
        ]

    async def models(self) -> bytes:
        """Every model that can be loaded, with its instances that are loaded now: a ModelList as JSON."""
        return await self._lists(None)

    async def _list(self, _keys: Sequence[None]) -> dict[None, bytes]:
        # A worker that is ready must be seen at once.
        _, live = await asyncio.gather(self.roster.refresh(), self.store.instances.live())
        loaded: dict[str, list[LoadedInstance]] = {}
        for instance in sorted(live, key=lambda i: (i.created_at, i.id)):
            holder = self.roster.alive.get(instance.worker)
            usable = instance.state is State.LOADED and holder is not None and holder.epoch == instance.epoch
            if usable and instance.load_config is not None:
                loaded.setdefault(instance.key, []).append(
                    LoadedInstance(
                        id=instance.instance_id,
                        config=instance.load_config,
                        worker=instance.worker,
                        devices=instance.devices,
                        remaining_ttl_seconds=None
                        if instance.idle_at is None
                        else round(max(0.0, instance.idle_at - time.time()), 3),
                    )
                )
        models = [
            msgspec.structs.replace(model, loaded_instances=loaded[model.key]) if model.key in loaded else model
            for model in self.roster.listed()
        ]
        return {None: msgspec.json.encode(ModelList(models=models))}


def _finished(job_id: str) -> JobAlreadyFinished:
    return JobAlreadyFinished(f"Job '{job_id}' has already finished.", param="job_id")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
