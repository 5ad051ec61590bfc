"""Placement among a thousand workers finds the only worker with room."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shared.memory.choose import Host, choose
from shared.memory.placement import Constraints, Demand
from shared.schema.memory import CPU, Device, Holding
from shared.schema.snapshot import WorkerSnapshot
from tests.unit.test_placement import requiring

N_WORKERS, THE_ONE = 1000, 777
LAYERS = Demand(requiring(*[10] * 40), Constraints(), "p/other")


def pool(rooms: Callable[[bool], list[int]], idle: int = 0) -> list[WorkerSnapshot]:
    """Return workers whose GPUs have the free bytes of `rooms(False)`, one of them of `rooms(True)`.  Each holds an
    evictable instance of `idle` bytes on its first GPU; that of the one worker was used last."""
    workers = []
    for i in range(N_WORKERS):
        gpus = [
            Device(id=f"GPU-{i}-{k}", kind="gpu", name="", total_bytes=1000, free_bytes=0, available_bytes=room)
            for k, room in enumerate(rooms(i == THE_ONE))
        ]
        cpu = Device(id=CPU, kind="cpu", name="", total_bytes=1000, free_bytes=1000, available_bytes=1000)
        used_at = 1e9 if i == THE_ONE else float(i)
        held = Holding(instance_id=f"{i}", key="p/m", devices={gpus[0].id: idle}, used_at=used_at, is_evictable=True)
        workers.append(
            WorkerSnapshot(
                name=f"{i:04}", epoch="", version="", catalog="", residents=1, devices=[*gpus, cpu], held=[held]
            )
        )
    return workers


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(pool(lambda is_it: [399, 400 if is_it else 399]), id="on one GPU"),
        pytest.param(pool(lambda is_it: [100, 105, 100 if is_it else 99, 100]), id="on several, for whole layers"),
        pytest.param(pool(lambda is_it: [10 if is_it else 9, 380], idle=10), id="after an eviction"),
    ],
)
def test_the_only_worker_with_room_is_chosen_of_a_thousand(workers: list[WorkerSnapshot]) -> None:
    """The other workers may have enough bytes in total, but not for whole layers."""
    assert choose([(Host(one), LAYERS) for one in workers]) == THE_ONE


@pytest.mark.parametrize("idle", [0, 9])
def test_no_worker_is_chosen_without_room_for_whole_layers(idle: int) -> None:
    workers = pool(lambda _: [109 - idle, 109, 109, 99], idle)
    assert choose([(Host(one), LAYERS) for one in workers]) is None
