"""POST /v1/completions: a model continues prompts, with no template.

The fields are those of OpenAI's API for its older models, and of llama.cpp's server.  As there, `null` means absent,
and unknown keys are ignored.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from api.answering import Ask
from api.decode import known, read_any
from api.openai.fields import TextRequest, TokenId, check_choices, check_sampling, limit, sampling, stops, ttl_s
from api.openai.reply import Around, Form, check_draining, plain, reply
from api.openai.text import Text
from api.pool.roster import Roster
from api.state import State
from shared.channel.messages import Complete
from shared.errors import InvalidType, InvalidValue, NotSupported
from shared.instance import Instance
from shared.schema.model import ModelSettings

PROMPT = "prompt"
MOST_PROMPTS = 2048
MOST_TOKENS = 1 << 20  # of all prompts that are given as tokens
MOST_ALTERNATIVES = 5  # `logprobs`, as OpenAI has it
MOST_LOGPROBS = 1 << 20  # of prompts: each takes more than 100 bytes here until the reply is sent
BEGINNING = 1000  # characters or tokens of the first prompt by which an instance is chosen


class CompletionRequest(TextRequest, frozen=True, kw_only=True):
    """A request for a text completion.  Unknown fields are ignored, and `null` means absent."""

    prompt: Annotated[
        str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)],
        Meta(
            description="A text, or an array of token ids of this model, or an array of texts and of such arrays: "
            f"several prompts, at most {MOST_PROMPTS:,}. No template is applied. A text gets the model's first token, "
            "if the model wants one; tokens are taken as they are."
        ),
    ]
    suffix: Annotated[
        str | None,
        Meta(description="A text that follows the answer, which fills the gap. For models with tokens for that."),
    ] = None
    echo: Annotated[bool | None, Meta(description="Begin each answer with its prompt.")] = None
    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None,
        Meta(
            description="Return the log probability of each token, and this many of the most probable ones at its "
            "place. With `echo` also of the prompt."
        ),
    ] = None
    best_of: Annotated[int | None, Meta(description="Only 1 is served, and the value of `n`.")] = None
    response_format: Annotated[dict[str, Any] | None, Meta(description='Only `{"type": "text"}` is served.')] = None
    grammar: Annotated[Any, Meta(description="Not served.")] = None
    json_schema: Annotated[Any, Meta(description="Not served.")] = None


async def completions(request: Request[State]) -> Response:
    """Continue prompts, whole or as a stream."""
    return await continue_prompts(request)


async def continue_prompts(request: Request[State], around: Around = plain) -> Response:
    """Continue prompts, in a form around that of this API."""
    check_draining(request)
    asked = decoded(await read_any(request, request.state["max_body_bytes"]))
    caller, roster = request.state["caller"], request.state["roster"]
    prompts = prompts_of(asked)
    ask = Ask(
        model=asked.model,
        order=partial(_order, asked, prompts, caller, roster),
        route=request.scope["route"].path,
        prompt=PROMPT,
        beginning=f"{caller}{prompts[0][:BEGINNING]}".encode("utf-8", "surrogatepass"),
        ttl_s=ttl_s(asked.ttl),
        traceparent=request.state["traceparent"],
    )

    def form(instance: Instance, _: int) -> Form:
        text = Text(
            instance.instance_id,
            roster.fingerprint(instance.worker),
            prompts=len(prompts),
            choices=asked.n or 1,
            with_usage=asked.wants_usage,
        )
        return around(instance, text)

    return await reply(request, ask, form, streams=bool(asked.stream))


def decoded(body: bytes) -> CompletionRequest:
    """Decode the body of a request.

    Raises InvalidJSON, InvalidType, InvalidValue, MissingParameter, and NotSupported for what this server does not do.
    """
    request = known(body, CompletionRequest, (PROMPT, "suffix"))
    check_sampling(request)
    if request.best_of not in (None, 1, request.n):
        raise NotSupported("'best_of': only 1 is supported, and the value of 'n'.", param="best_of")
    if request.suffix and request.echo:
        raise InvalidValue("'echo' and 'suffix' exclude each other.", param="echo")
    for param, value in (("grammar", request.grammar), ("json_schema", request.json_schema)):
        if value:
            raise NotSupported(f"'{param}' is not supported for completions.", param=param)
    if request.response_format is not None and request.response_format.get("type") != "text":
        raise NotSupported("'response_format': only 'text' is supported for completions.", param="response_format")
    prompts = prompts_of(request)
    if len(prompts) > MOST_PROMPTS:
        message = f"'{PROMPT}': expected at most {MOST_PROMPTS:,} prompts, got {len(prompts):,}."
        raise InvalidValue(message, param=PROMPT)
    n_tokens = sum(len(prompt) for prompt in prompts if isinstance(prompt, list))
    if n_tokens > MOST_TOKENS:
        raise InvalidValue(f"'{PROMPT}': expected at most {MOST_TOKENS:,} tokens, got {n_tokens:,}.", param=PROMPT)
    if request.echo and request.logprobs is not None:
        n_logprobs = (request.n or 1) * (1 + request.logprobs) * sum(map(len, prompts))
        if n_logprobs > MOST_LOGPROBS:
            message = (
                f"'{PROMPT}': with 'echo' and 'logprobs', the characters and tokens of all prompts, times 'n' and "
                f"'logprobs' + 1, are at most {MOST_LOGPROBS:,}, got {n_logprobs:,}."
            )
            raise InvalidValue(message, param=PROMPT)
    return request


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a request.  Raises InvalidType."""
    given = request.prompt
    if isinstance(given, str):
        return [given]
    tokens = [one for one in given if isinstance(one, int)]
    if len(tokens) == len(given):
        return [tokens]
    if tokens:
        message = f"'{PROMPT}': expected texts and arrays of token ids, or token ids alone."
        raise InvalidType(message, param=PROMPT)
    return [one for one in given if not isinstance(one, int)]


def complete(
    request: CompletionRequest, prompts: list[str | list[int]], client: str, settings: ModelSettings
) -> Complete:
    """Translate a decoded request for a runner, without an id.  `settings` are those of the model."""
    return Complete(
        id=0,
        client=client,
        prompts=prompts,
        suffix=request.suffix or "",
        echo=bool(request.echo),
        choices=request.n or 1,
        max_tokens=limit(request.max_tokens, request.n_predict),
        sampling=sampling(request, settings.sampling),
        stop=stops(request.stop),
        logprobs=request.logprobs,
    )


def _order(
    asked: CompletionRequest, prompts: list[str | list[int]], client: str, roster: Roster, instance: Instance
) -> Complete:
    """Return the order for an instance, with the settings of its model.

    Raises InvalidValue if it cannot generate so many answers at once.
    """
    check_choices(asked, instance)
    return complete(asked, prompts, client, roster.settings_of(instance))
