"""A worker within a test, on a host with fake GPUs (`tests.support.fakehosts`)."""

from __future__ import annotations

import importlib.util
import os
import socket
from functools import partial
from pathlib import Path

import pytest
from msgspec import structs

import worker.memory.nvml
import worker.runner.warm
from tests.support.fakehosts import ROOT, VARIABLE, FakeHost


def main(
    directory: str, control: socket.socket, hand_over: socket.socket, output: socket.socket, visible: str | None
) -> None:
    """Run a runner on the host; the forkserver may have started before the host existed."""
    os.environ[VARIABLE] = directory
    # Imported here: only the process of a runner may import the engine.
    from tests.support.fakehost.sitecustomize import give_gpus
    from worker.engine import child, llama

    give_gpus(llama)
    child.ENGINE = structs.replace(child.ENGINE, backends=llama.backends())
    child.main(control, hand_over, output, visible)


def install(monkeypatch: pytest.MonkeyPatch, directory: Path, *total_bytes: int) -> FakeHost:
    """Give workers that are created from now on a GPU of each size: `GPU-fake-0` and so on."""
    host = FakeHost.made(directory, *total_bytes)
    use_driver(monkeypatch, host)
    monkeypatch.setattr(worker.runner.warm, "run_child", partial(main, str(directory)))
    return host


def use_driver(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    """Use the NVML of the fake host in this process."""
    monkeypatch.setenv(VARIABLE, str(host.directory))
    spec = importlib.util.spec_from_file_location("fake_pynvml", ROOT / "tests/support/fakehost/pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    monkeypatch.setattr(worker.memory.nvml, "pynvml", driver)
    for name in ("NVMLError", "NVMLError_NotSupported"):
        monkeypatch.setattr(worker.memory.nvml, name, getattr(driver, name))
