"""Uses tools with litellm, in chats, in responses and in messages.

Usage: python litellm_forms.py URL TOKEN RECITING TINY EMBEDDING
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import litellm
import pydantic

url, token, reciting, tiny, embedding = sys.argv[1:]
litellm.suppress_debug_info = True
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    },
}
HELLO: Any = [{"role": "user", "content": "Hello"}]
at_openai: Any = {"api_base": f"{url}/v1", "api_key": token, "num_retries": 0}
at_anthropic: Any = {"api_base": url, "api_key": token, "num_retries": 0, "max_tokens": 100}
tools = [{"type": "function", "function": FUNCTION}]


class Person(pydantic.BaseModel, extra="forbid"):
    name: Literal["Ada", "Grace"]
    alive: bool


def failure(ask: Callable[[], Any]) -> list[str]:
    try:
        ask()
    except (litellm.BadRequestError, litellm.AuthenticationError, litellm.NotFoundError) as e:
        return [type(e).__name__, str(e)]
    raise AssertionError("not refused")


answer: dict[str, Any] = {"said": [], "called": [], "thought": []}


def read(reply: Any) -> Any:
    """Note what a reply says; return its message."""
    (choice,) = reply.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert reply.usage.completion_tokens > 0
    answer["said"].append(choice.message.content)
    answer["thought"].append(choice.message.reasoning_content)
    answer["called"].append([call.function.name, json.loads(call.function.arguments)])
    return choice.message


for at, prefix in ((at_openai, "lm_studio"), (at_openai, "openai"), (at_anthropic, "anthropic")):
    asked = {"model": f"{prefix}/{reciting}", "tools": tools, **at}
    message = read(litellm.completion(messages=HELLO, **asked))
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
    read(litellm.completion(messages=[*HELLO, message, result], **asked))
    chunks = [*litellm.completion(messages=HELLO, stream=True, stream_options={"include_usage": True}, **asked)]
    read(litellm.stream_chunk_builder(chunks, messages=HELLO))

flat = [{"type": "function", **FUNCTION}]
whole: Any = litellm.responses(model=f"openai/{reciting}", input="Hello", tools=flat, **at_openai)
events: Any = litellm.responses(model=f"openai/{reciting}", input="Hello", tools=flat, stream=True, **at_openai)
(streamed,) = [event.response for event in events if event.type == "response.completed"]
for response in (whole, streamed):
    reasoning, said, call = response.output
    answer["said"].append(said.content[0].text)
    answer["thought"].append(reasoning.content[0].text)
    answer["called"].append([call.name, json.loads(call.arguments)])

made = [
    litellm.completion(f"{prefix}/{tiny}", HELLO, response_format=Person, **at)
    for at, prefix in ((at_openai, "lm_studio"), (at_openai, "openai"))
]
answer["objects"] = [json.loads(reply.choices[0].message.content) for reply in made]
vectors = litellm.embedding(f"openai/{embedding}", ["The sky", "is blue"], **at_openai).data
answer["vectors"] = [len(vector["embedding"]) for vector in vectors]
other = {**at_openai, "api_key": "other"}
answer["failures"] = {
    "400": failure(lambda: litellm.completion(f"openai/{tiny}", [], **at_openai)),
    "401": failure(lambda: litellm.completion(f"openai/{tiny}", HELLO, **other)),
    "404": failure(lambda: litellm.completion("anthropic/no/such-model", HELLO, **at_anthropic)),
}
print(json.dumps(answer))
