"""Throttles the progress messages of a load."""

from __future__ import annotations

import time
from collections.abc import Callable

from shared.schema.http import Phase
from worker.runner.protocol import (
    Progress,
)


class Throttled:
    """Sends progress at each change of phase, at each percent of the bytes, and otherwise at most every 200 ms."""

    def __init__(self, send: Callable[[Progress], None], total_bytes: int) -> None:
        self.send, self.step = send, max(1, total_bytes // 100)
        self.phase: Phase | None = None
        self.sent_bytes, self.sent_at = 0, 0.0

    def __call__(self, phase: Phase, loaded_bytes: int) -> None:
        now = time.monotonic()
        advanced = max(0, loaded_bytes - self.sent_bytes)
        if phase != self.phase or advanced >= self.step or (advanced and now - self.sent_at >= 0.2):
            self.phase, self.sent_bytes, self.sent_at = phase, self.sent_bytes + advanced, now
            self.send(Progress(phase, self.sent_bytes))
