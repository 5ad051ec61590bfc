"""A few of the sequences of tests/soak/test_pool_real.py."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.simulation import realpool

SEQUENCES = int(os.environ.get("POOL_SEQUENCES", "2"))
SEED = int(os.environ.get("POOL_SEED", "0")) or random.randrange(1, 1_000_000)


@pytest.mark.timeout(60 + 30 * SEQUENCES)
def test_real_loads_go_where_the_host_has_room_and_leave_nothing_behind(tmp_path: Path) -> None:
    realpool.run(tmp_path, SEQUENCES, SEED)
