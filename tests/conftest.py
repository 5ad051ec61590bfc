"""A check after every test that no process and no descriptor is left behind."""

from __future__ import annotations

import gc
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

TIMEOUTS_S = {"clients": 600, "gpu": 600, "quality": 1200}  # of a test with its fixtures, such as a download; by ring
SETTLE_S = 20.0  # for processes to be reaped, and for descriptors to be closed by an event loop
HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")  # one of each for the lifetime of pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        ring = item.path.relative_to(here).parts[0]
        if ring in TIMEOUTS_S:
            item.add_marker(pytest.mark.timeout(TIMEOUTS_S[ring]))


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail if the test leaves a child process or a descriptor that did not exist before it.

    Fixtures of a wider scope are set up before, so what they hold is not counted; they have their own checks.
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
    """Count the child processes by command line, so that a restarted process of a wider fixture is not a new one.

    Zombies count; the helpers of `multiprocessing` do not.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for pid in _child_pids():
        with suppress(FileNotFoundError, ProcessLookupError):  # it was reaped meanwhile
            words = tuple(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0"))
            if not any(helper in word for helper in HELPERS for word in words):
                counts[words] += 1
    return counts


def _child_pids() -> list[str]:
    """Return the ids of the child processes, as the kernel lists them: a look at all processes would take 5 ms."""
    while True:
        with suppress(FileNotFoundError):  # a thread has ended: another one is now the parent of its children
            return [
                pid for thread in Path("/proc/self/task").iterdir() for pid in (thread / "children").read_text().split()
            ]


def descriptors() -> dict[int, str]:
    """Return the open descriptors with their targets, without those that hold the helpers of `multiprocessing`."""
    held = {
        getattr(multiprocessing.forkserver._forkserver, "_forkserver_alive_fd", None),
        getattr(multiprocessing.resource_tracker._resource_tracker, "_fd", None),
    }
    targets: dict[int, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the descriptor of this directory listing
            continue
        if int(entry.name) not in held:
            targets[int(entry.name)] = target
    return targets
