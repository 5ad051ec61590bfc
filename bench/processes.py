"""The processes of a running service: their roles, their CPU time, and stopping one for a while."""

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
    """Return the pids of `loadstone up` by role; a second API process is "api 2".  The newest runner is "runner, warm";
    a runner before it is "runner, loaded"."""
    pids = {"supervisor": up}
    for pid in children(up):
        words = _words(pid)
        role = "api" if "api" in words else "worker" if "worker" in words else "redis"
        n = sum(name.startswith(role) for name in pids) + 1
        pids[role if n == 1 else f"{role} {n}"] = pid
    runners: list[int] = []
    for pid in children(pids["worker"]):
        words = _words(pid)
        if "worker.catalog.scanner" in words:
            pids["scanner"] = pid
        elif any("multiprocessing.forkserver" in word for word in words):
            pids["runners' server"] = pid
            runners = children(pid)
    for name, pid in zip(("runner, warm", "runner, loaded"), reversed(runners), strict=False):
        pids[name] = pid
    return pids


def children(pid: int) -> list[int]:
    """Return the child processes, oldest first."""
    pids = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return sorted(pids, key=lambda child: (_started(child), child))


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, from its clock (its id is computed as in clock_getcpuclockid(3)).

    The clock counts nanoseconds, /proc/PID/stat only hundredths of a second.
    """
    return time.clock_gettime(~pid << 3 | 2)


def redis_url(api: int) -> str:
    """Return the URL of Redis from the environment of an API process."""
    for line in Path(f"/proc/{api}/environ").read_text().split("\0"):
        name, _, value = line.partition("=")
        if name == variable("redis_url"):
            return value
    raise LookupError("the environment of the API has no URL of Redis")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process with SIGSTOP for the block.  Raises TimeoutError."""
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + STOP_S
        while any(_stat(task)[0] != "T" for task in Path(f"/proc/{pid}/task").iterdir()):
            if time.monotonic() > deadline:  # a running thread could still answer
                raise TimeoutError(f"process {pid} does not stop")
            time.sleep(0.01)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def _started(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot."""
    return int(_stat(Path(f"/proc/{pid}"))[19])


def _stat(entry: Path) -> list[str]:
    """Return the fields of `stat` after the name: state, parent, ..."""
    return (entry / "stat").read_text().rpartition(")")[2].split()
