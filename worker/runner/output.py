"""The last lines that a runner wrote to its stdout and stderr."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator

MOST_BYTES = 256 << 10


class Output:
    """Keeps the last MOST_BYTES of lines and drops the oldest.  Each new line sets `grown`."""

    def __init__(self) -> None:
        self.grown = asyncio.Event()
        self._lines: deque[str] = deque()
        self._bytes = 0

    def append(self, line: str) -> None:
        self._lines.append(line)
        self._bytes += _size(line)
        while self._bytes > MOST_BYTES and len(self._lines) > 1:
            self._bytes -= _size(self._lines.popleft())
        self.grown.set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)


def _size(line: str) -> int:
    return (len(line) if line.isascii() else len(line.encode())) + 1
