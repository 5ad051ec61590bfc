"""Idempotency-Key: a repeated request, from any client to any API, does not start a second load."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import (
    JSON,
    LOAD,
    STATUS,
    TINY,
    Client,
    RedisServer,
    Reply,
    Running,
    check_keys,
    error,
    meanwhile,
    until,
)


class Pair:
    """Two API processes and a worker on one Redis."""

    def __init__(self, home: Path) -> None:
        synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
        self.redis = RedisServer(home / "redis")
        environ = {"LOADSTONE_REDIS_URL": self.redis.url}
        flags = ["--models-dir", str(home / "models"), "--data-dir", str(home / "data")]
        self.worker = Running(home / "worker", "worker", *flags, environ=environ)
        self.running = [Running(home / name, "api", "--port", "0", environ=environ) for name in ("one", "other")]
        self.apis = [Client(api.first_line().removeprefix("listening: ")) for api in self.running]
        for api in self.apis:
            until(lambda api=api: TINY in api.models(), "the model is listed", 30)  # type: ignore[misc]

    def close(self) -> None:
        for api in self.apis:
            api.close()
        for running in (*self.running, self.worker):
            running.kill()
        self.redis.kill()


@pytest.fixture(scope="module")
def the_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    try:
        yield pair
        with pair.redis.client() as redis:
            check_keys(redis)
        for running in (*pair.running, pair.worker):
            running.stop()
    finally:
        pair.close()


@pytest.fixture
def pair(the_pair: Pair) -> Iterator[Pair]:
    yield the_pair
    the_pair.apis[0].unload_all()


def load(client: Client, key: str, model: str = TINY, prefer: str = "", **fields: object) -> Reply:
    headers = {**JSON, "Idempotency-Key": key, **({"Prefer": prefer} if prefer else {})}
    return client.send("POST", LOAD, content=json.dumps({"model": model, **fields}).encode(), headers=headers)


def jobs(client: Client) -> int:
    return len(client.send("GET", STATUS, params={"limit": 1000}).json()["jobs"])


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
