"""The rate of a load over the last seconds."""

from __future__ import annotations

from collections import deque

WINDOW_S = 3.0


class Rate:
    """A moving average of bytes per second over WINDOW_S.  `now` is monotonic, in seconds."""

    def __init__(self, now: float) -> None:
        self._seen: deque[tuple[float, int]] = deque([(now, 0)])

    def add(self, now: float, loaded_bytes: int) -> None:
        self._seen.append((now, loaded_bytes))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()

    def bytes_per_second(self) -> float | None:
        """Return the rate; None before anything was loaded."""
        (began, least), (ended, most) = self._seen[0], self._seen[-1]
        return (most - least) / (ended - began) if most > least and ended > began else None
