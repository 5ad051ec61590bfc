"""Vectors of a real model over HTTP: texts that mean the same are near each other."""

from __future__ import annotations

from typing import Any

import pytest

from tests.quality.test_engine import cosine
from tests.quality.test_load import MINILM
from tests.support.service import Service

PAIRS = [
    ("A man is eating food.", "A man eats something."),
    ("Stock prices fell sharply today.", "The share market dropped a lot this afternoon."),
    ("How do I reset my password?", "I forgot my login and need a new password."),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
]
CLOSE, FAR = 0.55, 0.35
NEAR = 1e-3


def vectors(service: Service, texts: list[str]) -> list[list[float]]:
    reply = service.post("/v1/embeddings", {"model": MINILM, "input": texts})
    assert reply.status == 200, reply.text
    data: list[Any] = reply.json()["data"]
    return [item["embedding"] for item in data]


def test_a_paraphrase_is_the_nearest_of_all_sentences(service: Service) -> None:
    texts = [text for pair in PAIRS for text in pair]
    found = vectors(service, texts)
    for i, one in enumerate(found):
        near = {j: cosine(one, other) for j, other in enumerate(found) if j != i}
        assert max(near, key=near.__getitem__) == i ^ 1, texts[i]
        assert near.pop(i ^ 1) > CLOSE
        assert max(near.values()) < FAR


def test_a_text_has_the_same_vector_among_others_as_alone(service: Service) -> None:
    texts = [text for pair in PAIRS for text in pair] * 4
    for text, vector in zip(texts[:8], vectors(service, texts), strict=False):
        assert vectors(service, [text])[0] == pytest.approx(vector, abs=NEAR)
