"""System messages after the first one, which some templates refuse and others leave out."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, json

from worker.chat.tools import text_of, with_text

ROLE = b'"system"'


class _Message(Struct):
    role: str = ""


class _Roles(Struct):
    messages: list[_Message]


class Fronted(Struct, frozen=True):
    """A conversation that has a system message as its first message only."""

    conversation: bytes
    texts: list[str]  # of its system messages before


def fronted(conversation: bytes) -> Fronted | None:
    """Return a conversation with its system messages as the first one; None if it has no other.

    One at the end, after an answer, becomes the user's: otherwise the answer would be continued.

    Raises MsgspecError.
    """
    if ROLE not in conversation:  # most bytes of a request are a conversation
        return None
    roles = json.decode(conversation, type=_Roles).messages
    if all(message.role != "system" for message in roles[1:]):
        return None
    fields: dict[str, Any] = json.decode(conversation)
    found = [message for message in fields["messages"] if message.get("role") == "system"]
    rest = [message for message in fields["messages"] if message.get("role") != "system"]
    texts = [text_of(message["content"]).strip() for message in found]
    if roles[-1].role == "system" and rest and rest[-1].get("role") == "assistant":
        rest.append({**found.pop(), "role": "user"})
    if found:
        first, *others = found
        for other in others:
            first = with_text(first, text_of(other["content"]))
        rest.insert(0, first)
    return Fronted(json.encode({**fields, "messages": rest}), texts)
