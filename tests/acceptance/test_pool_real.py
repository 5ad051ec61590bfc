"""The random sequences of tests/soak/test_pool_real.py, a few of them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.simulation import realpool

SEQUENCES = int(os.environ.get("POOL_SEQUENCES", "2"))
SEED = int(os.environ.get("POOL_SEED", "0")) or random.randrange(1, 1_000_000)


@pytest.mark.timeout(60 + 30 * SEQUENCES)
def test_random_sequences_of_real_loads_match_the_host(tmp_path: Path) -> None:
    realpool.run(tmp_path, SEQUENCES, SEED)
