"""The timeouts and intervals of a worker."""

from __future__ import annotations

from msgspec import Struct

from shared.beat import BEAT_S


class Timing(Struct, frozen=True, kw_only=True):
    """Durations in seconds.  Tests shorten them."""

    beat_s: float = BEAT_S
    drain_s: float = 4.0  # timeout for stopping all runners when the worker ends
    commit_s: float = 0.5  # progress is recorded at least this often
    answer_s: float = 5.0  # timeout of a runner that is asked whether it is idle; it then counts as busy
    silence_s: float = 5.0  # interval of checking whether the runner of a loaded model answers
    engine_log_s: float = 0.1  # the engine's log is recorded in batches, at this interval
    first_pause_s: float = 2.0  # before the second attempt of a restoration; doubles for each further one
    retry_s: float = 5.0  # before writing a file again that could not be written
    leave_s: float = 60.0  # timeout for evicted instances to be reaped; the load is then placed without their memory
    agree_s: float = 5.0  # a driver frees memory up to 1.5 s after the end of a process (Ollama's server/sched.go)
    look_s: float = 0.05  # interval of reading the devices until the memory is free
    hang_s: float = 3.0  # a driver answers within milliseconds, or hangs
    dry_run_s: float = 20.0  # timeout of a dry run
    warm_s: float = 60.0  # timeout for a runner to start: the first CUDA context on a host with many GPUs takes seconds
    grace_s: float = 1.0  # timeout of each step of the stop ladder
    reap_s: float = 30.0  # timeout after SIGKILL: freeing a large mapping takes time
