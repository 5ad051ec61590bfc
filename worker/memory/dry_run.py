"""Does dry runs for loads and for APIs: the memory that a load would take, measured by the engine in a runner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from msgspec import MsgspecError, msgpack, structs

from shared.lookup import of_source
from shared.schema.memory import Usage
from shared.schema.model import Model
from shared.schema.snapshot import Sizing
from shared.settings import Settings
from shared.telemetry import log
from worker.memory.devices import Devices
from worker.runner.parameters import plan
from worker.runner.process import Runner, RunnerDied, RunnerStuck, Unreadable, tag
from worker.runner.protocol import Busy, Closed, Failed, Load, Measure, Measured, Pong, Progress, Ready, Warm
from worker.runner.warm import Runners
from worker.timing import Timing

CACHED_N = 1024  # results
MOST_LENGTHS = 64  # of a question

_log = log.get("worker")


class DryRun:
    """Does the dry runs of a question in one runner: a second for a large vocabulary, and milliseconds for each context
    length.  Caches the results.

    Questions of APIs are answered one at a time, and do not delay those of loads.
    """

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        elsewhere: Callable[[Model | None], Model | None],
        devices: Devices,
        runners: Runners,
        timing: Timing,
    ) -> None:
        """`models`: the current catalog, by key.  `elsewhere` finds other models by their source, with other paths."""
        self._settings = settings
        self._models = models
        self._elsewhere = elsewhere
        self._devices = devices
        self._runners = runners
        self._timing = timing
        self._running = asyncio.Lock()
        self._cache: dict[bytes, list[Usage]] = {}  # by the files and the load; the most recently used last

    async def answer(self, question: bytes) -> bytes:
        """Answer a Sizing with a list of Usage for each context length, or nil if a dry run fails; both as msgpack."""
        try:
            sizing = msgpack.decode(question, type=Sizing)
        except MsgspecError as e:  # an API of a newer version
            _log.error("dry run request cannot be decoded", action="unreadable_sizing", error=str(e))
            return msgpack.encode(None)
        async with self._running:
            return msgpack.encode(await self.measured(sizing))

    async def measured(self, sizing: Sizing) -> list[list[Usage]] | None:
        """Return the usage for each context length; None if a dry run fails."""
        model = of_source(self._models, sizing.source, sizing.key) or self._elsewhere(sizing.source)
        if model is None or model.problem is not None or not {*sizing.gpus} <= {*self._devices.gpus}:
            return None
        lengths = sizing.context_lengths[:MOST_LENGTHS]
        requests = [structs.replace(sizing.request, context_length=n) for n in lengths] or [sizing.request]
        loads = [plan(request, model, self._settings, sizing.gpus, sizing.layers) for request in requests]
        digests = [model.fingerprint.encode() + msgpack.encode(load) for load in loads]
        known = {digest: self._cache[digest] for digest in digests if digest in self._cache}
        new = {digest: load for digest, load in zip(digests, loads, strict=True) if digest not in known}
        if new:
            usages = await self._run([*new.values()])
            if usages is None:
                return None
            known |= zip(new, usages, strict=True)
        for digest in digests:
            self._cache.pop(digest, None)
            self._cache[digest] = known[digest]
        while len(self._cache) > CACHED_N:
            del self._cache[next(iter(self._cache))]
        return [known[digest] for digest in digests]

    async def _run(self, loads: Sequence[Load]) -> list[list[Usage]] | None:
        runner: Runner | None = None
        usages: list[list[Usage]] = []
        try:
            async with asyncio.timeout(self._timing.dry_run_s):
                runner = await self._runners.take()
                for load in loads:
                    await runner.send(Measure(load))
                    match message := await runner.receive():
                        case Measured():
                            usages.append(message.usage)
                            continue
                        case None:
                            reason = "the runner died"
                        case Failed():
                            reason = message.reason
                        case Warm() | Pong() | Closed() | Busy() | Progress() | Ready() | Unreadable():
                            reason = f"the runner sent an unexpected message: '{tag(message)}'"
                        case _:
                            assert_never(message)
                    _log.warning("dry run failed", action="not_sized", error=reason)
                    return None
        except (RunnerDied, TimeoutError) as e:
            _log.warning("dry run failed", action="not_sized", error=str(e) or "timeout")
            return None
        else:
            return usages
        finally:
            if runner is not None:  # not for another model: it has parsed a file that may come from a stranger
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
