from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import published


@pytest.fixture(scope="session")
def npm() -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node is not installed")


@pytest.fixture(scope="session")
def node(npm: None) -> Path:
    return published.for_node()


@pytest.fixture(scope="session")
def agents(npm: None) -> Path:
    return published.agents()


@pytest.fixture(scope="session")
def python() -> Path:
    return published.for_python()
