"""Accepts downloads: chooses a worker, writes the record, and passes on what clients ask of it."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

import msgspec

from api.downloads.news import News
from api.pool.roster import Roster
from shared.download import OVER, PREFIX, Download, InspectRequest, Offer, Refusal, State, Wanted, is_revision, source
from shared.errors import (
    ErrorBody,
    IdempotencyKeyReused,
    InvalidValue,
    JobAlreadyFinished,
    JobNotFound,
    ModelInUse,
    ModelNotFound,
    NoWorker,
    QueueUnavailable,
    ServiceError,
)
from shared.schema.http import DownloadRequest
from shared.store.connection import check_cancelled
from shared.store.downloads import Downloads as Records
from shared.store.downloads import KeyReused
from shared.store.instances import Instances
from shared.store.queue import Queue
from shared.telemetry import log

MOST_ASKED = 16  # workers that look for a model at once; each sends the hub a request
RECHECK_S = 1.0  # finds changes whose news got lost
DONE_S = 30.0  # for a worker to do what a client asked for

_log = log.get("api")


class Relayed(ServiceError):
    """The error that a worker reported."""

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self._body = body

    def body(self) -> ErrorBody:
        return self._body


class Downloads:
    """Starts and changes downloads, and removes models.

    Every method raises what UNAVAILABLE lists if Redis does not answer.
    """

    def __init__(self, roster: Roster, queue: Queue, records: Records, instances: Instances, news: News) -> None:
        self._roster, self._queue, self._records, self._instances = roster, queue, records, instances
        self._news = news

    async def start(self, request: DownloadRequest, key: str) -> Download | None:
        """Start a download, or return the one of the key or of the same files; None if the files are there already.

        Raises InvalidValue, IdempotencyKeyReused, NoWorker, and what the workers report.
        """
        inspect = _inspection(request)
        digest = hashlib.sha256(msgspec.msgpack.encode(request)).hexdigest() if key else ""
        key = hashlib.sha256(key.encode()).hexdigest() if key else ""
        try:
            if key and (known := await self._records.remembered(key, digest)) is not None:
                return known
            worker, offer = await self._offered(inspect, request.worker or None)
            if offer.is_here:
                return None
            download = Download(
                id=f"{PREFIX}{uuid.uuid4().hex[:10]}",
                model=request.model,
                worker=worker,
                store=offer.store,
                plan=offer.plan,
                created_at=time.time(),
            )
            made = await self._records.create(download, key=key, digest=digest)
        except KeyReused:
            raise IdempotencyKeyReused(
                "This Idempotency-Key was already used for a different request. Use a new key.",
                param="Idempotency-Key",
            ) from None
        _log.info("download", action="download_accepted" if made is download else "download_joined", **made.ids)
        return made

    async def _offered(self, inspect: InspectRequest, only: str | None) -> tuple[str, Offer]:
        """Ask the workers what they would fetch; return the best: it has the files already, or the most room."""
        await self._roster.refresh()
        ready = sorted(name for name, worker in self._roster.alive.items() if worker.state == "ready")
        if only is not None and only not in ready:
            raise InvalidValue(f"'worker': no available worker has the name '{only}'.", param="worker")
        names = [name for name in ready if only in (None, name)][:MOST_ASKED]
        replies = await asyncio.gather(*(self._queue.inspected(name, inspect) for name in names))
        offers = [(name, one) for name, one in zip(names, replies, strict=True) if isinstance(one, Offer)]
        if offers:
            return max(offers, key=lambda one: (one[1].is_here, one[1].free_bytes))
        for one in replies:
            if isinstance(one, Refusal):
                raise Relayed(one.error)
        raise NoWorker("No available worker answers. Try again shortly.")

    async def get(self, id_: str) -> Download:
        """Return the record of a download.  Raises JobNotFound."""
        download = await self._records.get(id_)
        if download is None:
            raise JobNotFound(f"Job '{id_}' not found.", param="job_id")
        return download

    async def follow(self, id_: str) -> AsyncGenerator[Download, None]:
        """Yield the record of a download now, and whenever it may have changed.  Use within `aclosing`.

        Raises JobNotFound.
        """
        with self._news.of(id_) as woken:
            while True:
                woken.clear()
                yield await self.get(id_)
                check_cancelled()
                with suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_S):
                        await woken.wait()

    async def newest(self, limit: int) -> list[Download]:
        return await self._records.newest(limit)

    async def ask(self, id_: str, wanted: Wanted) -> None:
        """Ask the worker of a download for something.  Raises JobNotFound and JobAlreadyFinished."""
        download = await self.get(id_)
        is_over = download.state in (State.COMPLETED, State.CANCELLED)
        if is_over or (wanted == "pause" and download.state in OVER):
            raise JobAlreadyFinished(f"Job '{id_}' has already finished.", param="job_id")
        await self._records.want(id_, wanted)

    async def done(self, id_: str, wanted: Wanted) -> Download:
        """Wait until the worker has done what was asked for.

        Raises JobNotFound, JobAlreadyFinished if the download ended before, and QueueUnavailable after DONE_S.
        """
        is_done: dict[Wanted, Callable[[State], bool]] = {
            "run": lambda state: state in (State.DOWNLOADING, State.COMPLETED),
            "pause": lambda state: state is State.PAUSED,
            "cancel": lambda state: state is State.CANCELLED,
        }
        with suppress(TimeoutError):
            async with asyncio.timeout(DONE_S), aclosing(self.follow(id_)) as revisions:
                async for download in revisions:
                    if is_done[wanted](download.state):
                        return download
                    if download.state is State.COMPLETED:
                        raise JobAlreadyFinished(f"Job '{id_}' has already finished.", param="job_id")
        raise QueueUnavailable("The worker of the download does not answer. It will do this when it is back.")

    async def remove(self, key: str, only: str | None) -> list[str]:
        """Remove the files of a model; return the workers that had it.

        Raises ModelNotFound, InvalidValue if the key means several models, ModelInUse, and what the workers report.
        """
        await self._roster.refresh()
        holders = {
            name: [model for model in self._roster.catalogs.get(name, ()) if key in (model.base, model.full_key)]
            for name in self._roster.alive
            if only in (None, name)
        }
        found = {model.full_key: model for models in holders.values() for model in models}
        if not found:
            raise ModelNotFound(f"Model {key} not found in downloaded models", param="model")
        if len(found) > 1:
            raise InvalidValue(f"'{key}' means several models: {', '.join(sorted(found))}. Name one.", param="model")
        ((full_key, _),) = found.items()
        if await self._instances.has_copies(full_key):
            raise ModelInUse(f"Model '{key}' is loaded or being loaded. Unload it first.", param="model")
        asked = {name: models[0].key for name, models in holders.items() if models}
        replies = await asyncio.gather(*(self._queue.removed(name, its) for name, its in asked.items()))
        removed = [name for name, one in zip(asked, replies, strict=True) if one and not isinstance(one, Refusal)]
        for one in replies:
            # Of workers that share a directory, the second may find nothing to remove.
            if isinstance(one, Refusal) and not (removed and one.error.type == ModelNotFound.type):
                raise Relayed(one.error)
        if not removed:
            raise NoWorker("The worker that has the model does not answer. Try again shortly.")
        return removed


def _inspection(request: DownloadRequest) -> InspectRequest:
    """Return what a request names.  Raises InvalidValue."""
    named = source(request.model)
    quantization, revision = request.quantization or None, request.revision or None
    if quantization and named.quantization and quantization.lower() != named.quantization.lower():
        raise InvalidValue("'quantization': 'model' names another one.", param="quantization")
    if revision and named.revision and revision != named.revision:
        raise InvalidValue("'revision': 'model' names another one.", param="revision")
    revision = revision or named.revision or "main"
    if not is_revision(revision):
        raise InvalidValue("'revision': expected the name of a branch, a tag or a commit.", param="revision")
    return InspectRequest(
        repository=named.repository, revision=revision, quantization=quantization or named.quantization
    )
