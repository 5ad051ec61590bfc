"""Places that clients take: who may take one more, if there are not enough for all."""

from __future__ import annotations

from collections import Counter


def has_place(client: str, taken: Counter[str], most: int, n: int = 1) -> bool:
    """Return whether a client may take `n` more of the `most` places; `taken` has those of each client.

    What it has then may not exceed what was free before.  So half of the places that the others leave stay free,
    however many it wants, and no place is ever taken back.  A client without a name is the only one.
    """
    free = most - taken.total()
    return (taken[client] + n if client else n) <= free
