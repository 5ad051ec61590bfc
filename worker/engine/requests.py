"""The requests of a runner: takes them from its channels, prepares them for the engine loop, and sends the answers.

All of it runs in the thread of one asyncio loop, except `hand_out`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, assert_never

from msgspec import Struct, structs

from shared.channel.messages import (
    Cancel,
    Complete,
    Delta,
    Deltas,
    Describe,
    Detokenize,
    Embed,
    Ended,
    Failed,
    FromRunner,
    Generate,
    Grammar,
    Progress,
    Queued,
    Rank,
    Refused,
    Render,
    Schema,
    Started,
    Tokenize,
    ToModel,
    ToRunner,
    Usage,
)
from shared.places import has_place
from worker.chat.code import ChatError, Message, ParserSource
from worker.chat.constraint import ConstraintError
from worker.chat.handle import HelperDied, HelpersEnded
from worker.chat.protocol import Constraint, Prompt
from worker.engine.constrain import Compiled
from worker.engine.gate import Gate, Refusal
from worker.engine.job import Begun, Broken, Done, Job, Outcome, Piece, Reading, Rejected, Waiting
from worker.engine.lookups import SHORT, Lookups, Vocabulary
from worker.engine.reader import Reader
from worker.engine.slots import queue_full

CLOSING = "The model is being unloaded."
BROKEN = 1  # exit status of a runner that cannot answer any more
WRONG_TYPE = "This is a chat model: it computes no embeddings and no scores."
AS_IT_IS = Prompt(text="", stops=[], shown=[], source=None)  # for the readers of answers that no template wrote


class Channel(Protocol):
    """A connection to an API process."""

    def send(self, message: FromRunner) -> None: ...

    def __aiter__(self) -> AsyncIterator[ToRunner]: ...


class Engine(Protocol):
    """The engine loop.  All methods are thread-safe."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def tokenize(self, text: str, special: bool) -> list[int]: ...

    def infill(self, before: list[int], after: list[int]) -> list[int] | None: ...
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


class Prepared(Struct, frozen=True):
    """A prompt for the engine."""

    tokens: list[int]
    echo: Delta | None = None  # with which its answers begin, but for the ids
    prompt: Prompt = AS_IT_IS  # how its answers are read
    constraint: Compiled | None = None  # on its answers


@dataclass(frozen=True, slots=True)
class _Answers:
    """The answers to one prompt."""

    echo: Delta | None  # with which they begin
    readers: list[Reader]


class Request:
    """A request, until its end.  It has a job for each of its prompts."""

    def __init__(self, channel: Outbox, order: Generate | Complete, tasks: asyncio.TaskGroup) -> None:
        self.channel, self.order, self.tasks = channel, order, tasks
        self.arrived_at = time.monotonic()
        self.preparing: asyncio.Task[None] | None = None
        self.answers: dict[Job, _Answers] = {}
        self.waiting: deque[Job] = deque()  # the engine does not have them yet
        self.submitted: set[Job] = set()
        self.done: list[Done] = []
        self.unfinished = 0  # answers
        self.is_queued = False
        self.is_started = False

    @property
    def n_prompt(self) -> int:
        """The number of tokens of all prompts."""
        return sum(len(job.tokens) for job in self.answers)


class Outbox:
    """The sending side of a channel, and its requests by id.

    Deltas wait for the end of a step, or for the next other message.
    """

    def __init__(self, channel: Channel) -> None:
        self.requests: dict[int, Request] = {}
        self.lookups: dict[int, asyncio.Task[None]] = {}
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
        parallel: int,
        request_s: float,
        max_output_tokens: int,
        most_waiting: int,
    ) -> None:
        """`chat`: a sentence that says why there is none, if so.  `parallel`: the most answers that a request gets at
        once.  `request_s`: the longest time from the arrival of a request to its last token.  `max_output_tokens`: the
        most tokens of an answer, whatever a request asks for.  `most_waiting`: the most requests that wait to be
        rendered; the engine loop has a limit of its own."""
        self._engine, self._chat, self._loop, self._gate = engine, chat, loop, gate
        self._ends, self._context_length, self._request_s = ends, context_length, request_s
        self._parallel = parallel
        self._max_output_tokens, self._most_waiting = max_output_tokens, most_waiting
        self._preparing: Counter[str] = Counter()  # requests that are rendered and tokenized, by client
        self._requests: dict[Job, Request] = {}
        self._lookups = Lookups(engine.vocabulary, self, gate, request_s=request_s)

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
                        case Generate() | Complete() if self._gate.enter():
                            outbox.requests[message.id] = request = Request(outbox, message, tasks)
                            request.preparing = tasks.create_task(self._begin(request))
                        case Render() | Tokenize() | Detokenize() | Describe() if self._gate.enter():
                            self._lookups.begin(message, outbox.send, outbox.lookups, tasks)
                        case Generate() | Complete() | Render() | Tokenize() | Detokenize() | Describe():
                            outbox.send(Refused(id=message.id, code="closing", message=CLOSING))
                        case Embed() | Rank():
                            channel.send(Refused(id=message.id, code="wrong_type", message=WRONG_TYPE, param="model"))
                        case Cancel():
                            if (cancelled := outbox.requests.get(message.id)) is not None:
                                self._cancel(cancelled)
                            elif (looking_up := outbox.lookups.get(message.id)) is not None:
                                looking_up.cancel()
                        case _:
                            assert_never(message)
                self._cancel_all(outbox)
        finally:
            self._cancel_all(outbox)

    # ---- the beginning

    async def _begin(self, request: Request) -> None:
        order = request.order
        try:
            with self.place(order):
                async with asyncio.timeout(self._request_s):
                    prepared = await self._prepared(order)
        except Refusal as e:
            self._end(request, e.refused)
            return
        except TimeoutError:
            message = f"The request was not rendered within {self._request_s:g} s."
            self._end(request, Failed(id=order.id, code="deadline", message=message))
            return
        for each in prepared:
            job = self._job(request, each)
            request.answers[job] = self._answers(request, each)
            request.waiting.append(job)
        request.unfinished = order.choices * len(prepared)
        self._submit(request)

    def _job(self, request: Request, prepared: Prepared) -> Job:
        order, prompt, most = request.order, prepared.prompt, self._max_output_tokens
        thinking_tokens = order.thinking_tokens if isinstance(order, Generate) else None
        return Job(
            client=order.client,
            tokens=prepared.tokens,
            choices=order.choices,
            max_tokens=most if order.max_tokens is None else min(order.max_tokens, most),
            sampling=order.sampling,
            stop=order.stop,
            ends=prompt.stops,
            logprobs=order.logprobs,
            scores_prompt=isinstance(order, Complete) and order.echo and order.logprobs is not None,
            reports_end=isinstance(order, Complete),
            is_accepted=bool(request.answers),
            constraint=prepared.constraint,
            thinking=None if thinking_tokens is None else prompt.thinking,
            thinking_tokens=thinking_tokens or 0,
            reports_progress=isinstance(order, Generate) and order.reports_progress,
            shown=frozenset(token for text in prompt.shown if (token := self._token(text)) is not None),
            arrived_at=request.arrived_at,
            deadline=request.arrived_at + self._request_s,
        )

    def _answers(self, request: Request, prepared: Prepared) -> _Answers:
        first = len(request.answers) * request.order.choices
        empty = [Delta(id=request.order.id, choice=first + i) for i in range(request.order.choices)]
        readers = [
            Reader(
                each,
                prepared.prompt,
                partial(self._parse, prepared.prompt.source),
                partial(self._read, request),
                request.tasks.create_task,
            )
            for each in empty
        ]
        echo = None if prepared.echo is None else structs.replace(prepared.echo, id=request.order.id, choice=first)
        return _Answers(echo, readers)

    def _submit(self, request: Request) -> None:
        """Give the next job of a request to the engine."""
        job = request.waiting.popleft()
        request.submitted.add(job)
        self._requests[job] = request
        self._engine.submit(job)

    @contextmanager
    def place(self, asked: ToModel) -> Iterator[None]:
        """Occupy a place among the requests that are being prepared: one at a time is.  Raises Refusal."""
        if not has_place(asked.client, self._preparing, self._most_waiting):
            message = queue_full(self._most_waiting)
            raise Refusal(Refused(id=asked.id, code="queue_full", message=message, retry_after_s=1))
        self._preparing[asked.client] += 1
        try:
            yield
        finally:
            self._preparing[asked.client] -= 1
            self._preparing += Counter()  # drops clients without one

    async def _prepared(self, order: Generate | Complete) -> list[Prepared]:
        """Return the prompts of a request.  Raises Refusal."""
        match order:
            case Generate():
                return [await self._conversation(order)]
            case Complete():
                if sum(map(len, order.prompts)) + len(order.suffix) <= SHORT:
                    return self._continued(order)
                return await asyncio.to_thread(self._continued, order)
            case _:
                assert_never(order)

    async def _conversation(self, generate: Generate) -> Prepared:
        """Render and tokenize the conversation.  Raises Refusal."""
        refused = partial(Refused, id=generate.id, param="messages")
        prompt = await self._rendered(generate.id, generate.conversation, generate.output)
        if len(prompt.text) <= SHORT:
            tokens = self._tokens(prompt.text)
        else:
            tokens = await asyncio.to_thread(self._tokens, prompt.text)
        self._check_length(tokens, refused)
        if not tokens:
            message = "The model's chat template renders the conversation to an empty prompt."
            raise Refusal(refused(code="invalid_request", message=message))
        return Prepared(tokens, prompt=prompt, constraint=await self._constrained(generate, prompt))

    async def _rendered(self, id_: int, conversation: bytes, output: Schema | Grammar | None = None) -> Prompt:
        """Render a conversation.  Raises Refusal."""
        refused = partial(Refused, id=id_, param="messages")
        if isinstance(self._chat, str):
            raise Refusal(Refused(id=id_, code="chat_unavailable", message=self._chat))
        try:
            return await self._chat.render(conversation, output)
        except ConstraintError as e:
            raise Refusal(_unenforceable(id_, output, e)) from None
        except ChatError as e:
            message = f"The model's chat template rejects the conversation: {e}"
            raise Refusal(refused(code="invalid_request", message=message)) from None
        except HelpersEnded as e:
            sys.stderr.write(f"error: {e}\n")
            os._exit(BROKEN)  # else the instance would stay, and refuse every conversation
        except HelperDied as e:
            message = f"The model's chat template cannot render this conversation: {e}."
            raise Refusal(refused(code="helper_crashed", message=message)) from None

    def _continued(self, complete: Complete) -> list[Prepared]:
        """Tokenize prompts without a template.  Raises Refusal."""
        refused = partial(Refused, id=complete.id, param="prompt")
        after = self._engine.tokenize(complete.suffix, False)
        prepared = []
        for prompt in complete.prompts:
            if isinstance(prompt, list):
                self._check_tokens(prompt, refused)
            tokens: list[int] | None
            if complete.suffix:
                before = prompt if isinstance(prompt, list) else self._engine.tokenize(prompt, False)
                tokens = self._engine.infill(before, after)
                if tokens is None:
                    message = "'suffix': the model has no tokens for a text between two others."
                    raise Refusal(Refused(id=complete.id, code="invalid_request", message=message, param="suffix"))
            else:
                tokens = prompt if isinstance(prompt, list) else self._tokens(prompt)
            self._check_length(tokens, refused)
            if not tokens:
                message = "'prompt': it is empty, and the model has no token with which every prompt begins."
                raise Refusal(refused(code="invalid_request", message=message))
            prepared.append(Prepared(tokens, self._echo(prompt, tokens) if complete.echo else None))
        return prepared

    def _echo(self, prompt: str | list[int], tokens: list[int]) -> Delta:
        """Return a prompt as the beginning of its answers.  Its tokens may begin with one of which the prompt knows
        nothing, and with a space."""
        text = b"".join(self._engine.vocabulary.pieces(tokens)).decode("utf-8", "replace")
        if isinstance(prompt, list):
            return Delta(id=0, echo=text)
        return Delta(id=0, echo=prompt, skipped=max(0, len(text) - len(prompt)))

    def _check_tokens(self, tokens: list[int], refused: Callable[..., Refused]) -> None:
        """Raise Refusal for tokens that the model does not have: the engine would read beyond its tables."""
        n = self._engine.vocabulary.n_tokens
        wrong = next((token for token in tokens if not 0 <= token < n), None)
        if wrong is not None:
            message = f"'prompt': the model has no token {wrong} (its vocabulary has {n} tokens)."
            raise Refusal(refused(code="invalid_request", message=message))

    def _check_length(self, tokens: list[int], refused: Callable[..., Refused]) -> None:
        """Raise Refusal for a prompt that leaves no room for an answer."""
        if len(tokens) + 1 > self._context_length:
            message = f"The prompt has {len(tokens)} tokens; the context is for {self._context_length}."
            numbers = {"prompt_tokens": len(tokens), "context_length": self._context_length}
            raise Refusal(refused(code="context_length_exceeded", message=message, **numbers))

    async def _constrained(self, generate: Generate, prompt: Prompt) -> Compiled | None:
        """Compile the constraint on the answers.  Raises Refusal."""
        if prompt.constraint is None:
            return None
        try:
            constraint = structs.replace(prompt.constraint, shown=prompt.shown)
            return await asyncio.wrap_future(self._engine.constrain(constraint))
        except ConstraintError as e:
            raise Refusal(_unenforceable(generate.id, generate.output, e)) from None

    async def text(self, id_: int, conversation: bytes) -> str:
        """Return the prompt of a conversation, as the template writes it.  Raises Refusal."""
        return (await self._rendered(id_, conversation)).text

    def bare(self, text: str) -> str:
        """Return a prompt without the tokens that begin and end every prompt.  They are not doubled if it spells
        them, as in llama-server (common_chat_template_direct_apply_impl, common/chat.cpp)."""
        return text.removeprefix(self._ends.begin or "").removesuffix(self._ends.end or "")

    def _tokens(self, text: str) -> list[int]:
        """Tokenize a prompt."""
        return self._engine.tokenize(self.bare(text), True)

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
        id_ = request.order.id
        match outcome:
            case Waiting():
                self._queued(request, outcome.ahead)
            case Begun():
                self._queued(request, 0)
                if not request.is_started:
                    request.is_started = True
                    request.channel.send(Started(id=id_, cached_tokens=outcome.cached_tokens))
                if (echo := request.answers[outcome.job].echo) is not None:
                    request.channel.add(echo)
            case Reading():
                request.channel.send(Progress(id=id_, tokens=outcome.tokens, of=len(outcome.job.tokens)))
            case Piece():
                if added := request.answers[outcome.job].readers[outcome.choice].add(outcome):
                    request.channel.add(added)
                    self._finished(request, added)
            case Done():
                request.done.append(outcome)
                self._left(request, outcome.job)
                if request.waiting:
                    self._submit(request)
                self._complete(request)
            case Rejected():
                self._left(request, outcome.job)
                refused = Refused(
                    id=id_,
                    code=outcome.code,
                    message=outcome.message,
                    param=outcome.param,
                    retry_after_s=outcome.retry_after_s,
                )
                self._end(request, refused)
            case Broken():
                self._left(request, outcome.job)
                self._end(request, Failed(id=id_, code=outcome.code, message=outcome.message))
            case _:
                assert_never(outcome)

    def _queued(self, request: Request, ahead: int) -> None:
        if not request.is_queued:
            request.is_queued = True
            request.channel.send(Queued(id=request.order.id, prompt_tokens=request.n_prompt, ahead=ahead))
            for _ in range(min(len(request.waiting), self._parallel // request.order.choices - 1)):
                self._submit(request)

    def _left(self, request: Request, job: Job) -> None:
        """Record that the engine has a job no more."""
        request.submitted.remove(job)
        del self._requests[job]

    async def _parse(self, source: ParserSource | None, text: str, is_partial: bool) -> Message:
        assert not isinstance(self._chat, str)
        assert source is not None
        return await self._chat.parse(source, text, partial=is_partial)

    def _read(self, request: Request, deltas: list[Delta]) -> None:
        """Send deltas that a reader found out."""
        request.channel.send(Deltas(deltas))
        self._finished(request, deltas[-1])

    def _finished(self, request: Request, delta: Delta) -> None:
        if delta.finish is not None:
            request.unfinished -= 1
            self._complete(request)

    def _complete(self, request: Request) -> None:
        """Send the end of a request once the engine is done and all answers are sent."""
        done = request.done
        if request.unfinished or len(done) < len(request.answers):
            return
        began_s = min(each.wait_s for each in done)
        first_s = min(each.wait_s + each.prompt_s for each in done)
        last_s = max(each.wait_s + each.prompt_s + each.generation_s for each in done)
        usage = Usage(
            prompt_tokens=request.n_prompt,
            cached_tokens=sum(each.cached_tokens for each in done),
            generated_tokens=sum(each.generated_tokens for each in done),
            reasoning_tokens=sum(
                reader.reasoning_tokens for each in request.answers.values() for reader in each.readers
            ),
            wait_s=began_s,
            prompt_s=first_s - began_s,
            generation_s=last_s - first_s,
        )
        self._end(request, Ended(id=request.order.id, usage=usage))

    def _end(self, request: Request, last: Refused | Failed | Ended) -> None:
        self._forget(request)
        request.channel.send(last)

    def _forget(self, request: Request) -> None:
        request.channel.requests.pop(request.order.id)
        self._gate.leave()
        for job in [*request.submitted]:
            self._left(request, job)
            self._engine.cancel(job)
        for answers in request.answers.values():
            for reader in answers.readers:
                reader.cancel()

    def _cancel(self, request: Request) -> None:
        assert request.preparing is not None
        request.preparing.cancel()
        self._forget(request)

    def _cancel_all(self, outbox: Outbox) -> None:
        for looking_up in outbox.lookups.values():
            looking_up.cancel()
        for request in [*outbox.requests.values()]:
            self._cancel(request)


def _unenforceable(id_: int, output: Schema | Grammar | None, error: ConstraintError) -> Refused:
    """Return the refusal of a request whose answers cannot have the form that it asks for."""
    match output:
        case Schema():
            message, param = f"This server cannot enforce the schema: {error}.", "response_format"
        case Grammar():
            message, param = f"Failed to parse the grammar, or to enforce it: {error}.", "grammar"
        case None:
            message, param = f"This server cannot enforce the form of calls of the tools: {error}.", "tools"
        case _:
            assert_never(output)
    return Refused(id=id_, code="invalid_request", message=message, param=param)
