"""How much memory a runner may take on this host: the machine's, its cgroup's and its address space's."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# Files of a cgroup: its limit, what it uses, and what of that the kernel would give back (a page cache), by version:
# Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class Memory(NamedTuple):
    total_bytes: int
    free_bytes: int  # what may be taken, a page cache included


def host_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> Memory:
    """The least of what the machine, every cgroup we are in and our limit on address space allow.

    Raises OSError where /proc is not there.
    """
    found = dict(_numbers((proc / "meminfo").read_text().replace(":", " ")))
    machine = Memory(found["MemTotal"] << 10, found["MemAvailable"] << 10)
    bounds = [machine, *_cgroups(proc, cgroup, machine.total_bytes)]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        bounds.append(Memory(space, space))  # a runner begins with next to nothing of it
    return Memory(min(b.total_bytes for b in bounds), max(0, min(b.free_bytes for b in bounds)))


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started, in any cgroup (proc_vmstat(5));
    0 where it does not say."""
    try:
        text = (PROC / "vmstat").read_text()
    except OSError:
        return 0
    found = re.search(r"^oom_kill (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _numbers(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, value, *_ = [*line.split(), "", ""]
        if value.isdigit():
            yield name, int(value)


def _cgroups(proc: Path, root: Path, total_bytes: int) -> Iterator[Memory]:
    """The bounds of our memory cgroup and of those it is in, where they are below what the machine has.  In a container
    the root is often the cgroup itself."""
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
            if (bound := _bound(folder, files, total_bytes)) is not None:
                yield bound


def _bound(folder: Path, files: tuple[str, str, str], below: int) -> Memory | None:
    try:
        limit = (folder / files[0]).read_text().strip()
        if not limit.isdigit() or int(limit) >= below:  # "max", or v1's 2**63 less a page; the rest costs more to read
            return None
        used = int((folder / files[1]).read_text())
        cache = dict(_numbers((folder / "memory.stat").read_text())).get(files[2], 0)
    except OSError:  # no such cgroup here, or one without this controller
        return None
    return Memory(int(limit), int(limit) - used + cache)
