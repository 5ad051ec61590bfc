"""Turns the bytes of tokens into text that may be sent: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs


class Text:
    """The text of one answer.

    It ends before the first stop string to be complete; of two that are complete at one character, before the longer.
    What may be the beginning of a stop string is held back until it is none.  How the bytes are divided has no effect
    on the text.
    """

    def __init__(self, stops: list[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._held = ""
        self.stop: str | None = None  # the string before which the text ended

    @property
    def is_stopped(self) -> bool:
        return self.stop is not None

    def feed(self, data: bytes) -> str:
        """Take bytes and return text that follows what was returned before."""
        return self._add(self._decoder.decode(data))

    def end(self) -> str:
        """Return what was held back.  An incomplete character becomes U+FFFD."""
        text = self._add(self._decoder.decode(b"", final=True))
        if not self.is_stopped:
            text += self._held
            self._held = ""
        return text

    def _add(self, text: str) -> str:
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, free, self.stop = min(found)
        else:
            free = len(self._held) - max(_overlap(self._held, stop) for stop in self._stops)
        text, self._held = self._held[:free], self._held[free:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with, and that is not the whole of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
