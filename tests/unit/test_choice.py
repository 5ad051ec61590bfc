"""The choice among the loaded instances of a model."""

from __future__ import annotations

from collections import Counter

from api.pool.loaded import choose
from api.pool.view import Copies, seed_of
from shared.instance import Instance
from shared.schema.http import LoadConfig, LoadRequest


def instance(number: int, parallel: int = 4) -> Instance:
    return Instance(
        id=f"load_{number}",
        model="p/m",
        key="p/m",
        type="llm",
        worker="w",
        request=LoadRequest(model="p/m"),
        load_config=LoadConfig(context_length=512, parallel=parallel),
        instance_id=f"p/m:{number}",
    )


def copies(*numbers: int) -> Copies:
    found = [instance(number) for number in numbers]
    return Copies(found, [seed_of(one.id.encode()) for one in found], [])


BEGINNINGS = [f"beginning {i}".encode() for i in range(200)]


def chosen(among: Copies, beginning: bytes, busy: dict[str, int] | None = None) -> str:
    return choose(among, lambda one: (busy or {}).get(one.id, 0), beginning).id


def test_a_beginning_finds_its_instance_again() -> None:
    assert {chosen(copies(1, 2, 3), BEGINNINGS[0]) for _ in range(5)} == {chosen(copies(3, 1, 2), BEGINNINGS[0])}


def test_beginnings_are_spread_over_all_instances() -> None:
    found = Counter(chosen(copies(1, 2, 3), beginning) for beginning in BEGINNINGS)
    assert len(found) == 3
    assert min(found.values()) > 30


def test_a_further_instance_takes_only_its_share() -> None:
    before = [chosen(copies(1, 2, 3), beginning) for beginning in BEGINNINGS]
    after = [chosen(copies(1, 2, 3, 4), beginning) for beginning in BEGINNINGS]
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {"load_4"}


def test_a_beginning_leaves_an_instance_that_is_clearly_busier() -> None:
    among = copies(1, 2)
    first = chosen(among, b"hello")
    second = "load_1" if first == "load_2" else "load_2"
    assert chosen(among, b"hello", {first: 2}) == first, "its tokens are worth a wait"
    assert chosen(among, b"hello", {first: 3}) == second
    assert chosen(among, b"hello", {first: 8, second: 6}) == first


def test_without_a_beginning_the_less_busy_one_is_chosen() -> None:
    assert {chosen(copies(1, 2), b"", {"load_1": 1}) for _ in range(20)} == {"load_2"}
