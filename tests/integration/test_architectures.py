"""Whether a load fits, compared with what the engine takes, for tiny models of nearly all architectures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from api.loads.departures import Departures
from api.loads.records import Records
from api.loads.submit import Intake
from api.pool.estimate import estimated
from api.pool.roster import Roster
from api.pool.sweep import Sweep
from api.pool.view import View
from shared.errors import LoadFailed
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.memory.estimate import NEAR, Requirements, requirements_of
from shared.memory.plan import plan
from shared.schema.http import EstimateResult, LoadRequest
from shared.schema.memory import CPU, Device, Holding
from shared.schema.model import Model
from shared.schema.snapshot import Sizing, WorkerSnapshot
from shared.settings import Settings
from shared.store.store import Store
from tests.integration.conftest import catalog
from tests.support import architectures
from tests.support.noalloc import load, measured
from tests.support.waiting import no_runners, until
from worker.agent import Agent
from worker.deliveries import take_deliveries
from worker.memory.nvml import Reading

pytestmark = pytest.mark.usefixtures("forkserver")

EPOCH = "e"  # of the lease of "w"
GIB = 1 << 30
LONGEST = 100_000  # tokens: a length at which a wrong formula is far off
ALL = [*architectures.DESCRIBED]
GROUPS = [ALL[i::4] for i in range(4)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ALL:
        has_positions = "position_embd.weight" in architectures.DESCRIBED[name]["tensors"]  # one for each token
        longer = {} if has_positions else {"context_length": LONGEST}
        architectures.write(root / f"p/{name}/m.gguf", name, **longer)
    return root


@pytest.fixture(scope="module")
def models(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The models by architecture."""
    by_key = catalog(root, tmp_path_factory.mktemp("catalog"))
    return {name: by_key[f"p/{name}"] for name in ALL}


def test_the_formula_is_near_where_a_load_may_skip_the_dry_run(root: Path, models: dict[str, Model]) -> None:
    cases = [
        (name, length, n_gpus)
        for name in sorted(NEAR)
        for length in ((512, 4096, 65_536) if models[name].type == "llm" else (512, 4096))
        for n_gpus in ((0, 1) if length == 4096 else (0,))
    ]
    loads, formulas = [], []
    for name, length, n_gpus in cases:
        planned = plan(LoadRequest(model=name, context_length=length), models[name], Settings())
        formulas.append(requirements_of(models[name], planned))
        shards = [root / shard for shard in models[name].shards]
        loads.append(load(shards, planned, [formulas[-1].n_layers] * n_gpus))
    for (name, length, n_gpus), formula, usage in zip(cases, formulas, measured(loads), strict=True):
        assert formula.is_near(n_gpus, 0)
        estimate = formula.on_gpu("", 0, formula.n_layers) if n_gpus else formula.on_cpu()
        ratio = estimate.total_bytes / usage[0].total_bytes
        assert ratio == pytest.approx(1, abs=0.25), (name, length, n_gpus)


# ---- a worker with so much memory


def by_formula(model: Model, context_length: int) -> Requirements:
    return requirements_of(model, plan(LoadRequest(model=model.key, context_length=context_length), model, Settings()))


def is_unchecked(model: Model, context_length: int) -> bool:
    return not by_formula(model, context_length).exact


class Host:
    """A worker whose host has so much memory, and an API."""

    def __init__(self, agent: Agent, roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.agent = agent
        self.roster = roster
        self.monkeypatch = monkeypatch

    async def has(self, free_bytes: int) -> None:
        """Let the host have so much memory."""
        reading = Reading(id=CPU, is_gpu=False, name="CPU", total_bytes=free_bytes, free_bytes=free_bytes)
        self.monkeypatch.setattr(self.agent.devices, "read", lambda: [reading])
        await self.agent.beat_once()

    async def estimate(self, key: str, **fields: Any) -> EstimateResult:
        request = LoadRequest(model=key, **fields)
        return await estimated(request, self.roster, self.agent.store.queue)

    async def engine(self, model: Model, context_lengths: list[int]) -> list[int]:
        """Return the bytes that the engine reports for each context length, with the weights as they are mapped."""
        request = LoadRequest(model=model.key)
        sizing = Sizing(request=request, key=model.key, gpus=[], layers=[], context_lengths=context_lengths)
        usages = await self.agent.dry_run.measured(sizing)
        assert usages is not None
        weights_bytes = by_formula(model, 256).on_cpu().weights_bytes
        return [weights_bytes + usage.context_bytes + usage.compute_bytes for (usage,) in usages]

    async def takes(self, model: Model, context_length: int) -> int:
        """Return the bytes that a load takes by its estimate."""
        await self.has(1 << 50)
        result = await self.estimate(model.key, context_length=context_length)
        assert result.fits
        return result.total_bytes

    async def is_placed(self, model: Model, context_length: int) -> bool:
        """Return whether the worker has room for a load; gives the room back."""
        request = LoadRequest(model=model.key, context_length=context_length)
        instance = Instance(id="load", model=model.key, key=model.key, type=model.type, worker="w", request=request)
        placed = await self.agent.placer.place(instance, model)
        self.agent.placer.ledger.release(instance.id)
        return placed is not None

    async def load(self, key: str, **fields: Any) -> Instance:
        """Load a model; return its record once it is loaded, failed or refused."""
        store, model = self.agent.store.instances, self.agent.models[key]
        request = LoadRequest(model=key, **fields)
        made = await store.create(
            Instance(id=f"load_{key}", model=key, key=key, type=model.type, worker="w", request=request)
        )
        self.agent.deliver(made.id)

        async def is_over() -> bool:
            now = await store.get(made.id)
            return now is not None and (now.state in (State.LOADED, State.FAILED) or now.refused != [])

        await until(is_over, f"{key} is over", within_s=60)
        record = await store.get(made.id)
        assert record is not None
        return record


@pytest.fixture
async def host(
    store: Store, root: Path, models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Host]:
    settings = Settings(worker_name="w", models_dir=root, data_dir=tmp_path, device_reserve="0", restore="off")
    agent = Agent(settings, store, EPOCH)
    await agent.publish([*models.values()])
    roster = Roster(store.workers, settings)
    answering = asyncio.create_task(take_deliveries(store.redis, agent))
    yield Host(agent, roster, monkeypatch)
    answering.cancel()
    await asyncio.wait([answering])
    await agent.drain()
    await agent.runners.close()
    await until(no_runners, "all runners gone")


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
async def test_a_load_fits_exactly_if_there_is_room(group: list[str], models: dict[str, Model], host: Host) -> None:
    """The estimate, its largest context and the placement of a load agree, and with the engine to the byte."""
    for name in group:
        model = models[name]
        length = model.max_context_length if model.type == "llm" else 4096
        needed = await host.takes(model, length)

        await host.has(needed)
        there = await host.estimate(model.key, context_length=length)
        assert (there.fits, there.total_bytes, there.exact) == (True, needed, True), name
        assert (there.max_context_length_that_fits or 0) >= length, name
        assert await host.is_placed(model, length), name

        await host.has(needed - 1)
        short = await host.estimate(model.key, context_length=length)
        assert (short.fits, short.total_bytes, short.exact) == (False, needed, True), name
        assert not await host.is_placed(model, length), name
        largest = short.max_context_length_that_fits
        assert (largest or 0) < length, name
        longer = min((largest or 0) + 256, length)
        at_largest, at_longer = await host.engine(model, [largest or 256, longer])
        error = 0.0 if is_unchecked(model, length) else 0.03
        assert largest is None or at_largest < needed * (1 + error), name
        assert at_longer >= needed * (1 - error), name


@pytest.mark.parametrize("name", ["qwen35", "deepseek2", "gemma4", "llada"])
async def test_a_load_that_the_formula_would_refuse_fits(name: str, models: dict[str, Model], host: Host) -> None:
    """The formula counts a cache for every layer, head and token."""
    model, length = models[name], 65_536
    needed = await host.takes(model, length)
    assert by_formula(model, length).on_cpu().total_bytes > 1.2 * needed
    await host.has(needed + needed // 20)
    loaded = await host.load(model.key, context_length=length)
    assert loaded.state is State.LOADED, loaded.error
    (device,) = host.agent.placer.devices()
    assert device.reserved_bytes == needed
    assert device.available_bytes >= 0


@pytest.mark.parametrize("name", ["t5encoder", "grok", "mamba2", "gemma-embedding"])
async def test_a_load_that_the_formula_would_accept_is_refused(name: str, models: dict[str, Model], host: Host) -> None:
    """The formula knows neither the state of recurrent layers nor attention without flash attention."""
    model, length = models[name], 4096
    needed = await host.takes(model, length)
    formula = by_formula(model, length).on_cpu().total_bytes
    assert formula < 0.9 * needed
    await host.has((formula + needed) // 2)
    refused = await host.load(model.key, context_length=length)
    assert refused.refusal is not None
    assert isinstance(refused.refusal.detail, dict)
    assert refused.refusal.detail["needed_bytes"] == needed
    largest = refused.refusal.detail["largest_context_length"]
    assert largest == (await host.estimate(model.key, context_length=length)).max_context_length_that_fits
    if isinstance(largest, int):
        assert largest < length
        assert (await host.estimate(model.key, context_length=largest)).fits


async def test_an_embedder_loads_without_a_context_length(models: dict[str, Model], host: Host) -> None:
    """Its whole context as one batch would take hundreds of gigabytes."""
    model = models["llama-embed"]
    await host.has(GIB)
    loaded = await host.load(model.key)
    assert loaded.state is State.LOADED, loaded.refusal
    assert loaded.load_config is not None
    assert loaded.load_config.context_length == 8192


async def test_a_near_formula_asks_no_engine_with_twice_the_room(
    models: dict[str, Model], host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run of a large vocabulary would take as long as the load of a small model."""
    near, far, length = models["olmo2"], models["qwen35"], 4096
    asked: list[str] = []

    async def ask(sizing: Sizing) -> None:
        asked.append(sizing.key)

    monkeypatch.setattr(host.agent.placer, "_ask", ask)
    await host.has(2 * by_formula(near, length).on_cpu().total_bytes)
    assert await host.is_placed(near, length)
    assert asked == []
    await host.has(2 * by_formula(near, length).on_cpu().total_bytes - 1)
    assert await host.is_placed(near, length)
    await host.has(GIB)
    assert await host.is_placed(far, length)
    assert asked == [near.key, far.key]


# ---- a pool of two workers


async def publish(host: Host, name: str, available_bytes: int, *held: Holding) -> None:
    """Publish a worker whose CPU has so much memory for loads."""
    workers = host.agent.store.workers
    digest = await workers.publish_catalog(name, [*host.agent.models.values()], EPOCH)
    device = Device(
        id=CPU, kind="cpu", name="", total_bytes=GIB, free_bytes=available_bytes, available_bytes=available_bytes
    )
    await workers.renew(
        WorkerSnapshot(
            name=name,
            epoch=EPOCH,
            version="0",
            catalog=digest or "",
            residents=len(held),
            devices=[device],
            held=[*held],
        )
    )


async def test_no_worker_evicts_while_another_has_room(models: dict[str, Model], host: Host) -> None:
    """By the formula the model fits on neither worker, and only one of them can make room."""
    model, length = models["qwen35"], 65_536
    needed = await host.takes(model, length)
    idle = Holding(instance_id="idle", key="p/llama", devices={CPU: GIB}, used_at=1.0, is_evictable=True)
    await publish(host, "w", needed // 2, idle)
    await publish(host, "another", needed)
    store = host.agent.store
    await host.roster.refresh()
    intake = Intake(
        host.roster,
        store.queue,
        store.instances,
        Records(store.instances),
        Departures(store.instances),
        at_most=(128, 1024),
    )
    accepted = await intake.submit(LoadRequest(model=model.key, context_length=length))
    assert accepted.worker == "another"
    estimate = await host.estimate(model.key, context_length=length)
    assert (estimate.fits, estimate.evicts, {device.worker for device in estimate.devices}) == (True, [], {"another"})


async def test_a_refused_load_goes_where_the_engine_says_it_fits(models: dict[str, Model], host: Host) -> None:
    model, length = models["qwen35"], 65_536
    needed = await host.takes(model, length)
    store = host.agent.store
    request = LoadRequest(model=model.key, context_length=length)
    for number, (room, worker, state) in enumerate(
        ((needed, "w", State.QUEUED), (needed - 1, "another", State.FAILED))
    ):
        await publish(host, "w", room)
        await publish(host, "another", 0)
        made = await store.instances.create(
            Instance(id=f"load_{number}", model=model.key, key=model.key, type="llm", worker="another", request=request)
        )
        claimed, _ = await store.instances.commit(made, made.after(Event.CLAIM, epoch=EPOCH))
        refusal = LoadFailed("insufficient_memory", "llm", model.key, "no room").body()
        await store.instances.commit(claimed, claimed.after(Event.REQUEUE, refused=["another"], refusal=refusal))
        sweep = Sweep(
            host.roster,
            View(host.roster, store.instances),
            store.instances,
            store.queue,
            store.listen,
            lease_s=0.0,
            load_attempts=3,
        )
        await sweep.beat()
        record = await store.instances.get(made.id)
        assert record is not None
        assert (record.worker, record.state) == (worker, state)
