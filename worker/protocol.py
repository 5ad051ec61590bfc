"""What a worker and its runner say to each other: tagged messages in length-prefixed msgpack frames."""

from __future__ import annotations

import struct
from collections.abc import Callable

from msgspec import Struct, msgpack

from shared.plan import Plan
from shared.schema import Device, FileStat, LoadConfig, Phase

LENGTH = struct.Struct("<I")

# ---- to the runner


class Load(Plan, frozen=True, kw_only=True, tag="load"):
    """Load one model, with these parameters of llama.cpp's."""

    shards: list[str]  # absolute paths, first shard first
    total_bytes: int
    check_tensors: bool


class Ping(Struct, frozen=True, tag="ping"):
    """Give a sign of life."""


class Stop(Struct, frozen=True, tag="stop"):
    """Leave at once; dying is how a runner gives its memory back."""


ToRunner = Load | Ping | Stop

# ---- from the runner


class Warm(Struct, frozen=True, tag="warm"):
    """The engine is initialised; a load may be given."""

    devices: list[Device]  # the GPUs that the engine sees, else the CPU


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


class Failed(Struct, frozen=True, tag="failed"):
    """The engine refused; the runner ends after this."""

    reason: str
    devices: list[Device]  # once what it had taken was given back


FromRunner = Warm | Pong | Progress | Ready | Failed


def frame(message: ToRunner | FromRunner) -> bytes:
    data = msgpack.encode(message)
    return LENGTH.pack(len(data)) + data


decode_to_runner: Callable[[bytes], ToRunner] = msgpack.Decoder(ToRunner).decode
decode_from_runner: Callable[[bytes], FromRunner] = msgpack.Decoder(FromRunner).decode
