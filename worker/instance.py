"""One instance on this worker, from its delivery to its terminal state."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, assert_never

import msgspec

from shared.errors import ErrorBody, LoadFailed, LoadFailure, crashed_lately
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.memory.placement import Placement
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
from worker.memory.host import oom_kills
from worker.memory.placer import Placer
from worker.outcome import Changed, Died, Ended, NoRoom, Stalled, Stopped, Unexpected
from worker.record import Record
from worker.runner.failure import from_exit, from_reason, needed_bytes
from worker.runner.parameters import plan
from worker.runner.process import Runner, RunnerDied, RunnerStuck, Unreadable, tag
from worker.runner.protocol import Failed, Load, Measure, Measured, Pong, Progress, Ready, Warm
from worker.runner.rate import Rate
from worker.runner.warm import Runners
from worker.timing import Timing

FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP})  # no crash of the engine
COMMIT_FRACTION = 0.02  # progress is recorded after this much of the bytes
CHANGED = "a file of the model changed while it was loaded"
DRY_RUNS = 3  # how often another place is looked for if the engine says that the estimate was too low

Answer = TypeVar("Answer", Ready, Measured)

_log = log.get("worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the instances of a worker share."""

    name: str
    epoch: str
    settings: Settings
    timing: Timing
    models: Mapping[str, Model]  # by key; the catalog as it is now
    residents: Mapping[str, Resident]  # by id of the load; all that the worker holds or is to hold
    instances: Instances
    placer: Placer
    runners: Runners
    crashes: Crashes
    desired: Desired
    tally: Tally
    placed: deque[str]  # the ends (`short`) of the ids of loads that were placed or refused
    changed: asyncio.Event  # set when the worker's snapshot has something new
    ending: asyncio.Event  # set once the worker drains


class Resident:
    """What a worker holds of one instance; `live` is its whole life.  It alone writes the record meanwhile."""

    def __init__(self, services: Services, id_: str, not_before: float = 0.0) -> None:
        """`not_before`: when to begin, in seconds since the epoch."""
        self.id = id_
        self.not_before = not_before
        self.stop = asyncio.Event()  # an unload, a cancel, a record that is another's by now, or the worker's end
        self.changed = asyncio.Event()  # a file of a loaded model changed
        self.freed = asyncio.Event()  # its memory is back
        self.files: list[tuple[str, FileStat]] = []  # of a loaded model: paths, and how they were when they were opened
        self.key = ""  # of its model
        self.claimed = False
        self._of = services
        self._record = Record(services.instances, services.ending)
        self._engine_log = EngineLog(
            services.instances,
            id_,
            services.name,
            services.settings.models_dir,
            services.timing.engine_log_s,
        )
        self._claimed_at = 0.0
        self._oom_kills = 0

    @property
    def instance(self) -> Instance | None:
        """The record as it was written here last."""
        return self._record.written

    async def live(self) -> None:
        """Load it, hold it, and stop it.  Returns once nothing of it is left here."""
        log.bind(job=self.id)
        placer = self._of.placer
        try:
            await self._wait()
            async with placer.placing:  # in the order of the deliveries
                found = None if self.stop.is_set() else await self._find()
                placed = None if found is None else await placer.place(*found)
            self._of.placed.append(short(self.id))
            self._of.changed.set()
            if found is None:
                return
            record, model = found
            if placed is None:
                await self._refuse(record, model)
                return
            loaded = None
            async with placer.turn(placed.devices, self.stop) as is_its_turn:
                if is_its_turn and await self._loadable(record) is not None:  # others were before it
                    loaded = await self._begin(record, model, placed)
            if loaded is not None:
                await self._keep(*loaded)
        except UNAVAILABLE as e:  # before the claim, when a beat will find the record queued; or at the worker's end
            _log.warning("instance put off", action="redis_unavailable", error=str(e))
        except Fenced:  # before the claim: cancelled, or given to another worker
            _log.info("delivery void", action="delivery_void")
        finally:
            self._engine_log.close()
            placer.forget(self)

    async def _wait(self) -> None:
        """Wait until it is time to begin; others go first meanwhile."""
        if (left_s := self.not_before - time.time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self.stop.wait()

    # ---- before the load

    async def _find(self) -> tuple[Instance, Model] | None:
        """Return the queued record that is to be ours, and its model; None if there is none, or it fails at once.

        Raises Fenced and what UNAVAILABLE lists.
        """
        record = await self._of.instances.get(self.id)
        if record is None or record.state is not State.QUEUED or record.worker != self._of.name:
            return None
        span = trace.continued([record.traceparent])
        self._engine_log.traceparent = str(span.child())
        log.bind(instance=record.instance_id, **span.ids)
        model = await self._loadable(record)
        if model is None:
            return None
        self.key = model.key
        return record, model

    async def _loadable(self, record: Instance) -> Model | None:
        """Return the model of a load, None if the load fails at once.  Raises Fenced and what UNAVAILABLE lists."""
        model = self._of.models.get(record.key)
        if model is None or model.problem is not None:
            reason = "its file is gone" if model is None or model.problem is None else model.problem.message
            await self._fail(record, "invalid_model_file", reason)
            return None
        crash = self._of.crashes.of(model)
        if crash is not None and not record.request.force and not record.restoring:
            await self._fail_with(record, crashed_lately(record.type, record.model, *crash).body())
            return None
        return model

    async def _refuse(self, instance: Instance, model: Model) -> None:
        """Hand back what there is no room for: an API finds another worker, or lets it fail with what is said here.

        A restoration stays with its worker, and fails.  Raises Fenced and what UNAVAILABLE lists.
        """
        error = self._of.placer.refusal(instance, model)
        _log.info("no room", action="refused", reason=error.message)
        if instance.restoring:
            await self._fail_with(instance, error)
            return
        refused = [*instance.refused, self._of.name]
        await self._record.surely(
            instance, Event.REQUEUE, refused=refused, refusal=error, attempt=instance.attempt, worker=instance.worker
        )

    async def _begin(self, record: Instance, model: Model, placed: Placement) -> tuple[Instance, Runner] | None:
        """Claim the record and load it.  Raises Fenced and what UNAVAILABLE lists."""
        instance = await self._record.surely(
            record,
            Event.CLAIM,
            epoch=self._of.epoch,
            devices=placed.devices,
            evicted=[held.instance_id for held in placed.evicts],
            started_at=time.time(),
        )
        self.claimed, self._claimed_at = True, time.monotonic()
        timing = {"queue": max(0.0, self._record.redis_time_s - record.created_at)}
        instance = msgspec.structs.replace(instance, timing=timing)
        try:
            taken = await self._take(instance)
            if any(not other.claimed for other in self._of.residents.values()):
                self._of.runners.prepare()  # for one that waits already
            return None if taken is None else await self._load(taken[0], model, placed, taken[1])
        finally:
            if not self._of.ending.is_set():
                self._of.runners.prepare()  # if none waits, not before: it would take a core from a short load

    async def _take(self, instance: Instance) -> tuple[Instance, Runner] | None:
        """Take a warm runner.  Returns None once the instance has ended without one."""
        taking = asyncio.ensure_future(self._of.runners.take())
        try:
            async with racing(taking, self.stop.wait()) as waits:
                while not await first(waits, self._of.timing.commit_s):
                    instance = await self._record.progress(instance, instance)
            if not taking.cancelled():  # also if a stop was requested at the same moment: the load will see that
                return instance, taking.result()
            await self._unload(instance, None)
        except Fenced:
            _log.warning("instance is no longer ours", action="fenced")
            await self._stopped(_taken(taking))
        except (RunnerDied, RunnerStuck, TimeoutError) as e:
            await self._fail(instance, "engine_crashed", str(e) or "no runner")
        except BaseException:
            if (runner := _taken(taking)) is not None:
                runner.kill()
            raise
        return None

    # ---- the load

    async def _load(
        self, instance: Instance, model: Model, placed: Placement, runner: Runner
    ) -> tuple[Instance, Runner] | None:
        """Have a warm runner load it.  Returns the loaded instance, None once it has ended otherwise."""
        self._engine_log.follow(runner)
        self._oom_kills = oom_kills()
        self._of.placer.ledger.started(self.id, runner.pid)
        try:
            load = self._load_of(instance, model, placed)
            outcome: Ready | NoRoom | Ended | None = None
            if self._of.placer.is_unsure(placed):
                instance, load, outcome = await self._measure(instance, model, placed, runner)
            if outcome is None:
                spawn_s = time.monotonic() - self._claimed_at
                instance = msgspec.structs.replace(instance, timing={**instance.timing, "spawn": spawn_s})
                await runner.send(load)
                instance, outcome = await self._watch(instance, runner, Ready)
            return await self._conclude(instance, model, load, runner, outcome)
        except Fenced:
            await self._abandon(runner)
        except BaseException:  # cancelled at the worker's end, or a fault of ours: no runner is left without an owner
            runner.kill()
            raise
        return None

    async def _conclude(
        self, instance: Instance, model: Model, load: Load, runner: Runner, outcome: Ready | NoRoom | Ended
    ) -> tuple[Instance, Runner] | None:
        """Record what a load came to.  Returns the loaded instance with its runner; otherwise None, and the runner is
        reaped.  Raises Fenced and what UNAVAILABLE lists."""
        match outcome:
            case Ready() if outcome.files != model.files:  # everything was decided by the header of another file
                await self._stopped(runner)
                await self._fail(instance, "invalid_model_file", CHANGED)
            case Ready():
                await self._of.crashes.forget(model, everywhere=instance.request.force)  # before anyone reads "loaded"
                self._of.placer.ledger.settle(self.id, outcome.taken)
                self.files = [*zip(load.shards, outcome.files, strict=True)]
                loaded = await self._loaded(instance, outcome)
                if loaded is not None:
                    return loaded, runner
                await self._unload(instance, runner)
            case Failed():
                await self._stopped(runner)
                await self._failed(instance, runner, *from_reason(self._engine_log.relative(outcome.reason)))
            case NoRoom():
                await self._stopped(runner)
                await self._refuse(instance, model)
            case Stopped():
                await self._unload(instance, runner)
            case Stalled():
                await self._stopped(runner)
                reason = f"the engine made no progress for {self._of.settings.stall_limit_s:g} s"
                await self._fail(instance, "load_stalled", reason)
            case Died():
                self._of.tally.add(died("loading"))
                await self._stopped(runner)
                await self._failed(instance, runner, *await self._death(model, load, runner))
            case Unexpected():
                await self._unexpected(instance, runner, outcome)
            case _:
                assert_never(outcome)
        return None

    async def _measure(
        self, instance: Instance, model: Model, placed: Placement, runner: Runner
    ) -> tuple[Instance, Load, NoRoom | Ended | None]:
        """Ask the engine what a load would take, and reserve that.

        Returns the load, perhaps for another place, and None if it can begin, else why not.
        """
        timing = instance.timing
        for _ in range(DRY_RUNS):
            load = self._load_of(instance, model, placed)
            await runner.send(Measure(load))
            instance, outcome = await self._watch(instance, runner, Measured)
            if not isinstance(outcome, Measured):
                return instance, load, outcome
            instance = msgspec.structs.replace(instance, timing=timing)
            await self._of.placer.look()
            found = self._of.placer.corrected(instance, model, placed, outcome.taken)
            if found is None:
                break
            if found.exact and found.layers == placed.layers and found.gpus == placed.gpus:
                return instance, load, None
            placed = found
        return instance, load, NoRoom()

    def _load_of(self, instance: Instance, model: Model, placed: Placement) -> Load:
        load = plan(instance.request, model, self._of.settings, placed.gpus, placed.layers)
        return msgspec.structs.replace(load, traceparent=self._engine_log.traceparent)

    async def _loaded(self, instance: Instance, ready: Ready) -> Instance | None:
        """Return the record of a load that is ready, None if a stop was requested before."""
        now = time.time()
        try:
            loaded = await self._record.surely(
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
        self._of.desired.add(loaded)
        self._of.changed.set()
        return loaded

    async def _watch(
        self, instance: Instance, runner: Runner, expected: type[Answer]
    ) -> tuple[Instance, Answer | Ended]:
        """Wait for a runner's answer, and record its progress.  Only a load (`Ready`) makes progress.

        Writes a revision at least every `Timing.commit_s`, so that followers hear something even without progress.
        """
        commit_s = self._of.timing.commit_s
        phase: Phase = "metadata"
        began = heard_at = committed_at = time.monotonic()
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
                            heard_at, latest = now, message
                            rate.add(now, message.loaded_bytes)
                            if message.phase != phase:
                                timing = {**timing, phase: now - began}
                                phase, began = message.phase, now
                        case Progress() | Ready() | Measured() | Warm() | Pong() | Unreadable():
                            return so_far, Unexpected(tag(message))
                        case _:
                            assert_never(message)
                elif now - heard_at >= self._of.settings.stall_limit_s:
                    return so_far, Stalled()
                reached = 0 if latest is None else latest.loaded_bytes
                progress = max(instance.progress, min(0.999, reached / max(1, instance.total_size_bytes)))
                changed = phase != instance.phase or progress >= instance.progress + COMMIT_FRACTION
                if changed or not is_done or now - committed_at >= commit_s:  # a timer may be a little early
                    committed_at = now
                    bytes_per_second = rate.bytes_per_second()
                    left_bytes = max(0, instance.total_size_bytes - reached)
                    new = msgspec.structs.replace(
                        instance,
                        phase=phase,
                        progress=progress,
                        loaded_bytes=reached,
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
        """Hold a loaded instance until it is stopped or idle, its runner dies or falls silent, or its file changes."""
        try:
            outcome = await self._held(instance, runner)
            match outcome:
                case Stopped():
                    await self._unload(instance, runner)
                case Died():
                    await self._stopped(runner)
                    self._of.tally.add(died("loaded"))
                    await self._failed(instance, runner, *self._exit(runner))
                case Changed():
                    await self._stopped(runner)
                    await self._fail(instance, "invalid_model_file", CHANGED)
                case Stalled():
                    await self._stopped(runner)
                    limit_s = self._of.settings.stall_limit_s
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

    async def _held(self, instance: Instance, runner: Runner) -> Stopped | Died | Changed | Stalled | Unexpected:
        """Wait until a loaded instance is to end; returns why.  A runner that holds a model says nothing by itself."""
        waits = self.stop.wait(), runner.exited.wait(), self.changed.wait(), runner.receive()
        async with racing(*waits) as (stopping, exiting, changing, receiving):
            while not await first((stopping, exiting, changing, receiving), self._until_look_s(instance)):
                self._oom_kills = oom_kills()  # those until now were others
                if instance.idle_at is not None and time.time() >= instance.idle_at:
                    _log.info("unused for long", action="idle")
                    return Stopped()
                if runner.silent_s >= self._of.settings.stall_limit_s:
                    return Stalled()
            if stopping.done():
                return Stopped()
            if exiting.done():
                return Died()
            if changing.done():
                return Changed()
            message = receiving.result()
            return Died() if message is None else Unexpected(tag(message))

    def _until_look_s(self, instance: Instance) -> float:
        """How long to hold a loaded instance without a look at it."""
        silence_s = self._of.timing.silence_s
        return silence_s if instance.idle_at is None else min(silence_s, max(0.0, instance.idle_at - time.time()))

    # ---- the end

    async def _unload(self, instance: Instance, runner: Runner | None) -> None:
        """Stop a runner on request.  At the worker's end nobody requested it: what is loaded counts as lost, and what
        is not is handed back, to be begun again."""
        if self._of.ending.is_set():
            await self._stopped(runner)
            await self._record.abandon(instance, self._of.settings.load_attempts)
            return
        instance = await self._record.surely(instance, Event.STOP)
        await self._stopped(runner)
        self._of.desired.discard(await self._record.surely(instance, Event.EXIT))

    async def _abandon(self, runner: Runner) -> None:
        """Another writer moved the record on: whatever is held here for it is void."""
        _log.warning("instance is no longer ours", action="fenced")
        await self._stopped(runner)

    async def _stopped(self, runner: Runner | None) -> None:
        """Return once the runner is reaped: until then its memory is not free, and nothing may say so."""
        if runner is None:
            return
        while True:
            try:
                await runner.stop()
                break
            except RunnerStuck as e:
                _log.error("runner stuck", action="runner_stuck", pid=runner.pid, error=str(e))
        await self._of.placer.give_back(self)
        self._engine_log.close()
        await self._engine_log.save(runner)

    async def _unexpected(self, instance: Instance, runner: Runner, outcome: Unexpected) -> None:
        """Stop a runner that broke the protocol, and fail what it was to do."""
        _log.error("a runner broke the protocol", action="runner_unexpected", pid=runner.pid, said=outcome.message)
        await self._stopped(runner)
        await self._fail(instance, "engine_crashed", f"the engine's process said '{outcome.message}' out of turn")

    async def _death(self, model: Model, load: Load, runner: Runner) -> tuple[LoadFailure, str]:
        """Return code and sentence for a runner that died in a load, and remember it if the engine crashed."""
        code, reason = self._exit(runner)
        files = [*zip(load.shards, model.files, strict=False)]  # as the catalog had read them
        if code == "engine_crashed" and await asyncio.to_thread(has_changed, files):
            code, reason = "invalid_model_file", CHANGED
        if code == "engine_crashed" and runner.status not in FROM_OUTSIDE:
            await self._of.crashes.remember(model, reason)
        return code, reason

    def _exit(self, runner: Runner) -> tuple[LoadFailure, str]:
        """Return code and sentence for a runner that died."""
        lines = map(self._engine_log.relative, runner.output)
        return from_exit(runner.status, lines, oom_killed=oom_kills() > self._oom_kills)

    async def _failed(self, instance: Instance, runner: Runner, code: LoadFailure, reason: str) -> None:
        """Fail it for what its runner came to; if memory was too short, with the numbers."""
        if code != "insufficient_memory":
            await self._fail(instance, code, reason)
            return
        needed = needed_bytes(runner.output)  # the engine may say no more than std::bad_alloc
        error = self._of.placer.refusal(instance, self._of.models.get(instance.key), reason, needed)
        await self._fail_with(instance, error)

    async def _fail(self, instance: Instance, code: LoadFailure, reason: str) -> None:
        await self._fail_with(instance, LoadFailed(code, instance.type, instance.model, reason).body())

    async def _fail_with(self, instance: Instance, error: ErrorBody) -> None:
        failed = await self._record.surely(instance, Event.FAIL, error=error)
        if failed.loaded_at is not None:
            self._of.desired.discard(failed)


def _taken(taking: asyncio.Future[Runner]) -> Runner | None:
    """Return the runner that nobody else owns yet, if there is one."""
    is_there = taking.done() and not taking.cancelled() and taking.exception() is None
    return taking.result() if is_there else None


def has_changed(files: list[tuple[str, FileStat]]) -> bool:
    """Return whether one of these is not what it was.  One that is gone harms nobody: what was mapped stays."""
    for path, before in files:
        with suppress(OSError):
            if FileStat.of(Path(path).stat()) != before:
                return True
    return False
