"""The processes of a running service: which is which, what CPU time they used, and stopping one for a while."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.settings import variable

STOP_S = 5.0


def roles(up: int) -> dict[str, int]:
    """The processes of `loadstone up` by what they are; a second API process is "api 2".  Without a loaded model the
    last one is "runner, warm"; with one it comes before that, as "runner, loaded"."""
    found = {"supervisor": up}
    for pid in children(up):
        words = _words(pid)
        role = "api" if "api" in words else "worker" if "worker" in words else "redis"
        n = sum(name.startswith(role) for name in found) + 1
        found[role if n == 1 else f"{role} {n}"] = pid
    runners: list[int] = []
    for pid in children(found["worker"]):
        words = _words(pid)
        if "worker.catalog.scanner" in words:
            found["scanner"] = pid
        elif any("multiprocessing.forkserver" in word for word in words):
            found["runners' server"] = pid
            runners = children(pid)
    for name, pid in zip(("runner, warm", "runner, loaded"), reversed(runners), strict=False):
        found[name] = pid
    return found


def children(pid: int) -> list[int]:
    """Oldest first."""
    found = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return sorted(found, key=lambda child: (_started(child), child))


def cpu_s(pid: int) -> float:
    """All CPU time that a process has used.  By its clock, whose number clock_getcpuclockid(3) makes like this: in
    nanoseconds, where /proc/PID/stat has hundredths of a second."""
    return time.clock_gettime(~pid << 3 | 2)


def redis_url(api: int) -> str:
    """The Redis of an API process, as it was told."""
    for line in Path(f"/proc/{api}/environ").read_text().split("\0"):
        name, _, value = line.partition("=")
        if name == variable("redis_url"):
            return value
    raise LookupError("the API was given no Redis")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP for the block: whoever waits for this process waits until its end.  Raises TimeoutError."""
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + STOP_S
        while any(_stat(task)[0] != "T" for task in Path(f"/proc/{pid}/task").iterdir()):
            if time.monotonic() > deadline:  # a thread that runs could still answer
                raise TimeoutError(f"process {pid} does not stop")
            time.sleep(0.01)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def _started(pid: int) -> int:
    """In clock ticks since boot."""
    return int(_stat(Path(f"/proc/{pid}"))[19])


def _stat(entry: Path) -> list[str]:
    """The fields of `stat` after the name: state, parent, ..."""
    return (entry / "stat").read_text().rpartition(")")[2].split()
