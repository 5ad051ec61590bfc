"""Compute figures from the rows of `bench.tokens`, and render them as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from msgspec import Struct

from bench import samplers
from bench.answers import Who
from bench.report import table
from bench.samplers import Way
from shared.schema.http import KVCacheType
from worker.engine.loop import CPU_STEP_S, GPU_STEP_S

Part = Literal["answers", "samplers", "prompts"]
FEW, FEW_GOAL = 8, 0.95  # requests at once up to this number, and llama-server's tokens per second that are the goal
MANY, MANY_GOAL, LARGE = 32, 1.5, 100_000  # the same from this number on, with a vocabulary of so many tokens
ADDED_GOAL_MS = 5
NONE = "not measured"


class Kind(Struct, frozen=True, kw_only=True):
    """A model."""

    name: str
    vocabulary: int
    tokenizer: Literal["spm", "bpe"]
    quantization: Literal["Q8_0", "Q4_0"]


class Answered(Struct, frozen=True, kw_only=True, tag="answered"):
    """One round of answers of one server, so many at once."""

    kind: str
    who: Who
    at_once: int
    round: int
    tokens: int
    tokens_per_s: float  # with the prompts
    step_ms: float  # between two tokens of an answer, median
    first_ms: float  # to the first text, median
    added_ms: float  # of these, beyond the time to the first token by the server's own count


class Sampled(Struct, frozen=True, kw_only=True, tag="sampled"):
    kind: str
    row: samplers.Row


class Prompted(Struct, frozen=True, kw_only=True, tag="prompted"):
    """One configuration of Loadstone."""

    kind: str
    n_ubatch: int
    flash_attention: bool
    kv_type: KVCacheType
    prompt_tokens: int = 0
    prompt_tokens_per_s: float = 0.0
    tokens_per_s: dict[str, float] = {}  # by the number of answers at once
    gap_ms: float = 0.0  # the largest between two texts of an answer, beside a prompt of twice the length
    failure: str = ""  # why nothing was measured


Row = Answered | Sampled | Prompted


class Measured(Struct, kw_only=True):
    part: Part
    about: dict[str, str]
    on_gpu: bool
    kinds: list[Kind]
    rows: list[Row]
    failure: str = ""  # why the part ended early

    def named(self, kind: Kind) -> list[Row]:
        return [row for row in self.rows if row.kind == kind.name]


def goal(kind: Kind, at_once: int) -> float | None:
    """Return the goal for Loadstone's tokens per second on a GPU, as a multiple of llama-server's."""
    if at_once <= FEW:
        return FEW_GOAL
    return MANY_GOAL if at_once >= MANY and kind.vocabulary >= LARGE else None


def ratios(rows: Iterable[Answered], at_once: int) -> list[float]:
    """Return Loadstone's tokens per second as multiples of llama-server's, for each round that has both."""
    found = {(row.round, row.who): row.tokens_per_s for row in rows if row.at_once == at_once}
    numbers = sorted({n for n, _ in found if all((n, who) in found for who in get_args(Who))})
    return [found[n, "Loadstone"] / found[n, "llama-server"] for n in numbers]


def markdown(measured: Measured) -> str:
    title, section = {
        "answers": ("Tokens per second over HTTP", _answers),
        "samplers": ("Ways to sample", _samplers),
        "prompts": ("Prompts and configurations", _prompts),
    }[measured.part]
    where = " --gpu" if measured.on_gpu else ""
    lines = [f"# {title}", "", f"Written by `python -m bench.tokens {measured.part}{where}`.", ""]
    lines += [f"- {name}: {fact}" for name, fact in measured.about.items()]
    if measured.failure:
        lines += ["", f"The part ended early: {measured.failure}"]
    for kind in measured.kinds:
        heading = f"A vocabulary of {kind.vocabulary:,} tokens, {kind.quantization}"
        lines += ["", f"## {heading}", "", *section(measured, kind)]
    return "\n".join(lines) + "\n"


def _answers(measured: Measured, kind: Kind) -> list[str]:
    rows = [row for row in measured.named(kind) if isinstance(row, Answered)]
    if not rows:
        return [NONE]

    def figures(at_once: int, of: Callable[[Answered], float], form: str) -> list[str]:
        """Return the medians of both servers."""
        values = [[of(row) for row in rows if (row.who, row.at_once) == (who, at_once)] for who in get_args(Who)]
        return [format(statistics.median(each), form) if each else NONE for each in values]

    cells = []
    for at_once in sorted({row.at_once for row in rows}):
        found, wanted = ratios(rows, at_once), goal(kind, at_once)
        spread = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else NONE
        cells.append(
            [
                str(at_once),
                *figures(at_once, lambda row: row.tokens_per_s, ".0f"),
                spread,
                "" if wanted is None else f"{wanted:.2f}",
                *figures(at_once, lambda row: row.step_ms, ".2f"),
                *figures(at_once, lambda row: row.first_ms, ".0f"),
                figures(at_once, lambda row: row.added_ms, ".1f")[0],
            ]
        )
    head = ["at once", "Loadstone, tokens/s", "llama-server, tokens/s", "ratio, median and range", "goal on a GPU"]
    head += ["Loadstone, ms a step", "llama-server, ms a step", "Loadstone, first text, ms"]
    return [
        f"Medians of up to {max(row.round for row in rows)} rounds; top_k 40, top_p 0.95, min_p 0.05, temperature 0.8.",
        "",
        *table([*head, "llama-server, first text, ms", f"Loadstone, added, ms (goal {ADDED_GOAL_MS})"], cells),
        "",
        "Added is what the time to the first text is beyond the runner's own time to the first token.",
    ]


def _samplers(measured: Measured, kind: Kind) -> list[str]:
    rows = [row.row for row in measured.named(kind) if isinstance(row, Sampled)]
    if not rows:
        return [NONE]
    cells = []
    for at_once in sorted({row.at_once for row in rows}):
        by_way = {way: medians([row for row in rows if (row.way, row.at_once) == (way, at_once)]) for way in WAYS}
        found = {way: row for way, row in by_way.items() if row is not None}
        cells.append([str(at_once), *(_step(by_way[way]) for way in WAYS), verdict(found)])
    return [
        "Milliseconds of a step: decoding + sampling = all, in so many threads.",
        "",
        *table(["sequences", *WAYS, "the service's choice"], cells),
    ]


WAYS: tuple[Way, ...] = get_args(Way)


def medians(rows: list[samplers.Row]) -> samplers.Row | None:
    """Return the medians over the rounds of one way."""
    if not rows:
        return None
    return samplers.Row(
        way=rows[0].way,
        at_once=rows[0].at_once,
        threads=rows[0].threads,
        decode_ms=statistics.median(row.decode_ms for row in rows),
        sample_ms=statistics.median(row.sample_ms for row in rows),
    )


def verdict(rows: dict[Way, samplers.Row]) -> str:
    """Compare a step as the service samples with the quickest other way."""
    others = [row for way, row in rows.items() if way != "service"]
    if "service" not in rows or not others:
        return NONE
    best = min(others, key=lambda row: row.step_ms)
    return f"{rows['service'].step_ms / best.step_ms:.2f} of {best.way}, the quickest other way"


def _step(row: samplers.Row | None) -> str:
    if row is None:
        return NONE
    return f"{row.decode_ms:.2f} + {row.sample_ms:.2f} = {row.step_ms:.2f} ({row.threads})"


def _prompts(measured: Measured, kind: Kind) -> list[str]:
    rows = [row for row in measured.named(kind) if isinstance(row, Prompted)]
    if not rows:
        return [NONE]
    counts = sorted({n for row in rows for n in row.tokens_per_s}, key=int)
    cells = []
    for row in rows:
        setting = [str(row.n_ubatch), "on" if row.flash_attention else "off", row.kv_type]
        if row.failure:
            cells.append([*setting, f"failed: {' '.join(row.failure.split())}", *("" for _ in counts), ""])
        else:
            rates = [f"{row.tokens_per_s[n]:.0f}" if n in row.tokens_per_s else NONE for n in counts]
            cells.append([*setting, f"{row.prompt_tokens_per_s:.0f}", *rates, f"{row.gap_ms:.0f}"])
    n_tokens = max(row.prompt_tokens for row in rows)
    step_s = GPU_STEP_S if measured.on_gpu else CPU_STEP_S
    head = ["physical batch", "flash attention", "KV cache", "prompt tokens/s"]
    return [
        f"Prompts of {n_tokens:,} tokens, one after the other; answers at once; the largest gap between two texts of "
        f"one of 4 answers, beside a prompt of {2 * n_tokens:,} tokens.",
        "",
        *table([*head, *(f"tokens/s, {n}" for n in counts), f"gap, ms (goal {2 * step_s * 1000:.0f})"], cells),
    ]
