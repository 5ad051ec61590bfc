"""Channels over TCP, in TLS: what differs from those of a Unix socket.  Both ends are on this host."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

import worker.runner.warm
from api.channel.channels import Channels
from shared import framing
from shared.channel.address import Address, Tcp
from shared.channel.messages import Deltas, Ended, Generate, Queued, Started
from shared.channel.trust import Challenge, Hello, Rejected, Welcome, proof
from shared.errors import ClientTooSlow, ModelUnloaded, NoRoute, QueueUnavailable, RunnerLost
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings, SettingsError
from shared.telemetry.tally import Tally
from tests.support import echo
from tests.support.agents import Begin, released
from tests.support.channels import (
    DEADLINE_S,
    MAY_CHOOSE_LOOP,
    PlainStranger,
    Served,
    Stranger,
    TlsStranger,
    descriptors,
    serving,
    text,
    uvloop_policy,
)
from tests.support.service import open_files
from tests.support.waiting import until
from worker.listener import pump, server
from worker.listener.port import opened
from worker.listener.protocol import Listen, encode, pair, send

pytestmark = [pytest.mark.usefixtures("forkserver"), MAY_CHOOSE_LOOP]
event_loop_policy = uvloop_policy
LARGE_BYTES = 30 << 20  # more than all buffers between the two


@pytest.fixture
async def served(begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Served]:
    """Return a worker that API processes reach over TCP only."""
    monkeypatch.setattr(worker.runner.warm, "run_child", echo.run_child)
    with opened(Settings(worker_listen="127.0.0.1:0"), lambda: "") as port:
        async with serving(await begin(), tmp_path / "worker.sock", port) as one:
            elsewhere(one)
            yield one


def elsewhere(served: Served, **changed: object) -> None:
    """Give an API process of another host to a worker; with fields to change in its published TCP address."""

    def snapshot(_: str) -> WorkerSnapshot:
        tcp = msgspec.structs.replace(tcp_of(served), **changed)
        address = msgspec.structs.replace(served.address, boot_id="other", tcp=tcp)
        return msgspec.structs.replace(served.agent.snapshot(), channels=address)

    served.channels = Channels(snapshot, Tally())


def tcp_of(served: Served) -> Tcp:
    assert served.address.tcp is not None
    return served.address.tcp


async def test_requests_are_answered_in_tls(served: Served) -> None:
    messages = await served.answer(n=25)
    assert [type(message) for message in messages if not isinstance(message, Deltas)] == [Queued, Started, Ended]
    assert text(messages) == "0123456789012345678901234"
    answers = await asyncio.gather(*(served.answer(n=i) for i in range(50)))
    assert [len(text(messages)) for messages in answers] == [*range(50)]
    await served.said("channel begun")
    assert [*served.runner.output].count("channel begun") == 1


async def test_large_frames_pass_in_both_directions(served: Served) -> None:
    request = Generate(id=0, client="c", conversation=bytes(LARGE_BYTES))
    async with asyncio.timeout(DEADLINE_S), served.channels.answering(served.instance, request, "/test") as answer:
        assert isinstance(await anext(answer), Queued)
        assert text(await served.answer(n=20_000)) == "0123456789" * 2_000


async def test_a_slow_client_costs_only_its_request(served: Served) -> None:
    request = Generate(id=0, client="c", conversation=echo.FLOOD)
    async with served.channels.answering(served.instance, request, "/test") as slow:
        assert isinstance(await anext(slow), Queued)
        await served.said("cancelled 1")
        assert text(await served.answer()) == "012"
        with pytest.raises(ClientTooSlow):
            await anext(slow)


async def test_an_api_process_that_does_not_read_is_cut_off(served: Served) -> None:
    """The runner ends its channel, and what is buffered on the way is bounded."""

    def talk() -> TlsStranger:
        stranger = TlsStranger(served.address)
        greet(stranger, served)
        assert isinstance(stranger.read(), Welcome)
        for id_ in range(1, 4):
            stranger.send(framing.frame(Generate(id=id_, client="c", conversation=echo.BURST)))
        return stranger

    with await asyncio.to_thread(talk):
        await served.said("channel closed: the API process does not read it")
        await served.said("channel ended")
        assert text(await served.answer()) == "012"


async def test_a_runner_that_ends_ends_its_requests(served: Served) -> None:
    hanging = [asyncio.create_task(served.answer(echo.HANG)) for _ in range(10)]
    await served.said("hanging", times=10)
    os.kill(served.runner.pid, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        ends = await asyncio.gather(*hanging, return_exceptions=True)
    assert {type(end) for end in ends} == {RunnerLost}


async def test_the_reason_of_an_unload_reaches_the_api(served: Served) -> None:
    hanging = asyncio.create_task(served.answer(echo.HANG))
    await served.said("hanging")
    served.agent.stop(served.instance.id)
    with pytest.raises(ModelUnloaded):
        await hanging
    await released(served.agent, served.instance.id)
    with pytest.raises(ModelUnloaded):
        await served.answer()


async def test_a_listener_that_dies_ends_its_channels(served: Served) -> None:
    """The next one has the same port and certificate."""
    hanging = asyncio.create_task(served.answer(echo.HANG))
    await served.said("hanging")
    first, tcp = served.listener_pid(), tcp_of(served)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(RunnerLost, match="connection"):
        await hanging
    await served.said("channel ended")
    assert text(await served.answer()) == "012"
    assert served.listener_pid() != first
    assert tcp_of(served) == tcp


async def test_the_end_of_the_api_ends_its_channel(served: Served) -> None:
    hanging = asyncio.create_task(served.answer(echo.HANG))
    await served.said("hanging")
    await served.channels.close()
    with pytest.raises(QueueUnavailable):
        await hanging
    await served.said("channel ended")


async def test_a_half_closed_connection_is_an_end(served: Served) -> None:
    def talk() -> object:
        with TlsStranger(served.address) as stranger:
            greet(stranger, served)
            assert isinstance(stranger.read(), Welcome)
            stranger.send(framing.frame(Generate(id=1, client="c", conversation=echo.FLOOD)))
            stranger.socket.shutdown(socket.SHUT_WR)
            while stranger.stream.read(1 << 16):
                pass
            return None

    assert await asyncio.to_thread(talk) is None
    await served.said("channel ended")


# ---- routes


async def test_an_api_of_the_same_host_takes_the_unix_socket(served: Served) -> None:
    elsewhere_port = msgspec.structs.replace(tcp_of(served), port=1)  # nothing is there

    def beside(_: str) -> WorkerSnapshot:
        address = msgspec.structs.replace(served.address, tcp=elsewhere_port)
        return msgspec.structs.replace(served.agent.snapshot(), channels=address)

    served.channels = Channels(beside, Tally())
    assert text(await served.answer()) == "012"
    os.unlink(served.address.path)  # as in another container of the same host
    served.channels = Channels(lambda _: served.agent.snapshot(), Tally())
    assert text(await served.answer()) == "012"


async def test_an_address_that_leads_nowhere_has_no_route(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    elsewhere(served, port=port)
    with pytest.raises(NoRoute, match=rf"127\.0\.0\.1 port {port}.*LOADSTONE_WORKER_ADVERTISE"):
        await served.answer()
    elsewhere(served, host="no-such-host.invalid")
    with pytest.raises(NoRoute, match="no-such-host"):
        await served.answer()


async def test_a_server_that_does_not_answer_has_no_route(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.channel.connection.CONNECT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        elsewhere(served, port=silent.getsockname()[1])
        with pytest.raises(NoRoute, match="it does not answer"):
            await served.answer()


async def test_another_certificate_has_no_route(served: Served) -> None:
    elsewhere(served, certificate=bytes(32))
    with pytest.raises(NoRoute, match="another certificate"):
        await served.answer()
    assert "channel begun" not in [*served.runner.output]


@pytest.mark.parametrize(
    ("listen", "advertise", "local", "host", "port"),
    [
        ("127.0.0.1:0", "", "10.0.0.7", "127.0.0.1", 0),
        ("0.0.0.0:0", "", "10.0.0.7", "10.0.0.7", 0),
        ("0.0.0.0:0", "", "", "127.0.0.1", 0),
        ("0.0.0.0:0", "gpu.example", "10.0.0.7", "gpu.example", 0),
        ("127.0.0.1:0", "gpu.example:99", "10.0.0.7", "gpu.example", 99),
        ("localhost:0", "[2001:db8::1]:99", "10.0.0.7", "2001:db8::1", 99),
    ],
)
def test_a_worker_advertises_where_it_is_reached(listen: str, advertise: str, local: str, host: str, port: int) -> None:
    """`port` 0: the one that it listens on."""
    with opened(Settings(worker_listen=listen, worker_advertise=advertise), lambda: local) as opened_port:
        assert opened_port is not None
        bound = opened_port.listening.getsockname()[1]
        assert (opened_port.address.host, opened_port.address.port) == (host, port or bound)


def test_an_advertised_address_outlasts_a_connection_to_redis() -> None:
    local = ["10.0.0.8", "", "10.0.0.7"]
    with opened(Settings(worker_listen="0.0.0.0:0"), local.pop) as port:
        assert port is not None
        assert [port.address.host for _ in range(3)] == ["10.0.0.7", "10.0.0.7", "10.0.0.8"]


def test_a_port_that_is_taken_stops_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(SettingsError, match=rf"LOADSTONE_WORKER_LISTEN is '{listen}'.*already in use"),
            opened(Settings(worker_listen=listen), str),
        ):
            pass


# ---- trust


def greet(stranger: Stranger, served: Served, certificate: bytes | None = None, cut: int | None = None) -> None:
    """Send a Hello with the right secret; `cut`: only that much of it."""
    challenge = stranger.read()
    assert isinstance(challenge, Challenge)
    bound = tcp_of(served).certificate if certificate is None else certificate
    hello = Hello(served.instance.id, proof(served.address.secret, challenge.nonce, served.instance.id, bound))
    stranger.send(framing.frame(hello)[:cut])


async def test_a_proof_holds_for_one_certificate(served: Served) -> None:
    def talk(kind: type[Stranger], certificate: bytes) -> list[object]:
        with kind(served.address) as stranger:
            greet(stranger, served, certificate)
            return [stranger.read(), stranger.read()]

    rejected = [Rejected("wrong_proof"), None]
    assert await asyncio.to_thread(talk, TlsStranger, b"") == rejected
    assert await asyncio.to_thread(talk, TlsStranger, bytes(32)) == rejected
    assert await asyncio.to_thread(talk, Stranger, tcp_of(served).certificate) == rejected


async def test_a_client_without_tls_is_turned_away(served: Served) -> None:
    def talk() -> bytes:
        with PlainStranger(served.address) as stranger:
            stranger.send(framing.frame(Hello(served.instance.id, bytes(32))))
            try:
                return stranger.stream.read()
            except ConnectionResetError:
                return b""

    assert len(await asyncio.to_thread(talk)) < 16, "an alert of TLS at most"
    assert text(await served.answer()) == "012"


async def test_silent_strangers_keep_nobody_out(served: Served) -> None:
    """Neither those that send nothing, nor those that do the handshake of TLS and no more."""
    with ExitStack() as stack:
        for i in range(2 * server.MOST_GREETINGS):
            kind = (PlainStranger, TlsStranger)[i % 2]
            stack.enter_context(await asyncio.to_thread(kind, served.address))
        assert text(await served.answer()) == "012"


async def test_the_oldest_silent_strangers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, whatever they do: 2 of 6 are, and each of the others has a connection and a socketpair."""
    monkeypatch.setattr(server, "MOST_GREETINGS", 4)
    monkeypatch.setattr(server, "GREETING_S", 3600.0)
    monkeypatch.setattr(server, "CLOSE_S", 3600.0)
    monkeypatch.setattr(pump, "CLOSE_S", 3600.0)
    ours, theirs = pair()
    with ours, theirs, ExitStack() as stack, opened(Settings(worker_listen="127.0.0.1:0"), str) as port:
        assert port is not None
        address = Address(path="", boot_id="", secret=b"", tcp=port.address)
        serving = asyncio.create_task(server.Server(theirs).run())
        send(ours, encode(Listen(b"secret", port.identity)), port.listening)
        first = stack.enter_context(await asyncio.to_thread(TlsStranger, address))
        assert isinstance(await asyncio.to_thread(first.read), Challenge)
        before = descriptors(os.getpid())
        for _ in range(5):
            stranger = stack.enter_context(await asyncio.to_thread(TlsStranger, address))
            assert isinstance(await asyncio.to_thread(stranger.read), Challenge)
        await until(lambda: descriptors(os.getpid()) == before + 5 + 3 * 3, "two of six are dropped")
        ours.close()
        await serving
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:  # as `asyncio.run` does at the end of the process
            task.cancel()
        await asyncio.wait(left)


async def test_vanishing_clients_leave_nothing(served: Served) -> None:
    """At each stage of the greeting, and in an answer."""

    def vanish(stage: int) -> None:
        with (PlainStranger if stage < 2 else TlsStranger)(served.address) as stranger:
            if stage == 1:
                stranger.send(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
            if stage < 3:
                return
            greet(stranger, served, cut=20 if stage == 3 else None)
            if stage < 5:
                return
            assert isinstance(stranger.read(), Welcome)
            stranger.send(framing.frame(Generate(id=1, client="c", conversation=echo.FLOOD)))

    assert text(await served.answer()) == "012"
    pids = os.getpid(), served.listener_pid(), served.runner.pid
    before = [descriptors(pid) for pid in pids]
    for i in range(200):
        await asyncio.to_thread(vanish, i % 6)
    await until(lambda: [descriptors(pid) for pid in pids] == before, "all descriptors closed")
    assert text(await served.answer()) == "012"


async def test_the_private_key_is_in_no_file(served: Served) -> None:
    text_of, files = seen_of(served.listener_pid())
    assert b"PRIVATE KEY" not in text_of
    assert not [file for file in files if "memfd" in file]
    assert "PRIVATE KEY" not in repr(served.agent.snapshot())


def seen_of(pid: int) -> tuple[bytes, list[str]]:
    """Return the command line and environment of a process, and its open files."""
    home = Path(f"/proc/{pid}")
    text_of = (home / "cmdline").read_bytes() + (home / "environ").read_bytes()
    return text_of, open_files(pid)


def test_an_address_shows_no_secret() -> None:
    tcp = Tcp(host="h", port=1, certificate=b"")
    assert "hush" not in repr(Address(path="/p", boot_id="b", secret=b"hush", tcp=tcp))
