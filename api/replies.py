"""The replies that this process holds open while their loads are under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import TooManyWaiting


class OpenReplies:
    """Limits how many replies are open at once: each costs a connection.

    A request over the limit is refused before anything is accepted.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one place.  Raises TooManyWaiting."""
        if self.count >= self.limit:
            raise TooManyWaiting(
                f"{self.limit} requests wait here for loads, and no more may. Send 'Prefer: respond-async' and poll, "
                "or try again shortly."
            )
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
