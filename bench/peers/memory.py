"""The peak memory of a subject's processes.

It is the proportional set size of every mapping (`Pss` of /proc/PID/smaps): memory shared by several forks counts once,
so the sum over a subject's processes is its usage of the machine.  The mapped file of a model is page cache, which the
kernel can reclaim, and is counted separately.

Reading smaps stops a process for milliseconds, so the loads with measured memory are not the timed ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from bench.processes import children

EVERY_S = 0.02


class Peak(Struct):
    """Bytes of the processes' own memory, of the model's mapped file, and of the own memory before the load."""

    own_bytes: int = 0
    mapped_bytes: int = 0
    before_bytes: int = 0


@contextmanager
def watched(roots: Callable[[], list[int]], files: list[Path]) -> Iterator[Peak]:
    """Sample the memory during the block; yield the peaks, complete at its end.  `roots` is called for each sample."""
    names = {str(file.resolve()) for file in files}
    before, _ = usage(roots(), names)
    peak = Peak(own_bytes=before, before_bytes=before)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_S):
            own, mapped = usage(roots(), names)
            peak.own_bytes, peak.mapped_bytes = max(peak.own_bytes, own), max(peak.mapped_bytes, mapped)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield peak
    finally:
        ended.set()
        looking.join()


def usage(roots: list[int], names: set[str]) -> tuple[int, int]:
    """Return the bytes of these processes and their descendants: own memory, and mapped files with these names."""
    own = mapped = 0
    for pid in roots:
        try:
            for is_named, n_bytes in _mappings(pid, names):
                if is_named:
                    mapped += n_bytes
                else:
                    own += n_bytes
            below = children(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended
        more = usage(below, names)
        own, mapped = own + more[0], mapped + more[1]
    return own, mapped


def _mappings(pid: int, names: set[str]) -> Iterator[tuple[bool, int]]:
    is_named = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name == "Pss:":
            yield is_named, int(rest.split()[0]) * 1024
        elif not name.endswith(":"):  # the head of a mapping: addresses, permissions, offset, device, inode, path
            fields = line.split(maxsplit=5)
            is_named = len(fields) == 6 and fields[5] in names
