"""What an API process holds for its clients: how much in all, and how much for one of them."""

from __future__ import annotations

import resource
from contextlib import ExitStack

import pytest

from api.replies import RESERVED, Bodies, OpenReplies, most_replies
from shared.errors import TooManyWaiting
from tests.support.child import in_child


def limited(soft: int, hard: int, configured: int) -> tuple[int, int]:
    """Return the number of replies with these limits of descriptors, and the soft limit afterwards."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most_replies(configured), resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize(
    ("soft", "hard", "configured", "most"),
    [(256, 4096, 1024, 1024), (512, 1024, 1024, 1024 - RESERVED), (100, 100, 1024, 1), (300, 300, 5, 5)],
)
def test_replies_leave_descriptors_to_other_requests(soft: int, hard: int, configured: int, most: int) -> None:
    assert in_child(limited, soft, hard, configured) == (most, hard)


def test_one_client_leaves_open_replies_to_others() -> None:
    replies = OpenReplies(8)
    with ExitStack() as held:
        for client, n in (("a", 4), ("b", 2), ("c", 1)):
            for _ in range(n):
                held.enter_context(replies.place(client))
            with pytest.raises(TooManyWaiting, match="limit: 8"), replies.place(client):
                pass
    assert replies.taken.total() == 0


def test_a_client_without_a_name_may_hold_all_replies() -> None:
    replies = OpenReplies(2)
    with replies.place(""), replies.place(""), pytest.raises(TooManyWaiting), replies.place(""):
        pass


def test_one_client_leaves_room_for_the_bodies_of_others() -> None:
    bodies = Bodies(100)
    with bodies.reading("a") as mine, bodies.reading("b") as others:
        mine(50)
        with pytest.raises(TooManyWaiting):
            mine(1)
        others(25)
    assert bodies.taken.total() == 0
