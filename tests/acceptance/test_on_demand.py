"""A request loads its model, once for all API processes, and is sent again if its instance is lost before it began."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import DONE, answered, ask, connected
from tests.support.pair import Pair, paired
from tests.support.service import STATUS, TINY, Client, Process, Reply, all_stopped, meanwhile, openai_error, until

DEFECT, VECTORS = "acme/defect", "acme/vectors"
CONTEXT_LENGTH = 8192
TTL_S = 1000
N_REQUESTS = 50


@pytest.fixture(scope="module")
def the_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    home = tmp_path_factory.mktemp("on-demand")
    metadata = {"llama.context_length": CONTEXT_LENGTH}
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf", metadata=metadata)
    synthetic.tiny_llama(home / f"models/{DEFECT}/defect-f16.gguf", drop=["blk.1.ffn_up.weight"])
    synthetic.tiny_bert(home / f"models/{VECTORS}/vectors-f32.gguf")
    with paired(home, LOADSTONE_JIT_TTL_S=str(TTL_S)) as pair:
        for api in pair.apis:
            until(lambda api=api: len(api.models()) == 3, "all models are listed")  # type: ignore[misc]
        yield pair


@pytest.fixture
def pair(the_pair: Pair) -> Iterator[Pair]:
    yield the_pair
    until(lambda: not under_way(the_pair), "no load is under way")
    for instance in the_pair.apis[0].instances():
        assert the_pair.apis[0].unload(instance).status in (200, 404), "404: a test killed its runner just now"


def loads(pair: Pair) -> list[Any]:
    found: list[Any] = pair.apis[0].send("GET", STATUS, params={"limit": 1000}).json()["jobs"]
    return found


def under_way(pair: Pair) -> list[str]:
    return [job["job_id"] for job in loads(pair) if job["status"] in ("queued", "loading")]


@contextmanager
def asking(client: Client, n: int = 1, **fields: Any) -> Iterator[list[Future[Reply]]]:
    with ThreadPoolExecutor(n) as pool:
        yield [pool.submit(ask, client, max_tokens=2, **fields) for _ in range(n)]


def taken(pair: Pair) -> int:
    """Return how many connections of clients the API processes have."""
    return sum(len(established(api)) for api in pair.apis)


def established(api: Client) -> list[str]:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[2] for row in rows if row[1].endswith(f":{api.port:04X}") and row[3] == "01"]


# ---- one load


def test_fifty_requests_at_two_processes_make_one_load(pair: Pair) -> None:
    before = len(loads(pair))
    with ExitStack() as stack:
        with pair.worker.frozen():
            replies: list[Future[Reply]] = []
            for api in pair.apis:
                for stream in (False, True):
                    replies += stack.enter_context(asking(api, N_REQUESTS // 4, model=TINY.upper(), stream=stream))
            (first,) = until(lambda: under_way(pair), "a load")
            until(lambda: taken(pair) == len(replies), "all requests are there")
        for reply in (one.result() for one in replies):
            assert (reply.status, reply.headers["loadstone-instance"]) == (200, TINY), reply.text
    (job,) = loads(pair)[: len(loads(pair)) - before]
    assert (job["job_id"], job["status"]) == (first, "loaded")
    ((id_, instance),) = pair.apis[1].instances().items()
    assert (id_, instance["config"]["context_length"]) == (TINY, CONTEXT_LENGTH), "all of the model's"
    assert 0 < instance["remaining_ttl_seconds"] <= TTL_S
    assert answered(pair.apis[1], model=TINY, max_tokens=1)["model"] == TINY
    assert len(loads(pair)) == before + 1


def test_a_variant_is_loaded_by_its_name(pair: Pair) -> None:
    before = len(loads(pair))
    name = f"{TINY}@f16"
    for api in pair.apis:
        assert answered(api, model=name, max_tokens=1)["model"] == name
    assert answered(pair.apis[0], model=TINY, max_tokens=1)["model"] == name, "it is the same model"
    assert len(loads(pair)) == before + 1


def test_a_request_joins_a_load_of_a_client(pair: Pair) -> None:
    with ExitStack() as stack:
        with pair.worker.frozen():
            job = pair.apis[0].accepted(TINY, context_length=512)
            (reply,) = stack.enter_context(asking(pair.apis[1], model=TINY))
            until(lambda: taken(pair) == 1, "the request is there")
        assert reply.result().status == 200
    ((id_, instance),) = pair.apis[0].instances().items()
    assert (id_, instance["config"]["context_length"]) == (job["instance_id"], 512)
    assert pair.apis[0].loaded(TINY)["instance_id"] == f"{TINY}:2", "a load of a client is always another instance"


def test_a_load_goes_on_without_the_client_that_needed_it(pair: Pair) -> None:
    with pair.worker.frozen():
        connection = connected(pair.apis[0], model=TINY)
        (job,) = until(lambda: under_way(pair), "a load")
        connection.close()
        until(lambda: not taken(pair), "the API noticed")
    assert pair.apis[0].job(job, wait_s=30)["status"] == "loaded"


def test_the_ttl_of_the_request_counts(pair: Pair) -> None:
    assert ask(pair.apis[0], max_tokens=1, model=TINY, ttl=60).status == 200
    (instance,) = pair.apis[0].instances().values()
    assert 0 < instance["remaining_ttl_seconds"] <= 60
    pair.apis[0].unload_all()
    assert ask(pair.apis[0], max_tokens=1, model=TINY, ttl="soon").status == 200
    (instance,) = pair.apis[0].instances().values()
    assert 60 < instance["remaining_ttl_seconds"] <= TTL_S


# ---- what is not loaded


def test_only_models_are_loaded_on_demand(pair: Pair) -> None:
    before = len(loads(pair))
    for name in (f"{TINY}:2", "acme/nothing"):
        openai_error(ask(pair.apis[0], model=name), 404, "invalid_request_error", "model_not_found", "model")
    openai_error(ask(pair.apis[0], model=VECTORS), 400, "invalid_request_error", "invalid_value", "model")
    openai_error(ask(pair.apis[0]), 400, "invalid_request_error", "missing_required_parameter", "model")
    wrong: list[dict[str, Any]] = [{"logit_bias": {"1": 1000}}, {"stop": [""]}, {"messages": []}]
    for fields in wrong:
        assert ask(pair.apis[0], model=TINY, **fields).status == 400
    assert len(loads(pair)) == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_load_answers_with_its_status_and_once(pair: Pair, stream: bool) -> None:
    with pair.redis.client() as redis:  # of the other parameter
        for key in redis.scan_iter("failed:*"):
            redis.delete(key)
    before = len(loads(pair))
    for api in (*pair.apis, *pair.apis):
        reply = ask(api, model=DEFECT, stream=stream)
        message = openai_error(reply, 500, "server_error", "model_load_failed")
        assert "blk.1.ffn_up.weight" in message
        assert reply.headers["x-should-retry"] == "false"
    assert len(loads(pair)) == before + 1
    job, *_ = loads(pair)
    assert job["error"]["message"] == message


def test_a_cancelled_load_may_be_asked_for_again(pair: Pair) -> None:
    with ExitStack() as stack:
        with pair.worker.frozen():
            (reply,) = stack.enter_context(asking(pair.apis[0], model=TINY))
            (job,) = until(lambda: under_way(pair), "a load")
            until(lambda: taken(pair) == 1, "the request is there")
            with meanwhile(pair.apis[1].cancel, job):
                openai_error(reply.result(), 503, "unavailable_error", "load_interrupted")
        assert reply.result().headers["retry-after"]
    assert ask(pair.apis[0], max_tokens=1, model=TINY).status == 200


# ---- sent again


def stop_requested(pair: Pair, instance_id: str) -> bool:
    with pair.redis.client() as redis:
        id_: Any = redis.hget("names", instance_id)
        return bool(redis.hexists(f"inst:{id_.decode()}", "stop"))


@contextmanager
def lost(pair: Pair, runner: Process, n: int = 1, model: str = TINY, **fields: Any) -> Iterator[list[Future[Reply]]]:
    """Send requests to a runner that does not accept them, for the block; then kill it."""
    os.kill(runner.pid, signal.SIGSTOP)
    until(lambda: all_stopped(runner.pid), "every thread of the runner stopped")
    with ExitStack() as stack:
        try:
            replies = stack.enter_context(asking(pair.apis[0], n, model=model, **fields))
            until(lambda: taken(pair) == n, "the requests are there")
            yield replies
        finally:
            with suppress(ProcessLookupError):  # an unload has killed it
                os.kill(runner.pid, signal.SIGKILL)


@pytest.mark.parametrize("stream", [False, True])
def test_requests_whose_runner_dies_are_answered_by_another(pair: Pair, stream: bool) -> None:
    assert ask(pair.apis[0], max_tokens=1, model=TINY).status == 200
    before = len(loads(pair))
    with lost(pair, pair.worker.runners()[0], n=5, stream=stream) as replies:
        pass
    for reply in (one.result() for one in replies):
        assert reply.status == 200, reply.text
        assert reply.text.endswith(f"data: {DONE}\n\n") == stream
    assert len(loads(pair)) == before + 1, "one load for all of them"
    until(lambda: len(pair.apis[0].instances()) == 1, "the other one has failed")


def test_requests_go_to_another_copy_if_there_is_one(pair: Pair) -> None:
    for _ in range(2):
        pair.apis[0].loaded(TINY)
    copies = [TINY, f"{TINY}:2"]
    first = copies.index(ask(pair.apis[0], max_tokens=1, model=TINY).headers["loadstone-instance"])
    before = len(loads(pair))
    with lost(pair, pair.worker.runners()[first]) as (reply,):
        pass
    assert (reply.result().status, reply.result().headers["loadstone-instance"]) == (200, copies[1 - first])
    assert len(loads(pair)) == before


def test_a_request_for_a_lost_instance_is_not_sent_elsewhere(pair: Pair) -> None:
    for _ in range(2):
        pair.apis[0].loaded(TINY)
    second = f"{TINY}:2"
    assert ask(pair.apis[0], max_tokens=1, model=second).status == 200
    before = len(loads(pair))
    with lost(pair, pair.worker.runners()[1], model=second) as (reply,):
        pass
    openai_error(reply.result(), 503, "unavailable_error", "runner_lost")
    assert len(loads(pair)) == before


def test_a_request_that_meets_an_unload_loads_its_model_again(pair: Pair) -> None:
    """Another API process unloads the instance after this one has chosen it."""
    assert ask(pair.apis[0], max_tokens=1, model=TINY).status == 200
    runner = pair.worker.runners()[0]
    with lost(pair, runner) as (reply,), meanwhile(pair.apis[1].unload, TINY) as unloading:
        until(lambda: stop_requested(pair, TINY), "the unload is requested")
    assert unloading.result().status == 200
    assert reply.result().status == 200, reply.result().text
    until(lambda: len(pair.apis[0].instances()) == 1, "the other one has failed")
