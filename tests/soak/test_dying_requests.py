"""The requests of tests/acceptance/test_dying_requests.py, more of them, and with 20 seeds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.simulation import requests

N_REQUESTS = int(os.environ.get("REQUESTS", "1000"))


@pytest.mark.timeout(N_REQUESTS + 300)
@pytest.mark.parametrize("seed", range(1, 21))
def test_each_request_ends_by_its_contract_while_processes_die(tmp_path: Path, seed: int) -> None:
    requests.run(tmp_path, N_REQUESTS, seed)
