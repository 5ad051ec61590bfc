"""Stored responses: what a conversation leaves behind for the requests that continue it."""

from __future__ import annotations

import asyncio
import re
from typing import assert_never

import msgspec

from api.openai.request import CalledFunction, Message, ToolCall
from api.responses.items import Conversation
from api.responses.response import CallItem, Item, MessageItem, ReasoningItem, ResponseObject
from shared.errors import PreviousResponseNotFound
from shared.store.connection import UNAVAILABLE
from shared.store.responses import Responses, Stored
from shared.telemetry import log

ID = re.compile(r"resp_[0-9a-f]{48}")
PATIENCE_S = 5.0  # with which an answer that is complete waits for Redis

_messages = msgspec.json.Decoder(list[Message])


class Memory:
    """The stored responses of one client."""

    def __init__(self, responses: Responses, client: str) -> None:
        self._responses, self._client = responses, client

    @property
    def is_on(self) -> bool:
        """Whether responses are stored."""
        return self._responses.is_on

    async def earlier(self, id_: str | None) -> list[Message]:
        """Return the conversation up to and with a response.  None: there is none before.

        Raises PreviousResponseNotFound, and what UNAVAILABLE lists.
        """
        if id_ is None:
            return []
        stored = await self.get(id_)
        if stored is None:
            raise PreviousResponseNotFound(
                f"Previous response with id '{id_}' not found.", param="previous_response_id"
            )
        return _messages.decode(stored.conversation)

    async def keep(self, response: ResponseObject, earlier: list[Message]) -> bool:
        """Store a response after the messages that it answers.  Returns False if it cannot be stored now.

        The answer has been generated, so a fault of Redis does not take it from the client.
        """
        return await self._put(response.id, msgspec.json.encode(response), _messages_with(earlier, response.output))

    async def keep_chat(self, id_: str, conversation: list[Message]) -> bool:
        """Store the conversation of an answer that has no form of a response, as `keep` does."""
        return await self._put(id_, b"", conversation)

    async def _put(self, id_: str, response: bytes, conversation: list[Message]) -> bool:
        stored = Stored(response=response, conversation=msgspec.json.encode(conversation))
        try:
            async with asyncio.timeout(PATIENCE_S):
                is_kept = await self._responses.put(self._client, id_, stored)
        except UNAVAILABLE as e:
            log.get("api").warning("response not stored", action="response_not_stored", error=str(e))
            return False
        if not is_kept:
            log.get("api").info("response not stored", action="response_not_stored", error="It is too large.")
        return is_kept

    async def get(self, id_: str) -> Stored | None:
        """Return a response.  A malformed id is that of none: it could name another key."""
        return await self._responses.get(self._client, id_) if ID.fullmatch(id_) else None

    async def delete(self, id_: str) -> bool:
        """Remove a response.  Returns False if there is none."""
        return bool(ID.fullmatch(id_)) and await self._responses.delete(self._client, id_)

    async def delete_all(self) -> int:
        """Remove all responses; return how many there were."""
        return await self._responses.delete_all(self._client)


def _messages_with(earlier: list[Message], output: list[Item]) -> list[Message]:
    """Return messages, and after them those of an output, as if a client had sent its items."""
    made = Conversation(earlier)
    for item in output:
        match item:
            case ReasoningItem(content=content):
                made.reason("".join(part.text for part in content))
            case MessageItem(content=texts):
                made.say("".join(part.text for part in texts))
            case CallItem(call_id=id_, name=name, arguments=arguments):
                made.call(ToolCall(CalledFunction(name, msgspec.Raw(msgspec.json.encode(arguments))), id_))
            case _:
                assert_never(item)
    return made.whole()
