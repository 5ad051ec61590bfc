"""The instances that a worker is to hold: those that were loaded and not unloaded, in a file of its own.

Redis has their records as well; the file is for a Redis that was emptied, and for a worker that is away for longer
than records are kept.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec

from shared.files import replace_atomically
from shared.instance import Instance
from shared.telemetry import log
from worker.timing import Timing

_log = log.get("worker")


class Desired:
    """Instances by their ids (`instance_id`), as they were when they were loaded or began to be restored."""

    def __init__(self, path: Path, *, is_on: bool, timing: Timing | None = None) -> None:
        """`is_on`: whether a worker restores at all; otherwise nothing is ever desired."""
        self.path, self.is_on = path, is_on
        self.instances: dict[str, Instance] = {}
        self._timing = timing or Timing()
        self._changed = asyncio.Event()
        self._writing = threading.Lock()
        self._number = self._written = 0

    def read(self) -> None:
        """Read the file that an earlier process left.

        One that cannot be read is as good as none.  One that is not used any more is removed, so that nothing is
        restored from it years later.
        """
        try:
            if not self.is_on:
                self.path.unlink(missing_ok=True)
                return
            found = msgspec.json.decode(self.path.read_bytes(), type=list[Instance])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            _log.error("desired instances not read", action="wanted_unreadable", file=self.path.name, error=str(e))
            return
        self.instances = {instance.instance_id: instance for instance in found}

    def add(self, instance: Instance) -> None:
        if self.is_on:
            self.instances[instance.instance_id] = instance
            self._changed.set()

    def discard(self, instance: Instance) -> None:
        """Forget what this load made; what another load made under the same id stays desired."""
        found = self.instances.get(instance.instance_id)
        if found is not None and found.id == instance.id:
            del self.instances[instance.instance_id]
            self._changed.set()

    async def keep(self) -> None:
        """Write each change; ends only by cancellation."""
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
        """Write at the process's end."""
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
        """Write the encoding with this number, unless a later one is written already.  Raises OSError."""
        with self._writing:
            if number < self._written:  # a thread that was slower than a later one
                return
            replace_atomically(self.path, data)
            self._written = number
