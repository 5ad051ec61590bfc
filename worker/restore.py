"""What a worker is to hold: the instances that were loaded and not unloaded, in a file of its own.

Redis has their records as well; the file is for a Redis that was emptied, and for a worker that is away for longer
than records are kept.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Literal

import msgspec

from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.telemetry import log, trace

TRIES = 5  # of one restoration
FIRST_PAUSE_S = 2.0  # before the second one; it doubles
RETRY_S = 5.0  # of a file that cannot be written

_log = log.get("worker")


class Wanted:
    """Instances by their ids (`instance_id`), as they were when they were loaded or began to be restored."""

    def __init__(self, path: Path, *, is_on: bool) -> None:
        self.path, self.is_on = path, is_on
        self.instances: dict[str, Instance] = {}
        self._changed = asyncio.Event()
        self._writing = threading.Lock()
        self._number = self._written = 0

    def read(self) -> None:
        """Read the file that an earlier process left.  One that cannot be read is as good as none; one that is not
        wanted any more is removed, so that nobody restores it years later."""
        try:
            if not self.is_on:
                return self.path.unlink(missing_ok=True)
            found = msgspec.json.decode(self.path.read_bytes(), type=list[Instance])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            _log.error("wanted file not read", action="wanted_unreadable", file=self.path.name, error=str(e))
            return None
        self.instances = {instance.instance_id: instance for instance in found}
        return None

    def add(self, instance: Instance) -> None:
        if self.is_on:
            self.instances[instance.instance_id] = instance
            self._changed.set()

    def discard(self, instance: Instance) -> None:
        """No longer want what this load made; another one under the same id stays wanted."""
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
                _log.error("wanted file not written", action="wanted_unwritable", file=self.path.name, error=str(e))
                self._changed.set()
                await asyncio.sleep(RETRY_S)

    def flush(self) -> None:
        """Write at the process's end."""
        if not self.is_on:
            return
        try:
            self._replace(*self._encoded())
        except OSError as e:
            _log.error("wanted file not written", action="wanted_unwritable", file=self.path.name, error=str(e))

    def _encoded(self) -> tuple[int, bytes]:
        self._number += 1
        return self._number, msgspec.json.encode(list(self.instances.values()))

    def _replace(self, number: int, data: bytes) -> None:
        """Whatever happens meanwhile, the file holds either all of what it had or all of `data`.  Raises OSError."""
        with self._writing:
            if number < self._written:  # a thread that was slower than a later one
                return
            beside = self.path.with_name(self.path.name + ".new")
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
            self._written = number


def decide(wanted: Instance, record: Instance | None, known: str | None) -> Literal["wait", "drop"] | int:
    """What to do about a wanted instance that its worker does not hold: leave it for now, want it no longer, or load
    it again, with the number of that try.

    `record` is its load's in Redis, and `known` the id of the load that Redis has as wanted under its name.
    """
    if wanted.idle_at is not None and time.time() >= wanted.idle_at:  # it would have been unloaded meanwhile
        return "drop"
    if record is None:  # Redis was emptied, or the worker was away for longer than records are kept
        return 1
    if record.worker != wanted.worker:
        return "drop"
    if record.state not in TERMINAL:
        return "wait"
    is_restoration = record.restoring > 0 and record.loaded_at is None
    if record.state is State.LOST and known == wanted.id and not record.stop_requested:
        return record.restoring if is_restoration else 1
    if record.state is State.FAILED and is_restoration and record.restoring < TRIES:
        return record.restoring + 1
    return "drop"


def restoration(wanted: Instance, id_: str, number: int) -> Instance:
    """The record of a new load that brings `wanted` back, from its second try on after a pause."""
    pause_s = FIRST_PAUSE_S * 2 ** (number - 2) if number > 1 else 0.0
    return Instance(
        id=id_,
        model=wanted.model,
        key=wanted.key,
        type=wanted.type,
        worker=wanted.worker,
        request=wanted.request,
        traceparent=str(trace.begun()),  # nobody's request
        total_size_bytes=wanted.total_size_bytes,
        restoring=number,
        not_before=time.time() + pause_s if pause_s else 0.0,
        used_at=wanted.used_at,
        instance_id=wanted.instance_id,
    )
