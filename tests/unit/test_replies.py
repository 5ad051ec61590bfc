"""How many replies an API process may hold open, by its limit of descriptors."""

from __future__ import annotations

import resource

import pytest

from api.replies import RESERVED, most_replies
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
