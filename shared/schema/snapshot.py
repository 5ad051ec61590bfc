"""What workers publish about themselves, and the requests that API processes send to them.

New fields have defaults, so that processes of two versions can share one Redis.
"""

from __future__ import annotations

from msgspec import Struct

from shared.channel.address import Address
from shared.errors import ErrorBody
from shared.schema.http import EngineBuild, LoadRequest, WorkerState
from shared.schema.memory import Device, Holding
from shared.schema.model import Model


class WorkerSnapshot(Struct, frozen=True, kw_only=True, gc=False):
    """The state of a worker at its last beat."""

    name: str
    epoch: str
    version: str
    catalog: str  # digest of the catalog that the worker published last
    residents: int  # number of instances that are loaded, loading or queued
    state: WorkerState = "ready"  # a draining worker accepts no more loads
    devices: list[Device] = []
    held: list[Holding] = []
    taken: list[str] = []  # ids (`short`) of the loads that the worker placed or refused last
    partly_on_cpu: bool = False  # whether layers that do not fit on GPUs may go to the CPU
    lease_s: float = 0.0
    engine: EngineBuild | None = None
    channels: Address | None = None  # where API processes reach its runners; it has a secret
    problems: list[str] = []  # of the settings of its models, for its operator
    has_hub: bool = False  # whether it describes models of a hub


def short(id_: str) -> str:
    """Return the end of a load id, which is unique among the loads of a few seconds."""
    return id_[-8:]


class Sizing(Struct, frozen=True, kw_only=True):
    """A request for dry runs: the worker's engine reports the memory that a load would use on these GPUs."""

    request: LoadRequest
    key: str
    gpus: list[str]
    layers: list[int]
    source: Model | None = None  # the model of the key, as the API knows it (`Model.source`)
    context_lengths: list[int] = []  # one dry run for each; []: one, as requested


class Quantized(Struct, frozen=True):
    """A quantization that a repository has."""

    name: str
    size_bytes: int


class Described(Struct, frozen=True, kw_only=True):
    """What a worker learns of a model from the hub: also what else there is; or the error."""

    model: Model | None = None
    quantizations: list[Quantized] = []
    error: ErrorBody | None = None
