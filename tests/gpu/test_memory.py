"""The memory of a load on a real GPU: it is as estimated, is not given away twice, and is freed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench import pagecache
from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.settings import Settings
from tests.gpu.conftest import BIG, LONG, LONG_TOKENS
from tests.gpu.gpus import MIB, GPUs, steady_bytes
from tests.gpu.watched import LOAD_S, Watched, check_use
from tests.support.service import error, until
from worker.memory.ledger import TOLERANCE_BYTES
from worker.runner.parameters import plan
from worker.runner.protocol import Load, Measure, Measured, Progress, Ready
from worker.runner.warm import Runners

BACK_S = 5.0
SLACK_BYTES = 16 * MIB  # memory of the driver itself, which varies
LEFT_BYTES = 1 << 30  # less than the model needs


def wait_back(gpus: GPUs, id_: str, before: int, since: float) -> None:
    """Wait until no more than `before` is used; fail BACK_S after `since`."""
    left_s = max(0.0, since + BACK_S - time.monotonic())
    until(lambda: gpus.used_bytes(id_) <= before + SLACK_BYTES, f"the memory of {id_} is free again", left_s)


# ---- memory is freed


def test_ten_unloads_each_free_all_memory_within_5_s(watched: Watched, gpu: str) -> None:
    weights = watched.estimated(BIG)[gpu]["weights_bytes"]
    before = watched.at_rest(0)[gpu]
    for _ in range(10):
        job = watched.load(BIG)
        assert job["status"] == "loaded", job["error"]
        assert watched.gpus.used_bytes(gpu) > before + weights * 0.97
        asked = time.monotonic()
        assert watched.service.unload(job["instance_id"]).status == 200
        assert watched.gpus.used_bytes(gpu) <= before + TOLERANCE_BYTES  # as the reply to the unload promises
        wait_back(watched.gpus, gpu, before, asked)
    assert watched.at_rest(0)[gpu] <= before + SLACK_BYTES
    assert watched.seen()[gpu]["leaked_bytes"] <= SLACK_BYTES


def test_a_killed_runner_frees_all_memory_within_5_s(watched: Watched, gpu: str) -> None:
    before = watched.at_rest(0)[gpu]
    job = watched.load(BIG)
    assert job["status"] == "loaded", job["error"]
    watched.service.warm_runner(1)
    os.kill(watched.service.runners()[0].pid, signal.SIGKILL)
    wait_back(watched.gpus, gpu, before, time.monotonic())
    until(lambda: watched.service.instances() == {}, "the instance is gone")
    assert watched.seen()[gpu]["leaked_bytes"] <= SLACK_BYTES


# ---- usage matches the estimate


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (BIG, {}),
        (BIG, {"context_length": 256, "eval_batch_size": 64}),
        (BIG, {"parallel": 64}),
        (LONG, {"context_length": LONG_TOKENS}),
        (LONG, {"context_length": LONG_TOKENS, "flash_attention": False}),
        (LONG, {"context_length": LONG_TOKENS, "kv_cache_type": "q8_0"}),
    ],
)
def test_an_estimate_matches_the_usage_that_the_driver_reports(
    watched: Watched, gpu: str, context_bytes: int, model: str, fields: dict[str, Any]
) -> None:
    estimate = watched.estimated(model, **fields)[gpu]
    with watched.loaded(model, **fields) as loaded:
        assert loaded.job["devices"] == [gpu]
        check_use(loaded.used_bytes[gpu], estimate["total_bytes"], context_bytes)


@pytest.fixture
def load(models: dict[str, Model], models_dir: Path, gpu: str) -> Load:
    model = models[BIG]
    assert model.dimensions
    layers = [model.dimensions.block_count + 1]
    return plan(LoadRequest(model=BIG), model, Settings(models_dir=models_dir), [gpu], layers)


@pytest.mark.usefixtures("forkserver")
async def test_a_runners_dry_run_and_report_match_the_driver(
    gpus: GPUs, gpu: str, context_bytes: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in gpus.environ().items():
        monkeypatch.setenv(name, value)
    before = await asyncio.to_thread(steady_bytes, gpus, gpu)
    runners = Runners(LOAD_S, visible=gpu)
    try:
        async with asyncio.timeout(LOAD_S):
            runner = await runners.take()
        try:
            async with asyncio.timeout(LOAD_S):
                await runner.send(Measure(load))
                measured = await runner.receive()
                assert isinstance(measured, Measured), (measured, list(runner.output))
                dry = await asyncio.to_thread(steady_bytes, gpus, gpu)
                await runner.send(load)
                while isinstance(message := await runner.receive(), Progress):
                    pass
            assert isinstance(message, Ready), (message, list(runner.output))
            used = await asyncio.to_thread(steady_bytes, gpus, gpu) - before
        finally:
            runner.kill()
            await runner.reaped()
    finally:
        await runners.close()
    await asyncio.to_thread(wait_back, gpus, gpu, before, time.monotonic())
    assert message.usage == measured.usage
    (usage, _) = message.usage
    assert usage.id == gpu
    check_use(used, usage.total_bytes, context_bytes)
    assert dry - before <= 2 * context_bytes + SLACK_BYTES  # a dry run copies no weights to the GPU


# ---- memory is not given away twice


def test_memory_held_by_another_program_is_not_given_away(watched: Watched, gpu: str) -> None:
    """The refusal comes without reading the file."""
    file = watched.service.models_dir / BIG / "big-Q8_0.gguf"
    available = watched.seen()[gpu]["available_bytes"]
    where = {"devices": [gpu], "offload": "max"}
    before = watched.at_rest(0)[gpu]
    pagecache.drop(file)
    with watched.gpus.occupied(gpu, available - LEFT_BYTES):
        until(lambda: watched.devices()[gpu]["available_bytes"] <= LEFT_BYTES, "the worker has seen the other program")
        refused = error(watched.service.load(BIG, gpu=where), 500, "model_load_failed", "insufficient_memory")
        assert not watched.estimate(BIG, gpu=where)["fits"]
    assert pagecache.residency(file) < 0.1
    (device,) = (device for device in refused["detail"]["devices"] if device["id"] == gpu)
    assert refused["detail"]["needed_bytes"] > device["available_bytes"]
    assert device["available_bytes"] <= LEFT_BYTES
    assert device["free_bytes"] <= device["total_bytes"] - (available - LEFT_BYTES)
    assert gpu in refused["message"]
    wait_back(watched.gpus, gpu, before, time.monotonic())
    assert watched.seen()[gpu]["available_bytes"] >= available - SLACK_BYTES
    with watched.loaded(BIG, gpu=where) as loaded:
        assert loaded.job["devices"] == [gpu]
