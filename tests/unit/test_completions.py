"""What a request for a text completion means, what is refused, and the form of its reply."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from api.openai.completions import MOST_LOGPROBS, MOST_PROMPTS, CompletionRequest, complete, decoded, prompts_of
from api.openai.text import Text
from shared.channel.messages import Complete, Delta, Logprob, Sampling, TokenLogprobs, Usage
from shared.errors import BodyTooLarge, InvalidRequest, InvalidType, InvalidValue, NotSupported
from shared.schema.model import ModelSettings

USAGE = Usage(
    prompt_tokens=7,
    cached_tokens=3,
    generated_tokens=5,
    reasoning_tokens=0,
    wait_s=0.0,
    prompt_s=0.5,
    generation_s=1.0,
)


def asked(**fields: Any) -> Complete:
    request = decoded(json.dumps({"prompt": "Hello", **fields}).encode())
    return complete(request, prompts_of(request), "client", ModelSettings())


def test_a_plain_request_has_the_defaults() -> None:
    assert asked() == Complete(id=0, client="client", prompts=["Hello"])
    assert asked().sampling == Sampling()


def test_null_means_absent_for_every_optional_field() -> None:
    names = [name for name in CompletionRequest.__struct_fields__ if name != "prompt"]
    assert asked(**dict.fromkeys(names)) == asked()


def test_unknown_keys_are_ignored() -> None:
    assert asked(user="me", max_completion_tokens=3, min_tokens=2) == asked()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [2, 3]], ["a", [2, 3]]),
    ],
)
def test_a_prompt_is_a_text_tokens_or_several_of_them(prompt: Any, prompts: Any) -> None:
    assert asked(prompt=prompt).prompts == prompts


def test_the_other_fields_are_taken_over() -> None:
    given = asked(n=2, max_tokens=0, stop="x", seed=4, logprobs=3, echo=True, best_of=2, temperature=0, top_k=5)
    assert given == Complete(
        id=0,
        client="client",
        prompts=["Hello"],
        echo=True,
        choices=2,
        max_tokens=0,
        stop=["x"],
        logprobs=3,
        sampling=Sampling(temperature=0, top_k=5, seed=4),
    )
    assert asked(max_tokens=-1).max_tokens is None
    assert asked(suffix="b").suffix == "b"
    assert asked(response_format={"type": "text"}, best_of=1) == asked()


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"prompt": [1.5]}, InvalidType, "prompt[0]"),
        ({"prompt": [2**31]}, InvalidValue, "prompt[0]"),
        ({"prompt": [["a"]]}, InvalidType, "prompt[0][0]"),
        ({"prompt": [1, [2]]}, InvalidType, "prompt"),
        ({"prompt": ["a"] * (MOST_PROMPTS + 1)}, InvalidValue, "prompt"),
        ({"prompt": [7] * (2**20 + 1)}, InvalidValue, "prompt"),
        ({"prompt": "a" * (MOST_LOGPROBS // 4 + 1), "echo": True, "logprobs": 1, "n": 2}, InvalidValue, "prompt"),
        ({"stop": [""]}, InvalidValue, "stop"),
        ({"logit_bias": {"a": 1}}, InvalidValue, "logit_bias"),
        ({"n": 3, "best_of": 4}, NotSupported, "best_of"),
        ({"json_schema": {"type": "object"}}, NotSupported, "json_schema"),
    ],
)
def test_what_is_wrong_is_refused_by_name(fields: dict[str, Any], error: type[InvalidRequest], param: str) -> None:
    with pytest.raises(error) as caught:
        asked(**fields)
    assert caught.value.param == param


def test_only_the_texts_may_be_large() -> None:
    assert len(asked(prompt="x" * (2 << 20), suffix="y" * (2 << 20)).suffix) == 2 << 20
    with pytest.raises(BodyTooLarge):
        asked(stop="x" * (2 << 20))


# ---- the reply


def token(text: bytes, logprob: float, *top: tuple[bytes, float]) -> TokenLogprobs:
    return TokenLogprobs(text, logprob, [Logprob(*one) for one in top])


def form(prompts: int = 1, choices: int = 1, *, with_usage: bool = False) -> Text:
    return Text("m", "f", prompts=prompts, choices=choices, with_usage=with_usage)


def whole(*deltas: Delta) -> Any:
    """Return the first choice of a reply, after the same as a stream was compared with it."""
    collecting, streaming = form(), form()
    chunks = []
    for delta in deltas:
        collecting.add(delta)
        chunks += [json.loads(event[6:]) for event in streaming.added(delta).decode().split("\n\n") if event]
    (choice,) = msgspec.to_builtins(collecting.whole(USAGE))["choices"]
    added = [chunk["choices"][0] for chunk in chunks]
    assert "".join(one["text"] for one in added) == choice["text"]
    assert added[-1]["finish_reason"] == choice["finish_reason"]
    for name, values in (choice["logprobs"] or {}).items():
        assert [value for one in added if one["logprobs"] for value in one["logprobs"][name]] == values
    return choice


def test_log_probabilities_have_the_form_of_openais_older_models() -> None:
    choice = whole(
        Delta(id=1, echo="Hi", skipped=4),
        Delta(id=1, logprobs=[token(b"<s>", math.nan), token(b" Hi", -1.0, (b" A", -0.5), (b" Hi", -1.0))]),
        Delta(id=1, text=" you", logprobs=[token(b" you", -3.0, (b" A", -0.5))], finish="stop"),
    )
    assert choice["text"] == "Hi you"
    assert choice["logprobs"] == {
        "tokens": ["<s>", " Hi", " you"],
        "token_logprobs": [None, -1.0, -3.0],
        "top_logprobs": [None, {" A": -0.5, " Hi": -1.0}, {" A": -0.5, " you": -3.0}],
        "text_offset": [0, 0, 2],
    }


def test_parts_of_characters_are_told_apart() -> None:
    euro = "€".encode()
    choice = whole(
        Delta(
            id=1,
            text="a€b\ufffdc",
            logprobs=[
                token(b"a", -1.0),
                token(euro[:1], -1.0, (euro[:2], -0.5), (euro[:1], -1.0)),
                token(euro[1:], -1.0),
                token(b"b", -1.0),
                token(euro[:2], -1.0),
                token(b"c", -1.0),
            ],
            finish="length",
        )
    )
    assert choice["logprobs"]["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82\\xac", "b", "bytes:\\xe2\\x82", "c"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert choice["logprobs"]["top_logprobs"][1] == {"bytes:\\xe2\\x82": -0.5, "bytes:\\xe2": -1.0}


def test_of_tokens_with_one_text_the_most_probable_counts() -> None:
    choice = whole(Delta(id=1, text="A", logprobs=[token(b"A", -4.0, (b"A", -0.5), (b"B", -1.0))], finish="stop"))
    assert choice["logprobs"]["top_logprobs"] == [{"A": -0.5, "B": -1.0}]


def test_a_stream_ends_with_the_usage_on_request() -> None:
    assert form().first() == b""
    assert form().last(USAGE) == b"data: [DONE]\n\n"
    usage, done, _ = form(with_usage=True).last(USAGE).decode().split("\n\n")
    assert done == "data: [DONE]"
    chunk = json.loads(usage[6:])
    assert (chunk["object"], chunk["choices"], chunk["usage"]["total_tokens"]) == ("text_completion", [], 12)
    assert chunk["timings"]["predicted_per_second"] == 5.0
    several = json.loads(form(2, with_usage=True).last(USAGE).decode().partition("\n\n")[0][6:])
    assert "timings" not in several, "they were processed at the same time"


def test_the_last_chunk_of_an_answer_has_no_text() -> None:
    events = form(2).added(Delta(id=1, choice=1, text="a", finish="stop")).decode().split("\n\n")[:-1]
    choices = [json.loads(event[6:])["choices"][0] for event in events]
    assert choices == [
        {"text": "a", "index": 1, "logprobs": None, "finish_reason": None},
        {"text": "", "index": 1, "logprobs": None, "finish_reason": "stop"},
    ]


def test_a_prompt_begins_all_of_its_answers() -> None:
    collecting, streaming = form(2, 2), form(2, 2)
    deltas = [Delta(id=1, choice=2, echo="Hi"), *(Delta(id=1, choice=i, text=f"{i}", finish="stop") for i in range(4))]
    texts = [""] * 4
    for delta in deltas:
        collecting.add(delta)
        for event in streaming.added(delta).decode().split("\n\n")[:-1]:
            (choice,) = json.loads(event[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    assert texts == [choice.text for choice in collecting.whole(USAGE).choices] == ["0", "1", "Hi2", "Hi3"]
