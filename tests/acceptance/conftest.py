"""Fixtures: a service with one tiny model, for the modules that need only that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import TINY, Service, up


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Start one service for the module, with the environment in the module's VARIABLES."""
    home = tmp_path_factory.mktemp("service")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with up(home, **getattr(request.module, "VARIABLES", {})) as service:
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the module's service; unload everything after the test."""
    yield running
    running.unload_all()
