"""The sequences of tests/integration/test_pool_sequences.py, 5,000 of them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from tests.simulation.poolmodel import Play, play, plays

seen: Counter[str] = Counter()


@settings(max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plays)
def every_one(found: Play) -> None:
    seen.update(play(found))


@pytest.mark.timeout(1800)
def test_5000_sequences_never_overbook_never_evict_in_vain_and_never_refuse_what_fits() -> None:
    seen.clear()
    every_one()
    for what in ("loaded", "several GPUs", "evictions", "refused", "leaks", "robbed", "filled"):
        assert seen[what] > 0, f"it was never {what}: the sequences show nothing of it"
