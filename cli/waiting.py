"""The load that a request to a model waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cli.commands import following, say
from cli.failure import Failure
from shared.schema.http import Job

if TYPE_CHECKING:
    from cli.client import Client

POLL_S = 0.3
PATIENT_POLLS = 3  # without a load; then a line says that the request waits


@contextmanager
def waiting(server: Client, model: str) -> Iterator[Callable[[], None]]:
    """Show on stderr what a request waits for, until the yielded function is called or the block ends."""
    is_over = threading.Event()
    watching = threading.Thread(target=_watch, args=(server, model, is_over), daemon=True)
    watching.start()

    def arrived() -> None:
        if not is_over.is_set():
            is_over.set()
            watching.join()

    try:
        yield arrived
    finally:
        arrived()


def _watch(server: Client, model: str, is_over: threading.Event) -> None:
    """Show the progress of the load of a model, or once that there is none in sight, until `is_over`."""
    n_polls = 0
    while not is_over.wait(POLL_S):
        n_polls += 1
        try:
            job = _loading(server, model)
        except Failure:  # the token may not list loads
            job, n_polls = None, PATIENT_POLLS
        if job is not None:
            with suppress(Failure):
                _follow(server, job, is_over)
        elif n_polls == PATIENT_POLLS:
            say(f"Waiting for {model}.")
            return


def _follow(server: Client, job: Job, is_over: threading.Event) -> None:
    """Show the progress of a load until its end, or until `is_over`.  Raises Failure."""
    with following(job.model) as shown:
        shown.show(job.event())
        while job.status in ("queued", "loading") and not is_over.wait(POLL_S):
            job = server.job(job.job_id)
            shown.show(job.event())
        shown.show(server.job(job.job_id).event())  # its end, if it has one


def _loading(server: Client, model: str) -> Job | None:
    """Return the job of the load of a model, None if none is in progress.  An alias finds none."""
    name = model.lower()
    for status in ("queued", "loading"):  # in the order of the lifecycle: none is missed
        for job in server.jobs(status=status, limit=1000).jobs:
            if name in (job.model.lower(), job.model.partition("@")[0].lower(), job.instance_id.lower()):
                return job
    return None
