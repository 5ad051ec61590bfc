"""Remembers the models that crashed the engine recently."""

from __future__ import annotations

import math
import time
from contextlib import suppress

from shared.schema.model import Model
from shared.store.connection import UNAVAILABLE
from shared.store.instances import Instances
from shared.store.keys import CRASH_MEMORY_S


class Crashes:
    """Remembers a crash for CRASH_MEMORY_S, here and in Redis for the whole pool.  Ignores an unavailable Redis."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self._known: dict[str, tuple[float, str]] = {}  # by fingerprint: expiry (monotonic), reason

    async def remember(self, model: Model, reason: str) -> None:
        """Record a crash of this model."""
        self._known[model.fingerprint] = (time.monotonic() + CRASH_MEMORY_S, reason)
        with suppress(*UNAVAILABLE):
            await self._instances.remember_crash(model.fingerprint, reason)

    async def forget(self, model: Model, *, everywhere: bool) -> None:
        """Forget a model's crash, since it was loaded.  `everywhere`: also one that only Redis knows."""
        if self._known.pop(model.fingerprint, None) is not None or everywhere:
            with suppress(*UNAVAILABLE):
                await self._instances.forget_crash(model.fingerprint)

    def of(self, model: Model) -> tuple[str, int] | None:
        """Return the reason of a model's crash and the seconds until it expires; None if it did not crash."""
        until, reason = self._known.get(model.fingerprint, (0.0, ""))
        left_s = math.ceil(until - time.monotonic())
        return (reason, left_s) if left_s > 0 else None
