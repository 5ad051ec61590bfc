"""Accepts loads: chooses a worker and writes the record."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection
from contextlib import suppress

import msgspec
from msgspec import Struct

from api.loads.departures import Departures, identity
from api.loads.records import Records
from api.pool.roster import Candidate, Roster
from shared.errors import IdempotencyKeyReused, InvalidValue, LoadFailed, QueueFull, crashed_recently
from shared.instance import Instance
from shared.memory.placement import Placement
from shared.memory.plan import with_settings
from shared.schema.http import LoadRequest
from shared.store.instances import Crashed, Full, Instances, Joined, KeyTaken, NoLease, Remembered
from shared.store.queue import Queue
from shared.telemetry import log

_log = log.get("api")


class Submission(Struct, frozen=True, kw_only=True):
    """A load request.

    `key` and `digest` are the digests of its Idempotency-Key and of the request; "" if it has no key.  `caller` is the
    digest of the caller's API token; "" if the API has none.  `without`: of a load on demand, ids of instances that it
    does not join.
    """

    request: LoadRequest
    traceparent: str
    key: str = ""
    digest: str = ""
    caller: str = ""
    on_demand: bool = False
    without: Collection[str] = ()


class Intake:
    """Accepts loads.  `at_most`: the maximum queue length of one worker, and of the whole pool."""

    def __init__(
        self,
        roster: Roster,
        queue: Queue,
        instances: Instances,
        records: Records,
        departures: Departures,
        at_most: tuple[int, int],
    ) -> None:
        self._roster = roster
        self._queue = queue
        self._instances = instances
        self._records = records
        self._departures = departures
        self._at_most = at_most

    async def submit(
        self, request: LoadRequest, idempotency_key: str = "", traceparent: str = "", caller: str = ""
    ) -> Instance:
        """Accept a load: choose a worker, write the record, and put the delivery into the queue of the worker.

        Returns an existing load, which keeps its first trace, if the key was used before with the same request; or,
        without a key, if an identical request of the same caller is under way and its requester has left.

        Raises ModelNotFound, NoWorker, QueueFull, InvalidValue (the request exceeds the limits of the model),
        LoadFailed (the file cannot be read or crashed the engine recently), IdempotencyKeyReused, and what UNAVAILABLE
        lists if Redis does not answer.
        """
        key = digest = ""
        if idempotency_key:
            key, digest = _digest(idempotency_key.encode()), _digest(msgspec.msgpack.encode(request))
            if (remembered := await self._instances.remembered(key)) is not None:
                return await self._joined(remembered, digest)
        await self._departures.settled()
        submission = Submission(request=request, traceparent=traceparent, key=key, digest=digest, caller=caller)
        try:
            return await self._accepted_now_or_refreshed(submission)
        except KeyTaken as e:
            return await self._joined(e.remembered, digest)
        except Joined as e:
            return await self._taken_over(e.id)

    async def submit_on_demand(self, request: LoadRequest, without: Collection[str], traceparent: str) -> Instance:
        """Accept a load for requests that need the model; return an instance that is queued, loading or loaded.

        That is the oldest of the model, whatever created it, except those in `without`.

        Raises what `submit` raises without a key, and FailedRecently if the last load on demand of the model failed.
        """
        try:
            return await self._accepted_now_or_refreshed(
                Submission(request=request, traceparent=traceparent, on_demand=True, without=without)
            )
        except Joined as e:
            return await self._taken_over(e.id)

    async def _accepted_now_or_refreshed(self, submission: Submission) -> Instance:
        """Offer a load to the workers in the roster; if none takes it, refresh the roster and try again.

        The roster may be a beat old and lack a new worker, model or device.  Raises what `submit` raises, KeyTaken,
        Joined and FailedRecently.
        """
        with suppress(InvalidValue):
            if (accepted := await self._offered(submission)) is not None:
                return accepted
        await self._roster.refresh()
        if (accepted := await self._offered(submission)) is not None:
            return accepted
        request = self._roster.named(submission.request)
        raise self._roster.nowhere(request, self._roster.candidates(request)[1])

    async def _offered(self, submission: Submission) -> Instance | None:
        """Offer a load to the workers of the roster, the best first; return it once a worker takes it.

        None if no live worker has the model.  Raises QueueFull if no worker takes it and at least one queue is full,
        InvalidValue, KeyTaken, Joined, FailedRecently and LoadFailed.
        """
        submission = msgspec.structs.replace(submission, request=self._roster.named(submission.request))
        full: Full | None = None
        excluded: set[str] = set()  # workers that could not take it
        while (chosen := await self._choose(submission.request, excluded)) is not None:
            try:
                return await self._create(submission, *chosen)
            except NoLease:
                pass
            except Full as e:
                full = e if full is None else min(full, e, key=lambda f: f.retry_after_s)
            excluded.add(chosen[0].worker)
        if full is not None:
            raise QueueFull(f"The queue is full (limit: {full.limit} waiting loads).", full.retry_after_s)
        return None

    async def _choose(
        self, request: LoadRequest, without: Collection[str]
    ) -> tuple[Candidate, Placement | None] | None:
        """Choose a worker for a load, except those in `without`; None if none is left.  Raises InvalidValue."""
        candidates, _ = self._roster.candidates(request, without)
        if candidates:  # the chosen one may have other settings; it reserves memory by these
            request = with_settings(request, candidates[0].model)
        if len(candidates) <= 1:  # it asks its engine itself
            return self._roster.choose(candidates, request) if candidates else None
        return await self._roster.choose_measured(candidates, request, self._queue)

    async def _create(self, submission: Submission, candidate: Candidate, placement: Placement | None) -> Instance:
        """Write the record and its delivery atomically.

        Raises NoLease if the worker has lost its lease, KeyTaken, Joined, FailedRecently, Full, and LoadFailed if the
        file cannot be read or crashed the engine recently.
        """
        model = candidate.model
        request = with_settings(submission.request, model)
        if model.problem is not None:
            raise LoadFailed(model.problem.code, model.type, request.model, model.problem.message)
        try:
            made = await self._instances.create(
                Instance(
                    id=f"load_{uuid.uuid4().hex}",
                    model=request.model,
                    key=model.key,
                    source=model.source,
                    type=model.type,
                    worker=candidate.worker,
                    request=request,
                    on_demand=submission.on_demand,
                    traceparent=submission.traceparent,
                    total_size_bytes=model.size_bytes,
                ),
                at_most=self._at_most,
                key=submission.key,
                digest=submission.digest,
                joins="" if submission.key or submission.on_demand else identity(request, submission.caller),
                without=submission.without,
                fingerprint=model.fingerprint,
                deliver=True,
            )
        except Crashed as e:
            raise crashed_recently(model.type, request.model, e.reason, e.left_s) from e
        self._roster.placed(made, placement)
        log.bind(**made.ids)
        _log.info("accepted", action="accepted", model=made.key)
        return made

    async def _joined(self, remembered: Remembered, digest: str) -> Instance:
        """Return the existing load of an Idempotency-Key.  Raises IdempotencyKeyReused, JobNotFound."""
        if remembered.digest != digest:
            raise IdempotencyKeyReused(
                "This Idempotency-Key was already used for a different request. Use a new key.",
                param="Idempotency-Key",
            )
        return await self._taken_over(remembered.id)

    async def _taken_over(self, id_: str) -> Instance:
        instance = await self._records.get(id_)
        log.bind(**instance.ids)
        _log.info("joined", action="joined")
        return instance


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
