"""Uses tools, objects and embeddings with LangChain, in chats, in responses and in messages.

Usage: python langchain_forms.py URL TOKEN RECITING TINY EMBEDDING
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, Literal

import anthropic
import openai
import pydantic
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

url, token, reciting, tiny, embedding = sys.argv[1:]
at_openai: Any = {"base_url": f"{url}/v1", "api_key": token, "max_retries": 0}
at_anthropic: Any = {"base_url": url, "api_key": token, "max_retries": 0, "max_tokens": 100}


@tool  # type: ignore[untyped-decorator, unused-ignore]
def get_weather(city: str, days: int) -> str:
    """Get the weather of a city."""
    return f"Sunny in {city} for {days} days."


class Person(pydantic.BaseModel, extra="forbid"):
    """A person."""

    name: Literal["Ada", "Grace"]
    alive: bool


def failure(ask: Callable[[], Any]) -> list[str]:
    try:
        ask()
    except openai.APIStatusError as e:
        return [type(e).__name__, e.body["message"]]  # type: ignore[index]
    except anthropic.APIStatusError as e:
        return [type(e).__name__, e.body["error"]["message"]]
    raise AssertionError("not refused")


answer: dict[str, Any] = {"said": [], "called": [], "objects": []}


def read(message: Any) -> Any:
    """Note what a message says; return its call."""
    assert not message.invalid_tool_calls
    (call,) = message.tool_calls
    answer["said"].append(message.text)
    answer["called"].append([call["name"], call["args"]])
    assert message.usage_metadata["output_tokens"] > 0
    return call


chats = [
    ChatOpenAI(model=reciting, stream_usage=True, **at_openai),
    ChatOpenAI(model=reciting, use_responses_api=True, **at_openai),
    ChatAnthropic(model=reciting, **at_anthropic),
]
question = HumanMessage("What is the weather in Paris?")
for chat in chats:
    bound = chat.bind_tools([get_weather])
    message: Any = bound.invoke([question])
    call = read(message)
    result: Any = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    read(bound.invoke([question, message, result]))
    streamed: Any = reduce(add, bound.stream([question]))
    read(streamed)
    read(bound.invoke([question, streamed, ToolMessage("Sunny.", tool_call_id=streamed.tool_calls[0]["id"])]))
    read(chat.bind_tools([get_weather], tool_choice="any").invoke([question]))

methods: list[Any] = ["json_schema", "function_calling"]
makers = [ChatOpenAI(model=tiny, **at_openai).with_structured_output(Person, method=method) for method in methods]
makers.append(ChatOpenAI(model=tiny, use_responses_api=True, **at_openai).with_structured_output(Person))
makers.append(ChatAnthropic(model=tiny, **at_anthropic).with_structured_output(Person))
answer["objects"] = [maker.invoke("Hello").model_dump() for maker in makers]

embeddings = OpenAIEmbeddings(model=embedding, check_embedding_ctx_length=False, **at_openai)
answer["vectors"] = [len(vector) for vector in embeddings.embed_documents(["The sky", "is blue"])]
answer["failures"] = {
    "400": failure(lambda: ChatOpenAI(model=tiny, **at_openai).invoke([])),
    "401": failure(lambda: ChatOpenAI(model=tiny, **{**at_openai, "api_key": "other"}).invoke("Hello")),
    "404": failure(lambda: ChatAnthropic(model="no/such-model", **at_anthropic).invoke("Hello")),
}
print(json.dumps(answer))
