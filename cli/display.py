"""The output of the client commands: tables on stdout, and the progress of loads as lines on stderr."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import assert_never

import click
from msgspec import UNSET, UnsetType

from shared.schema.http import JobStatus, LoadEnd, LoadError, LoadEvent, LoadProgress, LoadStart, Phase
from shared.units import size

GAP = "   "  # between the columns of a table
STEP = 0.1  # without a terminal: one line per tenth
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Replace control characters in external text, which a terminal would interpret."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headings, in columns.  They are never cut: terminals wrap, and pipes have no width."""
    cleaned = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(headings, *cleaned, strict=True)]
    for n, row in enumerate([headings, *cleaned]):
        line = GAP.join(cell + " " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)).rstrip()
        click.echo(click.style(line, bold=True) if n == 0 else line)


def width(text: str) -> int:
    """Return the number of columns of a text on a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


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


class Lines:
    """Shows progress as lines: one for each change of the stage and for each tenth."""

    def __init__(self, model: str, say: Callable[[str], None]) -> None:
        self._model, self.note = model, say
        self._stage, self._next = "", 0.0

    def show(self, event: LoadEvent) -> None:
        match event:
            case LoadProgress():
                self.update(event.progress, facts(event), stage(event.status, event.phase))
            case LoadStart() | LoadEnd() | LoadError():
                pass
            case _:
                assert_never(event)

    def update(self, share: float, facts: str, now: str = "") -> None:
        """Show how much is done, and what is known about it.  `now`: the stage."""
        if now != self._stage or share >= self._next:
            self._stage, self._next = now, share + STEP
            self.note(f"{self._model}: {percent(share)} {facts}")
