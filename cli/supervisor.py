"""Child processes: started, watched, started again, and stopped in order.

A child never outlives the supervisor: the kernel sends it SIGTERM when the thread that started it dies, however that
came (PR_SET_PDEATHSIG in prctl(2)).  So a supervisor lives in the main thread, where asyncio.run puts it.

A child that lives but does nothing any more is replaced where it has a watchdog: it gets the end of a pipe and writes
a byte at each of its beats (`heartbeat`).  One that wrote and then fell silent is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Self

from msgspec import Struct

from shared import libc
from shared.backoff import Backoff
from shared.race import first, racing
from shared.telemetry import log

CONFIGURATION_ERROR = 2  # exit status of a child that refuses its settings: starting it again changes nothing
FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 5.0
POLL_S = 0.05
START_DEADLINE_S = 60.0
KILL_S = 5.0  # what survives SIGKILL this long is stuck in the kernel, and waiting does not help
LOOKS = 10  # of a watchdog, all without a beat, before a child is killed
PIPE_BYTES = 65536  # what a pipe holds

_log = log.get(__name__)


class Command(Struct, frozen=True, kw_only=True):
    """How to start a child.  Its standard output goes to our standard error; it reads nothing.

    `grace_s` is the time it gets between SIGTERM and SIGKILL.  With `watchdog_s` it is given `--beat-fd N` besides, and
    replaced once it has been silent for that long; one that has not begun to beat may take its time.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()
    grace_s: float = 10.0
    watchdog_s: float | None = None


class StartFailed(Exception):
    """The children cannot do what they were started for; the sentence says why, `status` is ours to exit with."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


class Stopped(Exception):
    """A signal asked the supervisor to stop."""


class Supervisor:
    """Runs commands until a signal ends it.  On leaving, every child is stopped and reaped, the last started first.

    The first SIGTERM or SIGINT ends what is awaited with Stopped; the next one is SIGKILL to all children.  A child
    that exits is started again after a pause that doubles from FIRST_BACKOFF_S to LAST_BACKOFF_S.
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
        """Start children that are stopped together, before everything that was started earlier."""
        self._stages.append([_Keeper(command, self._fail) for command in commands])

    async def until(self, missing: Callable[[], Awaitable[str | None]], what: str) -> None:
        """Return once `missing` returns None; every child counts as ready from then on.

        Raises StartFailed if that takes longer than the start deadline, with what was missing last, or if a child exits
        with status CONFIGURATION_ERROR; and Stopped.
        """
        last = "it was not asked"

        async def poll() -> None:
            nonlocal last
            while found := await missing():
                last = found
                await asyncio.sleep(POLL_S)

        async with racing(poll(), asyncio.shield(self._end)) as (polling, ending):
            await first((polling, ending), self._start_deadline_s)
            if self._end.done():
                self._end.result()
            if not polling.done():
                deaths = "".join(f"; {keeper.deaths}" for keeper in self._keepers() if keeper.deaths)
                raise StartFailed(f"{what} was not ready within {self._start_deadline_s:g} s: {last}{deaths}.")
            polling.result()
        for keeper in self._keepers():
            keeper.is_ready = True

    async def forever(self) -> None:
        """Never returns: raises Stopped, or StartFailed for a child that was never ready and refuses its settings."""
        await asyncio.shield(self._end)

    def _keepers(self) -> list[_Keeper]:
        return [keeper for stage in self._stages for keeper in stage]

    def _fail(self, reason: BaseException) -> None:
        if not self._end.done():
            self._end.set_exception(reason)
            self._end.exception()  # a failure that comes while stopping has no one left to tell

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
        self.deaths = ""
        self._command = command
        self._fail = fail
        self._process: _Process | None = None
        self._is_killed = False
        self._task = asyncio.create_task(self._keep())
        self._task.add_done_callback(self._kept)

    def release(self) -> None:
        """Start the child no more."""
        self._task.cancel()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL after the grace.  Returns when the child is reaped."""
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
            self.deaths = f"the {self._command.name} process {how}" + (f", {n_exits} times" if n_exits > 1 else "")
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
    """One run of a command, in a session of its own.  Raises OSError when it cannot be started."""

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
                preexec_fn=_leave_with(os.getpid()),
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
        """How it ended, after "the process"."""
        if self.status < 0:
            return f"was ended by signal {-self.status} ({signal.strsignal(-self.status)})"
        return f"exited with status {self.status}"

    def signal(self, signum: signal.Signals) -> None:
        """Signal the process, which ends its own children as it sees fit; SIGKILL goes to its whole process group.

        Until it is reaped, its number cannot be another's.
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
            f"the {self._command.name} process gives no sign of life: it is killed",
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
        self.signal(signal.SIGKILL)  # what it left behind in its group: still ours, for it is not reaped yet
        self.status = self._popen.wait()
        self.exited.set()


class _Watchdog:
    """Reads the beats of one child, and calls `bite` once there was a first one and then none for `silence_s`.

    It counts looks, not time: where all of us were paused together, there are none in between.
    """

    def __init__(self, silence_s: float, bite: Callable[[], None]) -> None:
        self._silence_s = silence_s
        self._bite = bite
        self._task: asyncio.Task[None] | None = None
        self._ours, self.theirs = os.pipe()
        os.set_blocking(self._ours, False)

    def start(self) -> None:
        """The child has its end now."""
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
        while silent < LOOKS:
            await asyncio.sleep(self._silence_s / LOOKS)
            if self._heard():
                silent, is_armed = 0, True
            elif is_armed:
                silent += 1
        self._bite()

    def _heard(self) -> bool:
        try:
            return bool(os.read(self._ours, PIPE_BYTES))
        except BlockingIOError:
            return False


def _leave_with(parent: int) -> Callable[[], None]:
    """What a child does before exec, so that it leaves when its parent does."""

    def before_exec() -> None:
        # The death signal may come before exec, where the handler we inherited would swallow it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we could ask
            os._exit(1)

    return before_exec
