"""How long a worker waits, and how often it looks."""

from __future__ import annotations

from msgspec import Struct

from shared.beat import BEAT_S


class Timing(Struct, frozen=True, kw_only=True):
    """Durations in seconds.  Tests shorten them."""

    beat_s: float = BEAT_S
    drain_s: float = 4.0  # for all runners together to stop at the worker's end
    commit_s: float = 0.5  # progress is recorded at least this often
    silence_s: float = 5.0  # how often it is checked whether the runner of a loaded model answers
    engine_log_s: float = 0.1  # what the engine logs is recorded in bunches
    first_pause_s: float = 2.0  # before the second try of a restoration; it doubles
    retry_s: float = 5.0  # of a file that cannot be written
    leave_s: float = 60.0  # what is evicted is reaped by then, or its room is not counted on
    agree_s: float = 5.0  # a driver takes up to 1.5 s after the end of a process (Ollama's server/sched.go)
    look_s: float = 0.05  # between two looks at a driver that does not agree yet
    hang_s: float = 3.0  # a driver answers within milliseconds, or not at all
    dry_run_s: float = 20.0  # for an engine to say what a load would take
    warm_s: float = 60.0  # for a runner to get warm: a first CUDA context on a host with many GPUs takes seconds
    grace_s: float = 1.0  # of each rung of the stop ladder
    reap_s: float = 30.0  # after SIGKILL: freeing a large mapping takes a while
