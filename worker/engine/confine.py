"""What a runner gives up before it touches a model's file, which a stranger may have made."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h
OPEN_FILES = 4096  # shards, libraries, and what a driver opens for each of its GPUs

_libc = ctypes.CDLL(None, use_errno=True)


def confine(channel: int) -> None:
    """Take from this process, for good: other descriptors than its standard ones and `channel`; new privileges, such
    as a setuid program would give; core dumps, which would hold a model's weights.  It dies with its parent, also
    where it is stopped and cannot read the end of its channel."""
    os.closerange(3, channel)
    os.closerange(channel + 1, os.sysconf("SC_OPEN_MAX"))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}): {os.strerror(errno)}")
