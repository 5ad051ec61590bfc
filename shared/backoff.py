"""Exponential backoff between restarts."""

from __future__ import annotations


class Backoff:
    """Computes the pause before an exited process is restarted.

    The pause doubles from `first_s` up to `last_s` seconds.  After a run of more than `stable_s` seconds it starts at
    `first_s` again.
    """

    def __init__(self, first_s: float, last_s: float, stable_s: float) -> None:
        self._first_s, self._last_s, self._stable_s = first_s, last_s, stable_s
        self._next_s = first_s

    def after(self, ran_s: float) -> float:
        """Return the pause, in seconds, that follows a run of `ran_s` seconds."""
        pause_s = self._first_s if ran_s > self._stable_s else self._next_s
        self._next_s = min(2 * pause_s, self._last_s)
        return pause_s
