"""What clients send to have documents ranked, and what they get."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from api.openai.embeddings import TextUsage
from shared.errors import InvalidValue, MissingParameter

DOCUMENTS, TEXTS = "documents", "texts"
MOST_DOCUMENTS = 2048


class RerankRequest(Struct, frozen=True, kw_only=True):
    """A request to rank documents.  Unknown fields are ignored, and `null` means absent."""

    query: Annotated[str, Meta(description="What the documents are to answer.")]
    documents: Annotated[
        list[str] | None, Meta(description=f"The documents, as Jina and Cohere have them: at most {MOST_DOCUMENTS:,}.")
    ] = None
    texts: Annotated[
        list[str] | None,
        Meta(description="The same as Text Embeddings Inference has them. The reply is then an array in its form."),
    ] = None
    model: Annotated[
        str | None,
        Meta(
            description="The key or alias of a reranker, or the id of a loaded instance. Absent: the only loaded "
            "embedding model."
        ),
    ] = None
    top_n: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="Return only so many documents, the best ones.")
    ] = None
    return_documents: Annotated[bool | None, Meta(description="Return the documents too.")] = None
    return_text: Annotated[bool | None, Meta(description="The same for `texts`.")] = None
    ttl: Annotated[
        Any,
        Meta(
            description="If the request loads the model: unload it after this many seconds without use. What is no "
            "number > 0 is ignored."
        ),
    ] = None


class Document(Struct, frozen=True, kw_only=True):
    """A document."""

    text: Annotated[str, Meta(description="The text.")]


class Ranked(Struct, frozen=True, kw_only=True):
    """The score of a document."""

    index: Annotated[int, Meta(description="The number of the document in the request, from 0.")]
    relevance_score: Annotated[float, Meta(description="The score, as the model computes it; higher is better.")]
    document: Annotated[Document | UnsetType, Meta(description="The document, with `return_documents`.")] = UNSET


class Ranking(Struct, frozen=True, kw_only=True):
    """The scores of documents."""

    object: Annotated[Literal["list"], Meta(description="Always `list`.")] = "list"
    model: Annotated[str, Meta(description="The id of the instance that computed them.")]
    usage: Annotated[TextUsage, Meta(description="The tokens of the request; the query counts for each document.")]
    results: Annotated[list[Ranked], Meta(description="The documents, best first.")]


class RankedText(Struct, frozen=True, kw_only=True):
    """The score of a text, in the form of Text Embeddings Inference."""

    index: Annotated[int, Meta(description="The number of the text in the request, from 0.")]
    score: Annotated[float, Meta(description="The score, as the model computes it; higher is better.")]
    text: Annotated[str | UnsetType, Meta(description="The text, with `return_text`.")] = UNSET


def documents_of(asked: RerankRequest) -> list[str]:
    """Return the documents of a request.  Raises MissingParameter and InvalidValue."""
    param = DOCUMENTS if asked.texts is None else TEXTS
    documents = asked.documents if asked.texts is None else asked.texts
    if documents is None:
        raise MissingParameter(f"'{DOCUMENTS}' is required.", param=DOCUMENTS)
    if asked.documents is not None and asked.texts is not None:
        raise InvalidValue(f"'{DOCUMENTS}' and '{TEXTS}' exclude each other.", param=TEXTS)
    if not documents:
        raise InvalidValue(f"'{param}': expected at least one document.", param=param)
    if len(documents) > MOST_DOCUMENTS:
        message = f"'{param}': expected at most {MOST_DOCUMENTS:,} documents, got {len(documents):,}."
        raise InvalidValue(message, param=param)
    return documents
