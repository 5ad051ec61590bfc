"""A GPU whose memory other programs take while an instance on it computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import DONE, ENDLESS, answered, ask, begun, rest, streaming
from tests.support.fakehosts import FakeHost
from tests.support.service import STATUS, Service, is_alive, openai_error, until, up

GIB = 1 << 30
ROW_BYTES = 64 << 10
GPU = "GPU-fake-0"
VICTIM, OTHER = "p/victim", "p/other"
CONTEXT_LENGTH = 16_384
MANY = 1_000  # tokens of an answer
SHORT, LONG = "Hello", "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> FakeHost:
    host = FakeHost.made(tmp_path_factory.mktemp("host") / "h", GIB)
    host.driver(row_bytes=ROW_BYTES)
    return host


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, host: FakeHost) -> Iterator[Service]:
    models: Path = tmp_path_factory.mktemp("m")
    for key in (VICTIM, OTHER):
        synthetic.tiny_llama(models / key / "m.gguf", metadata={"llama.context_length": CONTEXT_LENGTH})
    with up(tmp_path_factory.mktemp("s"), models=models, LOADSTONE_JIT="off", **host.environ()) as service:
        yield service


def says(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_memory_that_runs_out_in_a_batch_ends_one_instance(service: Service, host: FakeHost) -> None:
    """CUDA takes memory for intermediate results while a batch is computed, and llama.cpp aborts if there is none."""
    job_id = service.accepted(VICTIM, context_length=CONTEXT_LENGTH)["job_id"]
    assert service.job(job_id, 60)["status"] == "loaded"
    (runner,) = [one for one in service.runners() if one.pid in {holder.pid for holder in host.holders(GPU)}]
    service.loaded(OTHER, context_length=CONTEXT_LENGTH)
    expected = answered(service, model=OTHER, max_tokens=8, messages=says(SHORT))["choices"]
    with (
        streaming(service, model=OTHER, max_tokens=MANY, **ENDLESS) as unharmed,
        streaming(service, model=VICTIM, max_tokens=MANY, **ENDLESS) as harmed,
    ):
        begun(unharmed)
        begun(harmed)
        host.take(GPU, host.free_bytes(GPU))
        refused = ask(service, model=VICTIM, max_tokens=1, messages=says(LONG))
        openai_error(refused, 503, "unavailable_error", "runner_lost")
        assert rest(harmed)["code"] == "runner_lost"
        *_, last = unharmed
        assert last == DONE, "the other instance answers to the end"
    assert "CUDA error: out of memory" in service.send("GET", f"{STATUS}/{job_id}/logs").text
    assert 'code=insufficient_memory reason="Failed to load LLM' in service.stderr
    until(lambda: service.instances().keys() == {OTHER}, "the instance has failed")
    assert not is_alive(runner)
    assert answered(service, model=OTHER, max_tokens=8, messages=says(SHORT))["choices"] == expected
    host.release(GPU)
    service.loaded(VICTIM, context_length=CONTEXT_LENGTH)
    assert answered(service, model=VICTIM, max_tokens=1, messages=says(LONG))["usage"]["completion_tokens"] == 1
