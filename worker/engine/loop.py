"""The engine loop: the runner's main thread, which decodes the jobs of all requests in steps.

A step takes what arrived, starts the jobs that fit, decodes one token of each running answer and some of the prompts,
samples, and hands out what came of it.  Without a job the thread sleeps.
"""

from __future__ import annotations

import math
import queue
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shared.channel.messages import FailedCode, Finish, Logprob, RefusedCode, Stop, StopReason, TokenLogprobs
from worker.chat.constraint import ConstraintError
from worker.engine.constrain import Constrained, Constraints
from worker.engine.decode import ABORTED, NO_CELLS, Engine, EngineError, Logits
from worker.engine.job import Begun, Broken, Done, Job, Outcome, Piece, Reading, Rejected, Waiting
from worker.engine.reasoning import Reasoning
from worker.engine.sample import Alternatives, BadLogits, BadRequest, Bias, Draw, Draws, Sampler, alternatives, check
from worker.engine.slots import (
    Admission,
    Budget,
    Cut,
    Drop,
    Restore,
    Sequence,
    Slots,
    queue_full,
    retry_after_s,
    shares,
)
from worker.engine.text import Text

CPU_STEP_S, GPU_STEP_S = 0.1, 0.02  # of a step with prompts beside running answers
PROGRESS_S = 0.1  # the least time between two reports of a prompt
WEIGHT = 0.2  # of the last job in the mean time of a job
FINISH: dict[StopReason, Finish] = {"eos": "stop", "string": "stop", "max_tokens": "length", "context": "length"}


@dataclass(eq=False, slots=True, kw_only=True)
class _Answer:
    """One answer of a running job."""

    choice: int
    sequence: Sequence
    sampler: Sampler
    text: Text
    constrained: Constrained | None
    reasoning: Reasoning | None  # if it is limited
    tokens: list[int] = field(default_factory=list)  # the last one is not decoded yet
    is_finished: bool = False


@dataclass(eq=False, slots=True, kw_only=True)
class _Running:
    """A job that has its sequences, or had them when it was preempted."""

    job: Job
    answers: list[_Answer]
    bias: Bias
    n_cached: int
    began_at: float
    first_at: float = 0.0  # the time of the first token; 0: none yet
    n_scored: int = 0  # tokens of the prompt whose logits were read
    told_at: float = 0.0  # when its progress was last told

    @property
    def unfinished(self) -> list[_Answer]:
        """The answers that go on.  The first one decodes the prompt; the others then begin with its cells."""
        return [answer for answer in self.answers if not answer.is_finished]

    @property
    def is_in_prompt(self) -> bool:
        return not self.answers[0].tokens

    @property
    def n_to_score(self) -> int:
        """The number of tokens of the prompt whose logits have to be read."""
        return len(self.job.tokens) - self.n_scored if self.job.scores_prompt else 0


@dataclass(eq=False, slots=True)
class _Part:
    """What an answer has in a batch: its last token, or a piece of what it has to decode before, which is its prompt
    and, if its job was preempted, its own tokens."""

    running: _Running
    answer: _Answer
    tokens: list[int]
    n_outputs: int  # of the last tokens, which get logits
    has_draw: bool  # from the logits of the last one
    is_prompt: bool
    index: int = -1  # of the last token in the batch


@dataclass(frozen=True, slots=True)
class _Left:
    """What an answer has to decode before it goes on."""

    running: _Running
    answer: _Answer
    n: int  # number of these tokens
    is_last: bool  # an answer takes a token from the logits of the last of them
    n_silent: int  # number of the first of them, which get no logits

    def part(self, n: int) -> _Part:
        """Return the first `n` of these tokens."""
        prompt, start = self.running.job.tokens, len(self.answer.sequence.tokens)
        tokens = prompt[start : start + n]
        if start + n > len(prompt):
            tokens = tokens + self.answer.tokens[max(0, start - len(prompt)) : start + n - len(prompt)]
        has_draw = self.is_last and n == self.n
        n_outputs = max(has_draw, n - self.n_silent)
        return _Part(self.running, self.answer, tokens, n_outputs, has_draw, is_prompt=True)


@dataclass(eq=False, slots=True)
class Counters:
    """What the loop does at the moment.  Other threads may read it."""

    running: int = 0  # jobs
    waiting: int = 0  # jobs
    cells: int = 0  # in use, those of idle sequences included
    prompt_tokens: int = 0  # decoded since the start, with all that were decoded again after a preemption
    generated_tokens: int = 0  # since the start
    preemptions: int = 0  # since the start


class Loop:
    """Decodes jobs.  What is public is for other threads, except `run` and `step`."""

    def __init__(
        self,
        engine: Engine,
        hand_out: Callable[[list[Outcome]], None],
        *,
        context_length: int,
        parallel: int,
        on_gpu: bool,
        most_waiting: int = 64,
        most_wait_s: float = 60.0,
        shared_prefixes: bool = False,
    ) -> None:
        """`hand_out` is called in the loop's thread, before and after a batch; it must not block.

        `most_waiting`, `most_wait_s`: limits of jobs that wait for their start.  `shared_prefixes`: a job may reuse
        the tokens of another client's.
        """
        self.counters = Counters()
        self.vocabulary = vocabulary = engine.vocabulary
        self.tokenize, self.infill = vocabulary.tokenize, vocabulary.infill
        self.constrain = Constraints(vocabulary).compile
        self._engine = engine
        self._hand_out = hand_out
        self._context_length = context_length
        self._parallel = min(parallel, engine.batch.n_batch, engine.batch.n_outputs_max)  # a token of each in one batch
        self._most_waiting = most_waiting
        self._most_wait_s = most_wait_s
        self._inbox: queue.SimpleQueue[tuple[Job, bool]] = queue.SimpleQueue()  # a job, and whether to cancel it
        self._slots = Slots(
            n_sequences=engine.n_sequences,
            parallel=self._parallel,
            n_cells=engine.n_cells,
            context_length=context_length,
            shared_prefixes=shared_prefixes,
            rewinds=engine.rewinds,
            n_checkpoints=engine.n_checkpoints,
        )
        self._running: dict[Job, _Running] = {}  # oldest first
        self._preempted: dict[Job, _Running] = {}  # and waiting for another start
        self._budget = Budget(GPU_STEP_S if on_gpu else CPU_STEP_S, engine.batch.n_batch)
        self._draws = Draws(engine.context, engine.vocabulary.n_tokens)
        self._suppressed = engine.vocabulary.suppressed()
        self._in_batch: frozenset[Job] = frozenset()  # jobs whose prompts are being decoded
        self._out: list[Outcome] = []
        self._job_s = 1.0  # mean time of a job

    # ---- for other threads

    def submit(self, job: Job) -> None:
        """Take a job.  Its outcomes follow."""
        self._inbox.put((job, False))

    def cancel(self, job: Job) -> None:
        """End a job.  A few of its outcomes may still follow; none if it has ended."""
        self._inbox.put((job, True))
        if job in self._in_batch:
            self._engine.abort()

    # ---- the loop

    def run(self) -> None:
        """Decode for ever.  An exception is fatal to the process: the state of the engine is unknown."""
        while True:
            self.step()

    def step(self) -> None:
        """Do one step.  Blocks until there is something to do."""
        self._engine.resume()
        arrived = self._take()
        self._expire(time.monotonic())
        self._start(arrived)
        if self._running:
            self._decode()
        self._count()
        self._engine.write_log()
        self._flush()

    def _flush(self) -> None:
        """Hand out the outcomes so far."""
        if self._out:
            out, self._out = self._out, []
            self._hand_out(out)

    def _take(self) -> list[Job]:
        """Take what arrived, waiting for it if there is nothing else to do, and return the new jobs."""
        arrived = []
        is_idle = not self._running and not self._slots.queue
        while is_idle or not self._inbox.empty():
            job, is_cancelled = self._inbox.get()
            is_idle = False
            if is_cancelled:
                if not self._slots.withdraw(job) and job in self._running:
                    self._end(self._running[job])
                elif (preempted := self._preempted.pop(job, None)) is not None:
                    self._close(preempted)
            elif rejected := self._rejected(job):
                self._out.append(rejected)
            else:
                self._slots.add(job)
                arrived.append(job)
        return arrived

    def _rejected(self, job: Job) -> Rejected | None:
        """Return the outcome of a job that the engine cannot run."""
        try:
            self._check(job)
        except BadRequest as e:
            return Rejected(job=job, code="invalid_request", message=str(e), param=e.param)
        return None

    def _check(self, job: Job) -> None:
        n_vocab = self._engine.vocabulary.n_tokens
        if not self._engine.can_generate:
            raise BadRequest("This model does not generate text.", "model")
        if not 1 <= job.choices <= self._parallel:
            raise BadRequest(f"'n': expected at most {self._parallel}, the 'parallel' of the instance.", "n")
        if not 1 <= len(job.tokens) < self._context_length:
            raise BadRequest(f"The prompt has {len(job.tokens)} tokens, and the context {self._context_length}.")
        if min(job.tokens) < 0 or max(job.tokens) >= n_vocab:
            raise BadRequest("The prompt has a token that is not in the model's vocabulary.")
        check(job.sampling, n_vocab)

    def _expire(self, now: float) -> None:
        """End what has waited for its first start, or taken, for too long."""
        for job in [*self._slots.queue]:
            until = job.deadline if job.is_accepted else min(job.deadline, job.arrived_at + self._most_wait_s)
            if now >= until and job not in self._preempted:
                self._slots.withdraw(job)
                self._reject(job, "queue_timeout", f"The request waited for {now - job.arrived_at:.0f} s.")
        for begun in [*self._running.values(), *self._preempted.values()]:
            if now >= begun.job.deadline:
                self._break(begun, "deadline", f"The request took {now - begun.job.arrived_at:.0f} s.")

    def _start(self, arrived: list[Job]) -> None:
        """Start the jobs that fit, refuse those that no place is left for, and tell the new ones that they wait."""
        begun = []
        while admission := self._slots.admit():
            n_cached = self._apply(admission)
            preempted = self._preempted.pop(admission.job, None)
            if preempted is None:
                begun.append(self._begin(admission, n_cached))
            else:
                self._resume(preempted, admission.sequences)
        if arrived:
            for job in self._slots.excess(arrived, self._most_waiting):
                self._reject(job, "queue_full", queue_full(self._most_waiting))
            ahead = {job: n for n, job in enumerate(self._slots.queue)}
            for job in arrived:
                if job in self._running or job in ahead:
                    self._out.append(Waiting(job=job, ahead=ahead.get(job, 0)))
        self._out += begun

    def _reject(self, job: Job, code: RefusedCode, message: str) -> None:
        after_s = retry_after_s(len(self._slots.queue), self._parallel, self._job_s)
        self._out.append(Rejected(job=job, code=code, message=message, retry_after_s=after_s))

    def _apply(self, admission: Admission) -> int:
        """Change the context for a job that starts, and return the number of tokens that it does not have to decode."""
        n_cached = admission.n_cached
        for change in admission.changes:
            if not self._engine.apply(change):  # a sequence that cannot return to an earlier token
                assert isinstance(change, Cut | Restore)
                self._engine.rewinds = False
                self._slots.lost(change.sequence)
                self._engine.apply(Drop(change.sequence))
                n_cached = 0
        return n_cached

    def _begin(self, admission: Admission, n_cached: int) -> Begun:
        job = admission.job
        n_vocab, n_ctx = self._engine.vocabulary.n_tokens, self._context_length
        seed = secrets.randbits(32) if job.sampling.seed is None else job.sampling.seed
        answers = [
            _Answer(
                choice=choice,
                sequence=sequence,
                sampler=Sampler(job.sampling, job.tokens, seed + choice, n_tokens=n_vocab, context_length=n_ctx),
                text=Text([*job.stop, *job.ends]),
                constrained=None if job.constraint is None else job.constraint.begin(),
                reasoning=self._reasoning(job),
            )
            for choice, sequence in enumerate(admission.sequences)
        ]
        self._running[job] = _Running(
            job=job,
            answers=answers,
            bias=Bias(job.sampling, self._suppressed),
            n_cached=n_cached,
            began_at=time.monotonic(),
        )
        return Begun(job=job, cached_tokens=n_cached)

    def _reasoning(self, job: Job) -> Reasoning | None:
        return None if job.thinking is None else Reasoning(job.thinking, job.thinking_tokens, self._engine.vocabulary)

    def _resume(self, preempted: _Running, sequences: list[Sequence]) -> None:
        """Let a job go on that was preempted."""
        for answer, sequence in zip(preempted.unfinished, sequences, strict=True):
            answer.sequence = sequence
        self._running[preempted.job] = preempted
        self._running = dict(sorted(self._running.items(), key=lambda item: item[1].began_at))

    # ---- a batch

    def _fill(self) -> list[_Part]:
        """Fill the batch: a token of each running answer first, then prompts."""
        batch = self._engine.batch
        batch.clear()
        parts: list[_Part] = []
        left: list[_Left] = []
        for running in self._running.values():
            n_prompt = len(running.job.tokens)
            leader, *others = unfinished = running.unfinished
            if len(leader.sequence.tokens) < n_prompt and others:
                left.append(_left(running, leader, n_prompt, is_last=running.is_in_prompt))
                continue
            for answer in unfinished:
                n = n_prompt + len(answer.tokens)
                if len(answer.sequence.tokens) == n - 1 and answer.tokens:
                    parts.append(_Part(running, answer, answer.tokens[-1:], 1, has_draw=True, is_prompt=False))
                else:
                    left.append(_left(running, answer, n, is_last=True))
        room = batch.n_batch - len(parts)
        budget = min(room, self._budget.n_tokens) if parts else room
        left = _limited(left, batch.n_outputs_max - len(parts))
        parts += [each.part(n) for each, n in zip(left, shares([each.n for each in left], budget), strict=True) if n]
        for part in parts:
            sequence = part.answer.sequence
            part.index = batch.add(part.tokens, len(sequence.tokens), sequence.id, n_outputs=part.n_outputs)
        return parts

    def _decode(self) -> None:
        """Decode one batch, and sample."""
        while self._running:
            parts = self._fill()
            prompts = [part for part in parts if part.is_prompt]
            if self._engine.rewinds:
                self._in_batch = frozenset(part.running.job for part in prompts)
            self._flush()  # a request that ends the process here must count as accepted, or it is sent to another one
            started = time.monotonic()
            try:
                status = self._engine.decode()
            except EngineError as e:
                for running in {part.running: None for part in parts}:
                    self._break(running, "engine_failed", str(e))
                return
            finally:
                self._in_batch = frozenset()
            if status == ABORTED:  # for a job that was cancelled; the next step ends it
                for part in parts:
                    rewound = self._engine.apply(Cut(part.answer.sequence, len(part.answer.sequence.tokens)))
                    if not rewound and part.running.job in self._running:
                        self._break(part.running, "engine_failed", "The engine could not go back to the last step.")
                return
            if status == NO_CELLS:
                self._make_room()
                continue
            draws = self._draw(parts)
            self._tell(prompts, time.monotonic())
            n_prompt = sum(len(part.tokens) for part in prompts)
            self._budget.learn(n_prompt, time.monotonic() - started)
            self.counters.prompt_tokens += n_prompt
            self._draws.run([draw for _, draw in draws])
            now = time.monotonic()
            for part, draw in draws:
                if part.running.job in self._running:  # else another answer of the job failed in this step
                    self._drawn(part, draw, now)
            return

    def _tell(self, prompts: list[_Part], now: float) -> None:
        """Tell the progress of prompts that are not complete, not too often."""
        for part in prompts:
            running, n = part.running, len(part.answer.sequence.tokens)
            wants = running.job.reports_progress and now >= running.told_at + PROGRESS_S
            if wants and running.is_in_prompt and n < len(running.job.tokens):
                running.told_at = now
                self._out.append(Reading(job=running.job, tokens=n))

    def _make_room(self) -> None:
        """Free cells: those of an idle sequence, or else those of a running job, which starts again later.  If only one
        runs, an answer of it ends."""
        dropped = self._slots.drop_idle()
        if dropped is not None:
            self._engine.apply(dropped)
            return
        victim = self._slots.victim()
        if victim is not None:
            self._preempt(self._running.pop(victim))
            return
        (running,) = self._running.values()
        for answer in running.unfinished if running.is_in_prompt else running.unfinished[-1:]:
            self._engine.note(f"The context is full: an answer ends after {len(answer.tokens)} tokens.")
            self._hand_over(running, answer, answer.text.end(), 0, [], Stop("context"))

    def _preempt(self, running: _Running) -> None:
        """Let a job wait, with all its state, until it can start again."""
        self._preempted[running.job] = running
        for dropped in self._slots.put_back(running.job, [answer.tokens for answer in running.unfinished]):
            self._engine.apply(dropped)
        self.counters.preemptions += 1

    def _draw(self, parts: list[_Part]) -> list[tuple[_Part, Draw]]:
        """Record what was decoded, and return the draws for the batch's outputs, once they are computed."""
        for part in parts:
            sequence = part.answer.sequence
            self._slots.extend(sequence, part.tokens)
            if (checkpoint := self._slots.checkpoint(sequence)) is not None:
                checkpoint.state = self._engine.state(sequence)
            if part.is_prompt and len(sequence.tokens) == len(part.running.job.tokens):
                for other in part.running.unfinished:
                    if not other.sequence.tokens:
                        self._engine.apply(self._slots.fork(sequence, other.sequence))
        rows = self._engine.logits()
        draws = []
        for part in parts:
            own, rows = rows[: part.n_outputs], rows[part.n_outputs :]
            if part.running.n_to_score and part.n_outputs and not self._scored(part.running, own):
                continue
            if part.has_draw:
                draw = Draw(
                    row=own[-1],
                    index=part.index,
                    samplers=[answer.sampler for answer in _drawing(part)],
                    bias=part.running.bias,
                    logprobs=part.running.job.logprobs,
                    constrained=part.answer.constrained,
                    forced=None if part.answer.reasoning is None else part.answer.reasoning.forced,
                )
                draws.append((part, draw))
        return draws

    def _scored(self, running: _Running, rows: Logits) -> bool:
        """Hand out the log probabilities of the next tokens of a prompt.  Returns False if the job failed."""
        job, start = running.job, running.n_scored
        first = [] if start else [TokenLogprobs(self._engine.vocabulary.piece(job.tokens[0], is_shown=True), math.nan)]
        try:
            scored = [
                self._logprobs(token, *alternatives(row, [token], job.logprobs or 0))
                for token, row in zip(job.tokens[start + 1 : start + 1 + len(rows)], rows, strict=False)
            ]
        except BadLogits as e:
            self._break(running, "engine_failed", str(e))
            return False
        running.n_scored += len(rows)
        for answer in running.unfinished:
            piece = Piece(job=job, choice=answer.choice, text="", n_tokens=0, logprobs=first + scored)
            self._out.append(piece)
        return True

    def _drawn(self, part: _Part, draw: Draw, now: float) -> None:
        """Give the tokens of a draw to their answers."""
        running = part.running
        if not draw.tokens:
            self._break(running, "engine_failed", draw.failure)
            return
        if running.is_in_prompt:
            running.first_at = now
        if running.job.max_tokens == 0:
            for answer in running.answers:
                self._hand_over(running, answer, "", 0, [], Stop("max_tokens"))
            return
        try:
            for i, (answer, token) in enumerate(zip(_drawing(part), draw.tokens, strict=True)):
                self._add(running, answer, token, draw.alternatives[i] if draw.alternatives else None)
        except ConstraintError as e:
            self._break(running, "engine_failed", str(e))

    def _add(self, running: _Running, answer: _Answer, token: int, alternatives: Alternatives | None) -> None:
        """Add a token to an answer.  Raises ConstraintError."""
        vocabulary, job = self._engine.vocabulary, running.job
        self.counters.generated_tokens += 1
        answer.tokens.append(token)
        stop: Stop | None = None
        logprobs: list[TokenLogprobs] = []
        if vocabulary.is_end(token):
            text, stop = answer.text.end(), Stop("eos")
        else:
            text = answer.text.feed(vocabulary.piece(token, is_shown=token in job.shown))
            is_complete = len(answer.tokens) == job.max_tokens
            is_full = len(answer.sequence.tokens) + 1 >= self._context_length
            if answer.reasoning is not None:
                answer.reasoning.take(token)
            is_whole = False  # nothing may follow
            if answer.constrained is not None:
                answer.constrained.accept(token)
                is_whole = answer.constrained.is_complete
            if not answer.text.is_stopped and (is_whole or is_complete or is_full):
                text += answer.text.end()
                stop = Stop("eos" if is_whole else "max_tokens" if is_complete else "context")
            if answer.text.stop is not None:
                stop = Stop("string", answer.text.stop) if answer.text.stop in job.stop else Stop("eos")
        if alternatives is not None and (job.reports_end or not vocabulary.is_end(token)):
            logprobs.append(self._logprobs(token, alternatives))
        self._hand_over(running, answer, text, 1, logprobs, stop)

    def _logprobs(self, token: int, alternatives: Alternatives) -> TokenLogprobs:
        piece = self._engine.vocabulary.piece
        top = [Logprob(piece(other, is_shown=True), logprob) for other, logprob in alternatives.top]
        return TokenLogprobs(piece(token, is_shown=True), alternatives.logprob, top)

    # ---- ends

    def _hand_over(
        self,
        running: _Running,
        answer: _Answer,
        text: str,
        n_tokens: int,
        logprobs: list[TokenLogprobs],
        stop: Stop | None,
    ) -> None:
        """Hand out a piece of an answer, and end the answer if it is the last one, and the job with its last answer."""
        job = running.job
        self._out.append(
            Piece(
                job=job,
                choice=answer.choice,
                text=text,
                n_tokens=n_tokens,
                logprobs=logprobs,
                finish=None if stop is None else FINISH[stop.reason],
                stop=stop,
            )
        )
        if stop is None:
            return
        self._finish(answer, is_kept=True)
        if all(answer.is_finished for answer in running.answers):
            del self._running[job]
            now = time.monotonic()
            first_at = running.first_at or now
            self._job_s += WEIGHT * (now - running.began_at - self._job_s)
            self._out.append(
                Done(
                    job=job,
                    cached_tokens=running.n_cached,
                    generated_tokens=sum(len(answer.tokens) for answer in running.answers),
                    wait_s=running.began_at - job.arrived_at,
                    prompt_s=first_at - running.began_at,
                    generation_s=now - first_at,
                )
            )

    def _break(self, running: _Running, code: FailedCode, message: str) -> None:
        """End a job that failed."""
        if self._preempted.pop(running.job, None) is not None:
            self._slots.withdraw(running.job)
            self._close(running)
        else:
            self._end(running, is_kept=code == "deadline")
        self._out.append(Broken(job=running.job, code=code, message=message))

    def _end(self, running: _Running, *, is_kept: bool = True) -> None:
        """End a job without an outcome."""
        del self._running[running.job]
        for answer in running.unfinished:
            self._finish(answer, is_kept=is_kept)

    @staticmethod
    def _close(preempted: _Running) -> None:
        """Free the samplers of a job that has no sequences."""
        for answer in preempted.unfinished:
            answer.sampler.close()

    def _finish(self, answer: _Answer, *, is_kept: bool) -> None:
        answer.is_finished = True
        answer.sampler.close()
        self._slots.finish(answer.sequence, is_kept=is_kept)
        if not answer.sequence.tokens:
            self._engine.apply(Drop(answer.sequence))  # also what a failed batch left behind

    def _count(self) -> None:
        self.counters.running = len(self._running)
        self.counters.waiting = len(self._slots.queue)
        self.counters.cells = self._slots.cells.used


def _left(running: _Running, answer: _Answer, end: int, *, is_last: bool) -> _Left:
    """Return what an answer has to decode to have `end` tokens, up to the next checkpoint."""
    start = len(answer.sequence.tokens)
    until = next((mark for mark in answer.sequence.marks if start < mark < end), end)
    n_silent = max(0, running.n_scored - start) if running.n_to_score else until - start
    return _Left(running, answer, until - start, is_last=is_last and until == end, n_silent=n_silent)


def _limited(left: list[_Left], n_outputs: int) -> list[_Left]:
    """Cut pieces of prompts so that together they get at most so many logits.  Each gets one, and the oldest ones that
    are scored get the others."""
    n_outputs -= len(left)
    limited = []
    for each in left:
        n = min(each.n, each.n_silent + 1 + n_outputs)
        if each.n_silent < each.n:
            n_outputs -= max(0, n - each.n_silent - 1)
            each = replace(each, n=n, is_last=each.is_last and n == each.n)
        limited.append(each)
    return limited


def _drawing(part: _Part) -> list[_Answer]:
    """Return the answers that take a token from the output of a part: all of the job, at the end of its prompt."""
    return part.running.answers if part.running.is_in_prompt else [part.answer]
