"""The beat of the pool: how often each process does what it does periodically."""

from __future__ import annotations

BEAT_S = 1.0  # a worker renews its lease; an API process refreshes its roster, sweeps, and hands over its counts
