"""Drops a runner's privileges before it opens a model's file, which is untrusted input."""

from __future__ import annotations

import os
import resource
import signal
from itertools import pairwise

from shared import libc

OPEN_FILES = 4096  # shards, libraries, and what a driver opens for each of its GPUs


def confine(*kept: int) -> None:
    """Restrict this process irrevocably.

    Closes all descriptors except stdin, stdout, stderr and `kept`; forbids new privileges, such as those of a setuid
    program, and core dumps, which would contain a model's weights.  Requests SIGKILL at the parent's death, which also
    reaches a stopped process that cannot read the end of its channel.
    """
    for below, above in pairwise([2, *sorted(kept), os.sysconf("SC_OPEN_MAX")]):
        os.closerange(below + 1, above)
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
