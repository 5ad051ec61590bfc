"""Who proves that he lives: runners answer pings, the lease depends on it, and what is silent is replaced."""

from __future__ import annotations

import asyncio
import multiprocessing.forkserver
import os
import signal
from contextlib import suppress
from multiprocessing.context import ForkServerProcess

import pytest
import redis

from shared.lifecycle import State
from tests.integration.test_agent import (
    SHORT_S,
    Begin,
    agent,
    begin,
    check_failed,
    delivered,
    loaded,
    reached,
    released,
    warm,
)
from tests.support.runners import freeze, is_gone
from tests.support.waiting import until
from worker.agent import Agent
from worker.engine_log import EngineLog
from worker.timing import Timing

pytestmark = pytest.mark.usefixtures("forkserver")

__all__ = ["agent", "begin"]  # fixtures
BEAT_S = 1.0


async def beats(agent: Agent, number: int) -> None:
    """As many rounds of pings, with time for the answers in between, but less than a second each."""
    for _ in range(number):
        await agent.runners.watch(BEAT_S)
        await asyncio.sleep(0.05)


async def test_whoever_answers_is_not_silent_whatever_it_does(agent: Agent) -> None:
    """Warm, or holding a model."""
    _, holder = await loaded(agent)
    waiting = await warm(agent)
    await beats(agent, 20)
    assert (holder.silent_s, waiting.silent_s, agent.runners.silent_s) == (0, 0, 0)
    assert not is_gone(waiting.pid)


async def test_a_warm_runner_that_is_silent_is_replaced(agent: Agent) -> None:
    silent = await warm(agent)
    await freeze(silent)
    patience = round(agent.settings.lease_s / 2)
    await beats(agent, patience)
    assert not is_gone(silent.pid)
    await beats(agent, 2)
    await until(lambda: is_gone(silent.pid), "it is killed")
    await beats(agent, 2)
    fresh = await warm(agent)
    assert fresh is not silent
    await beats(agent, 2)
    assert (fresh.silent_s, agent.runners.silent_s) == (0, 0)


async def test_a_warm_runner_that_died_is_replaced_before_a_load_needs_it(agent: Agent) -> None:
    dead = await warm(agent)
    dead.kill()
    await until(dead.exited.is_set, "it is dead")
    await beats(agent, 1)
    assert await warm(agent) is not dead


async def test_without_a_runner_that_answers_the_lease_runs_out(
    begin: Begin, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is held again once there is one."""

    def fail(_: ForkServerProcess) -> None:
        raise OSError(12, "no room")

    agent = await begin(Timing(beat_s=0.05))
    monkeypatch.setattr(agent.store.workers, "lease_s", 0.5)
    runner = await warm(agent)
    with monkeypatch.context() as patched:
        patched.setattr(ForkServerProcess, "start", fail)
        runner.kill()
        beating = asyncio.create_task(agent.beat())
        await until(lambda: not raw.exists("lease:w"), "the lease is gone")
    await until(lambda: raw.get("lease:w") == b"e", "the lease is held again")
    beating.cancel()
    await asyncio.wait([beating])


async def test_a_cancellation_that_gets_lost_within_a_beat_ends_it_all_the_same(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a worker that stops would go on renewing its lease."""
    began = asyncio.Event()

    async def deaf() -> None:
        began.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    monkeypatch.setattr(agent, "beat_once", deaf)
    beating = asyncio.create_task(agent.beat())
    await began.wait()
    beating.cancel()
    done, _ = await asyncio.wait([beating], timeout=5)
    assert done
    assert beating.cancelled()


async def test_a_cancellation_that_gets_lost_while_a_log_is_kept_ends_that_all_the_same(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or asyncio would report, at a time of its own, a task that nobody waits for."""
    _, runner = await loaded(agent)
    began = asyncio.Event()

    async def deaf(*_: object) -> None:
        began.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    log = EngineLog(agent.store.instances, "load_9", "w", agent.settings.models_dir, 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(agent.store.instances, "write_engine_log", deaf)
        following = log.follow(runner)
        runner.output.grown.set()
        await began.wait()
        log.close()
        done, _ = await asyncio.wait([following], timeout=5)
    assert done
    assert following.cancelled()


async def test_a_loaded_model_whose_runner_is_silent_is_failed_and_its_memory_is_back(
    begin: Begin,
) -> None:
    agent = await begin(Timing(silence_s=0.05, grace_s=SHORT_S), stall_limit_s=3.0)
    id_, runner = await loaded(agent)
    _, healthy = await loaded(agent, 2, "p/moe")
    await freeze(runner)
    await beats(agent, 5)
    check_failed(await reached(agent, id_, State.FAILED), "engine_crashed", "did not answer for 3 s")
    assert is_gone(runner.pid)
    assert not is_gone(healthy.pid)
    await released(agent, id_)
    assert [*agent.desired.instances] == ["p/moe"], "what failed is not loaded again by itself"


async def test_a_pause_of_the_worker_is_no_silence_of_its_runners(agent: Agent) -> None:
    """The answers lie unread meanwhile."""
    runner = await warm(agent)
    await agent.runners.watch(BEAT_S)
    for _ in range(3):
        await agent.runners.watch(BEAT_S)  # without a chance to read between two of them
    assert runner.silent_s <= 3 * BEAT_S
    await beats(agent, 2)
    assert runner.silent_s == 0


async def test_a_server_that_forks_no_more_fails_loads_in_time(begin: Begin) -> None:
    """Nobody waits for it without end; it is stopped, not dead, so that nothing else tells."""
    agent = await begin(Timing(warm_s=1.0))
    first = await warm(agent)
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(server, signal.SIGSTOP)
    try:
        id_, _ = await loaded(agent)
        other = await delivered(agent, 2)
        check_failed(await reached(agent, other, State.FAILED), "engine_crashed", "the fork server timed out")
        await released(agent, other)
        assert not is_gone(first.pid)
    finally:
        os.kill(server, signal.SIGCONT)
    await loaded(agent, 3)
    agent.stop(id_)
