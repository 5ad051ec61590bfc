"""200 random sequences like those of tests/soak/test_pool_sequences.py, with real runners."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.simulation import realpool

SEQUENCES = int(os.environ.get("POOL_SEQUENCES", "200"))
SEED = int(os.environ.get("POOL_SEED", "0")) or random.randrange(1, 1_000_000)


@pytest.mark.timeout(60 + 30 * SEQUENCES)
def test_200_sequences_of_real_loads_match_the_host(tmp_path: Path) -> None:
    seen = realpool.run(tmp_path, SEQUENCES, SEED)
    for what in ("loaded", "several GPUs", "evictions", "refused", "filled", "loaded at once", "refused at once"):
        assert seen[what] > 0, f"no sequence had {what!r}"
