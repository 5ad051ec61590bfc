"""The messages between a worker and its runner: tagged structs, each in a frame of `shared.framing`."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct, msgpack

from shared import framing
from shared.memory.plan import Plan
from shared.schema.http import EngineBuild, LoadConfig, Phase
from shared.schema.memory import Usage
from shared.schema.model import FileStat

NO_GPU = "-1"  # CUDA_VISIBLE_DEVICES ends before the first invalid index: CUDA C++ Programming Guide

# ---- to the runner


class Serving(Struct, frozen=True, kw_only=True):
    """The limits of the requests of an instance; times in seconds."""

    requests_waiting: int = 64
    request_wait_s: float = 60.0
    request_s: float = 600.0  # from its arrival to its last token
    max_output_tokens: int = 0  # of an answer; 0: up to the end of the context
    shared_prefixes: bool = False  # between clients


class Load(Plan, frozen=True, kw_only=True, tag="load"):
    """Load a model with these parameters of llama.cpp."""

    shards: list[str]  # absolute paths, first shard first
    total_bytes: int
    can_map: bool = True  # the engine can use the weights in a mapping of the files
    check_tensors: bool
    devices: list[str]  # UUIDs of GPUs, in the order in which they take layers; empty: the CPU only
    layers: list[int]  # number of layers per device; the model's first layers, beyond their sum, stay on the CPU
    is_whole: bool = False  # no layer stays on the CPU
    serving: Serving = Serving()
    capabilities: dict[str, bool] | None = None  # of the chat template, if a load of these very files tried it before
    traceparent: str = ""  # of the runner's own span (W3C Trace Context)


class Measure(Struct, frozen=True, tag="measure"):
    """Do a dry run: report the memory that a load would take, without allocating it.

    A runner accepts any number of these before a Load.  If it has not started the engine's backend yet, it starts it
    for the GPUs of the first message and sees no other GPUs afterwards.  On a GPU, the process then holds the driver's
    context, as in a load.
    """

    load: Load


class Ping(Struct, frozen=True, tag="ping"):
    """Answer with a Pong."""


class CloseIfUnused(Struct, frozen=True, tag="close_if_unused"):
    """Begin no more requests if there was none since a time (seconds since the epoch), in the runner's own judgement.

    Answered with Closed or Busy.  A closed runner refuses requests until it gets an Open.
    """

    id: int  # of the answer
    since: float


class Close(Struct, frozen=True, tag="close"):
    """Begin no more requests.  Answered with Closed once the last request has ended."""

    id: int  # of the answer


class Open(Struct, frozen=True, tag="open"):
    """Begin requests again after a Close or a CloseIfUnused, which is not answered any more."""


class Stop(Struct, frozen=True, tag="stop"):
    """Exit at once, which is how a runner frees its memory."""


ToRunner = Load | Measure | Ping | CloseIfUnused | Close | Open | Stop

# ---- from the runner


class Warm(Struct, frozen=True, tag="warm"):
    """The engine is imported; the runner accepts a Load or a Measure."""

    engine: EngineBuild


class Pong(Struct, frozen=True, omit_defaults=True, tag="pong"):
    """The answer to a Ping, also while the engine is busy: the numbers of its requests, and the cells in use."""

    running: int = 0
    waiting: int = 0  # with those that are being prepared
    cells: int = 0  # of the KV cache, with those that are kept for later requests
    preemptions: int = 0  # since the load
    generated_tokens: int = 0  # since the load
    used_at: float = 0.0  # the end of the last request, in seconds since the epoch; now, while there is one; 0.0: never


class Closed(Struct, frozen=True, tag="closed"):
    """The runner begins no more requests, and has none."""

    id: int


class Busy(Struct, frozen=True, tag="busy"):
    """The runner has requests, or had one since the time of the CloseIfUnused.  It stays open."""

    id: int


class Progress(Struct, frozen=True, tag="progress"):
    """The progress of a load."""

    phase: Phase
    loaded_bytes: int  # never decreases


class Ready(Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is in memory and has decoded a token."""

    config: LoadConfig  # as read back from the engine
    timing: dict[Phase, float]  # seconds, disjoint
    files: list[FileStat]  # of each shard, when it was opened and, unchanged, at the end of the load
    usage: list[Usage]  # by device, then of the host; empty if this build of the engine does not report it
    capabilities: dict[str, bool] | None = None  # of the chat template; None: there is no chat


class Measured(Struct, frozen=True, tag="measured"):
    """The answer to a Measure.  The runner then waits for the next message."""

    usage: list[Usage]  # by device, then of the host


class Failed(Struct, frozen=True, tag="failed"):
    """The engine rejected the load, or the dry run; the runner exits after this message."""

    reason: str


FromRunner = Warm | Pong | Closed | Busy | Progress | Ready | Measured | Failed


frame: Callable[[ToRunner | FromRunner], bytes] = framing.frame
decode_to_runner: Callable[[bytes], ToRunner] = msgpack.Decoder(ToRunner).decode
decode_from_runner: Callable[[bytes], FromRunner] = msgpack.Decoder(FromRunner).decode
