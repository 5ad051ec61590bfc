"""The requests of a runner: takes them from its channels, prepares them for the engine loop, and sends the answers.

All of it runs in the thread of one asyncio loop, except `hand_out`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Protocol, assert_never

from msgspec import Struct, structs

from shared.channel.messages import (
    Cancel,
    Delta,
    Deltas,
    Ended,
    Failed,
    FromRunner,
    Generate,
    Grammar,
    Queued,
    Refused,
    Schema,
    Started,
    ToRunner,
    Usage,
)
from shared.places import has_place
from worker.chat.code import ChatError, Message, ParserSource
from worker.chat.constraint import ConstraintError
from worker.chat.handle import HelperDied, HelpersEnded
from worker.chat.protocol import Constraint, Prompt
from worker.engine.constrain import Compiled
from worker.engine.gate import Gate
from worker.engine.job import Begun, Broken, Done, Job, Outcome, Piece, Rejected, Waiting
from worker.engine.reader import Reader
from worker.engine.slots import queue_full

CLOSING = "The model is being unloaded."
BROKEN = 1  # exit status of a runner that cannot answer any more
SHORT = 1000  # characters; to tokenize a longer text takes milliseconds, and happens in another thread


class Channel(Protocol):
    """A connection to an API process."""

    def send(self, message: FromRunner) -> None: ...

    def __aiter__(self) -> AsyncIterator[ToRunner]: ...


class Engine(Protocol):
    """The engine loop.  All methods are thread-safe."""

    def tokenize(self, text: str, special: bool) -> list[int]: ...

    def constrain(self, constraint: Constraint) -> Future[Compiled]: ...

    def submit(self, job: Job) -> None: ...

    def cancel(self, job: Job) -> None: ...


class Chat(Protocol):
    """The helper, with the template of the model."""

    async def render(self, conversation: bytes, output: Schema | Grammar | None) -> Prompt: ...

    async def parse(self, source: ParserSource, answer: str, *, partial: bool) -> Message: ...


class Ends(Struct, frozen=True):
    """The texts of the control tokens with which every prompt begins and ends; None if it does not."""

    begin: str | None
    end: str | None


class Refusal(Exception):
    """A request is refused: carries the message."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.refused = refused


class Request:
    """A request, until its end."""

    def __init__(self, channel: Outbox, generate: Generate, tasks: asyncio.TaskGroup) -> None:
        self.channel, self.generate, self.tasks = channel, generate, tasks
        self.arrived_at = time.monotonic()
        self.preparing: asyncio.Task[None] | None = None
        self.job: Job | None = None
        self.readers: list[Reader] = []
        self.unfinished = generate.choices
        self.done: Done | None = None
        self.is_queued = False


class Outbox:
    """The sending side of a channel, and its requests by id.

    Deltas wait for the end of a step, or for the next other message.
    """

    def __init__(self, channel: Channel) -> None:
        self.requests: dict[int, Request] = {}
        self._channel = channel
        self._deltas: list[Delta] = []

    def add(self, delta: Delta) -> None:
        self._deltas.append(delta)

    def send(self, message: FromRunner) -> None:
        self.flush()
        self._channel.send(message)

    def flush(self) -> None:
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            self._channel.send(Deltas(deltas))


class Requests:
    """The requests of all channels."""

    def __init__(
        self,
        engine: Engine,
        chat: Chat | str,
        loop: asyncio.AbstractEventLoop,
        gate: Gate,
        *,
        ends: Ends,
        context_length: int,
        request_s: float,
        max_output_tokens: int,
        most_waiting: int,
    ) -> None:
        """`chat`: a sentence that says why there is none, if so.  `request_s`: the longest time from the arrival of a
        request to its last token.  `max_output_tokens`: the most tokens of an answer, whatever a request asks for.
        `most_waiting`: the most requests that wait to be rendered; the engine loop has a limit of its own."""
        self._engine, self._chat, self._loop, self._gate = engine, chat, loop, gate
        self._ends, self._context_length, self._request_s = ends, context_length, request_s
        self._max_output_tokens, self._most_waiting = max_output_tokens, most_waiting
        self._preparing: Counter[str] = Counter()  # requests that are rendered and tokenized, by client
        self._requests: dict[Job, Request] = {}

    def hand_out(self, outcomes: list[Outcome]) -> None:
        """Take the outcomes of a step.  May be called from any thread."""
        self._loop.call_soon_threadsafe(self._take, outcomes)

    async def serve(self, channel: Channel) -> None:
        """Serve the requests of a channel until its end, and cancel those that are left."""
        outbox = Outbox(channel)
        try:
            async with asyncio.TaskGroup() as tasks:
                async for message in channel:
                    match message:
                        case Generate() if self._gate.enter():
                            outbox.requests[message.id] = request = Request(outbox, message, tasks)
                            request.preparing = tasks.create_task(self._begin(request))
                        case Generate():
                            outbox.send(Refused(id=message.id, code="closing", message=CLOSING))
                        case Cancel():
                            if (cancelled := outbox.requests.get(message.id)) is not None:
                                self._cancel(cancelled)
                        case _:
                            assert_never(message)
                self._cancel_all(outbox)
        finally:
            self._cancel_all(outbox)

    # ---- the beginning

    async def _begin(self, request: Request) -> None:
        generate = request.generate
        try:
            with self._place(generate):
                async with asyncio.timeout(self._request_s):
                    prompt, tokens = await self._prepared(generate)
                    constraint = await self._constrained(generate, prompt)
        except Refusal as e:
            self._end(request, e.refused)
            return
        except TimeoutError:
            message = f"The request was not rendered within {self._request_s:g} s."
            self._end(request, Failed(id=generate.id, code="deadline", message=message))
            return
        request.job = job = Job(
            client=generate.client,
            tokens=tokens,
            choices=generate.choices,
            max_tokens=min(generate.max_tokens or self._max_output_tokens, self._max_output_tokens),
            sampling=generate.sampling,
            stop=[*generate.stop, *prompt.stops],
            logprobs=generate.logprobs,
            constraint=constraint,
            shown=frozenset(token for text in prompt.shown if (token := self._token(text)) is not None),
            arrived_at=request.arrived_at,
            deadline=request.arrived_at + self._request_s,
        )
        request.readers = [
            Reader(
                Delta(id=generate.id, choice=choice),
                prompt,
                partial(self._parse, prompt.source),
                partial(self._read, request),
                request.tasks.create_task,
            )
            for choice in range(generate.choices)
        ]
        self._requests[job] = request
        self._engine.submit(job)

    @contextmanager
    def _place(self, generate: Generate) -> Iterator[None]:
        """Occupy a place among the requests that are being prepared: one at a time is.  Raises Refusal."""
        if not has_place(generate.client, self._preparing, self._most_waiting):
            message = queue_full(self._most_waiting)
            raise Refusal(Refused(id=generate.id, code="queue_full", message=message, retry_after_s=1))
        self._preparing[generate.client] += 1
        try:
            yield
        finally:
            self._preparing[generate.client] -= 1
            self._preparing += Counter()  # drops clients without one

    async def _prepared(self, generate: Generate) -> tuple[Prompt, list[int]]:
        """Render and tokenize the conversation.  Raises Refusal."""
        refused = partial(Refused, id=generate.id)
        if isinstance(self._chat, str):
            raise Refusal(refused(code="chat_unavailable", message=self._chat))
        try:
            prompt = await self._chat.render(generate.conversation, generate.output)
        except ConstraintError as e:
            raise Refusal(_unenforceable(generate, e)) from None
        except ChatError as e:
            message = f"The model's chat template rejects the conversation: {e}"
            raise Refusal(refused(code="invalid_request", message=message, param="messages")) from None
        except HelpersEnded as e:
            sys.stderr.write(f"error: {e}\n")
            os._exit(BROKEN)  # else the instance would stay, and refuse every conversation
        except HelperDied as e:
            message = f"The model's chat template cannot render this conversation: {e}."
            raise Refusal(refused(code="helper_crashed", message=message, param="messages")) from None
        tokens = await self._tokens(prompt.text)
        if len(tokens) + 1 > self._context_length:
            message = f"The prompt has {len(tokens)} tokens; the context is for {self._context_length}."
            numbers = {"prompt_tokens": len(tokens), "context_length": self._context_length}
            raise Refusal(refused(code="context_length_exceeded", message=message, param="messages", **numbers))
        if not tokens:
            message = "The model's chat template renders the conversation to an empty prompt."
            raise Refusal(refused(code="invalid_request", message=message, param="messages"))
        return prompt, tokens

    async def _constrained(self, generate: Generate, prompt: Prompt) -> Compiled | None:
        """Compile the constraint on the answers.  Raises Refusal."""
        if prompt.constraint is None:
            return None
        try:
            constraint = structs.replace(prompt.constraint, shown=prompt.shown)
            return await asyncio.wrap_future(self._engine.constrain(constraint))
        except ConstraintError as e:
            raise Refusal(_unenforceable(generate, e)) from None

    async def _tokens(self, text: str) -> list[int]:
        """Tokenize a prompt.  Tokens that begin and end every prompt are not doubled if the template writes them, as in
        llama-server (common_chat_template_direct_apply_impl, common/chat.cpp)."""
        text = text.removeprefix(self._ends.begin or "").removesuffix(self._ends.end or "")
        if len(text) <= SHORT:
            return self._engine.tokenize(text, True)
        return await asyncio.to_thread(self._engine.tokenize, text, True)

    def _token(self, text: str) -> int | None:
        """Return the control token that a text spells; None if it is not one token."""
        tokens = self._engine.tokenize(text, True)
        tokens = tokens[self._ends.begin is not None : len(tokens) - (self._ends.end is not None)]
        return tokens[0] if len(tokens) == 1 else None

    # ---- the answer

    def _take(self, outcomes: list[Outcome]) -> None:
        """Send the outcomes of a step: one message of deltas for each channel."""
        touched = set[Outbox]()
        for outcome in outcomes:
            request = self._requests.get(outcome.job)
            if request is None:  # it was cancelled
                continue
            touched.add(request.channel)
            self._take_one(request, outcome)
        for channel in touched:
            channel.flush()

    def _take_one(self, request: Request, outcome: Outcome) -> None:
        id_ = request.generate.id
        match outcome:
            case Waiting():
                self._queued(request, outcome.ahead)
            case Begun():
                self._queued(request, 0)
                request.channel.send(Started(id=id_, cached_tokens=outcome.cached_tokens))
            case Piece():
                if delta := request.readers[outcome.choice].add(outcome):
                    request.channel.add(delta)
                    self._finished(request, delta)
            case Done():
                request.done = outcome
                self._complete(request)
            case Rejected():
                refused = Refused(
                    id=id_,
                    code=outcome.code,
                    message=outcome.message,
                    param=outcome.param,
                    retry_after_s=outcome.retry_after_s,
                )
                self._end(request, refused)
            case Broken():
                self._end(request, Failed(id=id_, code=outcome.code, message=outcome.message))
            case _:
                assert_never(outcome)

    def _queued(self, request: Request, ahead: int) -> None:
        if not request.is_queued:
            request.is_queued = True
            assert request.job is not None
            queued = Queued(id=request.generate.id, prompt_tokens=len(request.job.tokens), ahead=ahead)
            request.channel.send(queued)

    async def _parse(self, source: ParserSource | None, text: str, is_partial: bool) -> Message:
        assert not isinstance(self._chat, str)
        assert source is not None
        return await self._chat.parse(source, text, partial=is_partial)

    def _read(self, request: Request, delta: Delta) -> None:
        """Send a delta that a reader found out."""
        request.channel.send(Deltas([delta]))
        self._finished(request, delta)

    def _finished(self, request: Request, delta: Delta) -> None:
        if delta.finish is not None:
            request.unfinished -= 1
            self._complete(request)

    def _complete(self, request: Request) -> None:
        """Send the end of a request once the engine is done and all answers are sent."""
        done = request.done
        if done is None or request.unfinished:
            return
        usage = Usage(
            prompt_tokens=len(done.job.tokens),
            cached_tokens=done.cached_tokens,
            generated_tokens=done.generated_tokens,
            reasoning_tokens=sum(reader.reasoning_tokens for reader in request.readers),
            wait_s=done.wait_s,
            prompt_s=done.prompt_s,
            generation_s=done.generation_s,
        )
        self._end(request, Ended(id=request.generate.id, usage=usage))

    def _end(self, request: Request, last: Refused | Failed | Ended) -> None:
        self._forget(request)
        request.channel.send(last)

    def _forget(self, request: Request) -> None:
        request.channel.requests.pop(request.generate.id)
        self._gate.leave()
        if request.job is not None:
            del self._requests[request.job]
        for reader in request.readers:
            reader.cancel()

    def _cancel(self, request: Request) -> None:
        assert request.preparing is not None
        request.preparing.cancel()
        if request.job is not None:
            self._engine.cancel(request.job)
        self._forget(request)

    def _cancel_all(self, outbox: Outbox) -> None:
        for request in [*outbox.requests.values()]:
            self._cancel(request)


def _unenforceable(generate: Generate, error: ConstraintError) -> Refused:
    """Return the refusal of a request whose answers cannot have the form that it asks for."""
    match generate.output:
        case Schema():
            message, param = f"This server cannot enforce the schema: {error}.", "response_format"
        case Grammar():
            message, param = f"Failed to parse the grammar, or to enforce it: {error}.", "grammar"
        case None:
            message, param = f"This server cannot enforce the form of calls of the tools: {error}.", "tools"
        case _:
            assert_never(generate.output)
    return Refused(id=generate.id, code="invalid_request", message=message, param=param)
