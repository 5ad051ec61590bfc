"""The memory that a runner may use on this host: limits of the machine, of cgroups and of the address space."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# Files of a cgroup by version: its limit, its usage, and the reclaimable part of it (page cache).  Source:
# Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
ACTIVE = {"inactive_file": "active_file", "total_inactive_file": "total_active_file"}  # read more than once


class Memory(NamedTuple):
    """A limit on memory, and how much of it is free."""

    total_bytes: int
    free_bytes: int  # including reclaimable page cache


def host_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> Memory:
    """Return the strictest limit among the machine, all enclosing cgroups and this process's RLIMIT_AS.

    Raises OSError if /proc is not mounted.
    """
    meminfo = dict(_numbers((proc / "meminfo").read_text().replace(":", " ")))
    machine = Memory(meminfo["MemTotal"] << 10, meminfo["MemAvailable"] << 10)
    bounds = [machine, *_cgroups(proc, cgroup, machine.total_bytes)]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        bounds.append(Memory(space, space))  # a new runner uses almost none of it
    return Memory(min(b.total_bytes for b in bounds), max(0, min(b.free_bytes for b in bounds)))


def lockable_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Return how much of the page cache can be locked for a moment: like the free memory of `host_memory`, with all
    page cache of the cgroups, since what is locked may be in it already, and without what is locked now.

    The machine counts locked page cache as available.  RLIMIT_MEMLOCK has no part in it: drivers of GPUs do not count
    against it.  Raises OSError if /proc is not mounted.
    """
    meminfo = dict(_numbers((proc / "meminfo").read_text().replace(":", " ")))
    machine = Memory(meminfo["MemTotal"] << 10, meminfo["MemAvailable"] << 10)
    groups = _cgroups(proc, cgroup, machine.total_bytes, with_active=True)
    return max(0, min(bound.free_bytes for bound in (machine, *groups)) - locked_bytes(proc))


def oom_kills() -> int:
    """Return the number of OOM kills since boot, in any cgroup (proc_vmstat(5)); 0 if the kernel does not report it."""
    try:
        text = (PROC / "vmstat").read_text()
    except OSError:
        return 0
    match = re.search(r"^oom_kill (\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0


def locked_bytes(proc: Path) -> int:
    """Return the bytes that are locked for devices (pin_user_pages); 0 before Linux 5.7, which does not count them."""
    try:
        counters = dict(_numbers((proc / "vmstat").read_text()))
    except OSError:
        return 0
    pages = counters.get("nr_foll_pin_acquired", 0) - counters.get("nr_foll_pin_released", 0)
    return max(0, pages) * resource.getpagesize()


def _numbers(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, value, *_ = [*line.split(), "", ""]
        if value.isdigit():
            yield name, int(value)


def _cgroups(proc: Path, root: Path, total_bytes: int, *, with_active: bool = False) -> Iterator[Memory]:
    """Yield the limits of this process's memory cgroup and its ancestors, if they are below the machine's total.
    `with_active`: count page cache that was read more than once as free, too.

    In a container the root of the hierarchy is often the cgroup itself.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except FileNotFoundError:  # a kernel without cgroups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, files = (root / "memory", V1) if controllers else (root, V2)
        place = base / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(base):
                break
            if (bound := _bound(folder, files, total_bytes, with_active)) is not None:
                yield bound


def _bound(folder: Path, files: tuple[str, str, str], below: int, with_active: bool) -> Memory | None:
    try:
        limit = (folder / files[0]).read_text().strip()
        if not limit.isdigit() or int(limit) >= below:  # "max", or v1's 2**63 minus a page
            return None
        used = int((folder / files[1]).read_text())
        stat = dict(_numbers((folder / "memory.stat").read_text()))
        cache = stat.get(files[2], 0) + (stat.get(ACTIVE[files[2]], 0) if with_active else 0)
    except OSError:  # not visible from here, or without this controller
        return None
    return Memory(int(limit), int(limit) - used + cache)
