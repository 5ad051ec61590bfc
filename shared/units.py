"""Human-readable sizes."""

from __future__ import annotations

import math


def size(n_bytes: float) -> str:
    """Format a number of bytes in GiB: with two decimal places, or as many as two significant digits take.

    Errors, tables and settings use one binary unit, like drivers and cgroups, so that their values can be compared.
    """
    gib = n_bytes / (1 << 30)
    places = 2 if gib <= 0 else max(2, 1 - math.floor(math.log10(gib)))
    return f"{gib:.{places}f} GiB"
