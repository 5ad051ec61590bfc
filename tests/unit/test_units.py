"""Sizes as text for people."""

from __future__ import annotations

import pytest

from shared.units import size


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (5 << 20, "5.0 MiB"),
        ((1 << 30) - 1, "1024.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (2 << 40, "2.0 TiB"),
        (4096 << 40, "4096.0 TiB"),
    ],
)
def test_a_size_has_the_largest_unit_that_it_reaches(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text
