"""POST /v1/embeddings: the vectors of texts.

The fields are those of OpenAI's API, with LM Studio's `ttl`.  `null` means absent, and unknown keys are ignored.
"""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from api.answering import Ask
from api.decode import known, read_any
from api.openai.fields import TokenId, ttl_s
from api.openai.reply import check_draining
from api.state import State
from api.vectors import FLOAT_BYTES, Computed, computed
from shared.channel.messages import Embed
from shared.errors import InvalidType, InvalidValue

INPUT = "input"
MOST_TEXTS = 2048  # as OpenAI has it
MOST_TOKENS = 1 << 20  # of all texts that are given as tokens
AT_ONCE = 16_384  # numbers that are written without a pause for other requests


class EmbeddingRequest(Struct, frozen=True, kw_only=True):
    """A request for embeddings.  Unknown fields are ignored, and `null` means absent."""

    input: Annotated[
        str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)],
        Meta(
            description="A text, or an array of token ids of this model, or an array of texts or of such arrays: at "
            f"most {MOST_TEXTS:,} of them. The ids of another model's tokenizer mean other texts here. A text gets the "
            "tokens with which the model begins and ends every text; tokens are taken as they are."
        ),
    ]
    model: Annotated[
        str | None,
        Meta(
            description="A model key or alias, or the id of a loaded instance. Absent: the only loaded embedding model."
        ),
    ] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Meta(description="`base64`: little-endian 32-bit floats. Default: `float`, an array of numbers."),
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="Return only the first numbers of each vector, so many, scaled to length 1 again. Use it with "
            "models that were trained for that."
        ),
    ] = None
    ttl: Annotated[
        Any,
        Meta(
            description="If the request loads the model: unload it after this many seconds without use. What is no "
            "number > 0 is ignored."
        ),
    ] = None


class Embedding(Struct, frozen=True, kw_only=True):
    """The vector of a text."""

    object: Annotated[Literal["embedding"], Meta(description="Always `embedding`.")] = "embedding"
    index: Annotated[int, Meta(description="The number of the text in the request, from 0.")]
    embedding: Annotated[list[float] | str, Meta(description="The vector, of length 1, in the format asked for.")]


class TextUsage(Struct, frozen=True, kw_only=True):
    """The tokens of a request."""

    prompt_tokens: Annotated[int, Meta(description="Tokens of all texts.")]
    total_tokens: Annotated[int, Meta(description="The same.")]


class EmbeddingList(Struct, frozen=True, kw_only=True):
    """The vectors of texts."""

    object: Annotated[Literal["list"], Meta(description="Always `list`.")] = "list"
    data: Annotated[list[Embedding], Meta(description="The vectors, in the order of the texts.")]
    model: Annotated[str, Meta(description="The id of the instance that computed them.")]
    usage: Annotated[TextUsage, Meta(description="The tokens of the request.")]


async def embeddings(request: Request[State]) -> Response:
    """Compute the vectors of texts, also for LM Studio's older API, which has the same form."""
    asked, result = await embedded(request, request.scope["route"].path)
    n = result.usage.prompt_tokens
    reply = {
        "object": "list",
        "data": await written(result, asked),
        "model": result.instance.instance_id,
        "usage": TextUsage(prompt_tokens=n, total_tokens=n),
    }
    return Response(msgspec.json.encode(reply), headers=result.headers, media_type="application/json")


async def embedded(request: Request[State], route: str) -> tuple[EmbeddingRequest, Computed]:
    """Read a request for embeddings, and return it with what a model computed for it."""
    check_draining(request)
    asked = known(await read_any(request, request.state["max_body_bytes"]), EmbeddingRequest, (INPUT,))
    order = ordered(asked, request.state["caller"])
    ask = Ask(
        model=asked.model,
        type="embedding",
        order=lambda _: order,
        route=route,
        prompt=INPUT,
        ttl_s=ttl_s(asked.ttl),
        traceparent=request.state["traceparent"],
    )
    return asked, await computed(request, ask)


def ordered(asked: EmbeddingRequest, client: str) -> Embed:
    """Translate a request for a runner, without an id.  Raises InvalidType and InvalidValue."""
    given = [asked.input] if isinstance(asked.input, str) else asked.input
    ids = [one for one in given if isinstance(one, int)]
    texts = [one for one in given if isinstance(one, str)]
    tokens = [ids] if ids else [one for one in given if isinstance(one, list)]
    if len(given) not in (len(texts), len(ids), len(tokens)):
        raise InvalidType(
            f"'{INPUT}': expected a text, texts, token ids, or arrays of token ids, not several of these.", param=INPUT
        )
    if max(len(texts), len(tokens)) > MOST_TEXTS:
        raise InvalidValue(f"'{INPUT}': expected at most {MOST_TEXTS:,} texts, got {len(given):,}.", param=INPUT)
    if "" in texts:
        raise InvalidValue(f"'{INPUT}': a text must not be empty.", param=INPUT)
    if (n := sum(map(len, tokens))) > MOST_TOKENS:
        raise InvalidValue(f"'{INPUT}': expected at most {MOST_TOKENS:,} tokens, got {n:,}.", param=INPUT)
    return Embed(id=0, client=client, texts=texts, tokens=tokens)


async def written(result: Computed, asked: EmbeddingRequest) -> list[msgspec.Raw]:
    """Return the vectors in JSON.  Other requests go on meanwhile: two million numbers take a while.

    Raises InvalidValue if the vectors are shorter than the request wants them.
    """
    items: list[msgspec.Raw] = []
    n_numbers = 0
    for vector in result.vectors():
        short = cut(vector, asked.dimensions)
        form = base64.b64encode(short).decode() if asked.encoding_format == "base64" else array("f", short).tolist()
        items.append(msgspec.Raw(msgspec.json.encode(Embedding(index=len(items), embedding=form))))
        n_numbers += len(vector) // FLOAT_BYTES
        if n_numbers > AT_ONCE:
            n_numbers = 0
            await asyncio.sleep(0)
    return items


def cut(vector: bytes, dimensions: int | None) -> bytes:
    """Return the first numbers of a vector, scaled to length 1.  Raises InvalidValue if there are fewer."""
    size = len(vector) // FLOAT_BYTES
    if dimensions is None or dimensions == size:
        return vector
    if dimensions > size:
        raise InvalidValue(
            f"'dimensions': expected a number from 1 to {size}, the size of the model's vectors, got {dimensions}.",
            param="dimensions",
        )
    numbers = array("f", vector[: dimensions * FLOAT_BYTES])
    length = math.hypot(*numbers) or 1.0
    return array("f", [number / length for number in numbers]).tobytes()
