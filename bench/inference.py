"""`python -m bench.inference [ROUNDS] [--llama-server PATH]`: answers of SmolLM2-135M over HTTP, by Loadstone and by
llama-server.

Both servers run the same llama.cpp, on the same threads, with the same context, batch, number of sequences and flash
attention.  Each round measures both, in alternating order; figures are medians over the rounds.  The report is
docs/benchmarks/inference.md with its plot; every single figure is in bench/out/inference.json.  Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import get_args

import llama_cpp  # noqa: F401  # before numpy: see bench/__init__.py
import msgspec
from matplotlib import rc_context
from matplotlib.figure import Figure
from msgspec import Struct

from bench.__main__ import DOCS, OUT, commit, keep, machine, say
from bench.answers import LLAMA_SERVER, Client, Setup, Subject, Who, client, llama_server
from bench.report import percentile, table
from bench.streams import Stream
from bench.subjects import Failure, Service, service
from cli import demo

ROUNDS = 7
AT_ONCE = (1, 4, 16)
TOKENS = 96  # of an answer
THREADS = len(os.sched_getaffinity(0))
SETUP = Setup(n_ctx=8192, n_batch=512, n_ubatch=512, parallel=16, n_threads=THREADS)
MANY, MANY_TOKENS = 64, 64  # streams at once, and tokens of each, for the CPU time of the API process
SHARED, SHARED_TOKENS = 20, 2000  # requests with one prompt of so many tokens
BESIDE, LONG_TOKENS = 4, 6000  # answers beside one long prompt
BUDGET_S = 0.1  # of a step with running requests on a CPU
REPORT, PLOT = DOCS / "benchmarks/inference.md", DOCS / "benchmarks/inference.png"
MODELS = OUT / "inference-models"
GPU = "On a GPU, with larger models: [tokens on a GPU](tokens.md)."
TOPICS = [
    *("rivers", "bridges", "trains", "clocks", "islands", "bees", "glass", "salt"),
    *("paper", "wind", "stars", "bread", "maps", "ships", "music", "mountains"),
]


class Measured(Struct, frozen=True, kw_only=True):
    """One round of one server with so many requests at once."""

    who: Who
    at_once: int
    tokens_per_s: float
    first_ms: list[float]  # to the first text of each answer
    added_ms: list[float]  # of these, beyond the time to the first token by the server's own count
    tokens: int


def body(prompt: str, tokens: int = TOKENS, **more: object) -> str:
    asked = {
        "model": demo.REAL,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "temperature": 0,
        **more,
    }
    return msgspec.json.encode(asked).decode()


def words(n: int) -> str:
    """Return a text of about `n` tokens of SmolLM2's vocabulary."""
    return " ".join(TOPICS[i * 7 % len(TOPICS)] for i in range(n))


def round_of(client: Client, subject: Subject, at_once: int, n: int, length: int = TOKENS) -> Measured:
    topics = [TOPICS[i % len(TOPICS)] for i in range(at_once)]
    prompts = [f"Write a long text about {topic} and the number {n * 100 + i}." for i, topic in enumerate(topics)]
    answers = client.streams(subject, [body(prompt, length) for prompt in prompts])
    tokens = sum(answer.tokens for answer in answers)
    started, ended = min(answer.sent_s for answer in answers), max(answer.ended_s for answer in answers)
    return Measured(
        who=subject.name,
        at_once=at_once,
        tokens_per_s=tokens / (ended - started),
        first_ms=[answer.first_ms for answer in answers],
        added_ms=[answer.first_ms - answer.own_ms for answer in answers],
        tokens=tokens,
    )


class Shared(Struct, frozen=True, kw_only=True):
    """Requests with one long prompt that arrive together."""

    prompt_tokens: int  # of one request
    decoded_tokens: int  # of all, without those that were cached
    first_ms: float  # median


class Beside(Struct, frozen=True, kw_only=True):
    """Gaps between the texts of running answers, in ms, while a long prompt is processed."""

    alone_ms: float  # the largest without it
    largest_ms: float
    p50_ms: float


def shared(client: Client, subject: Subject) -> Shared:
    prompt = words(SHARED_TOKENS)
    answers = client.streams(subject, [body(f"{prompt} {i}", 8) for i in range(SHARED)])
    counted = client.streams(subject, [body(f"{prompt} 0", 1)])[0]
    return Shared(
        prompt_tokens=counted.prompt_tokens,
        decoded_tokens=sum(answer.prompt_tokens - answer.cached_tokens for answer in answers),
        first_ms=statistics.median(answer.first_ms for answer in answers),
    )


def beside(client: Client, subject: Subject) -> Beside:
    answers = [body(f"Write a long text about {topic}.", 256) for topic in TOPICS[:BESIDE]]
    alone = gaps_ms(client.streams(subject, answers))
    with_prompt = client.streams(subject, [*answers, body(words(LONG_TOKENS), 8)])
    gaps = gaps_ms(with_prompt[:BESIDE])
    return Beside(alone_ms=max(alone), largest_ms=max(gaps), p50_ms=percentile(gaps, 0.5))


def gaps_ms(answers: list[Stream]) -> list[float]:
    return [(b - a) * 1000 for answer in answers for a, b in pairwise(answer.texts_s)]


def api_cpu_us(client: Client, subject: Subject, running_: Service) -> float:
    """Return the CPU time of the API process per token of many streams, in microseconds."""
    (pid,) = [pid for pid in children(running_.pid) if b"api" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    round_of(client, subject, MANY, 8, MANY_TOKENS)
    before = cpu_s(pid)
    tokens = sum(round_of(client, subject, MANY, 9 + i, MANY_TOKENS).tokens for i in range(3))
    return (cpu_s(pid) - before) / tokens * 1e6


def measure(rounds: int, program: Path) -> tuple[list[Measured], Shared, Beside, Beside, float]:
    say("the model")
    model = MODELS / demo.REAL_FILE
    if not model.exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        demo.fetch(demo.SMOLLM2, model)
    OUT.mkdir(exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context((OUT / "inference.log").open("w"))
        sender = stack.enter_context(client(log))
        peer = stack.enter_context(llama_server(program, model, SETUP, log))
        ours = stack.enter_context(service(MODELS, OUT, **SETUP.service_variables))
        load = SETUP.load(demo.REAL)
        _, loaded, _ = ours.post("/api/v1/models/load", {**load, "parallel": SHARED})
        subjects = [Subject("Loadstone", ours.port), peer]
        runs = []
        for n in range(rounds + 1):  # the first one warms up
            say(f"round {n} of {rounds}")
            for subject in subjects if n % 2 else reversed(subjects):
                measured = [round_of(sender, subject, at_once, n) for at_once in AT_ONCE]
                runs += measured if n else []
        say("one prompt for many, and a long prompt beside answers")
        one = shared(sender, subjects[0])
        long, other_long = (beside(sender, subject) for subject in subjects)
        say(f"{MANY} streams")
        ours.reconnect()
        ours.post("/api/v1/models/unload", {"instance_id": loaded["instance_id"]})
        ours.post("/api/v1/models/load", {**load, "parallel": MANY})
        return runs, one, long, other_long, api_cpu_us(sender, subjects[0], ours)


def children(pid: int) -> list[int]:
    """Return the processes below a process."""
    own = [int(one) for path in Path(f"/proc/{pid}/task").iterdir() for one in (path / "children").read_text().split()]
    return own + [below for one in own for below in children(one)]


def markdown(about: dict[str, str], measured: tuple[list[Measured], Shared, Beside, Beside, float]) -> str:
    runs, one, long, other_long, cpu_us = measured
    n = len(runs) // (2 * len(AT_ONCE))
    lines = ["# Answers over HTTP", "", f"Written by `make bench-inference`; medians of {n} rounds. {GPU}", ""]
    lines += [f"- {name}: {fact}" for name, fact in about.items()]
    lines += [
        f"- SmolLM2-135M-Instruct Q4_1; context {SETUP.n_ctx}, batch {SETUP.n_batch}, {SETUP.parallel} sequences and "
        f"more, {THREADS} threads, flash attention, unified KV cache; {TOKENS} tokens an answer, streamed, most "
        "probable token; llama-server without its cache of finished prompts in memory",
        "",
        "## Tokens per second",
        "",
    ]
    rows = []
    for at_once in AT_ONCE:
        ours, theirs = (median(runs, who, at_once, lambda run: run.tokens_per_s) for who in get_args(Who))
        rows.append([str(at_once), f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"])
    lines += table(["requests at once", "Loadstone", "llama-server", "ratio (goal 0.9)"], rows)
    lines += ["", f"![Tokens per second of each round]({PLOT.name})", "", "## Time to the first text, ms", ""]
    rows = []
    for at_once in AT_ONCE:
        ours, theirs = (
            median(runs, who, at_once, lambda run: statistics.median(run.first_ms)) for who in get_args(Who)
        )
        rows.append([str(at_once), f"{ours:.1f}", f"{theirs:.1f}", f"{ours - theirs:+.1f}"])
    lines += table(["requests at once", "Loadstone", "llama-server", "difference (goal +5)"], rows)
    added = statistics.median(ms for run in runs if (run.who, run.at_once) == ("Loadstone", 1) for ms in run.added_ms)
    lines += [
        "",
        f"Of the time of one request, {added:.1f} ms were added to the runner's own time to its first token, from the "
        "arrival of the prompt at its loop (goal 5).",
    ]
    lines += ["", "## Prompts", ""]
    lines += table(
        ["largest gap between two texts, ms", "Loadstone", "llama-server"],
        [
            [f"in {BESIDE} answers", f"{long.alone_ms:.0f}", f"{other_long.alone_ms:.0f}"],
            [
                f"the same beside a prompt of {LONG_TOKENS} words (goal {2 * BUDGET_S * 1000:.0f})",
                f"{long.largest_ms:.0f}",
                f"{other_long.largest_ms:.0f}",
            ],
        ],
    )
    lines += [
        "",
        f"{SHARED} requests at once with one prompt of {one.prompt_tokens} tokens: {one.decoded_tokens} tokens of "
        f"prompts were processed for all of them, and the first text came after {one.first_ms:.0f} ms (median).",
    ]
    lines += ["", f"CPU time of the API process per token of {MANY} streams: {cpu_us:.0f} us (goal 60).", ""]
    return "\n".join(lines)


def plot(runs: list[Measured], path: Path) -> None:
    """Plot the tokens per second of each round."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
        axes = figure.subplots()
        for i, who in enumerate(get_args(Who)):
            for place, at_once in enumerate(AT_ONCE):
                values = [run.tokens_per_s for run in runs if (run.who, run.at_once) == (who, at_once)]
                x = place + (i - 0.5) * 0.3
                axes.scatter([x] * len(values), values, s=10, color=f"C{i}", alpha=0.6)
                axes.hlines(statistics.median(values), x - 0.1, x + 0.1, color=f"C{i}", label="" if place else who)
        axes.set_xticks(range(len(AT_ONCE)), [str(n) for n in AT_ONCE])
        axes.set(xlabel="requests at once", ylabel="tokens per second", ylim=(0, None))
        axes.legend(frameon=False)
        figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.inference")
    parser.add_argument("rounds", type=int, nargs="?", default=ROUNDS)
    parser.add_argument("--llama-server", type=Path, default=LLAMA_SERVER)
    options = parser.parse_args()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: running processes are stopped
    about = machine() | {"commit": commit()}
    try:
        measured = measure(options.rounds, options.llama_server)
    except Failure as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    runs, *rest = measured
    keep("inference", {"machine": about, "runs": msgspec.to_builtins(runs), "rest": msgspec.to_builtins(rest)})
    plot(runs, PLOT)
    report = markdown(about, measured)
    REPORT.write_text(report)
    print(report)
    return 0


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process in seconds (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def median(runs: list[Measured], who: Who, at_once: int, of: Callable[[Measured], float]) -> float:
    return statistics.median(of(run) for run in runs if (run.who, run.at_once) == (who, at_once))


if __name__ == "__main__":
    sys.exit(main())
