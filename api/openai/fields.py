"""The fields that all requests for text have: which model answers, and how it samples."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct

from shared.channel.messages import Sampling
from shared.errors import InvalidValue
from shared.instance import Instance
from shared.schema.http import Seconds
from shared.schema.model import SamplingSettings

MOST_STOPS = 16
UNLIMITED = -1  # of `max_tokens`, as LM Studio's clients send it
TEMPERATURES, PENALTIES, BIASES = (0.0, 2.0), (-2.0, 2.0), (-100.0, 100.0)
LARGEST = 2**31 - 1  # integer of llama.cpp
TokenId = Annotated[int, Meta(ge=0, le=LARGEST)]

Limit = Annotated[int, Meta(ge=UNLIMITED)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=PENALTIES[0], le=PENALTIES[1])]

Stream = Annotated[bool | None, Meta(description="Send the answer while it is generated, as events.")]
Temperature = Annotated[
    Annotated[float, Meta(ge=TEMPERATURES[0], le=TEMPERATURES[1])] | None,
    Meta(description="How far choices may stray from the most probable token, which 0 always takes. Default: 0.8."),
]
TopK = Annotated[
    Annotated[int, Meta(ge=0, le=LARGEST)] | None,
    Meta(description="Consider this many of the most probable tokens, at most 256. 0: 256. Default: 40."),
]
TopP = Annotated[
    Share | None,
    Meta(description="Consider the most probable tokens that have this probability together. Default: 0.95."),
]
MinP = Annotated[
    Share | None,
    Meta(description="Consider tokens with at least this share of the highest probability. Default: 0.05."),
]
RepeatPenalty = Annotated[
    Annotated[float, Meta(gt=0, le=1e6)] | None,
    Meta(description="Divide the logits of recent tokens by this. Default: 1, which is off."),
]
PresencePenalty = Annotated[
    Penalty | None, Meta(description="Subtract this from the logits of recent tokens. Default: 0.")
]
FrequencyPenalty = Annotated[
    Penalty | None, Meta(description="Subtract this for each time that a token occurs among them. Default: 0.")
]


class StreamOptions(Struct, frozen=True):
    """Options of a streamed reply."""

    include_usage: Annotated[bool | None, Meta(description="Send a last chunk with the tokens of the request.")] = None


class TextRequest(Struct, frozen=True, kw_only=True):
    """A request for text, without what is to be answered."""

    model: Annotated[
        str | None,
        Meta(
            description="A model key or alias, or the id of a loaded instance. Absent: the default model, or else the "
            "only loaded LLM. A key means any of its instances, if possible the one that answered the "
            "conversation before."
        ),
    ] = None
    stream: Stream = None
    stream_options: Annotated[StreamOptions | None, Meta(description="Options of a streamed reply.")] = None
    max_tokens: Annotated[
        Limit | None, Meta(description="The most tokens of an answer. -1 or absent: up to the end of the context.")
    ] = None
    n_predict: Annotated[Limit | None, Meta(description="The same under the name of llama.cpp's server.")] = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    typical_p: Annotated[Share | None, Meta(description="Locally typical sampling. Default: 1, which is off.")] = None
    repeat_penalty: RepeatPenalty = None
    repeat_last_n: Annotated[
        Annotated[int, Meta(ge=-1, le=LARGEST)] | None,
        Meta(description="How many recent tokens the penalties consider. -1: all. Default: 64."),
    ] = None
    presence_penalty: PresencePenalty = None
    frequency_penalty: FrequencyPenalty = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
        Meta(
            description="The same seed gives the same draws; the text is the same only if the same requests are "
            "processed beside it. -1 or absent: a random one.",
        ),
    ] = None
    stop: Annotated[
        str | list[str] | None,
        Meta(description=f"Texts that end an answer, at most {MOST_STOPS}. The answer does not include them."),
    ] = None
    logit_bias: Annotated[
        dict[str, float] | list[list[Any]] | None,
        Meta(description="Numbers from -100 to 100, by token id, that are added to the logits of these tokens."),
    ] = None
    n: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="The number of answers, at most the `parallel` of the instance. Default: 1."),
    ] = None
    ttl: Annotated[
        Any,
        Meta(
            description="Seconds after which the model is unloaded if it is not used, if this request loads it. "
            "Default: that of the model, or of the operator; also if it is not a number of seconds."
        ),
    ] = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def check_sampling(request: TextRequest) -> None:
    """Check what the types of the common fields do not say.  Raises InvalidValue."""
    stops(request.stop)
    _biases(request.logit_bias)


def check_choices(request: TextRequest, instance: Instance) -> None:
    """Raise InvalidValue if an instance cannot generate so many answers at once."""
    config = instance.load_config
    parallel = config.parallel if config is not None and config.parallel is not UNSET else 1
    if request.n is not None and request.n > parallel:
        raise InvalidValue(
            f"'n': expected at most {parallel}, the 'parallel' of the instance, got {request.n}.", param="n"
        )


def check_limit(value: int | None, param: str) -> None:
    """Refuse a limit of no tokens.  Raises InvalidValue."""
    if value == 0:
        raise InvalidValue(f"'{param}': expected a number > 0, or -1 for no limit, got 0.", param=param)


def limit(*tokens: int | None) -> int | None:
    """Return a limit of tokens that has several names, of which the first one counts; None for no limit."""
    given = next((n for n in tokens if n is not None), UNLIMITED)
    return None if given == UNLIMITED else min(given, LARGEST)


def ttl_s(ttl: object) -> float | None:
    """Return the TTL that a request has; None if it has none, or no valid one."""
    try:
        return msgspec.convert(ttl, Seconds)
    except msgspec.ValidationError:
        return None


def sampling(request: TextRequest, settings: SamplingSettings) -> Sampling:
    """Return how tokens are chosen.  `settings` are those of the model."""
    given = {name: value for name in Sampling.__struct_fields__ if (value := getattr(request, name)) is not None}
    of_model = {name: value for name, value in msgspec.structs.asdict(settings).items() if value is not None}
    given = {**of_model, **given, "logit_bias": _biases(request.logit_bias)}
    if given.get("seed") == UNLIMITED:
        del given["seed"]
    return Sampling(**given)


def _biases(given: dict[str, float] | list[list[Any]] | None) -> dict[int, float]:
    """Return the biases by token.  The runner checks the ids against its vocabulary."""
    pairs = given.items() if isinstance(given, dict) else (given or [])
    biases: dict[int, float] = {}
    for pair in pairs:
        try:
            token, bias = pair
            biases[int(token)] = float(bias)
        except (TypeError, ValueError):
            raise InvalidValue(
                "'logit_bias': expected token ids with numbers, such as {\"42\": -100}.", param="logit_bias"
            ) from None
    if not all(0 <= token <= LARGEST for token in biases):
        raise InvalidValue(f"'logit_bias': expected token ids from 0 to {LARGEST}.", param="logit_bias")
    if not all(BIASES[0] <= bias <= BIASES[1] for bias in biases.values()):
        raise InvalidValue("'logit_bias': expected numbers from -100 to 100.", param="logit_bias")
    return biases


def stops(given: str | list[str] | None, param: str = "stop") -> list[str]:
    """Return the stop strings.  `param` is their field, for errors.  Raises InvalidValue."""
    texts = [given] if isinstance(given, str) else (given or [])
    if len(texts) > MOST_STOPS:
        raise InvalidValue(f"'{param}': expected at most {MOST_STOPS} strings, got {len(texts)}.", param=param)
    if "" in texts:
        raise InvalidValue(f"'{param}': a string must not be empty.", param=param)
    return texts
