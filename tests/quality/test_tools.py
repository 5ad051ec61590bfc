"""Tools for SmolLM2, whose template knows none: what it calls in the general form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli.demo import REAL as SMOLLM2
from tests.support.chat import answered, chunks
from tests.support.families import TOOL
from tests.support.service import Service

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
TIME = {"type": "function", "function": {"name": "get_time", "description": "Get the time of day."}}


@pytest.mark.parametrize("n", [1, 3])
def test_a_required_call_has_arguments_that_fit(service: Service, n: int) -> None:
    sampling = {"temperature": 0} if n == 1 else {"temperature": 1, "seed": 1}
    fields: dict[str, Any] = {"model": SMOLLM2, "messages": QUESTION, "tools": [TIME, TOOL], "max_tokens": 200}
    choice = {"type": "function", "function": {"name": "get_weather"}}
    reply = answered(service, **fields, **sampling, n=n, tool_choice=choice, parallel_tool_calls=False)
    for each in reply["choices"]:
        assert each["finish_reason"] == "tool_calls"
        (call,) = each["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert isinstance(json.loads(call["function"]["arguments"])["city"], str)
    if n == 1:
        assert json.loads(call["function"]["arguments"])["city"] == "Paris"


def test_arguments_are_streamed(service: Service) -> None:
    fields: dict[str, Any] = {"model": SMOLLM2, "messages": QUESTION, "tools": [TOOL], "max_tokens": 200}
    received = chunks(service, **fields, temperature=0, tool_choice="required", parallel_tool_calls=False)
    deltas = [chunk["choices"][0]["delta"] for chunk in received]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert len(calls) > 3
    assert json.loads("".join(call["function"]["arguments"] for call in calls))["city"] == "Paris"
