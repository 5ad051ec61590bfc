"""The runners of a worker, of which one waits warm."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.context import ForkServerProcess
from typing import assert_never

from shared.telemetry import log
from worker.runner.process import Runner, RunnerDied, RunnerStuck, Unreadable, tag
from worker.runner.protocol import Failed, Measured, Pong, Progress, Ready, Warm
from worker.timing import Timing

ENGINE = "worker.engine.child"  # imported by the server that forks runners, and in them; never by the worker itself


class Runners:
    """Starts runners, keeping one warm ahead, so that a load does not wait for a process.

    They are forked from a server process that has imported the engine but never initialised it: CUDA cannot be used
    in the fork of a process that did.

    `silent_s`: for how long no runner has answered, and none could be started that does.
    """

    def __init__(
        self,
        patience_s: float,
        on_death: Callable[[], None] = lambda: None,
        *,
        visible: str | None,
        timing: Timing | None = None,
    ) -> None:
        """A warm runner that is silent for `patience_s` is replaced.  `on_death` is called for each that died before
        it was taken.

        `visible`: the GPUs that every load may have, as CUDA_VISIBLE_DEVICES names them, "-1" for none: a warm runner
        has started the engine's backend for them.  None: which ones differs by load, so that it has only imported the
        engine.
        """
        self.silent_s = 0.0
        self.has_cuda = False  # whether the engine was built with it, by the word of a warm runner
        self._visible = visible
        self._timing = timing or Timing()
        self._patience_s = patience_s
        self._on_death = on_death
        self._all: set[Runner] = set()
        self._context = multiprocessing.get_context("forkserver")
        # This module too, since `run_child` is found in it: imported after the fork, it would cost each runner 0.1 s.
        self._context.set_forkserver_preload([ENGINE, __name__])
        self.coming: asyncio.Task[Runner] | None = None  # the next runner: warm, or getting warm

    def prepare(self) -> None:
        """Begin to warm the next runner, also where the last attempt failed."""
        if self.coming is None or _failed(self.coming):
            self.coming = asyncio.create_task(self._start())

    async def watch(self, since_s: float) -> None:
        """Ping every runner, `since_s` after the last time, and replace the warm one where it is gone or silent."""
        self._all = {runner for runner in self._all if not runner.exited.is_set()}
        heard = [runner for runner in self._all if runner.silent_s == 0]
        self.silent_s = 0.0 if heard else self.silent_s + since_s
        for runner in self._all:
            runner.ping(since_s)
        if (coming := self.coming) is None or not coming.done():
            return
        if _failed(coming):
            self.prepare()
            return
        runner = coming.result()
        if runner.silent_s >= self._patience_s:
            log.get("worker").warning("a warm runner is silent", action="warm_runner_silent", pid=runner.pid)
            runner.kill()
        if runner.exited.is_set():
            self._on_death()
            self.coming = None
            self.prepare()
            await runner.reaped()

    async def warmed(self) -> None:
        """Wait until a runner is warm: the engine can be started here, and `has_cuda` is known.

        Raises RunnerDied and TimeoutError.
        """
        self.prepare()
        assert self.coming is not None
        await asyncio.shield(self.coming)

    async def take(self) -> Runner:
        """A warm runner.  Raises RunnerDied and TimeoutError where none can be started.

        Whoever stops waiting leaves it to the next.
        """
        while True:
            self.prepare()
            coming = self.coming
            assert coming is not None
            await asyncio.wait([coming])
            if self.coming is not coming:  # another load took it
                continue
            self.coming = None
            runner = coming.result()
            if not runner.exited.is_set():
                return runner
            self._on_death()
            log.get("worker").warning("a warm runner died", action="warm_runner_died", status=runner.status)
            await runner.reaped()

    async def close(self) -> None:
        """Stop the warm runner; the server that forks them ends with this process."""
        if self.coming is not None:
            coming, self.coming = self.coming, None
            await asyncio.wait(
                {coming}, timeout=2 * self._timing.grace_s
            )  # it is about to be warm: stopped then, it leaves nothing
            coming.cancel()
            await asyncio.wait({coming}, timeout=self._timing.grace_s)
            if coming.done() and not _failed(coming):
                with suppress(RunnerStuck):
                    await coming.result().stop()

    async def _start(self) -> Runner:
        control, control_child = socket.socketpair()
        output, output_child = socket.socketpair()
        try:
            with control_child, output_child:
                process = self._context.Process(
                    target=run_child, args=(control_child, output_child, self._visible), daemon=True
                )
                starting = asyncio.ensure_future(asyncio.to_thread(process.start))
                async with asyncio.timeout(self._timing.warm_s):  # the server that forks them may be stuck
                    await asyncio.shield(starting)
        except BaseException as e:
            control.close()
            output.close()
            starting.add_done_callback(partial(_bury, process))
            if isinstance(e, (OSError, EOFError)):  # no descriptor, no process, no memory left for one more; or no time
                raise RunnerDied(f"a runner could not start: {str(e) or 'none was forked in time'}") from e
            raise
        runner = Runner(process, *await asyncio.open_connection(sock=control), self._timing)
        self._all.add(runner)
        runner.collect(output)
        try:
            async with asyncio.timeout(self._timing.warm_s):
                message = await runner.receive()
        except BaseException:  # too late, or nobody wants it any more
            runner.kill()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timing.reap_s):
                    await runner.reaped()
            raise
        match message:
            case Warm():
                self.has_cuda = message.has_cuda
                return runner
            case None:
                reason = ""
            case Failed():
                reason = message.reason
            case Pong() | Progress() | Ready() | Measured() | Unreadable():
                reason = f"it said '{tag(message)}' before it was warm"
            case _:
                assert_never(message)
        self._on_death()
        await runner.stop()
        *_, last = ["it said nothing", *runner.output]
        raise RunnerDied(f"a runner could not start: {reason or last}")


def _bury(process: ForkServerProcess, started: asyncio.Future[None]) -> None:
    """Reap what was started too late for anybody: its channel is closed, so that it leaves at once."""
    if not started.cancelled() and started.exception() is None:

        def reap() -> None:
            process.join()
            process.close()

        asyncio.get_running_loop().run_in_executor(None, reap)


def _failed(start: asyncio.Task[Runner]) -> bool:
    return start.done() and (start.cancelled() or start.exception() is not None)


def run_child(control: socket.socket, output: socket.socket, visible: str | None) -> None:
    """What a runner does for its whole life.  The engine is found by its name: importing it here would import it into
    the worker."""
    importlib.import_module(ENGINE).main(control, output, visible)
