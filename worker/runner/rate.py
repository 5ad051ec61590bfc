"""The rate of a load, or of the tokens of an instance, over the last seconds."""

from __future__ import annotations

from collections import deque

WINDOW_S = 3.0


class Rate:
    """A moving average of a count per second over WINDOW_S.  `now` is monotonic, in seconds."""

    def __init__(self, now: float) -> None:
        self._seen: deque[tuple[float, int]] = deque([(now, 0)])

    def add(self, now: float, count: int) -> None:
        self._seen.append((now, count))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()

    def per_second(self) -> float | None:
        """Return the rate; None if nothing was counted."""
        (began, least), (ended, most) = self._seen[0], self._seen[-1]
        return (most - least) / (ended - began) if most > least and ended > began else None
