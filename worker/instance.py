"""An instance on this worker, from its delivery to its terminal state."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, assert_never

import msgspec
from msgspec import UNSET

from shared.errors import ErrorBody, LoadFailed, LoadFailure, crashed_recently
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.lookup import of_instance
from shared.memory.placement import DRY_RUNS, Placement
from shared.race import first, racing
from shared.schema.http import Phase
from shared.schema.model import FileStat, Model
from shared.schema.snapshot import short
from shared.settings import Settings
from shared.store.connection import UNAVAILABLE
from shared.store.instances import Fenced, Instances, StopRequested
from shared.telemetry import log, trace
from shared.telemetry.tally import Tally, died
from worker.crashes import Crashes
from worker.desired import Desired
from worker.engine_log import EngineLog
from worker.listener.process import Listener
from worker.memory.host import oom_kills
from worker.memory.placer import Placer, Requests
from worker.outcome import Changed, Died, Ended, NoRoom, Stalled, Stopped, Unexpected
from worker.record import Record
from worker.runner.failure import from_exit, from_reason, needed_bytes
from worker.runner.parameters import plan
from worker.runner.process import Runner, RunnerDied, RunnerStuck, Unreadable, tag
from worker.runner.protocol import Busy, Closed, Failed, Load, Measure, Measured, Pong, Progress, Ready, Warm
from worker.runner.rate import Rate
from worker.runner.warm import Runners
from worker.timing import Timing

FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP})  # not a crash
MIN_CHECK_S = 0.05  # between two checks of an idle TTL
COMMIT_FRACTION = 0.02  # progress is recorded after this fraction of the bytes
CHANGED = "a file of the model changed while it was loaded"
CHANGED_LATER = "a file of the model changed after it was loaded"
GONE = "its file is no longer in the models directory"
REPLACED = "its file was replaced by another one"

Answer = TypeVar("Answer", Ready, Measured)

_log = log.get("worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The services and state that all instances of a worker share."""

    name: str
    epoch: str
    settings: Settings
    timing: Timing
    models: Mapping[str, Model]  # the current catalog, by key
    residents: Mapping[str, Resident]  # by id of the load; all instances that the worker holds or has accepted
    instances: Instances
    placer: Placer
    runners: Runners
    listener: Listener
    crashes: Crashes
    templates: dict[str, dict[str, bool]]  # what the chat template of a model supports, by its fingerprint
    desired: Desired
    tally: Tally
    placed: deque[str]  # the ends (`short`) of the ids of loads that were placed or refused
    changed: asyncio.Event  # set when the worker's snapshot changed
    ending: asyncio.Event  # set once the worker drains
    out_of_time: asyncio.Event  # set at the end of the drain, when requests must end


class Resident:
    """An instance on this worker.  Only `live`, which runs it to its end, writes the record meanwhile."""

    def __init__(self, services: Services, id_: str, not_before: float = 0.0) -> None:
        """`not_before`: the earliest start, in seconds since the epoch."""
        self.id = id_
        self.not_before = not_before
        self.stop = asyncio.Event()  # unload, cancel, eviction, a record changed by another writer, or drain
        self.changed = asyncio.Event()  # a file of a loaded model changed
        self.freed = asyncio.Event()  # its memory is released
        self.files: list[tuple[str, FileStat]] = []  # of a loaded model: path, and state when it was opened
        self.claimed = False
        self._services = services
        self._runner: Runner | None = None  # of a loaded model
        self._queued: Instance | None = None  # the record before the claim
        self._record = Record(services.instances, services.ending)
        self._engine_log = EngineLog(
            services.instances,
            id_,
            services.name,
            services.settings.roots,
            services.timing.engine_log_s,
        )
        self._claimed_at = 0.0
        self._oom_kills = 0
        self._preemptions = 0

    @property
    def instance(self) -> Instance | None:
        """The record as this worker wrote it last; None before the claim."""
        return self._record.written

    @property
    def key(self) -> str:
        """The key of its model now, or the last one if its files are gone; "" if the record was not read yet."""
        instance = self._record.written or self._queued
        if instance is None:
            return ""
        model = of_instance(self._services.models, instance)
        return instance.key if model is None else model.key

    @property
    def requests(self) -> Requests:
        """The numbers of its requests, as its runner reported them last."""
        if self._runner is None:
            return Requests()
        last, instance = self._runner.load, self._record.written
        used_at = max(last.used_at, (instance and instance.used_at) or 0.0)
        return Requests(last.running, last.waiting, last.cells, used_at, self._runner.tokens_per_second)

    @property
    def is_pinned(self) -> bool:
        """Whether it is only unloaded on request."""
        instance = self._record.written
        model = None if instance is None else of_instance(self._services.models, instance)
        return model is not None and model.settings.pin

    async def close_if_unused(self, since: float) -> bool:
        """Have its runner refuse requests from now on, if it had none since a time (seconds since the epoch).

        Returns whether it does: False also while the instance is not loaded.
        """
        return self._runner is not None and await self._runner.close_if_unused(since)

    def open(self) -> None:
        """Have its runner take requests again, after `close_if_unused`."""
        if self._runner is not None:
            self._runner.open()

    def new_preemptions(self) -> int:
        """Return the number of preemptions since the last call."""
        total = 0 if self._runner is None else self._runner.load.preemptions
        new, self._preemptions = max(0, total - self._preemptions), total
        return new

    async def live(self) -> None:
        """Load the instance, hold it, and stop it.  Returns once its runner is reaped and its memory is released."""
        log.bind(job=self.id)
        placer = self._services.placer
        try:
            await self._wait()
            queued, placed = await self._place()
            self._services.placed.append(short(self.id))
            self._services.changed.set()
            if queued is None:
                return
            record, model = queued
            if placed is None:
                await self._refuse(record, model)
                return
            loaded = None
            async with placer.turn(placed.devices, self.stop) as is_its_turn:
                # It waited for other loads: its files may have moved, or be gone.
                if is_its_turn and (model_now := await self._loadable(record)) is not None:
                    loaded = await self._begin(record, model_now, placed)
            if loaded is not None:
                await self._keep(*loaded)
        except UNAVAILABLE as e:  # before the claim: a beat delivers the record again; or while the worker drains
            _log.warning("instance deferred", action="redis_unavailable", error=str(e))
        except Fenced:  # before the claim: cancelled, or assigned to another worker
            _log.info("delivery ignored: the record changed", action="delivery_void")
        finally:
            self._services.listener.withdraw(self.id)
            self._engine_log.close()
            placer.forget(self)

    async def _wait(self) -> None:
        """Wait until `not_before`, or for a stop.  Does not delay other loads."""
        if (left_s := self.not_before - time.time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self.stop.wait()

    # ---- before the load

    async def _place(self) -> tuple[tuple[Instance, Model] | None, Placement | None]:
        """Return the queued record and its model, and where the load goes; None if there is none, or no room.

        While only busy instances prevent the load, waits up to `request_wait_s`; other loads go first meanwhile.
        Raises Fenced and what UNAVAILABLE lists.
        """
        placer, settings, timing = self._services.placer, self._services.settings, self._services.timing
        until = time.monotonic() + settings.request_wait_s
        while True:
            async with placer.placing:  # in the order of the deliveries
                queued = None if self.stop.is_set() else await self._find()
                placed = None if queued is None else await placer.place(*queued)
            if queued is None or placed is not None:
                return queued, placed
            while True:
                left_s = until - time.monotonic()
                if left_s <= 0 or not placer.may_fit(queued[0]):
                    return queued, None
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, timing.beat_s)):
                        await self.stop.wait()
                if self.stop.is_set() or placer.fits(queued[0]):
                    break

    async def _find(self) -> tuple[Instance, Model] | None:
        """Return the queued record and its model.

        Returns None if this worker has no such queued record, or if the load fails at once.  Raises Fenced and what
        UNAVAILABLE lists.
        """
        record = await self._services.instances.get(self.id)
        if record is None or record.state is not State.QUEUED or record.worker != self._services.name:
            return None
        span = trace.continued([record.traceparent])
        self._engine_log.traceparent = str(span.child())
        log.bind(instance=record.instance_id, **span.ids)
        model = await self._loadable(record)
        if model is None:
            return None
        self._queued = msgspec.structs.replace(record, key=model.key)
        return self._queued, model

    async def _loadable(self, record: Instance) -> Model | None:
        """Return the model of a load.  If it cannot be loaded, fails the load and returns None.

        Raises Fenced and what UNAVAILABLE lists.
        """
        model = of_instance(self._services.models, record)
        if model is None:
            shards = [] if record.source is None else record.source.shards
            is_replaced = any(one.shards == shards for one in self._services.models.values())
            await self._fail(record, "invalid_model_file", REPLACED if is_replaced else GONE)
            return None
        if model.problem is not None:
            await self._fail(record, model.problem.code, model.problem.message)
            return None
        crash = self._services.crashes.of(model)
        if crash is not None and not record.request.force and not record.restoring:
            await self._fail_with(record, crashed_recently(record.type, record.model, *crash).body())
            return None
        return model

    async def _refuse(self, instance: Instance, model: Model) -> None:
        """Refuse a load that does not fit: requeue it with the error of this worker.

        An API then chooses another worker, or fails the load with that error.  A restoration belongs to this worker and
        fails.  Raises Fenced and what UNAVAILABLE lists.
        """
        error = await self._services.placer.refusal(instance, model)
        _log.info("load refused: not enough memory", action="refused", reason=error.message)
        if instance.restoring:
            await self._fail_with(instance, error)
            return
        refused = [*instance.refused, self._services.name]
        await self._record.write(
            instance, Event.REQUEUE, refused=refused, refusal=error, attempt=instance.attempt, worker=instance.worker
        )

    async def _begin(self, record: Instance, model: Model, placed: Placement) -> tuple[Instance, Runner] | None:
        """Claim the record and load it.  Raises Fenced and what UNAVAILABLE lists."""
        instance = await self._record.write(
            record,
            Event.CLAIM,
            epoch=self._services.epoch,
            key=model.key,
            source=model.source,
            devices=placed.devices,
            evicted=[held.instance_id for held in placed.evicts],
            started_at=time.time(),
        )
        self.claimed, self._claimed_at = True, time.monotonic()
        timing = {"queue": max(0.0, self._record.redis_time_s - record.created_at)}
        instance = msgspec.structs.replace(instance, timing=timing)
        try:
            with_runner = await self._take_runner(instance)
            if any(not other.claimed for other in self._services.residents.values()):
                self._services.runners.prepare()  # for a load that waits already
            return None if with_runner is None else await self._load(with_runner[0], model, placed, with_runner[1])
        finally:
            if not self._services.ending.is_set():
                self._services.runners.prepare()  # if no load waits, only now: it would take a core from a short load

    async def _take_runner(self, instance: Instance) -> tuple[Instance, Runner] | None:
        """Take a warm runner.  Returns None if the instance ended without one."""
        taking = asyncio.ensure_future(self._services.runners.take())
        try:
            async with racing(taking, self.stop.wait()) as waits:
                while not await first(waits, self._services.timing.commit_s):
                    instance = await self._record.progress(instance, instance)
            if not taking.cancelled():  # also if a stop was requested at the same moment: `_watch` handles it
                return instance, taking.result()
            await self._unload(instance, None)
        except Fenced:
            _log.warning("record changed by another writer", action="fenced")
            await self._stop_runner(_unowned(taking))
        except (RunnerDied, RunnerStuck) as e:
            await self._fail(instance, "engine_crashed", str(e))
        except BaseException:
            if (runner := _unowned(taking)) is not None:
                runner.kill()
            raise
        return None

    # ---- the load

    async def _load(
        self, instance: Instance, model: Model, placed: Placement, runner: Runner
    ) -> tuple[Instance, Runner] | None:
        """Load the model in a warm runner.  Returns the loaded instance with its runner, None if it ended otherwise."""
        self._engine_log.follow(runner)
        self._oom_kills = oom_kills()
        self._services.placer.ledger.started(self.id, runner.pid)
        try:
            load = self._load_of(instance, model, placed)
            outcome: Ready | NoRoom | Ended | None = None
            if not placed.exact:
                instance, load, outcome = await self._dry_run(instance, model, placed, runner)
            if outcome is None:
                spawn_s = time.monotonic() - self._claimed_at
                instance = msgspec.structs.replace(instance, timing={**instance.timing, "spawn": spawn_s})
                await runner.send(load)
                instance, outcome = await self._watch(instance, runner, Ready)
            return await self._conclude(instance, model, load, runner, outcome)
        except Fenced:
            await self._abandon(runner)
        except BaseException:  # cancelled while the worker drains, or a bug: never leave a runner without an owner
            runner.kill()
            raise
        return None

    async def _conclude(
        self, instance: Instance, model: Model, load: Load, runner: Runner, outcome: Ready | NoRoom | Ended
    ) -> tuple[Instance, Runner] | None:
        """Record the outcome of a load.  Returns a loaded instance with its runner, or None after reaping the runner.

        Raises Fenced and what UNAVAILABLE lists.
        """
        match outcome:
            case Ready() if outcome.files != model.files:  # the catalog and the placement are of another file's header
                await self._stop_runner(runner)
                await self._fail(instance, "invalid_model_file", CHANGED)
            case Ready():
                if outcome.capabilities is not None:
                    self._services.templates[model.fingerprint] = outcome.capabilities
                # Before a client can read "loaded".
                await self._services.crashes.forget(model, everywhere=instance.request.force)
                await self._services.placer.settle(self.id, outcome.usage)
                self._runner = runner
                self._services.listener.offer(self.id, runner.hand_over)
                self.files = [*zip(load.shards, outcome.files, strict=True)]
                loaded = await self._loaded(instance, outcome)
                if loaded is not None:
                    return loaded, runner
                await self._unload(instance, runner)
            case Failed():
                await self._stop_runner(runner)
                await self._fail_with_memory(instance, runner, *from_reason(self._engine_log.relative(outcome.reason)))
            case NoRoom():
                await self._stop_runner(runner)
                await self._refuse(instance, model)
            case Stopped():
                await self._unload(instance, runner)
            case Stalled():
                await self._stop_runner(runner)
                reason = f"the engine made no progress for {self._services.settings.stall_limit_s:g} s"
                await self._fail(instance, "load_stalled", reason)
            case Died():
                self._services.tally.add(died("loading"))
                await self._stop_runner(runner)
                await self._fail_with_memory(instance, runner, *await self._failure_of(model, load, runner))
            case Unexpected():
                await self._unexpected(instance, runner, outcome)
            case _:
                assert_never(outcome)
        return None

    async def _dry_run(
        self, instance: Instance, model: Model, placed: Placement, runner: Runner
    ) -> tuple[Instance, Load, NoRoom | Ended | None]:
        """Do a dry run of the load, and reserve the memory that it reports.

        Returns the load, possibly for another place, and None if it can begin, else the outcome that prevents it.
        """
        timing = instance.timing
        for _ in range(DRY_RUNS):
            load = self._load_of(instance, model, placed)
            await runner.send(Measure(load))
            instance, outcome = await self._watch(instance, runner, Measured)
            if not isinstance(outcome, Measured):
                return instance, load, outcome
            instance = msgspec.structs.replace(instance, timing=timing)
            await self._services.placer.look()
            corrected = self._services.placer.corrected(instance, placed, outcome.usage)
            if corrected is None:
                break
            if corrected.exact and corrected.layers == placed.layers and corrected.gpus == placed.gpus:
                return instance, load, None
            placed = corrected
        return instance, load, NoRoom()

    def _load_of(self, instance: Instance, model: Model, placed: Placement) -> Load:
        load = plan(instance.request, model, self._services.settings, placed.gpus, placed.layers)
        return msgspec.structs.replace(
            load,
            traceparent=self._engine_log.traceparent,
            capabilities=self._services.templates.get(model.fingerprint) if model.fingerprint else None,
        )

    async def _loaded(self, instance: Instance, ready: Ready) -> Instance | None:
        """Write the record of a load that is ready, and return it; None if a stop was requested before."""
        now = time.time()
        try:
            loaded = await self._record.write(
                instance,
                Event.LOAD,
                phase=None,
                progress=1.0,
                loaded_bytes=instance.total_size_bytes,
                bytes_per_second=instance.total_size_bytes / max(1e-6, ready.timing["weights"]),
                estimated_completion=None,
                loaded_at=now,
                used_at=instance.used_at or now,
                timing={**instance.timing, **ready.timing},
                load_time_seconds=sum(ready.timing.values()),
                load_config=ready.config,
            )
        except StopRequested:
            return None
        self._services.desired.add(loaded)
        self._services.changed.set()
        return loaded

    async def _watch(
        self, instance: Instance, runner: Runner, expected: type[Answer]
    ) -> tuple[Instance, Answer | Ended]:
        """Wait for the expected answer of a runner, and record progress.  Only a load (`Ready`) makes progress.

        Writes a revision at least every `Timing.commit_s`, so that followers get events even without progress.
        """
        commit_s = self._services.timing.commit_s
        phase: Phase = "metadata"
        began = progressed_at = committed_at = time.monotonic()
        rate = Rate(began)
        latest: Progress | None = None
        timing = instance.timing
        receiving, stopping = asyncio.ensure_future(runner.receive()), asyncio.ensure_future(self.stop.wait())
        try:
            while True:
                left_s = max(0.0, committed_at + commit_s - time.monotonic())
                is_done = await first((receiving, stopping), left_s)
                now = time.monotonic()
                so_far = msgspec.structs.replace(instance, timing={**timing, phase: now - began})
                if stopping.done():
                    return so_far, Stopped()
                if receiving.done():
                    match message := receiving.result():
                        case None:
                            return so_far, Died()
                        case Failed():
                            return so_far, message
                        case Ready() | Measured() if isinstance(message, expected):
                            return so_far, message
                        case Progress() if expected is Ready:
                            receiving = asyncio.ensure_future(runner.receive())
                            progressed_at, latest = now, message
                            rate.add(now, message.loaded_bytes)
                            if message.phase != phase:
                                timing = {**timing, phase: now - began}
                                phase, began = message.phase, now
                        case Progress() | Ready() | Measured() | Warm() | Pong() | Closed() | Busy() | Unreadable():
                            return so_far, Unexpected(tag(message))
                        case _:
                            assert_never(message)
                elif now - progressed_at >= self._services.settings.stall_limit_s:
                    return so_far, Stalled()
                loaded_bytes = 0 if latest is None else latest.loaded_bytes
                progress = max(instance.progress, min(0.999, loaded_bytes / max(1, instance.total_size_bytes)))
                changed = phase != instance.phase or progress >= instance.progress + COMMIT_FRACTION
                if changed or not is_done or now - committed_at >= commit_s:  # a timer may fire slightly early
                    committed_at = now
                    bytes_per_second = rate.per_second()
                    left_bytes = max(0, instance.total_size_bytes - loaded_bytes)
                    new = msgspec.structs.replace(
                        instance,
                        phase=phase,
                        progress=progress,
                        loaded_bytes=loaded_bytes,
                        bytes_per_second=bytes_per_second,
                        estimated_completion=time.time() + left_bytes / bytes_per_second if bytes_per_second else None,
                        timing=timing,
                    )
                    instance = await self._record.progress(instance, new)
        finally:
            receiving.cancel()
            stopping.cancel()

    # ---- while it is loaded

    async def _keep(self, instance: Instance, runner: Runner) -> None:
        """Hold a loaded instance until its end: a stop, the idle TTL, a changed file, or a dead or silent runner."""
        try:
            outcome = await self._wait_for_end(instance, runner)
            self.stop.set()  # for loads that wait for its memory
            match outcome:
                case Stopped():
                    await self._unload(instance, runner)
                case Died():
                    await self._stop_runner(runner)
                    self._services.tally.add(died("loaded"))
                    await self._fail_with_memory(instance, runner, *self._exit_of(runner))
                case Changed():
                    await self._stop_runner(runner)
                    await self._fail(instance, "invalid_model_file", CHANGED_LATER)
                case Stalled():
                    await self._stop_runner(runner)
                    limit_s = self._services.settings.stall_limit_s
                    await self._fail(instance, "engine_crashed", f"the engine did not answer for {limit_s:g} s")
                case Unexpected():
                    await self._unexpected(instance, runner, outcome)
                case _:
                    assert_never(outcome)
        except Fenced:
            await self._abandon(runner)
        except BaseException:
            runner.kill()
            raise

    async def _wait_for_end(
        self, instance: Instance, runner: Runner
    ) -> Stopped | Died | Changed | Stalled | Unexpected:
        """Wait until a loaded instance must end, and return why.  A runner with a model only answers pings."""
        waits = self.stop.wait(), runner.exited.wait(), self.changed.wait(), runner.receive()
        async with racing(*waits) as (stopping, exiting, changing, receiving):
            while not await first((stopping, exiting, changing, receiving), self._until_check_s(instance)):
                self._oom_kills = oom_kills()  # the runner lives: OOM kills so far were of other processes
                if self._until_idle_s(instance) <= 0 and await self._has_expired(instance, runner):
                    _log.info("idle TTL expired", action="idle")
                    return Stopped()
                if runner.silent_s >= self._services.settings.stall_limit_s:
                    return Stalled()
            if stopping.done():
                return Stopped()
            if exiting.done():
                return Died()
            if changing.done():
                return Changed()
            message = receiving.result()
            return Died() if message is None else Unexpected(tag(message))

    def _until_check_s(self, instance: Instance) -> float:
        """Return the seconds until a loaded instance is to be checked again."""
        return min(self._services.timing.silence_s, max(MIN_CHECK_S, self._until_idle_s(instance)))

    def _until_idle_s(self, instance: Instance) -> float:
        """Return the seconds until the idle TTL of a loaded instance expires, by what its runner reported last."""
        idle_at = msgspec.structs.replace(instance, used_at=self.requests.used_at).idle_at
        return math.inf if idle_at is None or self.is_pinned else idle_at - time.time()

    async def _has_expired(self, instance: Instance, runner: Runner) -> bool:
        """Return whether the idle TTL has expired, by the runner's own judgement.  It refuses requests then."""
        ttl_s = instance.request.ttl_seconds
        assert ttl_s is not UNSET
        return await runner.close_if_unused(time.time() - ttl_s)

    # ---- the end

    async def _unload(self, instance: Instance, runner: Runner | None) -> None:
        """Stop a runner on request, after its last answer.

        While the worker drains, there was no request: a loaded instance counts as lost, and a load is requeued.
        """
        if self._services.ending.is_set():
            await self._finish()
            await self._stop_runner(runner)
            await self._record.abandon(instance, self._services.settings.load_attempts)
            return
        instance = await self._record.write(instance, Event.STOP)
        await self._finish()
        await self._stop_runner(runner)
        self._services.desired.discard(await self._record.write(instance, Event.EXIT))

    async def _finish(self) -> None:
        """Let a loaded instance end its requests, and begin no others.

        Waits up to `unload_wait_s`, while the worker drains as long as the drain takes.
        """
        if self._runner is None:
            return
        async with racing(self._runner.close(), self._services.out_of_time.wait()) as waits:
            await first(waits, None if self._services.ending.is_set() else self._services.settings.unload_wait_s)

    async def _abandon(self, runner: Runner) -> None:
        """Drop an instance whose record another writer changed."""
        _log.warning("record changed by another writer", action="fenced")
        await self._stop_runner(runner)

    async def _stop_runner(self, runner: Runner | None) -> None:
        """Stop a runner, release its memory and save its output.

        Returns only once the runner is reaped: until then its memory is not free, and must not be reported as free.
        """
        if runner is None:
            await self._services.placer.withdraw(self)
            return
        while True:
            try:
                await runner.stop()
                break
            except RunnerStuck as e:
                _log.error("runner stuck", action="runner_stuck", pid=runner.pid, error=str(e))
        await self._services.placer.give_back(self)
        self._engine_log.close()
        await self._engine_log.save(runner)

    async def _unexpected(self, instance: Instance, runner: Runner, outcome: Unexpected) -> None:
        """Stop a runner that violated the protocol, and fail its instance."""
        _log.error("runner violated the protocol", action="runner_unexpected", pid=runner.pid, said=outcome.message)
        await self._stop_runner(runner)
        reason = f"the engine process sent an unexpected message: '{outcome.message}'"
        await self._fail(instance, "engine_crashed", reason)

    async def _failure_of(self, model: Model, load: Load, runner: Runner) -> tuple[LoadFailure, str]:
        """Return code and sentence for a runner that died in a load.  If the engine crashed, remember the model."""
        code, reason = self._exit_of(runner)
        files = [*zip(load.shards, model.files, strict=False)]  # as the catalog read them
        if code == "engine_crashed" and await asyncio.to_thread(has_changed, files):
            code, reason = "invalid_model_file", CHANGED
        if code == "engine_crashed" and runner.status not in FROM_OUTSIDE:
            await self._services.crashes.remember(model, reason)
        return code, reason

    def _exit_of(self, runner: Runner) -> tuple[LoadFailure, str]:
        """Return code and sentence for a runner that died."""
        lines = map(self._engine_log.relative, runner.output)
        return from_exit(runner.status, lines, oom_killed=oom_kills() > self._oom_kills)

    async def _fail_with_memory(self, instance: Instance, runner: Runner, code: LoadFailure, reason: str) -> None:
        """Fail an instance whose runner failed.  If memory was insufficient, the error has the numbers."""
        if code != "insufficient_memory":
            await self._fail(instance, code, reason)
            return
        needed = needed_bytes(runner.output)  # None if the engine logged only std::bad_alloc
        model = of_instance(self._services.models, instance)
        error = await self._services.placer.refusal(instance, model, reason, needed)
        await self._fail_with(instance, error)

    async def _fail(self, instance: Instance, code: LoadFailure, reason: str) -> None:
        await self._fail_with(instance, LoadFailed(code, instance.type, instance.model, reason).body())

    async def _fail_with(self, instance: Instance, error: ErrorBody) -> None:
        await self._services.placer.withdraw(self)  # without a runner, its reservation is still there
        failed = await self._record.write(instance, Event.FAIL, error=error)
        if failed.loaded_at is not None:
            self._services.desired.discard(failed)


def _unowned(taking: asyncio.Future[Runner]) -> Runner | None:
    """Return the runner of a completed `Runners.take`, which has no owner yet; None if there is none."""
    has_runner = taking.done() and not taking.cancelled() and taking.exception() is None
    return taking.result() if has_runner else None


def has_changed(files: list[tuple[str, FileStat]]) -> bool:
    """Return whether one of these files changed.  A removed file does not count: its mapping stays intact."""
    for path, before in files:
        with suppress(OSError):
            if FileStat.of(Path(path).stat()) != before:
                return True
    return False
