"""The requests of an embedding model: takes them from its channels, tokenizes their texts, and sends the vectors.

All of it runs in the thread of one asyncio loop, except `hand_out`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import assert_never

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from shared.channel.messages import (
    Cancel,
    Complete,
    Describe,
    Detokenize,
    Embed,
    Ended,
    Failed,
    Generate,
    Queued,
    Rank,
    Refused,
    Render,
    Tokenize,
    ToModel,
    Usage,
    Vectors,
)
from shared.places import has_place
from worker.engine.embedding import Computed, Embedding, Result, Texts, Unfinished, Waits
from worker.engine.gate import Gate, Refusal
from worker.engine.lookups import SHORT, Lookups
from worker.engine.requests import CLOSING, Channel
from worker.engine.slots import queue_full

LARGEST = np.iinfo(np.int32).max
PLACEHOLDER = re.compile(r"\{query\}|\{document\}")
NOTHING_ELSE = "This is an embedding model: it computes vectors or scores of texts, and nothing else."
CHATS_NOT = "This is an embedding model: it has no chat template."
EMBEDS_NOT = "This model ranks documents: it computes no embeddings."
RANKS_NOT = "This model computes embeddings: it does not rank documents."

Tokens = NDArray[np.int32]


class Pairs(Struct, frozen=True, kw_only=True):
    """How a model that ranks reads a query and a document: by a template with `{query}` and `{document}`, or with
    tokens around them, as in llama-server (format_prompt_rerank, tools/server/server-common.cpp)."""

    template: str | None = None
    begin: list[int] = []
    between: list[int] = []
    end: list[int] = []

    def text(self, query: str, document: str) -> str:
        """Return a query and a document in the template."""
        assert self.template is not None
        values = {"{query}": query, "{document}": document}
        return PLACEHOLDER.sub(lambda name: values[name[0]], self.template)


@dataclass(eq=False, slots=True)
class _Request:
    """A request, until its end."""

    asked: Embed | Rank
    channel: Channel
    beside: dict[int, _Request]  # the requests of its channel by id, this one included
    arrived_at: float
    preparing: asyncio.Task[None] | None = None
    job: Texts | None = None


class TextRequests:
    """The requests of all channels."""

    def __init__(
        self,
        engine: Embedding,
        loop: asyncio.AbstractEventLoop,
        gate: Gate,
        *,
        pairs: Pairs | None,
        context_length: int,
        request_s: float,
        most_waiting: int,
    ) -> None:
        """`pairs`: of a model that ranks; None: it embeds.  `request_s`: the longest time from the arrival of a request
        to its last vector.  `most_waiting`: the most requests that are tokenized; the engine loop has a limit of its
        own."""
        self._engine, self._loop, self._gate, self._pairs = engine, loop, gate, pairs
        self._request_s, self._most_waiting = request_s, most_waiting
        self._vocabulary = engine.vocabulary
        self._longest = min(context_length, engine.longest)  # tokens of a text
        self._tokenizing: Counter[str] = Counter()  # requests, by client
        self._requests: dict[Texts, _Request] = {}
        self._lookups = Lookups(engine.vocabulary, self, gate, request_s=request_s)

    def hand_out(self, results: list[Result]) -> None:
        """Take the results of a step.  May be called from any thread."""
        self._loop.call_soon_threadsafe(self._take, results)

    async def serve(self, channel: Channel) -> None:
        """Serve the requests of a channel until its end, and cancel those that are left."""
        requests: dict[int, _Request] = {}
        lookups: dict[int, asyncio.Task[None]] = {}
        try:
            async with asyncio.TaskGroup() as tasks:
                async for message in channel:
                    match message:
                        case Embed() | Rank() if (unable := self._unable(message)) is not None:
                            channel.send(unable)
                        case Embed() | Rank() if self._gate.enter():
                            request = _Request(message, channel, requests, time.monotonic())
                            requests[message.id] = request
                            request.preparing = tasks.create_task(self._begin(request))
                        case Render() | Tokenize() | Detokenize() | Describe() if self._gate.enter():
                            self._lookups.begin(message, channel.send, lookups, tasks)
                        case Embed() | Rank() | Render() | Tokenize() | Detokenize() | Describe():
                            channel.send(Refused(id=message.id, code="closing", message=CLOSING))
                        case Generate() | Complete():
                            channel.send(_wrong(message.id, NOTHING_ELSE))
                        case Cancel():
                            if (cancelled := requests.get(message.id)) is not None:
                                self._cancel(cancelled)
                            elif (looking_up := lookups.get(message.id)) is not None:
                                looking_up.cancel()
                        case _:
                            assert_never(message)
                self._cancel_all(requests, lookups)
        finally:
            self._cancel_all(requests, lookups)

    def _unable(self, message: Embed | Rank) -> Refused | None:
        match message:
            case Embed():
                return None if self._pairs is None else _wrong(message.id, EMBEDS_NOT)
            case Rank():
                return None if self._pairs is not None else _wrong(message.id, RANKS_NOT)
            case _:
                assert_never(message)

    async def _begin(self, request: _Request) -> None:
        asked = request.asked
        try:
            with self.place(asked):
                tokens = await self._tokens(asked)
        except Refusal as e:
            self._end(request, e.refused)
            return
        request.job = job = Texts(
            client=asked.client,
            tokens=tokens,
            arrived_at=request.arrived_at,
            deadline=request.arrived_at + self._request_s,
        )
        self._requests[job] = request
        self._engine.submit(job)

    @contextmanager
    def place(self, asked: ToModel) -> Iterator[None]:
        """Occupy a place among the requests that are tokenized.  Raises Refusal."""
        if not has_place(asked.client, self._tokenizing, self._most_waiting):
            message = queue_full(self._most_waiting)
            raise Refusal(Refused(id=asked.id, code="queue_full", message=message, retry_after_s=1))
        self._tokenizing[asked.client] += 1
        try:
            yield
        finally:
            self._tokenizing[asked.client] -= 1
            self._tokenizing += Counter()  # drops clients without one

    async def text(self, id_: int, conversation: bytes) -> str:
        """Refuse a conversation."""
        raise Refusal(Refused(id=id_, code="chat_unavailable", message=CHATS_NOT))

    def bare(self, text: str) -> str:
        return text

    async def _tokens(self, asked: Embed | Rank) -> list[Tokens]:
        """Return the tokens of each text.  Many are tokenized in another thread.  Raises Refusal."""
        match asked:
            case Embed():
                n = sum(map(len, asked.texts)) + sum(map(len, asked.tokens))
                tokens: Iterator[Tokens] = map(_given, asked.tokens) if asked.tokens else map(self._prompt, asked.texts)
            case Rank():
                n = len(asked.query) * len(asked.documents) + sum(map(len, asked.documents))
                tokens = self._tokens_of_pairs(asked)
            case _:
                assert_never(asked)
        checked = partial(self._checked, asked, tokens)
        return checked() if n <= SHORT else await asyncio.to_thread(checked)

    def _prompt(self, text: str) -> Tokens:
        return self._encoded(text, add_special=True, parse_special=True)

    def _encoded(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> Tokens:
        return np.frombuffer(
            self._vocabulary.encode(text, add_special=add_special, parse_special=parse_special), np.int32
        )

    def _tokens_of_pairs(self, rank: Rank) -> Iterator[Tokens]:
        pairs = self._pairs
        assert pairs is not None
        if pairs.template is not None:
            for document in rank.documents:
                yield self._encoded(pairs.text(rank.query, document), parse_special=True)
            return
        before = np.concatenate([_given(pairs.begin), self._encoded(rank.query), _given(pairs.between)])
        for document in rank.documents:
            yield np.concatenate([before, self._encoded(document), _given(pairs.end)])

    def _checked(self, asked: Embed | Rank, tokens: Iterator[Tokens]) -> list[Tokens]:
        """Return the tokens of all texts.  Raises Refusal at the first text that is empty, too long, or has a token
        that the model does not know."""
        refused = partial(Refused, id=asked.id, param="input" if isinstance(asked, Embed) else "documents")
        n_known = self._vocabulary.n_tokens
        checked: list[Tokens] = []
        for index, one in enumerate(tokens):
            if not len(one):
                raise Refusal(refused(code="invalid_request", message=f"Text {index} has no tokens."))
            if len(one) > self._longest:
                message = f"Text {index} is too large: it has {len(one)} tokens, and the model takes {self._longest}."
                too_long = refused(code="context_length_exceeded", message=message)
                raise Refusal(structs.replace(too_long, prompt_tokens=len(one), context_length=self._longest))
            if not 0 <= one.min() <= one.max() < n_known:
                message = (
                    f"Text {index} has a token that is not among the {n_known:,} tokens of this model, 0 to "
                    f"{n_known - 1}. Tokens of another tokenizer, such as those of OpenAI's models, mean other texts "
                    "here: send the text itself."
                )
                raise Refusal(refused(code="invalid_request", message=message))
            checked.append(one)
        return checked

    # ---- the results

    def _take(self, results: list[Result]) -> None:
        for result in results:
            request = self._requests.get(result.texts)
            if request is not None:  # else it was cancelled
                self._take_one(request, result)

    def _take_one(self, request: _Request, result: Result) -> None:
        id_ = request.asked.id
        match result:
            case Waits():
                n_tokens = sum(map(len, result.texts.tokens))
                request.channel.send(Queued(id=id_, prompt_tokens=n_tokens, ahead=result.ahead))
            case Computed():
                vectors = result.vectors
                request.channel.send(Vectors(id=id_, n=len(vectors), data=vectors.astype("<f4").tobytes()))
                if result.is_last:
                    self._end(request, Ended(id=id_, usage=_usage(result.texts)))
            case Unfinished():
                self._end(request, _unfinished(id_, result))
            case _:
                assert_never(result)

    def _end(self, request: _Request, last: Refused | Failed | Ended) -> None:
        self._forget(request)
        request.channel.send(last)

    def _forget(self, request: _Request) -> None:
        request.beside.pop(request.asked.id)
        if request.job is not None:
            del self._requests[request.job]
        self._gate.leave()

    def _cancel(self, request: _Request) -> None:
        assert request.preparing is not None
        request.preparing.cancel()
        if request.job is not None:
            self._engine.cancel(request.job)
        self._forget(request)

    def _cancel_all(self, requests: dict[int, _Request], lookups: dict[int, asyncio.Task[None]]) -> None:
        for looking_up in lookups.values():
            looking_up.cancel()
        for request in [*requests.values()]:
            self._cancel(request)


def _given(tokens: list[int]) -> Tokens:
    """Return the tokens that a client gave; the type has what is beyond it as tokens that no model knows."""
    return np.array(tokens, np.int64).clip(-1, LARGEST).astype(np.int32)


def _wrong(id_: int, message: str) -> Refused:
    return Refused(id=id_, code="wrong_type", message=message, param="model")


def _unfinished(id_: int, result: Unfinished) -> Refused | Failed:
    match result.code:
        case "queue_full" | "queue_timeout":
            return Refused(id=id_, code=result.code, message=result.message, retry_after_s=result.retry_after_s)
        case "deadline" | "engine_failed":
            return Failed(id=id_, code=result.code, message=result.message)
        case _:
            assert_never(result.code)


def _usage(texts: Texts) -> Usage:
    return Usage(
        prompt_tokens=sum(map(len, texts.tokens)),
        cached_tokens=0,
        generated_tokens=0,
        reasoning_tokens=0,
        wait_s=texts.began_at - texts.arrived_at,
        prompt_s=time.monotonic() - texts.began_at,
        generation_s=0.0,
    )
