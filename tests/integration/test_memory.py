"""Insufficient memory, detected at any stage, fails only its load, with numbers in the error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import worker.instance
import worker.runner.warm
from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.settings import Settings
from shared.store.store import Store
from shared.synthetic.architectures import TINY
from shared.synthetic.models import tiny_llama
from tests.support import gpus, waiting
from tests.support.fakehosts import FakeHost
from tests.support.runners import freeze, is_gone, slept
from tests.support.waiting import no_runners
from worker.agent import Agent
from worker.memory.host import host_memory, oom_kills
from worker.runner.process import Runner

pytestmark = pytest.mark.usefixtures("forkserver")

DEADLINE_S = 60.0
until = partial(waiting.until, within_s=DEADLINE_S)
EPOCH = "e"  # of the lease of "w"
MIB = 1 << 20
SMALL, LONG, WIDE = "p/small", "p/long", "p/wide"
LONG_TOKENS = MIB // 4
KV_BYTES = LONG_TOKENS << 10  # of the cache of LONG; the compute buffer is as large again


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that fits anywhere, a model with a large context, and a model with large weights."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / f"{SMALL}/m.gguf")
    tiny_llama(root / f"{LONG}/m.gguf", metadata={"llama.context_length": LONG_TOKENS})
    tiny_llama(root / f"{WIDE}/m.gguf", shape=replace(TINY, embedding_length=256, feed_forward_length=1024))
    return root


@pytest.fixture
async def agent(store: Store, models: dict[str, Model], models_dir: Path, tmp_path: Path) -> AsyncIterator[Agent]:
    """Worker "w", which acts only when a test calls it."""
    created = Agent(Settings(worker_name="w", models_dir=models_dir, data_dir=tmp_path), store, EPOCH)
    await created.publish([*models.values()])
    yield created
    await ended(created)


async def ended(agent: Agent) -> None:
    await agent.drain()
    await agent.runners.close()
    await until(no_runners, "all runners gone")


class Held:
    """The instances of a test and their runners."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.runners: dict[str, Runner] = {}  # by instance id
        self.number = 0

    async def warm(self) -> Runner:
        """Return the runner that the next load will take."""
        async with asyncio.timeout(DEADLINE_S):
            await self.agent.warm()
        assert self.agent.runners.next_runner is not None
        return self.agent.runners.next_runner.result()

    async def begun(self, key: str, context_length: int) -> str:
        self.number += 1
        model = self.agent.models[key]
        created = await self.agent.store.instances.create(
            Instance(
                id=f"load_{self.number}",
                model=key,
                key=key,
                type="llm",
                worker="w",
                request=LoadRequest(model=key, context_length=context_length),
                total_size_bytes=model.size_bytes,
            )
        )
        self.agent.deliver(created.id)
        return created.id

    async def record(self, id_: str) -> Instance:
        instance = await self.agent.store.instances.get(id_)
        assert instance is not None
        return instance

    async def outcome(self, id_: str) -> Instance:
        """Return the record once the load is over."""

        async def is_over() -> bool:
            return (await self.record(id_)).state in TERMINAL | {State.LOADED}

        await until(is_over, f"{id_} is over")
        return await self.record(id_)

    async def loaded(self, key: str = SMALL, context_length: int = 256) -> Instance:
        runner = await self.warm()
        instance = await self.outcome(await self.begun(key, context_length))
        assert instance.state is State.LOADED, instance.error
        self.runners[instance.id] = runner
        return instance

    async def refused(self, key: str, context_length: int, words: str = "") -> tuple[Instance, dict[str, Any]]:
        """Start a load without enough memory; return its record and the detail of its error."""
        runner = await self.warm()
        instance = await self.outcome(await self.begun(key, context_length))
        return instance, self.check_short(instance, runner, words)

    def check_short(self, instance: Instance, runner: Runner, words: str) -> dict[str, Any]:
        assert instance.state is State.FAILED
        assert instance.error is not None
        assert (instance.error.type, instance.error.code) == ("model_load_failed", "insufficient_memory"), (
            instance.error
        )
        assert words in instance.error.message
        assert " needed, " in instance.error.message
        assert is_gone(runner.pid)
        assert isinstance(instance.error.detail, dict)
        detail: dict[str, Any] = instance.error.detail
        assert detail.keys() >= {"needed_bytes", "devices"}
        assert isinstance(detail["needed_bytes"], int)
        assert detail["needed_bytes"] > 0
        assert [device.keys() for device in detail["devices"]] == [
            {"id", "total_bytes", "free_bytes", "available_bytes", "used_by_others_bytes", "instances"}
        ]
        return detail

    async def check_untouched(self) -> None:
        """Check that the loaded instances are still loaded, by the same runners."""
        for id_, runner in self.runners.items():
            assert (await self.record(id_)).state is State.LOADED
            assert not is_gone(runner.pid)


@pytest.fixture
async def held(agent: Agent) -> AsyncIterator[Held]:
    """One loaded instance, which must still be loaded after the test."""
    instances = Held(agent)
    await instances.loaded()
    yield instances
    await instances.check_untouched()


# ---- address space


def size_of(runner: Runner) -> int:
    """Return the address space of a process in bytes."""
    return int(Path(f"/proc/{runner.pid}/statm").read_text().split()[0]) * resource.getpagesize()


def check_host(device: dict[str, Any], instances: list[str]) -> None:
    """Check the numbers of a machine without GPUs."""
    assert (device["id"], device["instances"]) == ("CPU", instances)
    assert device["total_bytes"] == host_memory().total_bytes
    assert 0 < device["free_bytes"] <= device["total_bytes"]


async def test_a_limit_on_address_space_is_insufficient_memory(held: Held) -> None:
    """The limit is met at the mapping of the file, the KV cache, or the compute buffer, where the engine aborts."""
    for spare_mib in (0, 1, 8, 64, 280, 300):
        runner = await held.warm()
        await slept(runner)
        limit = size_of(runner) + spare_mib * MIB
        resource.prlimit(runner.pid, resource.RLIMIT_AS, (limit, limit))
        _, detail = await held.refused(LONG, LONG_TOKENS)
        check_host(detail["devices"][0], [SMALL])
        assert "largest_context_length" not in detail, "by the free memory of the host this context fits"
        if spare_mib == 64:
            assert detail["needed_bytes"] == KV_BYTES, "the size of the refused allocation"
        await held.check_untouched()
    await held.loaded(LONG, 256)  # the refusals leave no trace


# ---- the kernel's out-of-memory killer


class Cgroup:
    """A small memory cgroup within the cgroup of this process.  Raises OSError if it cannot be created."""

    def __init__(self) -> None:
        within, limit, swap = self._place()
        self.folder = within / f"loadstone-{os.getpid()}"
        self.folder.mkdir()
        try:
            (self.folder / "cgroup.procs").read_text()  # fails if this is not a cgroup file system
            (self.folder / limit).write_text(str(32 * MIB))
            with contextlib.suppress(OSError):  # swap accounting may be off
                (self.folder / swap).write_text("0" if swap == "memory.swap.max" else str(32 * MIB))
        except OSError:
            self.folder.rmdir()
            raise

    @staticmethod
    def _place() -> tuple[Path, str, str]:
        """Return the cgroup of this process and its limit files of memory and swap, of version 1 if it has memory."""
        root = Path("/sys/fs/cgroup")
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        ours = {controller: path[1:] for _, controllers, path in lines for controller in controllers.split(",")}
        if "memory" in ours:
            return root / "memory" / ours["memory"], "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
        return root / ours.get("", ""), "memory.max", "memory.swap.max"

    async def strike(self, held: Held, runner: Runner) -> str:
        """Start a load that exceeds the limit of its runner, so that the kernel kills it."""
        (self.folder / "cgroup.procs").write_text(str(runner.pid))
        before = oom_kills()
        id_ = await held.begun(LONG, LONG_TOKENS)
        await held.outcome(id_)
        assert oom_kills() > before
        return id_

    def close(self) -> None:
        self.folder.rmdir()


class SimulatedKill:
    """Stands in for a cgroup that cannot be created: kills the runner and increments the kernel's counter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    async def strike(self, held: Held, runner: Runner) -> str:
        await freeze(runner)
        id_ = await held.begun(LONG, LONG_TOKENS)

        async def is_loading() -> bool:
            return (await held.record(id_)).phase is not None

        await until(is_loading, "the instance is loading")
        self.monkeypatch.setattr(worker.instance, "oom_kills", lambda: oom_kills() + 1)
        os.kill(runner.pid, signal.SIGKILL)
        return id_

    def close(self) -> None:
        pass


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cgroup | SimulatedKill]:
    chosen: Cgroup | SimulatedKill
    try:
        chosen = Cgroup()
    except OSError:
        chosen = SimulatedKill(monkeypatch)
    yield chosen
    chosen.close()


async def test_an_out_of_memory_kill_is_insufficient_memory(killer: Cgroup | SimulatedKill, held: Held) -> None:
    runner = await held.warm()
    instance = await held.outcome(await killer.strike(held, runner))
    detail = held.check_short(instance, runner, "the kernel's OOM killer terminated the engine")
    check_host(detail["devices"][0], [SMALL])
    await held.loaded(LONG, 256)


# ---- a GPU

GPU, GPU_BYTES, ROOM_BYTES = "GPU-fake-0", 64 * MIB, 11 * MIB // 2


def on_a_gpu(
    directory: str, control: socket.socket, hand_over: socket.socket, output: socket.socket, visible: str | None
) -> None:
    """Run as a runner on a host with one small fake GPU; another program takes all of its memory but ROOM_BYTES
    between the placement of a load and its start."""
    from worker.engine import llama  # only here: the engine may be imported in a runner only

    loaded: Any = llama.Loaded
    load_model = loaded._load_model

    def load_beside_others(*arguments: Any) -> Any:
        host = FakeHost.here()
        assert host is not None
        host.take(GPU, max(0, host.free_bytes(GPU) - ROOM_BYTES))
        return load_model(*arguments)

    loaded._load_model = load_beside_others
    gpus.main(directory, control, hand_over, output, visible)


@pytest.fixture
async def held_on_gpu(
    monkeypatch: pytest.MonkeyPatch, store: Store, models: dict[str, Model], models_dir: Path, tmp_path: Path
) -> AsyncIterator[tuple[Held, FakeHost]]:
    host = gpus.install(monkeypatch, tmp_path / "host", GPU_BYTES)
    settings = Settings(worker_name="w", models_dir=models_dir, data_dir=tmp_path, device_reserve="0")
    agent = Agent(settings, store, EPOCH)
    await agent.publish([*models.values()])
    instances = Held(agent)
    await instances.loaded()
    monkeypatch.setattr(worker.runner.warm, "run_child", partial(on_a_gpu, str(host.directory)))
    await instances.loaded()  # uses the runner that was warm before
    yield instances, host
    await instances.check_untouched()
    await ended(agent)


async def test_a_gpu_without_room_is_insufficient_memory(
    held_on_gpu: tuple[Held, FakeHost],
) -> None:
    """The GPU lacks room for the weights, for the KV cache after the weights, or for the buffers after both."""
    held, host = held_on_gpu
    others = [SMALL, f"{SMALL}:2"]
    used = host.used_bytes(GPU)
    for key, context_length, what in (
        (WIDE, 256, "unable to allocate CUDA0 buffer"),
        (LONG, 8192, "failed to allocate buffer for kv cache"),
        (LONG, 4608, "failed to allocate compute pp buffers"),
    ):
        host.release(GPU)
        await held.agent.placer.look()
        instance, detail = await held.refused(key, context_length, "failed to allocate CUDA0 buffer of size ")
        assert f"of size {detail['needed_bytes']}: " in str(instance.error)
        assert what in (await held.agent.store.instances.engine_log(instance.id) or b"").decode(), (
            "the refused allocation is in the engine log"
        )
        device = detail["devices"][0]
        assert (device["id"], device["total_bytes"], device["instances"]) == (GPU, GPU_BYTES, others)
        assert device["free_bytes"] == ROOM_BYTES, "the free memory at the refusal, without the failed load"
        assert device["available_bytes"] == ROOM_BYTES
        assert device["used_by_others_bytes"] == GPU_BYTES - ROOM_BYTES - used
        await held.check_untouched()
        assert (detail["largest_context_length"] is None) == (key == WIDE), "no context fits beside the weights of WIDE"
    largest: int = detail["largest_context_length"]
    assert (await held.loaded(LONG, largest)).devices == [GPU]


async def test_a_load_without_room_is_refused_before_it_starts(held_on_gpu: tuple[Held, FakeHost]) -> None:
    held, host = held_on_gpu
    host.take(GPU, host.free_bytes(GPU) - ROOM_BYTES)
    runner = await held.warm()
    id_ = await held.begun(LONG, 8192)

    async def is_refused() -> bool:
        return (await held.record(id_)).refused == ["w"]

    await until(is_refused, "refused")
    instance = await held.record(id_)
    assert (instance.state, instance.attempt, instance.started_at, instance.devices) == (State.QUEUED, 1, None, [])
    assert instance.refusal is not None
    assert instance.refusal.code == "insufficient_memory"
    assert isinstance(instance.refusal.detail, dict)
    largest: Any = instance.refusal.detail["largest_context_length"]
    assert 256 <= largest < 8192
    assert not is_gone(runner.pid), "the runner waits for the next load"
    await held.agent.reconciler.reconcile()
    assert id_ not in held.agent.residents, "the worker does not claim the load again"
    assert (await held.loaded(LONG, largest)).devices == [GPU]
    assert (await held.record(id_)).refused == ["w"]
