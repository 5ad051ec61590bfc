"""`python -m bench.samplers TASK`: the time of a step with many sequences, sampled in each of several ways.

A process of its own, since a model is loaded in it.  TASK is a `Task` as JSON; the reply is a `Row` for each way and
number of sequences, each a line of JSON as soon as it is measured.

The ways: one sequence after the other; as many threads as the machine has cores; what the service does, which is one of
these two or in between (`worker.engine.sample.Draws`); and by the engine, as a part of its graph, on the device of the
output layer.  The samplers are the service's, with its defaults: top_k 40, top_p 0.95, min_p 0.05, temperature 0.8.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

# First: libstdc++ that comes with numpy crashes an engine whose libggml-cuda has symbols of it (seen on an H100).
import llama_cpp  # noqa: F401
import msgspec
import numpy as np
from msgspec import Struct

from bench.subjects import Failure
from shared.channel.messages import Sampling
from worker.engine.decode import FEW_THREADS, Batch, cores
from worker.engine.llama import Log, lib
from worker.engine.sample import TOKENS_OF_A_THREAD, Bias, Draw, Draws, Sampler

Way = Literal["serial", "threads", "service", "engine"]
UBATCH, BATCH = 512, 2048
ALL_LAYERS = 999
WARM = 4  # steps that are not counted
NO_TOKEN = -1  # LLAMA_TOKEN_NULL
SILENT = ctypes.cast(ctypes.CDLL(None).abs, lib.llama_log_callback)  # abs(3) of the level: no line enters Python
OF_A_THREAD: dict[Way, int] = {"serial": sys.maxsize, "threads": 1, "service": TOKENS_OF_A_THREAD}


class Task(Struct, frozen=True, kw_only=True):
    model: str  # its path
    on_gpu: bool  # all layers
    at_once: list[int]  # numbers of sequences
    prompt: int  # tokens of each sequence before the first step
    steps: int
    rounds: int = 1


class Row(Struct, frozen=True, kw_only=True):
    """Medians over the steps."""

    way: Way
    at_once: int
    threads: int  # that sample
    decode_ms: float
    sample_ms: float

    @property
    def step_ms(self) -> float:
        return self.decode_ms + self.sample_ms

    @property
    def tokens_per_s(self) -> float:
        return self.at_once / self.step_ms * 1000


def measure(task: Task) -> Iterator[Row]:
    """Measure each way in turn with so many sequences at once; a slow moment of the machine affects all of them.

    A reader that has no more time has measured everything after the first round.
    """
    log = Log()
    lib.llama_backend_init()
    if task.on_gpu and not lib.llama_supports_gpu_offload():
        raise Failure("the engine sees no GPU")
    params = lib.llama_model_default_params()
    params.n_gpu_layers = ALL_LAYERS if task.on_gpu else 0
    model = lib.llama_model_load_from_file(task.model.encode(), params)
    if not model:
        raise Failure(f"the engine cannot load {task.model}")
    for _ in range(task.rounds):
        for at_once in task.at_once:
            for way in get_args(Way):
                lib.llama_log_set(log._callback, None)
                yield row(model, task, way, at_once)
    lib.llama_model_free(model)


def row(model: Any, task: Task, way: Way, at_once: int) -> Row:
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    n_context = (task.prompt + WARM + task.steps + 1) * at_once
    samplers = [Sampler(Sampling(), [], seed, n_tokens=n_vocab, context_length=n_context) for seed in range(at_once)]
    with context_of(model, task, n_context, at_once, samplers if way == "engine" else []) as context:
        lib.llama_log_set(SILENT, None)  # it logs each token that it samples
        batch = Batch(BATCH, at_once)
        decode_prompts(context, batch, n_vocab, task.prompt, at_once)
        tokens = [1] * at_once
        choose: Callable[[list[int]], list[int]]
        if way == "engine":
            n_threads, choose = 1, by_engine(context, samplers)
        else:
            draws = Draws(context, n_vocab, OF_A_THREAD[way])
            n_threads, choose = draws.threads(at_once), by_draws(context, batch, draws, samplers, n_vocab)
        decode_s, sample_s = [], []
        for step in range(WARM + task.steps):
            batch.clear()
            places = [batch.add([token], task.prompt + step, i, n_outputs=1) for i, token in enumerate(tokens)]
            started = time.perf_counter()
            decode(context, batch)
            decoded = time.perf_counter()
            tokens = choose(places)
            decode_s.append(decoded - started)
            sample_s.append(time.perf_counter() - decoded)
    for sampler in samplers:
        sampler.close()
    return Row(
        way=way,
        at_once=at_once,
        threads=n_threads,
        decode_ms=statistics.median(decode_s[WARM:]) * 1000,
        sample_ms=statistics.median(sample_s[WARM:]) * 1000,
    )


@contextmanager
def context_of(model: Any, task: Task, n_context: int, at_once: int, samplers: list[Sampler]) -> Iterator[Any]:
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_context, BATCH, UBATCH
    params.n_seq_max = params.n_outputs_max = at_once
    params.n_outputs_max_per_seq = 1  # else the engine has room for the samplers of many tokens of a sequence
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = min(FEW_THREADS, cores()) if task.on_gpu else cores()
    configs = (lib.llama_sampler_seq_config * max(1, len(samplers)))()
    for i, sampler in enumerate(samplers):
        configs[i].seq_id, configs[i].sampler = i, ctypes.cast(sampler._chain, ctypes.c_void_p)
    params.samplers, params.n_samplers = configs, len(samplers)
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise Failure("the engine cannot create a context")
    try:
        yield context
    finally:
        lib.llama_free(context)


def decode_prompts(context: Any, batch: Batch, n_vocab: int, n: int, at_once: int) -> None:
    """Decode a prompt of its own for each sequence, of tokens without meaning."""
    for i in range(at_once):
        tokens = [(i * 7919 + place * 104_729 + 17) % n_vocab for place in range(n)]
        for start in range(0, n, BATCH):
            batch.clear()
            batch.add(tokens[start : start + BATCH], start, i, n_outputs=1)
            decode(context, batch)


def decode(context: Any, batch: Batch) -> None:
    status = lib.llama_decode(context, batch.struct())
    if status != 0:
        raise Failure(f"llama_decode failed with status {status}")
    lib.llama_synchronize(context)


def by_draws(
    context: Any, batch: Batch, draws: Draws, samplers: list[Sampler], n_vocab: int
) -> Callable[[list[int]], list[int]]:
    bias = Bias(Sampling(), np.array([], np.int32))

    def choose(places: list[int]) -> list[int]:
        address = ctypes.cast(lib.llama_get_logits(context), ctypes.c_void_p).value
        assert address
        data = (ctypes.c_float * (batch.n_outputs * n_vocab)).from_address(address)
        rows = np.ctypeslib.as_array(data).reshape(batch.n_outputs, n_vocab)
        drawn = [
            Draw(row=row, index=place, samplers=[sampler], bias=bias, logprobs=None, constrained=None)
            for row, place, sampler in zip(rows, places, samplers, strict=True)
        ]
        draws.run(drawn)
        return [draw.tokens[0] for draw in drawn]

    return choose


def by_engine(context: Any, samplers: list[Sampler]) -> Callable[[list[int]], list[int]]:
    def choose(places: list[int]) -> list[int]:
        if lib.llama_get_sampled_token_ith(context, places[0]) == NO_TOKEN:
            raise Failure("the engine did not sample")
        return [
            lib.llama_sampler_sample(sampler._chain, context, place)
            for sampler, place in zip(samplers, places, strict=True)
        ]

    return choose


def main() -> int:
    task = msgspec.json.decode(sys.argv[1], type=Task)
    try:
        for measured in measure(task):
            print(msgspec.json.encode(measured).decode(), flush=True)
    except Failure as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
