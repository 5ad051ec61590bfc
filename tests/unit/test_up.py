"""The commands of the processes that `loadstone up` starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cli import up
from shared.settings import Settings

SETTINGS = Settings(api_tokens="hush", api_tokens_file=Path("/run/secrets/hush"))


@pytest.fixture(autouse=True)
def variables_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADSTONE_API_TOKENS", "hush")


def test_worker_gets_no_tokens() -> None:
    """It runs the engine, which reads files of strangers."""
    command = up.worker_command(SETTINGS, 1.0)
    assert "hush" not in f"{command.argv} {command.environ}"


def test_api_gets_the_tokens() -> None:
    with socket.socket() as listening:
        environ = up.api_command(SETTINGS, listening, 0.0).environ
    assert environ["LOADSTONE_API_TOKENS"] == "hush"
    assert environ["LOADSTONE_API_TOKENS_FILE"] == "/run/secrets/hush"
