"""Ends the reasoning of an answer at a limit: then the tokens with which it ends come next, whatever is probable."""

from __future__ import annotations

import codecs
from typing import Protocol

from worker.chat.protocol import Thinking

WINDOW = 100  # characters before a token in which the end of reasoning may have begun


class Vocabulary(Protocol):
    """The tokens of a model."""

    def text(self, token: int) -> bytes: ...

    def spelled(self, text: str) -> list[int]: ...


class Reasoning:
    """The reasoning of one answer, which has at most `most` tokens."""

    def __init__(self, thinking: Thinking, most: int, vocabulary: Vocabulary) -> None:
        self._thinking, self._left = thinking, most
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""  # of the answer up to the end of its reasoning, or the last of it
        self._has_begun = thinking.is_open
        self._has_ended = False
        self._closing: list[int] = []  # tokens that come next
        if self._has_begun:
            self._count(0)

    @property
    def forced(self) -> int | None:
        """The token that comes next; None if any may."""
        return self._closing[0] if self._closing else None

    def take(self, token: int) -> None:
        """Take the next token of the answer."""
        if self._has_ended:
            return
        self._text += self._decoder.decode(self._vocabulary.text(token))
        if self._closing:
            self._closing.pop(0)
            self._has_ended = not self._closing
        elif not self._has_begun:
            self._look_for_start()
        elif any(end in self._text for end in self._thinking.ends):
            self._has_ended = True
        else:
            self._text = self._text[-WINDOW:]
            self._count(1)

    def _look_for_start(self) -> None:
        said, start = self._text.lstrip(), self._thinking.start
        if said.startswith(start):
            self._has_begun, self._text = True, said[len(start) :]
            self._count(0)
        elif not start.startswith(said):
            self._has_ended = True  # it does not reason

    def _count(self, n: int) -> None:
        self._left -= n
        if self._left <= 0:
            self._closing = self._vocabulary.spelled(self._thinking.close)
