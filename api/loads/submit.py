"""Accepts loads: chooses a worker and writes the record."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection
from contextlib import suppress

import msgspec
from msgspec import Struct

from api.loads.records import Records
from api.pool.roster import Candidate, Roster
from shared.errors import IdempotencyKeyReused, InvalidValue, LoadFailed, QueueFull, crashed_recently
from shared.instance import Instance
from shared.memory.placement import Placement
from shared.schema.http import LoadRequest
from shared.store.instances import Crashed, Full, Instances, KeyTaken, NoLease, Remembered
from shared.store.queue import Queue
from shared.telemetry import log

_log = log.get("api")


class Submission(Struct, frozen=True, kw_only=True):
    """A load request.

    `key` and `digest` are the digests of its Idempotency-Key and of the request; "" if it has no key.
    """

    request: LoadRequest
    traceparent: str
    key: str
    digest: str


class Intake:
    """Accepts loads.  `at_most`: the maximum queue length of one worker, and of the whole pool."""

    def __init__(
        self, roster: Roster, queue: Queue, instances: Instances, records: Records, at_most: tuple[int, int]
    ) -> None:
        self._roster = roster
        self._queue = queue
        self._instances = instances
        self._records = records
        self._at_most = at_most

    async def submit(self, request: LoadRequest, idempotency_key: str = "", traceparent: str = "") -> Instance:
        """Accept a load: choose a worker, write the record, and put the delivery into the queue of the worker.

        If the key was used before with the same request, returns the existing load, which keeps its first trace.

        Raises ModelNotFound, NoWorker, QueueFull, InvalidValue (the request exceeds the limits of the model),
        LoadFailed (the file cannot be read or crashed the engine recently), IdempotencyKeyReused, and what UNAVAILABLE
        lists if Redis does not answer.
        """
        key = digest = ""
        if idempotency_key:
            key, digest = _digest(idempotency_key.encode()), _digest(msgspec.msgpack.encode(request))
            if (remembered := await self._instances.remembered(key)) is not None:
                return await self._joined(remembered, digest)
        submission = Submission(request=request, traceparent=traceparent, key=key, digest=digest)
        try:
            return await self._accepted_now_or_refreshed(submission)
        except KeyTaken as e:
            return await self._joined(e.remembered, digest)

    async def _accepted_now_or_refreshed(self, submission: Submission) -> Instance:
        """Offer a load to the workers in the roster; if none takes it, refresh the roster and try again.

        The roster may be a beat old and lack a new worker, model or device.  Raises what `submit` raises, and KeyTaken.
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
        InvalidValue, KeyTaken and LoadFailed.
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
        if len(candidates) <= 1:  # it asks its engine itself
            return self._roster.choose(candidates, request) if candidates else None
        return await self._roster.choose_measured(candidates, request, self._queue)

    async def _create(self, submission: Submission, candidate: Candidate, placement: Placement | None) -> Instance:
        """Write the record and its delivery atomically.

        Raises NoLease if the worker has lost its lease, KeyTaken, Full, and LoadFailed if the file cannot be read or
        crashed the engine recently.
        """
        model, request = candidate.model, submission.request
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
                    traceparent=submission.traceparent,
                    total_size_bytes=model.size_bytes,
                ),
                at_most=self._at_most,
                key=submission.key,
                digest=submission.digest,
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
        instance = await self._records.get(remembered.id)
        log.bind(**instance.ids)
        _log.info("joined", action="joined")
        return instance


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
