"""The devices of a worker: its setting, the locks against other workers, and the readings from NVML."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from shared.schema.memory import CPU
from shared.settings import Settings, SettingsError
from tests.support.fakehosts import FakeHost
from tests.support.gpus import use_driver
from worker.memory.devices import Devices, locked
from worker.memory.nvml import Driver
from worker.runner.protocol import NO_GPU

GIB = 1 << 30
FIRST, SECOND, THIRD = (f"GPU-fake-{i}" for i in range(3))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """Make this process see a host with three GPUs."""
    fake = FakeHost.made(tmp_path / "host", GIB, 2 * GIB, 3 * GIB)
    use_driver(monkeypatch, fake)
    return fake


def devices(setting: str = "") -> Devices:
    return Devices(Settings(devices=setting), Driver())


# ---- LOADSTONE_DEVICES


@pytest.mark.parametrize(
    ("setting", "gpus", "has_cpu"),
    [
        ("", [FIRST, SECOND, THIRD], True),
        ("1", [SECOND], False),
        ("2,0", [THIRD, FIRST], False),
        (f"{SECOND}, cpu", [SECOND], True),
        ("CPU", [], True),
        (f"0,{FIRST},0", [FIRST], False),
    ],
)
def test_a_worker_owns_the_devices_of_its_setting_in_order(
    host: FakeHost, setting: str, gpus: list[str], has_cpu: bool
) -> None:
    owned = devices(setting)
    assert (owned.gpus, owned.has_cpu) == (gpus, has_cpu)
    assert [reading.id for reading in owned.read()] == [*gpus, *([CPU] if has_cpu else [])]


@pytest.mark.parametrize("unknown", ["3", "GPU-other", "gpu-fake-0", "-1"])
def test_an_unknown_device_is_refused_with_a_list(host: FakeHost, unknown: str) -> None:
    with pytest.raises(SettingsError) as raised:
        devices(f"cpu,{unknown}")
    assert str(raised.value) == (
        f"LOADSTONE_DEVICES is 'cpu,{unknown}': there is no device '{unknown}'; available: "
        f"cpu, 0 ({FIRST}), 1 ({SECOND}), 2 ({THIRD})."
    )


def test_without_a_driver_a_worker_owns_the_cpu_only(host: FakeHost) -> None:
    host.fail("host", "DriverNotLoaded")
    assert (devices().gpus, devices().has_cpu) == ([], True)
    with pytest.raises(SettingsError, match=r"there is no device '0'; available: cpu\."):
        devices("0")


@pytest.mark.parametrize(("setting", "visible"), [("cpu", NO_GPU), ("1", SECOND), ("1,cpu", SECOND), ("0,1", None)])
def test_an_only_gpu_is_visible_before_a_load(host: FakeHost, setting: str, visible: str | None) -> None:
    assert devices(setting).visible() == visible


def test_an_engine_without_cuda_leaves_the_cpu_or_fails(host: FakeHost) -> None:
    both = devices("0,cpu")
    both.without_gpus()
    assert [reading.id for reading in both.read()] == [CPU]
    with pytest.raises(SettingsError, match="was built without CUDA"):
        devices("0").without_gpus()


# ---- readings


def test_a_reading_has_free_bytes_and_users(host: FakeHost) -> None:
    owned = devices("1")
    host.take(SECOND, 300, pid=4)
    host.take(SECOND, 500, pid=5)
    (reading,) = owned.read()
    assert (reading.total_bytes, reading.free_bytes, reading.users) == (2 * GIB, 2 * GIB - 800, {4: 300, 5: 500})
    assert reading.is_gpu
    host.release(SECOND)
    assert owned.read()[0].users == {}


def test_a_lost_gpu_has_no_free_memory_until_it_is_back(host: FakeHost) -> None:
    owned = devices("0,1")
    assert [reading.free_bytes for reading in owned.read()] == [GIB, 2 * GIB]
    host.fail(FIRST, "GpuIsLost")
    lost, other = owned.read()
    assert (lost.total_bytes, lost.free_bytes, lost.users) == (GIB, 0, {})
    assert other.free_bytes == 2 * GIB, "the other GPU does not change"
    host.fail(FIRST, None)
    assert owned.read()[0].free_bytes == GIB


def test_a_gpu_lost_at_the_start_leaves_the_other_indexes(host: FakeHost) -> None:
    host.fail(FIRST, "GpuIsLost")
    assert devices().gpus == [SECOND, THIRD]
    assert devices("2").gpus == [THIRD]
    with pytest.raises(SettingsError, match="there is no device '0'"):
        devices("0")


# ---- locks


def test_only_the_gpus_of_another_worker_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path, [FIRST, SECOND]):
        with pytest.raises(SettingsError, match=f"another worker uses the GPU {SECOND}; .* LOADSTONE_DEVICES"):
            in_another(tmp_path, [THIRD, SECOND])
        in_another(tmp_path, [THIRD])
    in_another(tmp_path, [FIRST, SECOND])


def test_a_lock_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(SettingsError, match=f"GPUs are locked in '{file}': .* directory \\(File exists\\)"),
        locked(file, [FIRST]),
    ):
        pass
    with locked(file, []):
        pass


def test_a_killed_worker_releases_its_gpus_despite_a_child(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, theirs))
    worker.start()
    try:
        child = ours.recv()
        try:
            with pytest.raises(SettingsError), locked(tmp_path, [FIRST]):
                pass
            worker.kill()
            worker.join()
            with locked(tmp_path, [FIRST]):
                os.kill(child, 0)  # the child is still alive
        finally:
            os.kill(child, 9)
    finally:
        worker.kill()
        worker.join()
        worker.close()
        ours.close()
        theirs.close()


def hold(lock_dir: Path, channel: Connection) -> None:
    """Run a worker with a child until the worker is killed."""
    with locked(lock_dir, [FIRST]):
        child = subprocess.Popen(["sleep", "60"])
        channel.send(child.pid)
        child.wait()


def in_another(lock_dir: Path, gpus: list[str]) -> None:
    """Lock and release these GPUs in another process; raise the error of that process."""
    context: Any = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=take, args=(lock_dir, gpus, theirs))
    process.start()
    try:
        if error := ours.recv():
            raise SettingsError(error)
    finally:
        process.join()
        process.close()
        ours.close()
        theirs.close()


def take(lock_dir: Path, gpus: list[str], channel: Connection) -> None:
    try:
        with locked(lock_dir, gpus):
            channel.send("")
    except SettingsError as e:
        channel.send(str(e))
