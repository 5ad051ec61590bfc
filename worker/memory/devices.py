"""The devices that a worker owns: which they are, the exclusive right to them, and how they are now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shared import filelock
from shared.schema.memory import CPU
from shared.settings import Settings, SettingsError, variable
from worker.memory.host import host_memory
from worker.memory.nvml import Driver, Reading
from worker.runner.protocol import NO_GPU


class Devices:
    """What of this host a worker may load into: GPUs in the order of its setting, then the CPU."""

    def __init__(self, settings: Settings, driver: Driver) -> None:
        """Raises SettingsError for a device that is not there."""
        self._driver = driver
        self.gpus, self.has_cpu = _chosen(settings.devices, driver.by_index)
        self._cpu_name = _processor()

    def read(self) -> list[Reading]:
        """As they are now; the driver is asked, which takes about a millisecond."""
        found = self._driver.read(self.gpus)
        if self.has_cpu:
            host = host_memory()
            found.append(
                Reading(
                    id=CPU,
                    is_gpu=False,
                    name=self._cpu_name,
                    total_bytes=host.total_bytes,
                    free_bytes=host.free_bytes,
                )
            )
        return found

    def visible(self) -> str | None:
        """What CUDA is to see of every runner (CUDA_VISIBLE_DEVICES); None where that differs from load to load."""
        return self.gpus[0] if len(self.gpus) == 1 else None if self.gpus else NO_GPU

    def without_gpus(self) -> None:
        """The engine cannot use them.  Raises SettingsError where the setting leaves nothing else."""
        if not self.has_cpu:
            raise SettingsError(
                f"{variable('devices')} names GPUs, and llama.cpp was built without CUDA: build it with "
                'CMAKE_ARGS="-DGGML_CUDA=on", or add cpu to the devices.'
            )
        self.gpus = []


def _chosen(wanted: str, there: Sequence[str]) -> tuple[list[str], bool]:
    """The GPUs that a setting means, and whether the CPU is among its devices.  `there` has "" in the place of one that
    cannot be used, so that the others keep their indexes.  Raises SettingsError."""
    known = {i: id_ for i, id_ in enumerate(there) if id_}
    if not wanted:
        return [*known.values()], True
    gpus, has_cpu = [], False
    for name in (part.strip() for part in wanted.split(",")):
        if name.lower() == "cpu":
            has_cpu = True
            continue
        index = int(name) if name.isdecimal() else None
        id_ = name if index is None else known.get(index, "")
        if id_ not in known.values():
            what = f"NVIDIA's GPUs here are {', '.join(f'{i} ({id_})' for i, id_ in known.items())}"
            raise SettingsError(
                f"{variable('devices')} is '{wanted}', and there is no device '{name}': "
                f"{what if known else 'no NVIDIA GPU is known here'}; cpu is the CPU."
            )
        if id_ not in gpus:
            gpus.append(id_)
    return gpus, has_cpu


@contextmanager
def locked(lock_dir: Path, gpus: Sequence[str]) -> Iterator[None]:
    """Hold the exclusive right to these GPUs: the lock on a file for each, which no child process inherits.

    Raises SettingsError when another worker has one of them.
    """
    if gpus:
        lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as held:
        for id_ in gpus:
            try:
                held.enter_context(filelock.lock(lock_dir / f"{id_}.lock"))
            except filelock.Held:
                raise SettingsError(
                    f"another worker uses the GPU {id_}; give each its own with {variable('devices')}."
                ) from None
        yield


def _processor() -> str:
    """What /proc/cpuinfo calls it; not every architecture does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return CPU
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), CPU)
