"""What every test must leave behind: nothing."""

from __future__ import annotations

import gc
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service import processes

SETTLE_S = 2.0  # what a test ended may still be reaped, or closed by its event loop
HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")  # one each, for as long as we live


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No child process and no open descriptor that was not there before the test.

    What wider fixtures hold was there before: pytest sets them up first.  A module's own check is at its fixture's end.
    """
    children_before, descriptors_before = children(), descriptors()
    yield
    until = time.monotonic() + SETTLE_S
    while True:
        left = [f"process {' '.join(words)}" for words in children() - children_before]
        new = descriptors().items() - descriptors_before.items()
        if len(descriptors()) > len(descriptors_before):
            left += [f"descriptor {number}: {target}" for number, target in sorted(new)]
        if not left:
            return
        if time.monotonic() > until:
            pytest.fail(f"{request.node.nodeid} left behind: " + "; ".join(left))
        gc.collect()
        time.sleep(0.02)


def children() -> Counter[tuple[str, ...]]:
    """Our child processes by their command lines, so that one which replaced another of a wider fixture's is none
    too many; without the helpers of `multiprocessing`.  One that nobody reaped counts."""
    return Counter(
        process.words
        for process in processes(zombies=True)
        if process.parent == os.getpid() and not any(helper in word for helper in HELPERS for word in process.words)
    )


def descriptors() -> dict[int, str]:
    """Our open descriptors and what they are, without those that the helpers of `multiprocessing` are held by."""
    held = {
        getattr(multiprocessing.forkserver._forkserver, "_forkserver_alive_fd", None),
        getattr(multiprocessing.resource_tracker._resource_tracker, "_fd", None),
    }
    found: dict[int, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the one that lists them
            continue
        if int(entry.name) not in held:
            found[int(entry.name)] = target
    return found
