"""What it costs to accept a load, to poll one, to list the models, and to do nothing: measured with
`python -m bench follow`, of two API processes.

Accepting is measured while a first load is held, its runner stopped by SIGSTOP: otherwise the worker would load tiny
models on the same cores.  It still takes each delivery, as it always does.  What was accepted in a round is cancelled
after it.  The bare routes of `bench.handler` have as many processes, the same client, and rounds in between: constant
replies of the same size as a job's and as the list, and one that sends a command to the same Redis.
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
from bench.subjects import Failure, running, service
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
N_ROUNDS = 4  # of each, per level, after one that is not counted
AT_ONCE = (1, 16, 256)
API_PROCESSES = 2
N_MODELS = 200
IDLE_S, CALM_S, WITHIN_S, HELD_S = 10.0, 2.0, 60.0, 1200
QUEUE_LIMIT = str(2 * N["accept"])
MODELS, LOAD, STATUS = "/api/v1/models", "/api/v1/models/load", "/api/v1/models/load/status"


class Round(Struct, frozen=True, kw_only=True):
    """`cpu_s` is by process, also of the work that a round leaves behind: a worker takes what was queued for it."""

    what: What
    at_once: int
    wall_s: float
    latencies_s: list[float]
    cpu_s: dict[str, float]


class Idle(Struct, frozen=True, kw_only=True):
    """CPU time by process; how often Redis read something from a client, and what it did, within scripts too."""

    seconds: float
    cpu_s: dict[str, float]
    reads: int
    commands: dict[str, int]


class Followed(Struct, frozen=True, kw_only=True):
    rounds: list[Round]
    idle: Idle


class Jobs:
    """The service's side: rounds of loads that are accepted and cancelled, and of polls of the load that is held."""

    def __init__(self, port: int, client: Sender, redis: Redis, model: str) -> None:
        self.port, self.client, self.redis = port, client, redis
        workers: Any = redis.zrange("workers", 0, -1)
        self.worker = workers[0].decode()
        self.load = request("POST", LOAD, json.dumps({"model": model}), "Prefer: respond-async\r\n")
        self.held = self._one(self.load, 202)["job_id"]
        self.ids: list[str] = []

    def until(self, status: str) -> None:
        """Wait for the held load to get there."""
        _until(lambda: self._one(self._of_held("GET"), 200)["status"] == status, f"a load that is {status}")

    def accept(self, at_once: int) -> Sent:
        sent = self._round([self.load] * N["accept"], at_once, 202, bodies=True)
        self.ids = [json.loads(answer.body)["job_id"] for answer in sent.answers]
        return sent

    def poll(self, at_once: int) -> Sent:
        """Different jobs: those that were accepted, and cancelled, last."""
        polls = [request("GET", f"{STATUS}/{id_}") for id_ in self.ids]
        return self._round([*islice(cycle(polls), N["poll"])], at_once, 200)

    def list(self, at_once: int) -> Sent:
        return self._round([request("GET", MODELS)] * N["list"], at_once, 200)

    def sizes(self) -> tuple[int, int]:
        """Bytes of the replies to a poll and to a list, which has to have every model."""
        listed = self.client.send(self.port, [request("GET", MODELS)]).answers[0].body
        if (n := len(json.loads(listed)["models"])) != N_MODELS:
            raise Failure(f"{n} models are listed, not {N_MODELS}")
        polled = self.client.send(self.port, [self._of_held("GET")]).answers[0].body
        return len(polled), len(listed)

    def settle(self) -> None:
        """Return once the worker has taken every delivery."""
        _until(lambda: not self.redis.exists(keys.queue(self.worker)), "a worker that took its deliveries")

    def cancel(self) -> None:
        """Cancel what was accepted last, and see in Redis that the held load alone is left."""
        ids = self.ids
        if len(set(ids)) != len(ids):
            raise Failure(f"{len(ids)} loads made {len(set(ids))} jobs")
        if (queued := self.redis.scard("queued")) != len(ids):
            raise Failure(f"of {len(ids)} accepted loads {queued} wait: the held one let some pass")
        cancelled = self.client.send(self.port, [request("DELETE", f"{STATUS}/{id_}") for id_ in ids], 4)
        check(cancelled.answers, 200)
        if {json.loads(answer.body)["status"] for answer in cancelled.answers} != {"cancelled"}:
            raise Failure("a load that was queued could not be cancelled")
        left = self.redis.smembers("insts")
        if self.redis.scard("queued") or left != {self.held.encode()}:
            raise Failure(f"after everything was cancelled this is left: {left!r}")

    def _of_held(self, method: str) -> str:
        return request(method, f"{STATUS}/{self.held}")

    def _round(self, contents: Sequence[str], at_once: int, status: int, *, bodies: bool = False) -> Sent:
        sent = self.client.send(self.port, [*contents], at_once, bodies=bodies)
        check(sent.answers, status)
        return sent

    def _one(self, content: str, status: int) -> dict[str, str]:
        answers = self.client.send(self.port, [content]).answers
        check(answers, status)
        found: dict[str, str] = json.loads(answers[0].body)
        return found


def measure(out: Path, say: Callable[[str], None]) -> Followed:
    variables = {
        "LOADSTONE_WORKER_QUEUE_LIMIT": QUEUE_LIMIT,
        "LOADSTONE_QUEUE_LIMIT": QUEUE_LIMIT,
        "LOADSTONE_API_WORKERS": str(API_PROCESSES),
        "LOADSTONE_LEASE_S": str(HELD_S),  # or the runner that is held would be taken for one that hangs
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
        say("doing nothing")
        time.sleep(CALM_S)  # the next runner is warmed
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
        reads=after["total_reads_processed"] - info["total_reads_processed"] - 1,  # the one that asked
        commands={name: n - calls.get(name, 0) for name, n in calls_after.items() if n != calls.get(name, 0)},
    )


def _info(redis: Redis) -> dict[str, Any]:
    found: Any = redis.info("everything")
    return dict(found)


def _calls(info: dict[str, Any]) -> dict[str, int]:
    """By command, without our own."""
    prefix = "cmdstat_"
    found = {name.removeprefix(prefix): about["calls"] for name, about in info.items() if name.startswith(prefix)}
    return {name: n for name, n in found.items() if name != "info"}


@contextmanager
def _bare(url: str, out: Path) -> Iterator[tuple[int, dict[str, int]]]:
    """The port of bare routes, and their processes, as many as the API has."""
    with ExitStack() as undo:
        stderr = undo.enter_context((out / "handler.log").open("w"))
        listening = undo.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2048))
        argv = [sys.executable, "-m", handler.__name__, str(listening.fileno()), url]
        found = [
            undo.enter_context(running(argv, stderr, pass_fds=[listening.fileno()])).pid for _ in range(API_PROCESSES)
        ]
        yield listening.getsockname()[1], {f"handler {n}": pid for n, pid in enumerate(found, 1)}


def _until(found: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not found():
        if time.monotonic() > deadline:
            raise Failure(f"not within {WITHIN_S:g} s: {what}")
        time.sleep(0.02)
