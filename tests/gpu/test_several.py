"""One model on two real GPUs, and one on each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import BIG, context_of, watched_on
from tests.gpu.gpus import MIB, GPUs
from tests.gpu.watched import Watched, check_use, pages

SLACK_BYTES = 16 * MIB


@pytest.fixture(scope="module")
def contexts(gpus: GPUs) -> dict[str, int]:
    """Measure the usage of an idle process on each of the first two GPUs."""
    if len(gpus.ids) < 2:
        pytest.skip("this machine has one GPU")
    return {id_: context_of(gpus, id_) for id_ in gpus.ids[:2]}


@pytest.fixture(scope="module")
def two_gpus(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, gpus: GPUs, contexts: dict[str, int]
) -> Iterator[Watched]:
    with watched_on(tmp_path_factory.mktemp("two"), models_dir, gpus, [*contexts]) as watched:
        yield watched


@pytest.fixture
def watched(two_gpus: Watched) -> Iterator[Watched]:
    two_gpus.seen()
    yield two_gpus
    two_gpus.service.unload_all()


@pytest.mark.parametrize("split", ["even", [3, 1]])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_split_model_uses_the_estimated_bytes_of_each_gpu(
    watched: Watched, contexts: dict[str, int], models_dir: Path, split: Any, reverse: bool
) -> None:
    """It is copied to both from one range of locked memory."""
    ids = watched.ids[::-1] if reverse else watched.ids
    where = {"devices": ids, "split": split}
    estimates = watched.estimated(BIG, gpu=where)
    with watched.loaded(BIG, gpu=where) as loaded:
        assert loaded.job["devices"] == ids
        for id_ in ids:
            check_use(loaded.used_bytes[id_], estimates[id_]["total_bytes"], contexts[id_])
        assert watched.locked_bytes(loaded.job) == pages((models_dir / BIG).glob("*.gguf"))
    first, second = (estimates[id_]["weights_bytes"] for id_ in ids)
    assert (first > 2 * second) == (split != "even")


def test_a_load_uses_only_the_gpu_that_it_was_given(watched: Watched, contexts: dict[str, int]) -> None:
    for mine, other in (watched.ids, watched.ids[::-1]):
        estimates = watched.estimated(BIG, gpu={"devices": [mine]})
        with watched.loaded(BIG, gpu={"devices": [mine]}) as loaded:
            assert loaded.job["devices"] == [mine]
            check_use(loaded.used_bytes[mine], estimates[mine]["total_bytes"], contexts[mine])
            assert loaded.used_bytes[other] <= SLACK_BYTES
