"""Requests to models while processes die at random: each of them ends as the documents say, and nothing is left.

Two API processes, two workers on two hosts, three copies of one model, and models that are loaded on demand.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
from msgspec import msgpack

from shared.instance import Instance
from shared.lifecycle import State
from tests.simulation import chaos
from tests.support.chat import CHAT, DONE, ENDLESS, events
from tests.support.fakehosts import FakeHost
from tests.support.service import Client, Running, until

N_MODELS, N_COPIES, N_CLIENTS = 8, 3, 8
CONTEXT_LENGTH = 2048
MOST_TOKENS = 400  # the answers that an instance gives at once fit into its context
GPU_BYTES = 16 << 20  # of each worker: room for some of the models
COPIED = "acme/m0"
INSTANCE = "loadstone-instance"  # header of a reply
ROOMY_S = 120.0  # of any request: ends a hang
DYING_S = 5.0  # a killed process still takes connections for a moment
QUIET_S = 120.0  # after the chaos

# Before the first byte of a reply, by status.  A request that is wrong gets its error or one of these.
REFUSALS = {
    404: {"model_not_loaded", "model_not_found"},
    429: {"queue_full", "too_many_waiting"},
    500: {"helper_crashed", "model_load_failed"},
    503: {
        "insufficient_memory",
        "load_interrupted",
        "model_unloaded",
        "no_route",
        "no_worker",
        "queue_timeout",
        "queue_unavailable",
        "runner_lost",
    },
}
# In a stream.  Not `model_unloaded`: no model in use is evicted, and the clients unload none.
BREAKS = {"runner_lost", "queue_unavailable"}


class Wrong(NamedTuple):
    fields: dict[str, Any]
    status: int
    code: str


WRONG = [
    Wrong({"temperature": "hot"}, 400, "invalid_type"),
    Wrong({"max_tokens": -5}, 400, "invalid_value"),
    Wrong({"model": "acme/unknown"}, 404, "model_not_found"),
    Wrong({"messages": [{"role": "user", "content": "Hello " * 3 * CONTEXT_LENGTH}]}, 400, "context_length_exceeded"),
]


class Pool(chaos.Pool):
    """Workers on two hosts, each with a GPU that is too small for all models."""

    def __init__(self, home: Path) -> None:
        self.gpus = {name: FakeHost.made(home / f"gpu-{name}", GPU_BYTES) for name in ("w1", "w2")}
        self.killed: list[list[float]] = [[], []]  # when each API process was killed
        super().__init__(home, N_MODELS)

    def worker(self, name: str, run: int) -> Running:
        place = self.home / name
        flags = ("--models-dir", str(self.home / "models"), "--data-dir", str(place / "data"))
        more = ("--redis-url", self.redis.url, "--worker-name", name)
        environ = {
            "LOADSTONE_LEASE_S": str(chaos.LEASE_S),
            "LOADSTONE_LOADS_AT_ONCE": "2",
            "LOADSTONE_DEVICE_RESERVE": "0",
            "LOADSTONE_REQUEST_WAIT_S": "10",
            "TMPDIR": str(self.tmp),
            **self.gpus[name].environ(),
        }
        if name == "w1":
            return Running(place / f"run{run}", "worker", *flags, *more, environ=environ)
        environ["LOADSTONE_WORKER_LISTEN"] = "127.0.0.1:0"
        return Running(
            place / f"run{run}", "worker", *flags, *more, environ=environ, prefix=another_boot(self.home / "boot-id")
        )

    def api(self, n: int) -> Running:
        words = ("--port", "0", "--redis-url", self.redis.url, "--drain-s", "0")
        environ = {
            "LOADSTONE_LEASE_S": str(chaos.LEASE_S),
            "LOADSTONE_REQUEST_WAIT_S": "10",
            "LOADSTONE_STALL_LIMIT_S": "20",
            "LOADSTONE_JIT_CONTEXT": str(CONTEXT_LENGTH),
        }
        return Running(self.home / f"api{n}", "api", *words, environ=environ)


def another_boot(file: Path) -> tuple[str, ...]:
    """Return what to put before a command so that it sees another boot of a host; nothing if that is not allowed."""
    if os.geteuid() != 0:
        return ()
    if not file.exists():
        file.write_text(f"{uuid.uuid4()}\n")
    script = f'mount --bind {file} /proc/sys/kernel/random/boot_id && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh")


class Chaos(chaos.Chaos):
    """Processes that die or stall.  None is asked to end, so nothing gives a runner a reason to end its answers."""

    def __init__(self, pool: Pool, seed: int) -> None:
        super().__init__(pool, seed)
        self.killed = pool.killed
        self.deeds = [
            *[self.kill_runner] * 6,
            *[self.pause_runner] * 3,
            self.kill_worker,
            self.lose_host,
            *[self.kill_api] * 2,
            self.pause_api,
            self.kill_redis,
            *[self.kill_listener] * 2,
            *[self.kill_helper] * 2,
            self.cut_connections,
        ]

    def kill_api(self) -> None:
        n = self.dice.randrange(2)
        self.killed[n].append(time.monotonic())
        self._signal(self.pool.api_process(n), signal.SIGKILL)


class Clients:
    """Threads that send a number of requests in all, and check how each ends."""

    def __init__(self, pool: Pool, n_requests: int, seed: int) -> None:
        self.pool = pool
        self.faults: list[str] = []
        self.ends: Counter[str] = Counter()
        self.short: set[str] = set()  # instances without the context for all tokens of an answer
        self._seeds = iter(range(seed * 1_000_000, seed * 1_000_000 + n_requests))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(N_CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def go_on(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _next(self) -> int | None:
        with self._lock:
            return next(self._seeds, None)

    def _run(self) -> None:
        with httpx.Client(trust_env=False, timeout=ROOMY_S) as http:
            while (seed := self._next()) is not None:
                self._request(random.Random(seed), http)

    def _request(self, dice: random.Random, http: httpx.Client) -> None:
        """Send one request; it ends by its contract, or with its API process."""
        kind = dice.choice([self._whole] * 3 + [self._stream] * 4 + [self._left] * 2 + [self._wrong] * 2 + [self._load])
        n = dice.randrange(2)
        began = time.monotonic()
        name = kind.__name__.removeprefix("_")
        try:
            end = kind(dice, http, self.pool.urls[n])
        except AssertionError as e:
            self.faults.append(f"{name}: {e}")
            return
        except httpx.TimeoutException:
            self.faults.append(f"{name}: not ended within {ROOMY_S:g} s")
            return
        except httpx.TransportError as e:
            if not any(began - DYING_S < at for at in self.pool.killed[n]):
                self.faults.append(f"{name}: {e!r}, and the API process was not killed")
            end = "broken"
        if end[0] in "45b":
            time.sleep(dice.uniform(0.1, 0.5))  # as clients do that send a request again
        self.ends[f"{name} {end}"] += 1

    def _fields(self, dice: random.Random) -> dict[str, Any]:
        name = COPIED if dice.random() < 0.4 else f"acme/m{dice.randrange(N_MODELS)}"
        words = " ".join(dice.choices(["Hello", "world", "again"], k=dice.randrange(1, 20)))
        return {
            "model": name,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": dice.choice([1, 20, 200, MOST_TOKENS]),
            **ENDLESS,
        }

    def _check_whole(self, fields: dict[str, Any], instance_id: str, reason: str, usage: dict[str, int]) -> None:
        """Check that no token of an answer is missing.  The model does not end it; its limit or a full context does."""
        assert reason == "length", f"an answer ended by {reason}"
        if usage["completion_tokens"] != fields["max_tokens"]:
            self.short.add(instance_id)

    def _whole(self, dice: random.Random, http: httpx.Client, url: str) -> str:
        fields = self._fields(dice)
        reply = http.post(url + CHAT, json=fields)
        if reply.status_code != 200:
            return refusal(reply)
        (choice,) = reply.json()["choices"]
        self._check_whole(fields, reply.headers[INSTANCE], choice["finish_reason"], reply.json()["usage"])
        return "complete"

    def _stream(self, dice: random.Random, http: httpx.Client, url: str) -> str:
        fields = self._fields(dice)
        with http.stream("POST", url + CHAT, json=streamed(fields)) as reply:
            if reply.status_code != 200:
                reply.read()
                return refusal(reply)
            return stream_end(events(reply.iter_lines()), partial(self._check_whole, fields, reply.headers[INSTANCE]))

    def _left(self, dice: random.Random, http: httpx.Client, url: str) -> str:
        """Send a request and disconnect: after some events, or before there is a reply."""
        fields = self._fields(dice)
        patience = httpx.Timeout(ROOMY_S, read=dice.choice([0.01, 0.1, ROOMY_S]))
        try:
            with http.stream("POST", url + CHAT, json=streamed(fields), timeout=patience) as reply:
                if reply.status_code != 200:
                    reply.read()
                    return refusal(reply)
                for _, data in zip(range(dice.choice([1, 5, 50])), events(reply.iter_lines()), strict=False):
                    assert data != DONE or fields["max_tokens"] < 50, "an early end"
        except httpx.ReadTimeout:
            pass
        return "left"

    def _wrong(self, dice: random.Random, http: httpx.Client, url: str) -> str:
        wrong = dice.choice(WRONG)
        reply = http.post(url + CHAT, json={**self._fields(dice), **wrong.fields, "stream": dice.random() < 0.5})
        error = reply.json()["error"]
        if (reply.status_code, error["code"]) == wrong[1:]:
            return wrong.code
        assert wrong.code in ("model_not_found", "context_length_exceeded"), f"{wrong}: {reply.text}"
        return refusal(reply)

    def _load(self, dice: random.Random, http: httpx.Client, url: str) -> str:
        """Load a model that may be evicted again, which may need the room of another one."""
        body = {"model": f"acme/m{dice.randrange(1, N_MODELS)}", "context_length": CONTEXT_LENGTH, "ttl_seconds": 600}
        reply = http.post(f"{url}/api/v1/models/load", json=body, headers={"Prefer": "wait=10"})
        assert reply.status_code in (200, 202, 404, 429, 500, 503), reply.text
        return str(reply.status_code)


def streamed(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "stream": True, "stream_options": {"include_usage": True}}


def refusal(reply: httpx.Response) -> str:
    """Check that a reply is a documented error."""
    error = reply.json()["error"]
    assert error["code"] in REFUSALS.get(reply.status_code, ()), f"{reply.status_code}: {reply.text}"
    return f"{reply.status_code} {error['code']}"


def stream_end(received: Iterator[str], check_whole: Callable[[str, dict[str, int]], None]) -> str:
    """Check that a stream has exactly one end: [DONE] after a whole answer, or an error."""
    *parts, last = received
    assert DONE not in parts, "something after [DONE]"
    chunks = [msgspec.json.decode(part) for part in parts]
    assert not any("error" in chunk for chunk in chunks), "something after an error"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    if last == DONE:
        assert len(reasons) == 1, f"an answer ends once: {reasons}"
        check_whole(reasons[0], chunks[-1]["usage"])
        return "complete"
    error = msgspec.json.decode(last).get("error")
    assert error is not None, f"no end: {last}"
    assert error["code"] in BREAKS, f"in a stream: {last}"
    return f"broke with {error['code']}"


def check_contexts(pool: chaos.Pool, short: set[str]) -> None:
    """Check that instances without context for all tokens of an answer had little memory when they were loaded."""
    contexts: dict[str, set[int]] = defaultdict(set)
    for one in chaos.records(pool).values():
        if one.load_config is not None:
            contexts[one.instance_id].add(one.load_config.context_length or 0)
    for id_ in short:
        assert min(contexts[id_], default=0) < CONTEXT_LENGTH, f"answers of '{id_}' lack tokens: {contexts[id_]}"


class Life(NamedTuple):
    """When a load was accepted and when it was loaded or ended, by Redis' clock."""

    id: str
    begin_ms: int
    end_ms: int
    is_on_demand: bool


def lives(pool: chaos.Pool) -> dict[str, list[Life]]:
    """Return, by key, when loads were under way."""
    by_key: dict[str, list[Life]] = defaultdict(list)
    with pool.redis.client() as redis:
        for id_ in chaos.records(pool):
            entries: Any = redis.xrange(f"inst:{id_}:log")
            history = [(int(at.split(b"-")[0]), msgpack.decode(doc[b"doc"], type=Instance)) for at, doc in entries]
            first = history[0][1]
            end_ms = next((at for at, one in history if one.state not in (State.QUEUED, State.LOADING)), history[-1][0])
            is_on_demand = first.on_demand and not first.restoring
            by_key[first.key].append(Life(id_, history[0][0], end_ms, is_on_demand))
    return by_key


def check_one_load_for_all(pool: chaos.Pool) -> int:
    """Check that no load on demand began while one of its model was under way; return how many there were."""
    n = 0
    for key, ones in lives(pool).items():
        for new in (one for one in ones if one.is_on_demand):
            n += 1
            others = [one for one in ones if one.id != new.id and one.begin_ms < new.begin_ms < one.end_ms]
            assert not others, f"{key}: {new} began beside {others}"
    return n


def at_rest(pool: chaos.Pool, client: Client) -> Callable[[], bool]:
    """Return a condition: for some beats, what is reported as loaded has had its runners, and nothing is under way."""
    since = time.monotonic()

    def is_at_rest() -> bool:
        workers = client.send("GET", "/api/v1/workers").json()["workers"]
        held = [one for worker in workers for one in worker["instances"]]
        runners = sum(len(worker.runners()) for worker in pool.workers.values())
        return (
            len(workers) == len(pool.workers)
            and all(one["state"] == "loaded" for one in held)
            and {one["id"] for one in held} == set(client.instances())
            and runners == len(held) + len(pool.workers)  # each has a warm one
        )

    def has_been() -> bool:
        nonlocal since
        if not is_at_rest():
            since = time.monotonic()
        return time.monotonic() - since > chaos.STABLE_S

    return has_been


def run(home: Path, n_requests: int, seed: int) -> None:
    """Send so many requests amid chaos, and check them and the pool; raise AssertionError on a violation."""
    print(f"requests: REQUESTS_SEED={seed} REQUESTS={n_requests}")
    pool = Pool(home)
    try:
        pool.wait_ready()
        client = Client(pool.urls[0])
        for _ in range(N_COPIES):
            client.loaded(COPIED, context_length=CONTEXT_LENGTH)
        clients, disorder = Clients(pool, n_requests, seed), Chaos(pool, seed)
        clients.start()
        try:
            disorder.rage(clients.go_on)
        finally:
            disorder._resume(float("inf"))
            clients.join()
        print(f"requests: {dict(disorder.done)}, {dict(sorted(clients.ends.items()))}")
        assert not clients.faults, "\n".join(clients.faults)
        try:
            pool.wait_ready()
            until(at_rest(pool, client), "the reported instances match the runners", QUIET_S)
            chaos.check_each_load(pool)
            check_contexts(pool, clients.short)
            evictions = sum(len(one.evicted) for one in chaos.records(pool).values())
            print(f"requests: {check_one_load_for_all(pool)} loads on demand, {evictions} evictions")
            again = partial(client.load, COPIED, context_length=CONTEXT_LENGTH)
            # What was loaded on demand just now gives its memory to no other load for half a minute.
            until(lambda: again().status == 200, "a model is loaded", QUIET_S)
            for url in pool.urls:
                reply = httpx.post(url + CHAT, json={"model": COPIED, "messages": [], **ENDLESS}, trust_env=False)
                assert reply.status_code in (200, 400), reply.text
            client.unload_all()
            until(at_rest(pool, client), "nothing is loaded", QUIET_S)
            until(lambda: chaos.held(client) == (0, 0), "the pool holds nothing")
            assert all(gpu.used_bytes("GPU-fake-0") == 0 for gpu in pool.gpus.values()), "memory of a GPU is lost"
            chaos.check_nothing_is_left(pool)
        finally:
            client.close()
        for one in pool.running():
            one.stop()
        until(
            lambda: not [words for words in chaos.left_behind(pool) if "valkey" not in words and "redis" not in words],
            "no process is left",
        )
        assert not [path.name for path in pool.tmp.iterdir()], "temporary files are left"
    finally:
        pool.kill()
        shutil.rmtree(pool.tmp)
