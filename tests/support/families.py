"""Eleven families of models: a template of each, and an answer of our own to it with a call of TOOL."""

from __future__ import annotations

import json
from typing import Any

from worker.chat.code import installed

TEMPLATES = installed().parent / "chat" / "templates"
PROMPTS: list[str] = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = '{"city": "Paris", "days": 2}'
CALL = f'I will look.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'  # generic form


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def call(content: str = "", reasoning: str = "") -> dict[str, Any]:
    return {"content": content, "reasoning": reasoning, "name": "get_weather", "arguments": json.loads(ARGUMENTS)}


# By family: a template, an answer of our own to it with TOOL, and what the answer says.
FAMILIES = {
    "Qwen3": (
        "Qwen-Qwen3-0.6B",
        "<think>\nParis, two days.\n</think>\n\nI will look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
        call("I will look.", "Paris, two days."),
    ),
    "Qwen3-Coder": (
        "Qwen3-Coder",
        "I will look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        call("I will look."),
    ),
    "Qwen3.5": (
        "Qwen3.5-4B",
        "Paris, two days.\n</think>\n\nI will look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n"
        "</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        call("I will look.", "Paris, two days."),
    ),
    "Llama 3.1": (
        "meta-llama-Llama-3.1-8B-Instruct",
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}',
        call(),
    ),
    "gpt-oss": (
        "openai-gpt-oss-120b",
        "<|channel|>analysis<|message|>Paris, two days.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 2}',
        call("", "Paris, two days."),
    ),
    "Mistral Nemo": (
        "mistralai-Mistral-Nemo-Instruct-2407",
        'I will look.[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, '
        '"id": "a1B2c3D4e"}]',
        call("I will look."),
    ),
    "DeepSeek V3.1": (
        "deepseek-ai-DeepSeek-V3.1",
        "Paris, two days.</think>I will look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        call("I will look.", "Paris, two days."),
    ),
    "GLM-4.6": (
        "GLM-4.6",
        "\n<think>Paris, two days.</think>\nI will look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        call("I will look.", "Paris, two days."),
    ),
    "Gemma 4": (
        "google-gemma-4-31B-it",
        "<|channel>thought\nParis, two days.<channel|>I will look."
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>',
        call("I will look.", "Paris, two days."),
    ),
    "Kimi K2": (
        "moonshotai-Kimi-K2",
        "I will look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 2}<|tool_call_end|><|tool_calls_section_end|>',
        call("I will look."),
    ),
    "Hermes 3": (
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
        'I will look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
        call("I will look."),
    ),
}
