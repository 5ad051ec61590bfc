"""The last of what an engine says: bounded, whatever it says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.runner.output import MOST_BYTES, Output


def as_text(tail: Output) -> bytes:
    """As a client reads it."""
    return "".join(f"{line}\n" for line in tail).encode()


def of(*lines: str) -> Output:
    tail = Output()
    for line in lines:
        tail.append(line)
    return tail


def test_lines_come_back_in_their_order_and_empty_ones_too() -> None:
    assert [*of("a", "", "b")] == ["a", "", "b"]
    assert [*Output()] == []


def test_exactly_the_limit_is_kept_and_one_byte_more_drops_the_oldest_line() -> None:
    full = of("first", "x" * (MOST_BYTES - len("first\n") - len("\n") - 1))
    full.append("")
    assert len(as_text(full)) == MOST_BYTES == 256 << 10
    assert next(iter(full)) == "first"
    full.append("")
    assert next(iter(full)) == "x" * (MOST_BYTES - 8)


def test_the_oldest_go_and_as_few_as_possible() -> None:
    tail = of(*(f"{n:07}" for n in range(100_000)))
    assert [*tail] == [f"{n:07}" for n in range(100_000 - MOST_BYTES // 8, 100_000)]


def test_bytes_are_counted_and_not_letters() -> None:
    tail = of(*["\U0001f9f2" * 1000] * 100)
    assert MOST_BYTES - 4001 < len(as_text(tail)) <= MOST_BYTES


def test_one_line_longer_than_the_limit_is_kept_alone_until_the_next() -> None:
    """It is the last thing that was said: to drop it would leave nothing."""
    long = "x" * (2 * MOST_BYTES)
    tail = of("before", long)
    assert [*tail] == [long]
    tail.append("after")
    assert [*tail] == ["after"]


def test_it_tells_that_it_has_grown_and_again_after_that_was_heard() -> None:
    tail = Output()
    assert not tail.grown.is_set()
    tail.append("a")
    assert tail.grown.is_set()
    tail.grown.clear()
    assert [*tail] == ["a"]
    assert not tail.grown.is_set()
    tail.append("b")
    assert tail.grown.is_set()


@given(sizes=st.lists(st.integers(0, MOST_BYTES), max_size=20))
def test_it_is_the_longest_end_of_what_was_said_that_fits(sizes: list[int]) -> None:
    lines = [f"{n % 10}" * size for n, size in enumerate(sizes)]
    wanted: list[str] = []
    for line in reversed(lines):
        if wanted and sum(len(one) + 1 for one in wanted) + len(line) + 1 > MOST_BYTES:
            break
        wanted.insert(0, line)
    assert [*of(*lines)] == wanted
