"""Messages of the user after each other, which templates that want turns refuse."""

from __future__ import annotations

from typing import Any

from msgspec import json

from worker.chat.tools import text_of, with_text


def joined(conversation: bytes) -> bytes | None:
    """Return a conversation in which messages of the user after each other are one; None if there are no such.

    Raises MsgspecError.
    """
    fields: dict[str, Any] = json.decode(conversation)
    messages: list[dict[str, Any]] = []
    for message in fields["messages"]:
        if messages and message.get("role") == messages[-1].get("role") == "user":
            messages[-1] = with_text(messages[-1], text_of(message["content"]))
        else:
            messages.append(message)
    if len(messages) == len(fields["messages"]):
        return None
    return json.encode({**fields, "messages": messages})
