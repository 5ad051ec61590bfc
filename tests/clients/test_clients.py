"""Published clients against the whole service: each reads one answer in all its ways, and two refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.published import DRIVERS, run
from tests.support.service import TINY, Service, up

CONTEXT = 256
LONG = "word " * CONTEXT
# What a client makes of an unknown model, and of a prompt that is too long: an exception, and OpenAI's code if it
# keeps that.
UNKNOWN, OVERFLOW = "model_not_found", "context_length_exceeded"
NODE = {
    "openai": (("NotFoundError", UNKNOWN), ("BadRequestError", OVERFLOW)),
    "langchain": (("NotFoundError", UNKNOWN), ("ContextOverflowError", None)),
    "ai_sdk": (("AI_APICallError", UNKNOWN), ("AI_APICallError", OVERFLOW)),
}
PYTHON = {
    "langchain": (("NotFoundError", UNKNOWN), ("ContextOverflowError", OVERFLOW)),
    "litellm": (("NotFoundError", None), ("ContextWindowExceededError", None)),
    "llama_index": (("NotFoundError", UNKNOWN), ("BadRequestError", OVERFLOW)),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("clients")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with up(home) as service:
        service.loaded(TINY, context_length=CONTEXT)
        yield service


def check(read: Any, refused: tuple[str, str | None], overflow: tuple[str, str | None]) -> None:
    first, *others = read["answers"]
    assert first
    assert others
    assert {*others} == {first}
    assert {*read["tokens"]} <= {*range(1, 9)}
    assert read["finish"] in ("length", "stop")
    assert read["refused"] == {"name": refused[0], "code": refused[1]}
    assert read["overflow"] == {"name": overflow[0], "code": overflow[1]}


@pytest.mark.parametrize("name", NODE)
def test_a_client_for_node_reads_an_answer(node: Path, service: Service, name: str) -> None:
    written = run("node", str(node / f"{name}.mjs"), f"{service.url}/v1", TINY, LONG)
    check(json.loads(written), *NODE[name])


@pytest.mark.parametrize("name", PYTHON)
def test_a_client_for_python_reads_an_answer(python: Path, service: Service, name: str) -> None:
    written = run(str(python), str(DRIVERS / f"{name}_driver.py"), f"{service.url}/v1", TINY, LONG)
    read = json.loads(written.splitlines()[-1])
    check(read, *PYTHON[name])
    if name == "llama_index":  # its class for LM Studio
        assert {*read["native"]} == {read["answers"][0]}
