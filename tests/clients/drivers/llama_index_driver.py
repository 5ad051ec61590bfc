"""Asks a model with LlamaIndex: with its class for LM Studio, which sends few fields, and with that for OpenAI's API.

Usage: python llama_index_driver.py BASE_URL MODEL LONG_PROMPT
"""

from __future__ import annotations

import json
import sys
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.llms.lmstudio import LMStudio
from llama_index.llms.openai_like import OpenAILike
from openai import BadRequestError, NotFoundError

base_url, model, long = sys.argv[1:]
options: dict[str, Any] = {"api_base": base_url, "api_key": "none", "max_retries": 0, "is_chat_model": True}
limits = {"temperature": 0, "max_tokens": 8}
like = OpenAILike(model=model, **options, **limits)
native = LMStudio(model_name=model, base_url=base_url, request_timeout=120)
question = [ChatMessage(role="user", content="Hello")]


def failure(llm: Any, prompt: str, error: type[Any]) -> object:
    try:
        llm.chat([ChatMessage(role="user", content=prompt)])
    except error as e:
        return {"name": error.__name__, "code": e.code}
    return None


whole = like.chat(question)
chunks = [*like.stream_chat(question)]
answer = {
    "answers": [whole.message.content, "".join(chunk.delta or "" for chunk in chunks), chunks[-1].message.content],
    "tokens": [whole.raw.usage.completion_tokens],
    "finish": [chunk.raw.choices[0].finish_reason for chunk in chunks if chunk.raw.choices][-1],
    "refused": failure(OpenAILike(model="no/such-model", **options), "Hello", NotFoundError),
    "overflow": failure(like, long, BadRequestError),
    "native": [
        native.chat(question, **limits).message.content,
        [*native.stream_chat(question, **limits)][-1].message.content,
    ],
}
print(json.dumps(answer))
