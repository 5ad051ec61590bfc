"""Loads onto a real GPU from page-locked memory: what is locked, what the log says, and how a stop ends them."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import select
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.settings import Settings
from tests.gpu.conftest import BIG, HUGE, MIDDLE, SHARDED
from tests.gpu.gpus import MIB, GPUs
from tests.gpu.test_answers import CLOSE_QUANTIZED, ON_CPU, logprobs
from tests.gpu.watched import LOAD_S, LOCKED, UNLOCKED, Watched, pages
from tests.support.service import PATIENCE_S, until, wait_gone
from worker.runner.parameters import plan
from worker.runner.process import Runner
from worker.runner.protocol import Load, Progress, Ready
from worker.runner.warm import Runners

MEMINFO = Path("/proc/meminfo")
SLACK_BYTES = 32 * MIB  # memory of the driver itself, which varies
SAME = 0.01  # of a log probability: the same kernels with the same weights
STOPPED_S = 10.0  # a bound; what it takes is measured


def test_answers_are_those_of_a_load_that_locks_nothing(watched: Watched, gpu: str, models_dir: Path) -> None:
    """One file, several files, and a model of which a part stays on the CPU."""
    with watched.loaded(MIDDLE, **ON_CPU):
        expected = logprobs(watched)
    with watched.loaded(MIDDLE, gpu={"devices": [gpu], "offload": 0.5}) as loaded:
        assert logprobs(watched) == pytest.approx(expected, abs=CLOSE_QUANTIZED)
        assert "layers stay on the CPU" in watched.engine_log(loaded.job)
    on_gpu = []
    for model in (MIDDLE, SHARDED):
        with watched.loaded(model, gpu={"devices": [gpu]}) as loaded:
            assert watched.locked_bytes(loaded.job) == pages((models_dir / model).glob("*.gguf"))
            on_gpu.append(logprobs(watched))
    for found in on_gpu:
        assert found == pytest.approx(expected, abs=CLOSE_QUANTIZED)
        assert found == pytest.approx(on_gpu[0], abs=SAME)


def dirty_bytes() -> int:
    """Return how much of the page cache waits to be written to disks, or is being written."""
    return sum(int(n) << 10 for n in re.findall(r"(?m)^(?:Dirty|Writeback):\s+(\d+) kB$", MEMINFO.read_text()))


def test_a_locked_load_leaves_nothing_to_write_to_the_disk(
    watched: Watched, gpu: str, models_dir: Path, figures: list[str]
) -> None:
    """A driver that marks unlocked pages as changed would have the kernel write the whole model."""
    (file,) = (models_dir / BIG).glob("*.gguf")
    with file.open("rb") as content:
        while content.read(16 * MIB):
            pass
    os.sync()
    before = dirty_bytes()
    with watched.loaded(BIG, gpu={"devices": [gpu]}) as loaded:
        grown = dirty_bytes() - before
        n_bytes = watched.locked_bytes(loaded.job)
        log = watched.engine_log(loaded.job)
    assert n_bytes == pages([file])
    (_, lock_s), unlock_s = LOCKED.findall(log)[0], UNLOCKED.findall(log)[0]
    figures.append(
        f"{n_bytes:,} bytes locked in {lock_s} s and unlocked in {unlock_s} s, the weights in"
        f" {loaded.job['timing']['weights']:.3f} s; {grown:+,} dirty bytes"
    )
    assert grown < n_bytes / 2


def test_a_stop_ends_a_load_that_is_locking(watched: Watched, gpu: str, figures: list[str]) -> None:
    before = watched.at_rest(0)[gpu]
    runner = watched.service.warm_runner(0)
    is_locking: Callable[[], bool]
    with ExitStack() as stack:
        process = os.pidfd_open(runner.pid)
        stack.callback(os.close, process)
        is_locking = stack.enter_context(watched.gpus.locking())
        job_id = watched.service.accepted(HUGE, gpu={"devices": [gpu]}, context_length=512)["job_id"]

        def begun() -> bool:
            job = watched.service.job(job_id)
            assert job["completed_at"] is None, f"{job['status']}, {job['error']}: it locks nothing, or ended before"
            return is_locking()

        until(begun, "the load locks its file", LOAD_S)
        asked = time.monotonic()
        assert watched.service.cancel(job_id).status == 200, "the load ended before the stop"
        assert select.select([process], [], [], STOPPED_S)[0], "the process is still there"
        exit_s = time.monotonic() - asked
        wait_gone([runner], STOPPED_S)
        reaped_s = time.monotonic() - asked
        job = watched.service.job(job_id, wait_s=10)
    figures.append(
        f"a stop of a load that locks {job['total_size_bytes']:,} bytes: ended after {exit_s:.3f} s,"
        f" reaped after {reaped_s:.3f} s at most"
    )
    assert job["status"] == "cancelled"
    assert watched.at_rest(0)[gpu] <= before + SLACK_BYTES
    assert watched.seen()[gpu]["leaked_bytes"] <= SLACK_BYTES


# ---- a runner without a service


@pytest.fixture
def load(models: dict[str, Model], models_dir: Path, gpu: str) -> Load:
    model = models[MIDDLE]
    assert model.dimensions
    layers = [model.dimensions.block_count + 1]
    return plan(LoadRequest(model=MIDDLE), model, Settings(models_dir=models_dir), [gpu], layers)


async def said(runner: Runner, pattern: str) -> str:
    """Wait for a line of the engine's log."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := re.search(pattern, "".join(runner.output))):
            await runner.output.grown.wait()
            runner.output.grown.clear()
    return found[0]


@pytest.mark.usefixtures("forkserver")
@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"total_bytes": 1 << 50}, "only [0-9]+ could be locked"),
        ({"can_map": False}, "not aligned"),
        ({}, r"page_lock: [1-9][0-9]* bytes locked|cudaHostRegister returned|the driver is|a GPU does not support"),
    ],
    ids=["too large", "not aligned", "RLIMIT_MEMLOCK"],
)
async def test_a_load_that_may_lock_little_is_loaded_and_says_so(
    gpus: GPUs, gpu: str, load: Load, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], pattern: str
) -> None:
    """Whether RLIMIT_MEMLOCK counts is up to the driver."""
    for name, value in gpus.environ().items():
        monkeypatch.setenv(name, value)
    runners = Runners(LOAD_S, visible=gpu)
    try:
        async with asyncio.timeout(LOAD_S):
            runner = await runners.take()
        try:
            resource.prlimit(runner.pid, resource.RLIMIT_MEMLOCK, (0, 0))
            async with asyncio.timeout(LOAD_S):
                await runner.send(structs.replace(load, **changes))
                while isinstance(message := await runner.receive(), Progress):
                    pass
            assert isinstance(message, Ready), (message, list(runner.output))
            assert message.usage[0].id == gpu
            assert await said(runner, pattern)
        finally:
            runner.kill()
            await runner.reaped()
    finally:
        await runners.close()
