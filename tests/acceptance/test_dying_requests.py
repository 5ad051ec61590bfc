"""Requests amid chaos: each ends by its contract, and nothing is left behind."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.simulation import requests

N_REQUESTS = int(os.environ.get("REQUESTS", "30"))
SEED = int(os.environ.get("REQUESTS_SEED", "0")) or random.randrange(1, 1_000_000)


@pytest.mark.timeout(N_REQUESTS + 300)
def test_each_request_ends_by_its_contract_while_processes_die(tmp_path: Path) -> None:
    requests.run(tmp_path, N_REQUESTS, SEED)
