"""Records the engine's log of a load in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.instances import Instances
from worker.runner.failure import scrub
from worker.runner.process import Runner


class EngineLog:
    """Writes the output of a load's runner to Redis, in batches, from `follow` until `close`."""

    def __init__(self, instances: Instances, id_: str, worker: str, roots: Sequence[Path], every_s: float) -> None:
        self.traceparent = ""  # of the runner's span; written as the first line
        self._instances = instances
        self._id, self._worker = id_, worker
        self._roots = roots
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    def follow(self, runner: Runner) -> asyncio.Task[None]:
        """Start to record the output of this runner.  Returns the task."""
        self._task = asyncio.create_task(self._follow(runner))
        return self._task

    def close(self) -> None:
        """Stop the task.  `save` still works."""
        if self._task is not None:
            self._task.cancel()

    async def save(self, runner: Runner) -> None:
        """Write the output so far.  If Redis is unavailable, it is written with the next batch.

        The trace is the first line.  It is not kept in `output`, which drops its oldest lines.
        """
        text = scrub(self.relative("".join(f"{line}\n" for line in runner.output)))
        try:
            await self._instances.write_engine_log(self._id, f"traceparent: {self.traceparent}\n{text}", self._worker)
        except UNAVAILABLE:
            runner.output.grown.set()

    def relative(self, text: str) -> str:
        """Make paths in the engine's output relative to their models directories."""
        for root in self._roots:
            text = text.replace(f"{root}/", "")
        return text

    async def _follow(self, runner: Runner) -> None:
        while True:
            await runner.output.grown.wait()
            await asyncio.sleep(self._every_s)
            runner.output.grown.clear()
            await self.save(runner)
            check_cancelled()
