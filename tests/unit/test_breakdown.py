"""The memory breakdown is read from the engine only in the version whose struct layout was checked."""

from __future__ import annotations

import platform
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from shared.schema.memory import Usage
from worker.engine.breakdown import CHECKED_VERSION, HOST, SYMBOL, breakdown

NOTHING = Usage(id=HOST, weights_bytes=0, context_bytes=0, compute_bytes=0)


class Engine:
    """A libllama that returns an empty std::map."""

    def __init__(self) -> None:
        self.calls = 0

        def ask(result: int, context: Any) -> None:
            self.calls += 1

        setattr(self, SYMBOL, ask)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return Engine()


def test_the_checked_version_is_queried(engine: Engine) -> None:
    assert breakdown(engine, CHECKED_VERSION, None, {}) == [NOTHING]
    assert engine.calls == 1


@pytest.mark.parametrize("version", ["0.3.35", "0.3.37", "0.3.360", "0.3.3", ""])
def test_another_version_is_not_queried(engine: Engine, version: str) -> None:
    assert breakdown(engine, version, None, {}) is None
    assert engine.calls == 0


def test_another_processor_is_not_queried(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert breakdown(engine, CHECKED_VERSION, None, {}) is None
    assert engine.calls == 0


def test_an_engine_without_the_symbol_is_not_queried(engine: Engine) -> None:
    assert breakdown(SimpleNamespace(), CHECKED_VERSION, None, {}) is None


def test_the_installed_version_is_the_checked_version() -> None:
    """After an upgrade, check the layout as the module's docstring describes, then update the version."""
    assert metadata.version("llama-cpp-python") == CHECKED_VERSION
