"""The GPUs of these tests, with their memory as NVML reports it, not as the worker or the engine does.

NVML does not name processes to a container, so the memory of a process is measured as a change of the total usage.
Therefore no other program may use the GPUs meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pynvml

from tests.support.fakehosts import FakeHost
from tests.support.service import until
from worker.memory.host import PROC, lockable_bytes, locked_bytes
from worker.memory.nvml import Driver

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
STEADY_N, STEADY_S, STEADY_BYTES = 10, 0.05, 2 * MIB  # readings, the interval between them, their largest difference
LOCKED_BYTES = 256 * MIB  # more than a CUDA context locks
HUGE = {"llama3-70b": 41 << 30, "gemma3-27b": 16 << 30, "llama2-7b": 4 << 30}  # with their bytes, at most
SMALLEST = "qwen3-0.6b"
START_S = 60.0  # of a program that uses CUDA: the first start reads its libraries from the disk


class GPUs(Protocol):
    """A host's GPUs."""

    ids: list[str]

    def total_bytes(self, id_: str) -> int: ...

    def used_bytes(self, id_: str) -> int: ...

    def environ(self) -> Mapping[str, str]:
        """Return the environment that makes a process find these GPUs."""

    def occupied(self, id_: str, n_bytes: int | None) -> Any:
        """Have another program hold so much of a GPU during a block, or all that is free, and a CUDA context on a real
        one."""

    def locking(self) -> Any:
        """Yield a function that returns whether a load locks memory of the host.  A fake GPU then waits for the end of
        the block."""

    def huge(self, id_: str) -> str:
        """Return the name of the largest model of `shared.synthetic` that a GPU has room for, and the host to lock."""


class NvidiaGPUs:
    """The GPUs of this machine."""

    def __init__(self) -> None:
        self.ids = [id_ for id_ in Driver().by_index if id_]  # initialises NVML
        self._handles = {id_: pynvml.nvmlDeviceGetHandleByUUID(id_) for id_ in self.ids}

    def total_bytes(self, id_: str) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handles[id_]).total)

    def used_bytes(self, id_: str) -> int:
        memory = pynvml.nvmlDeviceGetMemoryInfo(self._handles[id_])
        return int(memory.total - memory.free)

    def environ(self) -> Mapping[str, str]:
        return {}

    @contextmanager
    def occupied(self, id_: str, n_bytes: int | None) -> Iterator[None]:
        words = [sys.executable, "-m", "tests.gpu.foreign", id_, "all" if n_bytes is None else str(n_bytes)]
        with subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as program:
            try:
                assert program.stdin
                assert program.stdout
                assert program.stderr
                assert program.stdout.readline() == "held\n", program.stderr.read()[-2000:]
                yield
            finally:
                program.kill()

    @contextmanager
    def locking(self) -> Iterator[Callable[[], bool]]:
        before = locked_bytes(PROC)
        yield lambda: locked_bytes(PROC) > before + LOCKED_BYTES

    def huge(self, id_: str) -> str:
        room = min(self.total_bytes(id_) - self.used_bytes(id_), lockable_bytes())
        return next((name for name, n_bytes in HUGE.items() if n_bytes < 0.8 * room), SMALLEST)


class FakeGPUs:
    """Two GPUs of `tests.support.fakehosts`, to check the tests themselves without a GPU."""

    TOTAL_BYTES = 8 << 30

    def __init__(self, directory: Path) -> None:
        self._host = FakeHost.made(directory, self.TOTAL_BYTES, self.TOTAL_BYTES)
        self._host.driver(row_bytes=64 << 10)
        self.ids = [device.uuid for device in self._host.devices()]

    def total_bytes(self, id_: str) -> int:
        return self._host.device(id_).total_bytes

    def used_bytes(self, id_: str) -> int:
        return self._host.used_bytes(id_)

    def environ(self) -> Mapping[str, str]:
        return self._host.environ()

    @contextmanager
    def occupied(self, id_: str, n_bytes: int | None) -> Iterator[None]:
        self._host.take(id_, self._host.free_bytes(id_) if n_bytes is None else n_bytes)
        try:
            yield
        finally:
            self._host.release(id_)

    @contextmanager
    def locking(self) -> Iterator[Callable[[], bool]]:
        self._host.forget_locking()
        with self._host.holding_locks():
            yield lambda: bool(self._host.locking())

    def huge(self, id_: str) -> str:
        return SMALLEST


def steady_bytes(gpus: GPUs, id_: str) -> int:
    """Return the used bytes of a GPU once they have been constant for half a second."""
    readings: list[int] = []

    def steady() -> bool:
        readings.append(gpus.used_bytes(id_))
        last = readings[-STEADY_N:]
        if len(last) == STEADY_N and max(last) - min(last) <= STEADY_BYTES:
            return True
        time.sleep(STEADY_S)
        return False

    until(steady, f"the used memory of {id_} is constant; is another program using the GPU?", START_S)
    return readings[-1]
