"""Limits: an accepted load is carried out; a request over a limit is refused with a Retry-After."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor, as_completed

from tests.support.chat import answered, ask
from tests.support.service import JSON, LOAD, STATUS, TINY, Reply, Running, Service, error, openai_error, until

VARIABLES = {"LOADSTONE_WORKER_QUEUE_LIMIT": "2", "LOADSTONE_WAITING_LIMIT": "3"}


def asked(service: Service, **headers: str) -> Reply:
    body = json.dumps({"model": TINY}).encode()
    return service.send("POST", LOAD, content=body, headers={**JSON, **headers})


def in_state(service: Service, status: str) -> int:
    return len(service.send("GET", STATUS, params={"status": status}).json()["jobs"])


def refused(reply: Reply, code: str) -> str:
    sentence = error(reply, 429, "too_many_requests", code)["message"]
    assert 1 <= int(reply.headers["retry-after"]) <= 300
    return str(sentence)


def test_a_full_queue_refuses_and_accepted_loads_complete(service: Service) -> None:
    with service.frozen():
        jobs = [service.accepted(TINY)["job_id"]]
        until(lambda: in_state(service, "loading") == 1, "the first load is loading")
        jobs += [service.accepted(TINY)["job_id"] for _ in range(2)]
        for headers in ({"Prefer": "respond-async"}, {}, {"Accept": "text/event-stream"}):
            assert refused(asked(service, **headers), "queue_full") == "The queue is full (limit: 2 waiting loads)."
        known = asked(service, **{"Prefer": "respond-async", "Idempotency-Key": "later"})
        refused(known, "queue_full")
        assert service.cancel(jobs.pop()).status == 200
        jobs.append(asked(service, **{"Prefer": "respond-async", "Idempotency-Key": "later"}).json()["job_id"])
        again = asked(service, **{"Prefer": "respond-async", "Idempotency-Key": "later"})
        assert (again.status, again.json()["job_id"]) == (202, jobs[-1])  # no new load, so no limit
        refused(asked(service), "queue_full")
    assert [service.job(job, wait_s=20)["status"] for job in jobs] == ["loaded"] * 3
    assert len(service.instances()) == 3
    assert in_state(service, "queued") == 0


def test_a_waiting_reply_over_the_limit_is_refused(service: Service) -> None:
    with ThreadPoolExecutor(3) as pool, service.frozen():
        waiting = pool.submit(asked, service)
        until(lambda: in_state(service, "loading") == 1, "one request waits")
        (job,) = service.send("GET", STATUS, params={"status": "loading"}).json()["jobs"]
        events = service.events(job["job_id"])
        next(events)
        polling = pool.submit(service.job, job["job_id"], 20)
        until(lambda: asked(service, Prefer="wait=0").status == 202, "a request that does not wait needs no slot")
        sentence = until(lambda: refused_poll(service), "all slots are taken")
        assert sentence.startswith("Too many open replies (limit: 3).")
        refused(asked(service, Accept="text/event-stream"), "too_many_waiting")
        refused(service.send("GET", f"{STATUS}/{job['job_id']}?wait=5"), "too_many_waiting")
        refused(service.send("GET", f"{STATUS}/{job['job_id']}/events"), "too_many_waiting")
        assert service.job(job["job_id"])["status"] == "loading"
        assert in_state(service, "queued") == 1
    assert waiting.result().status == 200
    assert polling.result()["status"] == "loaded"
    assert [*events][-1].name == "model_load.end"
    until(lambda: len(service.instances()) == 2, "the accepted loads are loaded")
    assert asked(service).status == 200


def test_answers_of_models_are_open_replies_too(service: Service) -> None:
    service.loaded(TINY)
    answered(service, max_tokens=1)
    runner = service.runners()[0]
    with ThreadPoolExecutor(4) as pool:
        os.kill(runner.pid, signal.SIGSTOP)
        try:
            asking = [pool.submit(ask, service, max_tokens=1, stream=i % 2 == 0) for i in range(4)]
            over = next(as_completed(asking)).result()
        finally:
            os.kill(runner.pid, signal.SIGCONT)
    sentence = openai_error(over, 429, "rate_limit_error", "too_many_waiting")
    assert sentence.startswith("Too many open replies (limit: 3).")
    assert int(over.headers["retry-after"]) >= 1
    assert sorted(each.result().status for each in asking) == [200, 200, 200, 429]


def refused_poll(service: Service) -> str:
    """Return the message that refuses a waiting poll, or an empty string if the poll was accepted."""
    (job,) = service.send("GET", STATUS, params={"status": "loading"}).json()["jobs"]
    reply = service.send("GET", f"{STATUS}/{job['job_id']}?wait=1")
    return refused(reply, "too_many_waiting") if reply.status == 429 else ""


def test_the_command_follows_its_load_when_streams_are_refused(service: Service) -> None:
    with service.frozen():
        held = service.accepted(TINY)["job_id"]
        until(lambda: in_state(service, "loading") == 1, "the load is loading")
        streams = [service.events(held) for _ in range(3)]
        for events in streams:
            next(events)
        command = Running(service.directory / "command", "load", TINY, environ={"LOADSTONE_URL": service.url})
        until(lambda: "Too many open replies" in command.stderr, "the command was refused a stream")
    try:
        assert [[*events][-1].name for events in streams] == ["model_load.end"] * 3
        assert command.popen.wait(60) == 0
    finally:
        command.kill()
    assert command.stdout == f"{TINY}:2\n"
    assert command.stderr.count("Too many open replies") == 1
