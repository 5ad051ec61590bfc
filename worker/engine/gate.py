"""Decides which requests a runner begins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shared.channel.messages import Refused


class Refusal(Exception):
    """A request is refused: carries the message."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.refused = refused


class Gate:
    """Counts the requests of a runner, and begins none while it is closed.  Thread-safe.

    So a request and the decision to close the runner come one after the other: either the request was begun before and
    counts, or it is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n = 0
        self._used_at = 0.0
        self._is_open = True
        self._when_empty: Callable[[], None] | None = None

    @property
    def n_requests(self) -> int:
        """The number of requests that have begun and not ended."""
        return self._n

    @property
    def used_at(self) -> float:
        """The time at which the last request ended, in seconds since the epoch; now, while there is one; 0.0: never."""
        with self._lock:
            return time.time() if self._n else self._used_at

    def enter(self) -> bool:
        """Begin a request.  Returns False, without beginning it, if the gate is closed."""
        with self._lock:
            self._n += self._is_open
            return self._is_open

    def leave(self) -> None:
        """End a request."""
        with self._lock:
            self._n -= 1
            self._used_at = time.time()
            when_empty = None
            if not self._n:
                when_empty, self._when_empty = self._when_empty, None
        if when_empty is not None:
            when_empty()

    def close_if_unused(self, since: float) -> bool:
        """Close the gate if there is no request and was none since that time.  Returns whether it has closed."""
        with self._lock:
            is_used = self._n > 0 or self._used_at > since
            self._is_open = self._is_open and is_used
            return not is_used

    def close(self, when_empty: Callable[[], None]) -> None:
        """Close the gate.  Calls `when_empty` once the last request has ended, in any thread."""
        with self._lock:
            self._is_open = False
            if self._n:
                self._when_empty = when_empty
                return
        when_empty()

    def open(self) -> None:
        """Open the gate again."""
        with self._lock:
            self._is_open, self._when_empty = True, None
