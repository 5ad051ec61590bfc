"""Uses chats, responses, completions and embeddings with OpenAI's library.

Usage: python openai_forms.py URL TOKEN RECITING TINY EMBEDDING
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import pydantic
from openai import APIStatusError, OpenAI, pydantic_function_tool

url, token, reciting, tiny, embedding = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)
HELLO: Any = [{"role": "user", "content": "Hello"}]
RESULT = "Sunny."


class get_weather(pydantic.BaseModel):
    city: str
    days: int = pydantic.Field(ge=0, le=99)


class Person(pydantic.BaseModel, extra="forbid"):
    name: Literal["Ada", "Grace"]
    alive: bool


CHAT_TOOL = pydantic_function_tool(get_weather)
TOOL: Any = {"type": "function", **CHAT_TOOL["function"]}


def failure(ask: Callable[[], Any]) -> list[str]:
    try:
        ask()
    except APIStatusError as e:
        return [type(e).__name__, e.body["message"]]  # type: ignore[index]
    raise AssertionError("not refused")


answer: dict[str, Any] = {"said": [], "called": [], "thought": []}


def chatted(completion: Any) -> Any:
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    answer["said"].append(choice.message.content)
    answer["called"].append([call.function.name, json.loads(call.function.arguments)])
    return choice.message


def responded(response: Any) -> Any:
    reasoning, message, call = response.output
    assert response.status == "completed"
    answer["thought"].append(reasoning.content[0].text)
    answer["said"] += [message.content[0].text, response.output_text]
    answer["called"].append([call.name, json.loads(call.arguments)])
    return call


# Chats
chat: Any = {"model": reciting, "messages": HELLO, "tools": [CHAT_TOOL]}
message = chatted(client.chat.completions.create(**chat))
chatted(client.chat.completions.create(**chat, tool_choice="required"))
parsed = client.chat.completions.parse(**chat)
chatted(parsed)
assert isinstance(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, get_weather)  # type: ignore[index]
text, arguments, done = "", "", []
with client.chat.completions.stream(**chat, stream_options={"include_usage": True}) as stream:
    for event in stream:
        if event.type == "content.delta":
            text += event.delta
        if event.type == "tool_calls.function.arguments.delta":
            arguments += event.arguments_delta
        if event.type == "tool_calls.function.arguments.done":
            done.append(event.name)
    final = stream.get_final_completion()
chatted(final)
assert final.usage is not None
answer["said"].append(text)
answer["called"].append([*done, json.loads(arguments)])
result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": RESULT}
chatted(client.chat.completions.create(**{**chat, "messages": [*HELLO, message, result]}))

# Responses
ask: Any = {"model": reciting, "input": "Hello", "tools": [TOOL]}
call = responded(client.responses.create(**ask))
first = client.responses.parse(**ask)
call = responded(first)
answer["called"].append(["get_weather", call.parsed_arguments])
text, arguments, thought = "", "", ""
with client.responses.stream(**ask) as events:
    for one in events:
        if one.type == "response.output_text.delta":
            text += one.delta
        if one.type == "response.reasoning_text.delta":
            thought += one.delta
        if one.type == "response.function_call_arguments.delta":
            arguments += one.delta
    responded(events.get_final_response())
answer["said"].append(text)
answer["thought"].append(thought)
answer["called"].append(["get_weather", json.loads(arguments)])
after: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
second = client.responses.create(**{**ask, "input": after}, previous_response_id=first.id)
responded(second)
assert second.previous_response_id == first.id
assert second.usage.input_tokens > first.usage.input_tokens  # type: ignore[union-attr]
assert client.responses.retrieve(second.id).output_text == second.output_text
client.responses.delete(second.id)

# Objects
with client.chat.completions.stream(model=tiny, messages=HELLO, response_format=Person) as chunks:
    streamed = chunks.get_final_completion().choices[0].message.parsed
with client.responses.stream(model=tiny, input="Hello", text_format=Person) as events:
    responses_streamed = events.get_final_response().output_parsed
made = [
    client.chat.completions.parse(model=tiny, messages=HELLO, response_format=Person).choices[0].message.parsed,
    streamed,
    client.responses.parse(model=tiny, input="Hello", text_format=Person).output_parsed,
    responses_streamed,
]
answer["objects"] = [person.model_dump() for person in made]  # type: ignore[union-attr]

# Texts and vectors
limits: Any = {"model": tiny, "prompt": "Once", "max_tokens": 8, "temperature": 0}
whole = client.completions.create(**limits).choices[0].text
pieces = "".join(chunk.choices[0].text for chunk in client.completions.create(**limits, stream=True) if chunk.choices)
assert whole == pieces
answer["continued"] = [whole]
floats = client.embeddings.create(model=embedding, input=["The sky", "is blue"], encoding_format="float").data
decoded = client.embeddings.create(model=embedding, input=["The sky", "is blue"]).data
assert [one.embedding for one in floats] == [one.embedding for one in decoded]
answer["vectors"] = [len(one.embedding) for one in decoded]
assert {reciting, tiny, embedding} <= {model.id for model in client.models.list()}

other = OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0)
answer["failures"] = {
    "400": failure(lambda: client.chat.completions.create(model=tiny, messages=[])),
    "401": failure(lambda: other.responses.create(model=tiny, input="Hello")),
    "404": failure(lambda: client.responses.create(model="no/such-model", input="Hello")),
}
print(json.dumps(answer))
