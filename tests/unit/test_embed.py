"""`loadstone embed`: which texts it sends and what it writes, with a server that is a function."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice
from types import SimpleNamespace
from typing import Any

from cli.embed import MOST_TEXTS, embedded
from cli.openai import Embedding
from shared.schema.http import JobList


def server(sent: list[int]) -> Any:
    """Return a server whose embedding of a text is its number."""

    def embed(_model: str, texts: Sequence[str]) -> list[Embedding]:
        sent.append(len(texts))
        return [Embedding(i, [float(text)]) for i, text in enumerate(texts)]

    return SimpleNamespace(embed=embed, jobs=lambda **_: JobList(jobs=[]))


def test_many_texts_are_sent_in_parts_and_numbered_through() -> None:
    sent: list[int] = []
    n = 2 * MOST_TEXTS + 3
    made = [*embedded(server(sent), "p/m", (str(i) for i in range(n)))]
    assert [(one.index, one.embedding) for one in made] == [(i, [float(i)]) for i in range(n)]
    assert sent == [MOST_TEXTS, MOST_TEXTS, 3]


def test_a_stream_of_texts_is_embedded_as_it_comes() -> None:
    endless = map(str, count())
    assert len([*islice(embedded(server([]), "p/m", endless), 3)]) == 3
    assert next(endless) == str(MOST_TEXTS), "one request was read"


def test_no_texts_are_no_request() -> None:
    sent: list[int] = []
    assert [*embedded(server(sent), "p/m", ())] == []
    assert sent == []
