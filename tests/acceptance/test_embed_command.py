"""`loadstone embed` against a running service."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import LOADSTONE, TINY, Service, until, up

VECTORS = "acme/vectors"
ENDS_S = 60.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("embed")
    synthetic.tiny_bert(home / f"models/{VECTORS}/vectors-f32.gguf")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with up(home) as running:
        until(lambda: set(running.models()) == {VECTORS, TINY}, "the models are listed")
        yield running


def run(service: Service, *words: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LOADSTONE), "embed", *words],
        env={"PATH": os.environ["PATH"], "LOADSTONE_URL": service.url},
        input=lines,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )


def expected(service: Service, *texts: str) -> list[Any]:
    """Return what the API has for texts, as the command writes it."""
    reply = service.post("/v1/embeddings", {"model": VECTORS, "input": texts})
    assert reply.status == 200, reply.text
    return [{"index": one["index"], "embedding": pytest.approx(one["embedding"])} for one in reply.json()["data"]]


def test_each_text_is_a_line_of_json(service: Service) -> None:
    done = run(service, VECTORS, "Hello", "World")  # which loads the model
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected(service, "Hello", "World")
    piped = run(service, VECTORS, lines="Hello\nWorld\n")
    assert (piped.returncode, piped.stdout) == (0, done.stdout)


def test_with_json_there_is_one_document(service: Service) -> None:
    done = run(service, VECTORS, "Hello", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"data": expected(service, "Hello")}


@pytest.mark.parametrize(("model", "message"), [(TINY, TINY), ("acme/nothing", "not found")])
def test_a_model_without_embeddings_is_refused(service: Service, model: str, message: str) -> None:
    done = run(service, model, "Hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
