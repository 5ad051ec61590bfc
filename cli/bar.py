"""The progress of a load or a download as a bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import assert_never

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.display import clean, facts, percent
from shared.schema.http import LoadEnd, LoadError, LoadEvent, LoadProgress, LoadStart

BAR_WIDTH, FRAMES_PER_S = 30, 12


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
    """Shows progress as a bar, which the thread of `live` also redraws."""

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
                self.update(event.progress, facts(event))
            case LoadEnd():
                self._facts, self._ended = "loaded", True
            case LoadStart() | LoadError():
                pass
            case _:
                assert_never(event)

    def update(self, share: float, facts: str) -> None:
        """Show how much is done, and what is known about it."""
        self._meter.saw(share)
        self._facts = facts

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
