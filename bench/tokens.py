"""`python -m bench.tokens [PART]... [--gpu]`: tokens per second of models of a realistic size with random weights.

One model has a vocabulary of 150,000 tokens (Q4_0), the other one of 32,000 (Q8_0).  The parts:

- `answers`: streamed over HTTP, 1 to 64 at once, by Loadstone and by llama-server, set alike;
- `samplers`: one step with 1 to 64 sequences, sampled in several ways: see `bench.samplers`;
- `prompts`: prompts and answers of Loadstone with several physical batches, KV caches, and flash attention on and off.

Without a PART, all of them, in less than nine minutes; each takes the whole time if it is measured alone.  What was not
measured in time is absent.  Each part leaves PART.md and PART.json in a directory, which are written anew after each
row: a run that is ended from outside keeps what it has.  `--tiny` tries everything with tiny models.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, assert_never

import msgspec
import pynvml

from bench import samplers, tokens_report
from bench.__main__ import OUT, commit, machine, say
from bench.answers import LLAMA_SERVER, Client, Setup, Subject, client, gpus, llama_server, look_at
from bench.subjects import Failure, Service, running, service
from bench.tokens_report import Answered, Kind, Measured, Part, Prompted, Row, Sampled
from cli import devredis
from shared.files import replace_atomically
from shared.synthetic import architectures, tokenizers
from shared.synthetic import models as synthetic
from worker.engine.decode import FEW_THREADS, cores

T = TypeVar("T")

KINDS = [  # the more interesting one first
    Kind(name="150k", vocabulary=151_936, tokenizer="bpe", quantization="Q4_0"),
    Kind(name="32k", vocabulary=32_000, tokenizer="spm", quantization="Q8_0"),
]
GB = 4.0
AT_ONCE = [1, 8, 32, 64]
ROUNDS, WARM_TOKENS = 5, 8
TOKENS, PROMPT = 256, 64  # of an answer, and of the prompt before it
LONG, LONG_PROMPTS = 4096, 3  # tokens of a prompt of the part `prompts`, and how many of these are measured
MANY, BESIDE = 32, 4  # answers at once in the part `prompts`, and beside a prompt of twice the length
STEPS = 100
SECONDS = 450.0  # after which nothing begins
SHARES: dict[Part, int] = {"answers": 5, "samplers": 2, "prompts": 3}  # of the time
N_BATCH, N_UBATCH, N_UBATCHES = 2048, 512, (512, 1024, 2048)
CELLS = 256  # llama.cpp rounds the context up to a multiple
COMPLETIONS = "/v1/completions"
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}  # the defaults of both


class Options(msgspec.Struct, frozen=True, kw_only=True):
    parts: list[Part]
    on_gpu: bool
    is_tiny: bool
    gb: float
    at_once: list[int]
    rounds: int
    tokens: int
    long: int
    seconds: float
    program: Path  # llama-server
    out: Path
    models: Path

    def setup(self, n_ctx: int, **more: Any) -> Setup:
        n_threads = min(FEW_THREADS, cores()) if self.on_gpu else cores()
        context = -(-n_ctx // CELLS) * CELLS
        fields = {"n_batch": min(N_BATCH, context), "n_ubatch": min(N_UBATCH, context)} | more
        return Setup(n_ctx=context, n_threads=n_threads, on_gpu=self.on_gpu, **fields)


def options_of(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m bench.tokens")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(SHARES)}; default: all")
    parser.add_argument("--gpu", action="store_true", help="put all layers on the first GPU; default: the CPU alone")
    parser.add_argument("--tiny", action="store_true", help="try everything in short, with models of a few layers")
    parser.add_argument("--gb", type=float, default=GB, help="size of each model, in GB")
    parser.add_argument("--at-once", type=int, nargs="+", default=AT_ONCE, help="numbers of requests or sequences")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin nothing after so many seconds")
    parser.add_argument("--llama-server", type=Path, default=LLAMA_SERVER, help="its path, if it was built elsewhere")
    parser.add_argument("--out", type=Path, default=OUT / "tokens", help="directory for the reports")
    parser.add_argument("--models", type=Path, default=OUT / "tokens-models", help="directory for the models")
    given = parser.parse_args(argv)
    if unknown := set(given.parts) - SHARES.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return Options(
        parts=[part for part in SHARES if part in given.parts or not given.parts],
        on_gpu=given.gpu,
        is_tiny=given.tiny,
        gb=given.gb,
        at_once=sorted(set(given.at_once)),
        rounds=given.rounds or (1 if given.tiny else ROUNDS),
        tokens=16 if given.tiny else TOKENS,
        long=256 if given.tiny else LONG,
        seconds=given.seconds,
        program=given.llama_server,
        out=given.out.absolute(),
        models=given.models.absolute(),
    )


# ---- the parts


def answers(options: Options, until: float) -> Generator[Answered]:
    """Measure both servers in turn, started anew for each number of requests: a full cache costs each step time."""
    turns = list(itertools.product(KINDS, options.at_once))
    for (kind, at_once), end in shared_out(turns, until):
        setup = options.setup(at_once * (PROMPT + options.tokens + 1), parallel=at_once)
        with ExitStack() as stack:
            say(f"{kind.name}, {at_once} at once")
            sender, subjects = started(stack, options, kind, setup)
            for n in range(options.rounds + 1):  # the first one warms up
                if time.monotonic() > end:
                    break
                for subject in subjects if n % 2 else reversed(subjects):
                    row = answered(sender, subject, options, kind, at_once, n, key_of(kind, options))
                    say(f"{kind.name}, {at_once} at once, round {n}, {row.who}: {row.tokens_per_s:.0f} tokens/s")
                    if n:
                        yield row


def started(stack: ExitStack, options: Options, kind: Kind, setup: Setup) -> tuple[Client, list[Subject]]:
    """Start the client, Loadstone and, if it can be had, llama-server, both with the model."""
    model = written(kind, options)
    log = stack.enter_context((options.out / "answers.log").open("a"))
    sender = stack.enter_context(client(log))
    ours = stack.enter_context(service(options.models, options.out, **setup.service_variables))
    _, loaded, _ = ours.post("/api/v1/models/load", setup.load(key_of(kind, options)))
    setup.check(loaded)
    subjects = [Subject("Loadstone", ours.port)]
    try:
        look_at(options.program, on_gpu=options.on_gpu)
        subjects.append(stack.enter_context(llama_server(options.program, model, setup, log)))
    except Failure as e:
        say(f"Loadstone alone is measured: {e}")
    return sender, subjects


def answered(
    sender: Client, subject: Subject, options: Options, kind: Kind, at_once: int, n: int, model: str
) -> Answered:
    n_tokens = options.tokens if n else WARM_TOKENS
    bodies = [body(model, prompt_of(PROMPT, n * 1000 + i), n_tokens) for i in range(at_once)]
    streams = sender.streams(subject, bodies, COMPLETIONS)
    seconds = max(stream.ended_s for stream in streams) - min(stream.sent_s for stream in streams)
    steps = [stream.step_ms for stream in streams if stream.step_ms]
    return Answered(
        kind=kind.name,
        who=subject.name,
        at_once=at_once,
        round=n,
        tokens=sum(stream.tokens for stream in streams),
        tokens_per_s=sum(stream.tokens for stream in streams) / seconds,
        step_ms=statistics.median(steps) if steps else 0.0,
        first_ms=statistics.median(stream.first_ms for stream in streams),
        added_ms=statistics.median(stream.first_ms - stream.own_ms for stream in streams),
    )


def sampled(options: Options, until: float) -> Generator[Sampled]:
    for kind, end in shared_out(KINDS, until):
        task = samplers.Task(
            model=str(written(kind, options)),
            on_gpu=options.on_gpu,
            at_once=options.at_once,
            prompt=PROMPT,
            steps=8 if options.is_tiny else STEPS,
            rounds=options.rounds,
        )
        argv = [sys.executable, "-m", "bench.samplers", msgspec.json.encode(task).decode()]
        log_path = options.out / "samplers.log"
        say(f"{kind.name}: ways to sample")
        with log_path.open("a") as log, running(argv, log, gpus(options.on_gpu)) as process:
            assert process.stdout
            for line in process.stdout:
                row = msgspec.json.decode(line, type=samplers.Row)
                say(f"{kind.name}, {row.at_once} at once, {row.way}: {row.step_ms:.2f} ms a step")
                yield Sampled(kind=kind.name, row=row)
                if time.monotonic() > end:
                    break
            else:
                if process.wait():
                    raise Failure(f"bench.samplers failed with status {process.returncode}; see {log_path}")


def prompted(options: Options, until: float) -> Generator[Prompted]:
    """Measure each configuration with the service; one that fails is a row with the reason."""
    few, many = min(options.at_once), min(max(options.at_once), MANY)
    n_ctx = max(N_BATCH, 2 * options.long + BESIDE * (PROMPT + options.tokens), many * (PROMPT + options.tokens + 1))
    setups = [options.setup(n_ctx, parallel=max(many, BESIDE + 1), **fields) for fields in configurations()]
    for kind, end in shared_out(KINDS, until):
        written(kind, options)
        with ExitStack() as stack:
            log = stack.enter_context((options.out / "prompts.log").open("a"))
            sender = stack.enter_context(client(log))
            ours = stack.enter_context(service(options.models, options.out, **setups[0].service_variables))
            for setup in setups:
                say(f"{kind.name}, {setup.n_ubatch}, {setup.kv_type}, flash attention {setup.flash_attention}")
                yield configured(sender, ours, options, kind, setup, [few, many])
                if time.monotonic() > end:
                    break


def configured(
    sender: Client, ours: Service, options: Options, kind: Kind, setup: Setup, at_once: list[int]
) -> Prompted:
    row = Prompted(
        kind=kind.name, n_ubatch=setup.n_ubatch, flash_attention=setup.flash_attention, kv_type=setup.kv_type
    )
    subject = Subject("Loadstone", ours.port)
    ours.reconnect()
    try:
        _, loaded, _ = ours.post("/api/v1/models/load", setup.load(key_of(kind, options)))
        model = loaded["instance_id"]
        try:
            setup.check(loaded)
            rates = [prompt_rate(sender, subject, model, options.long, n) for n in range(1 + LONG_PROMPTS)]
            answers = {n: answered(sender, subject, options, kind, n, 1, model) for n in at_once}
            gap_ms = largest_gap_ms(sender, subject, model, options)
        finally:
            ours.reconnect()
            ours.post("/api/v1/models/unload", {"instance_id": model})
    except Failure as e:
        return msgspec.structs.replace(row, failure=str(e))
    return msgspec.structs.replace(
        row,
        prompt_tokens=options.long,
        prompt_tokens_per_s=statistics.median(rates[1:]),
        tokens_per_s={str(n): answer.tokens_per_s for n, answer in answers.items()},
        gap_ms=gap_ms,
    )


def configurations() -> Iterator[dict[str, object]]:
    """Return what the part `prompts` compares.  A quantized cache needs flash attention."""
    for n_ubatch, (flash_attention, kv_type) in itertools.product(
        N_UBATCHES, [(True, "f16"), (False, "f16"), (True, "q8_0")]
    ):
        yield {"n_ubatch": n_ubatch, "flash_attention": flash_attention, "kv_type": kv_type}


def prompt_rate(sender: Client, subject: Subject, model: str, length: int, n: int) -> float:
    """Return the tokens per second of a long prompt that begins as no other one."""
    (stream,) = sender.streams(subject, [body(model, prompt_of(length, 100 + n), 1)], COMPLETIONS)
    return (stream.prompt_tokens - stream.cached_tokens) / stream.own_ms * 1000


def largest_gap_ms(sender: Client, subject: Subject, model: str, options: Options) -> float:
    """Return the largest gap between two texts of answers that run while a long prompt is processed."""
    bodies = [body(model, prompt_of(PROMPT, 200 + i), options.tokens) for i in range(BESIDE)]
    bodies.append(body(model, prompt_of(2 * options.long, 300), 1))
    *answers, _ = sender.streams(subject, bodies, COMPLETIONS)
    return max(((b - a) * 1000 for answer in answers for a, b in itertools.pairwise(answer.texts_s)), default=0.0)


def body(model: str, prompt: list[int], max_tokens: int) -> str:
    asked = {
        "model": model,
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": max_tokens,
        **SAMPLING,
    }
    return msgspec.json.encode(asked).decode()


def prompt_of(n: int, number: int) -> list[int]:
    """Return a prompt of `n` tokens without meaning, of each vocabulary; no two numbers have one beginning."""
    least = min(kind.vocabulary for kind in KINDS)
    return [(number * 7919 + i * 104_729 + 17) % least for i in range(n)]


# ---- models and time


def key_of(kind: Kind, options: Options) -> str:
    size = "tiny" if options.is_tiny else f"{options.gb:g}gb"
    return f"loadstone/bench-tokens-{kind.name}-{size}"


def written(kind: Kind, options: Options) -> Path:
    """Write a model, unless an earlier run has: a file is complete, since writing is atomic."""
    key = key_of(kind, options)
    path = options.models / key / f"{key.rpartition('/')[2]}-{kind.quantization}.gguf"
    if path.is_file():
        return path
    say(f"the model {key}")
    if options.is_tiny:
        words = tokenizers.spm(kind.vocabulary) if kind.tokenizer == "spm" else tokenizers.bpe(kind.vocabulary)
        shape = replace(architectures.TINY, context_length=1 << 17)
        synthetic.dense(path, architectures.decoder(shape, words, kind.quantization))
    else:
        synthetic.big(
            path,
            options.gb,
            kind.quantization,
            vocabulary=kind.vocabulary,
            tokenizer=kind.tokenizer,
            context_length=1 << 17,
        )
    return path


def shared_out(
    items: Sequence[T], until: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[T, float]]:
    """Yield each item with the time at which it ends: an equal part of what is left."""
    for i, item in enumerate(items):
        now = clock()
        yield item, now + (until - now) / (len(items) - i)


def about(options: Options) -> dict[str, str]:
    facts = machine() | {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit()}
    facts["models"] = (
        "of a few layers, to try the program" if options.is_tiny else f"llama, {options.gb:g} GB, random weights"
    )
    try:
        facts["llama-server"] = look_at(options.program, on_gpu=options.on_gpu)
    except Failure as e:
        facts["llama-server"] = str(e)
    if options.on_gpu:
        try:
            pynvml.nvmlInit()
            name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
            facts["GPU"] = f"{name}, driver {pynvml.nvmlSystemGetDriverVersion()}; all layers"
        except pynvml.NVMLError as e:
            raise Failure(f"there is no GPU: {e}") from e
    return facts


def rows_of(part: Part, options: Options, until: float) -> Generator[Row]:
    match part:
        case "answers":
            return answers(options, until)
        case "samplers":
            return sampled(options, until)
        case "prompts":
            return prompted(options, until)
        case _:
            assert_never(part)


def measure(part: Part, options: Options, facts: dict[str, str], seconds: float) -> bool:
    """Measure a part and write its report after each row.  Returns whether it ended as it should.

    What makes one part end early, a reply without figures included, does not end the others.
    """
    measured = Measured(part=part, about=facts, on_gpu=options.on_gpu, kinds=KINDS, rows=[])
    try:
        with closing(rows_of(part, options, time.monotonic() + seconds)) as rows:
            for row in rows:
                measured.rows.append(row)
                keep(measured, options)
    except (Failure, devredis.RedisUnavailable, OSError, ArithmeticError, LookupError, ValueError) as e:
        traceback.print_exc()
        measured.failure = f"{type(e).__name__}: {e}"
    print(keep(measured, options))
    return not measured.failure


def keep(measured: Measured, options: Options) -> str:
    """Write the reports; return that in Markdown."""
    report = tokens_report.markdown(measured)
    replace_atomically(options.out / f"{measured.part}.md", report.encode(), is_durable=False)
    figures = msgspec.json.format(msgspec.json.encode(measured))
    replace_atomically(options.out / f"{measured.part}.json", figures, is_durable=False)
    return report


def main() -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: running processes are stopped
    options = options_of(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.seconds
    try:
        facts = about(options)
        done = [
            measure(part, options, facts, seconds_of(part, options.parts, until - time.monotonic()))
            for part in options.parts
        ]
    except (Failure, devredis.RedisUnavailable) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if all(done) else 1


def seconds_of(part: Part, parts: list[Part], left_s: float) -> float:
    """Return the part's share of the time that is left for it and the parts after it."""
    return left_s * SHARES[part] / sum(SHARES[each] for each in parts[parts.index(part) :])


if __name__ == "__main__":
    sys.exit(main())
