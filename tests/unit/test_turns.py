"""Which texts of which clients a batch has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.decode import Ids
from worker.engine.embedding import Texts, Turns


def job(client: str, *lengths: int) -> Texts:
    return Texts(client=client, tokens=[[0] * length for length in lengths], arrived_at=0.0, deadline=1.0)


def lengths(parts: list[tuple[Texts, Ids]]) -> list[tuple[str, int]]:
    return [(part.client, len(text)) for part, text in parts]


def filled(*jobs: Texts, most_tokens: int = 100, most_texts: int = 100) -> list[tuple[str, int]]:
    turns = Turns()
    for one in jobs:
        turns.add(one)
    return lengths(turns.fill(most_tokens, most_texts))


def test_clients_take_turns_in_a_batch() -> None:
    assert filled(job("a", 1, 2, 3), job("b", 4), job("a", 5)) == [("a", 1), ("b", 4), ("a", 2), ("a", 3), ("a", 5)]


def test_a_client_with_many_texts_does_not_delay_another() -> None:
    turns = Turns()
    turns.add(job("a", *[40] * 10))
    turns.add(job("b", 40))
    assert lengths(turns.fill(80, 100)) == [("a", 40), ("b", 40)]


def test_the_next_batch_begins_with_another_client() -> None:
    turns = Turns()
    for client in "abc":
        turns.add(job(client, 60, 60))
    assert [lengths(turns.fill(100, 100))[0][0] for _ in range(4)] == ["a", "b", "c", "a"]


def test_a_text_longer_than_a_batch_is_alone() -> None:
    assert filled(job("a", 500), job("b", 1)) == [("a", 500)]


def test_a_batch_has_a_limited_number_of_texts() -> None:
    assert len(filled(job("a", *[1] * 9), most_texts=4)) == 4


def test_a_removed_job_leaves_the_others_of_its_client() -> None:
    turns = Turns()
    first, second = job("a", 1), job("a", 2)
    turns.add(first)
    turns.add(second)
    turns.remove(first)
    turns.remove(first)
    assert (len(turns), lengths(turns.fill(10, 10))) == (1, [("a", 2)])
    turns.remove(second)
    assert (len(turns), turns.fill(10, 10)) == (0, [])


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 30), min_size=1, max_size=8)), max_size=8),
    st.integers(1, 40),
    st.integers(1, 5),
)
def test_every_text_is_in_one_batch_and_in_order(
    jobs: list[tuple[str, list[int]]], most_tokens: int, most_texts: int
) -> None:
    turns = Turns()
    added = [job(client, *texts) for client, texts in jobs]
    for one in added:
        turns.add(one)
    seen: dict[int, list[int]] = {id(one): [] for one in added}
    while parts := turns.fill(most_tokens, most_texts):
        assert len(parts) <= most_texts
        assert len(parts) == 1 or sum(len(text) for _, text in parts) <= most_tokens
        for part, text in parts:
            seen[id(part)].append(len(text))
            part.n_done += 1
            if part.n_done == len(part.tokens):
                turns.remove(part)
    assert [seen[id(one)] for one in added] == [texts for _, texts in jobs]
    assert not len(turns)
