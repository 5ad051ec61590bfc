"""Supervises child processes: starts, watches and restarts them, and stops them in order.

A child never outlives the supervisor: the kernel sends it SIGTERM when the thread that started it ends for any reason
(PR_SET_PDEATHSIG in prctl(2)).  The supervisor must therefore run in the main thread, as asyncio.run does.

A child with a watchdog is also replaced if it hangs: it gets one end of a pipe and writes a byte at each of its beats
(`heartbeat`).  A child that has started to write and then stops is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

from msgspec import Struct

from shared import libc
from shared.backoff import Backoff
from shared.race import first, racing
from shared.telemetry import log

CONFIGURATION_ERROR = 2  # exit status of a child that refuses its settings; a restart does not help
FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 5.0
POLL_S = 0.05
START_DEADLINE_S = 60.0
KILL_S = 5.0  # a process that survives SIGKILL for this long is stuck in the kernel
CHECKS = 10  # checks of a watchdog without a beat before a child is killed
PIPE_BYTES = 65536  # the capacity of a pipe

_log = log.get(__name__)


class Command(Struct, frozen=True, kw_only=True):
    """How to start a child.  Its standard output goes to the standard error of the supervisor; its input is empty.

    `grace_s` is the time between SIGTERM and SIGKILL.  With `watchdog_s`, the child gets the option `--beat-fd N` and
    is replaced after that many seconds without a heartbeat; there is no limit for the first heartbeat.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()
    grace_s: float = 10.0
    watchdog_s: float | None = None


class StartFailed(Exception):
    """The children could not be started.  `status` is the exit status for the supervisor."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


class Stopped(Exception):
    """The supervisor received a stop signal."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped at a stop signal, so that the block can remove what it has begun.  A Supervisor takes over from it.

    By default, SIGTERM would end the process at once, or be ignored if it is the first process of a container.
    """

    def stop(*_: object) -> None:
        raise Stopped

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Supervisor:
    """Runs commands until a signal arrives.  On exit, stops and reaps all children, the last started first.

    After the first SIGTERM or SIGINT, `until` and `forever` raise Stopped; the next signal sends SIGKILL to all
    children.  A child that exits is restarted after a pause that doubles from FIRST_BACKOFF_S to LAST_BACKOFF_S.
    """

    def __init__(self, start_deadline_s: float = START_DEADLINE_S) -> None:
        self._start_deadline_s = start_deadline_s
        self._stages: list[list[_Keeper]] = []
        self._n_signals = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = loop.create_future()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)
        return self

    async def __aexit__(self, *_: object) -> None:
        for keeper in self._keepers():
            keeper.release()
        for stage in reversed(self._stages):
            await asyncio.gather(*(keeper.stop() for keeper in stage))
        self._end.cancel()
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(signum)

    def start(self, *commands: Command) -> None:
        """Start children.  They are stopped together, before all children that were started earlier."""
        self._stages.append([_Keeper(command, self._fail) for command in commands])

    async def until(self, missing: Callable[[], Awaitable[str | None]], what: str) -> None:
        """Poll `missing` until it returns None; all children count as ready from then on.

        Raises StartFailed, with the last result of `missing`, after the start deadline, or if a child exits with status
        CONFIGURATION_ERROR; and Stopped.
        """
        last = "not checked yet"

        async def poll() -> None:
            nonlocal last
            while reason := await missing():
                last = reason
                await asyncio.sleep(POLL_S)

        async with racing(poll(), asyncio.shield(self._end)) as (polling, ending):
            await first((polling, ending), self._start_deadline_s)
            if self._end.done():
                self._end.result()
            if not polling.done():
                exits = "".join(f"; {keeper.exits}" for keeper in self._keepers() if keeper.exits)
                raise StartFailed(f"{what} was not ready within {self._start_deadline_s:g} s: {last}{exits}.")
            polling.result()
        for keeper in self._keepers():
            keeper.is_ready = True

    async def forever(self) -> None:
        """Wait for a signal; never returns.  Raises Stopped, or StartFailed if a child refuses its settings."""
        await asyncio.shield(self._end)

    def _keepers(self) -> list[_Keeper]:
        return [keeper for stage in self._stages for keeper in stage]

    def _fail(self, reason: BaseException) -> None:
        if not self._end.done():
            self._end.set_exception(reason)
            self._end.exception()  # retrieve it: a failure while stopping is not awaited

    def _on_signal(self) -> None:
        self._n_signals += 1
        self._fail(Stopped())
        if self._n_signals > 1:
            for keeper in self._keepers():
                keeper.kill()


class _Keeper:
    """Keeps one command running."""

    def __init__(self, command: Command, fail: Callable[[BaseException], None]) -> None:
        self.is_ready = False
        self.exits = ""
        self._command = command
        self._fail = fail
        self._process: _Process | None = None
        self._is_killed = False
        self._task = asyncio.create_task(self._keep())
        self._task.add_done_callback(self._kept)

    def release(self) -> None:
        """Stop restarting the child."""
        self._task.cancel()

    async def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after the grace period.  Returns once the child is reaped."""
        if self._process:
            await self._process.stop(0.0 if self._is_killed else self._command.grace_s)

    def kill(self) -> None:
        self._is_killed = True
        if self._process:
            self._process.signal(signal.SIGKILL)

    async def _keep(self) -> None:
        backoff, n_exits = Backoff(FIRST_BACKOFF_S, LAST_BACKOFF_S, LAST_BACKOFF_S), 0
        while True:
            began = time.monotonic()
            try:
                self._process = _Process(self._command)
            except OSError as e:
                how = f"cannot be started ({e.strerror})"
            else:
                await self._process.exited.wait()
                how = self._process.how
                if self._process.status == CONFIGURATION_ERROR and not self.is_ready:
                    raise StartFailed(f"The {self._command.name} process refused its settings.", CONFIGURATION_ERROR)
            n_exits += 1
            self.exits = f"the {self._command.name} process {how}" + (f", {n_exits} times" if n_exits > 1 else "")
            pause_s = backoff.after(time.monotonic() - began)
            _log.warning(
                f"the {self._command.name} process {how}",
                action="child_exited",
                child=self._command.name,
                restart_in_s=pause_s,
            )
            await asyncio.sleep(pause_s)

    def _kept(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (reason := task.exception()):
            self._fail(reason)


class _Process:
    """One run of a command, in its own session.  Raises OSError if it cannot be started."""

    def __init__(self, command: Command) -> None:
        self.exited = asyncio.Event()
        self.status = 0
        self._command = command
        with ExitStack() as undo:
            self._watchdog = _Watchdog(command.watchdog_s, self._on_silence) if command.watchdog_s else None
            argv, pass_fds = command.argv, command.pass_fds
            if self._watchdog:
                undo.callback(self._watchdog.close)
                argv = (*argv, "--beat-fd", str(self._watchdog.theirs))
                pass_fds = (*pass_fds, self._watchdog.theirs)
            self._popen = subprocess.Popen(
                argv,
                env=command.environ,
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=pass_fds,
                start_new_session=True,
                preexec_fn=leave_with(os.getpid()),
            )
            try:
                self._pidfd = os.pidfd_open(self._popen.pid)
            except OSError:
                self._popen.kill()
                self._popen.wait()
                raise
            undo.pop_all()
        if self._watchdog:
            self._watchdog.start()
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    @property
    def how(self) -> str:
        """How the process ended: the predicate of a sentence."""
        if self.status < 0:
            return f"was terminated by signal {-self.status} ({signal.strsignal(-self.status)})"
        return f"exited with status {self.status}"

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to the process, which stops its own children; send SIGKILL to its whole process group.

        The process id cannot be reused before the process is reaped.
        """
        if not self.exited.is_set():
            with suppress(ProcessLookupError):
                (os.killpg if signum is signal.SIGKILL else os.kill)(self._popen.pid, signum)

    async def stop(self, grace_s: float) -> None:
        if self._watchdog:
            self._watchdog.stop()
        for signum, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_S)):
            self.signal(signum)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.exited.wait()
                    return
        _log.error("a child survived SIGKILL", action="child_stuck", child=self._command.name, pid=self._popen.pid)

    def _on_silence(self) -> None:
        _log.error(
            f"the {self._command.name} process sends no heartbeat and is killed",
            action="child_silent",
            child=self._command.name,
            pid=self._popen.pid,
            silent_s=self._command.watchdog_s,
        )
        self.signal(signal.SIGKILL)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._watchdog:
            self._watchdog.close()
        # The remaining processes of its group, whose id is still valid, since it is not reaped yet.
        self.signal(signal.SIGKILL)
        self.status = self._popen.wait()
        self.exited.set()


class _Watchdog:
    """Reads the beats of one child, and calls `on_silence` if they stop for `silence_s` seconds after the first beat.

    It counts checks instead of time: if the whole machine was paused, no checks took place meanwhile.
    """

    def __init__(self, silence_s: float, on_silence: Callable[[], None]) -> None:
        self._silence_s = silence_s
        self._on_silence = on_silence
        self._task: asyncio.Task[None] | None = None
        self._ours, self.theirs = os.pipe()
        os.set_blocking(self._ours, False)

    def start(self) -> None:
        """Start the checks; the child has inherited its end of the pipe."""
        os.close(self.theirs)
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    def close(self) -> None:
        if self._task:
            self._task.cancel()
        else:
            os.close(self.theirs)
        os.close(self._ours)

    async def _watch(self) -> None:
        silent, is_armed = 0, False
        while silent < CHECKS:
            await asyncio.sleep(self._silence_s / CHECKS)
            if self._has_beaten():
                silent, is_armed = 0, True
            elif is_armed:
                silent += 1
        self._on_silence()

    def _has_beaten(self) -> bool:
        """Return whether there were beats since the last check."""
        try:
            return bool(os.read(self._ours, PIPE_BYTES))
        except BlockingIOError:
            return False


def leave_with(parent: int) -> Callable[[], None]:
    """Return a function that makes a child exit with its parent, for the child to call before exec."""

    def before_exec() -> None:
        # The signal may arrive before exec, when the inherited handler would ignore it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent has already exited
            os._exit(1)

    return before_exec
