"""W3C Trace Context: all log lines about a load, in every process, have its trace id and its other ids."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import JSON, LOAD, STATUS, TINY, Client, RedisServer, Reply, Running, Service, until

VARIABLES = {"LOADSTONE_LOG_FORMAT": "json"}
LEASE_S = 3
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
IDS = {
    "job": r"load_[0-9a-f]{32}",
    "instance": r"acme/\w+(:\d+)?",
    "worker": r".+",
    "trace_id": r"[0-9a-f]{32}",
}


def traceparent(number: int) -> str:
    """Return a header with a trace id for each number."""
    return f"00-{number:032x}-{SPAN_ID}-01"


def post_load(client: Client, fields: dict[str, object], **headers: str) -> Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.send("POST", LOAD, content=json.dumps(fields).encode(), headers={**JSON, **names})


def lines(running: Running, **fields: object) -> list[Any]:
    """Return the log lines of a command and its children that have these fields."""
    # Lines of Redis are not JSON.
    entries = [json.loads(line) for line in running.stderr.split("\n")[:-1] if line.startswith("{")]
    return [line for line in entries if fields.items() <= line.items()]


def wait_lines(running: Running, n: int = 1, **fields: object) -> list[Any]:
    """Wait for `n` lines with these fields; return the first `n`."""

    def enough() -> list[Any] | None:
        matching = lines(running, **fields)
        return matching if len(matching) >= n else None

    return until(enough, f"{n} lines with {fields}")[:n]


def engine_log(client: Client, job_id: str) -> str:
    """Wait for the engine log of a load, and return it."""
    return until(lambda: client.send("GET", f"{STATUS}/{job_id}/logs").text, "the engine's log")


def trace_of(log: str) -> tuple[str, str]:
    """Return trace id and span id from the first line of an engine log."""
    match = re.fullmatch(r"traceparent: 00-([0-9a-f]{32})-([0-9a-f]{16})-0[01]", log.splitlines()[0])
    assert match, log[:200]
    return match[1], match[2]


def test_a_requests_trace_is_in_api_worker_and_engine_logs(service: Service) -> None:
    reply = post_load(service, {"model": TINY}, traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01")
    assert reply.status == 200, reply.text
    accepted, *moved = wait_lines(service, 3, trace_id=TRACE_ID)
    assert (accepted["service"], accepted["action"], accepted["instance"]) == ("api", "accepted", TINY)
    assert [(line["service"], line["old"], line["new"]) for line in moved] == [
        ("worker", "queued", "loading"),
        ("worker", "loading", "loaded"),
    ]
    trace_id, of_runner = trace_of(engine_log(service, accepted["job"]))
    assert trace_id == TRACE_ID
    (of_worker,) = {line["span_id"] for line in moved}
    assert len({SPAN_ID, accepted["span_id"], of_worker, of_runner}) == 4, "each part has its own span"
    service.unload(TINY)
    unloaded = wait_lines(service, 5, trace_id=TRACE_ID)[3:]
    assert [(line["old"], line["new"]) for line in unloaded] == [("loaded", "unloading"), ("unloading", "unloaded")]


def test_every_line_about_a_load_has_all_of_its_ids(service: Service, tmp_path: Path) -> None:
    service.loaded(TINY)
    cut = synthetic.tiny_llama(service.models_dir / "acme/cut/cut-f16.gguf")
    until(lambda: "acme/cut" in service.models(), "the model is listed")
    os.truncate(cut, cut.stat().st_size // 2)
    assert post_load(service, {"model": "acme/cut"}).status == 500
    cut.unlink()
    assert service.unload(TINY).status == 200
    job_id = service.accepted(TINY, ttl_seconds=1)["job_id"]
    wait_lines(service, job=job_id, new="unloaded")
    about = [line for line in lines(service) if set(line) & {"job", "instance", "old", "trace_id"}]
    assert {line["action"] for line in about} >= {"accepted", "transition", "idle", "load_failed"}
    for line in about:
        wrong = [name for name, form in IDS.items() if not re.fullmatch(form, line.get(name, ""))]
        is_of_request = line["action"] == "load_failed" and "job" not in line  # refused before there was a job
        assert not wrong or (is_of_request and "trace_id" not in wrong), (wrong, line)


@pytest.mark.parametrize(
    "header", ["", "00-" + "0" * 32 + f"-{SPAN_ID}-01", f"00-{TRACE_ID.upper()}-{SPAN_ID}-01", "x"]
)
def test_an_invalid_traceparent_is_replaced_by_a_new_trace(service: Service, header: str) -> None:
    reply = post_load(service, {"model": TINY}, Prefer="respond-async", traceparent=header)
    job_id = reply.json()["job_id"]
    assert service.job(job_id, wait_s=10)["status"] == "loaded"
    trace_ids = {line["trace_id"] for line in wait_lines(service, 3, job=job_id)}
    assert len(trace_ids) == 1
    assert re.fullmatch(IDS["trace_id"], *trace_ids)
    assert not trace_ids & {TRACE_ID, "0" * 32}
    assert trace_of(engine_log(service, job_id))[0] in trace_ids


def test_a_repeated_request_does_not_change_the_loads_trace(service: Service) -> None:
    first, second = (
        post_load(
            service, {"model": TINY}, Prefer="respond-async", Idempotency_Key="one", traceparent=traceparent(n)
        ).json()
        for n in (1, 2)
    )
    assert first["job_id"] == second["job_id"]
    service.job(first["job_id"], wait_s=10)
    (joined,) = wait_lines(service, trace_id=f"{2:032x}")
    assert (joined["action"], joined["job"]) == ("joined", first["job_id"])
    assert trace_of(engine_log(service, first["job_id"]))[0] == f"{1:032x}"


def test_a_refused_load_logs_one_line_with_its_trace(service: Service) -> None:
    assert post_load(service, {"model": "acme/none"}, traceparent=traceparent(3)).status == 404
    (line,) = wait_lines(service, trace_id=f"{3:032x}")
    assert (line["action"], line["status"], line["type"]) == ("load_failed", 404, "model_not_found")
    assert post_load(service, {"model": 1}, traceparent=traceparent(4)).status == 400
    (line,) = wait_lines(service, trace_id=f"{4:032x}")
    assert (line["action"], line["status"], line["type"]) == ("load_failed", 400, "invalid_request")


def test_requests_on_one_connection_share_no_ids(service: Service) -> None:
    """Pipelined requests are answered in order; the server starts the second in the context of the first."""

    def request(number: int, body: bytes, *more: str) -> bytes:
        head = [f"POST {LOAD} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *more]
        head += ["Content-Type: application/json", f"traceparent: {traceparent(number)}"]
        return "\r\n".join([*head, "", ""]).encode() + body

    accepted = request(5, json.dumps({"model": TINY}).encode(), "Prefer: respond-async")
    service.raw(accepted + request(6, b'{"model": "acme/none"}', "Connection: close"))
    (line,) = wait_lines(service, trace_id=f"{6:032x}")
    assert line["action"] == "load_failed"
    assert not {"job", "instance", "worker"} & set(line)
    until(lambda: service.instances(), "the first request's model is loaded")


# ---- a worker that dies


def test_a_restored_instance_starts_a_new_trace(service: Service) -> None:
    assert post_load(service, {"model": TINY}, traceparent=traceparent(7)).status == 200
    os.kill(service.worker().pid, signal.SIGKILL)
    (restoring,) = wait_lines(service, action="restoring")
    restored = wait_lines(service, 2, job=restoring["job"], action="transition")
    until(lambda: service.instances(), "the instance is loaded again")
    lost = lines(service, trace_id=f"{7:032x}")[-1]
    assert (lost["old"], lost["new"]) == ("loaded", "lost")
    assert len({line["trace_id"] for line in [restoring, *restored]}) == 1
    assert lost["trace_id"] != restoring["trace_id"]
    for line in (lost, restoring, *restored):
        assert [name for name, form in IDS.items() if not re.fullmatch(form, line.get(name, ""))] == [], line


@contextmanager
def two_workers(home: Path) -> Iterator[tuple[Client, Running, dict[str, Running]]]:
    """Run an API and the workers "a" and "b" on one Redis."""
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with ExitStack() as undo:
        redis = RedisServer(home / "redis")
        undo.callback(redis.kill)
        variables = {"LOADSTONE_REDIS_URL": redis.url, "LOADSTONE_LEASE_S": str(LEASE_S), "LOADSTONE_DRAIN_S": "0"}
        variables |= VARIABLES

        def start(name: str, *words: str) -> Running:
            running = Running(home / name, *words, environ=variables)
            undo.callback(running.kill)
            return running

        flags = ("--models-dir", str(home / "models"))
        workers = {
            name: start(name, "worker", "--worker-name", name, *flags, "--data-dir", str(home / f"data-{name}"))
            for name in "ab"
        }
        api = start("api", "api", "--port", "0")
        client = Client(api.first_line().removeprefix("listening: "))
        undo.callback(client.close)

        def are_known() -> bool:
            return len(client.send("GET", "/api/v1/workers").json()["workers"]) == len(workers)

        until(are_known, "both workers are ready")
        client.models()  # makes the API read the snapshots of the workers
        yield client, api, workers
        workers["b"].stop()
        api.stop()


def test_a_requeued_load_keeps_its_trace(tmp_path: Path) -> None:
    with two_workers(tmp_path) as (client, api, workers):
        a, b = workers["a"], workers["b"]
        with a.frozen():
            reply = post_load(
                client, {"model": TINY}, Prefer="respond-async", traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01"
            )
            job_id = reply.json()["job_id"]
            (claimed,) = wait_lines(a, job=job_id, new="loading")
            worker = a.worker()
            a.popen.kill()  # the supervisor, which would restart the worker
            os.kill(worker.pid, signal.SIGKILL)
        done = until(lambda: (j := client.job(job_id, wait_s=2))["status"] == "loaded" and j, "the job is loaded")
        assert (done["worker"], done["attempt"]) == ("b", 2)
        moved = wait_lines(b, 2, job=job_id)
        assert {line["trace_id"] for line in [claimed, *moved]} == {TRACE_ID}
        assert claimed["span_id"] not in {line["span_id"] for line in moved}
        accepted, requeued = wait_lines(api, 2, job=job_id)
        assert (accepted["action"], accepted["trace_id"]) == ("accepted", TRACE_ID)
        assert (requeued["worker"], requeued["to"], requeued["trace_id"]) == ("a", "b", TRACE_ID)
        assert trace_of(engine_log(client, job_id))[0] == TRACE_ID
