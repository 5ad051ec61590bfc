"""Splits long lists of keys into pages that one script may read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

READ_N = 500  # records or workers per script call: 2 ms, during which Redis serves nothing else


def pages(words: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield `words` in order, READ_N at a time."""
    return (words[start : start + READ_N] for start in range(0, len(words), READ_N))
