"""Answers the requests that need no step of the engine: what a conversation, a text and tokens are to the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol, assert_never

from shared.channel.messages import (
    TOKEN_BYTES,
    Describe,
    Described,
    Detokenize,
    Failed,
    FromRunner,
    Lookup,
    Queued,
    Refused,
    Render,
    Text,
    TokenDetail,
    Tokenize,
    Tokens,
    listed,
)
from worker.engine.gate import Gate, Refusal

SHORT = 1000  # characters; to tokenize a longer text takes milliseconds, and happens in another thread
MOST_TOKENS: dict[TokenDetail, int] = {"tokens": 131_072, "pieces": 32_768}  # of a reply that lists them


Send = Callable[[FromRunner], None]


class Vocabulary(Protocol):
    """The tokens of the model.  All methods are thread-safe."""

    n_tokens: int

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> bytes: ...

    def decode(self, tokens: list[int]) -> str: ...

    def description(self) -> tuple[str | None, str | None, str | None]: ...

    def pieces(self, tokens: list[int]) -> list[bytes]: ...


class Prompts(Protocol):
    """Makes the prompts of conversations.  All methods raise Refusal."""

    def place(self, message: Lookup) -> AbstractContextManager[None]:
        """Occupy a place among the requests that are being prepared."""

    async def text(self, id_: int, conversation: bytes) -> str:
        """Return the prompt of a conversation."""

    def bare(self, text: str) -> str:
        """Return a prompt without the control tokens that are put around every prompt."""


class Lookups:
    """Answers the requests.  Belongs to an asyncio loop; what takes long happens in other threads."""

    def __init__(self, vocabulary: Vocabulary, prompts: Prompts, gate: Gate, *, request_s: float) -> None:
        """`request_s`: the longest time until a request has its reply."""
        self._vocabulary, self._prompts, self._gate, self._request_s = vocabulary, prompts, gate, request_s

    def begin(
        self, message: Lookup, send: Send, beside: dict[int, asyncio.Task[None]], tasks: asyncio.TaskGroup
    ) -> None:
        """Answer a request that has passed the gate, in a task.  It is in `beside`, by its id, until its end."""
        task = beside[message.id] = tasks.create_task(self._answer(message, send))
        task.add_done_callback(partial(self._ended, message.id, beside))

    async def _answer(self, message: Lookup, send: Send) -> None:
        reply = await self._found(message)
        if not isinstance(reply, Refused | Failed):
            send(Queued(id=message.id, prompt_tokens=0, ahead=0))
        send(reply)

    def _ended(self, id_: int, beside: dict[int, asyncio.Task[None]], _: asyncio.Task[None]) -> None:
        """Take note of the end of a request, also if it was cancelled before it began."""
        del beside[id_]
        self._gate.leave()

    async def _found(self, message: Lookup) -> Text | Tokens | Described | Refused | Failed:
        """Return the reply to a request."""
        try:
            with self._prompts.place(message):
                async with asyncio.timeout(self._request_s):
                    return await self._reply(message)
        except Refusal as e:
            return e.refused
        except TimeoutError:
            return Failed(
                id=message.id, code="deadline", message=f"The request took longer than {self._request_s:g} s."
            )

    async def _reply(self, message: Lookup) -> Text | Tokens | Described:
        match message:
            case Render():
                return Text(id=message.id, text=await self._prompts.text(message.id, message.conversation))
            case Tokenize():
                if message.conversation is not None:
                    text = self._prompts.bare(await self._prompts.text(message.id, message.conversation))
                    tokenized = partial(self._tokens, message, text, add_special=True, parse_special=True)
                else:
                    text = message.text or ""
                    special = {"add_special": message.add_special, "parse_special": message.parse_special}
                    tokenized = partial(self._tokens, message, text, **special)
                return tokenized() if len(text) <= SHORT else await asyncio.to_thread(tokenized)
            case Detokenize():
                joined = partial(self._text, message)
                return joined() if len(message.tokens) <= SHORT else await asyncio.to_thread(joined)
            case Describe():
                bos, eos, template = self._vocabulary.description()
                return Described(id=message.id, bos=bos, eos=eos, template=template)
            case _:
                assert_never(message)

    def _tokens(self, message: Tokenize, text: str, *, add_special: bool, parse_special: bool) -> Tokens:
        ids = self._vocabulary.encode(text, add_special=add_special, parse_special=parse_special)
        n = len(ids) // TOKEN_BYTES
        reply = partial(Tokens, id=message.id, n=n)
        if n > (most := MOST_TOKENS.get(message.detail, n)):
            raise _invalid(message, f"The text has {n:,} tokens; at most {most:,} are listed. Send it in parts.")
        match message.detail:
            case "count":
                return reply()
            case "tokens":
                return reply(tokens=ids)
            case "pieces":
                return reply(tokens=ids, pieces=self._vocabulary.pieces(listed(ids)))
            case _:
                assert_never(message.detail)

    def _text(self, message: Detokenize) -> Text:
        n = self._vocabulary.n_tokens
        if message.tokens and not 0 <= min(message.tokens) <= max(message.tokens) < n:
            raise _invalid(message, f"'tokens': expected token ids from 0 to {n - 1}, of this model's vocabulary.")
        return Text(id=message.id, text=self._vocabulary.decode(message.tokens))


def _invalid(message: Tokenize | Detokenize, reason: str) -> Refusal:
    param = "tokens" if isinstance(message, Detokenize) else None
    return Refusal(Refused(id=message.id, code="invalid_request", message=reason, param=param))
