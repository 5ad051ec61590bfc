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
from worker.chat.constraint import ConstraintError
from worker.chat.protocol import Constraint
from worker.engine.constrain import KEPT

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


def lazy_after_reasoning(root: Path) -> None:
    trial = Trial(root)
    vocabulary = trial.engine.vocabulary

    def is_on(text: str, ends: list[str]) -> bool:
        constraint = Constraint(
            kind="gbnf",
            text='root ::= "<a>" [0-9]{3}',
            lazy=True,
            triggers=[Trigger("word", "<a>")],
            thinking_start="<t>",
            thinking_ends=ends,
        )
        begun = trial.loop.constrain(constraint).result().begin()
        for token in vocabulary.spelled(text):
            begun.accept(token)
        return begun._is_on

    long = "b" * 3000
    for text, ends, expected in (
        ("<a>", ["</t>"], True),
        (f"{long}<a>", ["</t>"], True),
        (f"<t>{long}<a>", ["</t>"], False),
        (f" <t>{long}</t><a>", ["</t>"], True),
        (f"<t>{long}<a>{long}</t>{long}<a", ["</t>"], False),
        (f"<t>{long}<a>", ["</t>", "<a>"], True),  # a call may end the reasoning
    ):
        assert is_on(text, ends) == expected, (text[:9], text[-9:], ends)


def test_a_lazy_constraint_does_not_begin_within_reasoning(llama: Path) -> None:
    in_child(lazy_after_reasoning, llama)


def prefixed(root: Path) -> None:
    trial = Trial(root)
    constraint = Constraint(kind="gbnf", text='root ::= "the end" [0-9]{2}', prefix="the e")
    (answer,) = trial.run(job(trial, constraint))
    assert re.fullmatch(r"nd\d\d", answer.texts[0]), answer.texts
    with pytest.raises(ConstraintError, match="it does not match the end of the prompt"):
        trial.loop.constrain(Constraint(kind="gbnf", text='root ::= "the end"', prefix="another")).result()


def test_a_grammar_may_begin_with_the_end_of_the_prompt(llama: Path) -> None:
    in_child(prefixed, llama)


def thinking(root: Path) -> None:
    trial = Trial(root)
    vocabulary = trial.engine.vocabulary
    ends = dict.fromkeys(vocabulary.ends(), 50.0)
    constraint = schema({"const": 5}, thinking_start="<t>", thinking_ends=["</t>"])
    begin = vocabulary.spelled("<t>")[0]
    (silent,) = trial.run(job(trial, constraint, sampling=Sampling(logit_bias={begin: -100.0})))
    assert (silent.texts, silent.finishes) == ({0: "5"}, {0: "stop"})
    (begun,) = trial.run(job(trial, constraint, sampling=Sampling(logit_bias={begin: 100.0, **ends}), max_tokens=9))
    assert begun.texts[0].startswith("<t>")
    assert begun.finishes == {0: "length"}
    letters: dict[int, float] = dict.fromkeys(range(vocabulary.n_tokens), -100.0)
    letters |= {vocabulary.spelled(text)[0]: 0.0 for text in ("t", ">")}
    within = schema({"const": 5}, is_thinking=True, thinking_ends=["t>"])
    sampling = Sampling(temperature=5.0, logit_bias={**letters, **ends})
    (answer,) = trial.run(job(trial, within, sampling=sampling, max_tokens=2000))
    assert re.fullmatch(">*t+>5", answer.texts[0]), answer.texts


def test_reasoning_before_a_constraint_is_free(llama: Path) -> None:
    """The model may begin with it, or the prompt does.  It cannot end the answer."""
    in_child(thinking, llama)


def preempted(root: Path) -> None:
    trial = Trial(root, parallel=3, context_length=1024)
    numbers = schema(
        {"type": "array", "items": {"enum": [91827364, 82736455, 73645546]}, "minItems": 70, "maxItems": 70}
    )
    answers = trial.run(*[job(trial, numbers, client=str(i), max_tokens=700) for i in range(3)])
    assert trial.loop.counters.preemptions > 0
    assert [len(json.loads(answer.texts[0])) for answer in answers] == [70] * 3


def test_a_preempted_answer_keeps_its_constraint(llama: Path) -> None:
    in_child(preempted, llama)


def cut(root: Path) -> None:
    trial = Trial(root)
    endless = schema({"type": "array", "items": {"const": 1}, "minItems": 1000})
    (full,) = trial.run(job(trial, endless, max_tokens=20))
    assert (full.finishes, full.texts[0][:5]) == ({0: "length"}, "[1,1,")
    (stopped,) = trial.run(job(trial, endless, stop=["1,1,1"]))
    assert (stopped.finishes, stopped.texts) == ({0: "stop"}, {0: "["})
    dead = Constraint(kind="gbnf", text='root ::= "a" x\nx ::= x "b"')
    (failed,) = trial.run(job(trial, dead))
    assert failed.code == "engine_failed"
    assert "no text satisfies" in failed.last.message


def test_an_answer_that_cannot_end_is_cut_or_fails(llama: Path) -> None:
    in_child(cut, llama)


def kept(root: Path) -> None:
    trial = Trial(root)
    first = trial.loop.constrain(schema(PERSON)).result()
    for i in range(KEPT - 1):
        trial.loop.constrain(schema({"const": i})).result()
    assert trial.loop.constrain(schema(PERSON)).result().matcher is first.matcher
    trial.loop.constrain(schema({"const": "another"})).result()
    assert trial.loop.constrain(schema(PERSON)).result().matcher is first.matcher
    for i in range(KEPT):
        trial.loop.constrain(schema({"const": i})).result()
    assert trial.loop.constrain(schema(PERSON)).result().matcher is not first.matcher


def test_constraints_stay_compiled_while_they_are_used(llama: Path) -> None:
    in_child(kept, llama)
