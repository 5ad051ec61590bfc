"""Asks a model with LangChain.  Usage: python langchain_driver.py BASE_URL MODEL LONG_PROMPT"""

from __future__ import annotations

import json
import sys
from functools import reduce
from operator import add
from typing import Any

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from openai import NotFoundError

base_url, model, long = sys.argv[1:]
options: dict[str, Any] = {"base_url": base_url, "api_key": "none", "max_retries": 0, "temperature": 0}
chat = ChatOpenAI(model=model, max_tokens=8, stream_usage=True, **options)


def failure(chat: Any, prompt: str, error: type[Exception]) -> object:
    try:
        chat.invoke(prompt)
    except error as e:
        return {"name": error.__name__, "code": getattr(e, "code", None)}
    return None


whole = chat.invoke("Hello")
streamed = reduce(add, chat.stream("Hello"))
answer = {
    "answers": [whole.content, streamed.content],
    "tokens": [whole.usage_metadata["output_tokens"], streamed.usage_metadata["output_tokens"]],
    "finish": streamed.response_metadata["finish_reason"],
    "refused": failure(ChatOpenAI(model="no/such-model", **options), "Hello", NotFoundError),
    "overflow": failure(chat, long, ContextOverflowError),
}
print(json.dumps(answer))
