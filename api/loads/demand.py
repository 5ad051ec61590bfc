"""Loads models on demand: a request names a model that is not loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from msgspec import UNSET, Struct, structs

from api.loads.follow import NO_OUTCOME, Follower, ReportedFailure
from api.loads.jobs import outcome
from api.loads.records import Records
from api.loads.submit import Intake
from api.pool.listing import is_usable
from api.pool.roster import Roster
from shared.errors import ErrorBody, LoadInterrupted, QueueTimeout, QueueUnavailable, ServiceError
from shared.instance import Instance
from shared.lifecycle import State
from shared.memory.plan import with_settings
from shared.schema.http import LoadRequest
from shared.settings import Settings
from shared.store.instances import FailedRecently
from shared.store.keys import FAILURE_MEMORY_S
from shared.store.queue import Queue

CLOSED = "The server is shutting down. The load of the model continues."
Key = tuple[str, frozenset[str]]  # name of the model, ids of instances that are not used
Watch = Callable[[Instance], None]


class Options(Struct, frozen=True, kw_only=True):
    """What a request wants of an instance that is loaded for it; None: the default."""

    ttl_s: float | None = None
    context_length: int | None = None


DEFAULT = Options()


class _Load:
    """A load for which requests wait.  Each sees its revisions, from the latest one on."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Instance]
        self._watches: set[Watch] = set()
        self._latest: Instance | None = None

    def saw(self, revision: Instance) -> None:
        self._latest = revision
        for watch in self._watches:
            watch(revision)

    @contextmanager
    def seen_by(self, watch: Watch | None) -> Iterator[None]:
        """Tell `watch` of the revisions during the block."""
        if watch is None:
            yield
            return
        self._watches.add(watch)
        if self._latest is not None:
            watch(self._latest)
        try:
            yield
        finally:
            self._watches.discard(watch)


class OnDemand:
    """Loads models for requests.  Requests for one model wait for one load, whichever API process began it.

    A request waits for a load as long as the load makes progress, and at most `stall_limit_s` seconds without.  The
    load goes on when nobody waits for it any more.
    """

    def __init__(
        self, intake: Intake, records: Records, follower: Follower, roster: Roster, queue: Queue, settings: Settings
    ) -> None:
        self._intake = intake
        self._records = records
        self._follower = follower
        self._roster = roster
        self._queue = queue
        self._settings = settings
        self._loading: dict[Key, _Load] = {}

    async def loaded(
        self,
        name: str,
        options: Options = DEFAULT,
        without: Collection[str] = (),
        traceparent: str = "",
        watch: Watch | None = None,
    ) -> Instance:
        """Return an instance of a model once it is loaded: the first one, if any is loaded or loading, else a new one.

        `options` are those of a new instance.  `without`: ids of loads whose instances are not used.  `watch` gets the
        revisions of the load.

        Raises ReportedFailure, LoadFailed, LoadInterrupted, QueueTimeout, ModelNotFound, NoWorker, QueueFull and
        InvalidValue, and what UNAVAILABLE lists.
        """
        key = self._roster.named(LoadRequest(model=name)).model, frozenset(without)
        if (loading := self._loading.get(key)) is None:
            loading = self._loading[key] = _Load()
            loading.task = asyncio.create_task(self._loaded(name, options, without, traceparent, loading.saw))
            loading.task.add_done_callback(lambda _: self._ended(key))
        with loading.seen_by(watch):
            await asyncio.wait([loading.task])  # a client that leaves must not cancel it for the others
        if loading.task.cancelled():
            raise QueueUnavailable(CLOSED)
        return loading.task.result()

    async def close(self) -> None:
        """Stop waiting for loads."""
        for loading in [*self._loading.values()]:
            loading.task.cancel()
            await asyncio.wait([loading.task])

    def _ended(self, key: Key) -> None:
        task = self._loading.pop(key).task
        if not task.cancelled():
            task.exception()  # all who waited may have gone: asyncio would report it otherwise

    async def _loaded(
        self, name: str, options: Options, without: Collection[str], traceparent: str, watch: Watch
    ) -> Instance:
        request = await self._request(name, options)
        instance = await self._submitted(request, without, traceparent)
        try:
            instance = await self._followed(instance, watch)
        except ReportedFailure as e:
            if (other := _other(request, instance, e.body())) is None:
                raise
            instance = await self._followed(await self._submitted(other, {*without, instance.id}, traceparent), watch)
        snapshot = self._roster.alive.get(instance.worker)
        if snapshot is None or snapshot.epoch != instance.epoch:  # another API process may have chosen a new worker
            await self._roster.refresh()
        return instance

    async def _submitted(self, request: LoadRequest, without: Collection[str], traceparent: str) -> Instance:
        """Return an instance that is queued, loading or usable."""
        try:
            instance = await self._intake.submit_on_demand(request, without, traceparent)
            while instance.state is State.LOADED and not is_usable(instance, self._roster):  # its worker drains
                without = {*without, instance.id}
                instance = await self._intake.submit_on_demand(request, without, traceparent)
        except FailedRecently as e:
            record = await self._records.get(e.id)
            raise _failure(outcome(record), e.left_s) from e
        return instance

    async def _followed(self, instance: Instance, watch: Watch) -> Instance:
        """Return the revision of a load with which its instance was loaded."""
        clock, stall_limit_s = asyncio.get_running_loop().time, self._settings.stall_limit_s
        seen: tuple[Any, ...] = ()
        try:
            async with (
                asyncio.timeout(stall_limit_s) as patience,
                aclosing(self._follower.follow(instance)) as revisions,
            ):
                async for _, revision in revisions:
                    watch(revision)
                    if revision.state is State.LOADED:
                        return revision
                    if (error := outcome(revision)) is not None:
                        raise _failure(error)
                    if (now := (revision.state, revision.phase, revision.loaded_bytes)) != seen:
                        seen = now
                        patience.reschedule(clock() + stall_limit_s)
        except TimeoutError:
            raise QueueTimeout(
                f"The load of '{instance.model}' made no progress for {stall_limit_s:g} s. It goes on; try again later."
            ) from None
        raise QueueUnavailable(NO_OUTCOME)

    async def _request(self, name: str, options: Options) -> LoadRequest:
        """Return the request for a load: with the settings of the model, and for an LLM the largest context that fits.

        Reads the roster anew: a model is loaded on demand when memory has changed.
        """
        await self._roster.refresh()
        request = self._roster.named(LoadRequest(model=name))
        candidates, _ = self._roster.candidates(request)
        if not candidates:
            return request  # the intake has the reason
        model = candidates[0].model
        if options.ttl_s is not None and not model.settings.pin:
            request = structs.replace(request, ttl_seconds=options.ttl_s)
        if options.context_length is not None and model.type == "llm":
            request = structs.replace(request, context_length=options.context_length)
        request = with_settings(request, model)
        if request.ttl_seconds is UNSET and not model.settings.pin:
            request = structs.replace(request, ttl_seconds=self._settings.jit_ttl_s)
        if model.type != "llm" or model.problem is not None or request.context_length is not UNSET:
            return request
        most = structs.replace(request, context_length=min(self._settings.jit_context, model.max_context_length))
        best, placed = await self._roster.choose_measured(candidates, most, self._queue)
        if placed is not None:
            return most
        figures = self._roster.figures(candidates, best, most, self._queue)
        has_room = self._roster.has_room(candidates, best.model, most, {})
        largest = await figures.largest_context_length(has_room, fits=False)
        # If none fits, the worker may still make room, or says what is missing.
        return request if largest is None else structs.replace(request, context_length=largest)


def _other(request: LoadRequest, failed: Instance, body: ErrorBody) -> LoadRequest | None:
    """Return the request for a second load after one that `request` made or joined failed; None if there is none.

    It is made after the load of a client, which may have asked for what does not fit, and with less context if other
    loads took the memory in the meantime.
    """
    if not failed.on_demand:
        return request
    largest = None if body.detail is UNSET else body.detail.get("largest_context_length")
    return structs.replace(request, context_length=largest) if isinstance(largest, int) and largest > 0 else None


def _failure(body: ErrorBody | None, left_s: int = FAILURE_MEMORY_S) -> ServiceError:
    """Return the error for a request whose load failed.  `left_s`: until the next attempt."""
    if body is None:
        return QueueUnavailable(NO_OUTCOME)
    match body.code:
        case "load_cancelled" | "worker_lost":
            return LoadInterrupted(f"{body.message}. Try again shortly.")
        case "insufficient_memory":
            return ReportedFailure(body, retry_after_s=left_s)
        case _:
            return ReportedFailure(body)
