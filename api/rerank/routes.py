"""POST /v1/rerank, and the other paths under which clients look for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.answering import Ask
from api.decode import known, read_any
from api.openai.embeddings import TextUsage
from api.openai.fields import ttl_s
from api.openai.reply import check_draining
from api.rerank.forms import DOCUMENTS, TEXTS, Document, Ranked, RankedText, Ranking, RerankRequest, documents_of
from api.state import State
from api.vectors import Computed, computed
from shared.channel.messages import Rank
from shared.errors import UnsupportedOperation, WrongModelType

RANKS_NOT = "The model does not rank documents: it is not a reranker."


async def rerank(request: Request[State]) -> Response:
    """Score how well documents answer a query, and sort them."""
    check_draining(request)
    asked = known(await read_any(request, request.state["max_body_bytes"]), RerankRequest, ("query", DOCUMENTS, TEXTS))
    documents = documents_of(asked)
    order = Rank(id=0, client=request.state["caller"], query=asked.query, documents=documents)
    ask = Ask(
        model=asked.model,
        type="embedding",
        order=lambda _: order,
        route=request.scope["path"],
        prompt=DOCUMENTS if asked.texts is None else TEXTS,
        ttl_s=ttl_s(asked.ttl),
        traceparent=request.state["traceparent"],
    )
    try:
        result = await computed(request, ask)
    except WrongModelType:
        raise UnsupportedOperation(RANKS_NOT, param="model") from None
    reply = _texts(asked, documents, result) if asked.texts is not None else _ranking(asked, documents, result)
    return Response(msgspec.json.encode(reply), headers=result.headers, media_type="application/json")


def _best(asked: RerankRequest, result: Computed) -> Iterator[tuple[int, float]]:
    """Yield the numbers and the scores of the best documents, best first.  A model's first output is the score."""
    scores = [struct.unpack_from("<f", vector)[0] for vector in result.vectors()]
    for index in sorted(range(len(scores)), key=lambda index: -scores[index])[: asked.top_n]:
        yield index, scores[index]


def _ranking(asked: RerankRequest, documents: list[str], result: Computed) -> Ranking:
    n = result.usage.prompt_tokens
    return Ranking(
        model=result.instance.instance_id,
        usage=TextUsage(prompt_tokens=n, total_tokens=n),
        results=[
            Ranked(
                index=index,
                relevance_score=score,
                document=Document(text=documents[index]) if asked.return_documents else msgspec.UNSET,
            )
            for index, score in _best(asked, result)
        ],
    )


def _texts(asked: RerankRequest, texts: list[str], result: Computed) -> list[RankedText]:
    return [
        RankedText(index=index, score=score, text=texts[index] if asked.return_text else msgspec.UNSET)
        for index, score in _best(asked, result)
    ]
