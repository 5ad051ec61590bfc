"""The engine loop: the runner's main thread, which decodes the jobs of all requests in steps.

A step takes what arrived, starts the jobs that fit, decodes one token of each running answer and some of the prompts,
samples, and hands out what came of it.  Without a job the thread sleeps.
"""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.channel.messages import FailedCode, Finish, Logprob, RefusedCode, TokenLogprobs
from worker.engine.decode import ABORTED, NO_CELLS, Engine, EngineError
from worker.engine.job import Begun, Broken, Done, Job, Outcome, Piece, Rejected, Waiting
from worker.engine.sample import Alternatives, BadRequest, Bias, Draw, Draws, Sampler, check
from worker.engine.slots import Admission, Budget, Cut, Drop, Sequence, Slots, queue_full, retry_after_s, shares
from worker.engine.text import Text

CPU_STEP_S, GPU_STEP_S = 0.1, 0.02  # of a step with prompts beside running answers
WEIGHT = 0.2  # of the last job in the mean time of a job


@dataclass(eq=False, slots=True, kw_only=True)
class _Answer:
    """One answer of a running job."""

    choice: int
    sequence: Sequence
    sampler: Sampler
    text: Text
    next: int | None = None  # the last token, which is not decoded yet; None: the prompt is not decoded
    n_tokens: int = 0
    is_finished: bool = False


@dataclass(eq=False, slots=True, kw_only=True)
class _Running:
    """A job that has its sequences."""

    job: Job
    answers: list[_Answer]
    bias: Bias
    n_cached: int
    began_at: float
    first_at: float = 0.0  # the time of the first token; 0: none yet

    @property
    def leader(self) -> _Answer:
        return self.answers[0]

    @property
    def is_in_prompt(self) -> bool:
        return self.leader.next is None and not self.leader.is_finished


@dataclass(eq=False, slots=True)
class _Part:
    """What a job has in a batch: a piece of its prompt, or the last token of an answer."""

    running: _Running
    answer: _Answer
    tokens: list[int]
    has_output: bool
    index: int = -1  # of the last token in the batch


@dataclass(eq=False, slots=True)
class Counters:
    """What the loop does at the moment.  Other threads may read it."""

    running: int = 0  # jobs
    waiting: int = 0  # jobs
    cells: int = 0  # in use, those of idle sequences included
    prompt_tokens: int = 0  # decoded since the start
    generated_tokens: int = 0  # since the start


class Loop:
    """Decodes jobs.  `submit`, `cancel`, `tokenize` and `counters` are for other threads."""

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
        """`hand_out` is called in the loop's thread, once a step at most; it must not block.

        `most_waiting`, `most_wait_s`: limits of jobs that wait for their start.  `shared_prefixes`: a job may reuse
        the tokens of another client's.
        """
        self.counters = Counters()
        self.tokenize = engine.vocabulary.tokenize
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
        )
        self._running: dict[Job, _Running] = {}  # oldest first
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
        """End what has waited or run for too long."""
        for job in [job for job in self._slots.queue if now >= min(job.deadline, job.arrived_at + self._most_wait_s)]:
            self._slots.withdraw(job)
            self._reject(job, "queue_timeout", f"The request waited for {now - job.arrived_at:.0f} s.")
        for running in [running for running in self._running.values() if now >= running.job.deadline]:
            self._break(running, "deadline", f"The request took {now - running.job.arrived_at:.0f} s.")

    def _start(self, arrived: list[Job]) -> None:
        """Start the jobs that fit, refuse those that no place is left for, and tell the new ones that they wait."""
        begun = []
        while admission := self._slots.admit():
            begun.append(self._begin(admission))
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

    def _begin(self, admission: Admission) -> Begun:
        job, n_cached = admission.job, admission.n_cached
        for change in admission.changes:
            if not self._engine.apply(change):  # a sequence that cannot return to an earlier token
                assert isinstance(change, Cut)
                self._engine.rewinds = False
                self._slots.lost(change.sequence)
                self._engine.apply(Drop(change.sequence))
                n_cached = 0
        n_vocab, n_ctx = self._engine.vocabulary.n_tokens, self._context_length
        seed = secrets.randbits(32) if job.sampling.seed is None else job.sampling.seed
        answers = [
            _Answer(
                choice=choice,
                sequence=sequence,
                sampler=Sampler(job.sampling, job.tokens, seed + choice, n_tokens=n_vocab, context_length=n_ctx),
                text=Text(job.stop),
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

    # ---- a batch

    def _fill(self) -> list[_Part]:
        """Fill the batch: a token of each running answer first, then prompts."""
        batch = self._engine.batch
        batch.clear()
        parts = [
            _Part(running, answer, [answer.next], has_output=True)
            for running in self._running.values()
            for answer in running.answers
            if answer.next is not None and not answer.is_finished
        ]
        in_prompt = [running for running in self._running.values() if running.is_in_prompt]
        room = batch.n_batch - len(parts)
        budget = min(room, self._budget.n_tokens) if parts else room
        left = [len(running.job.tokens) - len(running.leader.sequence.tokens) for running in in_prompt]
        for running, n_left, n in zip(in_prompt, left, shares(left, budget), strict=True):
            if n:
                start = len(running.leader.sequence.tokens)
                tokens = running.job.tokens[start : start + n]
                parts.append(_Part(running, running.leader, tokens, has_output=n == n_left))
        for part in parts:
            sequence = part.answer.sequence
            part.index = batch.add(part.tokens, len(sequence.tokens), sequence.id, has_output=part.has_output)
        return parts

    def _decode(self) -> None:
        """Decode one batch, and sample."""
        while self._running:
            parts = self._fill()
            prompts = [part for part in parts if part.running.is_in_prompt]
            if self._engine.rewinds:
                self._in_batch = frozenset(part.running.job for part in prompts)
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
            n_prompt = sum(len(part.tokens) for part in prompts)
            self._budget.learn(n_prompt, time.monotonic() - started)
            self.counters.prompt_tokens += n_prompt
            self._draws.run([draw for _, draw in draws])
            now = time.monotonic()
            for part, draw in draws:
                if part.running.job in self._running:  # else another answer of the job failed in this step
                    self._drawn(part, draw, now)
            return

    def _make_room(self) -> None:
        """Free cells: those of an idle sequence, or else those of the youngest answer, which ends."""
        dropped = self._slots.drop_idle()
        if dropped is not None:
            self._engine.apply(dropped)
            return
        generating = [running for running in self._running.values() if not running.is_in_prompt]
        youngest = (generating or [*self._running.values()])[-1]
        answer = next(answer for answer in reversed(youngest.answers) if not answer.is_finished)
        self._engine.note(f"The context is full: an answer ends after {answer.n_tokens} tokens.")
        if youngest.is_in_prompt:
            for answer in youngest.answers:
                self._hand_over(youngest, answer, "", 0, [], "length")
        else:
            self._hand_over(youngest, answer, answer.text.end(), 0, [], "length")

    def _draw(self, parts: list[_Part]) -> list[tuple[_Part, Draw]]:
        """Record what was decoded, and return the draws for the batch's outputs, once they are computed."""
        for part in parts:
            self._slots.extend(part.answer.sequence, part.tokens)
        with_output = [part for part in parts if part.has_output]
        rows = self._engine.logits()
        return [
            (
                part,
                Draw(
                    row=row,
                    index=part.index,
                    samplers=[a.sampler for a in (part.running.answers if part.answer.next is None else [part.answer])],
                    bias=part.running.bias,
                    logprobs=part.running.job.logprobs,
                ),
            )
            for part, row in zip(with_output, rows, strict=True)
        ]

    def _drawn(self, part: _Part, draw: Draw, now: float) -> None:
        """Give the tokens of a draw to their answers."""
        running = part.running
        if not draw.tokens:
            self._break(running, "engine_failed", "The engine computed logits that are not numbers.")
            return
        answers = [part.answer]
        if part.answer.next is None:
            running.first_at = now
            answers = running.answers
            for answer in answers[1:]:
                self._engine.apply(self._slots.fork(part.answer.sequence, answer.sequence))
        for i, (answer, token) in enumerate(zip(answers, draw.tokens, strict=True)):
            self._add(running, answer, token, draw.alternatives[i] if draw.alternatives else None)

    def _add(self, running: _Running, answer: _Answer, token: int, alternatives: Alternatives | None) -> None:
        """Add a token to an answer."""
        vocabulary, job = self._engine.vocabulary, running.job
        self.counters.generated_tokens += 1
        answer.n_tokens += 1
        answer.next = token
        finish: Finish | None = None
        logprobs: list[TokenLogprobs] = []
        if vocabulary.is_end(token):
            text, finish = answer.text.end(), "stop"
        else:
            text = answer.text.feed(vocabulary.piece(token, is_shown=token in job.shown))
            is_full = len(answer.sequence.tokens) + 1 >= self._context_length
            if not answer.text.is_stopped and (is_full or answer.n_tokens == job.max_tokens):
                text += answer.text.end()
                finish = "length"
            if answer.text.is_stopped:
                finish = "stop"
            if alternatives is not None:
                logprobs.append(self._logprobs(token, alternatives))
        self._hand_over(running, answer, text, 1, logprobs, finish)

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
        finish: Finish | None,
    ) -> None:
        """Hand out a piece of an answer, and end the answer if it is the last one, and the job with its last answer."""
        job = running.job
        self._out.append(
            Piece(job=job, choice=answer.choice, text=text, n_tokens=n_tokens, logprobs=logprobs, finish=finish)
        )
        if finish is None:
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
                    generated_tokens=sum(answer.n_tokens for answer in running.answers),
                    wait_s=running.began_at - job.arrived_at,
                    prompt_s=first_at - running.began_at,
                    generation_s=now - first_at,
                )
            )

    def _break(self, running: _Running, code: FailedCode, message: str) -> None:
        """End a job that failed."""
        self._end(running, is_kept=code == "deadline")
        self._out.append(Broken(job=running.job, code=code, message=message))

    def _end(self, running: _Running, *, is_kept: bool = True) -> None:
        """End a job without an outcome."""
        del self._running[running.job]
        for answer in running.answers:
            if not answer.is_finished:
                self._finish(answer, is_kept=is_kept)

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
