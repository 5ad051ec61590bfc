"""Constrained answers in the real engine: a model with random weights says what its constraint allows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from shared.channel.messages import Sampling
from shared.synthetic.models import tiny_llama
from tests.support.child import in_child
from tests.support.generation import Trial, ids_of
from worker.chat.code import Trigger
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
GRAMMAR = r"""
root ::= ("yes" | "no" | "yesterday") (", " word){2,3} "!"  # lexemes would not split this right
word ::= [a-z]{1,4} "\u00e9"
"""
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


def in_language(root: Path) -> None:
    trial = Trial(root)
    pattern = re.compile(r"(yes|no|yesterday)(, [a-z]{1,4}é){2,3}!")
    gbnf = Constraint(kind="gbnf", text=GRAMMAR)
    samplings = [RANDOM, Sampling(temperature=0), Sampling(temperature=1.0, repeat_penalty=1.5), Sampling(top_k=1)]
    answers = trial.run(*[job(trial, gbnf, sampling=each, client=str(i)) for i, each in enumerate(samplings)])
    answers += trial.run(job(trial, gbnf, choices=3, logprobs=2))
    for answer in answers:
        assert set(answer.finishes.values()) == {"stop"}
        assert all(pattern.fullmatch(text) for text in answer.texts.values()), answer.texts


def test_an_answer_is_in_the_language_of_its_grammar(llama: Path) -> None:
    """In which a word is the beginning of another, and characters have several bytes."""
    in_child(in_language, llama)


def lazy(root: Path) -> None:
    trial = Trial(root)
    letters = dict.fromkeys(range(trial.engine.vocabulary.n_tokens), -100.0)
    vocabulary = trial.engine.vocabulary
    for text in ("x", "<"):
        letters[vocabulary.spelled(text)[0]] = 100.0
    constraint = Constraint(
        kind="gbnf", text='root ::= "<a>" [0-9]{3}', lazy=True, triggers=[Trigger("pattern", "x(<)")]
    )
    (answer,) = trial.run(job(trial, constraint, sampling=Sampling(temperature=1.0, logit_bias=letters)))
    assert re.fullmatch(r"<*x+<a>\d{3}", answer.texts[0]), answer.texts


def test_a_lazy_constraint_begins_at_its_trigger(llama: Path) -> None:
    in_child(lazy, llama)
