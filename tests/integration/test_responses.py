"""Stored responses on a real Redis: whose they are, and their bounds."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shared.store.connection import connected
from shared.store.responses import ENTRY_BYTES, Responses, Stored

MOST, MOST_BYTES, RETAIN_S = 5, 5000, 3600
SMALL = Stored(response=b"r", conversation=b"c")


def stored(n_bytes: int) -> Stored:
    """Return a response that counts as so many bytes."""
    return Stored(response=b"r" * (n_bytes - ENTRY_BYTES - 1), conversation=b"c")


@pytest.fixture
async def responses(redis_server: str, raw: Any) -> Any:
    async with connected(redis_server) as client:
        yield Responses(client, most=MOST, most_bytes=MOST_BYTES, retain_s=RETAIN_S)


async def test_a_response_belongs_to_one_client(responses: Responses, raw: Any) -> None:
    for owner, content in (("a", b"\x00a"), ("", b"nobody's")):
        assert await responses.put(owner, "resp_1", Stored(response=content, conversation=content))
    assert await responses.get("a", "resp_1") == Stored(response=b"\x00a", conversation=b"\x00a")
    assert await responses.get("", "resp_1") == Stored(response=b"nobody's", conversation=b"nobody's")
    assert await responses.get("b", "resp_1") is None
    assert not await responses.delete("b", "resp_1")
    assert await responses.delete_all("b") == 0
    assert await responses.delete("a", "resp_1")
    assert not await responses.delete("a", "resp_1")
    assert await responses.get("a", "resp_1") is None
    assert await responses.get("", "resp_1") is not None
    assert await responses.delete_all("") == 1
    assert raw.keys("response:*") == []


async def test_the_oldest_responses_are_removed_first(responses: Responses, raw: Any) -> None:
    """The store is compared with a list after each of many random steps."""
    chance = random.Random(1)
    model: list[tuple[str, int]] = []
    for number in range(200):
        id_, n_bytes = f"resp_{number}", chance.randint(ENTRY_BYTES + 1, MOST_BYTES // 2)
        if model and chance.random() < 0.2:
            id_ = chance.choice(model)[0]
            assert await responses.delete("a", id_)
            model = [entry for entry in model if entry[0] != id_]
        else:
            assert await responses.put("a", id_, stored(n_bytes))
            model.append((id_, n_bytes))
            while len(model) > MOST or sum(size for _, size in model) > MOST_BYTES:
                model.pop(0)
        assert raw.zrange("responses:a", 0, -1) == [id_.encode() for id_, _ in model]
        assert {*raw.keys("response:a:*")} == {f"response:a:{id_}".encode() for id_, _ in model}
        assert int(raw.hget("response_bytes:a", "sum") or 0) == sum(size for _, size in model)
    assert await responses.delete_all("a") == len(model)


async def test_a_response_over_the_bounds_removes_no_other(responses: Responses) -> None:
    assert await responses.put("a", "resp_1", SMALL)
    assert await responses.put("a", "resp_2", stored(MOST_BYTES - ENTRY_BYTES - 2))
    assert not await responses.put("a", "resp_3", stored(MOST_BYTES + 1))
    assert await responses.get("a", "resp_3") is None
    assert await responses.get("a", "resp_1") == SMALL


async def test_a_write_that_is_repeated_changes_nothing(responses: Responses, raw: Any) -> None:
    for _ in range(2):
        assert await responses.put("a", "resp_1", SMALL)
    assert raw.zcard("responses:a") == 1
    assert raw.hget("response_bytes:a", "sum") == str(ENTRY_BYTES + 2).encode()


async def test_everything_expires(responses: Responses, raw: Any) -> None:
    await responses.put("a", "resp_1", SMALL)
    assert len(raw.keys()) == 3
    for key in [*raw.scan_iter()]:
        assert RETAIN_S - 60 < int(raw.ttl(key)) <= RETAIN_S


async def test_a_response_that_expired_counts_no_more(responses: Responses, raw: Any) -> None:
    """Its record went by itself, and the next write finds that."""
    await responses.put("a", "resp_1", SMALL)
    seconds, _ = raw.time()
    raw.zadd("responses:a", {"resp_1": (seconds - RETAIN_S - 1) * 1_000_000})
    raw.delete("response:a:resp_1")
    await responses.put("a", "resp_2", SMALL)
    assert raw.zrange("responses:a", 0, -1) == [b"resp_2"]
    assert raw.hget("response_bytes:a", "sum") == str(ENTRY_BYTES + 2).encode()


async def test_nothing_is_stored_where_that_is_turned_off(redis_server: str, raw: Any) -> None:
    async with connected(redis_server) as client:
        off = Responses(client, most=0, most_bytes=MOST_BYTES, retain_s=RETAIN_S)
        assert not await off.put("a", "resp_1", SMALL)
    assert raw.keys() == []
