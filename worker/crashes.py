"""The models that crashed the engine recently."""

from __future__ import annotations

import math
import time
from contextlib import suppress

from shared.schema.model import Model
from shared.store.connection import UNAVAILABLE
from shared.store.instances import Instances
from shared.store.keys import CRASH_MEMORY_S


class Crashes:
    """Remembers a crash for CRASH_MEMORY_S, here and in Redis for the whole pool.  A Redis that is away is no error."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self._known: dict[str, tuple[float, str]] = {}  # by fingerprint: until when (monotonic), and why

    async def remember(self, model: Model, reason: str) -> None:
        """Refuse this model for a while."""
        self._known[model.fingerprint] = (time.monotonic() + CRASH_MEMORY_S, reason)
        with suppress(*UNAVAILABLE):
            await self._instances.remember_crash(model.fingerprint, reason)

    async def forget(self, model: Model, *, everywhere: bool) -> None:
        """Accept it again, since it was loaded.  `everywhere`: also if this worker knows of no crash."""
        if self._known.pop(model.fingerprint, None) is not None or everywhere:
            with suppress(*UNAVAILABLE):
                await self._instances.forget_crash(model.fingerprint)

    def of(self, model: Model) -> tuple[str, int] | None:
        """Return why a model crashed the engine, and for how many seconds more that is known; None if it did not."""
        until, reason = self._known.get(model.fingerprint, (0.0, ""))
        left_s = math.ceil(until - time.monotonic())
        return (reason, left_s) if left_s > 0 else None
