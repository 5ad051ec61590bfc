"""Uses messages with Anthropic's library.  Usage: python anthropic_forms.py URL TOKEN RECITING TINY EMBEDDING"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import anthropic
import pydantic

url, token, reciting, tiny, _ = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key=token, max_retries=0)
HELLO: Any = [{"role": "user", "content": "Hello"}]
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}}
TOOLS: Any = [{"name": "get_weather", "input_schema": {"type": "object", "properties": PROPERTIES}}]


class Person(pydantic.BaseModel, extra="forbid"):
    name: Literal["Ada", "Grace"]
    alive: bool


def failure(ask: Callable[[], Any]) -> list[str]:
    try:
        ask()
    except anthropic.APIStatusError as e:
        return [type(e).__name__, e.body["error"]["message"]]
    raise AssertionError("not refused")


def asked(messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": reciting, "max_tokens": 100, "messages": messages, "tools": TOOLS, **fields}


def block(message: Any, kind: str) -> Any:
    (found,) = [block for block in message.content if block.type == kind]
    return found


whole = client.messages.create(**asked(HELLO, thinking={"type": "enabled", "budget_tokens": 1024}))
texts, thoughts, inputs = "", "", ""
with client.messages.stream(**asked(HELLO, tool_choice={"type": "any"})) as stream:
    for event in stream:
        if event.type == "text":
            texts += event.text
        if event.type == "thinking":
            thoughts += event.thinking
        if event.type == "input_json":
            inputs += event.partial_json
    final = stream.get_final_message()
with client.messages.stream(**asked(HELLO)) as stream:
    spoken = "".join(stream.text_stream)
use = block(whole, "tool_use")
result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny."}
after: Any = [*HELLO, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
second = client.messages.create(**asked(after))
counted = [client.messages.count_tokens(model=reciting, messages=each, tools=TOOLS) for each in (HELLO, after)]
assert counted[0].input_tokens < counted[1].input_tokens
assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) == counted[0].input_tokens
assert {message.stop_reason for message in (whole, final, second)} == {"tool_use"}
parsed = client.messages.parse(model=tiny, max_tokens=100, messages=HELLO, output_format=Person)
forced = client.messages.create(
    model=tiny,
    max_tokens=100,
    messages=HELLO,
    tools=[{"name": "person", "input_schema": Person.model_json_schema()}],
    tool_choice={"type": "tool", "name": "person"},
)
with client.messages.stream(model=tiny, max_tokens=100, messages=HELLO, output_format=Person) as stream:
    streamed = stream.get_final_message()
other = anthropic.Anthropic(base_url=url, api_key="other", max_retries=0)
hello = {"max_tokens": 8, "messages": HELLO}
answer = {
    "said": [block(whole, "text").text, texts, spoken, block(final, "text").text, block(second, "text").text],
    "thought": [block(whole, "thinking").thinking, thoughts, block(final, "thinking").thinking],
    "called": [
        [use.name, use.input],
        ["get_weather", json.loads(inputs)],
        *([block(message, "tool_use").name, block(message, "tool_use").input] for message in (final, second)),
    ],
    "objects": [
        parsed.parsed_output.model_dump(),
        streamed.parsed_output.model_dump(),
        block(forced, "tool_use").input,
    ],
    "counted": [each.input_tokens for each in counted],
    "failures": {
        "400": failure(lambda: client.messages.create(model=tiny, max_tokens=8, messages=[])),
        "401": failure(lambda: other.messages.create(model=tiny, **hello)),
        "404": failure(lambda: client.messages.create(model="no/such-model", **hello)),
    },
}
print(json.dumps(answer))
