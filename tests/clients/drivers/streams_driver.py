"""Reads recorded streams with the libraries for Python: what each makes of a stream, by its name.

Usage: python streams_driver.py URL STREAM...
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
from anthropic import Anthropic, AnthropicError
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openai import OpenAI, OpenAIError

url, *streams = sys.argv[1:]
base_url = f"{url}/v1"
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


def responses(name: str) -> dict[str, Any]:
    with client.responses.stream(model=name, input="Hello") as events:
        for event in events:
            if event.type == "response.failed":
                raise OpenAIError(event.response.error)
        assert event.type in ("response.completed", "response.incomplete")
        final: Any = event.response
    of: Any = {
        kind: [one for one in final.output if one.type == kind] for kind in ("message", "function_call", "reasoning")
    }
    return outcome(
        ["".join(part.text for message in of["message"] for part in message.content)],
        [final.status],
        (final.usage.input_tokens, final.usage.output_tokens),
        [(call.call_id, call.name, call.arguments) for call in of["function_call"]],
        "".join(part.text for reasoning in of["reasoning"] for part in reasoning.content),
    )


def messages(name: str) -> dict[str, Any]:
    with Anthropic(base_url=url, api_key="none", max_retries=0).messages.stream(
        model=name, messages=HELLO, max_tokens=100
    ) as stream:
        final = stream.get_final_message()
    of: Any = {kind: [one for one in final.content if one.type == kind] for kind in ("text", "tool_use", "thinking")}
    return outcome(
        ["".join(block.text for block in of["text"])],
        [final.stop_reason],
        (final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0), final.usage.output_tokens),
        [(block.id, block.name, block.input) for block in of["tool_use"]],
        "".join(block.thinking for block in of["thinking"]),
    )


def langchain_anthropic(name: str) -> dict[str, Any]:
    options: Any = {"base_url": url, "api_key": "none", "max_retries": 0}
    message: Any = reduce(add, ChatAnthropic(model=name, max_tokens=100, **options).stream("Hello"))
    assert not message.invalid_tool_calls
    return outcome(
        [message.text],
        [message.response_metadata["stop_reason"]],
        (message.usage_metadata["input_tokens"], message.usage_metadata["output_tokens"]),
        [(call["id"], call["name"], call["args"]) for call in message.tool_calls],
        "".join(block["reasoning"] for block in message.content_blocks if block["type"] == "reasoning"),
    )


def langchain_responses(name: str) -> dict[str, Any]:
    options: Any = {"base_url": base_url, "api_key": "none", "max_retries": 0, "use_responses_api": True}
    message: Any = reduce(add, ChatOpenAI(model=name, **options).stream("Hello"))
    assert not message.invalid_tool_calls
    return outcome(
        [message.text],
        [message.response_metadata["status"]],
        (message.usage_metadata["input_tokens"], message.usage_metadata["output_tokens"]),
        [(call["id"], call["name"], call["args"]) for call in message.tool_calls],
    )


def litellm_messages(name: str) -> dict[str, Any]:
    options: Any = {"api_base": url, "api_key": "none", "num_retries": 0, "stream_options": USAGE}
    return joined(litellm.completion(f"anthropic/{name}", HELLO, stream=True, max_tokens=100, **options))


def read(stack: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    try:
        return stack(name)
    except (OpenAIError, AnthropicError, ValueError) as e:  # LangChain has a ValueError for responses
        return {"error": f"{type(e).__name__}: {e}"}


STACKS = {
    "openai": openai_raw,
    "openai stream()": openai_stream,
    "langchain": langchain,
    "litellm": of_litellm,
    "llama_index": llama_index,
    "openai responses": responses,
    "langchain responses": langchain_responses,
    "anthropic": messages,
    "langchain anthropic": langchain_anthropic,
    "litellm anthropic": litellm_messages,
}
print(json.dumps({of: {name: read(stack, name) for name in streams} for of, stack in STACKS.items()}))
