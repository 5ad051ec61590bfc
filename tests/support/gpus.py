"""A worker within a test, on a host with GPUs that are none (`tests.support.fakehosts`)."""

from __future__ import annotations

import importlib.util
import os
import socket
from functools import partial
from pathlib import Path

import pytest

import worker.memory.nvml
import worker.runner.warm
from tests.support.fakehosts import ROOT, VARIABLE, FakeHost


def main(directory: str, control: socket.socket, output: socket.socket, visible: str | None) -> None:
    """What a runner does; the server that forks it may be older than the host."""
    os.environ[VARIABLE] = directory
    # Only here: the engine may be in the runner's process only.
    from tests.support.fakehost.sitecustomize import give_gpus
    from worker.engine import child, llama

    give_gpus(llama)
    child.main(control, output, visible)


def install(monkeypatch: pytest.MonkeyPatch, directory: Path, *total_bytes: int) -> FakeHost:
    """Have the workers that are made from now on find a GPU of each size, `GPU-fake-0` and so on."""
    host = FakeHost.made(directory, *total_bytes)
    use_driver(monkeypatch, host)
    monkeypatch.setattr(worker.runner.warm, "run_child", partial(main, str(directory)))
    return host


def use_driver(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    """Have NVML in this process be that of the host."""
    monkeypatch.setenv(VARIABLE, str(host.directory))
    spec = importlib.util.spec_from_file_location("fake_pynvml", ROOT / "tests/support/fakehost/pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    monkeypatch.setattr(worker.memory.nvml, "pynvml", driver)
    for name in ("NVMLError", "NVMLError_NotSupported"):
        monkeypatch.setattr(worker.memory.nvml, name, getattr(driver, name))
