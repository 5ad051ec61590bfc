"""Drops a runner's privileges before it opens a model's file, which is untrusted input.

What the kernel allows shrinks in steps: `confine` at birth, `restrict` before there are threads, `ModelFiles` with the
first message that names a model, and `seal` once the model is loaded.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from shared import libc
from worker.sandbox import capabilities, landlock, seccomp
from worker.sandbox.landlock import READ, Ruleset

OPEN_FILES = 4096  # shards, libraries, and what a driver opens for each of its GPUs
CODE = Path(__file__).parents[1]  # the package `worker`; `shared` is beside it
# What an engine and its libraries read: programs, but no data of anybody.
SYSTEM = (
    *("/usr", "/lib", "/lib64", "/proc", "/sys", "/etc/ld.so.cache", "/etc/localtime"),
    *(sys.prefix, sys.base_prefix, CODE, CODE.with_name("shared")),
)

DRIVERS: tuple[tuple[str | Path, int], ...] = (
    *((path, READ) for path in ("/opt", "/etc/nvidia", "/etc/OpenCL", "/etc/vulkan")),
    ("/dev", READ | landlock.WRITE_FILE | landlock.IOCTL_DEV),
    ("/dev/shm", landlock.WRITE),  # noqa: S108  CUDA shares events between processes there
)


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


def restrict(*, on_gpu: bool) -> None:
    """Keep this process from other processes, programs and the network, and from changing files.

    Call it before the process has threads, and after it forked its last process.  `on_gpu`: its driver may still use
    devices, and write into its cache of compiled code.
    """
    capabilities.drop(keep=capabilities.READ_SEARCH)  # as its worker, which has read the file's header
    landlock.restrict_thread([("/", READ), *(_of_drivers() if on_gpu else ())])
    seccomp.outside(on_gpu=on_gpu)
    if not on_gpu:
        seccomp.read_only()  # also where there is no Landlock


class ModelFiles:
    """The files that a runner may open once it knows its model: those of the model, of the system and of drivers.

    Landlock restricts a thread.  So each thread that exists by then restricts itself; those that start later inherit
    it.  Threads that a driver has started before stay as `restrict` left them.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._ruleset = Ruleset([*((path, READ) for path in SYSTEM), *(_of_drivers() if on_gpu else ())])
        self._is_chosen = False

    def choose(self, shards: Iterable[str]) -> None:
        """Restrict the calling thread to the system and this model.  The first call decides; others do nothing."""
        if not self._is_chosen:
            self._is_chosen = True
            for shard in shards:
                self._ruleset.allow(shard, READ)
            self._ruleset.restrict_thread()

    def restrict_last_thread(self) -> None:
        """Restrict the calling thread to what was chosen; no other thread can be restricted afterwards."""
        self._ruleset.restrict_thread()
        self._ruleset.close()


def seal() -> None:
    """Keep all threads of this process from opening files, and from changing them by their paths."""
    seccomp.no_files()


def _of_drivers() -> list[tuple[str | Path, int]]:
    """Return the rules for what drivers of GPUs read and write beyond the system.  Creates CUDA's cache of compiled
    code, which the driver could not."""
    libraries = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    cache = Path(os.environ.get("CUDA_CACHE_PATH") or Path.home() / ".nv/ComputeCache")
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    return [*DRIVERS, *((path, READ) for path in libraries), (cache, landlock.TREE)]
