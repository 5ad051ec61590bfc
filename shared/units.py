"""Sizes in bytes, as people read them."""

from __future__ import annotations

UNITS = ("KiB", "MiB", "GiB", "TiB")


def size(n_bytes: float) -> str:
    """Format a number of bytes in the largest binary unit that it reaches, with one decimal place.

    Errors, tables and settings use the same units, so that an operator can compare them: drivers, cgroups and
    `LOADSTONE_DEVICE_RESERVE` count in powers of two.
    """
    if n_bytes < 1024:
        return f"{int(n_bytes)} byte{'' if int(n_bytes) == 1 else 's'}"
    power = min((int(n_bytes).bit_length() - 1) // 10, len(UNITS))
    return f"{n_bytes / (1 << 10 * power):.1f} {UNITS[power - 1]}"
