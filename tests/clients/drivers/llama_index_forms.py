"""Uses tools, objects and embeddings with LlamaIndex.

Usage: python llama_index_forms.py URL TOKEN RECITING TINY EMBEDDING
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import openai
import pydantic
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike

url, token, reciting, tiny, embedding = sys.argv[1:]
at: Any = {"api_base": f"{url}/v1", "api_key": token, "max_retries": 0}
like: Any = {"is_chat_model": True, "is_function_calling_model": True, **at}


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
    raise AssertionError("not refused")


answer: dict[str, Any] = {"said": [], "called": []}
tools = [FunctionTool.from_defaults(get_weather)]


def read(llm: Any, reply: Any) -> Any:
    """Note what a reply says; return its call."""
    (call,) = llm.get_tool_calls_from_response(reply)
    answer["said"].append(reply.message.content)
    answer["called"].append([call.tool_name, call.tool_kwargs])
    return call


for llm in (OpenAILike(model=reciting, **like), OpenAIResponses(model=reciting, context_window=4096, **at)):
    question = ChatMessage(role="user", content="Hello")
    first = llm.chat_with_tools(tools, chat_history=[question])
    call = read(llm, first)
    result = ChatMessage(role="tool", content="Sunny.", additional_kwargs={"tool_call_id": call.tool_id})
    read(llm, llm.chat_with_tools(tools, chat_history=[question, first.message, result]))
    read(llm, llm.chat_with_tools(tools, chat_history=[question], tool_required=True))
    read(llm, [*llm.stream_chat_with_tools(tools, chat_history=[question])][-1])
called = OpenAILike(model=reciting, **like).predict_and_call(tools, "Hello")
assert called.response == "Sunny in Paris for 2 days."

maker = OpenAILike(model=tiny, **like).as_structured_llm(Person)
strict = OpenAILike(model=tiny, should_use_structured_outputs=True, **like).as_structured_llm(Person)
answer["objects"] = [json.loads(llm.complete("Hello").text) for llm in (maker, strict)]
embeddings = OpenAIEmbedding(model_name=embedding, **at)
answer["vectors"] = [len(vector) for vector in embeddings.get_text_embedding_batch(["The sky", "is blue"])]
other: Any = {**like, "api_key": "other"}
answer["failures"] = {
    "400": failure(lambda: OpenAILike(model=tiny, **like).chat([])),
    "401": failure(lambda: OpenAILike(model=tiny, **other).complete("Hello")),
    "404": failure(lambda: OpenAILike(model="no/such-model", **like).complete("Hello")),
}
print(json.dumps(answer))
