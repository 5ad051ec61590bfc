"""What it costs to accept a load, to poll one, and to do nothing: measured with `python -m bench follow`.

Accepting is measured while a first load is held, its runner stopped by SIGSTOP: otherwise the worker would load tiny
models on the same cores.  It still takes each delivery, as it always does.  What was accepted in a round is cancelled
after it.  The bare handler of `bench.handler` has the same Redis, the same client and rounds in between.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
from msgspec import Struct
from redis import Redis

from bench import handler
from bench.client import Answer, Sent, Task, request
from bench.processes import cpu_s, redis_url, roles, stopped
from bench.subjects import Failure, running, service
from shared.store import queue_of

What = Literal["accept", "poll", "bare"]

N: dict[What, int] = {"accept": 250, "poll": 1000, "bare": 1000}  # requests in a round
N_ROUNDS = 4  # of each, per level, after one that is not counted
AT_ONCE = (1, 16)
IDLE_S, CALM_S, WITHIN_S = 10.0, 2.0, 60.0
QUEUE_LIMIT = str(2 * N["accept"])
LOAD, STATUS = "/api/v1/models/load", "/api/v1/models/load/status"


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


class Client:
    """bench.client in its process."""

    def __init__(self, stdin: IO[str], stdout: IO[str], log: Path) -> None:
        self._stdin, self._stdout, self._log = stdin, stdout, log

    def send(self, port: int, requests: list[str], at_once: int = 1) -> Sent:
        task = Task(port=port, requests=requests, at_once=at_once, within_s=WITHIN_S)
        self._stdin.write(msgspec.json.encode(task).decode() + "\n")
        self._stdin.flush()
        return msgspec.json.decode(_line(self._stdout, self._log, WITHIN_S + 5), type=Sent)


class Jobs:
    """The service's side: rounds of loads that are accepted and cancelled, and of polls of the load that is held."""

    def __init__(self, port: int, client: Client, redis: Redis, model: str) -> None:
        self.port, self.client, self.redis = port, client, redis
        workers: Any = redis.zrange("workers", 0, -1)
        self.worker = workers[0].decode()
        self.load = request("POST", LOAD, json.dumps({"model": model}), "Prefer: respond-async\r\n")
        self.held = self._one(self.load, 202)["job_id"]

    def until(self, status: str) -> None:
        """Wait for the held load to get there."""
        _until(lambda: self._one(self._of_held("GET"), 200)["status"] == status, f"a load that is {status}")

    def accept(self, at_once: int) -> Sent:
        return self._round("accept", self.load, at_once, 202)

    def poll(self, at_once: int) -> Sent:
        return self._round("poll", self._of_held("GET"), at_once, 200)

    def settle(self) -> None:
        """Return once the worker has taken every delivery."""
        _until(lambda: not self.redis.exists(queue_of(self.worker)), "a worker that took its deliveries")

    def cancel(self, sent: Sent) -> None:
        """Cancel what was accepted, and see in Redis that the held load alone is left."""
        ids = [json.loads(answer.body)["job_id"] for answer in sent.answers]
        if len(set(ids)) != len(ids):
            raise Failure(f"{len(ids)} loads made {len(set(ids))} jobs")
        if (queued := self.redis.scard("queued")) != len(ids):
            raise Failure(f"of {len(ids)} accepted loads {queued} wait: the held one let some pass")
        cancelled = self.client.send(self.port, [request("DELETE", f"{STATUS}/{id_}") for id_ in ids], 4)
        _check(cancelled.answers, 200)
        if {json.loads(answer.body)["status"] for answer in cancelled.answers} != {"cancelled"}:
            raise Failure("a load that was queued could not be cancelled")
        left = self.redis.smembers("insts")
        if self.redis.scard("queued") or left != {self.held.encode()}:
            raise Failure(f"after everything was cancelled this is left: {left!r}")

    def _of_held(self, method: str) -> str:
        return request(method, f"{STATUS}/{self.held}")

    def _round(self, what: What, content: str, at_once: int, status: int) -> Sent:
        sent = self.client.send(self.port, [content] * N[what], at_once)
        _check(sent.answers, status)
        return sent

    def _one(self, content: str, status: int) -> dict[str, str]:
        answers = self.client.send(self.port, [content]).answers
        _check(answers, status)
        found: dict[str, str] = json.loads(answers[0].body)
        return found


def measure(models_dir: Path, model: str, out: Path, say: Callable[[str], None]) -> Followed:
    limits = {"LOADSTONE_WORKER_QUEUE_LIMIT": QUEUE_LIMIT, "LOADSTONE_QUEUE_LIMIT": QUEUE_LIMIT}
    with service(models_dir, out, **limits) as up, ExitStack() as undo:
        pids = roles(up.pid)
        url = redis_url(pids["api"])
        redis = undo.enter_context(Redis.from_url(url))
        with _client(out) as client:
            with stopped(pids["runner, warm"]), _bare(url, out) as (bare_port, bare_pid):
                jobs = Jobs(up.port, client, redis, model)
                jobs.until("loading")
                rounds = list(_rounds(jobs, bare_port, pids | {"handler": bare_pid}, say))
            jobs.until("loaded")
        say("doing nothing")
        time.sleep(CALM_S)  # the next runner is warmed
        return Followed(rounds=rounds, idle=_idle(redis, roles(up.pid)))


def _rounds(jobs: Jobs, bare_port: int, pids: dict[str, int], say: Callable[[str], None]) -> Iterator[Round]:
    content = request("POST", "/", json.dumps({"model": "loadstone/bench-tiny"}))

    def bare(at_once: int) -> Sent:
        sent = jobs.client.send(bare_port, [content] * N["bare"], at_once)
        _check(sent.answers, 200)
        return sent

    subjects: dict[What, Callable[[int], Sent]] = {"accept": jobs.accept, "bare": bare, "poll": jobs.poll}
    for at_once in AT_ONCE:
        say(f"accepting and polling, {at_once} at once")
        for n in range(N_ROUNDS + 1):
            for what, send in subjects.items():
                before = {role: cpu_s(pid) for role, pid in pids.items()}
                sent = send(at_once)
                jobs.settle()
                used = {role: cpu_s(pid) - before[role] for role, pid in pids.items()} | {"client": sent.cpu_s}
                if what == "accept":
                    jobs.cancel(sent)
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
def _client(out: Path) -> Iterator[Client]:
    log = out / "client.log"
    with log.open("w") as stderr, running([sys.executable, "-m", "bench.client"], stderr) as process:
        assert process.stdin
        assert process.stdout
        yield Client(process.stdin, process.stdout, log)


@contextmanager
def _bare(url: str, out: Path) -> Iterator[tuple[int, int]]:
    """Its port and process."""
    log = out / "handler.log"
    with log.open("w") as stderr, running([sys.executable, "-m", handler.__name__, url], stderr) as process:
        assert process.stdout
        yield int(_line(process.stdout, log, WITHIN_S)), process.pid


def _line(stdout: IO[str], log: Path, within_s: float) -> str:
    """What a process says next, which is one line: nothing is buffered before it."""
    if not select.select([stdout], [], [], within_s)[0]:
        raise Failure(f"a process of the benchmark said nothing for {within_s:g} s; see {log}")
    line = stdout.readline()
    if not line:
        raise Failure(f"a process of the benchmark ended; see {log}")
    return line


def _check(answers: list[Answer], status: int) -> None:
    for answer in answers:
        if answer.status != status:
            raise Failure(f"the answer was {answer.status}, not {status}: {answer.body}")


def _until(found: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not found():
        if time.monotonic() > deadline:
            raise Failure(f"not within {WITHIN_S:g} s: {what}")
        time.sleep(0.02)
