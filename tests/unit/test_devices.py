"""Which devices a worker owns, that nobody else does, and what NVML says of them."""

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
    """A host with three GPUs, which is this process's."""
    made = FakeHost.made(tmp_path / "host", GIB, 2 * GIB, 3 * GIB)
    use_driver(monkeypatch, made)
    return made


def devices(wanted: str = "") -> Devices:
    return Devices(Settings(devices=wanted), Driver())


# ---- LOADSTONE_DEVICES


@pytest.mark.parametrize(
    ("wanted", "gpus", "has_cpu"),
    [
        ("", [FIRST, SECOND, THIRD], True),
        ("1", [SECOND], False),
        ("2,0", [THIRD, FIRST], False),
        (f"{SECOND}, cpu", [SECOND], True),
        ("CPU", [], True),
        (f"0,{FIRST},0", [FIRST], False),
    ],
)
def test_a_worker_owns_what_its_setting_names_in_that_order(
    host: FakeHost, wanted: str, gpus: list[str], has_cpu: bool
) -> None:
    found = devices(wanted)
    assert (found.gpus, found.has_cpu) == (gpus, has_cpu)
    assert [reading.id for reading in found.read()] == [*gpus, *([CPU] if has_cpu else [])]


@pytest.mark.parametrize("unknown", ["3", "GPU-other", "gpu-fake-0", "-1"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(host: FakeHost, unknown: str) -> None:
    with pytest.raises(SettingsError) as raised:
        devices(f"cpu,{unknown}")
    assert str(raised.value) == (
        f"LOADSTONE_DEVICES is 'cpu,{unknown}': there is no device '{unknown}'; available: "
        f"cpu, 0 ({FIRST}), 1 ({SECOND}), 2 ({THIRD})."
    )


def test_without_a_driver_there_is_the_cpu_alone(host: FakeHost) -> None:
    host.fail("host", "DriverNotLoaded")
    assert (devices().gpus, devices().has_cpu) == ([], True)
    with pytest.raises(SettingsError, match=r"there is no device '0'; available: cpu\."):
        devices("0")


@pytest.mark.parametrize(("wanted", "visible"), [("cpu", NO_GPU), ("1", SECOND), ("1,cpu", SECOND), ("0,1", None)])
def test_what_cuda_may_see_is_settled_ahead_of_a_load_where_there_is_no_choice(
    host: FakeHost, wanted: str, visible: str | None
) -> None:
    assert devices(wanted).visible() == visible


def test_an_engine_without_cuda_leaves_the_cpu_or_is_told_of(host: FakeHost) -> None:
    both = devices("0,cpu")
    both.without_gpus()
    assert [reading.id for reading in both.read()] == [CPU]
    with pytest.raises(SettingsError, match="was built without CUDA"):
        devices("0").without_gpus()


# ---- what NVML says


def test_a_reading_has_what_is_free_and_who_uses_it(host: FakeHost) -> None:
    found = devices("1")
    host.take(SECOND, 300, pid=4)
    host.take(SECOND, 500, pid=5)
    (reading,) = found.read()
    assert (reading.total_bytes, reading.free_bytes, reading.users) == (2 * GIB, 2 * GIB - 800, {4: 300, 5: 500})
    assert reading.is_gpu
    host.release(SECOND)
    assert found.read()[0].users == {}


def test_of_a_gpu_that_is_lost_nothing_is_free_until_it_answers_again(host: FakeHost) -> None:
    found = devices("0,1")
    assert [reading.free_bytes for reading in found.read()] == [GIB, 2 * GIB]
    host.fail(FIRST, "GpuIsLost")
    lost, other = found.read()
    assert (lost.total_bytes, lost.free_bytes, lost.users) == (GIB, 0, {})
    assert other.free_bytes == 2 * GIB, "the others are as they were"
    host.fail(FIRST, None)
    assert found.read()[0].free_bytes == GIB


def test_a_gpu_that_is_lost_at_the_start_is_left_out_and_the_others_keep_their_indexes(host: FakeHost) -> None:
    host.fail(FIRST, "GpuIsLost")
    assert devices().gpus == [SECOND, THIRD]
    assert devices("2").gpus == [THIRD]
    with pytest.raises(SettingsError, match="there is no device '0'"):
        devices("0")


# ---- locks


def test_a_gpu_that_another_worker_has_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    with locked(tmp_path, [FIRST, SECOND]):
        with pytest.raises(SettingsError, match=f"another worker uses the GPU {SECOND}; .* LOADSTONE_DEVICES"):
            in_another(tmp_path, [THIRD, SECOND])
        in_another(tmp_path, [THIRD])
    in_another(tmp_path, [FIRST, SECOND])


def test_a_worker_that_is_killed_leaves_its_gpus_and_its_children_do_not_hold_them(tmp_path: Path) -> None:
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
                os.kill(child, 0)  # it lives on
        finally:
            os.kill(child, 9)
    finally:
        worker.kill()
        worker.join()
        worker.close()
        ours.close()
        theirs.close()


def hold(lock_dir: Path, told: Connection) -> None:
    """A worker that has a child, until it is killed."""
    with locked(lock_dir, [FIRST]):
        child = subprocess.Popen(["sleep", "60"])
        told.send(child.pid)
        child.wait()


def in_another(lock_dir: Path, gpus: list[str]) -> None:
    """Take and leave these as another process would; raises what it did."""
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


def take(lock_dir: Path, gpus: list[str], told: Connection) -> None:
    try:
        with locked(lock_dir, gpus):
            told.send("")
    except SettingsError as e:
        told.send(str(e))
