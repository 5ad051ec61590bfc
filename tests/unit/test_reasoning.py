"""The limit of an answer's reasoning."""

from __future__ import annotations

import re

import pytest

from worker.chat.protocol import Thinking
from worker.engine.reasoning import Reasoning

WORDS = re.compile(r"</?think>|\s+|\w+|.", re.DOTALL)
TAGS = Thinking(is_open=False, start="<think>", ends=["</think>"], close="</think>\n")


class Words:
    """A vocabulary of words, which get numbers as they come."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def spelled(self, text: str) -> list[int]:
        found = WORDS.findall(text)
        self.words += [word for word in found if word not in self.words]
        return [self.words.index(word) for word in found]

    def text(self, token: int) -> bytes:
        return self.words[token].encode()


def written(said: str, most: int, *, is_open: bool = False) -> str:
    """Return an answer of a model that says a text, wherever its reasoning is ended."""
    vocabulary = Words()
    thinking = Thinking(is_open=is_open, start=TAGS.start, ends=TAGS.ends, close=TAGS.close)
    reasoning = Reasoning(thinking, most, vocabulary)
    answer, wanted = "", vocabulary.spelled(said)
    while True:
        while (forced := reasoning.forced) is not None:
            reasoning.take(forced)
            answer += vocabulary.words[forced]
        if not wanted:
            return answer
        token = wanted.pop(0)
        reasoning.take(token)
        answer += vocabulary.words[token]


@pytest.mark.parametrize(
    ("said", "most", "answer"),
    [
        ("<think>a b c</think>d", 0, "<think></think>\na b c</think>d"),
        ("<think>a b c</think>d", 2, "<think>a </think>\nb c</think>d"),
        ("<think>a b c</think>d", 6, "<think>a b c</think>d"),
        ("\n<think>a b", 1, "\n<think>a</think>\n b"),
        ("no <think>a b", 0, "no <think>a b"),
        ("<think>a</think>b <think>c d e f g h", 3, "<think>a</think>b <think>c d e f g h"),
    ],
)
def test_reasoning_ends_at_its_limit(said: str, most: int, answer: str) -> None:
    assert written(said, most) == answer


def test_reasoning_that_the_prompt_began_ends_too() -> None:
    assert written("a b</think>c", 0, is_open=True) == "</think>\na b</think>c"
    assert written("a b</think>c", 2, is_open=True) == "a </think>\nb</think>c"
