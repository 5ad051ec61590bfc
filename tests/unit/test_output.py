"""The output of an engine: the last lines, within a limit of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.runner.output import MOST_BYTES, Output


def as_text(output: Output) -> bytes:
    """Return the output as a client reads it."""
    return "".join(f"{line}\n" for line in output).encode()


def of(*lines: str) -> Output:
    output = Output()
    for line in lines:
        output.append(line)
    return output


def test_lines_keep_their_order_and_empty_lines_are_kept() -> None:
    assert [*of("a", "", "b")] == ["a", "", "b"]
    assert [*Output()] == []


def test_one_byte_over_the_limit_drops_the_oldest_line() -> None:
    full = of("first", "x" * (MOST_BYTES - len("first\n") - len("\n") - 1))
    full.append("")
    assert len(as_text(full)) == MOST_BYTES == 256 << 10
    assert next(iter(full)) == "first"
    full.append("")
    assert next(iter(full)) == "x" * (MOST_BYTES - 8)


def test_as_few_of_the_oldest_lines_as_needed_are_dropped() -> None:
    output = of(*(f"{n:07}" for n in range(100_000)))
    assert [*output] == [f"{n:07}" for n in range(100_000 - MOST_BYTES // 8, 100_000)]


def test_the_limit_counts_bytes_and_not_characters() -> None:
    output = of(*["\U0001f9f2" * 1000] * 100)
    assert MOST_BYTES - 4001 < len(as_text(output)) <= MOST_BYTES


def test_a_line_longer_than_the_limit_is_kept_alone() -> None:
    """Dropping the last line would leave no output at all."""
    long = "x" * (2 * MOST_BYTES)
    output = of("before", long)
    assert [*output] == [long]
    output.append("after")
    assert [*output] == ["after"]


def test_each_new_line_sets_the_grown_event() -> None:
    output = Output()
    assert not output.grown.is_set()
    output.append("a")
    assert output.grown.is_set()
    output.grown.clear()
    assert [*output] == ["a"]
    assert not output.grown.is_set()
    output.append("b")
    assert output.grown.is_set()


@given(sizes=st.lists(st.integers(0, MOST_BYTES), max_size=20))
def test_the_output_is_the_longest_suffix_within_the_limit(sizes: list[int]) -> None:
    lines = [f"{n % 10}" * size for n, size in enumerate(sizes)]
    expected: list[str] = []
    for line in reversed(lines):
        if expected and sum(len(one) + 1 for one in expected) + len(line) + 1 > MOST_BYTES:
            break
        expected.insert(0, line)
    assert [*of(*lines)] == expected
