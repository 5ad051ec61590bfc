"""The desired state of a worker: the instances that were loaded and not unloaded, kept in a file.

Redis has their records too.  The file covers an emptied Redis, and a worker that is down for longer than records are
retained.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from shared.files import replace_atomically
from shared.instance import Instance
from shared.telemetry import log
from worker.timing import Timing

_log = log.get("worker")


class Desired:
    """Desired instances by `instance_id`, as recorded when they were loaded or their restoration began, with their last
    use."""

    def __init__(self, path: Path, *, is_on: bool, timing: Timing | None = None) -> None:
        """`is_on`: whether the worker restores instances; if not, no instance is ever desired."""
        self.path, self.is_on = path, is_on
        self.instances: dict[str, Instance] = {}
        self._timing = timing or Timing()
        self._changed = asyncio.Event()
        self._writing = threading.Lock()
        self._number = self._written = 0

    def read(self) -> None:
        """Read the file of the previous process.  An unreadable file counts as missing.

        If the worker does not restore, the file is removed, so that no instance is restored from it years later.
        """
        try:
            if not self.is_on:
                self.path.unlink(missing_ok=True)
                return
            instances = msgspec.json.decode(self.path.read_bytes(), type=list[Instance])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            _log.error("desired instances not read", action="wanted_unreadable", file=self.path.name, error=str(e))
            return
        self.instances = {instance.instance_id: instance for instance in instances}

    def add(self, instance: Instance) -> None:
        if self.is_on:
            self.instances[instance.instance_id] = instance
            self._changed.set()

    def discard(self, instance: Instance) -> None:
        """Drop the instance of this load.  An instance of another load with the same `instance_id` stays."""
        desired = self.instances.get(instance.instance_id)
        if desired is not None and desired.id == instance.id:
            del self.instances[instance.instance_id]
            self._changed.set()

    def use(self, used: Mapping[str, float]) -> None:
        """Take last uses: id of the load -> seconds since the epoch.  The file gets them with the next change."""
        for instance_id, desired in self.instances.items():
            if (used_at := used.get(desired.id, 0.0)) > (desired.used_at or 0.0):
                self.instances[instance_id] = msgspec.structs.replace(desired, used_at=used_at)

    def uses(self) -> dict[str, float]:
        """Return the last use of each instance, by id of the load."""
        return {desired.id: desired.used_at or 0.0 for desired in self.instances.values()}

    async def keep(self) -> None:
        """Write the file after each change.  Runs until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await asyncio.to_thread(self._replace, *self._encoded())
            except OSError as e:
                self._log_unwritable(e)
                self._changed.set()
                await asyncio.sleep(self._timing.retry_s)

    def flush(self) -> None:
        """Write the file synchronously, at the end of the process."""
        if not self.is_on:
            return
        try:
            self._replace(*self._encoded())
        except OSError as e:
            self._log_unwritable(e)

    def _log_unwritable(self, error: OSError) -> None:
        _log.error("desired instances not written", action="wanted_unwritable", file=self.path.name, error=str(error))

    def _encoded(self) -> tuple[int, bytes]:
        self._number += 1
        return self._number, msgspec.json.encode(list(self.instances.values()))

    def _replace(self, number: int, data: bytes) -> None:
        """Write the encoding with this number, unless a newer one is already written.  Raises OSError."""
        with self._writing:
            if number < self._written:  # the thread of a newer one was faster
                return
            replace_atomically(self.path, data)
            self._written = number
