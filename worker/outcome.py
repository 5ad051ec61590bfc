"""What can become of a load, or of a loaded instance, beside the answer that the runner was asked for."""

from __future__ import annotations

from msgspec import Struct

from worker.runner.protocol import Failed


class NoRoom(Struct, frozen=True):
    """The engine says that the load takes more than any place has."""


class Stopped(Struct, frozen=True):
    """A stop was requested."""


class Stalled(Struct, frozen=True):
    """There was no progress for the stall limit."""


class Changed(Struct, frozen=True):
    """A file of the loaded model changed."""


class Died(Struct, frozen=True):
    """The runner's stream ended."""


class Unexpected(Struct, frozen=True):
    """The runner said something that is no answer to what it was asked: a fault of the runner, or of its memory."""

    message: str  # its tag in the protocol


Ended = Failed | Stopped | Stalled | Died | Unexpected  # instead of an answer, in any phase
