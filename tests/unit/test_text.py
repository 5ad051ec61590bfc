"""The text of an answer: characters, stop strings, and what is held back."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.engine.text import Text


def fed(parts: list[bytes], stops: list[str]) -> tuple[list[str], bool]:
    """Return the text of each part and of the end, and whether a stop string ended it."""
    text = Text(stops)
    pieces = []
    for part in parts:
        pieces.append(text.feed(part))
        if text.is_stopped:
            return pieces, True
    return [*pieces, text.end()], text.is_stopped


def cut(whole: str, stops: list[str]) -> tuple[str, bool]:
    """Return what is before the first stop string to be complete."""
    for end in range(1, len(whole) + 1):
        starts = [end - len(stop) for stop in stops if whole[:end].endswith(stop)]
        if starts:
            return whole[: min(starts)], True
    return whole, False


def divided(data: bytes, limits: list[int]) -> list[bytes]:
    at = [0, *sorted(min(limit, len(data)) for limit in limits), len(data)]
    return [data[start:end] for start, end in pairwise(at)]


@settings(max_examples=1000)
@given(
    st.text("ab🙂", max_size=20),
    st.lists(st.integers(0, 40), max_size=6),
    st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3),
)
@example("aba", [], ["b", "aba"])
@example("aab", [2], ["aab"])
def test_any_division_gives_the_text_before_the_first_stop(whole: str, limits: list[int], stops: list[str]) -> None:
    pieces, is_stopped = fed(divided(whole.encode(), limits), stops)
    assert ("".join(pieces), is_stopped) == cut(whole, stops)


@given(st.binary(max_size=40), st.lists(st.integers(0, 40)))
def test_any_division_of_any_bytes_gives_the_same_text(data: bytes, limits: list[int]) -> None:
    pieces, _ = fed(divided(data, limits), [])
    assert "".join(pieces) == data.decode("utf-8", "replace")


def test_a_character_is_sent_when_it_is_complete() -> None:
    data = "é🙂".encode()
    assert fed([bytes([byte]) for byte in data], []) == (["", "é", "", "", "", "🙂", ""], False)


def test_only_a_possible_beginning_of_a_stop_is_held_back() -> None:
    assert fed([b"one\n", b"\ntwo", b"\n"], ["\n\nU"]) == (["one", "\n\ntwo", "", "\n"], False)


def test_of_two_stops_that_end_together_the_longer_counts() -> None:
    assert fed([b"xab"], ["b", "ab"]) == (["x"], True)


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    assert fed(["é".encode()[:1]], []) == (["", "�"], False)
