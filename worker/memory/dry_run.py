"""What a load would take by the word of the engine: a dry run in a runner, for an API that asks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import assert_never

from msgspec import MsgspecError, msgpack

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

KEPT_N = 256  # answers

_log = log.get("worker")


class DryRun:
    """Asks the engine about one load after the other: each takes a runner, and a large vocabulary takes a second."""

    def __init__(
        self, settings: Settings, models: Mapping[str, Model], devices: Devices, runners: Runners, timing: Timing
    ) -> None:
        """`models`: the catalog as it is now, by key."""
        self._settings = settings
        self._models = models
        self._devices = devices
        self._runners = runners
        self._timing = timing
        self._asking = asyncio.Lock()
        self._kept: dict[bytes, list[Usage]] = {}  # by the files and the load, the last asked for at the end

    async def answer(self, question: bytes) -> bytes:
        """Answer a Sizing (msgpack) with a list of Usage as msgpack, or nil if the engine does not say."""
        try:
            sizing = msgpack.decode(question, type=Sizing)
        except MsgspecError as e:  # a newer version's
            _log.error("unreadable question", action="unreadable_sizing", error=str(e))
            return msgpack.encode(None)
        model = self._models.get(sizing.key)
        if model is None or model.problem is not None or not {*sizing.gpus} <= {*self._devices.gpus}:
            return msgpack.encode(None)
        load = plan(sizing.request, model, self._settings, sizing.gpus, sizing.layers)
        digest = model.fingerprint.encode() + msgpack.encode(load)
        async with self._asking:
            taken = self._kept.pop(digest, None) or await self._ask(load)
        if taken is not None:
            self._kept[digest] = taken
            if len(self._kept) > KEPT_N:
                del self._kept[next(iter(self._kept))]
        return msgpack.encode(taken)

    async def _ask(self, load: Load) -> list[Usage] | None:
        runner: Runner | None = None
        try:
            async with asyncio.timeout(self._timing.dry_run_s):
                runner = await self._runners.take()
                await runner.send(Measure(load))
                message = await runner.receive()
        except (RunnerDied, TimeoutError) as e:
            _log.warning("no dry run", action="not_sized", error=str(e) or "it took too long")
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
                    reason = f"the runner said '{tag(message)}' out of turn"
                case _:
                    assert_never(message)
            _log.warning("no dry run", action="not_sized", error=reason)
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
