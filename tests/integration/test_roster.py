"""The roster of an API process, on a real Redis: what it knows of workers, and the worker that it gives a load to."""

from __future__ import annotations

from api.pool.roster import Roster
from shared.schema.http import LoadRequest
from shared.schema.memory import Device
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.store import Store


async def publish(store: Store, name: str, model_bytes: int, gpu_bytes: int) -> None:
    """Publish a worker with one GPU and one model, `p/m`, of these sizes."""
    model = Model(key="p/m", base="p/m", variant="", shards=[], size_bytes=model_bytes, max_context_length=512)
    digest = await store.workers.publish_catalog(name, [model], "e")
    assert digest is not None
    gpu = Device(
        id=f"GPU-{name}", kind="gpu", name="", total_bytes=gpu_bytes, free_bytes=gpu_bytes, available_bytes=gpu_bytes
    )
    await store.workers.renew(
        WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest, residents=0, devices=[gpu])
    )


async def test_a_load_takes_what_the_file_of_its_worker_takes(store: Store) -> None:
    """Workers may have files of different sizes under one key: here only `small` has room for its own."""
    await publish(store, "large", 100, gpu_bytes=50)
    await publish(store, "other", 100, gpu_bytes=60)
    await publish(store, "small", 40, gpu_bytes=70)
    roster = Roster(store, Settings())
    await roster.refresh()
    request = LoadRequest(model="p/m")
    candidates, _ = roster.candidates(request)
    assert sorted(one.worker for one in candidates) == ["large", "other", "small"]
    best, placement = roster.choose(candidates, request)
    assert best.worker == "small"
    assert placement is not None
    assert placement.bytes == {"GPU-small": 40}
