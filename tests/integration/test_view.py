"""The view of the loaded instances that requests are routed by, on a real Redis."""

from __future__ import annotations

import pytest
import redis as blocking

from api.pool.loaded import Loaded
from api.pool.roster import Roster
from api.pool.view import View
from shared.channel.address import Address, Tcp
from shared.errors import ModelNotLoaded
from shared.instance import Instance
from shared.lifecycle import Event
from shared.schema.memory import Holding
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.connection import UNAVAILABLE
from shared.store.store import Store
from tests.integration.test_sweep import loaded as load

MODEL = Model(key="p/m", base="p/m", variant="", shards=["m.gguf"])


class Process:
    """What an API process routes by."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.roster = Roster(store.workers, Settings())
        self.view = View(self.roster, store.instances)
        self.loaded = Loaded(self.roster, self.view)

    async def beat(self) -> None:
        heads = await self.store.instances.heads()
        await self.roster.refresh()
        await self.view.follow(heads)

    async def ask(self, name: str | None = "p/m", without: tuple[str, ...] = ()) -> str:
        return (await self.loaded.instance(name, lambda _: 0, without)).instance_id


async def alive(store: Store, name: str = "w", held: str = "", *models: Model, has_port: bool = True) -> None:
    """Publish a worker.  `has_port`: this process can reach it."""
    digest = await store.workers.publish_catalog(name, [*(models or (MODEL,))], "e")
    holdings = [Holding(instance_id=held, key="p/m", devices={}, used_at=1.0, is_evictable=True)] if held else []
    port = Tcp(host=name, port=1, certificate=b"") if has_port else None
    address = Address(path="/on/its/own/host", boot_id="another", secret=b"", tcp=port)
    await store.workers.renew(
        WorkerSnapshot(
            name=name, epoch="e", version="0", catalog=digest or "", residents=0, channels=address, held=holdings
        )
    )


@pytest.fixture
async def process(store: Store) -> Process:
    await alive(store)
    process = Process(store)
    await process.beat()
    return process


async def unload(store: Store, instance: Instance) -> None:
    stopping, _ = await store.instances.commit(instance, instance.after(Event.STOP))
    await store.instances.commit(stopping, stopping.after(Event.EXIT))


async def test_a_client_finds_at_once_what_it_has_loaded(process: Process) -> None:
    """It loaded the model through another process, and this one has heard nothing yet."""
    with pytest.raises(ModelNotLoaded):
        await process.ask()
    await load(process.store, 1)
    assert await process.ask() == "p/m"
    assert await process.ask(None) == "p/m"


async def test_a_loaded_instance_is_found_without_redis(process: Process) -> None:
    await load(process.store, 1)
    await process.beat()
    await process.store.redis.aclose()
    process.store.redis.connection_pool.connection_kwargs["path"] = "/nowhere"
    assert [await process.ask(name) for name in ("p/m", "P/M", None)] == ["p/m"] * 3
    with pytest.raises(UNAVAILABLE):
        await process.ask("p/other")


async def test_an_instance_that_was_unloaded_is_not_asked(process: Process) -> None:
    one = await load(process.store, 1)
    await process.beat()
    await unload(process.store, one)
    process.view.changed(one.id)
    with pytest.raises(ModelNotLoaded):
        await process.ask()


async def test_a_beat_notices_what_was_missed(process: Process) -> None:
    one = await load(process.store, 1)
    await process.beat()
    await unload(process.store, one)
    await process.beat()
    with pytest.raises(ModelNotLoaded):
        await process.ask()


async def test_only_copies_in_reach_are_asked_while_there_is_one(process: Process) -> None:
    await alive(process.store, "far", has_port=False)
    await load(process.store, 1)
    far = await load(process.store, 2, "far")
    await process.beat()
    assert {await process.ask() for _ in range(9)} == {"p/m"}
    assert await process.ask(without=("load_1",)) == far.instance_id


async def test_an_emptied_redis_ends_no_instance_that_its_worker_holds(process: Process, raw: blocking.Redis) -> None:
    await load(process.store, 1)
    await process.beat()
    raw.flushall()
    await process.beat()
    assert await process.ask() == "p/m", "the worker was there a lease ago"
    await alive(process.store, held="p/m")
    await process.beat()
    assert await process.ask() == "p/m", "its worker holds it"
    await alive(process.store)
    await process.beat()
    with pytest.raises(ModelNotLoaded):
        await process.ask()
