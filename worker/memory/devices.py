"""The devices of a worker: selection by the settings, exclusive locks, readings."""

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
    """The devices of this host that a worker loads into: GPUs in the order of the setting, then the CPU."""

    def __init__(self, settings: Settings, driver: Driver) -> None:
        """Select the devices.  Raises SettingsError if one does not exist."""
        self._driver = driver
        self.gpus, self.has_cpu = _selected(settings.devices, driver.by_index)
        self._cpu_name = _processor()

    def read(self) -> list[Reading]:
        """Read the current state of the devices.  A call of the driver takes about a millisecond."""
        readings = self._driver.read(self.gpus)
        if self.has_cpu:
            host = host_memory()
            readings.append(
                Reading(
                    id=CPU,
                    is_gpu=False,
                    name=self._cpu_name,
                    total_bytes=host.total_bytes,
                    free_bytes=host.free_bytes,
                )
            )
        return readings

    def visible(self) -> str | None:
        """Return CUDA_VISIBLE_DEVICES for all runners; None if it differs by load."""
        return self.gpus[0] if len(self.gpus) == 1 else None if self.gpus else NO_GPU

    def without_gpus(self) -> None:
        """Drop the GPUs, since the engine cannot use them.  Raises SettingsError if no device remains."""
        if not self.has_cpu:
            raise SettingsError(
                f"{variable('devices')} names only GPUs, but llama.cpp was built without CUDA: rebuild it with "
                'CMAKE_ARGS="-DGGML_CUDA=on", or add cpu to the devices.'
            )
        self.gpus = []


def _selected(setting: str, by_index: Sequence[str]) -> tuple[list[str], bool]:
    """Return the UUIDs of the GPUs that the setting names, and whether it names the CPU.  Raises SettingsError.

    `by_index` has "" for an unusable GPU, so that the others keep their indexes.
    """
    known = {i: id_ for i, id_ in enumerate(by_index) if id_}
    if not setting:
        return [*known.values()], True
    gpus, has_cpu = [], False
    for name in (part.strip() for part in setting.split(",")):
        if name.lower() == "cpu":
            has_cpu = True
            continue
        index = int(name) if name.isdecimal() else None
        id_ = name if index is None else known.get(index, "")
        if id_ not in known.values():
            available = ", ".join(["cpu", *(f"{i} ({id_})" for i, id_ in known.items())])
            raise SettingsError(
                f"{variable('devices')} is '{setting}': there is no device '{name}'; available: {available}."
            )
        if id_ not in gpus:
            gpus.append(id_)
    return gpus, has_cpu


@contextmanager
def locked(lock_dir: Path, gpus: Sequence[str]) -> Iterator[None]:
    """Hold a lock file for each of these GPUs, which no child process inherits.

    Raises SettingsError if another worker holds one of them, or if the directory is not writable.
    """
    with ExitStack() as held:
        for id_ in gpus:
            try:
                lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
                held.enter_context(filelock.lock(lock_dir / f"{id_}.lock"))
            except filelock.Held:
                raise SettingsError(
                    f"another worker uses the GPU {id_}; give each worker its own GPUs with {variable('devices')}."
                ) from None
            except OSError as e:
                raise SettingsError(
                    f"GPUs are locked in '{lock_dir}': it must be a writable directory ({e.strerror})."
                ) from None
        yield


def _processor() -> str:
    """Return the CPU's model name from /proc/cpuinfo, CPU if it has none, as on some architectures."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return CPU
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), CPU)
