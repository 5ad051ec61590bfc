"""Silent runners: a runner that answers no pings is replaced, and without one that answers the lease runs out."""

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
from tests.support.agents import (
    SHORT_S,
    Begin,
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
from worker.runner.process import Runner
from worker.timing import Timing

pytestmark = pytest.mark.usefixtures("forkserver")

BEAT_S = 1.0


async def beats(agent: Agent, number: int, silent: Runner | None = None) -> None:
    """Send this many rounds of pings, one beat apart by their own clock.  In between, every runner answers but
    `silent`, however long that takes."""

    def all_answered() -> bool:
        return all(
            runner is silent or runner.exited.is_set() or not runner._awaits_pong for runner in agent.runners._all
        )

    for _ in range(number):
        await agent.runners.watch(BEAT_S)
        await until(all_answered, "an answer")


async def test_runner_that_answers_is_not_silent(agent: Agent) -> None:
    """Whether it is warm or holds a model."""
    _, holder = await loaded(agent)
    waiting = await warm(agent)
    await beats(agent, 20)
    assert (holder.silent_s, waiting.silent_s, agent.runners.silent_s) == (0, 0, 0)
    assert not is_gone(waiting.pid)


async def test_silent_warm_runner_is_replaced(agent: Agent) -> None:
    silent = await warm(agent)
    await freeze(silent)
    patience = round(agent.settings.lease_s / 2)
    await beats(agent, patience, silent)
    assert not is_gone(silent.pid)
    await beats(agent, 2, silent)
    await until(lambda: is_gone(silent.pid), "it is killed")
    await beats(agent, 2)
    fresh = await warm(agent)
    assert fresh is not silent
    await beats(agent, 2)
    assert (fresh.silent_s, agent.runners.silent_s) == (0, 0)


async def test_dead_warm_runner_is_replaced_before_the_next_load(agent: Agent) -> None:
    dead = await warm(agent)
    dead.kill()
    await until(dead.exited.is_set, "it is dead")
    await beats(agent, 1)
    assert await warm(agent) is not dead


async def test_lease_runs_out_without_a_runner_that_answers(
    begin: Begin, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken again once there is one."""

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


async def test_beat_ends_although_it_swallows_its_cancellation(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a worker that stops would go on renewing its lease."""
    began = asyncio.Event()

    async def deaf() -> None:
        began.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    monkeypatch.setattr(agent, "beat_once", deaf)
    beating = asyncio.create_task(agent.beat())
    await began.wait()
    beating.cancel()
    done, _ = await asyncio.wait([beating], timeout=60)
    assert done
    assert beating.cancelled()


async def test_engine_log_ends_although_it_swallows_its_cancellation(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else asyncio would report later a task that nothing awaits."""
    _, runner = await loaded(agent)
    began = asyncio.Event()

    async def deaf(*_: object) -> None:
        began.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    log = EngineLog(agent.store.instances, "load_9", "w", agent.settings.roots, 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(agent.store.instances, "write_engine_log", deaf)
        following = log.follow(runner)
        runner.output.grown.set()
        await began.wait()
        log.close()
        done, _ = await asyncio.wait([following], timeout=60)
    assert done
    assert following.cancelled()


async def test_instance_of_a_silent_runner_fails_and_frees_memory(begin: Begin) -> None:
    agent = await begin(Timing(silence_s=0.05, grace_s=SHORT_S), stall_limit_s=3.0)
    id_, runner = await loaded(agent)
    _, healthy = await loaded(agent, 2, "p/moe")
    await freeze(runner)
    await beats(agent, 5, runner)
    check_failed(await reached(agent, id_, State.FAILED), "engine_crashed", "did not answer for 3 s")
    assert is_gone(runner.pid)
    assert not is_gone(healthy.pid)
    await released(agent, id_)
    assert [*agent.desired.instances] == ["p/moe"], "a failed instance is not restored"


async def test_paused_worker_does_not_count_its_runners_as_silent(agent: Agent) -> None:
    """Their answers are in the channel, and it has not read them."""
    runner = await warm(agent)
    await agent.runners.watch(BEAT_S)
    for _ in range(3):
        await agent.runners.watch(BEAT_S)  # back to back, so that no answer is read in between
    assert runner.silent_s <= 3 * BEAT_S
    await beats(agent, 2)
    assert runner.silent_s == 0


async def test_load_fails_when_the_fork_server_hangs(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is stopped and not dead, so that only the deadline of the load can end the wait."""
    first = await warm(agent)
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(server, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(agent.runners, "_timing", Timing(warm_s=1.0))
            id_, _ = await loaded(agent)
            other = await delivered(agent, 2)
            await reached(agent, other, State.FAILED)
        check_failed(await reached(agent, other, State.FAILED), "engine_crashed", "the fork server timed out")
        await released(agent, other)
        assert not is_gone(first.pid)
    finally:
        os.kill(server, signal.SIGCONT)
    await loaded(agent, 3)
    agent.stop(id_)
