"""Helpers for tests that act on the process of a runner from outside."""

from __future__ import annotations

import asyncio
import os
import signal

from tests.support.service import all_stopped, stat_fields
from worker.runner.process import Runner

DEADLINE_S = 60.0


async def freeze(runner: Runner) -> None:
    """Stop all threads of a runner, and wait until each has stopped: a running thread could still answer."""
    os.kill(runner.pid, signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        while not all_stopped(runner.pid):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.002)


async def slept(runner: Runner) -> None:
    """Wait until a runner uses no processor time: a warm one may still prewarm."""
    times: list[tuple[str, ...]] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(times) < 10:
            state, *fields = stat_fields(runner.pid) or [""]
            now = tuple(fields[10:12])
            times = [*times, now] if state == "S" and times[-1:] in ([], [now]) else []
            await asyncio.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Return whether a process is gone and reaped: a zombie still has its pid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def has_variable(pid: int, variable: str) -> bool:
    """Return whether a process has NAME=VALUE in its environment, even if set after its start.

    /proc/PID/environ shows only the initial environment; the argument of putenv is in the memory of the process.
    """
    return holds(pid, variable.encode() + b"\0")


def holds(pid: int, data: bytes) -> bool:
    """Return whether a process has these bytes in its memory, outside of files."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        for line in maps:
            place, rights, _, _, inode, *_ = line.split()
            if rights.startswith("rw") and inode == "0":
                start, end = (int(bound, 16) for bound in place.split("-"))
                memory.seek(start)
                if data in memory.read(end - start):
                    return True
    return False
