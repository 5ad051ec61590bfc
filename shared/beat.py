"""The beat: the period of the recurring work of each process."""

from __future__ import annotations

BEAT_S = 1.0  # workers renew their lease; API processes refresh the roster, sweep, and flush their counts
