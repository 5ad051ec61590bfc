"""The number of threads that decode the warm-up token."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from worker.engine.llama import MANY_BYTES, MOST_THREADS, n_threads


@pytest.fixture
def one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def test_only_a_large_model_uses_several_threads() -> None:
    assert n_threads(MANY_BYTES) == min(MOST_THREADS, len(os.sched_getaffinity(0)))
    assert n_threads(MANY_BYTES - 1) == 1


@pytest.mark.usefixtures("one_core")
def test_threads_are_limited_to_the_allowed_cores() -> None:
    assert n_threads(MANY_BYTES) == 1
