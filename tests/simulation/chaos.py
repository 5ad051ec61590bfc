"""Chaos: all parts of a pool are killed, paused and restarted at random while clients use it; then it is checked.

One seed determines all random choices, but not the state of the processes that they meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from msgspec import msgpack

from api.loads.jobs import is_over, status
from shared.instance import Instance
from shared.lifecycle import State
from shared.store.instances import FIELDS, unpack
from shared.synthetic import models as synthetic
from tests.support.service import (
    JSON,
    LOAD,
    STATUS,
    Client,
    Process,
    RedisServer,
    Running,
    below,
    check_keys,
    go_on,
    processes,
    until,
)

N_MODELS, N_CLIENTS = 30, 6
LEASE_S = 3
PATIENCE_S = 8  # longest wait that a client requests
DEADLINE_S = 40.0  # of any request: far longer than any request may wait
STABLE_S = 2.5
QUIET_S = 60.0  # after the chaos, for every load to end
MOST_LOADED = 12
CHAT = "/v1/chat/completions"
ANSWERED = (200, 404, 429, 500, 503)  # 500: what renders its prompt was killed
DOCUMENTED = (
    "inst:",
    "insts:",
    "idem:",
    "failed:",
    "left:",
    "crashed:",
    "lease:",
    "worker:",
    "catalog:",
    "wanted:",
    "used:",
    "queued:",
    "pace:",
    "tallied:",
    "arq:",
)
NAMES = {"insts", "names", "queued", "pace", "jobs", "workers", "counters", "tallies", "logs"}
KEPT = ("catalog-", "devices", "worker-", "wanted-")  # what a worker's data directory may contain


class Paused(NamedTuple):
    process: Process
    until: float


class Pool:
    """Two workers with the same models, two APIs and a Redis."""

    def __init__(self, home: Path, n_models: int = N_MODELS) -> None:
        self.home = home
        self.tmp = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: the path of a socket has at most 107 bytes
        for n in range(n_models):
            synthetic.tiny_llama(home / f"models/acme/m{n}/m{n}-f16.gguf")
        self.redis = RedisServer(home / "redis")
        self.workers = {name: self.worker(name, 0) for name in ("w1", "w2")}
        self.apis = [self.api(n) for n in (1, 2)]
        self.urls = [api.first_line().removeprefix("listening: ") for api in self.apis]
        self.started = len(self.workers)

    def worker(self, name: str, run: int) -> Running:
        place = self.home / name
        flags = ("--models-dir", str(self.home / "models"), "--data-dir", str(place / "data"))
        environ = {"LOADSTONE_LEASE_S": str(LEASE_S), "LOADSTONE_LOADS_AT_ONCE": "2", "TMPDIR": str(self.tmp)}
        more = ("--redis-url", self.redis.url, "--worker-name", name)
        return Running(place / f"run{run}", "worker", *flags, *more, environ=environ)

    def api(self, n: int) -> Running:
        words = ("--port", "0", "--redis-url", self.redis.url, "--drain-s", "0")
        return Running(
            self.home / f"api{n}", "api", *words, environ={"LOADSTONE_LEASE_S": str(LEASE_S), "LOADSTONE_JIT": "off"}
        )

    def wait_ready(self) -> None:
        with httpx.Client(trust_env=False, timeout=DEADLINE_S) as http:

            def is_ready() -> bool:
                replies = [http.get(f"{url}/api/v1/workers") for url in self.urls]
                return all(one.status_code == 200 and len(one.json()["workers"]) == 2 for one in replies)

            until(is_ready, "both workers are ready", QUIET_S)

    def worker_process(self, name: str) -> Process | None:
        return next((p for p in self.workers[name].tree() if p.words[2:4] == ("-m", "worker")), None)

    def api_process(self, n: int) -> Process | None:
        return next((p for p in self.apis[n].tree() if p.words[2:4] == ("-m", "api")), None)

    def running(self) -> list[Running]:
        return [*self.workers.values(), *self.apis]

    def kill(self) -> None:
        for one in self.running():
            one.kill()
        self.redis.kill()


class Clients:
    """Threads that load, unload, cancel, poll and list until they are stopped."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool = pool
        self.over = threading.Event()
        self.jobs: dict[str, str] = {}  # ids of accepted jobs by Idempotency-Key
        self.faults: list[str] = []
        self.replies: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(random.Random(seed + n),)) for n in range(N_CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(DEADLINE_S + 10)
            assert not thread.is_alive(), "a client has not ended"

    def _run(self, dice: random.Random) -> None:
        with httpx.Client(trust_env=False, timeout=DEADLINE_S) as http:
            while not self.over.is_set():
                action = dice.choice(
                    [*[self._load] * 2, self._unload, self._cancel, self._poll, self._follow, *[self._chat] * 3]
                )
                try:
                    action(dice, http)
                except AssertionError as e:
                    self.faults.append(str(e))
                except httpx.TimeoutException as e:
                    self.faults.append(f"no answer within {DEADLINE_S:g} s: {e.request.method} {e.request.url}")
                except httpx.TransportError:  # the API process was killed
                    self.replies["broken"] += 1
                    self.over.wait(0.05)

    def _ask(self, dice: random.Random, http: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
        reply = http.request(method, dice.choice(self.pool.urls) + path, **options)
        self.replies[f"{method} {path.split('/')[-1] if 'load_' not in path else 'job'} {reply.status_code}"] += 1
        known = reply.status_code < 500 or "error" in reply.json()
        assert known, f"{reply.status_code} without an error: {reply.text[:200]}"
        code = "" if reply.status_code < 500 else reply.json()["error"].get("code") or reply.json()["error"]["type"]
        assert code not in ("internal_error", "server_error"), reply.text
        return reply

    def _load(self, dice: random.Random, http: httpx.Client) -> None:
        """Send one load, repeated with its key until it is answered."""
        if len(self._instances(dice, http)) >= MOST_LOADED:
            self._unload(dice, http)
            return
        body = json.dumps({"model": f"acme/m{dice.randrange(N_MODELS)}", "context_length": 256})
        key = f"{dice.random()}"
        prefer = dice.choice([f"wait={PATIENCE_S}", "respond-async"])
        for _ in range(20):
            with contextlib.suppress(httpx.TransportError):
                headers = {**JSON, "Idempotency-Key": key, "Prefer": prefer}
                reply = self._ask(dice, http, "POST", LOAD, content=body, headers=headers)
                if reply.status_code == 202:
                    job_id = reply.json()["job_id"]
                    assert self.jobs.setdefault(key, job_id) == job_id, "one key, two loads"
                if reply.status_code not in (503, 429):
                    return
            if self.over.wait(0.3):
                return

    def _instances(self, dice: random.Random, http: httpx.Client) -> list[str]:
        reply = self._ask(dice, http, "GET", "/api/v1/models")
        if reply.status_code != 200:
            return []
        return [one["id"] for model in reply.json()["models"] for one in model["loaded_instances"]]

    def _unload(self, dice: random.Random, http: httpx.Client) -> None:
        instances = self._instances(dice, http)
        if instances:
            body = json.dumps({"instance_id": dice.choice(instances)})
            reply = self._ask(dice, http, "POST", "/api/v1/models/unload", content=body, headers=JSON)
            assert reply.status_code in (200, 404, 503), reply.text

    def _job(self, dice: random.Random) -> str | None:
        jobs = list(self.jobs.values())
        return dice.choice(jobs[-5:]) if jobs else None

    def _cancel(self, dice: random.Random, http: httpx.Client) -> None:
        if job_id := self._job(dice):
            reply = self._ask(dice, http, "DELETE", f"{STATUS}/{job_id}")
            assert reply.status_code in (200, 409, 503), reply.text

    def _poll(self, dice: random.Random, http: httpx.Client) -> None:
        if job_id := self._job(dice):
            wait = dice.choice(["", f"?wait={PATIENCE_S}"])
            reply = self._ask(dice, http, "GET", f"{STATUS}/{job_id}{wait}")
            assert reply.status_code in (200, 503), reply.text  # an accepted job is never forgotten

    def _follow(self, dice: random.Random, http: httpx.Client) -> None:
        """Follow a stream to its end, or leave it after PATIENCE_S."""
        if not (job_id := self._job(dice)):
            return
        url = f"{dice.choice(self.pool.urls)}{STATUS}/{job_id}/events"
        names = []
        until_s = time.monotonic() + PATIENCE_S
        with http.stream("GET", url) as reply:
            assert reply.status_code in (200, 503), reply.status_code
            for line in reply.iter_lines():
                if line.startswith("event: "):
                    names.append(line)
                if time.monotonic() > until_s:
                    break
        ends = [n for n, name in enumerate(names) if name in ("event: model_load.end", "event: error")]
        assert not ends or ends == [len(names) - 1], f"events after the last one: {names}"

    def _chat(self, dice: random.Random, http: httpx.Client) -> None:
        """Ask an instance, and read the answer to its end or leave it."""
        instances = self._instances(dice, http)
        if not instances:
            return
        messages = [{"role": "user", "content": "Hello " * dice.randrange(1, 9)}]
        body = {"model": dice.choice(instances), "messages": messages, "max_tokens": dice.choice([1, 20, 150])}
        if dice.random() < 0.3:
            reply = self._ask(dice, http, "POST", CHAT, json=body)
            assert reply.status_code in ANSWERED, reply.text
            assert reply.status_code != 200 or reply.json()["choices"][0]["finish_reason"] in ("stop", "length")
            return
        data = []
        leaves_after = dice.choice([1, 5, 1000])
        with http.stream("POST", dice.choice(self.pool.urls) + CHAT, json={**body, "stream": True}) as reply:
            assert reply.status_code in ANSWERED, reply.status_code
            if reply.status_code != 200:
                return
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    data.append(line)
                if len(data) >= leaves_after:
                    self.replies["answer left"] += 1
                    return
        ends = [n for n, line in enumerate(data) if line == "data: [DONE]" or line.startswith('data: {"error"')]
        assert ends == [len(data) - 1], f"an answer has one end: {data[-3:]}"
        self.replies["answer " + ("complete" if data[-1] == "data: [DONE]" else "broken")] += 1


class Chaos:
    """The failures that happen to the pool."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool = pool
        self.dice = random.Random(seed)
        self.paused: list[Paused] = []
        self.done: Counter[str] = Counter()
        self.deeds: list[Callable[[], None]] = [
            *[self.kill_runner] * 3,
            *[self.pause_runner] * 2,
            self.kill_worker,
            self.end_worker,
            self.pause_worker,
            self.lose_host,
            *[self.kill_api] * 2,
            self.pause_api,
            self.kill_redis,
            self.pause_redis,
            self.kill_listener,
            self.kill_helper,
            *[self.cut_connections] * 2,
        ]

    def rage(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            deed = self.dice.choice(self.deeds)
            self.done[deed.__name__] += 1
            deed()
            self._resume(time.monotonic())
            time.sleep(self.dice.uniform(0.1, 0.9))
        self._resume(float("inf"))

    def _resume(self, now: float) -> None:
        for one in [one for one in self.paused if one.until <= now]:
            self.paused.remove(one)
            go_on(one.process)

    def _signal(self, process: Process | None, signum: signal.Signals) -> None:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signum)

    def _pause(self, process: Process | None, longest_s: float) -> None:
        if process is not None:
            self._signal(process, signal.SIGSTOP)
            self.paused.append(Paused(process, time.monotonic() + self.dice.uniform(0.2, longest_s)))

    def _some_worker(self) -> str:
        return self.dice.choice(sorted(self.pool.workers))

    def _some_runner(self) -> Process | None:
        runners = self.pool.workers[self._some_worker()].runners()
        return self.dice.choice(runners) if runners else None

    def kill_runner(self) -> None:
        self._signal(self._some_runner(), self.dice.choice([signal.SIGKILL, signal.SIGTERM]))

    def pause_runner(self) -> None:
        self._pause(self._some_runner(), 3.0)

    def kill_listener(self) -> None:
        tree = self.pool.workers[self._some_worker()].tree()
        listeners = [process for process in tree if "worker.listener.server" in process.words]
        self._signal(listeners[0] if listeners else None, signal.SIGKILL)

    def kill_helper(self) -> None:
        """Kill what renders the prompts of a runner, or what restarts it."""
        runner = self._some_runner()
        helpers = [] if runner is None else below(runner.pid)
        self._signal(self.dice.choice(helpers) if helpers else None, signal.SIGKILL)

    def kill_worker(self) -> None:
        self._signal(self.pool.worker_process(self._some_worker()), signal.SIGKILL)

    def end_worker(self) -> None:
        self._signal(self.pool.worker_process(self._some_worker()), signal.SIGTERM)

    def pause_worker(self) -> None:
        self._pause(self.pool.worker_process(self._some_worker()), 2.0 * LEASE_S)

    def lose_host(self) -> None:
        """Kill a worker with all of its processes; start another one with its name and its data directory."""
        name = self._some_worker()
        gone = self.pool.workers[name]
        tree = [*gone.tree()]
        gone.popen.kill()
        for process in tree:
            self._signal(process, signal.SIGKILL)
        gone.popen.wait()
        time.sleep(self.dice.choice([0.0, LEASE_S + 1.5]))
        self.pool.started += 1
        self.pool.workers[name] = self.pool.worker(name, self.pool.started)

    def kill_api(self) -> None:
        self._signal(self.pool.api_process(self.dice.randrange(2)), signal.SIGKILL)

    def pause_api(self) -> None:
        self._pause(self.pool.api_process(self.dice.randrange(2)), 3.0)

    def kill_redis(self) -> None:
        self.pool.redis.kill()
        time.sleep(self.dice.choice([0.0, 1.0]))
        self.pool.redis.start()

    def pause_redis(self) -> None:
        os.kill(self.pool.redis.popen.pid, signal.SIGSTOP)
        time.sleep(self.dice.uniform(0.2, LEASE_S + 1))
        os.kill(self.pool.redis.popen.pid, signal.SIGCONT)

    def cut_connections(self) -> None:
        for _ in range(10):
            with self.pool.redis.client() as redis, contextlib.suppress(Exception):
                redis.client_kill_filter(_type=self.dice.choice(["normal", "pubsub"]), skipme=True)
            time.sleep(0.03)


def records(pool: Pool) -> dict[str, Instance]:
    """Return the record of every load that was accepted."""
    with pool.redis.client() as redis:
        by_id = {}
        for id_ in redis.zrange("jobs", 0, -1):  # type: ignore[union-attr]
            fields: Any = redis.hmget(b"inst:" + id_, FIELDS)
            record = unpack(id_.decode(), *fields)
            assert record is not None, f"{id_} was forgotten"
            by_id[record.id] = record
        return by_id


def holders(pool: Pool) -> Counter[str]:
    """Count the runners that hold each model, by the files that they have mapped."""
    counts: Counter[str] = Counter()
    for worker in pool.workers.values():
        for runner in worker.runners():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                maps = Path(f"/proc/{runner.pid}/maps").read_text()
                counts.update(
                    {f"acme/{Path(line.split()[-1]).parent.name}" for line in maps.splitlines() if ".gguf" in line}
                )
    return counts


def held(client: Client) -> tuple[int, int]:
    """Return the number of instances and the bytes that the workers report."""
    workers = client.send("GET", "/api/v1/workers").json()["workers"]
    reserved = sum(device["reserved_bytes"] for worker in workers for device in worker["devices"])
    return sum(len(worker["instances"]) for worker in workers), reserved


def settled(pool: Pool, client: Client) -> Callable[[], bool]:
    """Return a condition: the pool has been settled for some beats.  A worker starts restoring at a beat."""
    since = time.monotonic()

    def has_been() -> bool:
        nonlocal since
        if not is_settled(pool, client):
            since = time.monotonic()
        return time.monotonic() - since > STABLE_S

    return has_been


def is_settled(pool: Pool, client: Client) -> bool:
    """Return whether no load is in progress and the reported instances match the runners."""
    instances = {i["id"]: i for w in client.send("GET", "/api/v1/workers").json()["workers"] for i in w["instances"]}
    loaded = {id_: one for id_, one in instances.items() if one["state"] == "loaded"}
    usable = client.instances()
    warm = sum(len(worker.runners()) for worker in pool.workers.values()) - len(loaded)
    return (
        len(loaded) == len(instances)
        and set(usable) == set(loaded)
        and holders(pool) == Counter(one["model"].partition(":")[0] for one in loaded.values())
        and warm == len(pool.workers)
    )


def check_each_load(pool: Pool) -> None:
    """Check that every accepted load has exactly one outcome and ran at most once per attempt."""
    with pool.redis.client() as redis:
        for id_, record in records(pool).items():
            entries: Any = redis.xrange(f"inst:{id_}:log")
            history = [(int(fields[b"rev"]), msgpack.decode(fields[b"doc"], type=Instance)) for _, fields in entries]
            revs = [rev for rev, _ in history]
            assert revs == sorted(set(revs)), f"{id_}: revisions {revs}"
            assert is_over(record), f"{id_} has no outcome: {record}"
            outcomes = {status(one) for _, one in history if is_over(one)}
            assert outcomes == {status(record)}, f"{id_}: {outcomes}"
            claims = [(one.epoch, one.attempt) for _, one in history if one.state is State.LOADING]
            assert len(set(claims)) == len({attempt for _, attempt in claims}), f"{id_} ran twice in one attempt"


def left_behind(pool: Pool) -> list[str]:
    """Return the processes of the pool, found by their working directory, whatever their parent is."""
    commands = []
    for process in processes():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process.pid}/cwd").readlink().is_relative_to(pool.home):
                commands.append(" ".join(process.words))
    return commands


def check_nothing_is_left(pool: Pool) -> None:
    """Check Redis and the disk once everything is unloaded."""
    with pool.redis.client() as redis:
        # The next worker takes an entry whose worker was killed while it handled it.
        until(lambda: not redis.exists("arq:queue:w1", "arq:queue:w2"), "arq's queues are empty", 5)
        check_keys(redis)
        for name in (
            "insts",
            "names",
            "queued",
            "queued:w1",
            "queued:w2",
            "insts:w1",
            "insts:w2",
            "wanted:w1",
            "wanted:w2",
        ):
            assert not redis.exists(name), f"{name} is left"
        for key in redis.scan_iter():
            word = key.decode()
            assert word in NAMES or word.startswith(DOCUMENTED), f"{word} is not documented"
    for name in pool.workers:
        files = [path.name for path in (pool.home / name / "data").iterdir()]
        assert all(file.startswith(KEPT) for file in files), files


def open_descriptors(process: Process | None) -> Counter[str]:
    """Count the open descriptors of a process by kind."""
    assert process is not None
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            kinds[str(entry.readlink()).partition(":")[0]] += 1
    return kinds


def run(home: Path, seconds: float, seed: int) -> None:
    """Run chaos for so many seconds and check the pool; raise AssertionError on a violation."""
    print(f"chaos: CHAOS_SEED={seed} CHAOS_SECONDS={seconds:g}")
    pool = Pool(home)
    try:
        pool.wait_ready()
        clients, chaos = Clients(pool, seed), Chaos(pool, seed)
        clients.start()
        try:
            end = time.monotonic() + seconds
            chaos.rage(lambda: time.monotonic() < end)
        finally:
            chaos._resume(float("inf"))
            clients.stop()
        print(f"chaos: {dict(chaos.done)}, {dict(clients.replies)}")
        assert not clients.faults, "\n".join(clients.faults)
        pool.wait_ready()
        client = Client(pool.urls[0])
        try:
            until(settled(pool, client), "the reported instances match the runners", QUIET_S)
            check_each_load(pool)
            for job_id in clients.jobs.values():
                assert client.job(job_id)["status"] in ("loaded", "failed", "cancelled")
            client.unload_all()
            until(settled(pool, client), "nothing is loaded", QUIET_S)
            until(lambda: held(client) == (0, 0), "the pool holds nothing")
            check_each_load(pool)
            until(lambda: not holders(pool), "no runner holds a model")
            check_nothing_is_left(pool)
        finally:
            client.close()
        for one in pool.running():
            one.stop()
        until(
            lambda: not [words for words in left_behind(pool) if "valkey" not in words and "redis" not in words],
            "no process is left",
        )
        assert not [path.name for path in pool.tmp.iterdir()], "temporary files are left"
    finally:
        pool.kill()
        shutil.rmtree(pool.tmp)
