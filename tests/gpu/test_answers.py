"""Answers of a model on a real GPU: they are those of the CPU, and what goes wrong costs one request or one load."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import pytest

from tests.gpu.conftest import BIG, LONG, LONG_TOKENS, MIDDLE, TINY
from tests.gpu.gpus import MIB
from tests.gpu.watched import LOAD_S, Watched
from tests.support.chat import ENDLESS, answered, ask, streaming
from tests.support.service import meanwhile, until
from worker.runner.failure import MEMORY

COMPLETIONS = "/v1/completions"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
CLOSE, CLOSE_QUANTIZED = 0.05, 0.5  # of a log probability: other kernels, and another type of the KV cache
SLACK_BYTES = 32 * MIB  # memory of the driver itself, which varies
SOME_BYTES = 512 * MIB  # less than the weights, or the KV cache, of a model of these tests
ON_CPU = {"gpu": {"devices": ["CPU"]}}


def logprobs(watched: Watched) -> list[float]:
    """Return the log probabilities of the tokens of a prompt, as the only loaded model has them."""
    fields = {"prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 0}
    reply = watched.service.post(COMPLETIONS, fields)
    assert reply.status == 200, reply.text
    first, *others = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert first is None
    return [*map(float, others)]


def greedy(watched: Watched) -> str:
    """Return the most probable answer of the only loaded model."""
    text: str = answered(watched.service, max_tokens=16)["choices"][0]["message"]["content"]
    return text


# ---- the same answers


def test_answers_are_those_of_the_cpu(watched: Watched, gpu: str) -> None:
    with watched.loaded(TINY, **ON_CPU):
        expected, text = logprobs(watched), greedy(watched)
    with watched.loaded(TINY, gpu={"devices": [gpu]}) as loaded:
        assert loaded.job["devices"] == [gpu]
        assert logprobs(watched) == pytest.approx(expected, abs=CLOSE)
        assert greedy(watched) == text


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_quantized_kv_cache_is_that_of_the_cpu(watched: Watched, gpu: str, kind: str) -> None:
    fields = {"flash_attention": True, "kv_cache_type": kind}
    with watched.loaded(BIG, **fields, **ON_CPU):
        expected = logprobs(watched)
    with watched.loaded(BIG, **fields, gpu={"devices": [gpu]}) as loaded:
        assert loaded.config["kv_cache_type"] == kind
        assert logprobs(watched) == pytest.approx(expected, abs=CLOSE_QUANTIZED)


def test_a_prefix_is_processed_once(watched: Watched, gpu: str) -> None:
    with watched.loaded(TINY, gpu={"devices": [gpu]}):
        first, second = (
            answered(watched.service, messages=[{"role": "user", "content": PROMPT}], max_tokens=16) for _ in range(2)
        )
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"] // 2
    assert second["choices"][0]["message"] == first["choices"][0]["message"]


def test_a_client_that_leaves_frees_the_gpu_for_others(watched: Watched, gpu: str) -> None:
    with watched.loaded(TINY, gpu={"devices": [gpu]}):
        text = greedy(watched)
        with streaming(watched.service, **ENDLESS) as events:
            next(events)
            until(lambda: watched.service.metric("requests_running", instance=TINY) == 1, "the request is counted")
        until(lambda: watched.service.metric("requests_running", instance=TINY) == 0, "the request ends")
        assert greedy(watched) == text


# ---- memory that somebody else takes


@pytest.mark.parametrize(
    ("model", "fields", "fits"),
    [(BIG, {}, []), (LONG, {"context_length": LONG_TOKENS}, ["weights_bytes"])],
    ids=["weights", "KV cache"],
)
def test_a_gpu_taken_after_the_estimate_costs_only_the_load(
    watched: Watched, gpu: str, context_bytes: int, model: str, fields: dict[str, Any], fits: list[str]
) -> None:
    """The other program takes the memory while the load is under way: the estimate had said that it fits.  There is
    room for a part of what the engine allocates one after the other."""
    load_fields = {"gpu": {"devices": [gpu], "offload": "max"}, **fields}
    estimate = watched.estimated(model, **load_fields)[gpu]
    left_bytes = SOME_BYTES + sum(estimate[part] for part in fits)
    before = watched.at_rest(0)[gpu]
    with ExitStack() as slow:
        slow.enter_context(watched.service.frozen())
        with meanwhile(watched.load, model, **load_fields) as load:
            until(lambda: watched.service.state(model) == "loading" or load.done(), "the load is under way")
            free_bytes = watched.gpus.total_bytes(gpu) - watched.gpus.used_bytes(gpu) - context_bytes
            with watched.gpus.occupied(gpu, free_bytes - left_bytes):
                slow.close()
                job: Any = load.result(LOAD_S)
    assert job["status"] == "failed", f"{left_bytes:,} bytes are left"
    assert (job["error"]["type"], job["error"]["code"]) == ("model_load_failed", "insufficient_memory")
    assert job["error"]["detail"]["needed_bytes"] > SOME_BYTES
    assert gpu in job["error"]["message"]
    assert watched.at_rest(0)[gpu] <= before + SLACK_BYTES
    with watched.loaded(model, **load_fields) as loaded:
        assert loaded.job["devices"] == [gpu]


def test_memory_that_runs_out_in_a_batch_ends_one_instance(watched: Watched, gpu: str) -> None:
    """A long prompt without flash attention needs memory beyond the engine's buffers: cuBLAS's workspace, and matrices
    that the engine converts for it.  On a real GPU llama.cpp aborts without it."""
    service = watched.service
    where = {"devices": [gpu], "offload": "max"}
    fields = {"gpu": where, "context_length": 2048, "flash_attention": False}
    before = watched.at_rest(0)[gpu]
    other = watched.load(TINY, **ON_CPU)["instance_id"]
    expected = answered(service, model=other, max_tokens=16)["choices"]
    job = watched.load(MIDDLE, **fields)
    assert job["status"] == "loaded", job["error"]
    with watched.gpus.occupied(gpu, None):
        reply = ask(service, model=job["instance_id"], max_tokens=1, messages=[{"role": "user", "content": PROMPT}])
        assert reply.status == 503, reply.text
        assert reply.json()["error"]["code"] in ("runner_lost", "insufficient_memory"), "the second: loaded once more"
        until(lambda: service.instances().keys() == {other}, "the instance has failed")
        assert answered(service, model=other, max_tokens=16)["choices"] == expected
    assert MEMORY.search(watched.engine_log(job))
    assert service.unload(other).status == 200
    assert watched.at_rest(0)[gpu] <= before + SLACK_BYTES
    with watched.loaded(MIDDLE, **fields):
        reply = ask(service, max_tokens=1, messages=[{"role": "user", "content": PROMPT}])
        assert reply.status == 200, reply.text


@pytest.mark.cycles
@pytest.mark.timeout(3600)
def test_loads_and_answers_leave_no_memory_behind(watched: Watched, gpu: str, cycles: int, figures: list[str]) -> None:
    before = watched.at_rest(0)[gpu]
    began = time.monotonic()
    for _ in range(cycles):
        job = watched.load(TINY, gpu={"devices": [gpu]})
        assert job["status"] == "loaded", job["error"]
        assert greedy(watched)
        assert watched.service.unload(job["instance_id"]).status == 200
    cycle_s = (time.monotonic() - began) / cycles
    after = watched.at_rest(0)[gpu]
    figures.append(f"{cycles} loads, answers and unloads: {cycle_s:.2f} s each, {after - before:+,} bytes of the GPU")
    assert after <= before + SLACK_BYTES
    assert watched.seen()[gpu]["leaked_bytes"] <= SLACK_BYTES
