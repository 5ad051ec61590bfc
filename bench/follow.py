"""The cost of accepting a load, polling a job, listing the models, and being idle: measured with
`python -m bench follow`, with two API processes.

Accepting is measured while a first load is held, its runner stopped by SIGSTOP: otherwise the worker would load tiny
models on the same cores.  The worker still takes each delivery.  The loads accepted in a round are cancelled after it.
The bare routes of `bench.handler` have as many processes and the same client, and their rounds alternate with these:
constant replies of the size of a job and of the list, and a route that sends a command to the same Redis.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct
from redis import Redis

from bench import handler
from bench.client import Sent, request
from bench.processes import cpu_s, redis_url, roles, stopped
from bench.sender import Sender, check, sender
from bench.subjects import Failure, running, service, until
from shared.store import keys
from shared.synthetic import models as synthetic

What = Literal["accept", "poll", "list", "bare, Redis", "bare, poll", "bare, list"]

N: dict[What, int] = {  # requests in a round
    "accept": 300,
    "poll": 1000,
    "list": 600,
    "bare, Redis": 1000,
    "bare, poll": 1000,
    "bare, list": 600,
}
N_ROUNDS = 4  # of each, per level, after one uncounted round
AT_ONCE = (1, 16, 256)
API_PROCESSES = 2
N_MODELS = 200
IDLE_S, CALM_S, WITHIN_S, HELD_S = 10.0, 2.0, 60.0, 1200
QUEUE_LIMIT = str(2 * N["accept"])
MODELS, LOAD, STATUS = "/api/v1/models", "/api/v1/models/load", "/api/v1/models/load/status"


class Round(Struct, frozen=True, kw_only=True):
    """`cpu_s` is by process, and includes work after the replies: the worker takes its deliveries."""

    what: What
    at_once: int
    wall_s: float
    latencies_s: list[float]
    cpu_s: dict[str, float]


class Idle(Struct, frozen=True, kw_only=True):
    """CPU time by process; the reads of Redis from its clients, and its commands, including those in scripts."""

    seconds: float
    cpu_s: dict[str, float]
    reads: int
    commands: dict[str, int]


class Followed(Struct, frozen=True, kw_only=True):
    rounds: list[Round]
    idle: Idle


class Jobs:
    """The rounds of the service: accepted and cancelled loads, polls, and lists, while a first load is held."""

    def __init__(self, port: int, client: Sender, redis: Redis, model: str) -> None:
        self.port, self.client, self.redis = port, client, redis
        workers: Any = redis.zrange("workers", 0, -1)
        self.worker = workers[0].decode()
        self.load = request("POST", LOAD, json.dumps({"model": model}), "Prefer: respond-async\r\n")
        self.held = self._one(self.load, 202)["job_id"]
        self.ids: list[str] = []

    def until(self, status: str) -> None:
        """Wait until the held load has this status."""
        until(lambda: self._one(self._of_held("GET"), 200)["status"] == status, f"the held load is {status}", WITHIN_S)

    def accept(self, at_once: int) -> Sent:
        sent = self._round([self.load] * N["accept"], at_once, 202, bodies=True)
        self.ids = [json.loads(answer.body)["job_id"] for answer in sent.answers]
        return sent

    def poll(self, at_once: int) -> Sent:
        """Poll the jobs that were accepted and cancelled last, in turn."""
        polls = [request("GET", f"{STATUS}/{id_}") for id_ in self.ids]
        return self._round([*islice(cycle(polls), N["poll"])], at_once, 200)

    def list(self, at_once: int) -> Sent:
        return self._round([request("GET", MODELS)] * N["list"], at_once, 200)

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of the replies to a poll and to a list, which must have every model."""
        listed = self.client.send(self.port, [request("GET", MODELS)]).answers[0].body
        if (n := len(json.loads(listed)["models"])) != N_MODELS:
            raise Failure(f"{n} models are listed instead of {N_MODELS}")
        polled = self.client.send(self.port, [self._of_held("GET")]).answers[0].body
        return len(polled), len(listed)

    def settle(self) -> None:
        """Return once the worker has taken every delivery."""
        until(lambda: not self.redis.exists(keys.queue(self.worker)), "the worker has taken its deliveries", WITHIN_S)

    def cancel(self) -> None:
        """Cancel the loads accepted last, and check in Redis that only the held load is left."""
        ids = self.ids
        if len(set(ids)) != len(ids):
            raise Failure(f"{len(ids)} loads resulted in {len(set(ids))} jobs")
        if (queued := self.redis.scard("queued")) != len(ids):
            raise Failure(f"{queued} of {len(ids)} accepted loads are queued: the held load does not block the others")
        cancelled = self.client.send(self.port, [request("DELETE", f"{STATUS}/{id_}") for id_ in ids], 4)
        check(cancelled.answers, 200)
        if {json.loads(answer.body)["status"] for answer in cancelled.answers} != {"cancelled"}:
            raise Failure("a queued load could not be cancelled")
        left = self.redis.smembers("insts")
        if self.redis.scard("queued") or left != {self.held.encode()}:
            raise Failure(f"instances are left after all loads were cancelled: {left!r}")

    def _of_held(self, method: str) -> str:
        return request(method, f"{STATUS}/{self.held}")

    def _round(self, contents: Sequence[str], at_once: int, status: int, *, bodies: bool = False) -> Sent:
        sent = self.client.send(self.port, [*contents], at_once, bodies=bodies)
        check(sent.answers, status)
        return sent

    def _one(self, content: str, status: int) -> dict[str, str]:
        answers = self.client.send(self.port, [content]).answers
        check(answers, status)
        reply: dict[str, str] = json.loads(answers[0].body)
        return reply


def measure(out: Path, say: Callable[[str], None]) -> Followed:
    variables = {
        "LOADSTONE_WORKER_QUEUE_LIMIT": QUEUE_LIMIT,
        "LOADSTONE_QUEUE_LIMIT": QUEUE_LIMIT,
        "LOADSTONE_API_WORKERS": str(API_PROCESSES),
        "LOADSTONE_LEASE_S": str(HELD_S),  # otherwise the held runner would count as hanging
    }
    with ExitStack() as undo:
        models_dir = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="models-", dir=out)))
        keys = [f"bench/model-{i:04}" for i in range(N_MODELS)]
        for key in keys:
            synthetic.tiny_llama(models_dir / key / "model-f16.gguf")
        up = undo.enter_context(service(models_dir, out, **variables))
        pids = roles(up.pid)
        url = redis_url(pids["api"])
        redis = undo.enter_context(Redis.from_url(url))
        with sender(out) as client:
            with stopped(pids["runner, warm"]), _bare(url, out) as (bare_port, handlers):
                jobs = Jobs(up.port, client, redis, keys[0])
                jobs.until("loading")
                rounds = list(_rounds(jobs, bare_port, pids | handlers, say))
            jobs.until("loaded")
        say("idle")
        time.sleep(CALM_S)  # the next runner warms up
        return Followed(rounds=rounds, idle=_idle(redis, roles(up.pid)))


def _rounds(jobs: Jobs, bare_port: int, pids: dict[str, int], say: Callable[[str], None]) -> Iterator[Round]:
    poll_bytes, list_bytes = jobs.sizes()
    bare: dict[What, str] = {
        "bare, Redis": request("POST", "/", json.dumps({"model": "loadstone/bench-tiny"})),
        "bare, poll": request("GET", f"/{poll_bytes}"),
        "bare, list": request("GET", f"/{list_bytes}"),
    }

    def of_bare(what: What, at_once: int) -> Sent:
        sent = jobs.client.send(bare_port, [bare[what]] * N[what], at_once, bodies=False)
        check(sent.answers, 200)
        return sent

    subjects: dict[What, Callable[[int], Sent]] = {
        "accept": jobs.accept,
        "bare, Redis": partial(of_bare, "bare, Redis"),
        "poll": jobs.poll,
        "bare, poll": partial(of_bare, "bare, poll"),
        "list": jobs.list,
        "bare, list": partial(of_bare, "bare, list"),
    }
    for at_once in AT_ONCE:
        say(f"accepting, polling and listing, {at_once} at once")
        for n in range(N_ROUNDS + 1):
            for what, send in subjects.items():
                before = {role: cpu_s(pid) for role, pid in pids.items()}
                sent = send(at_once)
                jobs.settle()
                used = {role: cpu_s(pid) - before[role] for role, pid in pids.items()} | {"client": sent.cpu_s}
                if what == "accept":
                    jobs.cancel()
                if n > 0:
                    latencies = [answer.seconds for answer in sent.answers]
                    yield Round(what=what, at_once=at_once, wall_s=sent.wall_s, latencies_s=latencies, cpu_s=used)


def _idle(redis: Redis, pids: dict[str, int]) -> Idle:
    info, started = _info(redis), time.monotonic()
    before = {role: cpu_s(pid) for role, pid in pids.items()}
    time.sleep(IDLE_S)
    used = {role: cpu_s(pid) - before[role] for role, pid in pids.items()}
    seconds, after = time.monotonic() - started, _info(redis)
    calls, calls_after = _calls(info), _calls(after)
    return Idle(
        seconds=seconds,
        cpu_s=used,
        reads=after["total_reads_processed"] - info["total_reads_processed"] - 1,  # without the read of this INFO
        commands={name: n - calls.get(name, 0) for name, n in calls_after.items() if n != calls.get(name, 0)},
    )


def _info(redis: Redis) -> dict[str, Any]:
    info: Any = redis.info("everything")
    return dict(info)


def _calls(info: dict[str, Any]) -> dict[str, int]:
    """Return the number of calls by command, without those of INFO."""
    prefix = "cmdstat_"
    calls = {name.removeprefix(prefix): about["calls"] for name, about in info.items() if name.startswith(prefix)}
    return {name: n for name, n in calls.items() if name != "info"}


@contextmanager
def _bare(url: str, out: Path) -> Iterator[tuple[int, dict[str, int]]]:
    """Run the bare routes in as many processes as the API has; yield their port and their pids."""
    with ExitStack() as undo:
        stderr = undo.enter_context((out / "handler.log").open("w"))
        listening = undo.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2048))
        argv = [sys.executable, "-m", handler.__name__, str(listening.fileno()), url]
        pids = [
            undo.enter_context(running(argv, stderr, pass_fds=[listening.fileno()])).pid for _ in range(API_PROCESSES)
        ]
        yield listening.getsockname()[1], {f"handler {n}": pid for n, pid in enumerate(pids, 1)}
