"""Answers an API's dry-run requests: the memory that a load would take, measured by the engine in a runner."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import assert_never

from msgspec import MsgspecError, msgpack

from shared.lookup import of_source
from shared.schema.memory import Usage
from shared.schema.model import Model
from shared.schema.snapshot import Sizing
from shared.settings import Settings
from shared.telemetry import log
from worker.memory.devices import Devices
from worker.runner.parameters import plan
from worker.runner.process import Runner, RunnerDied, RunnerStuck, Unreadable, tag
from worker.runner.protocol import Failed, Load, Measure, Measured, Pong, Progress, Ready, Warm
from worker.runner.warm import Runners
from worker.timing import Timing

CACHED_N = 256  # results

_log = log.get("worker")


class DryRun:
    """Runs dry runs one at a time: each takes a runner, and a second for a large vocabulary.  Caches the results."""

    def __init__(
        self, settings: Settings, models: Mapping[str, Model], devices: Devices, runners: Runners, timing: Timing
    ) -> None:
        """`models`: the current catalog, by key."""
        self._settings = settings
        self._models = models
        self._devices = devices
        self._runners = runners
        self._timing = timing
        self._running = asyncio.Lock()
        self._cache: dict[bytes, list[Usage]] = {}  # by the files and the load; the most recently used last

    async def answer(self, question: bytes) -> bytes:
        """Answer a Sizing with a list of Usage, or nil if the dry run fails; both as msgpack."""
        try:
            sizing = msgpack.decode(question, type=Sizing)
        except MsgspecError as e:  # an API of a newer version
            _log.error("dry run request cannot be decoded", action="unreadable_sizing", error=str(e))
            return msgpack.encode(None)
        model = of_source(self._models, sizing.source, sizing.key)
        if model is None or model.problem is not None or not {*sizing.gpus} <= {*self._devices.gpus}:
            return msgpack.encode(None)
        load = plan(sizing.request, model, self._settings, sizing.gpus, sizing.layers)
        digest = model.fingerprint.encode() + msgpack.encode(load)
        async with self._running:
            usage = self._cache.pop(digest, None) or await self._run(load)
        if usage is not None:
            self._cache[digest] = usage
            if len(self._cache) > CACHED_N:
                del self._cache[next(iter(self._cache))]
        return msgpack.encode(usage)

    async def _run(self, load: Load) -> list[Usage] | None:
        runner: Runner | None = None
        try:
            async with asyncio.timeout(self._timing.dry_run_s):
                runner = await self._runners.take()
                await runner.send(Measure(load))
                message = await runner.receive()
        except (RunnerDied, TimeoutError) as e:
            _log.warning("dry run failed", action="not_sized", error=str(e) or "timeout")
            return None
        else:
            match message:
                case Measured():
                    return message.taken
                case None:
                    reason = "the runner died"
                case Failed():
                    reason = message.reason
                case Warm() | Pong() | Progress() | Ready() | Unreadable():
                    reason = f"the runner sent an unexpected message: '{tag(message)}'"
                case _:
                    assert_never(message)
            _log.warning("dry run failed", action="not_sized", error=reason)
            return None
        finally:
            if runner is not None:
                await self._end(runner)
            self._runners.prepare()

    async def _end(self, runner: Runner) -> None:
        try:
            await runner.stop()
        except RunnerStuck as e:
            _log.error("runner stuck", action="runner_stuck", pid=runner.pid, error=str(e))
        except BaseException:
            runner.kill()
            raise
