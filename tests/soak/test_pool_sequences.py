"""5,000 of the random sequences of tests/integration/test_pool_sequences.py."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings

from tests.simulation.poolmodel import Play, play, plays

seen: Counter[str] = Counter()


@settings(max_examples=5000)
@given(plays)
def play_each(sequence: Play) -> None:
    seen.update(play(sequence))


@pytest.mark.timeout(1800)
def test_5000_sequences_never_overcommit_or_evict_in_vain() -> None:
    seen.clear()
    play_each()
    for what in ("loaded", "several GPUs", "evictions", "refused", "leaks", "robbed", "filled"):
        assert seen[what] > 0, f"no sequence had {what!r}"
