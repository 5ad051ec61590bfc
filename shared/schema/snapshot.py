"""What workers publish of themselves, and what an API asks them.

Tolerant between our own processes: a new field has a default, so that two versions can share one Redis."""

from __future__ import annotations

from msgspec import Struct

from shared.schema.http import LoadRequest, WorkerState
from shared.schema.memory import Device, Holding


class WorkerSnapshot(Struct, frozen=True, kw_only=True, gc=False):
    """A worker as it was at its last beat."""

    name: str
    epoch: str
    version: str
    catalog: str  # digest of the catalog it last published
    residents: int  # instances that it holds or has queued
    state: WorkerState = "ready"  # a draining one takes nothing more
    devices: list[Device] = []
    held: list[Holding] = []
    taken: list[str] = []  # the ends (`short`) of the ids of the loads that it has placed or refused last
    partly_on_cpu: bool = False  # where GPUs have no room for all layers, the CPU may take some
    lease_s: float = 0.0


def short(id_: str) -> str:
    """The end of a load's id, which tells it from others of the last seconds."""
    return id_[-8:]


class Sizing(Struct, frozen=True, kw_only=True):
    """What an API asks a worker's engine: what a load would take, on these GPUs."""

    request: LoadRequest
    key: str
    gpus: list[str]
    layers: list[int]
