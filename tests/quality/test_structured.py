"""Structured output of SmolLM2 in the engine loop: what its answers are."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema_rs
import pytest

from shared.channel.messages import Sampling
from tests.quality.test_generation import CAPITAL, PROMPT
from tests.support.child import in_child
from tests.support.generation import Trial
from worker.chat.protocol import Constraint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "country": {"type": "string", "maxLength": 40},
        "born": {"type": "integer", "minimum": 0, "maximum": 2100},
        "works": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "country", "born", "works"],
    "additionalProperties": False,
}
ASKED = PROMPT.format("Who wrote the play Hamlet? Answer as JSON with name, country, born and works.")


@pytest.fixture(scope="module")
def root(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with SmolLM2 only."""
    path = tmp_path_factory.mktemp("smollm2") / "models/p/m/m.gguf"
    path.parent.mkdir(parents=True)
    path.symlink_to(smollm2)
    return path.parents[2]


def answers(root: Path) -> None:
    trial = Trial(root)
    compiled = trial.loop.constrain(Constraint(kind="json_schema", text=json.dumps(PERSON))).result()
    options = {"constraint": compiled, "max_tokens": 300}
    greedy, random = trial.run(
        trial.job(ASKED, sampling=Sampling(temperature=0), **options),
        trial.job(ASKED, sampling=Sampling(seed=1), choices=3, **options),
    )
    assert {*greedy.finishes.values(), *random.finishes.values()} == {"stop"}
    for text in [*greedy.texts.values(), *random.texts.values()]:
        jsonschema_rs.validate(PERSON, json.loads(text))
    capital = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 30}},
        "required": ["capital"],
    }
    compiled = trial.loop.constrain(Constraint(kind="json_schema", text=json.dumps(capital))).result()
    (answer,) = trial.run(trial.job(CAPITAL, sampling=Sampling(temperature=0), constraint=compiled, max_tokens=300))
    assert json.loads(answer.texts[0])["capital"] == "Paris"


def test_answers_are_json_of_their_schema(root: Path) -> None:
    in_child(answers, root)
