"""Asks a model with litellm.  Usage: python litellm_driver.py BASE_URL MODEL LONG_PROMPT"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

base_url, model, long = sys.argv[1:]
litellm.suppress_debug_info = True


def complete(prompt: str, name: str = model, **more: Any) -> Any:
    messages = [{"role": "user", "content": prompt}]
    limits = {"max_tokens": 8, "temperature": 0, "num_retries": 0}
    return litellm.completion(f"lm_studio/{name}", messages, api_base=base_url, **limits, **more)


def failure(prompt: str, name: str, error: type[Exception]) -> object:
    try:
        complete(prompt, name)
    except error:
        return {"name": error.__name__, "code": None}
    return None


whole = complete("Hello")
chunks = [*complete("Hello", stream=True, stream_options={"include_usage": True})]
choices = [choice for chunk in chunks for choice in chunk.choices]
answer = {
    "answers": [whole.choices[0].message.content, "".join(choice.delta.content or "" for choice in choices)],
    "tokens": [
        whole.usage.completion_tokens,
        *(c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)),
    ],
    "finish": next(choice.finish_reason for choice in choices if choice.finish_reason),
    "refused": failure("Hello", "no/such-model", litellm.NotFoundError),
    "overflow": failure(long, model, litellm.ContextWindowExceededError),
}
print(json.dumps(answer))
