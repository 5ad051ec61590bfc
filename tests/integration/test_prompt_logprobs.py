"""Log probabilities of prompts, by the engine loop with tiny random models in the real engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.channel.messages import TokenLogprobs
from shared.synthetic.models import tiny_gemma3, tiny_llama
from tests.support import architectures
from tests.support.child import in_child
from tests.support.generation import Answered, Trial, ids_of
from worker.engine.slots import Drop

NEAR = 0.02  # of log probabilities: batches of other sizes use other kernels
LENGTHS = (1, 2, 3, 40, 700)  # the last one is longer than a batch


def tokens_of(n: int, start: int = 0) -> list[int]:
    """Return tokens that are the text of something."""
    return [40 + (start + i * i) % 180 for i in range(n)]


def expected(trial: Trial, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Return the log probabilities of all tokens after each one of a prompt, computed without the loop."""
    engine, rows = trial.engine, []
    sequence = trial.loop._slots.sequences[0]
    assert not sequence.tokens
    n = engine.batch.n_outputs_max
    for start in range(0, len(tokens), n):
        engine.batch.clear()
        piece = tokens[start : start + n]
        engine.batch.add(piece, start, sequence.id, n_outputs=len(piece))
        assert engine.decode() == 0
        rows.append(engine.logits().astype(np.float64))
    engine.apply(Drop(sequence))
    logits = np.concatenate(rows)
    greatest = logits.max(axis=1, keepdims=True)
    return np.asarray(logits - greatest - np.log(np.exp(logits - greatest).sum(axis=1, keepdims=True)))


def check(trial: Trial, tokens: list[int], reported: list[TokenLogprobs], rows: np.ndarray[Any, Any], n: int) -> None:
    piece = trial.engine.vocabulary.piece
    assert [one.token for one in reported] == [piece(token, is_shown=True) for token in tokens]
    assert math.isnan(reported[0].logprob)
    assert reported[0].top == []
    for i, one in enumerate(reported[1:]):
        assert abs(one.logprob - rows[i, tokens[i + 1]]) < NEAR
        assert len(one.top) == n
        for rank, other in enumerate(one.top):
            assert abs(other.logprob - np.sort(rows[i])[-1 - rank]) < NEAR


def prompt_of(answered: Answered, tokens: list[int], choice: int = 0) -> list[TokenLogprobs]:
    return answered.logprobs[choice][: len(tokens)]


def scored(root: Path, parallel: int) -> None:
    """Prompts alone, together, and beside answers and prompts that are not scored."""
    trial = Trial(root, parallel=parallel)
    prompts = [tokens_of(n, n) for n in LENGTHS]
    rows = [expected(trial, tokens) for tokens in prompts]
    options: dict[str, Any] = {"scores_prompt": True, "logprobs": 3, "max_tokens": 1}
    options["sampling"] = trial.endless(temperature=0)
    for tokens, own in zip(prompts, rows, strict=True):
        (alone,) = trial.run(trial.job(tokens, **options))
        check(trial, tokens, prompt_of(alone, tokens), own, 3)
        assert len(alone.logprobs[0]) == len(tokens) + 1
        assert (alone.cached_tokens, alone.n_tokens, alone.last.generated_tokens) == (0, 1, 1)
    beside = [trial.job(tokens_of(n, 7), max_tokens=30, client=f"{n}") for n in (5, 900, 6)]
    jobs = [trial.job(tokens, **options) for tokens in prompts]
    answers = trial.run(beside[0], *jobs, *beside[1:])
    for tokens, own, answered in zip(prompts, rows, answers[1 : 1 + len(prompts)], strict=True):
        check(trial, tokens, prompt_of(answered, tokens), own, 3)
        assert answered.cached_tokens == 0
    assert all(answered.n_tokens == 30 for answered in (answers[0], *answers[-2:]))


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_the_engine_computes_what_is_reported(make: Any, parallel: int, tmp_path: Path) -> None:
    """A batch has as many logits as answers may run."""
    make(tmp_path / "models/p/m/m.gguf", **({"tokenizer": "bpe"} if make is tiny_llama else {}))
    in_child(scored, tmp_path / "models", parallel)


def without_rewinding(root: Path) -> None:
    trial = Trial(root)
    tokens = tokens_of(300)
    rows = expected(trial, tokens)
    for _ in range(2):
        (answered,) = trial.run(trial.job(tokens, scores_prompt=True, logprobs=1, max_tokens=1))
        check(trial, tokens, prompt_of(answered, tokens), rows, 1)


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_models_that_cannot_go_back_score_prompts(name: str, tmp_path: Path) -> None:
    architectures.write_random(tmp_path / "models/p/m/m.gguf", name)
    in_child(without_rewinding, tmp_path / "models")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama") / "models"
    tiny_llama(root / "p/m/m.gguf", tokenizer="bpe")
    return root


def several(root: Path) -> None:
    trial = Trial(root)
    tokens = tokens_of(50)
    rows = expected(trial, tokens)
    options: dict[str, Any] = {"scores_prompt": True, "logprobs": 0, "choices": 3, "max_tokens": 4}
    (answered,) = trial.run(trial.job(tokens, sampling=trial.endless(seed=7), **options))
    for choice in range(3):
        check(trial, tokens, prompt_of(answered, tokens, choice), rows, 0)
        assert len(answered.logprobs[choice]) == 50 + 4
    assert trial.loop.counters.prompt_tokens == 50
    assert len({tuple(ids_of(answered, choice)) for choice in range(3)}) > 1


def test_each_answer_begins_with_the_prompt(llama: Path) -> None:
    in_child(several, llama)


def nothing_generated(root: Path) -> None:
    trial = Trial(root)
    tokens = tokens_of(50)
    rows = expected(trial, tokens)
    jobs = [
        trial.job(tokens, scores_prompt=True, logprobs=2, max_tokens=0, choices=2, client="scored"),
        trial.job(tokens, max_tokens=0, client="plain"),
        trial.job(tokens[:1], scores_prompt=True, logprobs=2, max_tokens=0, client="short"),
    ]
    answers = trial.run(*jobs)
    for answered in answers:
        assert (answered.n_tokens, answered.last.generated_tokens, {*answered.finishes.values()}) == (0, 0, {"length"})
        assert not any(answered.texts.values())
    check(trial, tokens, answers[0].logprobs[1], rows, 2)
    check(trial, tokens[:1], answers[2].logprobs[0], rows, 2)
    (again,) = trial.run(trial.job(tokens, max_tokens=1, client="plain"))
    assert again.cached_tokens == 49, "the prompt was processed"


def test_an_answer_may_be_the_prompt_alone(llama: Path) -> None:
    in_child(nothing_generated, llama)


def preempted(root: Path) -> None:
    trial = Trial(root, parallel=2, context_length=1024)
    tokens = tokens_of(400)
    rows = expected(trial, tokens)
    older = trial.job(tokens_of(100, 3), max_tokens=400, client="older")
    younger = trial.job(tokens, scores_prompt=True, logprobs=1, max_tokens=1, client="younger")
    trial.loop.submit(older)
    trial.loop.step()
    trial.loop.submit(younger)
    trial.loop.step()
    assert 0 < trial.loop._running[younger].n_scored < 400
    trial.loop._preempt(trial.loop._running.pop(younger))  # as if cells had run out
    trial.finish()
    answered = trial.answered(younger)
    check(trial, tokens, prompt_of(answered, tokens), rows, 1)
    assert len(answered.logprobs[0]) == 401


def test_a_preempted_prompt_is_scored_once(llama: Path) -> None:
    in_child(preempted, llama)


def not_numbers(root: Path) -> None:
    trial = Trial(root)
    decode = trial.engine.decode

    def spoilt() -> int:
        status = decode()
        trial.engine.logits()[0] = np.nan
        return status

    trial.engine.decode = spoilt  # type: ignore[method-assign]
    broken, *_ = trial.run(trial.job(tokens_of(50), scores_prompt=True, logprobs=1, max_tokens=1))
    assert broken.code == "engine_failed"
    trial.engine.decode = decode  # type: ignore[method-assign]
    (answered,) = trial.run(trial.job(tokens_of(50), scores_prompt=True, logprobs=1, max_tokens=1))
    assert len(answered.logprobs[0]) == 51


def test_a_prompt_without_numbers_fails_alone(llama: Path) -> None:
    in_child(not_numbers, llama)
