"""Accepting a load: choosing a worker for it, and writing its record."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection
from contextlib import suppress

import msgspec
from msgspec import Struct

from api.loads.records import Records
from api.pool.roster import Candidate, Roster, nowhere
from shared.errors import IdempotencyKeyReused, InvalidValue, LoadFailed, QueueFull, crashed_lately
from shared.instance import Instance
from shared.memory.placement import Placement
from shared.schema.http import LoadRequest
from shared.store.instances import Crashed, Full, Instances, KeyTaken, NoLease, Remembered
from shared.telemetry import log

_log = log.get("api")


class Submission(Struct, frozen=True, kw_only=True):
    """A load that a client asks for.

    `key` and `digest` are the digests of its Idempotency-Key and of the request that came with that; "" without one.
    """

    request: LoadRequest
    traceparent: str
    key: str
    digest: str


class Intake:
    """Accepts loads.  `at_most`: how many may be queued at one worker, and in all."""

    def __init__(self, roster: Roster, instances: Instances, records: Records, at_most: tuple[int, int]) -> None:
        self._roster = roster
        self._instances = instances
        self._records = records
        self._at_most = at_most

    async def submit(self, request: LoadRequest, idempotency_key: str = "", traceparent: str = "") -> Instance:
        """Accept a load: choose a worker, write the record, put the delivery into the worker's queue.

        If the key came before with the same request, return the load that it made then, which keeps the trace of the
        first.

        Raises ModelNotFound, NoWorker, QueueFull, InvalidValue (for what exceeds the model's limits), LoadFailed for a
        file that its worker could not read or that crashed the engine lately, IdempotencyKeyReused, and what
        UNAVAILABLE lists if Redis does not answer.  Then nothing was accepted.
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
        """Offer a load to the workers as they were a beat ago; if none is left to take it, as they are now.

        A worker, a model or a device may have come since.  Raises as `submit` does, and KeyTaken.
        """
        with suppress(InvalidValue):
            if (accepted := await self._offered(submission)) is not None:
                return accepted
        await self._roster.refresh()
        if (accepted := await self._offered(submission)) is not None:
            return accepted
        raise nowhere(submission.request, self._roster.candidates(submission.request)[1])

    async def _offered(self, submission: Submission) -> Instance | None:
        """Offer a load to one worker of the roster after the other, the best first; return it once one takes it.

        None if no worker has the model, or those that have it are gone by now.  Raises QueueFull if any of them is
        full, InvalidValue, KeyTaken, and LoadFailed.
        """
        full: Full | None = None
        gone: set[str] = set()  # workers that could not take it
        while (chosen := self._choose(submission.request, gone)) is not None:
            try:
                return await self._create(submission, *chosen)
            except NoLease:
                pass
            except Full as e:
                full = e if full is None else min(full, e, key=lambda f: f.retry_after_s)
            gone.add(chosen[0].worker)
        if full is not None:
            raise QueueFull(f"{full.limit} loads wait already, and no more may.", full.retry_after_s)
        return None

    def _choose(self, request: LoadRequest, without: Collection[str]) -> tuple[Candidate, Placement | None] | None:
        """Return the worker that is to take a load, none of `without`; None if none is left.  Raises InvalidValue."""
        candidates, _ = self._roster.candidates(request, without)
        return self._roster.choose(candidates, request) if candidates else None

    async def _create(self, submission: Submission, candidate: Candidate, placement: Placement | None) -> Instance:
        """Write the record and its delivery, at once.

        Raises NoLease if the worker has just gone, KeyTaken, Full, and LoadFailed for a file that its worker could not
        read or that crashed the engine lately.
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
            raise crashed_lately(model.type, request.model, e.reason, e.left_s) from e
        self._roster.placed(made, placement)
        log.bind(**made.ids)
        _log.info("accepted", action="accepted", model=made.key)
        return made

    async def _joined(self, remembered: Remembered, digest: str) -> Instance:
        """Return the load that an Idempotency-Key stands for.  Raises IdempotencyKeyReused, JobNotFound."""
        if remembered.digest != digest:
            raise IdempotencyKeyReused(
                "This Idempotency-Key was sent before with another request. Send a new key with a new request.",
                param="Idempotency-Key",
            )
        instance = await self._records.get(remembered.id)
        log.bind(**instance.ids)
        _log.info("joined", action="joined")
        return instance


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
