"""The engine loop of embedding models, with tiny random models in the real engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.memory.plan import plan
from shared.schema.http import LoadRequest
from shared.settings import Settings
from shared.synthetic.models import tiny_bert, tiny_embedding
from tests.support.child import in_child
from tests.support.generation import only_model
from tests.support.noalloc import load
from worker.engine.embedding import Computed, Result, Texts, Unfinished, Waits
from worker.runner.protocol import NO_GPU

Vectors = NDArray[np.float32]


class Trial:
    """A loop whose steps are made one by one."""

    def __init__(self, root: Path, *, on_gpu: bool = True, **options: Any) -> None:
        """`root`: a models directory with one model.  `on_gpu`: batches are as large as they may be."""
        from worker.engine import llama
        from worker.engine.decode import Engine
        from worker.engine.embedding import Embedding

        model = only_model(root)
        planned = plan(LoadRequest(model=model.key), model, Settings())
        log = llama.initialise(NO_GPU)
        log.is_muted = True
        shards = [root / shard for shard in model.shards]
        self.loaded = llama.Loaded(load(shards, planned, []), log, lambda phase, n_bytes: None)
        self.engine = Engine(self.loaded, log, n_outputs_max=planned.n_outputs_max, n_threads=1)
        self.results: list[Result] = []
        self.loop = Embedding(self.engine, self.results.extend, on_gpu=on_gpu, **options)

    def job(self, *texts: list[int], client: str = "a", **options: Any) -> Texts:
        now = time.monotonic()
        return Texts(client=client, tokens=[*texts], **{"arrived_at": now, "deadline": now + 600, **options})

    def run(self, *jobs: Texts) -> None:
        """Submit jobs together, and make steps until none is left."""
        for job in jobs:
            self.loop.submit(job)
        self.loop.step()
        while self.loop.counters.running or self.loop.counters.waiting:
            self.loop.step()

    def vectors(self, *texts: list[int]) -> Vectors:
        """Return the vectors of one job."""
        job = self.job(*texts)
        self.run(job)
        return self.of(job)

    def of(self, job: Texts) -> Vectors:
        own = [result for result in self.results if result.texts is job]
        assert isinstance(own[0], Waits)
        computed = [result for result in own[1:] if isinstance(result, Computed)]
        assert [one.is_last for one in computed] == [False] * (len(computed) - 1) + [True]
        return np.concatenate([one.vectors for one in computed])

    def end_of(self, job: Texts) -> Unfinished:
        (end,) = [result for result in self.results if result.texts is job and isinstance(result, Unfinished)]
        return end


def text(n: int) -> list[int]:
    """Return different tokens for each length."""
    return [40 + (n + i * i) % 180 for i in range(n)]


LENGTHS = (3, 50, 1, 17, 90, 8, 3)


@pytest.fixture(scope="module", params=[tiny_bert, tiny_embedding], ids=["encoder", "decoder"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = request.param
    root = tmp_path_factory.mktemp("embedding") / "models"
    make(root / "p/m/m.gguf")
    return root


def together_and_alone(root: Path) -> None:
    trial = Trial(root)
    texts = [text(n) for n in LENGTHS]
    together = trial.vectors(*texts)
    assert len(trial.results) == 2, "one batch"
    alone = np.concatenate([trial.vectors(one) for one in texts])
    np.testing.assert_allclose(together, alone, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01, "other texts have other vectors"
    np.testing.assert_allclose(together[0], together[-1], atol=2e-3)


def test_a_batch_computes_what_lone_texts_compute(root: Path) -> None:
    in_child(together_and_alone, root)


def told_before(root: Path) -> None:
    trial = Trial(root)
    decode, told = trial.engine.decode, []

    def asked() -> int:
        told.append([type(result).__name__ for result in trial.results])
        return decode()

    trial.engine.decode = asked  # type: ignore[method-assign]
    trial.vectors(text(3))
    assert told[0] == ["Waits"]


def test_texts_are_accepted_before_their_first_batch(root: Path) -> None:
    """A request that ends the process counts as accepted, and is not sent to another one."""
    in_child(told_before, root)


def small_batches(root: Path) -> None:
    trial = Trial(root, on_gpu=False)
    trial.loop._most_tokens = 60
    mine, other = trial.job(*[text(50)] * 4), trial.job(text(5), client="b")
    trial.run(mine, other)
    assert len(trial.of(mine)) == 4
    order = [result.texts for result in trial.results if isinstance(result, Computed)]
    assert order.index(other) == 1, "in the first batch, beside the first text of the other client"
    longest = trial.vectors(text(trial.loop.longest))
    assert longest.shape == (1, trial.engine.n_vector)


def test_a_client_with_many_texts_does_not_delay_another(root: Path) -> None:
    in_child(small_batches, root)


def ends(root: Path) -> None:
    trial = Trial(root, on_gpu=False, most_waiting=4)
    trial.loop._most_tokens = 10
    now = time.monotonic()
    cancelled = trial.job(*[text(9)] * 50)
    late, slow = trial.job(text(3), arrived_at=now - 61), trial.job(*[text(9)] * 3, client="b")
    trial.loop.submit(cancelled)
    trial.loop.submit(late)
    trial.loop.step()
    assert (trial.end_of(late).code, trial.loop.counters.running) == ("queue_timeout", 1)
    trial.loop.cancel(cancelled)
    trial.loop.submit(slow)
    trial.loop.step()
    assert trial.loop.counters.running == 1
    assert sum(len(one.vectors) for one in trial.results if isinstance(one, Computed) and one.texts is cancelled) < 3
    slow.deadline = now
    trial.loop.step()
    assert trial.end_of(slow).code == "deadline"
    jobs = [trial.job(*[text(9)] * 3, client=client) for client in "aaab"]
    trial.run(*jobs)
    assert [len(trial.of(job)) for job in (*jobs[:2], jobs[3])] == [3, 3, 3]
    full = trial.end_of(jobs[2])
    assert (full.code, full.retry_after_s > 0) == ("queue_full", True)


def test_texts_end_by_cancel_deadline_and_limits(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "models/p/m/m.gguf")
    in_child(ends, tmp_path / "models")


def unpooled(root: Path) -> None:
    assert Trial(root).vectors(text(5)).shape[0] == 1


def test_a_model_that_names_no_pooling_has_the_mean(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "models/p/m/m.gguf", drop={"bert.pooling_type"})
    in_child(unpooled, tmp_path / "models")
