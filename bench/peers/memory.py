"""How much memory a subject's processes take, at its peak.

By the proportional set size of every mapping (`Pss` of /proc/PID/smaps): what processes share is counted once in all,
however many forks share it, so that the sum over a subject's processes is what it takes of the machine.  The model's
file, where it is mapped, is page cache, which the kernel takes back when it needs it: it is counted apart.

Reading smaps stops the process for milliseconds, so loads whose memory is watched are not those that are timed.
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
    """Bytes: of the processes' own, of the model's file mapped by them, and of their own before the load."""

    own_bytes: int = 0
    mapped_bytes: int = 0
    before_bytes: int = 0


@contextmanager
def watched(roots: Callable[[], list[int]], files: list[Path]) -> Iterator[Peak]:
    """The peaks, complete at the end of the block; `roots` are asked again before each look."""
    names = {str(file.resolve()) for file in files}
    before, _ = taken(roots(), names)
    peak = Peak(own_bytes=before, before_bytes=before)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_S):
            own, mapped = taken(roots(), names)
            peak.own_bytes, peak.mapped_bytes = max(peak.own_bytes, own), max(peak.mapped_bytes, mapped)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield peak
    finally:
        ended.set()
        looking.join()


def taken(roots: list[int], names: set[str]) -> tuple[int, int]:
    """The bytes of these processes and all their descendants: their own, and of the files named."""
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
            continue  # it ended meanwhile
        more = taken(below, names)
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
