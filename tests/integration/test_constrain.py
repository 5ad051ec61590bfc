"""Constrained answers in the real engine: a model with random weights says what its constraint allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from shared.channel.messages import Sampling
from shared.synthetic.models import tiny_llama
from tests.support.child import in_child
from tests.support.generation import Trial, ids_of
from worker.chat.protocol import Constraint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
RANDOM = Sampling(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama") / "models"
    tiny_llama(root / "p/m/m.gguf", tokenizer="bpe")
    return root


def schema(value: Any, **options: Any) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(value), **options)


def job(trial: Trial, constraint: Constraint, **options: Any) -> Any:
    compiled = trial.loop.constrain(constraint).result()
    return trial.job("Hello", **{"constraint": compiled, "max_tokens": 400, "sampling": RANDOM, **options})


def valid(root: Path) -> None:
    trial = Trial(root)
    validator = jsonschema_rs.validator_for(PERSON)
    answers = trial.run(*[job(trial, schema(PERSON), choices=2, client=str(i)) for i in range(2)])
    answers += trial.run(job(trial, schema(PERSON), logprobs=3))
    answers += trial.run(job(trial, schema(PERSON), sampling=Sampling(temperature=0)))
    answers += trial.run(job(trial, schema(PERSON), sampling=Sampling(temperature=1.0, repeat_penalty=1.3)))
    texts = [text for answer in answers for text in answer.texts.values()]
    assert len(texts) == 7
    assert {finish for answer in answers for finish in answer.finishes.values()} == {"stop"}
    for text in texts:
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
        assert validator.is_valid(json.loads(text)), text
    assert all(logprob.logprob < 0 for logprob in answers[2].logprobs[0])
    assert b"".join(ids_of(answers[2])).decode(errors="replace") == answers[2].texts[0]


def test_an_answer_matches_its_schema(llama: Path) -> None:
    """Alone, beside others, of several answers, with log probabilities, with penalties, and the most probable one."""
    in_child(valid, llama)
