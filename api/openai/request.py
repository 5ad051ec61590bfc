"""Requests for chat completions: what clients send, and what a runner gets.

The fields are those of OpenAI's API and of llama.cpp's server.  As there, `null` means absent, and unknown keys are
ignored: clients send many.  What would change the answer and is not served is refused, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from api.decode import depth, known
from api.openai.fields import Limit, TextRequest, check_limit, check_sampling, limit, sampling, stops
from api.openai.output import output
from shared.channel.messages import Generate
from shared.errors import InvalidType, InvalidValue, MissingParameter, NotSupported
from shared.schema.model import ModelSettings
from shared.telemetry import log

DEEPEST = 64  # nesting of a conversation: llama.cpp's template code recurses over it
MOST_PIECES = 65_536  # messages of a conversation, and their parts: to check and to render each takes microseconds
MOST_TOOLS = 128  # as OpenAI has it
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
# Types of tools that OpenAI's server runs itself begin so, and some end with a date.  Clients list them everywhere.
HOSTED = ("web_search", "file_search", "code_interpreter", "computer", "image_generation")
# Keywords of schemas that both llama.cpp and llguidance enforce, and those that demand nothing.
ENFORCED = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "const",
    "anyOf",
    "$ref",
    "$defs",
}
ENFORCED |= {"definitions", "title", "description", "default", "examples", "$schema", "$id", "$comment"}
BOUNDS = {"minimum": "exclusiveMinimum", "maximum": "exclusiveMaximum"}  # of integers; llama.cpp takes one of a pair
BOUNDS |= {exclusive: inclusive for inclusive, exclusive in BOUNDS.items()}
LARGEST_BOUND = 2**53  # beyond, not every integer is a number of JavaScript, and llguidance refuses it
EMPTY, OBJECT = msgspec.Raw(b"{}"), msgspec.Raw(b'"object"')
MOST_ALTERNATIVES = 20  # `top_logprobs`, as OpenAI has it
ROLES = {"developer": "system", "function": "tool"}  # the others are their own


class Part(Struct, frozen=True):
    """A part of a message."""

    type: Annotated[str, Meta(description="`text`; also `input_text` and `refusal`. Others are not served.")]
    text: Annotated[str | None, Meta(description="The text.")] = None
    refusal: Annotated[str | None, Meta(description="The text of a `refusal`.")] = None


class CalledFunction(Struct, frozen=True):
    """The function of an earlier call."""

    name: Annotated[str, Meta(description="Name of the tool.")]
    arguments: Annotated[msgspec.Raw, Meta(description="The arguments: a JSON object as text, or the object itself.")]


class ToolCall(Struct, frozen=True):
    """An earlier call of a tool."""

    function: Annotated[CalledFunction, Meta(description="What was called.")]
    id: Annotated[str | None, Meta(description="Id of the call, to which the message with its result refers.")] = None
    type: Annotated[Literal["function"] | None, Meta(description="Always `function`.")] = None


class Function(Struct, frozen=True):
    """A function that the model may call."""

    name: Annotated[
        str, Meta(description="Its name: at most 128 letters, digits, `_`, `-` and `.`, unlike those of the others.")
    ]
    description: Annotated[str | None, Meta(description="What it does, for the model.")] = None
    parameters: Annotated[
        dict[str, msgspec.Raw] | None,
        Meta(description="JSON schema of its arguments, an object. Absent: it takes none."),
    ] = None
    strict: Annotated[
        bool | None,
        Meta(
            description="Whether all of the schema must be enforced; a schema for which that is not possible is "
            "refused. Default: as much of it as is possible."
        ),
    ] = None


class Tool(Struct, frozen=True):
    """A tool that the model may call."""

    type: Annotated[
        str, Meta(description="`function`. Tools that OpenAI's server runs itself, such as `web_search`, are ignored.")
    ]
    function: Annotated[Function | None, Meta(description="The function, for a tool of this type.")] = None


class Message(Struct, frozen=True):
    """A message of a conversation."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        Meta(description="Who wrote it; `developer` means `system`. `tool` has the result of a call."),
    ]
    content: Annotated[
        str | list[Part] | None,
        Meta(description='The text, or a list of parts such as `{"type": "text", "text": "Hello!"}`.'),
    ] = None
    name: Annotated[str | None, Meta(description="Name of the writer, for the model's chat template.")] = None
    reasoning_content: Annotated[
        str | None, Meta(description="The reasoning before an earlier answer, for the model's chat template.")
    ] = None
    reasoning: Annotated[str | None, Meta(description="The same under another name.")] = None
    tool_calls: Annotated[list[ToolCall] | None, Meta(description="The calls of tools in an earlier answer.")] = None
    tool_call_id: Annotated[str | None, Meta(description="Id of the call whose result this `tool` message has.")] = None
    function_call: Annotated[
        CalledFunction | None, Meta(description="The only call of an earlier answer, in OpenAI's older form.")
    ] = None


class ChatRequest(TextRequest, frozen=True, kw_only=True):
    """A request for a chat completion.  Unknown fields are ignored, and `null` means absent."""

    messages: Annotated[
        list[Message],
        Meta(
            min_length=1,
            description="The conversation, oldest message first. If the last one is the assistant's, the answer "
            "continues it.",
        ),
    ]
    max_completion_tokens: Annotated[
        Limit | None, Meta(description="The same under OpenAI's newer name, which wins over `max_tokens`.")
    ] = None
    logprobs: Annotated[bool | None, Meta(description="Return the log probability of each token.")] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None,
        Meta(description="Return this many of the most probable tokens at each place; needs `logprobs`."),
    ] = None
    reasoning_effort: Annotated[
        str | None,
        Meta(
            description="`none` turns reasoning off; other values go to the model's chat template, `minimal` as `low` "
            "and `xhigh` as `high` if it does not know them."
        ),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Meta(description="Variables for the model's chat template, such as `enable_thinking`."),
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="Begin an answer of the assistant. Default: unless the last message is its own.")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="Continue the last message. Default: if it is the assistant's.")
    ] = None
    response_format: Annotated[
        dict[str, Any] | None,
        Meta(
            description='`{"type": "json_schema", "json_schema": {"schema": {...}}}`: JSON that the schema describes. '
            '`{"type": "json_object"}`: a JSON object, of its `schema` if it has one. `{"type": "text"}`: any text.'
        ),
    ] = None
    tools: Annotated[
        list[Tool] | None, Meta(description=f"The tools that the model may call, at most {MOST_TOOLS}.")
    ] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        Meta(
            description="`auto`: the model may call tools. `none`: it may not. `required`: it must. "
            '`{"type": "function", "function": {"name": "..."}}`: it must call this one. Default: `auto`.'
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="Whether an answer may have several calls. Default: true.")
    ] = None
    functions: Annotated[
        list[Function] | None, Meta(description="The tools in OpenAI's older form. The answer has `tool_calls`.")
    ] = None
    function_call: Annotated[
        str | dict[str, Any] | None,
        Meta(description='Their choice in the older form: `auto`, `none` or `{"name": "..."}`.'),
    ] = None
    thinking_budget_tokens: Annotated[
        Limit | None,
        Meta(
            description="The most tokens of the reasoning before an answer, which then begins. -1 or absent: any "
            "number. Without effect on models that do not reason."
        ),
    ] = None
    modalities: Annotated[list[str] | None, Meta(description='Only `["text"]` is served.')] = None
    audio: Annotated[Any, Meta(description="Not served.")] = None
    grammar: Annotated[
        Any, Meta(description="A grammar in GBNF, as llama.cpp has it, that answers follow; its first rule is `root`.")
    ] = None
    json_schema: Annotated[Any, Meta(description="A JSON schema that answers follow.")] = None


def decoded(body: bytes) -> ChatRequest:
    """Decode the body of a request.

    Raises InvalidJSON, InvalidType, InvalidValue, MissingParameter, and NotSupported for what this server does not do.
    """
    return checked(known(body, ChatRequest, {"messages"}))


def checked(request: ChatRequest, form: str = "response_format") -> ChatRequest:
    """Return a request, if it is valid beyond its types.  `form` is the field with the form of answers, for errors.

    Raises InvalidType, InvalidValue and NotSupported.
    """
    if depth(request.chat_template_kwargs) > DEEPEST - 2:  # those of the conversation and of this object
        param = "chat_template_kwargs"
        raise InvalidValue(f"'{param}': a conversation is nested at most {DEEPEST} levels deep.", param=param)
    _check(request, form)
    n_pieces = len(request.messages) + sum(
        len(one.content) for one in request.messages if isinstance(one.content, list)
    )
    if n_pieces > MOST_PIECES:
        raise InvalidValue(
            f"'messages': expected at most {MOST_PIECES:,} messages and parts, got {n_pieces:,}.", param="messages"
        )
    for i, message in enumerate(request.messages):
        _check_message(message, f"messages[{i}]")
    check_sampling(request)
    return request


def generate(request: ChatRequest, client: str, settings: ModelSettings) -> Generate:
    """Translate a decoded request for a runner, without an id.  `settings` are those of the model."""
    effort = request.reasoning_effort
    variables = {**({"reasoning_effort": effort} if effort else {}), **(request.chat_template_kwargs or {})}
    thinks = variables.pop("enable_thinking", False if effort == "none" else None)
    conversation = {
        "messages": [*_prompted(request, settings), *(_rendered(message) for message in request.messages)],
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
        **asked_tools(request),
        "enable_thinking": thinks,
        "chat_template_kwargs": variables or None,
    }
    return Generate(
        id=0,
        client=client,
        conversation=msgspec.json.encode({key: value for key, value in conversation.items() if value is not None}),
        choices=request.n or 1,
        max_tokens=limit(request.max_completion_tokens, request.max_tokens, request.n_predict),
        sampling=sampling(request, settings.sampling),
        stop=stops(request.stop),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        output=output(request.response_format, request.grammar, request.json_schema),
        thinking_tokens=limit(request.thinking_budget_tokens),
    )


def beginning(request: ChatRequest, client: str) -> bytes:
    """Return what all requests of a conversation have in common: its client, and its messages up to the user's first.

    Prefixes are shared between requests of one client only.
    """
    messages = request.messages
    first = next((i for i, message in enumerate(messages) if message.role == "user"), len(messages))
    return client.encode() + msgspec.json.encode(messages[: first + 1])


def _check(request: ChatRequest, form: str) -> None:
    for param in ("max_tokens", "max_completion_tokens", "n_predict"):
        check_limit(getattr(request, param), param)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidValue("'top_logprobs': it needs \"logprobs\": true.", param="top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidValue(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.", param="continue_final_message"
        )
    if request.continue_final_message and request.messages[-1].role != "assistant":
        raise InvalidValue(
            "'continue_final_message': the last message must be the assistant's.", param="continue_final_message"
        )
    if request.audio:
        raise NotSupported("'audio' is not supported by this server yet.", param="audio")
    has_tools = bool(asked_tools(request))
    if set(request.modalities or ()) - {"text"}:
        raise NotSupported("'modalities': only text is supported.", param="modalities")
    if output(request.response_format, request.grammar, request.json_schema) is not None:
        other = "that continues a message" if _continues(request) else "with tools" if has_tools else ""
        if other:
            raise NotSupported(f"'{form}': an answer {other} cannot have a form.", param=form)


def _continues(request: ChatRequest) -> bool:
    """Return whether the answer continues the last message."""
    begins = request.add_generation_prompt or request.continue_final_message is False
    return request.messages[-1].role == "assistant" and not begins


def _check_message(message: Message, path: str) -> None:
    """Check what the types do not say.  Images, audio and files are refused."""
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidValue(f"'{path}.tool_call_id' is required.", param=f"{path}.tool_call_id")
    if message.role == "function" and message.name is None:
        raise InvalidValue(f"'{path}.name' is required.", param=f"{path}.name")
    if message.role == "assistant":
        for i, call in enumerate(_calls(message)):
            arguments(call.function, f"{path}.tool_calls[{i}].function.arguments")
    elif message.content is None:
        raise InvalidValue(f"'{path}.content' is required.", param=f"{path}.content")
    for i, part in enumerate(message.content if isinstance(message.content, list) else []):
        param, kind = f"{path}.content[{i}]", part.type
        match kind:
            case "text" | "input_text" | "refusal":
                name = "refusal" if kind == "refusal" else "text"
                if (part.refusal if kind == "refusal" else part.text) is None:
                    raise InvalidValue(f"'{param}.{name}': expected a string.", param=f"{param}.{name}")
            case "image_url" | "input_image":
                raise NotSupported(f"'{param}': images are not supported by this server.", param=param)
            case "input_audio" | "file" | "input_file" | "video_url":
                raise NotSupported(f"'{param}': content of type '{kind}' is not supported.", param=param)
            case _:
                raise InvalidValue(f"'{param}.type': expected 'text', got {kind!r}.", param=f"{param}.type")


def _rendered(message: Message) -> dict[str, Any]:
    """Return a message as llama.cpp's chat code reads it (common_chat_msgs_parse_oaicompat, common/chat.cpp)."""
    content: Any = message.content
    if isinstance(content, list):
        content = [{"type": "text", "text": part.refusal if part.type == "refusal" else part.text} for part in content]
    rendered = {"role": ROLES.get(message.role, message.role), "content": "" if content is None else content}
    if message.name is not None:
        rendered["name"] = message.name
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if reasoning:
        rendered["reasoning_content"] = reasoning
    if message.role == "assistant" and (calls := _calls(message)):
        rendered["tool_calls"] = [
            {
                "id": f"call_{i}" if call.id is None else call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments(call.function, "messages")},
            }
            for i, call in enumerate(calls)
        ]
    if message.role in ("tool", "function"):
        rendered["tool_call_id"] = _legacy_id(message.name) if message.role == "function" else message.tool_call_id
    return rendered


def _calls(message: Message) -> list[ToolCall]:
    """Return the calls of an earlier answer."""
    if message.function_call is None:
        return message.tool_calls or []
    return [ToolCall(message.function_call, _legacy_id(message.function_call.name))]


def _legacy_id(name: str | None) -> str:
    """Return the id of a call in OpenAI's older form, which has none."""
    return f"call_{name}"


def arguments(function: CalledFunction, path: str) -> str:
    """Return the arguments of an earlier call as text.  Raises InvalidType and InvalidValue."""
    raw = bytes(function.arguments)
    if raw == b"null":
        return "{}"
    if raw.startswith(b'"'):
        text = msgspec.json.decode(raw, type=str).strip() or "{}"
    elif raw.startswith(b"{"):
        text = raw.decode()
    else:
        raise InvalidType(f"'{path}': expected a string with JSON.", param=path)
    if text.count("[") + text.count("{") > DEEPEST and _is_too_deep(text):
        raise InvalidValue(f"'{path}': they are nested at most {DEEPEST} levels deep.", param=path)
    return text


def _is_too_deep(text: str) -> bool:
    """Return whether a JSON text is nested too deeply.  What is not JSON is text for llama.cpp too."""
    try:
        return depth(msgspec.json.decode(text)) > DEEPEST - 4  # those around it in a conversation
    except msgspec.DecodeError:
        return False
    except RecursionError:
        return True


def asked_tools(request: ChatRequest) -> dict[str, Any]:
    """Return what a conversation says of tools: nothing without any.  Raises InvalidValue and NotSupported.

    A choice of one is the choice among only one.
    """
    field, functions = _functions(request)
    choice_field, choice = "tool_choice", request.tool_choice
    if choice is None and request.function_call is not None:
        choice_field, choice = "function_call", request.function_call
    named = _named(choice, choice_field)
    if choice == "none":
        return {}
    if not functions:
        if named is not None or choice == "required":
            raise InvalidValue(f"'{choice_field}': it needs functions in '{field}'.", param=choice_field)
        return {}
    if named is not None:
        functions = [function for function in functions if function.name == named]
        if not functions:
            raise InvalidValue(f"'{choice_field}': there is no function '{named}' in '{field}'.", param=choice_field)
    is_required = named is not None or choice == "required"
    return {
        "tools": [{"type": "function", "function": _described(function)} for function in functions],
        **({"tool_choice": "required"} if is_required else {}),
        **({"parallel_tool_calls": False} if request.parallel_tool_calls is False else {}),
    }


def _functions(request: ChatRequest) -> tuple[str, list[Function]]:
    """Return the functions of a request, and the field that has them."""
    if request.tools and request.functions:
        raise InvalidValue("'functions' and 'tools' exclude each other.", param="functions")
    if request.functions:
        field, functions = "functions", {f"functions[{i}]": each for i, each in enumerate(request.functions)}
    else:
        field, functions = "tools", {}
        ignored = set[str]()
        for i, tool in enumerate(request.tools or []):
            path = f"tools[{i}]"
            if tool.type == "function":
                if tool.function is None:
                    raise MissingParameter(f"'{path}.function' is required.", param=f"{path}.function")
                functions[f"{path}.function"] = tool.function
            elif (hosted := next(filter(tool.type.startswith, HOSTED), None)) is not None:
                ignored.add(hosted)
            else:
                raise NotSupported(f"'{path}.type': tools of type '{tool.type}' are not supported.", param=path)
        if ignored:
            log.get("api").info("tools ignored", action="tools_ignored", types=sorted(ignored))
    if len(functions) > MOST_TOOLS:
        raise InvalidValue(f"'{field}': expected at most {MOST_TOOLS}, got {len(functions)}.", param=field)
    check_functions(functions)
    return field, [*functions.values()]


def check_functions(functions: dict[str, Function], parameters: str = "parameters") -> None:
    """Check functions, by their paths.  `parameters` is the field with the schema of each.

    Raises InvalidValue and NotSupported.
    """
    names = set[str]()
    for path, function in functions.items():
        if not TOOL_NAME.fullmatch(function.name):
            raise InvalidValue(f"'{path}.name': expected letters, digits, '_', '-' and '.'.", param=f"{path}.name")
        if function.name in names:
            raise InvalidValue(f"'{path}.name': '{function.name}' is there twice.", param=f"{path}.name")
        names.add(function.name)
        _check_parameters(function, f"{path}.{parameters}")


def _named(choice: str | dict[str, Any] | None, field: str) -> str | None:
    """Return the name of the function that a choice demands; None if it demands none."""
    match choice:
        case None | "none" | "auto":
            return None
        case "required" if field == "tool_choice":
            return None
        case {"type": "allowed_tools"}:
            raise NotSupported("'tool_choice': 'allowed_tools' is not supported.", param=field)
        case {"type": "function", "function": {"name": str(name)}} if field == "tool_choice":
            return name
        case {"name": str(name)} if field == "function_call":
            return name
        case _:
            forms = "'none', 'auto', 'required'" if field == "tool_choice" else "'none', 'auto'"
            raise InvalidValue(f"'{field}': expected one of {forms}, or an object that names a function.", param=field)


def _check_parameters(function: Function, path: str) -> None:
    """Check the schema of a function's arguments.  Raises InvalidValue, and NotSupported for what is not enforced."""
    parameters = function.parameters or {}
    if bytes(parameters.get("type", OBJECT)) != bytes(OBJECT):
        raise InvalidValue(f"'{path}.type': expected 'object'.", param=f"{path}.type")
    encoded = msgspec.json.encode(parameters).decode()
    if encoded.count("[") + encoded.count("{") > DEEPEST and _is_too_deep(encoded):
        raise InvalidValue(f"'{path}': it is nested at most {DEEPEST} levels deep.", param=path)
    if function.strict:
        for keyword in _not_enforced(msgspec.json.decode(encoded)):
            raise NotSupported(f"'{path}': '{keyword}' is not supported in a strict schema.", param=path)


def _not_enforced(schema: Any) -> Iterator[str]:
    """Yield the keywords of a JSON schema, and of those in it, that are not enforced everywhere."""
    todo = [schema]
    while todo:
        each = todo.pop()
        if isinstance(each, list):
            todo += each
        elif isinstance(each, dict):
            for keyword, value in each.items():
                if keyword not in ENFORCED and not _bounds(keyword, each):
                    yield keyword
                if keyword in ("properties", "$defs", "definitions") and isinstance(value, dict):
                    todo += value.values()
                elif keyword in ("items", "anyOf", "additionalProperties"):
                    todo.append(value)


def _bounds(keyword: str, schema: dict[str, Any]) -> bool:
    """Return whether a keyword of a JSON schema bounds integers or the length of an array, which is enforced."""
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if keyword in ("minItems", "maxItems"):
        return "array" in types and not isinstance(schema.get("items"), list)
    if keyword not in BOUNDS or "integer" not in types or "number" in types or BOUNDS[keyword] in schema:
        return False
    bound = schema[keyword]
    return isinstance(bound, int | float) and not isinstance(bound, bool) and abs(bound) <= LARGEST_BOUND


def _described(function: Function) -> dict[str, Any]:
    """Return a function as templates read it: always with a description, and with the properties of an object."""
    return {
        "name": function.name,
        **({"strict": True} if function.strict else {}),
        "description": function.description or "",
        "parameters": {"type": OBJECT, "properties": EMPTY, **(function.parameters or {})},
    }


def _prompted(request: ChatRequest, settings: ModelSettings) -> list[dict[str, Any]]:
    """Return the system prompt of the model for a conversation that has none of its own."""
    if settings.system_prompt is None or any(message.role in ("system", "developer") for message in request.messages):
        return []
    return [{"role": "system", "content": settings.system_prompt}]
