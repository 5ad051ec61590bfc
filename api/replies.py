"""A limit on the replies that this process holds open: for loads, and for requests to models."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import TooManyWaiting

RESERVED = 128  # descriptors for listening, Redis, channels to runners, and requests that do not wait


def most_replies(configured: int) -> int:
    """Return how many replies this process can hold open, at most as many as configured.

    Raises its limit of descriptors as far as it may: many systems start processes with 1024, which 1024 replies use up.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return configured if most == resource.RLIM_INFINITY else max(1, min(configured, most - RESERVED))


class OpenReplies:
    """Limits the number of replies that are open at the same time, since each occupies a connection.

    A request beyond the limit is refused before its load, or its request to a model, is accepted.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Occupy one place.  Raises TooManyWaiting."""
        if self.count >= self.limit:
            raise TooManyWaiting(
                f"Too many open replies (limit: {self.limit}). Try again shortly; for a load, send 'Prefer: "
                "respond-async' and poll the job."
            )
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
