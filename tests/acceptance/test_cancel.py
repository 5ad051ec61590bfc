"""A load is cancelled: at once, with its memory back, and never by accident."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import httpx
import pytest

from tests.support.service import JSON, LOAD, STATUS, TINY, Service, error, is_alive, meanwhile, until


def loading(service: Service) -> str:
    """The id of the one job that is loading."""
    (job,) = until(lambda: service.send("GET", STATUS, params={"status": "loading"}).json()["jobs"], "a load has begun")
    return str(job["job_id"])


def test_a_queued_load_is_cancelled_at_once(service: Service) -> None:
    with service.frozen():
        first, second = service.accepted(TINY)["job_id"], service.accepted(TINY)["job_id"]
        until(lambda: service.job(first)["status"] == "loading", "the first one loads")
        began = time.monotonic()
        reply = service.cancel(second)
        assert time.monotonic() - began < 1
        assert (reply.status, reply.json()["job_id"], reply.json()["status"]) == (200, second, "cancelled")
    assert service.job(first, wait_s=20)["status"] == "loaded"
    assert list(service.instances()) == [TINY]
    job = service.job(second)
    assert job == reply.json()
    assert (job["result"], job["error"]["code"], job["started_at"]) == (None, "load_cancelled", None)


def test_a_cancelled_load_gives_its_memory_back_before_the_answer_and_tells_its_waiters(service: Service) -> None:
    with service.frozen() as runner, meanwhile(service.load, TINY) as waiting:
        job_id = loading(service)
        with meanwhile(lambda: [*service.events(job_id)]) as events:
            reply = service.cancel(job_id)
            assert not is_alive(runner)
    assert (reply.status, reply.json()["status"], reply.json()["result"]) == (200, "cancelled", None)
    told = error(waiting.result(), 409, "model_load_failed", "load_cancelled")
    assert told["message"] == f"Failed to load LLM '{TINY}': Error: the load was cancelled"
    assert reply.json()["error"] == told
    assert events.result()[-1].data == {"type": "error", "error": told}
    assert set(reply.json()["timing"]) == {"queue", "spawn", "metadata", "total"}
    assert service.instances() == {}
    assert service.loaded(TINY)["instance_id"] == TINY


def test_a_load_that_has_ended_cannot_be_cancelled(service: Service) -> None:
    job_id = service.accepted(TINY)["job_id"]
    assert service.job(job_id, wait_s=20)["status"] == "loaded"
    error(service.cancel(job_id), 409, "invalid_request", "job_already_finished", "job_id")
    assert list(service.instances()) == [TINY]
    with service.frozen(1):
        cancelled = service.accepted(TINY)["job_id"]
        assert service.cancel(cancelled).status == 200
    error(service.cancel(cancelled), 409, "invalid_request", "job_already_finished", "job_id")


def test_unloading_what_is_still_loading_cancels_it(service: Service) -> None:
    with service.frozen() as runner, meanwhile(service.load, TINY) as waiting:
        job_id = loading(service)
        reply = service.unload(TINY)
        assert (reply.status, reply.json()) == (200, {"instance_id": TINY})
        assert not is_alive(runner)
    error(waiting.result(), 409, "model_load_failed", "load_cancelled")
    assert service.job(job_id)["status"] == "cancelled"


def test_one_waiter_of_several_that_goes_away_cancels_nothing(service: Service) -> None:
    headers = {**JSON, "Idempotency-Key": "several"}
    body = json.dumps({"model": TINY}).encode()
    with ExitStack() as staying, service.frozen():
        stays = staying.enter_context(meanwhile(service.send, "POST", LOAD, content=body, headers=headers))
        loading(service)
        with pytest.raises(httpx.ReadTimeout):
            service.send("POST", LOAD, content=body, headers=headers, timeout=0.5)
        job_id = loading(service)
        events = service.events(job_id)
        next(events)
        events.close()  # type: ignore[attr-defined]
    assert stays.result().status == 200
    assert service.job(job_id, wait_s=20)["status"] == "loaded"


def test_a_cancel_that_meets_the_end_of_the_load_has_one_outcome(service: Service) -> None:
    """Whichever comes first: a load that is cancelled is not there, one that is there was not cancelled."""
    outcomes: set[str] = set()
    attempt = 0
    while attempt < 24 or len(outcomes) < 2:  # each cancel a little later: the first ones early, the last ones late
        assert attempt < 200, outcomes
        job_id = service.accepted(TINY)["job_id"]
        time.sleep(attempt / 500)
        reply = service.cancel(job_id)
        status = service.job(job_id, wait_s=20)["status"]
        assert (reply.status, status) in ((200, "cancelled"), (409, "loaded"))
        assert list(service.instances()) == ([TINY] if status == "loaded" else [])
        outcomes.add(status)
        attempt += 1
        service.unload_all()
