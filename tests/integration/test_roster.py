"""The roster of an API process on a real Redis: known workers, absences, the choice for a load, and the list."""

from __future__ import annotations

import msgspec
import pytest
import redis
from msgspec import UNSET

import api.pool.roster
from api.pool.listing import Listing
from api.pool.roster import PENDING_S, Roster
from shared.errors import NoWorker
from shared.instance import Instance
from shared.schema.http import GPURequest, ListedModel, LoadRequest, ModelList
from shared.schema.memory import Device
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.keys import RETAIN_S
from shared.store.store import Store

MODEL = Model(key="p/m", base="p/m", variant="", shards=["p/m/m.gguf"], max_context_length=2048)


class Clock:
    """A monotonic clock for the roster that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(api.pool.roster, "time", clock)
    return clock


async def alive(store: Store, name: str, *, has_catalog: bool = True) -> None:
    digest = await store.workers.publish_catalog(name, [MODEL], "e") if has_catalog else ""
    await store.workers.renew(WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest or "", residents=0))


def remembered(roster: Roster) -> dict[str, object]:
    """Return all state of the roster that is not empty."""
    return {name: value for name, value in vars(roster).items() if isinstance(value, dict | list) and value}


async def test_the_roster_forgets_a_worker_that_redis_forgot(store: Store, raw: redis.Redis, clock: Clock) -> None:
    """In some pools each worker that starts has a new name."""
    roster = Roster(store.workers, Settings())
    for name, has_catalog in (("w", True), ("without-catalog", False)):
        await alive(store, name, has_catalog=has_catalog)
    await roster.refresh()
    instance = Instance(id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=LoadRequest(model="p/m"))
    roster.placed(instance, None)
    assert roster.models()
    for name in ("w", "without-catalog"):
        await store.workers.release(name, "e")
    await roster.refresh()
    clock.now += 1
    assert [roster.absent_s(name) for name in ("w", "without-catalog")] == [1, 1]
    raw.delete("workers", "catalog:w")
    clock.now += RETAIN_S + PENDING_S
    await roster.refresh()
    assert roster.models() == []
    assert remembered(roster) == {}


async def test_an_emptied_redis_does_not_remove_workers(store: Store, raw: redis.Redis, clock: Clock) -> None:
    roster = Roster(store.workers, Settings())
    await alive(store, "w")
    await roster.refresh()
    raw.flushall()
    await roster.refresh()
    clock.now += store.workers.lease_s / 2
    await roster.refresh()
    assert [*roster.catalogs] == ["w"]
    await alive(store, "w")
    await roster.refresh()
    assert (roster.absent_s("w"), [*roster.catalogs]) == (0, ["w"])


async def test_an_absence_counts_from_the_first_question(store: Store, raw: redis.Redis, clock: Clock) -> None:
    """The sweep uses this time, also for a worker that Redis does not know."""
    roster = Roster(store.workers, Settings())
    assert roster.absent_s("gone") == 0
    clock.now += 2 * store.workers.lease_s
    await roster.refresh()
    assert roster.absent_s("gone") == 2 * store.workers.lease_s


async def publish_with_gpu(store: Store, name: str, model_bytes: int, gpu_bytes: int) -> None:
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


async def test_a_load_is_placed_by_the_file_of_each_worker(store: Store) -> None:
    """Workers may have files of different sizes under one key: only `small` has room for its own file."""
    await publish_with_gpu(store, "large", 100, gpu_bytes=50)
    await publish_with_gpu(store, "other", 100, gpu_bytes=60)
    await publish_with_gpu(store, "small", 40, gpu_bytes=70)
    roster = Roster(store.workers, Settings())
    await roster.refresh()
    request = LoadRequest(model="p/m")
    candidates, _ = roster.candidates(request)
    assert sorted(one.worker for one in candidates) == ["large", "other", "small"]
    best, placement = roster.choose(candidates, request)
    assert best.worker == "small"
    assert placement is not None
    assert placement.bytes == {"GPU-small": 40}


def quantized(base: str, variant: str, bits: float, *, alone: bool = False, architecture: str = "llama") -> Model:
    return Model(
        key=base if alone else f"{base}@{variant}",
        base=base,
        variant=variant,
        shards=[f"{base}/{variant}.gguf"],
        bits_per_weight=bits,
        architecture=architecture,
        size_bytes=int(bits * 1000),
        max_context_length=512,
    )


async def publish_models(store: Store, catalogs: dict[str, list[Model]]) -> Roster:
    for name, models in catalogs.items():
        digest = await store.workers.publish_catalog(name, models, "e")
        assert digest is not None
        await store.workers.renew(WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest, residents=0))
    roster = Roster(store.workers, Settings())
    await roster.refresh()
    return roster


async def test_a_plain_key_means_one_variant_in_the_pool(store: Store) -> None:
    """It is the one that the list names, unless the request is limited to a worker without it."""
    few, many = quantized("p/m", "q4_0", 4.5), quantized("p/m", "q8_0", 8.5)
    alone = msgspec.structs.replace(many, key="p/m")
    roster = await publish_models(store, {"has-both": [few, many], "has-many": [alone]})

    def workers(model: str, gpu: GPURequest | None = None) -> list[tuple[str, str]]:
        candidates, _ = roster.candidates(LoadRequest(model=model, gpu=gpu or UNSET))
        return sorted((one.worker, one.model.variant) for one in candidates)

    assert workers("p/m") == [("has-both", "q4_0")]
    assert workers("p/m@q8_0") == [("has-both", "q8_0"), ("has-many", "q8_0")]
    assert workers("p/m", GPURequest(worker="has-many")) == [("has-many", "q8_0")]
    (entry,) = await entries_of(roster, store)
    assert (entry.key, entry.variants, entry.selected_variant) == ("p/m", ["p/m@q4_0", "p/m@q8_0"], "p/m@q4_0")
    assert (entry.size_bytes, entry.quantization.bits_per_weight) == (4500, 4)


async def entries_of(roster: Roster, store: Store) -> list[ListedModel]:
    return msgspec.json.decode(await Listing(roster, store.instances).models(), type=ModelList).models


async def test_a_copy_whose_name_tells_no_variant_is_used_too(store: Store) -> None:
    named = quantized("p/m", "q4_0", 4.5, alone=True)
    renamed = msgspec.structs.replace(named, variant="", shards=["p/m/model.gguf"])
    roster = await publish_models(store, {"named": [named], "renamed": [renamed]})
    candidates, _ = roster.candidates(LoadRequest(model="p/m"))
    assert sorted(one.worker for one in candidates) == ["named", "renamed"]
    (entry,) = await entries_of(roster, store)
    assert (entry.key, entry.variants, entry.selected_variant) == ("p/m", ["p/m@q4_0"], "p/m@q4_0")


async def test_other_models_of_a_folder_are_entries_of_their_own(store: Store) -> None:
    """The plain key loads one model, so that one is its entry; each other name that loads is listed as well."""
    mixed = [quantized("p/m", name, bits) for name, bits in (("a-q4_0", 4.5), ("a-q8_0", 8.5))]
    mixed.append(quantized("p/m", "b-q4_0", 4.6, architecture="bert"))
    roster = await publish_models(store, {"w": mixed})
    entries = await entries_of(roster, store)
    assert {entry.key: (entry.architecture, entry.variants, entry.selected_variant) for entry in entries} == {
        "p/m": ("llama", ["p/m@a-q4_0", "p/m@a-q8_0"], "p/m@a-q4_0"),
        "p/m@b-q4_0": ("bert", ["p/m@b-q4_0"], "p/m@b-q4_0"),
    }


async def test_the_error_says_whether_a_worker_drains_or_is_away(store: Store) -> None:
    for name, state in (("drains", "draining"), ("has-none", "ready"), ("left", "ready")):
        models = [] if name == "has-none" else [MODEL]
        digest = await store.workers.publish_catalog(name, models, "e")
        assert digest is not None
        snapshot = WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest, residents=0)
        await store.workers.renew(msgspec.structs.replace(snapshot, state=state))
    roster = Roster(store.workers, Settings())
    await roster.refresh()
    await store.workers.release("left", "e")
    await roster.refresh()

    def error(worker: str = "") -> str:
        request = LoadRequest(model="p/m", gpu=GPURequest(worker=worker) if worker else UNSET)
        candidates, known = roster.candidates(request)
        assert candidates == []
        found = roster.nowhere(request, known)
        assert isinstance(found, NoWorker)
        return str(found)

    assert error() == "No worker accepts p/m now: draining: 'drains'. Try again shortly."
    assert error("drains") == "Worker 'drains' is draining and accepts no new loads. Try again shortly."
    assert error("left") == "Worker 'left' is not available. Try again shortly."
    assert error("has-none") == "Worker 'has-none' does not have p/m."
    await store.workers.release("drains", "e")
    await roster.refresh()
    assert error() == "No available worker has p/m. Try again shortly."
