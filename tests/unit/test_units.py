"""Sizes as text for people."""

from __future__ import annotations

import pytest

from shared.units import size


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0.00 GiB"),
        (500, "0.00000047 GiB"),
        (5 << 20, "0.0049 GiB"),
        (98_362_432, "0.092 GiB"),
        ((1 << 30) - 1, "1.00 GiB"),
        (3 << 29, "1.50 GiB"),
        (2 << 40, "2048.00 GiB"),
    ],
)
def test_every_size_is_in_gib_with_enough_digits(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text
