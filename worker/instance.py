"""A resident: one instance from its delivery to its terminal state, and the only writer of its record meanwhile."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shared.errors import ErrorBody, LoadFailed, LoadFailure, crashed_lately
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.memory.placement import Placement
from shared.schema.http import Phase
from shared.schema.model import FileStat, Model
from shared.schema.snapshot import short
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.instances import Fenced, StopRequested
from shared.telemetry import log, trace
from shared.telemetry.tally import died
from worker.memory.host import oom_kills
from worker.record import Writer
from worker.runner.failure import from_exit, from_reason, needed_bytes, scrub
from worker.runner.parameters import plan
from worker.runner.process import Runner, RunnerDied, RunnerStuck
from worker.runner.protocol import Failed, Load, Measure, Measured, Progress, Ready
from worker.runner.rate import Pace

if TYPE_CHECKING:
    from worker.agent import Agent

SOMEBODYS = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP})  # not the engine's own ends
SILENCE_S = 5.0  # how often it is looked whether the runner of a loaded model answers
COMMIT_FRACTION, COMMIT_S = 0.02, 0.5  # progress is recorded after this much of the bytes, or this long
CHANGED = "a file of the model changed while it was loaded"
SIZINGS = 3  # how often another place is looked for, where the engine says that the estimate was too low
ENGINE_LOG_S = 0.1  # what the engine says is recorded in bunches

_log = log.get("worker")


class Resident:
    """What an agent holds of one instance; `live` is its whole life."""

    def __init__(self, agent: Agent, id_: str, not_before: float = 0.0) -> None:
        self.agent = agent
        self.id = id_
        self.not_before = not_before
        self.stop = asyncio.Event()  # an unload, a cancel, a record that is no longer ours, or our own end
        self.changed = asyncio.Event()  # a file of a loaded model
        self.freed = asyncio.Event()  # its memory is back
        self.files: list[tuple[str, FileStat]] = []  # what is loaded: paths, and how they were when they were opened
        self.key = ""  # of its model
        self.writer = Writer(agent)
        self.claimed = False
        self.traceparent = ""  # its runner's
        self._claimed_at = 0.0
        self._oom_kills = 0
        self._recording: asyncio.Future[None] | None = None

    @property
    def instance(self) -> Instance | None:
        """The record as it was written here last."""
        return self.writer.written

    async def live(self) -> None:
        log.bind(job=self.id)
        try:
            await self._wait()
            async with self.agent.placer.placing:  # in the order of the deliveries
                found = None if self.stop.is_set() else await self._find()
                placed = None if found is None else await self.agent.placer.place(*found)
            self.agent.taken.append(short(self.id))
            self.agent.changed.set()
            if found is None:
                return
            record, model = found
            if placed is None:
                await self._refuse(record, model)
                return
            loaded = None
            async with self.agent.placer.turn(placed.devices, self.stop) as is_its_turn:
                if is_its_turn and await self._loadable(record) is not None:  # others were before it
                    loaded = await self._begin(record, model, placed)
            if loaded is not None:
                await self._keep(*loaded)
        except UNAVAILABLE as e:  # before the claim, when a beat will find the record queued; or at our own end
            _log.warning("instance put off", action="redis_unavailable", error=str(e))
        except Fenced:  # before the claim: cancelled, or given to another
            _log.info("delivery void", action="delivery_void")
        finally:
            if self._recording is not None:
                self._recording.cancel()
            self.agent.placer.forget(self)

    async def _wait(self) -> None:
        """Until it is time to begin: nobody waits behind it meanwhile."""
        if (left_s := self.not_before - time.time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self.stop.wait()

    async def _find(self) -> tuple[Instance, Model] | None:
        """The queued record that is to be ours, and its model; None where there is none, or it fails at once.

        Raises Fenced and what UNAVAILABLE lists.
        """
        record = await self.agent.store.instances.get(self.id)
        if record is None or record.state is not State.QUEUED or record.worker != self.agent.name:
            return None
        span = trace.continued([record.traceparent])
        self.traceparent = str(span.child())
        log.bind(instance=record.instance_id, **span.ids)
        model = await self._loadable(record)
        if model is None:
            return None
        self.key = model.key
        return record, model

    async def _loadable(self, record: Instance) -> Model | None:
        """The model of a load, or None where it fails at once.  Raises Fenced and what UNAVAILABLE lists."""
        model = self.agent.models.get(record.key)
        if model is None or model.problem is not None:
            reason = "its file is gone" if model is None or model.problem is None else model.problem.message
            await self._fail(record, "invalid_model_file", reason)
            return None
        crash = self.agent.crash(model)
        if crash is not None and not record.request.force and not record.restoring:
            await self._fail_with(record, crashed_lately(record.type, record.model, *crash).body())
            return None
        return model

    async def _refuse(self, instance: Instance, model: Model) -> None:
        """Hand back what there is no room for: an API finds it another worker, or lets it fail with what we say here.
        What is to be restored stays ours, and fails.  Raises Fenced and what UNAVAILABLE lists."""
        error = self.agent.placer.refusal(instance, model)
        _log.info("no room", action="refused", reason=error.message)
        if instance.restoring:
            await self._fail_with(instance, error)
            return
        refused = [*instance.refused, self.agent.name]
        await self.writer.surely(
            instance, Event.REQUEUE, refused=refused, refusal=error, attempt=instance.attempt, worker=instance.worker
        )

    async def _begin(self, record: Instance, model: Model, placed: Placement) -> tuple[Instance, Runner] | None:
        """Make the record ours, and load it.  Raises Fenced and what UNAVAILABLE lists."""
        instance = await self.writer.surely(
            record,
            Event.CLAIM,
            epoch=self.agent.epoch,
            devices=placed.devices,
            evicted=[held.instance_id for held in placed.evicts],
            started_at=time.time(),
        )
        self.claimed, self._claimed_at = True, time.monotonic()
        timing = {"queue": max(0.0, self.writer.redis_time - record.created_at)}
        instance = msgspec.structs.replace(instance, timing=timing)
        try:
            taken = await self._take(instance)
            if any(not held.claimed for held in self.agent.held.values()):
                self.agent.runners.prepare()  # for one that waits already
            return None if taken is None else await self._load(taken[0], model, placed, taken[1])
        finally:
            if not self.agent.draining:
                self.agent.runners.prepare()  # not earlier unasked: it would take a core from a load of milliseconds

    async def _take(self, instance: Instance) -> tuple[Instance, Runner] | None:
        """A warm runner, or None once the instance has ended without one.  Followers are told every COMMIT_S."""
        taking, stopping = asyncio.ensure_future(self.agent.runners.take()), asyncio.ensure_future(self.stop.wait())
        both: list[asyncio.Future[Any]] = [taking, stopping]
        try:
            while not (await asyncio.wait(both, timeout=COMMIT_S, return_when=asyncio.FIRST_COMPLETED))[0]:
                instance = await self.writer.progress(instance, instance)
            if taking.done():
                return instance, taking.result()
            await self._leave(taking)
            await self._unload(instance, None)
        except Fenced:
            _log.warning("instance is no longer ours", action="fenced")
            await self._leave(taking)
        except (RunnerDied, RunnerStuck, TimeoutError) as e:
            await self._fail(instance, "engine_crashed", str(e) or "no runner")
        finally:
            taking.cancel()
            stopping.cancel()
        return None

    async def _leave(self, taking: asyncio.Future[Runner]) -> None:
        """Wait for a runner no longer; one that came at the same moment has no other owner."""
        taking.cancel()
        await asyncio.wait({taking})
        if not taking.cancelled() and taking.exception() is None:
            await self._stopped(taking.result())

    async def _load(
        self, instance: Instance, model: Model, placed: Placement, runner: Runner
    ) -> tuple[Instance, Runner] | None:
        """Have a warm runner load it.  Returns the loaded instance, or None once it has ended otherwise."""
        self._recording = asyncio.ensure_future(self._record_engine_log(runner))
        self._oom_kills = oom_kills()
        self.agent.placer.pool.started(self.id, runner.pid)
        try:
            load, outcome = self._load_of(instance, model, placed), None
            if self.agent.placer.is_unsure(placed):
                instance, load, outcome = await self._sized(instance, model, placed, runner)
            if outcome is None:
                spawn = time.monotonic() - self._claimed_at
                instance = msgspec.structs.replace(instance, timing={**instance.timing, "spawn": spawn})
                await runner.send(load)
                instance, outcome = await self._watch(instance, runner)
            match outcome:
                case Ready() if outcome.files != model.files:  # all was decided by the header of another file
                    await self._stopped(runner)
                    await self._fail(instance, "invalid_model_file", CHANGED)
                case Ready():
                    await self.agent.survived(instance, model)  # before anybody reads "loaded"
                    self.agent.placer.pool.settle(self.id, outcome.taken)
                    self.files = [*zip(load.shards, outcome.files, strict=True)]
                    loaded = await self._loaded(instance, outcome)
                    if loaded is not None:
                        return loaded, runner
                    await self._unload(instance, runner)
                case Failed():
                    await self._stopped(runner)
                    await self._failed(instance, runner, *from_reason(self._relative(outcome.reason)))
                case "no room":
                    await self._stopped(runner)
                    await self._refuse(instance, model)
                case "stop":
                    await self._unload(instance, runner)
                case "stalled":
                    await self._stopped(runner)
                    reason = f"the engine made no progress for {self.agent.settings.stall_limit_s:g} s"
                    await self._fail(instance, "load_stalled", reason)
                case "died":
                    self.agent.tally.add(died("loading"))
                    await self._stopped(runner)
                    code, reason = self._end(runner)
                    files = [*zip(load.shards, model.files, strict=False)]  # as the catalog had read them
                    if code == "engine_crashed" and await asyncio.to_thread(has_changed, files):
                        code, reason = "invalid_model_file", CHANGED
                    if code == "engine_crashed" and runner.status not in SOMEBODYS:
                        await self.agent.crashed(model, reason)
                    await self._failed(instance, runner, code, reason)
        except Fenced:
            await self._abandon(instance, runner)
        except BaseException:  # cancelled at our own end, or a fault of ours: no runner is left without an owner
            runner.kill()
            raise
        return None

    async def _sized(
        self, instance: Instance, model: Model, placed: Placement, runner: Runner
    ) -> tuple[Instance, Load, Any]:
        """Ask the engine what a load would take, and reserve that.  Returns the load, elsewhere if need be, and None
        where it can begin, else why not: "no room", or what became of the runner."""
        timing = instance.timing
        for _ in range(SIZINGS):
            load = self._load_of(instance, model, placed)
            await runner.send(Measure(load))
            instance, outcome = await self._watch(instance, runner)
            if not isinstance(outcome, Measured):
                return instance, load, outcome
            instance = msgspec.structs.replace(instance, timing=timing)
            await self.agent.placer.look()
            found = self.agent.placer.corrected(instance, model, placed, outcome.taken)
            if found is None:
                break
            if found.exact and found.layers == placed.layers and found.gpus == placed.gpus:
                return instance, load, None
            placed = found
        return instance, load, "no room"

    def _load_of(self, instance: Instance, model: Model, placed: Placement) -> Load:
        load = plan(instance.request, model, self.agent.settings, placed.gpus, placed.layers)
        return msgspec.structs.replace(load, traceparent=self.traceparent)

    async def _loaded(self, instance: Instance, ready: Ready) -> Instance | None:
        """The record of a load that is ready, or None where a wish to stop it came before."""
        now = time.time()
        try:
            loaded = await self.writer.surely(
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
        self.agent.wanted.add(loaded)
        self.agent.changed.set()
        return loaded

    async def _watch(self, instance: Instance, runner: Runner) -> tuple[Instance, Any]:
        """Follow a runner through a load, recording its progress, until it is over one way or another.

        Followers are told at least every COMMIT_S, whether or not there is progress.
        """
        stopping = asyncio.ensure_future(self.stop.wait())
        receiving = asyncio.ensure_future(runner.receive())
        phase: Phase = "metadata"
        began = heard_at = committed_at = time.monotonic()
        pace = Pace(began)
        latest: Progress | None = None
        timing = instance.timing
        try:
            while True:
                left_s = max(0.0, committed_at + COMMIT_S - time.monotonic())
                done, _ = await asyncio.wait({stopping, receiving}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                now = time.monotonic()
                so_far = msgspec.structs.replace(instance, timing={**timing, phase: now - began})
                if stopping.done():
                    return so_far, "stop"
                if receiving.done():
                    message = receiving.result()
                    if message is None:
                        return so_far, "died"
                    if not isinstance(message, Progress):
                        return so_far, message
                    receiving = asyncio.ensure_future(runner.receive())
                    heard_at, latest = now, message
                    pace.add(now, message.loaded_bytes)
                    if message.phase != phase:
                        timing = {**timing, phase: now - began}
                        phase, began = message.phase, now
                elif now - heard_at >= self.agent.settings.stall_limit_s:
                    return so_far, "stalled"
                reached = 0 if latest is None else latest.loaded_bytes
                progress = max(instance.progress, min(0.999, reached / max(1, instance.total_size_bytes)))
                changed = phase != instance.phase or progress >= instance.progress + COMMIT_FRACTION
                if changed or not done or now - committed_at >= COMMIT_S:  # a timer may be a little early
                    committed_at = now
                    rate = pace.bytes_per_second()
                    left = max(0, instance.total_size_bytes - reached)
                    new = msgspec.structs.replace(
                        instance,
                        phase=phase,
                        progress=progress,
                        loaded_bytes=reached,
                        bytes_per_second=rate,
                        estimated_completion=time.time() + left / rate if rate else None,
                        timing=timing,
                    )
                    instance = await self.writer.progress(instance, new)
        finally:
            stopping.cancel()
            receiving.cancel()

    async def _record_engine_log(self, runner: Runner) -> None:
        """Keep what the engine says readable while the instance lives."""
        while True:
            await runner.tail.grown.wait()
            await asyncio.sleep(ENGINE_LOG_S)
            runner.tail.grown.clear()
            await self._save_engine_log(runner)
            check_cancelled()

    async def _save_engine_log(self, runner: Runner) -> None:
        """First its trace: not among the engine's own lines, of which the oldest are dropped and the last may be what
        a load failed of."""
        said = scrub(self._relative("".join(f"{line}\n" for line in runner.tail)))
        text = f"traceparent: {self.traceparent}\n{said}"
        try:
            await self.agent.store.instances.write_engine_log(self.id, text, self.agent.name)
        except UNAVAILABLE:
            runner.tail.grown.set()  # once more

    async def _keep(self, instance: Instance, runner: Runner) -> None:
        """Hold a loaded instance until it is stopped or idle, its runner dies or falls silent, or its file changes."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.stop, runner.exited, self.changed)]
        is_idle = False
        try:
            while not (await asyncio.wait(waits, timeout=_until(instance), return_when=asyncio.FIRST_COMPLETED))[0]:
                self._oom_kills = oom_kills()  # those until now were others
                is_idle = instance.idle_at is not None and time.time() >= instance.idle_at
                if is_idle or runner.silent_s >= self.agent.settings.stall_limit_s:
                    break
            if is_idle:
                _log.info("unused for long", action="idle")
            if is_idle or self.stop.is_set():
                await self._unload(instance, runner)
            else:
                has_died = runner.exited.is_set()
                await self._stopped(runner)
                if has_died:
                    self.agent.tally.add(died("loaded"))
                    await self._failed(instance, runner, *self._end(runner))
                elif self.changed.is_set():
                    await self._fail(instance, "invalid_model_file", CHANGED)
                else:
                    limit = self.agent.settings.stall_limit_s
                    await self._fail(instance, "engine_crashed", f"the engine did not answer for {limit:g} s")
        except Fenced:
            await self._abandon(instance, runner)
        except BaseException:
            runner.kill()
            raise
        finally:
            for wait in waits:
                wait.cancel()

    async def _unload(self, instance: Instance, runner: Runner | None) -> None:
        """Stop a runner because it was asked for.  At our own end nobody asked: what is loaded counts as lost, and
        what is not is handed back, to be begun anew."""
        if self.agent.draining:
            await self._stopped(runner)
            await self.writer.abandon(instance, self.agent.settings.load_attempts)
            return
        instance = await self.writer.surely(instance, Event.STOP)
        await self._stopped(runner)
        self.agent.wanted.discard(await self.writer.surely(instance, Event.EXIT))

    async def _abandon(self, instance: Instance, runner: Runner) -> None:
        """Somebody else moved the record on: whatever we hold for it is void."""
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
        await self.agent.placer.give_back(self)
        if self._recording is not None:
            self._recording.cancel()
        await self._save_engine_log(runner)

    def _end(self, runner: Runner) -> tuple[LoadFailure, str]:
        """Code and sentence for a runner that died."""
        lines = map(self._relative, runner.tail)
        return from_exit(runner.status, lines, oom_killed=oom_kills() > self._oom_kills)

    async def _failed(self, instance: Instance, runner: Runner, code: LoadFailure, reason: str) -> None:
        """Fail it for what its runner came to; where memory was too short, with the numbers."""
        if code != "insufficient_memory":
            return await self._fail(instance, code, reason)
        needed = needed_bytes(runner.tail)  # the engine may say no more than std::bad_alloc
        error = self.agent.placer.refusal(instance, self.agent.models.get(instance.key), reason, needed)
        return await self._fail_with(instance, error)

    async def _fail(self, instance: Instance, code: LoadFailure, reason: str) -> None:
        await self._fail_with(instance, LoadFailed(code, instance.type, instance.model, reason).body())

    async def _fail_with(self, instance: Instance, error: ErrorBody) -> None:
        failed = await self.writer.surely(instance, Event.FAIL, error=error)
        if failed.loaded_at is not None:
            self.agent.wanted.discard(failed)

    def _relative(self, text: str) -> str:
        """The engine's words with the models directory left out of the paths."""
        return text.replace(f"{self.agent.settings.models_dir}/", "")


def _until(instance: Instance) -> float:
    """How long to hold a loaded instance without a look at it, in seconds."""
    return SILENCE_S if instance.idle_at is None else min(SILENCE_S, max(0.0, instance.idle_at - time.time()))


def has_changed(files: list[tuple[str, FileStat]]) -> bool:
    """Whether one of these is not what it was.  One that is gone harms nobody: what was mapped stays."""
    for path, before in files:
        with suppress(OSError):
            if FileStat.of(Path(path).stat()) != before:
                return True
    return False
