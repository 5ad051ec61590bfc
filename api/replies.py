"""Limits on what this process holds for its clients at the same time: open replies, and bodies."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shared.errors import TooManyWaiting
from shared.places import has_place

BODY_BYTES = 256 << 20  # of all bodies that are being read
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
        self.taken: Counter[str] = Counter()  # by client

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Occupy one place for a client.  Raises TooManyWaiting."""
        if not has_place(client, self.taken, self.limit):
            raise TooManyWaiting(
                f"Too many open replies (limit: {self.limit}). Try again shortly; for a load, send 'Prefer: "
                "respond-async' and poll the job."
            )
        self.taken[client] += 1
        try:
            yield
        finally:
            self.taken[client] -= 1


class Bodies:
    """Limits the bytes of the bodies that are being read, which clients may send as slowly as they like."""

    def __init__(self, most_bytes: int = BODY_BYTES) -> None:
        self.most_bytes = most_bytes
        self.taken: Counter[str] = Counter()  # bytes, by client

    @contextmanager
    def reading(self, client: str) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves bytes for a body.  It raises TooManyWaiting if there is no room."""
        reserved = 0

        def reserve(n_bytes: int) -> None:
            nonlocal reserved
            if not has_place(client, self.taken, self.most_bytes, n_bytes):
                raise TooManyWaiting("Clients are sending too many large bodies. Try again shortly.")
            reserved += n_bytes
            self.taken[client] += n_bytes

        try:
            yield reserve
        finally:
            self.taken[client] -= reserved
