"""Starts the runners of a worker and keeps one warm."""

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

from shared.schema.http import EngineBuild
from shared.telemetry import log
from worker.listener.protocol import pair
from worker.runner.process import Runner, RunnerDied, RunnerStuck, Unreadable, tag
from worker.runner.protocol import Busy, Closed, Failed, Measured, Pong, Progress, Ready, Warm
from worker.timing import Timing

ENGINE = "worker.engine.child"  # imported by the fork server and the runners, never by the worker itself


class Runners:
    """Starts runners and keeps one warm, so that a load does not wait for a process to start.

    Runners are forked from multiprocessing's fork server, which has imported the engine but never initialised it: CUDA
    cannot be used in the fork of a process that initialised it.

    `silent_s`: for how long no runner has answered a ping, or could be started.
    """

    def __init__(
        self,
        silence_limit_s: float,
        on_failure: Callable[[], None] = lambda: None,
        *,
        visible: str | None,
        timing: Timing | None = None,
    ) -> None:
        """`silence_limit_s`: a warm runner that is silent for longer is replaced.  `on_failure` is called for each
        runner that dies before a load takes it.

        `visible`: the value of CUDA_VISIBLE_DEVICES for all loads, "-1" for no GPU; a warm runner has started the
        engine's backend for these GPUs.  None: the GPUs differ by load; a warm runner has only imported the engine.
        """
        self.silent_s = 0.0
        self.engine: EngineBuild | None = None  # known once a runner was warm
        self._visible = visible
        self._timing = timing or Timing()
        self._silence_limit_s = silence_limit_s
        self._on_failure = on_failure
        self._all: set[Runner] = set()
        self._context = multiprocessing.get_context("forkserver")
        # This module too, for `run_child`: importing it after the fork would cost each runner 0.1 s.
        self._context.set_forkserver_preload([ENGINE, __name__])
        self.next_runner: asyncio.Future[Runner] | None = None  # the next runner: warm, or starting

    def prepare(self) -> None:
        """Start the next runner, unless one is warm or starting."""
        if self.next_runner is None or _failed(self.next_runner):
            self.next_runner = asyncio.create_task(self._start())

    async def watch(self, since_s: float) -> None:
        """Ping every runner, `since_s` after the last call, and replace the warm one if it has exited or is silent."""
        self._all = {runner for runner in self._all if not runner.exited.is_set()}
        responsive = [runner for runner in self._all if runner.silent_s == 0]
        self.silent_s = 0.0 if responsive else self.silent_s + since_s
        for runner in self._all:
            runner.ping(since_s)
        if (next_runner := self.next_runner) is None or not next_runner.done():
            return
        if _failed(next_runner):
            self.prepare()
            return
        runner = next_runner.result()
        if runner.silent_s >= self._silence_limit_s:
            log.get("worker").warning("warm runner does not answer", action="warm_runner_silent", pid=runner.pid)
            runner.kill()
        if runner.exited.is_set():
            self._on_failure()
            self.next_runner = None
            self.prepare()
            await runner.reaped()

    async def warmed(self) -> None:
        """Wait until a runner is warm.  Then the engine is known to start on this host, and `engine` is set.

        Raises RunnerDied and RunnerStuck.
        """
        self.prepare()
        assert self.next_runner is not None
        await asyncio.shield(self.next_runner)

    async def take(self) -> Runner:
        """Take a warm runner, which the caller then owns.  Raises RunnerDied and RunnerStuck if none can be started.

        If the caller is cancelled, the runner stays for the next caller.
        """
        while True:
            self.prepare()
            next_runner = self.next_runner
            assert next_runner is not None
            await asyncio.wait([next_runner])
            if self.next_runner is not next_runner:  # another caller took it
                continue
            self.next_runner = None
            runner = next_runner.result()
            if not runner.exited.is_set():
                return runner
            self._on_failure()
            log.get("worker").warning("warm runner died", action="warm_runner_died", status=runner.status)
            await runner.reaped()

    async def close(self) -> None:
        """Stop the warm runner.  The fork server exits with this process."""
        if self.next_runner is not None:
            next_runner, self.next_runner = self.next_runner, None
            # A runner that is warm can be stopped cleanly; one that is still starting is cancelled.
            await asyncio.wait({next_runner}, timeout=2 * self._timing.grace_s)
            next_runner.cancel()
            await asyncio.wait({next_runner}, timeout=self._timing.grace_s)
            if next_runner.done() and not _failed(next_runner):
                with suppress(RunnerStuck):
                    await next_runner.result().stop()

    async def _start(self) -> Runner:
        control, control_child = socket.socketpair()
        output, output_child = socket.socketpair()
        hand_over, hand_over_child = pair()
        try:
            with control_child, output_child, hand_over_child:
                arguments = (control_child, hand_over_child, output_child, self._visible)
                process = self._context.Process(target=run_child, args=arguments, daemon=True)
                starting = asyncio.ensure_future(asyncio.to_thread(process.start))
                async with asyncio.timeout(self._timing.warm_s):  # the fork server may hang
                    await asyncio.shield(starting)
        except BaseException as e:
            for end in (control, output, hand_over):
                end.close()
            starting.add_done_callback(partial(_reap_late, process))
            if isinstance(e, (OSError, EOFError)):  # out of descriptors, processes or memory; or TimeoutError
                raise RunnerDied(f"no runner could be started: {str(e) or 'the fork server timed out'}") from e
            raise
        runner = Runner(process, *await asyncio.open_connection(sock=control), hand_over, self._timing)
        self._all.add(runner)
        runner.collect(output)
        try:
            async with asyncio.timeout(self._timing.warm_s):
                message = await runner.receive()
        except BaseException as e:  # a timeout, or cancelled
            runner.kill()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timing.reap_s):
                    await runner.reaped()
            if isinstance(e, TimeoutError):
                reason = f"it was not warm within {self._timing.warm_s:g} s"
                raise RunnerDied(f"no runner could be started: {reason}") from e
            raise
        match message:
            case Warm():
                self.engine = message.engine
                return runner
            case None:
                reason = ""
            case Failed():
                reason = message.reason
            case Pong() | Closed() | Busy() | Progress() | Ready() | Measured() | Unreadable():
                reason = f"it sent '{tag(message)}' before 'warm'"
            case _:
                assert_never(message)
        self._on_failure()
        await runner.stop()
        *_, last = ["it exited without output", *runner.output]
        raise RunnerDied(f"no runner could be started: {reason or last}")


def _reap_late(process: ForkServerProcess, started: asyncio.Future[None]) -> None:
    """Reap a process that started after the timeout.  Its channel is closed, so that it exits at once."""
    if not started.cancelled() and started.exception() is None:

        def reap() -> None:
            process.join()
            process.close()

        asyncio.get_running_loop().run_in_executor(None, reap)


def _failed(start: asyncio.Future[Runner]) -> bool:
    return start.done() and (start.cancelled() or start.exception() is not None)


def run_child(control: socket.socket, hand_over: socket.socket, output: socket.socket, visible: str | None) -> None:
    """Run a runner process until it exits.  Imports the engine by name: an import statement in this module would load
    the engine into the worker."""
    importlib.import_module(ENGINE).main(control, hand_over, output, visible)
