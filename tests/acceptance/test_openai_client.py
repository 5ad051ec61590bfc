"""OpenAI's own library for Python, against the whole service."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Annotated, Literal

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from shared.synthetic import models as synthetic
from tests.support.chat import EOS
from tests.support.service import TINY, Service, up

HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Hello"}]
ENDLESS = {str(EOS): -100}


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    service.loaded(TINY)
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_whole_reply_is_read(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=TINY, messages=HELLO, max_tokens=4, logit_bias=ENDLESS, logprobs=True, top_logprobs=2, n=2
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    assert all(choice.message.role == "assistant" and choice.message.content for choice in reply.choices)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert [len(info.top_logprobs) for info in logprobs.content or ()] == [2] * 4
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    born: int = pydantic.Field(ge=0, le=9999)
    kind: Literal["real", "fictional"]
    died: datetime.date | None
    friends: list[Friend] = pydantic.Field(max_length=2)


class Friend(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(max_length=3)]


def test_an_answer_becomes_an_object(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model=TINY, messages=HELLO, response_format=Person)
    assert isinstance(reply.choices[0].message.parsed, Person)
    with client.chat.completions.stream(model=TINY, messages=HELLO, response_format=Person) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)


def test_a_stream_is_read_raw(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=TINY,
            messages=HELLO,
            max_tokens=4,
            logit_bias=ENDLESS,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert any(part.choices[0].delta.content for part in parts)
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.usage is not None
    assert (last.choices, last.usage.completion_tokens) == ([], 4)


def test_a_stream_is_read_by_the_helper(client: openai.OpenAI) -> None:
    """The helper checks the form of each chunk, and puts the reply together."""
    with client.chat.completions.stream(
        model=TINY, messages=HELLO, temperature=0, n=2, logit_bias={str(EOS): 100}
    ) as stream:
        kinds = {event.type for event in stream}
        reply = stream.get_final_completion()
    assert {"chunk"} <= kinds
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "stop"]
    with client.chat.completions.stream(model=TINY, messages=HELLO, temperature=0, max_tokens=8) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    whole = client.chat.completions.create(model=TINY, messages=HELLO, temperature=0, max_tokens=8)
    assert text == whole.choices[0].message.content


def test_responses_are_read(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=TINY, input="Hello", temperature=0, max_output_tokens=8)
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.output_tokens == 8
    with client.responses.create(model=TINY, input="Hello", temperature=0, max_output_tokens=8, stream=True) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    counted = client.responses.input_tokens.count(model=TINY, input="Hello")
    assert counted.input_tokens == whole.usage.input_tokens


def test_responses_are_read_by_the_helper(client: openai.OpenAI) -> None:
    """The helper puts the response together from its events, and fails if one is missing."""
    parsed = client.responses.parse(model=TINY, input="Hello", text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    with client.responses.stream(model=TINY, input="Hello", text_format=Person) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert texts[-1] == final.output_text
    assert isinstance(final.output_parsed, Person)
    again = client.responses.create(
        model=TINY, input="Go on", max_output_tokens=8, previous_response_id=final.id, temperature=0
    )
    assert again.previous_response_id == final.id
    assert client.responses.retrieve(again.id).output_text == again.output_text
    client.responses.delete(final.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(final.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=TINY, input="Hello", previous_response_id="resp_1")
    assert refused.value.code == "previous_response_not_found"


def test_errors_have_the_classes_of_the_library(client: openai.OpenAI, service: Service) -> None:
    long: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Hello " * 10_000}]
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=TINY, messages=long)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="acme/nothing", messages=HELLO, stream=True)
    assert unknown.value.code == "model_not_found"


def test_an_error_in_a_stream_is_raised(client: openai.OpenAI, service: Service) -> None:
    stream = client.chat.completions.create(model=TINY, messages=HELLO, logit_bias=ENDLESS, stream=True)
    next(stream)
    service.unload_all()
    with pytest.raises(openai.APIError) as ended:
        for _ in stream:
            pass
    assert ended.value.code == "model_unloaded"


def test_text_completions_are_read(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=TINY, prompt=["Hello", "World"], max_tokens=3, logit_bias=ENDLESS, logprobs=2, echo=True
    )
    assert [choice.text[:5] for choice in reply.choices] == ["Hello", "World"]
    logprobs = reply.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) > 3
    stream = client.completions.create(model=TINY, prompt="Hello", max_tokens=3, logit_bias=ENDLESS, stream=True)
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.text for part in parts)
    assert parts[-1].finish_reason == "length"


def test_vectors_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The library asks for base64, unless it is told otherwise."""
    home = tmp_path_factory.mktemp("vectors")
    synthetic.tiny_bert(home / "models/acme/bert/bert-f32.gguf")
    with (
        up(home) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client,
    ):
        decoded = client.embeddings.create(model="acme/bert", input=["hello", "world"])
        plain = client.embeddings.create(model="acme/bert", input=["hello", "world"], encoding_format="float")
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="acme/bert", input="word " * 3000)
    assert [item.index for item in decoded.data] == [0, 1]
    for one, other in zip(decoded.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=2e-3)
    assert decoded.usage.total_tokens == plain.usage.total_tokens > 0
    assert refused.value.code == "context_length_exceeded"
