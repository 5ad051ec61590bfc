"""Published clients against the whole service, which asks for a token: tools, reasoning, objects and errors.

A model recites its reasoning, a text and a call of a tool; another one writes objects that a schema describes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.families import ARGUMENTS, FAMILIES, TOOL, template
from tests.support.published import DRIVERS, run
from tests.support.reciting import reciting
from tests.support.service import TINY, Service, up
from worker.chat.code import ChatCode

RECITING, EMBEDDING = "acme/reciting", "acme/embedding"
TOKEN = "a-token-for-published-clients"
CALL = ["get_weather", json.loads(ARGUMENTS)]
SAID, THOUGHT = "I will look.", "Paris, two days."
ERRORS = {"400": "BadRequestError", "401": "AuthenticationError", "404": "NotFoundError"}
SPEAKS, ALL = {"said", "called", "objects"}, {"said", "called", "thought", "objects", "vectors"}
ANTHROPIC, OPENAI = {*SPEAKS, "thought", "counted"}, {*ALL, "continued"}
# What a client reads (see `check`), and the errors that it raises.
NODE: dict[str, tuple[set[str], dict[str, str]]] = {
    "openai": (OPENAI, ERRORS),
    "anthropic": (ANTHROPIC, ERRORS),
    "langchain": ({*SPEAKS, "vectors"}, ERRORS),
    "ai_sdk": (ALL, {"401": "401", "404": "404"}),  # one class, with the status
}
PYTHON: dict[str, tuple[set[str], dict[str, str]]] = {
    "openai": (OPENAI, ERRORS),
    "anthropic": (ANTHROPIC, ERRORS),
    "langchain": (
        {*SPEAKS, "vectors"},
        {
            "400": "OpenAIInvalidRequestError",
            "401": "OpenAIAuthenticationError",
            "404": "AnthropicModelNotFoundError",
        },
    ),
    "litellm": (ALL, ERRORS),
    "llama_index": ({*SPEAKS, "vectors"}, ERRORS),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("forms")
    models = home / "models"
    synthetic.tiny_llama(models / TINY / "tiny-f16.gguf")
    synthetic.tiny_embedding(models / EMBEDDING / "embedding-f16.gguf")
    name, answer, _ = FAMILIES["Qwen3"]
    source = template(name)
    request = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "tools": [TOOL]}).encode()
    rendered = ChatCode().templates(source).render(request)
    path = models / RECITING / "recites-f32.gguf"
    reciting(path, answer, source, special={*rendered.preserved_tokens}, after=rendered.generation_prompt)
    (home / "tokens").write_text(f"{TOKEN} name=clients scope=infer\n")
    with up(home, token=TOKEN, LOADSTONE_API_TOKENS_FILE=str(home / "tokens")) as service:
        yield service


def check(read: Any, parts: set[str], errors: dict[str, str]) -> None:
    failures = read.pop("failures")
    assert {status: name for status, (name, _) in failures.items()} == errors
    for status, word in (("400", "messages"), ("401", "token"), ("404", "no/such-model")):
        assert status not in failures or word in failures[status][1]
    assert {*read} == parts
    assert all(read.values())
    assert {text.strip() for text in read.get("said", [])} <= {SAID}
    assert {text.strip() for text in read.get("thought", [])} <= {THOUGHT}
    assert all(call == CALL for call in read.get("called", []))
    for made in read.get("objects", []):
        assert {*made} == {"name", "alive"}
        assert made["name"] in ("Ada", "Grace")
        assert isinstance(made["alive"], bool)


def arguments(service: Service) -> tuple[str, ...]:
    return service.url, TOKEN, RECITING, TINY, EMBEDDING


@pytest.mark.parametrize("name", NODE)
def test_a_client_for_node_uses_what_is_served(node: Path, service: Service, name: str) -> None:
    check(json.loads(run("node", str(node / f"{name}_forms.mjs"), *arguments(service))), *NODE[name])


@pytest.mark.parametrize("name", PYTHON)
def test_a_client_for_python_uses_what_is_served(python: Path, service: Service, name: str) -> None:
    written = run(str(python), str(DRIVERS / f"{name}_forms.py"), *arguments(service))
    check(json.loads(written.splitlines()[-1]), *PYTHON[name])
