"""LM Studio's chat: what a request means, and the order of the events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import ErrorReply
from api.lmstudio.chat.answer import Chatting
from api.lmstudio.chat.request import chat, check_reasoning, decoded
from api.openai.request import Message, generate
from shared.channel.messages import Delta, Stop, Usage
from shared.errors import (
    IntegrationsRefused,
    InvalidRequest,
    InvalidType,
    InvalidUnion,
    InvalidValue,
    MissingParameter,
    NotSupported,
    RunnerLost,
    ServiceError,
    UnrecognizedKeys,
)
from shared.schema.model import ModelSettings
from tests.support.native import Reader
from tests.support.responses import events

USAGE = Usage(
    prompt_tokens=7,
    cached_tokens=2,
    generated_tokens=5,
    reasoning_tokens=3,
    wait_s=0.5,
    prompt_s=0.25,
    generation_s=2.0,
)
ID = "resp_" + "0" * 48
EARLIER = [
    Message(role="system", content="Old."),
    Message(role="user", content="Hi"),
    Message(role="assistant", content="Hello!", reasoning_content="Greet."),
]


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "p/m", "input": "Hello", **fields}).encode()


def meant(earlier: list[Message] | None = None, **fields: Any) -> Any:
    """Return what a runner gets for a request, with its conversation decoded."""
    order = generate(chat(decoded(body(**fields)), earlier or []), "client", ModelSettings())
    return order, msgspec.json.decode(order.conversation)


def test_the_fields_are_those_of_a_chat_completion() -> None:
    order, conversation = meant(
        temperature=2, top_p=0.5, top_k=3, min_p=0.1, repeat_penalty=1.2, max_output_tokens=9.0, system_prompt="Brief."
    )
    assert conversation["messages"] == [
        {"role": "system", "content": "Brief."},
        {"role": "user", "content": "Hello"},
    ]
    sampling = order.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repeat_penalty) == (
        *(2.0, 0.5, 3, 0.1, 1.2),
    )
    assert order.max_tokens == 9
    assert meant(max_output_tokens=-1)[0].max_tokens is None


@pytest.mark.parametrize("kind", ["text", "message"])
def test_all_items_are_one_message_of_the_user(kind: str) -> None:
    items = [{"type": kind, "content": "Hello"}, {"type": "text", "content": "there"}]
    one, two = meant(input=items[:1])[1], meant(input=items)[1]
    assert one["messages"] == [{"role": "user", "content": "Hello"}]
    texts = [{"type": "text", "text": text} for text in ("Hello", "there")]
    assert two["messages"] == [{"role": "user", "content": texts}]


def test_a_conversation_keeps_its_system_prompt_or_gets_another() -> None:
    same = [message["content"] for message in meant(EARLIER)[1]["messages"]]
    assert same == ["Old.", "Hi", "Hello!", "Hello"]
    other = [message["content"] for message in meant(EARLIER, system_prompt="New.")[1]["messages"]]
    assert other == ["New.", "Hi", "Hello!", "Hello"]
    added = [message["content"] for message in meant(EARLIER[1:], system_prompt="New.")[1]["messages"]]
    assert added == other


@pytest.mark.parametrize(
    ("setting", "thinks", "effort"),
    [(None, None, None), ("off", False, None), ("on", True, None), ("high", None, "high")],
)
def test_reasoning_is_set_by_the_variables_of_templates(
    setting: str | None, thinks: bool | None, effort: str | None
) -> None:
    conversation = meant(reasoning=setting)[1]
    variables = conversation.get("chat_template_kwargs", {})
    assert (conversation.get("enable_thinking"), variables.get("reasoning_effort")) in (
        (thinks, effort),
        (thinks, "none"),  # the template may have either variable
    )


def test_a_setting_that_the_model_lacks_is_refused() -> None:
    check_reasoning(None, "p/m", [])
    check_reasoning("low", "p/m", ["low", "medium", "high"])
    with pytest.raises(InvalidValue) as lacks:
        check_reasoning("on", "p/m", ["low", "medium", "high"])
    assert str(lacks.value) == (
        "Reasoning setting 'on' is not supported by model 'p/m'. Supported settings: 'low', 'medium', 'high'."
    )
    with pytest.raises(InvalidValue) as none:
        check_reasoning("off", "p/m", [])
    assert str(none.value) == "Model 'p/m' does not expose reasoning configuration."
    assert lacks.value.param == none.value.param == "reasoning"


MANY = "Unrecognized key(s) in object: 'ttl', 'tools'"
WRONG: list[tuple[dict[str, Any], type[ServiceError], Any, str | None]] = [
    ({"ttl": 1, "tools": []}, UnrecognizedKeys, None, MANY),
    ({"model": None}, InvalidType, "model", None),
    ({"input": None}, InvalidType, "input", None),
    ({"input": 1}, InvalidType, "input", None),
    ({"input": []}, InvalidValue, "input", None),
    ({"input": ["Hello"]}, InvalidType, "input", None),
    ({"input": [{"type": "foo"}]}, InvalidUnion, "input", "Invalid discriminator value. Expected 'text' | 'image'"),
    ({"input": [{}]}, InvalidUnion, "input", "Invalid discriminator value. Expected 'text' | 'image'"),
    (
        {"input": [{"type": "text", "text": "x"}]},
        InvalidUnion,
        "input",
        "'input.0.content' is required, Unrecognized key(s) in object: 'text'",
    ),
    (
        {"input": [{"type": "text", "content": "x"}, {"type": "text", "content": 1}]},
        InvalidUnion,
        "input",
        "'input.1.content': expected a string",
    ),
    ({"input": [{"type": "image", "data_url": "data:image/png;base64,AA=="}]}, NotSupported, "input", None),
    ({"integrations": ["mcp/playwright"]}, IntegrationsRefused, "integrations", None),
    ({"integrations": [{"type": "ephemeral_mcp", "server_url": "x"}]}, IntegrationsRefused, "integrations", None),
    ({"temperature": 2.1}, InvalidValue, "temperature", None),
    ({"top_p": "x"}, InvalidType, "top_p", None),
    ({"max_output_tokens": 0}, InvalidValue, "max_output_tokens", None),
    ({"context_length": 0}, InvalidValue, "context_length", None),
    ({"reasoning": "some"}, InvalidValue, "reasoning", None),
    ({"previous_response_id": 1}, InvalidType, "previous_response_id", None),
]


@pytest.mark.parametrize(("fields", "kind", "param", "message"), WRONG)
def test_what_is_wrong_is_refused_with_its_place(
    fields: dict[str, Any], kind: type[ServiceError], param: str | None, message: str | None
) -> None:
    with pytest.raises(kind) as refused:
        decoded(body(**fields))
    assert type(refused.value) is kind
    if param is not None:
        assert refused.value.param == param
    assert message in (None, str(refused.value))


@pytest.mark.parametrize("missing", ["model", "input"])
def test_a_missing_field_is_named(missing: str) -> None:
    fields = {name: value for name, value in json.loads(body()).items() if name != missing}
    with pytest.raises(MissingParameter) as refused:
        decoded(json.dumps(fields).encode())
    assert refused.value.param == missing


def test_no_integrations_are_fine_and_null_means_absent() -> None:
    assert meant(integrations=[]) == meant()
    names = {*decoded(body()).__struct_fields__} - {"model", "input"}
    assert meant(**dict.fromkeys(names)) == meant()


nested = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists)
items = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "message", "image"]) | nested, "content": nested, "x": nested}
)


@given(st.lists(items | nested, max_size=3))
def test_any_item_is_taken_or_refused_with_its_field(given_items: list[Any]) -> None:
    try:
        decoded(body(input=given_items))
    except InvalidRequest as e:
        assert e.param == "input"  # noqa: PT017


# ---- the events


def chatting(**options: Any) -> Chatting:
    return Chatting("p/m", 7, **{"load_s": None, "response_id": ID, **options})


def streamed(deltas: list[Delta], error: ServiceError | None = None) -> tuple[Any, Reader]:
    """Return the result of an answer that is streamed, and its reader."""
    form, reader = chatting(), Reader()
    pieces = [form.first(), form.read(0.25), form.read(0.5), *map(form.added, deltas)]
    pieces.append(form.last(USAGE) if error is None else form.failed(ErrorReply(error.body())))
    for event in received(pieces):
        reader.take(event)
    return reader.result, reader


def received(pieces: list[bytes]) -> Iterator[dict[str, Any]]:
    return events(iter(b"".join(pieces).decode().split("\n")))


def whole(deltas: list[Delta]) -> Any:
    form = chatting()
    for delta in deltas:
        form.add(delta)
    return msgspec.json.decode(msgspec.json.encode(form.whole(USAGE)))


texts = st.text(max_size=4)
pairs = st.lists(st.tuples(texts, texts), max_size=8)


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    """Return the additions of an answer: of reasoning, of text, or of both."""
    deltas = [Delta(id=1, reasoning=reasoning, text=text) for reasoning, text in draw(pairs)]
    end = Delta(id=1, finish="stop", stop=Stop("eos"))
    if deltas and deltas[0].text:
        end = msgspec.structs.replace(deltas.pop(), finish="length", stop=Stop("max_tokens"))
    return [*deltas, end]


@settings(max_examples=1000)
@given(answers())
def test_events_are_in_order_and_tell_what_the_result_has(deltas: list[Delta]) -> None:
    result, reader = streamed(deltas)
    assert reader.error is None
    assert result == whole(deltas)
    generated = "".join(delta.reasoning + delta.text for delta in deltas)
    assert sorted("".join(item["content"] for item in result["output"])) == sorted(generated), "nothing is lost"
    assert result["response_id"] == ID


@settings(max_examples=500)
@given(answers(), st.integers(min_value=0, max_value=8))
def test_an_error_ends_a_stream_of_events(deltas: list[Delta], n: int) -> None:
    left = [delta for delta in deltas[:n] if delta.finish is None]
    result, reader = streamed(left, RunnerLost("The engine process ended."))
    assert reader.error["message"] == "The engine process ended."
    assert "response_id" not in result


def test_a_result_has_the_fields_that_clients_read() -> None:
    deltas = [
        Delta(id=1, reasoning="Greet."),
        Delta(id=1, text="Hi", finish="stop", stop=Stop("string", "!")),
    ]
    assert whole(deltas) == {
        "model_instance_id": "p/m",
        "output": [{"type": "reasoning", "content": "Greet."}, {"type": "message", "content": "Hi"}],
        "stats": {
            "input_tokens": 7,
            "total_output_tokens": 5,
            "reasoning_output_tokens": 3,
            "tokens_per_second": 2.5,
            "time_to_first_token_seconds": 0.75,
            "stop_reason": "stopStringFound",
        },
        "response_id": ID,
    }


def test_an_answer_without_text_has_an_empty_message() -> None:
    (item,) = whole([Delta(id=1, finish="stop", stop=Stop("eos"))])["output"]
    assert item == {"type": "message", "content": ""}


def test_reasoning_that_is_cut_has_no_message() -> None:
    (item,) = whole([Delta(id=1, reasoning="Hm", finish="length", stop=Stop("max_tokens"))])["output"]
    assert item == {"type": "reasoning", "content": "Hm"}


def test_the_conversation_gets_what_the_model_said() -> None:
    form = chatting()
    form.add(Delta(id=1, reasoning="Greet."))
    form.add(Delta(id=1, text="Hi", finish="stop", stop=Stop("eos")))
    assert form.said == Message(role="assistant", content="Hi", reasoning_content="Greet.")
