"""How many replies this process may hold open at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import TooManyWaiting


class Waiting:
    """Each reply that waits for a load costs a connection; one too many is refused before anything is accepted."""

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
