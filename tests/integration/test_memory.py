"""Where memory is too short, whoever is the one to say so: its load fails with the numbers, and nothing else does."""

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
from tests.integration.conftest import catalog
from tests.support import gpus, waiting
from tests.support.fakehosts import FakeHost
from tests.support.runners import freeze, is_gone
from tests.support.waiting import no_runners
from worker.agent import Agent
from worker.memory.host import host_memory, oom_kills
from worker.runner.process import Runner

pytestmark = pytest.mark.usefixtures("forkserver")

DEADLINE_S = 20.0
until = partial(waiting.until, within_s=DEADLINE_S)
EPOCH = "e"  # of the lease that "w" holds
MIB = 1 << 20
SMALL, LONG, WIDE = "p/small", "p/long", "p/wide"
LONG_TOKENS = MIB // 4
KV_BYTES = LONG_TOKENS << 10  # of LONG's cache; it needs as much again to compute with


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that fits anywhere, one with a context that does not, and one with weights that do not."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / f"{SMALL}/m.gguf")
    tiny_llama(root / f"{LONG}/m.gguf", metadata={"llama.context_length": LONG_TOKENS})
    tiny_llama(root / f"{WIDE}/m.gguf", shape=replace(TINY, embedding_length=256, feed_forward_length=1024))
    return root


@pytest.fixture(scope="module")
def models(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return catalog(models_dir, tmp_path_factory.mktemp("catalog"))


@pytest.fixture
async def agent(store: Store, models: dict[str, Model], models_dir: Path, tmp_path: Path) -> AsyncIterator[Agent]:
    """Worker "w"; nothing moves in it but what a test asks for."""
    made = Agent(Settings(worker_name="w", models_dir=models_dir, data_dir=tmp_path), store, EPOCH)
    await made.publish([*models.values()])
    yield made
    await ended(made)


async def ended(agent: Agent) -> None:
    await agent.drain()
    await agent.runners.close()
    await until(no_runners, "all runners gone")


class Held:
    """The instances of a test, and the processes that hold them."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.runners: dict[str, Runner] = {}  # by instance id
        self.number = 0

    async def warm(self) -> Runner:
        """The runner that the next load will take."""
        async with asyncio.timeout(DEADLINE_S):
            await self.agent.warm()
        assert self.agent.runners.coming is not None
        return self.agent.runners.coming.result()

    async def begun(self, key: str, context_length: int) -> str:
        self.number += 1
        model = self.agent.models[key]
        made = await self.agent.store.instances.create(
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
        self.agent.deliver(made.id)
        return made.id

    async def record(self, id_: str) -> Instance:
        found = await self.agent.store.instances.get(id_)
        assert found is not None
        return found

    async def outcome(self, id_: str) -> Instance:
        """The record once the load is over."""

        async def is_over() -> bool:
            return (await self.record(id_)).state in TERMINAL | {State.LOADED}

        await until(is_over, f"{id_} is over")
        return await self.record(id_)

    async def loaded(self, key: str = SMALL, context_length: int = 256) -> Instance:
        runner = await self.warm()
        found = await self.outcome(await self.begun(key, context_length))
        assert found.state is State.LOADED, found.error
        self.runners[found.id] = runner
        return found

    async def refused(self, key: str, context_length: int, words: str = "") -> tuple[Instance, dict[str, Any]]:
        """A load that memory is too short for: its record, and what its error holds for machines."""
        runner = await self.warm()
        found = await self.outcome(await self.begun(key, context_length))
        return found, self.check_short(found, runner, words)

    def check_short(self, found: Instance, runner: Runner, words: str) -> dict[str, Any]:
        assert found.state is State.FAILED
        assert found.error is not None
        assert (found.error.type, found.error.code) == ("model_load_failed", "insufficient_memory"), found.error
        assert words in found.error.message
        assert " needed, " in found.error.message
        assert is_gone(runner.pid)
        assert isinstance(found.error.detail, dict)
        detail: dict[str, Any] = found.error.detail
        assert detail.keys() >= {"needed_bytes", "devices"}
        assert isinstance(detail["needed_bytes"], int)
        assert detail["needed_bytes"] > 0
        assert [device.keys() for device in detail["devices"]] == [
            {"id", "total_bytes", "free_bytes", "available_bytes", "used_by_others_bytes", "instances"}
        ]
        return detail

    async def check_untouched(self) -> None:
        """What was loaded is, and by the same process."""
        for id_, runner in self.runners.items():
            assert (await self.record(id_)).state is State.LOADED
            assert not is_gone(runner.pid)


@pytest.fixture
async def held(agent: Agent) -> AsyncIterator[Held]:
    """With one instance that is loaded, and stays so whatever a test does."""
    made = Held(agent)
    await made.loaded()
    yield made
    await made.check_untouched()


# ---- address space


def size_of(runner: Runner) -> int:
    """The address space of a process, in bytes."""
    return int(Path(f"/proc/{runner.pid}/statm").read_text().split()[0]) * resource.getpagesize()


def check_host(device: dict[str, Any], instances: list[str]) -> None:
    """The numbers of a machine whose models are in its own memory."""
    assert (device["id"], device["instances"]) == ("CPU", instances)
    assert device["total_bytes"] == host_memory().total_bytes
    assert 0 < device["free_bytes"] <= device["total_bytes"]


async def test_a_limit_on_address_space_is_insufficient_memory_wherever_it_is_met(held: Held) -> None:
    """From a runner that cannot even map its file, over one that has no room for the KV cache, to one that has no
    room to compute, on which the engine aborts."""
    for spare_mib in (0, 1, 8, 64, 280, 300):
        runner = await held.warm()
        limit = size_of(runner) + spare_mib * MIB
        resource.prlimit(runner.pid, resource.RLIMIT_AS, (limit, limit))
        _, detail = await held.refused(LONG, LONG_TOKENS)
        check_host(detail["devices"][0], [SMALL])
        assert "largest_context_length" not in detail, "by what this host has free it is the one that did not fit"
        if spare_mib == 64:
            assert detail["needed_bytes"] == KV_BYTES, "what it asked for in vain"
        await held.check_untouched()
    await held.loaded(LONG, 256)  # nothing is remembered of it


# ---- the kernel's out-of-memory killer


class Cgroup:
    """A memory cgroup within our own, with room for next to nothing.  Raises OSError where none can be made."""

    def __init__(self) -> None:
        within, limit, swap = self._place()
        self.folder = within / f"loadstone-{os.getpid()}"
        self.folder.mkdir()
        try:
            (self.folder / "cgroup.procs").read_text()  # or it is a folder like any other
            (self.folder / limit).write_text(str(32 * MIB))
            with contextlib.suppress(OSError):  # where swap is not accounted for
                (self.folder / swap).write_text("0" if swap == "memory.swap.max" else str(32 * MIB))
        except OSError:
            self.folder.rmdir()
            raise

    @staticmethod
    def _place() -> tuple[Path, str, str]:
        """Our own cgroup, and the names of the limits of memory, and of swap: of version 1 where it has them."""
        root = Path("/sys/fs/cgroup")
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        ours = {controller: path[1:] for _, controllers, path in lines for controller in controllers.split(",")}
        if "memory" in ours:
            return root / "memory" / ours["memory"], "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
        return root / ours.get("", ""), "memory.max", "memory.swap.max"

    async def strike(self, held: Held, runner: Runner) -> str:
        """A load whose runner takes too much, and the kernel kills it."""
        (self.folder / "cgroup.procs").write_text(str(runner.pid))
        before = oom_kills()
        id_ = await held.begun(LONG, LONG_TOKENS)
        await held.outcome(id_)
        assert oom_kills() > before
        return id_

    def close(self) -> None:
        self.folder.rmdir()


class Pretence:
    """Where this machine lets us make no cgroup: a kill as the kernel's, and its counter one further."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    async def strike(self, held: Held, runner: Runner) -> str:
        await freeze(runner)
        id_ = await held.begun(LONG, LONG_TOKENS)

        async def is_in_its_load() -> bool:
            return (await held.record(id_)).phase is not None

        await until(is_in_its_load, "it is loading")
        self.monkeypatch.setattr(worker.instance, "oom_kills", lambda: oom_kills() + 1)
        os.kill(runner.pid, signal.SIGKILL)
        return id_

    def close(self) -> None:
        pass


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cgroup | Pretence]:
    made: Cgroup | Pretence
    try:
        made = Cgroup()
    except OSError:
        made = Pretence(monkeypatch)
    yield made
    made.close()


async def test_a_runner_that_the_kernel_kills_for_want_of_memory_did_not_crash(
    killer: Cgroup | Pretence, held: Held
) -> None:
    runner = await held.warm()
    found = await held.outcome(await killer.strike(held, runner))
    detail = held.check_short(found, runner, "the kernel's OOM killer terminated the engine")
    check_host(detail["devices"][0], [SMALL])
    await held.loaded(LONG, 256)


# ---- a GPU

GPU, GPU_BYTES, ROOM_BYTES = "GPU-fake-0", 64 * MIB, 11 * MIB // 2


def on_a_gpu(directory: str, control: socket.socket, output: socket.socket, visible: str | None) -> None:
    """What a runner does, on a machine with one small GPU that is none; of that, somebody else takes all but ROOM_BYTES
    after the load was placed, and before it begins."""
    from worker.engine import llama  # only here: the engine may be in the runner's process only

    loaded: Any = llama.Loaded
    load_model = loaded._load_model

    def load_beside_others(*arguments: Any) -> Any:
        host = FakeHost.here()
        assert host is not None
        host.take(GPU, max(0, host.free_bytes(GPU) - ROOM_BYTES))
        return load_model(*arguments)

    loaded._load_model = load_beside_others
    gpus.main(directory, control, output, visible)


@pytest.fixture
async def held_on_gpu(
    monkeypatch: pytest.MonkeyPatch, store: Store, models: dict[str, Model], models_dir: Path, tmp_path: Path
) -> AsyncIterator[tuple[Held, FakeHost]]:
    host = gpus.install(monkeypatch, tmp_path / "host", GPU_BYTES)
    settings = Settings(worker_name="w", models_dir=models_dir, data_dir=tmp_path, device_reserve="0")
    agent = Agent(settings, store, EPOCH)
    await agent.publish([*models.values()])
    made = Held(agent)
    await made.loaded()
    monkeypatch.setattr(worker.runner.warm, "run_child", partial(on_a_gpu, str(host.directory)))
    await made.loaded()  # the runner that was warm before
    yield made, host
    await made.check_untouched()
    await ended(agent)


async def test_a_gpu_that_has_no_room_is_insufficient_memory_whatever_was_to_go_there(
    held_on_gpu: tuple[Held, FakeHost],
) -> None:
    """Weights; the KV cache, beside which the weights were there; and buffers, beside which both were."""
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
        found, detail = await held.refused(key, context_length, "failed to allocate CUDA0 buffer of size ")
        assert f"of size {detail['needed_bytes']}: " in str(found.error)
        assert what in (await held.agent.store.instances.engine_log(found.id) or b"").decode(), "where it was refused"
        device = detail["devices"][0]
        assert (device["id"], device["total_bytes"], device["instances"]) == (GPU, GPU_BYTES, others)
        assert device["free_bytes"] == ROOM_BYTES, "as it was then, and with all that was taken in vain given back"
        assert device["available_bytes"] == ROOM_BYTES
        assert device["used_by_others_bytes"] == GPU_BYTES - ROOM_BYTES - used
        await held.check_untouched()
        assert (detail["largest_context_length"] is None) == (key == WIDE), "no context is small enough for its weights"
    largest: int = detail["largest_context_length"]
    assert (await held.loaded(LONG, largest)).devices == [GPU]


async def test_what_has_no_room_is_handed_back_before_a_byte_is_read(held_on_gpu: tuple[Held, FakeHost]) -> None:
    held, host = held_on_gpu
    host.take(GPU, host.free_bytes(GPU) - ROOM_BYTES)
    runner = await held.warm()
    id_ = await held.begun(LONG, 8192)

    async def is_refused() -> bool:
        return (await held.record(id_)).refused == ["w"]

    await until(is_refused, "refused")
    found = await held.record(id_)
    assert (found.state, found.attempt, found.started_at, found.devices) == (State.QUEUED, 1, None, [])
    assert found.refusal is not None
    assert found.refusal.code == "insufficient_memory"
    assert isinstance(found.refusal.detail, dict)
    largest: Any = found.refusal.detail["largest_context_length"]
    assert 256 <= largest < 8192
    assert not is_gone(runner.pid), "the runner waits for the next"
    await held.agent.reconciler.reconcile()
    assert id_ not in held.agent.residents, "it is not taken again"
    assert (await held.loaded(LONG, largest)).devices == [GPU]
    assert (await held.record(id_)).refused == ["w"]
