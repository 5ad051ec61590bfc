"""Vectors and scores of texts through the whole service, with tiny models of random weights."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shared import paths
from shared.synthetic import models as synthetic
from tests.support.service import TINY, Client, Reply, Service, openai_error, until, up

BERT, CAUSAL, RANKER = "acme/bert", "acme/causal", "acme/ranker"
QUERY, DOCUMENTS = "what is a panda", ["hello", "the giant panda is a bear", "a"]
NEAR = 2e-3  # of numbers: batches of other sizes use other kernels
CLIENTS = 8
TEXTS = ["hello", "world and more of it", "a", "one two three four five six", "the end"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("embeddings")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    synthetic.tiny_bert(home / f"models/{BERT}/bert-f32.gguf")
    synthetic.tiny_embedding(home / f"models/{CAUSAL}/causal-f16.gguf")
    synthetic.tiny_reranker(home / f"models/{RANKER}/ranker-f32.gguf")
    with up(home) as service:
        yield service


def ask(client: Client, **fields: Any) -> Reply:
    return client.post(paths.EMBEDDINGS, {"model": BERT, **fields})


def answered(client: Client, **fields: Any) -> Any:
    """Return the reply to a request that must succeed."""
    reply = ask(client, **fields)
    assert reply.status == 200, reply.text
    whole = reply.json()
    assert reply.headers["loadstone-instance"] == whole["model"]
    assert whole["object"] == "list"
    assert [(item["object"], item["index"]) for item in whole["data"]] == [
        ("embedding", i) for i in range(len(whole["data"]))
    ]
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] > 0
    return whole


def vectors(client: Client, **fields: Any) -> list[list[float]]:
    return [item["embedding"] for item in answered(client, **fields)["data"]]


def rank(client: Client, path: str = paths.RERANK, **fields: Any) -> Reply:
    return client.post(path, {"model": RANKER, "query": QUERY, **fields})


@pytest.mark.parametrize("model", [BERT, CAUSAL])
def test_texts_have_vectors_in_their_order(service: Service, model: str) -> None:
    """The first request loads the model."""
    together = vectors(service, model=model, input=[*TEXTS, TEXTS[0]])
    assert together[0] == pytest.approx(together[-1], abs=NEAR)
    for text, vector in zip(TEXTS, together, strict=False):
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
        (alone,) = vectors(service, model=model, input=text)
        assert alone == pytest.approx(vector, abs=NEAR)
    assert together[0] != pytest.approx(together[1], abs=NEAR)


def test_clients_that_ask_at_once_get_their_own_vectors(service: Service) -> None:
    alone = {text: vectors(service, input=text)[0] for text in TEXTS}

    def asked(i: int) -> tuple[list[str], list[list[float]]]:
        texts = [TEXTS[(i + j) % len(TEXTS)] for j in range(i % 4 + 1)]
        return texts, vectors(service, input=texts)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for texts, found in pool.map(asked, range(4 * CLIENTS)):
            for text, vector in zip(texts, found, strict=True):
                assert vector == pytest.approx(alone[text], abs=NEAR)


def test_tokens_are_taken_as_they_are(service: Service) -> None:
    first, second = vectors(service, input=[[5, 6, 7], [8]])
    assert vectors(service, input=[5, 6, 7]) == [pytest.approx(first, abs=NEAR)]
    assert vectors(service, input=[8]) == [pytest.approx(second, abs=NEAR)]
    assert answered(service, input=[[5, 6, 7], [8]])["usage"]["prompt_tokens"] == 4


def test_vectors_come_as_bytes_and_shorter(service: Service) -> None:
    (whole,) = vectors(service, input="hello")
    (encoded,) = answered(service, input="hello", encoding_format="base64")["data"]
    assert array("f", base64.b64decode(encoded["embedding"])).tolist() == pytest.approx(whole, abs=NEAR)
    (short,) = vectors(service, input="hello", dimensions=4)
    length = math.hypot(*whole[:4])
    assert short == pytest.approx([number / length for number in whole[:4]], abs=NEAR)
    message = openai_error(
        ask(service, input="hello", dimensions=len(whole) + 1),
        400,
        "invalid_request_error",
        "invalid_value",
        "dimensions",
    )
    assert f"1 to {len(whole)}" in message


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"input": ""}, "invalid_value", "input", "must not be empty"),
        ({"input": ["a", ""]}, "invalid_value", "input", "must not be empty"),
        ({"input": []}, "invalid_value", "input", ""),
        ({"input": [[]]}, "invalid_value", "input[0]", ""),
        ({}, "missing_required_parameter", "input", "required"),
        ({"input": ["a"] * 2049}, "invalid_value", "input", "2,048"),
        ({"input": {"text": "a"}}, "invalid_type", "input", ""),
        ({"input": ["a", [5]]}, "invalid_type", "input", "not several"),
        ({"input": [5, [5]]}, "invalid_type", "input", "not several"),
        ({"input": [5, 10**6]}, "invalid_value", "input", "OpenAI's models"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_value", "encoding_format", ""),
        ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions", ""),
        ({"input": "a", "model": TINY}, "invalid_value", "model", "LLM"),
    ],
)
def test_what_is_no_request_for_embeddings_is_refused(
    service: Service, fields: dict[str, Any], code: str, param: str, words: str
) -> None:
    message = openai_error(ask(service, **fields), 400, "invalid_request_error", code, param)
    assert words in message


def test_a_text_that_is_too_long_is_refused_with_numbers(service: Service) -> None:
    reply = ask(service, input=["short", "word " * 3000])
    (fields,) = reply.json().values()
    assert (reply.status, fields["type"]) == (400, "exceed_context_size_error")
    assert (fields["code"], fields["param"]) == ("context_length_exceeded", "input")
    assert fields["n_prompt_tokens"] > fields["n_ctx"] > 0
    assert "too large" in fields["message"]
    assert "This model's maximum context length is" in fields["message"]
    assert "exceeds the available context size" in fields["message"]


def test_without_a_name_the_only_loaded_embedding_model_answers(service: Service) -> None:
    openai_error(
        ask(service, model=None, input="a"), 400, "invalid_request_error", "missing_required_parameter", "model"
    )
    service.loaded(TINY)
    service.loaded(CAUSAL)
    assert answered(service, model=None, input="a")["model"] == CAUSAL
    service.loaded(BERT)
    refused = until(
        lambda: reply if (reply := ask(service, model=None, input="a")).status != 200 else None, "both seen"
    )
    message = openai_error(refused, 400, "invalid_request_error", "missing_required_parameter", "model")
    assert "2 embedding models" in message


def test_requests_are_counted_with_their_tokens(service: Service) -> None:
    tokens = answered(service, input=TEXTS)["usage"]["prompt_tokens"]

    def counted() -> tuple[float, float] | None:
        try:
            done = service.metric("requests_total", route=paths.EMBEDDINGS, outcome="completed")
            return done, service.metric("prompt_tokens_total")
        except ValueError:
            return None

    before = until(counted, "the first counts")
    answered(service, input=TEXTS)
    until(lambda: counted() == (before[0] + 1, before[1] + tokens) or None, "one more request, and its tokens")


@pytest.mark.parametrize("path", paths.RERANKS)
def test_documents_are_sorted_by_their_scores(service: Service, path: str) -> None:
    reply = rank(service, path, documents=DOCUMENTS, return_documents=True)
    assert reply.status == 200, reply.text
    whole = reply.json()
    assert (whole["object"], whole["model"]) == ("list", RANKER)
    assert reply.headers["loadstone-instance"] == RANKER
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] > 0
    results = whole["results"]
    assert sorted(one["index"] for one in results) == [0, 1, 2]
    scores = [one["relevance_score"] for one in results]
    assert scores == sorted(scores, reverse=True)
    assert all(one["document"] == {"text": DOCUMENTS[one["index"]]} for one in results)
    for one in results:
        (alone,) = rank(service, path, documents=[DOCUMENTS[one["index"]]]).json()["results"]
        assert alone == {"index": 0, "relevance_score": pytest.approx(one["relevance_score"], abs=NEAR)}
    best = rank(service, path, documents=DOCUMENTS, top_n=2).json()["results"]
    assert [one["index"] for one in best] == [one["index"] for one in results[:2]]


def test_texts_are_ranked_in_the_form_of_tei(service: Service) -> None:
    results = rank(service, documents=DOCUMENTS).json()["results"]
    reply = rank(service, texts=DOCUMENTS, return_text=True)
    assert reply.status == 200, reply.text
    assert [one["index"] for one in reply.json()] == [one["index"] for one in results]
    assert all(set(one) == {"index", "score", "text"} for one in reply.json())
    assert all(one["text"] == DOCUMENTS[one["index"]] for one in reply.json())


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "documents"),
        ({"documents": []}, "invalid_value", "documents"),
        ({"documents": ["a", 5]}, "invalid_type", "documents[1]"),
        ({"documents": "a"}, "invalid_type", "documents"),
        ({"documents": ["a"], "texts": ["a"]}, "invalid_value", "texts"),
        ({"documents": ["a"], "query": 5}, "invalid_type", "query"),
        ({"documents": ["a"], "top_n": 0}, "invalid_value", "top_n"),
    ],
)
def test_what_is_no_request_to_rank_is_refused(service: Service, fields: dict[str, Any], code: str, param: str) -> None:
    openai_error(rank(service, **fields), 400, "invalid_request_error", code, param)


@pytest.mark.parametrize("model", [TINY, BERT])
def test_a_model_that_is_no_reranker_ranks_nothing(service: Service, model: str) -> None:
    reply = rank(service, model=model, documents=DOCUMENTS)
    openai_error(reply, 501, "not_supported_error", "unsupported_operation", "model")
    assert reply.headers["x-should-retry"] == "false"


def test_a_reranker_computes_no_embeddings(service: Service) -> None:
    message = openai_error(
        ask(service, model=RANKER, input="a"), 400, "invalid_request_error", "invalid_value", "model"
    )
    assert "ranks documents" in message


def test_a_document_that_is_too_long_is_refused(service: Service) -> None:
    (fields,) = rank(service, documents=["word " * 3000]).json().values()
    assert (fields["code"], fields["param"]) == ("context_length_exceeded", "documents")
