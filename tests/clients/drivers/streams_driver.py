"""Reads recorded streams with the libraries for Python: what each makes of a stream, by its name.

Usage: python streams_driver.py BASE_URL STREAM...
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from typing import Any

import litellm
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openai import OpenAI, OpenAIError

base_url, *streams = sys.argv[1:]
litellm.suppress_debug_info = True
client = OpenAI(base_url=base_url, api_key="none", max_retries=0)
HELLO: Any = [{"role": "user", "content": "Hello"}]
USAGE: Any = {"include_usage": True}


def outcome(texts: Any, finishes: Any, tokens: Any, calls: Iterable[Any] = (), reasoning: str = "") -> dict[str, Any]:
    return {
        "texts": [*texts],
        "finishes": [*finishes],
        "tokens": [*tokens],
        "calls": [[id, name, json.loads(given) if isinstance(given, str) else given] for id, name, given in calls],
        "reasoning": reasoning,
    }


def joined(chunks: Any) -> dict[str, Any]:
    """Join chunks as the loops of small clients do."""
    texts: dict[int, str] = defaultdict(str)
    finishes: dict[int, str] = defaultdict(str)
    calls: dict[int, list[str]] = defaultdict(lambda: ["", "", ""])
    reasoning, usage = "", None
    for chunk in chunks:
        usage = getattr(chunk, "usage", None) or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] += choice.finish_reason or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                made = calls[call.index]
                made[0] += call.id or ""
                made[1] += call.function.name or ""
                made[2] += call.function.arguments or ""
    assert usage is not None
    tokens = (usage.prompt_tokens, usage.completion_tokens)
    return outcome(texts.values(), finishes.values(), tokens, calls.values(), reasoning)


def openai_raw(name: str) -> dict[str, Any]:
    return joined(client.chat.completions.create(model=name, messages=HELLO, stream=True, stream_options=USAGE))


def openai_stream(name: str) -> dict[str, Any]:
    with client.chat.completions.stream(model=name, messages=HELLO, stream_options=USAGE) as stream:
        final = stream.get_final_completion()
    messages = [choice.message for choice in final.choices]
    calls = [call for message in messages for call in message.tool_calls or []]
    assert final.usage is not None
    return outcome(
        [message.content or "" for message in messages],
        [choice.finish_reason for choice in final.choices],
        (final.usage.prompt_tokens, final.usage.completion_tokens),
        [(call.id, call.function.name, call.function.arguments) for call in calls],
    )


def langchain(name: str) -> dict[str, Any]:
    options: Any = {"base_url": base_url, "api_key": "none", "max_retries": 0}
    message: Any = reduce(add, ChatOpenAI(model=name, stream_usage=True, **options).stream("Hello"))
    assert not message.invalid_tool_calls
    return outcome(
        [message.content],
        [message.response_metadata["finish_reason"]],
        (message.usage_metadata["input_tokens"], message.usage_metadata["output_tokens"]),
        [(call["id"], call["name"], call["args"]) for call in message.tool_calls],
    )


def of_litellm(name: str) -> dict[str, Any]:
    options: Any = {"api_base": base_url, "num_retries": 0, "stream_options": USAGE}
    return joined(litellm.completion(f"lm_studio/{name}", HELLO, stream=True, **options))


def llama_index(name: str) -> dict[str, Any]:
    options: Any = {"api_base": base_url, "api_key": "none", "max_retries": 0, "additional_kwargs": {}}
    llm = OpenAILike(model=name, is_chat_model=True, is_function_calling_model=True, **options)
    chunks = [*llm.stream_chat([ChatMessage(role="user", content="Hello")], stream_options=USAGE)]
    calls = llm.get_tool_calls_from_response(chunks[-1], error_on_no_tool_call=False)
    raws: list[Any] = [chunk.raw for chunk in chunks]
    (usage,) = [raw.usage for raw in raws if raw.usage]
    return outcome(
        ["".join(chunk.delta or "" for chunk in chunks)],
        [choice.finish_reason for raw in raws for choice in raw.choices if choice.finish_reason],
        (usage.prompt_tokens, usage.completion_tokens),
        [(call.tool_id, call.tool_name, call.tool_kwargs) for call in calls],
    )


def read(stack: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    try:
        return stack(name)
    except OpenAIError as e:  # litellm's too
        return {"error": f"{type(e).__name__}: {e}"}


STACKS = {
    "openai": openai_raw,
    "openai stream()": openai_stream,
    "langchain": langchain,
    "litellm": of_litellm,
    "llama_index": llama_index,
}
print(json.dumps({of: {name: read(stack, name) for name in streams} for of, stack in STACKS.items()}))
