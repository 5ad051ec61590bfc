"""Closing a runner with requests: unload, idle TTL and eviction, with real runners and tiny random models."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import worker.instance
from shared.channel.messages import Ended, FromRunner, Generate, Refused, Started
from shared.errors import ModelUnloaded, RunnerLost
from shared.instance import Instance
from shared.lifecycle import State
from shared.schema.memory import CPU
from shared.schema.model import ModelSettings
from shared.synthetic.models import tiny_llama
from tests.support.agents import Begin, record, released, states
from tests.support.loaded import CONVERSATION, ENDLESS, Loaded
from tests.support.runners import freeze
from tests.support.waiting import until
from worker.memory.nvml import Reading
from worker.memory.placer import Requests
from worker.timing import Timing

pytestmark = pytest.mark.usefixtures("forkserver")

KEYS = ("p/a", "p/b")
LATER_S = 7200.0
LONG = 32_768  # tokens
ROUNDS = 4


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of the same size, with a context for an answer that lasts as long as a test needs it."""
    root = tmp_path_factory.mktemp("models")
    for key in KEYS:
        tiny_llama(root / key / "m-f16.gguf", tokenizer="bpe", metadata={"llama.context_length": LONG})
    return root


Start = Callable[..., Awaitable[Loaded]]


@pytest.fixture
async def start(begin: Begin, tmp_path: Path) -> AsyncIterator[Start]:
    """Start a worker, with the arguments of `begin`, that beats only when a test says so."""
    undo: list[Callable[[], Awaitable[None]]] = []

    async def started(*arguments: Any, **settings: Any) -> Loaded:
        agent = await begin(*arguments, **settings)
        bound = agent.listener.bound([tmp_path / "worker.sock"])
        bound.__enter__()
        listening, loaded = asyncio.create_task(agent.listener.run()), Loaded(agent)

        async def end() -> None:
            await loaded.channels.close()
            listening.cancel()
            await asyncio.wait([listening])
            bound.__exit__(None, None, None)

        undo.append(end)
        return loaded

    yield started
    for end in undo:
        await end()


@asynccontextmanager
async def answering(loaded: Loaded, instance: Instance) -> AsyncIterator[asyncio.Task[list[FromRunner]]]:
    """Begin an answer up to the end of the context before the block, and wait for its end after it."""
    asking = await begun(loaded, instance)
    yield asking
    await asyncio.wait([asking])


@asynccontextmanager
async def busy(loaded: Loaded, instance: Instance) -> AsyncIterator[None]:
    """Keep an instance busy for the block.  At its end the client leaves."""
    asking = await begun(loaded, instance)
    yield
    assert not asking.done()
    asking.cancel()
    await asyncio.wait([asking])


async def begun(loaded: Loaded, instance: Instance) -> asyncio.Task[list[FromRunner]]:
    """Ask for an answer up to the end of the context, and wait until it has begun."""
    is_begun = asyncio.Event()
    request = Generate(id=0, client="c", conversation=CONVERSATION, sampling=ENDLESS)

    async def ask() -> list[FromRunner]:
        messages = []
        async with loaded.channels.answering(instance, request, "/test") as answer:
            async for message in answer:
                messages.append(message)
                if isinstance(message, Started):
                    is_begun.set()
        return messages

    asking = asyncio.create_task(ask())
    await until(is_begun.is_set, "the answer has begun")
    return asking


def is_whole(messages: list[FromRunner]) -> bool:
    return isinstance(messages[-1], Ended)


def is_refused(messages: list[FromRunner]) -> bool:
    """Return whether a runner refused a request because it closes."""
    return isinstance(messages[0], Refused) and messages[0].code == "closing"


# ---- the question


async def test_a_closed_runner_refuses_requests_until_it_is_opened(start: Start) -> None:
    loaded = await start()
    instance = await loaded.load(key=KEYS[0])
    runner = loaded.runners[instance.id]
    assert is_whole(await loaded.ask(instance))
    assert not await runner.close_if_unused(time.time() - LATER_S), "it was used since"
    assert await runner.close_if_unused(time.time())
    assert is_refused(await loaded.ask(instance))
    runner.open()
    await loaded.used_at(instance)  # a later answer of the runner
    assert is_whole(await loaded.ask(instance))


async def test_a_runner_that_does_not_answer_stays_open(start: Start) -> None:
    loaded = await start(Timing(answer_s=0.1))
    instance = await loaded.load(key=KEYS[0])
    runner = loaded.runners[instance.id]
    await freeze(runner)
    assert not await runner.close_if_unused(time.time())
    os.kill(runner.pid, signal.SIGCONT)
    await loaded.used_at(instance)  # a later answer of the runner
    assert is_whole(await loaded.ask(instance))


async def test_a_runner_that_dies_is_not_waited_for(start: Start) -> None:
    loaded = await start()
    instance = await loaded.load(key=KEYS[0])
    runner = loaded.runners[instance.id]
    await freeze(runner)
    closing = asyncio.create_task(runner.close())
    await asyncio.sleep(0)
    runner.kill()
    await closing
    assert not await runner.close_if_unused(time.time())


# ---- unload


async def test_an_unload_lets_answers_end(start: Start) -> None:
    loaded = await start(unload_wait_s=LATER_S)
    instance = await loaded.load(key=KEYS[0])
    async with answering(loaded, instance) as answer:
        loaded.agent.stop(instance.id)
    assert is_whole(answer.result())
    await released(loaded.agent, instance.id)
    assert (await states(loaded.agent, instance.id))[-2:] == [State.UNLOADING, State.UNLOADED]
    assert loaded.runners[instance.id].status == 0


async def test_an_unload_begins_no_other_answer(start: Start) -> None:
    loaded = await start(unload_wait_s=LATER_S)
    instance = await loaded.load(key=KEYS[0], context_length=LONG)
    async with busy(loaded, instance):
        loaded.agent.stop(instance.id)

        async def refuses() -> bool:
            return is_refused(await loaded.ask(instance))

        await until(refuses, "requests are refused")
        assert (await record(loaded.agent, instance.id)).state is State.UNLOADING
    await released(loaded.agent, instance.id)
    assert (await record(loaded.agent, instance.id)).state is State.UNLOADED


async def test_an_unload_ends_answers_when_its_wait_is_over(start: Start) -> None:
    loaded = await start(unload_wait_s=0.0)
    instance = await loaded.load(key=KEYS[0], context_length=LONG)
    asked = [asyncio.create_task(loaded.ask(instance, n=None)) for _ in range(10)]
    await until(lambda: loaded.channels.busy(instance) == 10, "ten requests")
    loaded.agent.stop(instance.id)
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert ModelUnloaded in {type(end) for end in ends}
    assert {type(end) for end in ends} <= {ModelUnloaded, list}
    assert loaded.runners[instance.id].status == 0


async def test_an_unload_goes_on_although_the_runner_is_silent(start: Start) -> None:
    loaded = await start(Timing(grace_s=0.1), unload_wait_s=0.1)
    instance = await loaded.load(key=KEYS[0])
    await freeze(loaded.runners[instance.id])
    loaded.agent.stop(instance.id)
    await released(loaded.agent, instance.id)
    assert (await record(loaded.agent, instance.id)).state is State.UNLOADED


async def test_a_drain_lets_answers_end(start: Start) -> None:
    loaded = await start(drain_s=LATER_S)
    instance = await loaded.load(key=KEYS[0])
    async with answering(loaded, instance) as answer:
        await loaded.agent.finish()
    assert is_whole(answer.result())
    assert (await record(loaded.agent, instance.id)).state is State.LOST


async def test_a_drain_that_is_over_ends_an_unload_that_waits(start: Start) -> None:
    loaded = await start(unload_wait_s=LATER_S, drain_s=0.0)
    instance = await loaded.load(key=KEYS[0], context_length=LONG)
    asked = [asyncio.create_task(loaded.ask(instance, n=None)) for _ in range(10)]
    await until(lambda: loaded.channels.busy(instance) == 10, "ten requests")
    loaded.agent.stop(instance.id)
    await loaded.agent.finish()
    assert not loaded.agent.residents, "while the listener still carries the reason"
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(end) for end in ends} <= {ModelUnloaded, list}
    assert not any(isinstance(end, list) and not is_whole(end) and not is_refused(end) for end in ends)
    assert loaded.runners[instance.id].status == 0


# ---- idle TTL


async def test_a_ttl_counts_from_the_last_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the worker shows hours later while an answer is under way."""
    loaded = await start(Timing(silence_s=0.02))
    instance = await loaded.load(key=KEYS[0], ttl_s=LATER_S / 2, context_length=LONG)
    runner, closed = loaded.runners[instance.id], list[bool]()
    close_if_unused = runner.close_if_unused

    async def noted(since: float) -> bool:
        closed.append(await close_if_unused(since))
        return closed[-1]

    async with busy(loaded, instance):
        monkeypatch.setattr(runner, "close_if_unused", noted)
        later = SimpleNamespace(time=lambda: time.time() + LATER_S, monotonic=time.monotonic)
        monkeypatch.setattr(worker.instance, "time", later)
        await until(lambda: len(closed) > 1, "the runner was asked twice")
        assert closed[:2] == [False, False]
        assert (await record(loaded.agent, instance.id)).state is State.LOADED
    await released(loaded.agent, instance.id)
    assert (await record(loaded.agent, instance.id)).state is State.UNLOADED


async def test_a_request_after_the_load_defers_the_ttl(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = await start(Timing(silence_s=0.02))
    instance = await loaded.load(key=KEYS[0], ttl_s=LATER_S)
    holder = loaded.agent.residents[instance.id]
    assert instance.used_at is not None
    monkeypatch.setattr(holder._record, "written", msgspec.structs.replace(instance, used_at=instance.used_at - 3600))
    assert is_whole(await loaded.ask(instance))
    used_at = await loaded.used_at(instance)
    assert used_at > instance.used_at
    assert holder.requests.used_at == used_at


# ---- eviction


@pytest.fixture
async def tight(start: Start, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A worker with room for one of the models, and the first of them loaded."""
    loaded = await start(Timing(beat_s=0.02), evict="any", device_reserve="0", request_wait_s=LATER_S)
    instance = await loaded.load(1, KEYS[0], context_length=LONG)
    n_bytes = loaded.agent.placer.ledger.reservations[instance.id].bytes[CPU] * 3 // 2
    reading = Reading(id=CPU, is_gpu=False, name="CPU", total_bytes=n_bytes, free_bytes=n_bytes)
    monkeypatch.setattr(loaded.agent.devices, "read", lambda: [reading])
    await loaded.agent.placer.look()
    return loaded


async def first(loaded: Loaded) -> Instance:
    return await record(loaded.agent, "load_1")


async def test_an_idle_instance_is_evicted(tight: Loaded) -> None:
    second = await tight.load(2, KEYS[1], context_length=LONG)
    assert second.evicted == [KEYS[0]]
    assert (await first(tight)).state is State.UNLOADED


async def test_a_load_waits_for_a_busy_instance(tight: Loaded) -> None:
    """Its runner decides: the worker has not heard of the answer."""
    async with busy(tight, await first(tight)):
        second = await tight.begun(KEYS[1], number=2, context_length=LONG)
        await tight.refused_eviction()
        assert (await record(tight.agent, second.id)).state is State.QUEUED
    assert (await tight.reached(second.id, State.LOADED)).evicted == [KEYS[0]]


async def test_a_load_that_waits_for_a_busy_instance_can_be_cancelled(
    tight: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_busy(tight, monkeypatch)
    second = await tight.begun(KEYS[1], number=2, context_length=LONG)
    await until(lambda: second.id in tight.agent.placer._demands, "it waits")
    await tight.agent.store.instances.request_stop(second.id)
    tight.agent.stop(second.id)
    await released(tight.agent, second.id)
    assert (await first(tight)).state is State.LOADED


def report_busy(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first instance report a request that runs."""
    resident = type(loaded.agent.residents["load_1"])
    reported = property(lambda self: Requests(int(self.id == "load_1"), 0, 0, time.time()))
    monkeypatch.setattr(resident, "requests", reported)


async def test_a_load_waits_for_busy_instances_only_so_long(tight: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    report_busy(tight, monkeypatch)
    settings = msgspec.structs.replace(tight.agent.settings, request_wait_s=0.1)
    object.__setattr__(tight.agent._services, "settings", settings)
    second = await tight.begun(KEYS[1], number=2, context_length=LONG)
    await released(tight.agent, second.id)
    refused = await record(tight.agent, second.id)
    assert refused.refused == ["w"]
    assert refused.refusal is not None
    assert refused.refusal.code == "insufficient_memory"
    assert (await first(tight)).state is State.LOADED


async def test_a_pinned_instance_is_not_evicted(tight: Loaded) -> None:
    model = tight.agent.models[KEYS[0]]
    pinned = msgspec.structs.replace(model, settings=ModelSettings(pin=True))
    await tight.agent.publish([pinned, tight.agent.models[KEYS[1]]])
    second = await tight.begun(KEYS[1], number=2, context_length=LONG)
    await released(tight.agent, second.id)
    assert (await record(tight.agent, second.id)).refused == ["w"]
    assert is_whole(await tight.ask(await first(tight)))


async def test_an_instance_loaded_on_demand_stays_for_a_while(tight: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = tight.agent.residents["load_1"]
    on_demand = msgspec.structs.replace(await first(tight), on_demand=True)
    monkeypatch.setattr(holder._record, "written", on_demand)
    second = await tight.begun(KEYS[1], number=2, context_length=LONG)
    await until(lambda: second.id in tight.agent.placer._demands, "it waits")
    assert (await record(tight.agent, second.id)).state is State.QUEUED
    monkeypatch.setattr("worker.memory.placer.STAY_S", 0.0)
    await tight.reached(second.id, State.LOADED)


async def outcome(loaded: Loaded, instance: Instance) -> bool:
    """Send a request.  Returns whether it is answered; fails if it began and was not answered."""
    request = Generate(id=0, client="c", conversation=CONVERSATION, max_tokens=2)
    messages: list[FromRunner] = []
    try:
        async with loaded.channels.answering(instance, request, "/test") as answer:
            async for message in answer:
                messages.append(message)
    except (ModelUnloaded, RunnerLost):  # the second: the runner had not taken the connection
        assert not messages, messages
        return False
    assert is_whole(messages) or is_refused(messages), messages
    return is_whole(messages)


async def test_an_eviction_ends_no_answer(tight: Loaded) -> None:
    """Requests and loads come at once, again and again: every request is answered, or refused before it began."""
    current = await first(tight)
    for number in range(2, ROUNDS + 2):
        assert await outcome(tight, current)
        new = await tight.begun(KEYS[number % 2 == 0], number=number, context_length=LONG)
        over = asyncio.create_task(tight.reached(new.id, State.LOADED))
        while not over.done():
            await asyncio.gather(*(outcome(tight, current) for _ in range(3)))
            await asyncio.sleep(0)
        current = over.result()
