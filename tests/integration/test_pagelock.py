"""Real runners on a host with fake GPUs: weights are copied from page-locked mappings of the model's files."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shared import libc
from shared.synthetic.models import sharded, tiny_gemma3
from tests.integration.test_devices_of_a_runner import BLOCKS, GIB, A, B, measured, refused, started, used
from tests.integration.test_runner import DEADLINE_S, answers, given, ready
from tests.support.child import in_child
from tests.support.fakehosts import VARIABLE, FakeHost
from worker.runner.process import Runner
from worker.runner.protocol import Load, Ready

PAGE = os.sysconf("SC_PAGE_SIZE")
ALL = 5  # layers of the tiny models, with the output


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    """The fake host of every runner of this module: the fork server has its environment."""
    host = FakeHost.made(tmp_path_factory.mktemp("host") / "h", GIB, GIB)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in host.environ().items():
            patched.setenv(name, value)
        yield host


@pytest.fixture
def host(machine: FakeHost, forkserver: None) -> FakeHost:
    """The fake host, whose runners lock models of any size."""
    machine.driver(locked_from=0)
    machine.forget_locking()
    return machine


@pytest.fixture(scope="module")
def file(models_dir: Path) -> Path:
    return models_dir / "p/llama/llama-f16.gguf"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sharded(tmp_path_factory.mktemp("sharded") / "m.gguf")


def on_gpus(*files: Path, **changes: Any) -> Load:
    return given(*files, **{"devices": [A], "layers": [ALL], "is_whole": True, **changes})


def events(host: FakeHost) -> Counter[str]:
    return Counter(one["event"] for one in host.locking())


def pages(file: Path) -> int:
    return -(-file.stat().st_size // PAGE) * PAGE


async def logged(runner: Runner, text: str) -> None:
    """Wait for a line of the engine's log."""
    async with asyncio.timeout(DEADLINE_S):
        while text not in "".join(runner.output):
            await runner.output.grown.wait()
            runner.output.grown.clear()


async def test_weights_are_copied_from_a_locked_mapping(host: FakeHost, file: Path) -> None:
    load = on_gpus(file)
    async with started() as runner:
        steps, message = await answers(runner, load)
        assert isinstance(message, Ready), list(runner.output)
        await logged(runner, "bytes locked in")
        await logged(runner, "unlocked in")
    first, *copies, last = [one for one in host.locking() if one["event"] != "registers"]
    assert first == {"event": "registered", "n_bytes": pages(file), "device": 0}
    assert len(copies) > 20
    assert all(one["is_locked"] for one in copies if one["event"] == "copied")
    assert sum(one["n_bytes"] for one in copies) > load.total_bytes / 2
    assert last == {"event": "unregistered", "n_bytes": pages(file)}
    weights = [step.loaded_bytes for step in steps if step.phase == "weights"]
    assert weights == sorted(weights)
    assert len(weights) > 10, "the file is cached: progress is that of the copies"
    assert weights[-1] == load.total_bytes


async def test_every_file_of_a_model_on_two_gpus_is_locked(host: FakeHost, shards: list[Path]) -> None:
    async with started() as runner:
        await ready(runner, on_gpus(*shards, devices=[B, A], layers=[2, 3]))
    did = events(host)
    assert did["registered"] == did["unregistered"] == len(shards)
    assert all(one["is_locked"] for one in host.locking() if one["event"] == "copied")
    assert [*did][-1] == "unregistered"


async def test_locking_creates_no_context_on_a_gpu_without_the_model(host: FakeHost, file: Path) -> None:
    async with started(f"{A},{B}") as runner:
        await ready(runner, on_gpus(file, devices=[B]))
    assert [one["device"] for one in host.locking() if one["event"] == "registered"] == [1]


async def test_files_beyond_the_limit_are_copied_unlocked(host: FakeHost, shards: list[Path]) -> None:
    host.driver(locked_from=0, lockable_bytes=pages(shards[0]) + pages(shards[1]))
    async with started() as runner:
        await ready(runner, on_gpus(*shards))
        await logged(runner, "cudaHostRegister returned 2")
    did = events(host)
    assert (did["registers"], did["registered"], did["unregistered"]) == (3, 2, 2)
    assert {one["is_locked"] for one in host.locking() if one["event"] == "copied"} == {True, False}


@pytest.mark.parametrize(
    ("driver", "changes", "why"),
    [
        ({"read_only": False}, {}, "a GPU does not support it"),
        ({"version": "565.77"}, {}, "the driver is 565"),
        ({"version": "unknown"}, {}, "the driver is unknown"),
        ({"locked_from": None}, {}, "the model is small"),
        ({}, {"layers": [ALL - 1], "is_whole": False}, "layers stay on the CPU"),
        ({}, {"can_map": False}, "its tensors are not aligned"),
        ({}, {"total_bytes": 1 << 50}, "could be locked"),
    ],
)
async def test_what_cannot_be_locked_is_read_and_the_log_says_why(
    host: FakeHost, file: Path, driver: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    host.driver(**{"locked_from": 0, **driver})
    async with started() as runner:
        message = await ready(runner, on_gpus(file, **changes))
        await logged(runner, why)
        assert len([line for line in runner.output if "page_lock" in line]) == 1
        assert used(host)[A] == message.usage[0].total_bytes
    assert events(host) == {}


async def test_a_load_for_the_cpu_locks_nothing_and_says_nothing(host: FakeHost, file: Path) -> None:
    async with started() as runner:
        await ready(runner, given(file))
        await runner.stop()
        assert not [line for line in runner.output if "page_lock" in line]
    assert events(host) == {}


@pytest.fixture
def damaged(file: Path, tmp_path: Path) -> Path:
    """A model whose last tensor has values that are not numbers."""
    data = bytearray(file.read_bytes())
    data[-64:] = b"\xff" * 64
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    return path


async def test_a_locked_load_that_fails_unlocks(host: FakeHost, damaged: Path) -> None:
    """llama.cpp checks the values of the tensors while it copies them, and rejects them at the end."""
    async with started() as runner:
        assert "invalid data" in await refused(runner, on_gpus(damaged, check_tensors=True))
    did = events(host)
    assert did["registered"] == did["unregistered"] == 1
    assert used(host)[A] == 0


async def test_a_stop_ends_a_runner_that_is_locking(host: FakeHost, file: Path) -> None:
    with host.holding_locks():
        async with started() as runner:
            await runner.send(on_gpus(file))
            async with asyncio.timeout(DEADLINE_S):
                while not events(host)["registers"]:  # noqa: ASYNC110 - there is no event for it
                    await asyncio.sleep(0.002)
            await runner.stop()
            assert used(host)[A] == 0
    assert events(host) == {"registers": 1}


# ---- reading ahead, in a process that has the engine


def with_reader(
    directory: str, file: str, is_whole: bool, free_bytes: list[int], error: str
) -> tuple[list[str], list[str]]:
    """Load a model; return what its reader did, or why the load failed, and what was locked.

    `error`: why the reader fails.  `free_bytes`: what the machine has free whenever the load asks.
    """
    from tests.support import fakegpu
    from tests.support.fakecuda import FakeCuda
    from worker.engine import llama, pagelock
    from worker.engine.prefetch import Ahead, Unreadable

    did = []

    class Recorded(Ahead):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            did.append("reads")
            super().__init__(*arguments, **options)

        def wait(self) -> None:
            super().wait()
            if error:
                raise Unreadable(error)

    host = FakeHost.made(Path(directory), GIB)
    cuda = FakeCuda(host)
    log = llama.initialise(A)
    cuda.install(llama.lib._lib)
    gpu = fakegpu.add("CUDA0", GIB, copies=cuda)
    pagelock.DRIVER, pagelock.LEAST_BYTES = host.version_path, 0
    for module in (llama, pagelock):
        vars(module)["lockable_bytes"] = partial(free_bytes.pop, 0)
    vars(llama)["Ahead"] = Recorded
    try:
        llama.Loaded(on_gpus(Path(file), is_whole=is_whole), log, lambda phase, n_bytes: None)
    except llama.LoadError as e:
        did.append(str(e))
        assert gpu.used_bytes == 0
    return did, sorted({one["event"] for one in host.locking()})


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep new processes off the fake host of this module: a test gives them one of their own."""
    monkeypatch.delenv(VARIABLE, raising=False)


LOCKED = ["copied", "registered", "registers", "unregistered"]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("is_whole", "models_free", "error", "did", "locking"),
    [
        (True, [1, 1], "", ["reads"], LOCKED),
        (True, [1, 0.9], "", ["reads"], []),  # another load locks a file meanwhile
        (True, [1], "its storage failed", ["reads", "its storage failed"], []),
        (True, [0.9, 1.9], "", [], []),
        (False, [2], "", ["reads"], []),
        (False, [1.9], "", [], []),
    ],
)
def test_files_are_read_ahead_where_memory_has_room(
    file: Path, tmp_path: Path, is_whole: bool, models_free: list[float], error: str, did: list[str], locking: list[str]
) -> None:
    free_bytes = [int(n * file.stat().st_size) for n in models_free]
    assert in_child(with_reader, str(tmp_path / "h"), str(file), is_whole, free_bytes, error) == (did, locking)


@pytest.fixture(scope="module")
def files(models_dir: Path) -> dict[str, Path]:
    tiny_gemma3(models_dir / "p/gemma3/gemma3-f16.gguf")
    return {path.parent.name: path for path in models_dir.rglob("*.gguf")}


@pytest.mark.parametrize("name", BLOCKS)
async def test_a_dry_run_gives_the_memory_of_a_locked_load(host: FakeHost, files: dict[str, Path], name: str) -> None:
    is_embedding = name in ("embedding", "bert")
    load = on_gpus(files[name], layers=[BLOCKS[name] + 1], moe=name == "moe", embedding=is_embedding)
    async with started() as runner:
        would_take = await measured(runner, load)
        message = await ready(runner, load)
    assert message.usage == would_take
    assert events(host)["unregistered"] == 1


# ---- the fake driver


def copy_across(directory: str, start: int, n_bytes: int) -> list[dict[str, Any]]:
    """Copy a part of four pages, of which the second and the third are locked; return what happened."""
    from tests.support.fakecuda import PORTABLE, READ_ONLY, FakeCuda

    host = FakeHost.made(Path(directory))
    path = host.directory / "file"
    path.write_bytes(bytes(4 * PAGE))
    with path.open("rb") as file:
        address = libc.map_file(file.fileno(), 4 * PAGE)
    cuda = FakeCuda(host)
    assert cuda.cudaHostRegister(address + PAGE, 2 * PAGE, PORTABLE | READ_ONLY) == 0
    cuda.copies(address + start, n_bytes)
    return host.locking()[2:]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("start", "n_bytes", "is_locked"),
    [(PAGE, 2 * PAGE, True), (PAGE + 32, 64, True), (0, PAGE, False), (3 * PAGE, PAGE, False)],
)
def test_cuda_copies_from_locked_and_from_other_memory(
    tmp_path: Path, start: int, n_bytes: int, is_locked: bool
) -> None:
    happened = in_child(copy_across, str(tmp_path / "h"), start, n_bytes)
    assert happened == [{"event": "copied", "n_bytes": n_bytes, "is_locked": is_locked}]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("start", "n_bytes"), [(PAGE - 32, 64), (3 * PAGE - 32, 64), (0, 4 * PAGE)])
def test_cuda_refuses_a_copy_that_is_partly_locked(tmp_path: Path, start: int, n_bytes: int) -> None:
    with pytest.raises(BrokenProcessPool):
        in_child(copy_across, str(tmp_path / "h"), start, n_bytes)
