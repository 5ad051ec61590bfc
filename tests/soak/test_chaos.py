"""The chaos of tests/acceptance/test_chaos.py, for longer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.simulation import chaos

SECONDS = float(os.environ.get("CHAOS_SECONDS", "300"))
SEED = int(os.environ.get("CHAOS_SEED", "0")) or random.randrange(1, 1_000_000)


@pytest.mark.timeout(SECONDS + 240)
def test_after_long_chaos_each_load_has_one_outcome(tmp_path: Path) -> None:
    chaos.run(tmp_path, SECONDS, SEED)
