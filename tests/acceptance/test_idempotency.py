"""A repeated request does not start a second load: with an Idempotency-Key, or after its client gave up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.pair import Pair, paired
from tests.support.service import (
    JSON,
    LOAD,
    PATIENCE_S,
    STATUS,
    TINY,
    Client,
    Reply,
    Running,
    error,
    meanwhile,
    until,
)


@pytest.fixture(scope="module")
def the_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    home = tmp_path_factory.mktemp("pair")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with paired(home) as pair:
        yield pair


@pytest.fixture
def pair(the_pair: Pair) -> Iterator[Pair]:
    yield the_pair
    until(lambda: not under_way(the_pair.apis[0]), "no load is under way")
    the_pair.apis[0].unload_all()


def load(client: Client, key: str, model: str = TINY, prefer: str = "", **fields: object) -> Reply:
    headers = {**JSON, "Idempotency-Key": key, **({"Prefer": prefer} if prefer else {})}
    return client.send("POST", LOAD, content=json.dumps({"model": model, **fields}).encode(), headers=headers)


def listed(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.send("GET", STATUS, params={"limit": 1000}).json()["jobs"]
    return found


def jobs(client: Client) -> int:
    return len(listed(client))


def under_way(client: Client) -> list[str]:
    return [job["job_id"] for job in listed(client) if job["status"] in ("queued", "loading")]


def connections(api: Running) -> int:
    (process,) = (process for process in api.tree() if "api" in process.words)
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def send_512(pair: Pair) -> list[tuple[str, str, str]]:
    """Return status line, Server-Timing and body of 512 replies; plain sockets, since a client's pool takes seconds."""
    body = json.dumps({"model": TINY})
    head = ["Host: 127.0.0.1", f"Content-Length: {len(body)}", "Content-Type: application/json", "Connection: close"]
    request = "\r\n".join([f"POST {LOAD} HTTP/1.1", *head, "Idempotency-Key: all-at-once", "", body]).encode()

    async def one(i: int) -> tuple[str, str, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.apis[i % 2].port)
        try:
            writer.write(request)
            head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        finally:
            writer.close()
        status, *fields = head.split("\r\n")
        return status, next((field for field in fields if field.lower().startswith("server-timing")), ""), body

    async def ask() -> list[tuple[str, str, str]]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*map(one, range(512)))

    return asyncio.run(ask())


def test_512_requests_over_two_apis_make_one_load(pair: Pair) -> None:
    before = jobs(pair.apis[0])
    idle = [connections(api) for api in pair.running]
    with ExitStack() as asking, pair.worker.frozen():
        answers = asking.enter_context(meanwhile(send_512, pair))
        for api, few in zip(pair.running, idle, strict=True):
            until(lambda api=api, few=few: connections(api) >= few + 256, "256 requests are connected", 30)  # type: ignore[misc]
    assert len(answers.result()) == 512
    ((status, timing, body),) = set(answers.result())
    assert status == "HTTP/1.1 200 OK"
    assert timing
    assert json.loads(body)["instance_id"] == TINY
    assert list(pair.apis[1].instances()) == [TINY]
    assert jobs(pair.apis[1]) == before + 1


def test_a_finished_load_is_answered_with_its_outcome(pair: Pair) -> None:
    one, other = pair.apis
    first = load(one, "again", echo_load_config=True)
    assert first.status == 200
    assert one.unload(TINY).status == 200
    again = load(other, "again", echo_load_config=True)
    assert (again.status, again.text) == (200, first.text)
    assert again.headers["server-timing"] == first.headers["server-timing"]
    accepted = load(other, "again", prefer="respond-async", echo_load_config=True)
    assert (accepted.status, accepted.json()["status"]) == (202, "loaded")
    assert accepted.json()["result"] == first.json()
    assert one.instances() == {}


def test_a_key_stays_bound_to_its_cancelled_load(pair: Pair) -> None:
    one, other = pair.apis
    with pair.worker.frozen():
        held, job = load(one, "held", prefer="respond-async"), load(one, "c", prefer="respond-async").json()
        assert one.cancel(job["job_id"]).status == 200
    error(load(other, "c"), 409, "model_load_failed", "load_cancelled")
    assert one.job(held.json()["job_id"], wait_s=20)["status"] == "loaded"
    assert load(other, "d").json()["instance_id"] == f"{TINY}:2"


@pytest.mark.parametrize("fields", [{"context_length": 300}, {"echo_load_config": True}])
def test_a_key_with_another_request_is_refused(pair: Pair, fields: dict[str, Any]) -> None:
    one, other = pair.apis
    assert load(one, "mine", context_length=200).status == 200
    error(load(other, "mine", **fields), 422, "invalid_request", "idempotency_key_reused", "Idempotency-Key")
    assert load(other, "mine", context_length=200).status == 200
    integral = {**JSON, "Idempotency-Key": "mine"}  # decodes to the same request
    body = b'{"context_length": 200.0, "model": "acme/tiny"}'
    assert other.send("POST", LOAD, content=body, headers=integral).status == 200


def test_a_refusal_is_not_remembered(pair: Pair) -> None:
    one, other = pair.apis
    error(load(one, "early", model="acme/later"), 404, "model_not_found", param="model")
    error(load(one, "early", context_length=1 << 30), 400, "invalid_request", "invalid_value", "context_length")
    assert load(other, "early").status == 200


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\xe4"])
def test_an_invalid_key_is_refused(pair: Pair, key: str) -> None:
    reply = pair.apis[0].send("POST", LOAD, json={"model": TINY}, headers=[(b"Idempotency-Key", key.encode("latin-1"))])
    error(reply, 400, "invalid_request", "invalid_value", "Idempotency-Key")
    assert load(pair.apis[0], "~" * 255).status == 200


# ---- clients that give up


def ids(client: Client) -> set[str]:
    return {job["job_id"] for job in listed(client)}


def joiners(pair: Pair) -> dict[str, bytes]:
    """Return the loads that their requesters have left, each with what has joined it."""
    with pair.redis.client() as redis:
        marks: list[Any] = [redis.hgetall(key) for key in redis.scan_iter("left:*")]
    return {id_.decode(): joiner for mark in marks for id_, joiner in mark.items()}


def begin(client: Client, *fields: str) -> socket.socket:
    """Send a load without reading the reply; return the connection."""
    body = json.dumps({"model": TINY})
    head = ["Host: 127.0.0.1", f"Content-Length: {len(body)}", "Content-Type: application/json", *fields]
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=PATIENCE_S)
    connection.sendall("\r\n".join([f"POST {LOAD} HTTP/1.1", *head, "", body]).encode())
    return connection


def connected(client: Client, *fields: str) -> tuple[socket.socket, str]:
    """Send a load without reading the reply; return the connection, and the id of the load once it is accepted."""
    before = ids(client)
    connection = begin(client, *fields)
    (id_,) = until(lambda: ids(client) - before, "the load is accepted")
    return connection, id_


def leaves(pair: Pair, *fields: str) -> str:
    """Send a load to the first API, disconnect before the result, and return its id once the departure is noted."""
    connection, id_ = connected(pair.apis[0], *fields)
    connection.close()
    until(lambda: joiners(pair).get(id_) == b"", "the API has noted that its client left")
    return id_


def ask(client: Client, **fields: object) -> Reply:
    """Send a load without waiting for its result."""
    body = json.dumps({"model": TINY, **fields}).encode()
    reply = client.send("POST", LOAD, content=body, headers={**JSON, "Prefer": "respond-async"})
    assert reply.status == 202, reply.text
    return reply


def check_joined(reply: Reply, id_: str) -> None:
    assert (reply.json()["job_id"], reply.headers.get("loadstone-joined")) == (id_, id_)


def check_further(reply: Reply, instance_id: str) -> None:
    assert reply.json()["instance_id"] == instance_id
    assert "loadstone-joined" not in reply.headers


@pytest.mark.parametrize("fields", [(), ("Accept: text/event-stream",), ("Prefer: wait=60",)])
def test_a_retry_joins_the_load_that_its_client_left(pair: Pair, fields: tuple[str, ...]) -> None:
    with ExitStack() as asking, pair.worker.frozen():
        left = leaves(pair, *fields)
        again = asking.enter_context(meanwhile(pair.apis[1].load, TINY))
        until(lambda: joiners(pair)[left], "the retry has joined")
        check_further(ask(pair.apis[1]), f"{TINY}:2")  # a client waits for the first one again
    joined = again.result()
    assert (joined.status, joined.json()["instance_id"]) == (200, TINY)
    assert joined.headers["loadstone-joined"] == left


def test_a_stream_says_that_it_joined(pair: Pair) -> None:
    with ExitStack() as streaming, pair.worker.frozen():
        left = leaves(pair)
        connection = streaming.enter_context(begin(pair.apis[1], "Accept: text/event-stream"))
        head = connection.recv(4096).decode().lower()
    assert f"loadstone-joined: {left}" in head


def test_a_load_may_be_left_and_joined_again_and_again(pair: Pair) -> None:
    with pair.worker.frozen():
        left = leaves(pair)
        for _ in range(3):
            connection = begin(pair.apis[0])
            until(lambda: joiners(pair)[left], "the retry has joined")
            connection.close()
            until(lambda: joiners(pair)[left] == b"", "the API has noted that its client left")
        check_joined(ask(pair.apis[1]), left)
        check_further(ask(pair.apis[1]), f"{TINY}:2")  # a client that polls has not left


def test_the_load_that_is_furthest_is_joined_first(pair: Pair) -> None:
    with pair.worker.frozen():
        (one, first), (other, second) = connected(pair.apis[0]), connected(pair.apis[0])
        for connection, id_ in ((other, second), (one, first)):
            connection.close()
            until(lambda id_=id_: id_ in joiners(pair), "the API has noted that its client left")  # type: ignore[misc]
        check_joined(ask(pair.apis[1]), first)
        check_joined(ask(pair.apis[1]), second)
        check_further(ask(pair.apis[1]), f"{TINY}:3")


def test_a_retry_at_once_joins(pair: Pair) -> None:
    """A client may close its connection and open the next one at the same moment."""
    with pair.worker.frozen():
        for _ in range(10):
            connection, id_ = connected(pair.apis[0])
            connection.close()
            check_joined(ask(pair.apis[0]), id_)


@pytest.mark.parametrize("fields", [{"context_length": 300}, {"echo_load_config": True}, {"ttl_seconds": 600}])
def test_a_load_with_other_parameters_is_not_joined(pair: Pair, fields: dict[str, object]) -> None:
    with pair.worker.frozen():
        leaves(pair)
        check_further(ask(pair.apis[1], **fields), f"{TINY}:2")


def test_a_cancelled_or_finished_load_is_not_joined(pair: Pair) -> None:
    with pair.worker.frozen():
        left = leaves(pair)
        assert pair.apis[1].cancel(left).status == 200
    check_further(pair.apis[1].load(TINY), TINY)
    with pair.worker.frozen(1):
        left = leaves(pair)
    assert pair.apis[1].job(left, wait_s=60)["status"] == "loaded"
    check_further(pair.apis[1].load(TINY), f"{TINY}:3")


def test_a_load_that_failed_after_its_client_left_is_not_joined(pair: Pair) -> None:
    with pair.worker.frozen() as runner:
        left = leaves(pair)
        os.kill(runner.pid, signal.SIGKILL)
        assert pair.apis[1].job(left, wait_s=60)["status"] == "failed"
        check_further(pair.apis[1].load(TINY), TINY)


def test_an_idempotency_key_joins_its_own_load_only(pair: Pair) -> None:
    with pair.worker.frozen():
        connection, keyed = connected(pair.apis[0], "Idempotency-Key: mine-alone")
        connection.close()
        left = leaves(pair)
        check_further(load(pair.apis[1], "of-its-own", prefer="respond-async"), f"{TINY}:3")
        check_joined(load(pair.apis[1], "mine-alone", prefer="respond-async"), keyed)
        check_joined(ask(pair.apis[1]), left)
        check_further(ask(pair.apis[1]), f"{TINY}:4")


def test_a_client_of_an_api_that_stops_has_left(pair: Pair) -> None:
    api = Running(pair.home / "third", "api", "--port", "0", environ=pair.environ)
    try:
        client = Client(api.first_line().removeprefix("listening: "))
        until(lambda: TINY in client.models(), "the model is listed")
        with ExitStack() as asking, pair.worker.frozen():
            before = ids(pair.apis[0])
            refused = asking.enter_context(meanwhile(client.load, TINY))
            (left,) = until(lambda: ids(pair.apis[0]) - before, "the load is accepted")
            api.stop()
            error(refused.result(), 503, "service_unavailable", "queue_unavailable")
            check_joined(ask(pair.apis[1]), left)
        client.close()
    finally:
        api.kill()


def test_a_client_that_waits_while_redis_restarts_has_left(pair: Pair) -> None:
    with ExitStack() as asking, pair.worker.frozen():
        before = ids(pair.apis[0])
        refused = asking.enter_context(meanwhile(pair.apis[0].load, TINY))
        (left,) = until(lambda: ids(pair.apis[0]) - before, "the load is accepted")
        pair.redis.kill()
        try:
            error(refused.result(), 503, "service_unavailable", "queue_unavailable")
        finally:
            pair.redis.start()
        until(lambda: left in joiners(pair), "the API has noted that its client left")
        until(lambda: pair.apis[1].send("GET", "/readyz").status == 200, "the other API is ready")
        check_joined(ask(pair.apis[1]), left)
