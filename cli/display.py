"""The output of the client commands: tables on stdout, and the progress of loads on stderr."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import assert_never

from msgspec import UNSET, UnsetType
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shared.schema.http import JobStatus, LoadEnd, LoadError, LoadEvent, LoadProgress, LoadStart, Phase
from shared.units import size

WIDE = 10_000  # columns: tables are never cut, since terminals wrap and pipes have no width
BAR_WIDTH, FRAMES_PER_S = 30, 12
STEP = 0.1  # without a terminal: one line per tenth
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Replace control characters in external text, which a terminal would interpret."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headings, in columns."""
    shown = Table(*headings, box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for row in rows:
        shown.add_row(*(Text(clean(cell)) for cell in row))
    Console(width=WIDE, markup=False, highlight=False, emoji=False).print(shown, no_wrap=True)


def when(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%SZ")


def percent(share: float) -> str:
    """Format a share as a percentage, rounded down: 100% means complete."""
    return f"{math.floor(share * 100 + 1e-9)}%"


def left(seconds: float | UnsetType) -> str:
    """Format the remaining time; "-" if there is none."""
    return "-" if seconds is UNSET else str(timedelta(seconds=math.ceil(seconds)))


def stage(status: JobStatus, phase: Phase | None) -> str:
    """Return the stage of a load, in one word."""
    match status:
        case "loading":
            return phase or "starting"
        case "queued" | "loaded" | "failed" | "cancelled":
            return status
        case _:
            assert_never(status)


def facts(event: LoadProgress) -> str:
    """Format the phase, bytes, rate and remaining time, as far as they are known."""
    if event.status != "loading" or event.phase is None:
        return stage(event.status, event.phase)
    parts = [event.phase, f"{size(event.loaded_bytes)} of {size(event.total_size_bytes)}"]
    left_bytes = event.total_size_bytes - event.loaded_bytes
    if event.bytes_per_second and left_bytes > 0:
        parts.append(f"{size(event.bytes_per_second)}/s")
        parts.append(f"{timedelta(seconds=round(left_bytes / event.bytes_per_second))} left")
    return ", ".join(parts)


class Meter:
    """Smooths the progress of a load: moves evenly from event to event, never backwards or beyond the last event."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._from = self._to = 0.0
        self._at, self._takes_s = now(), 1.0

    def saw(self, share: float) -> None:
        """Record the progress of an event.  It is reached after the time that passed since the previous event."""
        self._from, self._to = self.share(), max(share, self._to)
        now = self._now()
        self._at, self._takes_s = now, min(1.0, max(now - self._at, 1e-3))

    def share(self) -> float:
        return self._from + (self._to - self._from) * min(1.0, (self._now() - self._at) / self._takes_s)


class Bar:
    """Shows a load as a progress bar, which the thread of `live` also redraws."""

    def __init__(self, model: str) -> None:
        self._model = clean(model)
        self._meter = Meter()
        self._facts = "queued"
        self._ended = False
        self.live = Live(
            console=Console(stderr=True, markup=False, highlight=False, emoji=False, force_terminal=True),
            get_renderable=self._row,
            refresh_per_second=FRAMES_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def show(self, event: LoadEvent) -> None:
        match event:
            case LoadProgress():
                self._meter.saw(event.progress)
                self._facts = facts(event)
            case LoadEnd():
                self._facts, self._ended = "loaded", True
            case LoadStart() | LoadError():
                pass
            case _:
                assert_never(event)

    def note(self, sentence: str) -> None:
        self.live.console.print(Text(clean(sentence)))

    def _row(self) -> Table:
        share = 1.0 if self._ended else self._meter.share()
        row = Table.grid(padding=(0, 1))
        row.add_column(no_wrap=True, max_width=40)
        row.add_column(width=BAR_WIDTH)
        row.add_column(no_wrap=True, width=4)
        row.add_column(no_wrap=True)
        row.add_row(Text(self._model), ProgressBar(1.0, share), percent(share), self._facts)
        return row


class Lines:
    """Shows a load as lines: one for each change of phase and for each tenth."""

    def __init__(self, model: str, say: Callable[[str], None]) -> None:
        self._model, self.note = model, say
        self._stage, self._next = "", 0.0

    def show(self, event: LoadEvent) -> None:
        match event:
            case LoadProgress():
                now = stage(event.status, event.phase)
                if now != self._stage or event.progress >= self._next:
                    self._stage, self._next = now, event.progress + STEP
                    self.note(f"{self._model}: {percent(event.progress)} {facts(event)}")
            case LoadStart() | LoadEnd() | LoadError():
                pass
            case _:
                assert_never(event)


@contextmanager
def following(model: str, say: Callable[[str], None]) -> Iterator[Bar | Lines]:
    """Show the progress of a load on stderr during the `with` block."""
    if sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal:
        bar = Bar(model)
        with bar.live:
            bar.live.refresh()
            yield bar
    else:
        yield Lines(model, say)
