"""Human-readable sizes."""

from __future__ import annotations

UNITS = ("KiB", "MiB", "GiB", "TiB")


def size(n_bytes: float) -> str:
    """Format a number of bytes in the largest binary unit that it reaches, with one decimal place.

    Errors, tables and settings all use binary units, like drivers and cgroups, so that their values can be compared.
    """
    if n_bytes < 1024:
        return f"{int(n_bytes)} byte{'' if int(n_bytes) == 1 else 's'}"
    power = min((int(n_bytes).bit_length() - 1) // 10, len(UNITS))
    return f"{n_bytes / (1 << 10 * power):.1f} {UNITS[power - 1]}"
