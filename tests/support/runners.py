"""What tests do to a runner's process from outside."""

from __future__ import annotations

import asyncio
import os
import signal

from tests.support.service import all_stopped
from worker.runner.process import Runner

DEADLINE_S = 10.0


async def freeze(runner: Runner) -> None:
    """Stop all of its threads.  One that the signal has not reached yet could still answer."""
    os.kill(runner.pid, signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        while not all_stopped(runner.pid):  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.002)


def is_gone(pid: int) -> bool:
    """Whether it is reaped: a zombie still has its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def has_variable(pid: int, variable: str) -> bool:
    """Whether a process has set this, NAME=VALUE, in its environment since its start: /proc/PID/environ shows only
    what it started with, its own memory holds what putenv was given."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        for line in maps:
            place, rights, _, _, inode, *_ = line.split()
            if rights.startswith("rw") and inode == "0":
                start, end = (int(bound, 16) for bound in place.split("-"))
                memory.seek(start)
                if variable.encode() + b"\0" in memory.read(end - start):
                    return True
    return False
