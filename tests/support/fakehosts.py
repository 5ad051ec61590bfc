"""A host with GPUs that are none, for real processes: what NVML and the engine find there, and what is free.

A directory is the host's whole state, so that any number of processes share it: `devices.json`, and beside it for each
device a directory with a file for each holder of memory.  A process is one by its number and start time; what it held
is free once it is gone, or some time later, as drivers have it.  Whoever takes memory does it under a lock.

The processes of `FakeHost.environ` find it through CUDA_FAKE_HOST and tests/support/fakehost on their PYTHONPATH: a
module `pynvml`, and a hook that gives the engine its devices.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
VARIABLE = "CUDA_FAKE_HOST"
FOREIGN_PID = 1  # of what a test holds in another's name
FOREIGN, GONE = "foreign", ".gone"  # in names of files: held by no process of ours; when it was seen to be gone


class Device(NamedTuple):
    uuid: str
    name: str
    total_bytes: int


class Holder(NamedTuple):
    pid: int
    n_bytes: int


class FakeHost:
    """The host in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def made(cls, directory: Path, *total_bytes: int) -> FakeHost:
        """A new host with a GPU of each size, `GPU-fake-0` and so on."""
        host = cls(directory)
        directory.mkdir(parents=True)
        (directory / "lock").touch()
        host.driver(lag_s=0.0, context_bytes=0)
        host.has(*(Device(f"GPU-fake-{i}", "Fake GPU", size) for i, size in enumerate(total_bytes)))
        return host

    @classmethod
    def here(cls) -> FakeHost | None:
        """The one that this process is on, by its environment."""
        return cls(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None

    def environ(self) -> dict[str, str]:
        """What a process must have in its environment to be on this host."""
        return {VARIABLE: str(self.directory), "PYTHONPATH": f"{ROOT / 'tests/support/fakehost'}:{ROOT}"}

    # ---- its devices

    def has(self, *devices: Device) -> None:
        """These are its GPUs from now on, for processes that look from now on."""
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
        """What CUDA finds of them, by CUDA_VISIBLE_DEVICES: in that order, up to the first that there is none of."""
        devices = {device.uuid: device for device in self.devices() if self.fault(device.uuid) is None}
        if names is None:
            return list(devices.values())
        found = []
        for name in names.split(","):
            if name not in devices:
                break
            found.append(devices[name])
        return found

    # ---- its driver

    def driver(self, *, lag_s: float = 0.0, context_bytes: int = 0) -> None:
        """How long it keeps the memory of a process that is gone (real ones up to 1.5 s), and how much it takes itself
        of each GPU for a process that uses it (real ones some 0.5 GiB)."""
        partial = self.directory / "driver.partial"
        partial.write_text(json.dumps({"lag_s": lag_s, "context_bytes": context_bytes}))
        partial.replace(self.directory / "driver.json")

    def of_driver(self, name: str) -> float:
        value: float = json.loads((self.directory / "driver.json").read_text())[name]
        return value

    # ---- faults

    def fail(self, uuid: str, fault: str | None) -> None:
        """Have NVML answer every question about a device with this error ("GpuIsLost"), or no longer.  CUDA does not
        find such a device.  With "host" for the device, NVML does not even start ("DriverNotLoaded")."""
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
        """Who holds memory of a device; forgets who is gone.  Without the lock: one that is stopped may have it."""
        found = []
        for path in sorted((self.directory / uuid).iterdir()):
            pid, started, *_ = path.name.split(".")
            with suppress(FileNotFoundError):  # another was first to forget it
                if path.suffix != GONE and not self._is_free(path, int(pid), started) and (n := int(path.read_text())):
                    found.append(Holder(int(pid), n))
        return found

    def take(self, uuid: str, n_bytes: int, *, pid: int = FOREIGN_PID) -> None:
        """Hold so much more of a device in the name of another program, whether there is room or not."""
        with self._locked():
            self._add(uuid, f"{pid}.{FOREIGN}", n_bytes)

    def release(self, uuid: str) -> None:
        """Hold nothing more of a device in the name of others."""
        with self._locked():
            for path in (self.directory / uuid).glob(f"*.{FOREIGN}"):
                path.unlink()

    def change(self, uuid: str, n_bytes: int) -> bool:
        """Hold so much more, or less, as this process.  Whether there was room."""
        with self._locked():
            if n_bytes > self.free_bytes(uuid):
                return False
            self._add(uuid, f"{os.getpid()}.{_started(os.getpid())}", n_bytes)
            return True

    def _add(self, uuid: str, name: str, n_bytes: int) -> None:
        path, partial = self.directory / uuid / name, self.directory / "partial"
        partial.write_text(str(n_bytes + (int(path.read_text()) if path.exists() else 0)))
        partial.replace(path)  # whole, also where we are killed meanwhile

    def _is_free(self, path: Path, pid: int, started: str) -> bool:
        """Whether a holder is gone, and has been for `lag_s`: the driver's time begins when that is seen first."""
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
    """A device's memory as one process of several has it; a `tests.support.fakegpu.Memory`."""

    def __init__(self, host: FakeHost, uuid: str) -> None:
        self._host, self._uuid = host, uuid
        self._has_begun = False

    def begin(self) -> bool:
        if not self._has_begun:
            self._has_begun = self._host.change(self._uuid, int(self._host.of_driver("context_bytes")))
        return self._has_begun

    def take(self, n_bytes: int) -> bool:
        return self._host.change(self._uuid, n_bytes)

    def give(self, n_bytes: int) -> None:
        self._host.change(self._uuid, -n_bytes)

    def free_bytes(self) -> int:
        return self._host.free_bytes(self._uuid)


def _started(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot; None: it is gone, or only not reaped yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
