"""A host with fake GPUs for real processes: the devices that NVML and the engine find, and their free memory.

A directory holds the whole state of the host, so that any number of processes share it: `devices.json`, and for each
device a directory with a file for each process that holds memory.  A process is identified by its pid and start time;
its memory is free once the process is gone, or some time later, as with real drivers.  Memory is taken under a lock.

Processes started with `FakeHost.environ` find the host through CUDA_FAKE_HOST and tests/support/fakehost on their
PYTHONPATH, which has a module `pynvml` and a hook that gives the engine its devices.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
VARIABLE = "CUDA_FAKE_HOST"
FOREIGN_PID = 1  # holder of the memory that a test takes for other programs
FOREIGN, GONE = "foreign", ".gone"  # in names of files: another program's memory; when a process was seen to be gone


class Device(NamedTuple):
    uuid: str
    name: str
    total_bytes: int


class Holder(NamedTuple):
    pid: int
    n_bytes: int


class FakeHost:
    """A host whose state is in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def made(cls, directory: Path, *total_bytes: int) -> FakeHost:
        """Create a host with a GPU of each size: `GPU-fake-0` and so on."""
        host = cls(directory)
        directory.mkdir(parents=True)
        for name in ("lock", "holding", "locking"):
            (directory / name).touch()
        host.driver(lag_s=0.0, context_bytes=0)
        host.has(*(Device(f"GPU-fake-{i}", "Fake GPU", size) for i, size in enumerate(total_bytes)))
        return host

    @classmethod
    def here(cls) -> FakeHost | None:
        """Return the host of this process, from its environment, or None."""
        return cls(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None

    def environ(self) -> dict[str, str]:
        """Return the environment that puts a process on this host."""
        return {VARIABLE: str(self.directory), "PYTHONPATH": f"{ROOT / 'tests/support/fakehost'}:{ROOT}"}

    # ---- its devices

    def has(self, *devices: Device) -> None:
        """Set the GPUs of the host; processes see them when they next look."""
        for device in devices:
            (self.directory / device.uuid).mkdir(exist_ok=True)
        partial = self.directory / "devices.partial"
        partial.write_text(json.dumps([device._asdict() for device in devices]))
        partial.replace(self.directory / "devices.json")

    def devices(self) -> list[Device]:
        return [Device(**fields) for fields in json.loads((self.directory / "devices.json").read_text())]

    def device(self, uuid: str) -> Device:
        return next(device for device in self.devices() if device.uuid == uuid)

    def visible(self, names: str | None) -> list[Device]:
        """Return the devices that CUDA finds with CUDA_VISIBLE_DEVICES: in that order, up to the first unknown name."""
        devices = {device.uuid: device for device in self.devices() if self.fault(device.uuid) is None}
        if names is None:
            return list(devices.values())
        visible_devices = []
        for name in names.split(","):
            if name not in devices:
                break
            visible_devices.append(devices[name])
        return visible_devices

    # ---- its driver

    def driver(
        self,
        *,
        lag_s: float = 0.0,
        context_bytes: int = 0,
        row_bytes: int = 0,
        read_only: bool = True,
        lockable_bytes: int = 1 << 40,
        locked_from: int | None = None,
        version: str = "580.159.04",
    ) -> None:
        """Set how long the driver keeps the memory of a process that is gone (a real one up to 1.5 s), and how much it
        uses of a GPU for each process on it (a real one about 0.5 GiB), and beside the engine's buffers for each row,
        or token, of the largest batch that it computed (a real one some 10 KiB).

        A process may page-lock `lockable_bytes`, of read-only memory only with `read_only`.  `locked_from`: the size
        from which on runners lock a model, instead of their own.
        """
        partial = self.directory / "driver.partial"
        values = {
            "lag_s": lag_s,
            "context_bytes": context_bytes,
            "row_bytes": row_bytes,
            "read_only": read_only,
            "lockable_bytes": lockable_bytes,
            "locked_from": locked_from,
        }
        partial.write_text(json.dumps(values))
        self.version_path.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release\n")
        partial.replace(self.directory / "driver.json")

    def of_driver(self, name: str) -> Any:
        value: Any = json.loads((self.directory / "driver.json").read_text())[name]
        return value

    # ---- page-locked memory

    @property
    def version_path(self) -> Path:
        return self.directory / "version"

    @property
    def locking_path(self) -> Path:
        return self.directory / "locking"

    @property
    def holding_path(self) -> Path:
        return self.directory / "holding"

    def locking(self) -> list[dict[str, Any]]:
        """Return what processes did with page-locked memory since the last `forget_locking`, in order."""
        return [json.loads(line) for line in self.locking_path.read_text().splitlines()]

    def forget_locking(self) -> None:
        os.truncate(self.locking_path, 0)

    @contextmanager
    def holding_locks(self) -> Iterator[None]:
        """Let no process page-lock memory during the block: calls wait for its end."""
        with self.holding_path.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield

    # ---- faults

    def fail(self, uuid: str, fault: str | None) -> None:
        """Let every NVML query for a device fail with this error, e.g. "GpuIsLost"; None ends the fault.

        CUDA does not find such a device.  With the device "host", NVML does not initialise ("DriverNotLoaded").
        """
        path = self.directory / f"fault-{uuid}"
        if fault is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(fault)

    def fault(self, uuid: str) -> str | None:
        try:
            return (self.directory / f"fault-{uuid}").read_text()
        except FileNotFoundError:
            return None

    # ---- its memory

    def used_bytes(self, uuid: str) -> int:
        return sum(holder.n_bytes for holder in self.holders(uuid))

    def free_bytes(self, uuid: str) -> int:
        return max(0, self.device(uuid).total_bytes - self.used_bytes(uuid))

    def holders(self, uuid: str) -> list[Holder]:
        """Return the holders of a device's memory.  Takes no lock, which a stopped process may hold."""
        holders_of_device = []
        for path in sorted((self.directory / uuid).iterdir()):
            pid, started, *_ = path.name.split(".")
            with suppress(FileNotFoundError):  # another process has removed it
                if path.suffix != GONE and not self._is_free(path, int(pid), started) and (n := int(path.read_text())):
                    holders_of_device.append(Holder(int(pid), n))
        return holders_of_device

    def take(self, uuid: str, n_bytes: int, *, pid: int = FOREIGN_PID) -> None:
        """Hold so much more of a device for another program, even beyond its size."""
        with self._locked():
            self._add(uuid, f"{pid}.{FOREIGN}", n_bytes)

    def release(self, uuid: str) -> None:
        """Free the memory of a device that is held for other programs."""
        with self._locked():
            for path in (self.directory / uuid).glob(f"*.{FOREIGN}"):
                path.unlink()

    def change(self, uuid: str, n_bytes: int) -> bool:
        """Change the memory that this process holds; return whether there was room."""
        with self._locked():
            if n_bytes > self.free_bytes(uuid):
                return False
            self._add(uuid, f"{os.getpid()}.{_started(os.getpid())}", n_bytes)
            return True

    def _add(self, uuid: str, name: str, n_bytes: int) -> None:
        path, partial = self.directory / uuid / name, self.directory / "partial"
        partial.write_text(str(n_bytes + (int(path.read_text()) if path.exists() else 0)))
        partial.replace(path)  # atomic, even if this process is killed meanwhile

    def _is_free(self, path: Path, pid: int, started: str) -> bool:
        """Return whether a holder has been gone for `lag_s`, counted from when that was first seen."""
        if started in (FOREIGN, _started(pid)):
            return False
        seen = path.with_name(path.name + GONE)
        if not seen.exists():
            seen.touch()
        if time.time() - seen.stat().st_mtime < self.of_driver("lag_s"):
            return False
        path.unlink(missing_ok=True)
        seen.unlink(missing_ok=True)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Shared:
    """A device's memory, shared with other processes; implements `tests.support.fakegpu.Memory`."""

    def __init__(self, host: FakeHost, uuid: str) -> None:
        self._host, self._uuid = host, uuid
        self._has_begun = False
        self._n_rows = 0  # of the largest computation

    def begin(self) -> bool:
        if not self._has_begun:
            self._has_begun = self._host.change(self._uuid, int(self._host.of_driver("context_bytes")))
        return self._has_begun

    def take(self, n_bytes: int) -> bool:
        return self._host.change(self._uuid, n_bytes)

    def give(self, n_bytes: int) -> None:
        self._host.change(self._uuid, -n_bytes)

    def grow(self, n_rows: int) -> bool:
        if n_rows <= self._n_rows:
            return True
        n_bytes = (n_rows - self._n_rows) * int(self._host.of_driver("row_bytes"))
        if n_bytes and not self.take(n_bytes):
            return False
        self._n_rows = n_rows
        return True

    def free_bytes(self) -> int:
        return self._host.free_bytes(self._uuid)


def _started(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot, or None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
