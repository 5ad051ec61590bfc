"""What a runner gives up before it touches a model's file, which a stranger may have made."""

from __future__ import annotations

import os
import resource
import signal

from shared import libc

OPEN_FILES = 4096  # shards, libraries, and what a driver opens for each of its GPUs


def confine(channel: int) -> None:
    """Take from this process, for good: other descriptors than its standard ones and `channel`; new privileges, such
    as a setuid program would give; core dumps, which would hold a model's weights.  It dies with its parent, also
    where it is stopped and cannot read the end of its channel."""
    os.closerange(3, channel)
    os.closerange(channel + 1, os.sysconf("SC_OPEN_MAX"))
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
