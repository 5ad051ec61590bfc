"""Render the comparison as Markdown."""

from __future__ import annotations

from bench.peers.figures import CACHES, Cache, Figure, Measured, goals, ready, token, without_warmup
from bench.report import table

NOTES = """\
Ready is the time from the request (or from the start of the process, for subjects that need a fresh one) until the
subject reports that the model is ready; first token is the time until the model's first generated token. Loadstone and
llama-server decode a token before they report ready, the others do not. Loadstone generates no text: its first token is
that of its warm-up.

- **Loadstone**: `POST /api/v1/models/load` until its reply.
- **llama-server router**: `POST /models/load` until `loaded` in `GET /models/sse`, then `POST /completion`. It has
  the settings that Loadstone gives llama.cpp: n_batch 512, as many threads as cores (at most 8; Loadstone uses one for
  the tiny model), one sequence, no repacking, no fitting. **Its defaults**: only the context length is set, so
  it repacks, has four sequences and n_batch 2048.
- **llama_cpp.server**: the start of a process until `GET /v1/models` answers, then `POST /v1/completions`. It repacks,
  and has no setting against that.
- **bare**: llama-cpp-python's low-level API creates the model and the context and decodes a token, without HTTP. The
  time of the fresh process includes its start; the warm process has imported everything. The file is mapped unless the
  row says that it is read (`LLAMA_LOAD_MODE_NONE`) or read past the page cache (`LLAMA_LOAD_MODE_DIRECT_IO`)."""
MEMORY_NOTES = """\
MB, in separate loads, since sampling slows them down. Own: the proportional set sizes of all mappings in the subject's
processes except the model's file, summed, at the peak. Mapped: the peak of the model's file in their mappings, which is
page cache. Before: own memory before the load."""


def markdown(measured: Measured, plots: dict[Cache, str], memory_plot: str) -> str:
    lines = ["# Comparison with other servers", "", "Written by `make bench-peers`.", ""]
    lines += [f"- {name}: {value}" for name, value in measured.about.items()]
    for cache in CACHES:
        lines += ["", f"## {cache.capitalize()} page cache", "", f"![{cache}]({plots[cache]})", ""]
        lines += _times(measured, cache, "ready, ms", ready)
        lines += ["", *_times(measured, cache, "first token, ms", token)]
        lines += ["", *_times(measured, cache, "ready without its warm-up, ms", without_warmup)]
    lines += [
        "",
        NOTES,
        "",
        "## Peak memory",
        "",
        f"![memory]({memory_plot})",
        "",
        *_memory(measured),
        "",
        MEMORY_NOTES,
    ]
    if measured.failed:
        lines += ["", "## Not loaded", "", *(f"- {one.subject}, {one.model}: {one.why}" for one in measured.failed)]
    verdicts = goals(measured)
    lines += ["", f"## Goals: {sum(goal.is_met for goal in verdicts)} of {len(verdicts)} met", ""]
    rows = [[g.what, _ms(g.measured_s), _ms(g.limit_s), "yes" if g.is_met else "**no**"] for g in verdicts]
    lines += table(["Loadstone's time to ready, at most", "ms", "limit, ms", "met"], rows)
    return "\n".join(lines) + "\n"


def _times(measured: Measured, cache: Cache, what: str, figure: Figure) -> list[str]:
    rows = []
    for subject in measured.subjects:
        medians = [measured.median(model, cache, subject, figure) for model in measured.models]
        rows.append([subject, *("" if median is None else _ms(median) for median in medians)])
    return table([what, *measured.models], rows)


def _memory(measured: Measured) -> list[str]:
    rows = []
    for subject in measured.subjects:
        peaks = [measured.peak(model, subject) for model in measured.models]
        cells = [
            f"{_mb(peak.own_bytes)} + {_mb(peak.mapped_bytes)} ({_mb(peak.before_bytes)})" if peak else ""
            for peak in peaks
        ]
        rows.append([subject, *cells])
    return table(["own + mapped (before)", *measured.models], rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:.0f}"


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.0f}"
