"""What dies, stalls or runs out of descriptors in the middle of answers."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import CHAT, DONE, ENDLESS, answered, ask, begun, body, events, streaming
from tests.support.relay import cutting, with_a_small_buffer
from tests.support.service import TINY, Process, Service, all_stopped, below, go_on, is_alive, openai_error, until, up

CONTEXT_LENGTH = 32_768
LONG = 300  # tokens of an answer
MOST = 30_000  # of one that a test ends
CUT_S = 0.03
N_REQUESTS, N_CLIENTS = 40, 4
SPARE = 2  # descriptors that a process still gets


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("dying")
    metadata = {"llama.context_length": CONTEXT_LENGTH}
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf", metadata=metadata)
    with up(home) as service:
        yield service


@pytest.fixture
def model(service: Service) -> str:
    return str(service.loaded(TINY, context_length=CONTEXT_LENGTH)["instance_id"])


def runs(service: Service) -> float:
    """Return how many requests of the instance run and wait, as its worker published them last."""
    text = service.send("GET", "/metrics").text
    kinds = [kind for kind in ("running", "waiting") if f'loadstone_requests_{kind}{{instance="{TINY}"' in text]
    return sum(service.metric(f"requests_{kind}", instance=TINY) for kind in kinds)


@contextmanager
def paused(*processes: Process) -> Iterator[None]:
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    until(lambda: all(all_stopped(process.pid) for process in processes), "they are stopped")
    try:
        yield
    finally:
        for process in processes:
            go_on(process)


def redis_of(service: Service) -> Process:
    return next(process for process in service.tree() if "redis.sock" in " ".join(process.words))


def process_of(service: Service, module: str) -> Process:
    return until(lambda: next((one for one in service.tree() if module in one.words), None), module)


def is_whole(received: Iterator[str]) -> bool:
    """Read an answer of LONG tokens to its end."""
    *parts, last = received
    chunks = [json.loads(part) for part in parts]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    return (last, reasons, chunks[-1]["usage"]["completion_tokens"]) == (DONE, ["length"], LONG)


@contextmanager
def answering(service: Service, n: int = LONG) -> Iterator[Iterator[str]]:
    """Begin an answer of `n` tokens."""
    usage = {"include_usage": True}
    with streaming(service, model=TINY, max_tokens=n, stream_options=usage, **ENDLESS) as received:
        begun(received)
        yield received


# ---- Redis and workers do not take part


def test_an_answer_goes_on_while_redis_is_silent(service: Service, model: str) -> None:
    with answering(service) as received:
        with paused(service.runners()[0]):
            os.kill(redis_of(service).pid, signal.SIGSTOP)
        try:
            assert is_whole(received)
        finally:
            go_on(redis_of(service))
    until(lambda: ask(service, model=model, max_tokens=1).status == 200, "the next one is answered")
    until(lambda: service.send("GET", "/api/v1/models").status == 200, "Redis is back")


def test_an_answer_goes_on_when_redis_dies(service: Service, model: str) -> None:
    redis = redis_of(service)
    with answering(service) as received:
        with paused(service.runners()[0]):
            os.kill(redis.pid, signal.SIGKILL)
        assert is_whole(received)
    until(lambda: ask(service, model=model, max_tokens=1).status == 200, "the next one is answered")
    until(lambda: service.send("GET", "/api/v1/models").status == 200, "Redis is back")


def test_an_answer_goes_on_when_redis_is_emptied(service: Service, model: str) -> None:
    with answering(service) as received:
        with paused(service.runners()[0]), service.redis() as redis:
            redis.flushall()
        assert is_whole(received)
    until(lambda: ask(service, model=model, max_tokens=1).status == 200, "the next one is answered")
    until(lambda: service.instances(), "the instance is recorded again")


def test_a_paused_worker_delays_no_answer(service: Service, model: str) -> None:
    with answering(service) as received, ExitStack() as stack:
        with paused(service.runners()[0]):
            stack.enter_context(paused(service.worker()))
        assert is_whole(received)
        assert answered(service, model=model, max_tokens=1)


# ---- a runner, its helper, an API process


def test_a_paused_runner_delays_its_answers_only_as_long(service: Service, model: str) -> None:
    runner = service.runners()[0]
    with answering(service) as received:
        with paused(runner), answering_client_that_leaves(service):
            pass
        assert is_whole(received)
    until(lambda: runs(service) == 0, "no request is left")


@contextmanager
def answering_client_that_leaves(service: Service) -> Iterator[None]:
    """Send a request that gets no reply, and disconnect after the block."""
    content = json.dumps(body(model=TINY, **ENDLESS)).encode()
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        yield


def test_a_helper_that_dies_ends_no_answer(service: Service, model: str) -> None:
    (zygote,) = [one for one in below(service.runners()[0].pid) if one.parent == service.runners()[0].pid]
    with answering(service) as received:
        with paused(service.runners()[0]):
            for helper in below(zygote.pid):
                os.kill(helper.pid, signal.SIGKILL)
        assert is_whole(received)
    assert ask(service, model=model, max_tokens=1).status == 200, "another helper renders the next one"


def test_a_runner_that_can_start_no_helper_ends(service: Service, model: str) -> None:
    """It would refuse every conversation."""
    runner = service.runners()[0]
    for one in below(runner.pid):
        os.kill(one.pid, signal.SIGKILL)
    assert ask(service, model=model, max_tokens=1).status in (200, 503), "200: the request was sent again"
    until(lambda: not is_alive(runner), "the runner ends")
    service.loaded(TINY, context_length=512)
    assert answered(service, max_tokens=1, model=TINY)["choices"]


def test_an_api_process_that_dies_ends_its_answers_in_the_runner(service: Service, model: str) -> None:
    with answering(service, MOST) as received, paused(service.runners()[0]):
        os.kill(process_of(service, "api").pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(received)

    def is_answered() -> bool:
        try:
            return ask(service, model=model, max_tokens=1).status == 200
        except httpx.TransportError:  # the next process has not begun
            return False

    until(is_answered, "the next process answers")
    until(lambda: runs(service) == 0, "no request is left")


# ---- connections


def end_of(service: Service, number: int) -> str:
    """Send a request, and return how it ended."""
    fields = {"model": TINY, "max_tokens": 1 + 50 * (number % 8), **ENDLESS}
    reply = ask(service, stream=number % 2 == 0, **fields)
    if reply.status != 200:
        return str(reply.json()["error"]["code"])
    if number % 2:
        return str(reply.json()["choices"][0]["finish_reason"])
    *parts, last = events(iter(reply.text.splitlines()))
    assert DONE not in parts
    return "length" if last == DONE else str(json.loads(last)["error"]["code"])


def test_a_channel_that_is_cut_again_and_again_ends_each_request(service: Service) -> None:
    path = next(service.data_dir.glob("worker-*.sock"))
    service.loaded(TINY, context_length=CONTEXT_LENGTH)
    with cutting(path, CUT_S) as relay:
        with ThreadPoolExecutor(N_CLIENTS) as pool:
            ends = [*pool.map(lambda number: end_of(service, number), range(N_REQUESTS))]
        assert relay.n_cut > 0
        assert set(ends) <= {"length", "runner_lost", "no_route"}, ends
        relay.spare()
        assert end_of(service, 1) == "length"
        until(lambda: runs(service) == 0, "no request is left")


def test_a_client_that_reads_a_byte_at_a_time_delays_no_other(service: Service, model: str) -> None:
    content = json.dumps(body(model=model, stream=True, **ENDLESS)).encode()
    with with_a_small_buffer(service.port) as slow:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        slow.sendall(head.encode() + content)
        for _ in range(2):
            assert slow.recv(1)
            with answering(service) as received:
                assert is_whole(received)
    until(lambda: runs(service) == 0, "its request ends with it")


# ---- descriptors


@contextmanager
def few_descriptors(process: Process) -> Iterator[None]:
    """Let a process open only SPARE more descriptors."""
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path(f"/proc/{process.pid}/fd").iterdir())
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (highest + 1 + SPARE, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


def test_an_api_process_without_descriptors_goes_on(service: Service, model: str) -> None:
    api = process_of(service, "api")
    with answering(service) as received:
        with ExitStack() as clients, few_descriptors(api):
            for _ in range(50):
                clients.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            assert is_whole(received)
        until(lambda: ask(service, model=model, max_tokens=1).status == 200, "it takes connections again")
    assert is_alive(api)


def test_a_listener_without_descriptors_passes_channels_later(service: Service) -> None:
    listener = process_of(service, "worker.listener.server")
    service.loaded(TINY, context_length=CONTEXT_LENGTH)
    with few_descriptors(listener), ExitStack() as strangers:
        path = next(service.data_dir.glob("worker-*.sock"))
        for _ in range(10):
            strangers.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        reply = ask(service, model=TINY, max_tokens=1)
        if reply.status != 200:  # there were descriptors for it
            openai_error(reply, 503, "unavailable_error", "no_route")
    until(lambda: ask(service, model=TINY, max_tokens=1).status == 200, "it takes connections again")


def test_a_worker_without_descriptors_refuses_loads_and_goes_on(service: Service, model: str) -> None:
    worker = service.worker()
    with answering(service) as received:
        with few_descriptors(worker):
            reply = service.load(TINY, context_length=512)
            assert reply.status in (200, 500, 503), reply.text
            assert is_whole(received)
        until(lambda: service.load(TINY, context_length=512).status == 200, "it loads again")
    assert is_alive(worker)
