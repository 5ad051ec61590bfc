"""What the engine logs in a load, kept with the record."""

from __future__ import annotations

import asyncio
from pathlib import Path

from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.instances import Instances
from worker.runner.failure import scrub
from worker.runner.process import Runner


class EngineLog:
    """Writes the output of one load's runner to Redis, in bunches, from `follow` until `close`."""

    def __init__(self, instances: Instances, id_: str, worker: str, models_dir: Path, every_s: float) -> None:
        self.traceparent = ""  # of the runner's span: the first line
        self._instances = instances
        self._id, self._worker = id_, worker
        self._models_dir = models_dir
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    def follow(self, runner: Runner) -> asyncio.Task[None]:
        """Record what this runner says from now on; returns the task that does."""
        self._task = asyncio.create_task(self._follow(runner))
        return self._task

    def close(self) -> None:
        """Record no more by itself."""
        if self._task is not None:
            self._task.cancel()

    async def save(self, runner: Runner) -> None:
        """Write all that was said until now; try again with the next bunch if Redis is away.

        The trace comes first: it is not among the engine's own lines, of which the oldest are dropped and the last may
        say why a load failed.
        """
        said = scrub(self.relative("".join(f"{line}\n" for line in runner.output)))
        try:
            await self._instances.write_engine_log(self._id, f"traceparent: {self.traceparent}\n{said}", self._worker)
        except UNAVAILABLE:
            runner.output.grown.set()

    def relative(self, text: str) -> str:
        """Return the engine's words with the models directory left out of the paths."""
        return text.replace(f"{self._models_dir}/", "")

    async def _follow(self, runner: Runner) -> None:
        while True:
            await runner.output.grown.wait()
            await asyncio.sleep(self._every_s)
            runner.output.grown.clear()
            await self.save(runner)
            check_cancelled()
