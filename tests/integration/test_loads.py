"""Choosing a worker, on a real Redis."""

from __future__ import annotations

from collections import Counter

import pytest

from api.loads.follow import Follower
from api.loads.submit import Loads
from api.pool.roster import Roster
from shared.errors import LoadFailed
from shared.schema.http import LoadRequest
from shared.schema.model import Model, Problem
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.store import Store

MODEL = Model(key="p/m", base="p/m", variant="", shards=["p/m/m.gguf"], max_context_length=2048)
BROKEN = Model(
    key="p/m", base="p/m", variant="", shards=["p/m/m.gguf"], problem=Problem(code="invalid_model_file", message="why")
)


async def alive(store: Store, name: str, model: Model, residents: int = 0) -> None:
    digest = await store.workers.publish_catalog(name, [model], "e")
    await store.workers.renew(
        WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest or "", residents=residents)
    )


@pytest.fixture
def loads(store: Store) -> Loads:
    return Loads(Settings(), store, Roster(store, Settings()), Follower(store))


async def test_loads_at_once_are_spread_over_the_workers(store: Store, loads: Loads) -> None:
    """Snapshots are up to a beat old: what was placed since then counts too."""
    for name in ("w", "another"):
        await alive(store, name, MODEL)
    placed = [(await loads.submit(LoadRequest(model="p/m"))).worker for _ in range(6)]
    assert Counter(placed) == {"w": 3, "another": 3}


async def test_the_worker_that_holds_least_is_chosen(store: Store, loads: Loads) -> None:
    await alive(store, "another", MODEL, residents=2)
    await alive(store, "w", MODEL, residents=1)
    assert (await loads.submit(LoadRequest(model="p/m"))).worker == "w"


async def test_a_worker_that_can_read_the_file_is_chosen_over_one_that_cannot(store: Store, loads: Loads) -> None:
    await alive(store, "another", BROKEN)
    await alive(store, "w", MODEL, residents=9)
    assert (await loads.submit(LoadRequest(model="p/m"))).worker == "w"


async def test_a_file_that_no_worker_can_read_is_refused_with_the_reason(store: Store, loads: Loads) -> None:
    await alive(store, "w", BROKEN)
    with pytest.raises(LoadFailed, match="why"):
        await loads.submit(LoadRequest(model="p/m"))
    assert await store.instances.live() == []
