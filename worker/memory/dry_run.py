"""What a load would take by the word of the engine: a dry run in a runner, for an API that asks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from msgspec import MsgspecError, msgpack

from shared.schema.memory import Taken
from shared.schema.snapshot import Sizing
from shared.telemetry import log
from worker.runner.parameters import plan
from worker.runner.process import Runner, RunnerDied, RunnerStuck
from worker.runner.protocol import Load, Measure, Measured

if TYPE_CHECKING:
    from worker.agent import Agent

KEPT_N = 256  # answers
DEADLINE_S = 20.0

_log = log.get("worker")


class Sizer:
    """Asks one thing after the other: each takes a runner, and a large vocabulary a second of a processor."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._asking = asyncio.Lock()
        self._kept: dict[bytes, list[Taken]] = {}  # by the files and the load, those asked for last at the end

    async def sized(self, data: bytes) -> bytes:
        """The answer to a Sizing, as msgpack: a list of Taken, or nil where the engine does not say."""
        try:
            sizing = msgpack.decode(data, type=Sizing)
        except MsgspecError as e:  # a newer version's
            _log.error("unreadable question", action="unreadable_sizing", error=str(e))
            return msgpack.encode(None)
        model = self.agent.models.get(sizing.key)
        gpus = self.agent.devices.gpus
        if model is None or model.problem is not None or not {*sizing.gpus} <= {*gpus}:
            return msgpack.encode(None)
        load = plan(sizing.request, model, self.agent.settings, sizing.gpus, sizing.layers)
        digest = model.fingerprint.encode() + msgpack.encode(load)
        async with self._asking:
            taken = self._kept.pop(digest, None) or await self._ask(load)
        if taken is not None:
            self._kept[digest] = taken
            if len(self._kept) > KEPT_N:
                del self._kept[next(iter(self._kept))]
        return msgpack.encode(taken)

    async def _ask(self, load: Load) -> list[Taken] | None:
        runner: Runner | None = None
        try:
            async with asyncio.timeout(DEADLINE_S):
                runner = await self.agent.runners.take()
                await runner.send(Measure(load))
                found = await runner.receive()
            return found.taken if isinstance(found, Measured) else None
        except (RunnerDied, TimeoutError) as e:
            _log.warning("no dry run", action="not_sized", error=str(e) or "it took too long")
            return None
        finally:
            if runner is not None:
                await self._end(runner)
            self.agent.runners.prepare()

    async def _end(self, runner: Runner) -> None:
        try:
            await runner.stop()
        except RunnerStuck as e:
            _log.error("runner stuck", action="runner_stuck", pid=runner.pid, error=str(e))
        except BaseException:
            runner.kill()
            raise
