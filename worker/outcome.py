"""The outcomes of a load, or of a loaded instance, other than the expected answer of the runner."""

from __future__ import annotations

from msgspec import Struct

from worker.runner.protocol import Failed


class NoRoom(Struct, frozen=True):
    """By the engine's dry run, the load fits nowhere on this worker."""


class Stopped(Struct, frozen=True):
    """A stop was requested."""


class Stalled(Struct, frozen=True):
    """There was no progress, or no answer to a ping, within the stall limit."""


class Changed(Struct, frozen=True):
    """A file of the loaded model changed."""


class Died(Struct, frozen=True):
    """The runner's stream ended."""


class Unexpected(Struct, frozen=True):
    """The runner sent a message that the protocol does not allow here: a bug, or corrupted memory."""

    message: str  # its tag in the protocol


Ended = Failed | Stopped | Stalled | Died | Unexpected  # instead of an answer, in any phase
