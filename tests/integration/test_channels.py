"""Channels from an API process to runners, with real processes: a listener, and runners that echo."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

import worker.runner.warm
from api.channel.channels import Channels
from shared import framing
from shared.channel.address import Address
from shared.channel.messages import Deltas, Ended, Generate, Queued, Refused, Started
from shared.channel.trust import Challenge, Hello, Rejected, Welcome, proof
from shared.errors import ClientTooSlow, ModelUnloaded, NoRoute, QueueUnavailable, RunnerLost
from shared.lifecycle import State
from shared.schema.snapshot import WorkerSnapshot
from shared.telemetry.tally import Tally
from tests.support import echo
from tests.support.agents import Begin, delivered, reached, released, warm
from tests.support.channels import (
    DEADLINE_S,
    MAY_CHOOSE_LOOP,
    Served,
    Stranger,
    descriptors,
    serving,
    text,
    uvloop_policy,
)
from tests.support.runners import freeze
from tests.support.service import below
from tests.support.waiting import until
from worker.listener import process as listener_process
from worker.listener import server
from worker.listener.protocol import Listen, encode, pair, send
from worker.runner.protocol import Pong

pytestmark = [pytest.mark.usefixtures("forkserver"), MAY_CHOOSE_LOOP]
event_loop_policy = uvloop_policy


@pytest.fixture
async def served(begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Served]:
    monkeypatch.setattr(worker.runner.warm, "run_child", echo.run_child)
    async with serving(await begin(), tmp_path / "worker.sock") as one:
        yield one


async def test_a_request_is_answered_in_order(served: Served) -> None:
    messages = await served.answer(n=25)
    assert [type(message) for message in messages if not isinstance(message, Deltas)] == [Queued, Started, Ended]
    assert isinstance(messages[0], Queued)
    assert isinstance(messages[-1], Ended)
    assert text(messages) == "0123456789012345678901234"
    assert "requests|/test|completed|" in served.tally._counts


async def test_concurrent_requests_share_one_channel(served: Served) -> None:
    answers = await asyncio.gather(*(served.answer(n=i) for i in range(50)))
    assert [len(text(messages)) for messages in answers] == [*range(50)]
    await served.said("channel begun")
    assert [*served.runner.output].count("channel begun") == 1


async def test_a_busy_instance_is_known_at_once(served: Served) -> None:
    request = Generate(id=0, client="c", conversation=echo.HANG)
    assert served.channels.busy(served.instance) == 0
    async with (
        served.channels.answering(served.instance, request, "/test") as one,
        served.channels.answering(served.instance, request, "/test"),
    ):
        await anext(one)
        assert served.channels.busy(served.instance) == 2
    assert served.channels.busy(served.instance) == 0
    served.runner.load = Pong(running=2, waiting=3)  # of other API processes
    assert served.channels.busy(served.instance) == 5


async def test_leaving_an_answer_cancels_its_request(served: Served) -> None:
    request = Generate(id=0, client="c", conversation=echo.HANG)
    async with served.channels.answering(served.instance, request, "/test") as answer:
        assert isinstance(await anext(answer), Queued)
    await served.said("cancelled 1")
    assert "requests|/test|cancelled|" in served.tally._counts
    assert text(await served.answer()) == "012"


async def test_a_slow_reader_costs_only_its_request(served: Served) -> None:
    request = Generate(id=0, client="c", conversation=echo.FLOOD)
    async with served.channels.answering(served.instance, request, "/test") as slow:
        assert isinstance(await anext(slow), Queued)
        await served.said("cancelled 1")
        assert text(await served.answer()) == "012"
        with pytest.raises(ClientTooSlow):
            await anext(slow)


async def test_deltas_are_joined_while_the_api_is_behind(served: Served) -> None:
    messages = await served.answer(n=20_000)
    assert text(messages) == "0123456789" * 2_000
    n = sum(len(message.deltas) for message in messages if isinstance(message, Deltas))
    assert n < 20_000


async def test_a_channel_that_is_too_far_behind_is_closed(served: Served) -> None:
    with pytest.raises(RunnerLost):
        await served.answer(echo.BURST)
    await served.said("channel closed: the API process does not read it")
    await served.said("channel ended")
    assert text(await served.answer()) == "012"


async def test_a_crashed_runner_ends_its_requests(served: Served) -> None:
    hanging = [asyncio.create_task(served.answer(echo.HANG)) for _ in range(10)]
    await served.said("hanging", times=10)
    os.kill(served.runner.pid, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        ends = await asyncio.gather(*hanging, return_exceptions=True)
    assert {type(end) for end in ends} == {RunnerLost}
    await reached(served.agent, served.instance.id, State.FAILED)


async def test_an_unload_ends_requests_with_its_reason(served: Served) -> None:
    hanging = [asyncio.create_task(served.answer(echo.HANG)) for _ in range(10)]
    await served.said("hanging", times=10)
    served.agent.stop(served.instance.id)
    async with asyncio.timeout(DEADLINE_S):
        ends = await asyncio.gather(*hanging, return_exceptions=True)
    assert {type(end) for end in ends} == {ModelUnloaded}
    await released(served.agent, served.instance.id)
    with pytest.raises(ModelUnloaded):
        await served.answer()


async def test_a_deaf_runner_does_not_delay_its_unload_for_long(served: Served) -> None:
    deaf = asyncio.create_task(served.answer(echo.DEAF))
    await served.said("deaf")
    served.agent.stop(served.instance.id)
    await released(served.agent, served.instance.id)
    assert served.runner.status == 0, "it exited at the first rung of the stop ladder"
    with pytest.raises(RunnerLost):
        await deaf


async def test_an_open_channel_survives_the_listener(served: Served) -> None:
    """The next listener takes the connections that come while there is none."""
    assert text(await served.answer()) == "012"
    first = served.listener_pid()
    os.kill(first, signal.SIGKILL)
    assert text(await served.answer()) == "012"
    another = Channels(lambda _: served.agent.snapshot(), Tally())
    served.channels, old = another, served.channels
    assert text(await served.answer()) == "012"
    assert served.listener_pid() != first
    await served.said("channel begun", times=2)
    await old.close()
    await served.said("channel ended")


async def test_a_hung_listener_is_replaced(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_process, "SILENCE_S", 3.0)
    assert text(await served.answer()) == "012"
    first = served.listener_pid()
    os.kill(first, signal.SIGSTOP)
    for _ in range(5):
        served.agent.listener.watch(1.0)
    await until(lambda: first not in [one.pid for one in below(os.getpid())], "the listener is gone")
    served.channels = Channels(lambda _: served.agent.snapshot(), Tally())
    assert text(await served.answer()) == "012"
    await served.channels.close()


async def test_an_answering_listener_is_kept(served: Served) -> None:
    await served.answer()
    first = served.listener_pid()
    for _ in range(30):
        served.agent.listener.watch(1.0)
        await until(lambda: not served.agent.listener._awaits_pong, "pong")
    assert served.listener_pid() == first


async def test_the_end_of_the_api_ends_its_channel(served: Served) -> None:
    hanging = asyncio.create_task(served.answer(echo.HANG))
    await served.said("hanging")
    await served.channels.close()
    with pytest.raises(QueueUnavailable):
        await hanging
    await served.said("channel ended")


async def test_an_idle_channel_is_closed_and_opened_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.channel.connection.IDLE_S", 0.01)
    await served.answer()
    await served.said("channel ended")
    assert text(await served.answer()) == "012"


async def test_a_runner_that_is_too_slow_to_take_a_channel(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await freeze(served.runner)
    with pytest.raises(RunnerLost):
        await served.answer()
    os.kill(served.runner.pid, signal.SIGCONT)
    assert text(await served.answer()) == "012"


# ---- routes


async def test_another_host_has_no_route(served: Served) -> None:
    def elsewhere(_: str) -> WorkerSnapshot:
        snapshot = served.agent.snapshot()
        address = msgspec.structs.replace(served.address, boot_id="other")
        return msgspec.structs.replace(snapshot, channels=address)

    served.channels = Channels(elsewhere, Tally())
    with pytest.raises(NoRoute, match="another host"):
        await served.answer()


async def test_a_worker_without_a_socket_has_no_route(served: Served) -> None:
    served.channels = Channels(lambda _: msgspec.structs.replace(served.agent.snapshot(), channels=None), Tally())
    with pytest.raises(NoRoute):
        await served.answer()


async def test_a_worker_that_is_gone_has_no_route(served: Served) -> None:
    served.channels = Channels(lambda _: None, Tally())
    with pytest.raises(NoRoute):
        await served.answer()
    os.unlink(served.address.path)
    served.channels = Channels(lambda _: served.agent.snapshot(), Tally())
    with pytest.raises(NoRoute, match="not in reach"):
        await served.answer()


async def test_an_embedding_model_refuses_conversations(begin: Begin, tmp_path: Path) -> None:
    agent = await begin()
    with agent.listener.bound([tmp_path / "worker.sock"]):
        listening = asyncio.create_task(agent.listener.run())
        runner = await warm(agent)
        instance = await reached(agent, await delivered(agent, key="p/embedding"), State.LOADED)
        one = Served(agent, runner, instance, Channels(lambda _: agent.snapshot(), Tally()), Tally())
        (refused,) = await one.answer()
        assert isinstance(refused, Refused)
        assert refused.code == "wrong_type"
        await one.channels.close()
        listening.cancel()
        await asyncio.wait([listening])


# ---- trust


async def greeted(address: Address, secret: bytes, load_id: str, replayed: bytes = b"") -> list[object]:
    def talk() -> list[object]:
        with Stranger(address) as stranger:
            challenge = stranger.read()
            assert isinstance(challenge, Challenge)
            assert len(challenge.nonce) == 32
            hello = Hello(load_id, proof(secret, replayed or challenge.nonce, load_id))
            stranger.send(framing.frame(hello))
            return [stranger.read(), stranger.read()]

    return await asyncio.to_thread(talk)


async def test_a_wrong_secret_is_rejected(served: Served) -> None:
    address, id_ = served.address, served.instance.id
    wrong = [Rejected("wrong_proof"), None]
    assert await greeted(address, b"", id_) == wrong
    assert await greeted(address, address.secret, id_, replayed=b"n" * 32) == wrong
    assert await greeted(address, address.secret, "load_0") == [Rejected("unknown_instance"), None]


async def test_noise_before_the_hello_ends_the_connection(served: Served) -> None:
    def talk(noise: bytes) -> object:
        with Stranger(served.address) as stranger:
            assert isinstance(stranger.read(), Challenge)
            stranger.send(noise)
            return stranger.read()

    for noise in (framing.LENGTH.pack(1 << 31), framing.LENGTH.pack(1) + b"\xc1", framing.frame({"type": "welcome"})):
        assert await asyncio.to_thread(talk, noise) is None
    assert text(await served.answer()) == "012"


async def test_silent_strangers_do_not_keep_others_out(served: Served) -> None:
    with ExitStack() as stack:
        for _ in range(2 * server.MOST_GREETINGS):
            stack.enter_context(await asyncio.to_thread(Stranger, served.address))
        assert text(await served.answer()) == "012"


async def test_the_oldest_silent_strangers_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_GREETINGS", 4)
    monkeypatch.setattr(server, "GREETING_S", 3600.0)
    listener = listener_process.Listener()
    ours, theirs = pair()
    with ours, theirs, ExitStack() as stack, listener.bound([tmp_path / "s"]):
        assert listener.address is not None
        assert listener._listening is not None
        serving = asyncio.create_task(server.Server(theirs).run())
        send(ours, encode(Listen(b"secret")), listener._listening)
        strangers = []
        for _ in range(6):
            stranger = stack.enter_context(await asyncio.to_thread(Stranger, listener.address))
            assert isinstance(await asyncio.to_thread(stranger.read), Challenge)
            strangers.append(stranger)
        assert [await asyncio.to_thread(stranger.read) for stranger in strangers[:2]] == [None, None]
        for stranger in strangers[2:]:
            stranger.socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                stranger.socket.recv(1)
        ours.close()
        await serving
        for task in asyncio.all_tasks() - {asyncio.current_task()}:  # as `asyncio.run` does at the end of the process
            task.cancel()


async def test_vanishing_clients_leave_nothing(served: Served) -> None:
    """At each stage of the greeting, and in an answer."""

    def vanish(stage: int) -> None:
        with Stranger(served.address) as stranger:
            if stage == 0:
                return
            challenge = stranger.read()
            assert isinstance(challenge, Challenge)
            hello = framing.frame(
                Hello(served.instance.id, proof(served.address.secret, challenge.nonce, served.instance.id))
            )
            stranger.send(hello[: len(hello) // (2 if stage == 1 else 1)])
            if stage < 3:
                return
            assert isinstance(stranger.read(), Welcome)
            request = Generate(id=1, client="c", conversation=echo.HANG if stage == 3 else echo.FLOOD)
            stranger.send(framing.frame(request))

    assert text(await served.answer()) == "012"
    pids = os.getpid(), served.listener_pid(), served.runner.pid
    before = [descriptors(pid) for pid in pids]
    for i in range(200):
        await asyncio.to_thread(vanish, i % 5)
    await until(lambda: [descriptors(pid) for pid in pids] == before, "all descriptors closed")
    assert text(await served.answer()) == "012"


# ---- the socket


async def test_the_socket_and_its_secret_are_private(served: Served) -> None:
    assert os.stat(served.address.path).st_mode & 0o777 == 0o600
    assert repr(served.address.secret) not in repr(served.agent.snapshot())


async def test_a_long_path_is_not_used(tmp_path: Path) -> None:
    long, short = tmp_path / ("x" * 108), tmp_path / "s"
    listener = listener_process.Listener()
    short.write_bytes(b"")  # what a killed worker left
    with listener.bound([long, short]):
        assert path_of(listener) == str(short)
    assert not short.exists()
    with listener.bound([long]):
        assert path_of(listener) is None
        await listener.run()


def path_of(listener: listener_process.Listener) -> str | None:
    return None if listener.address is None else listener.address.path
