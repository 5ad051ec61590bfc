"""The messages between a worker and its runner: tagged structs, each in a frame of `worker.framing`."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct, msgpack

from shared.memory.plan import Plan
from shared.schema.http import LoadConfig, Phase
from shared.schema.memory import Usage
from shared.schema.model import FileStat
from worker import framing

NO_GPU = "-1"  # CUDA_VISIBLE_DEVICES ends before the first number that is none: CUDA C++ Programming Guide

# ---- to the runner


class Load(Plan, frozen=True, kw_only=True, tag="load"):
    """Load one model, with these parameters of llama.cpp's."""

    shards: list[str]  # absolute paths, first shard first
    total_bytes: int
    check_tensors: bool
    devices: list[str]  # UUIDs of GPUs, in the order in which they take layers; none: the CPU alone
    layers: list[int]  # how many each of these takes; the first ones of the model, that none takes, stay on the CPU
    traceparent: str = ""  # W3C Trace Context: the runner's own span


class Measure(Struct, frozen=True, tag="measure"):
    """Say what a load would take.  Any number of these may come before a Load; where the runner has not started the
    engine's backend yet, it does for the GPUs of the first one, and sees no others from then on.

    It takes none of that.  On a GPU the process holds the driver's context from then on, as it does in a load.
    """

    load: Load


class Ping(Struct, frozen=True, tag="ping"):
    """Give a sign of life."""


class Stop(Struct, frozen=True, tag="stop"):
    """Leave at once; dying is how a runner gives its memory back."""


ToRunner = Load | Measure | Ping | Stop

# ---- from the runner


class Warm(Struct, frozen=True, tag="warm"):
    """The engine is there; a load may be given."""

    has_cuda: bool  # whether it was built with CUDA


class Pong(Struct, frozen=True, tag="pong"):
    """The answer to a Ping, in whatever the engine is deep."""


class Progress(Struct, frozen=True, tag="progress"):
    phase: Phase
    loaded_bytes: int  # never decreases


class Ready(Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is in memory and has decoded a token."""

    config: LoadConfig  # as read back
    timing: dict[Phase, float]  # seconds, disjoint
    files: list[FileStat]  # of each shard, as it was opened; it was the same at the end
    taken: list[Usage]  # of each device, and of the host; empty where this build of the engine cannot say


class Measured(Struct, frozen=True, tag="measured"):
    """The answer to a Measure.  The runner waits for what it is told next."""

    taken: list[Usage]  # of each device, and of the host


class Failed(Struct, frozen=True, tag="failed"):
    """The engine refused; the runner ends after this."""

    reason: str


FromRunner = Warm | Pong | Progress | Ready | Measured | Failed


frame: Callable[[ToRunner | FromRunner], bytes] = framing.frame
decode_to_runner: Callable[[bytes], ToRunner] = msgpack.Decoder(ToRunner).decode
decode_from_runner: Callable[[bytes], FromRunner] = msgpack.Decoder(FromRunner).decode
