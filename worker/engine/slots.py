"""Decides which job decodes in which sequence, who waits, and how much of a prompt a step takes.  Pure: no engine, no
clock.

A sequence is free, running (a job decodes in it), or idle: it keeps the tokens of a finished job, for a job with the
same beginning.  Sequences share the cells of a common beginning.  If cells run out, a job is preempted: it gives its
sequences back, and starts again once another job has ended.

Some models cannot return to an earlier token of a sequence.  They return to a checkpoint: the state that the model had
after so many tokens, which the caller keeps.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from shared.places import has_place
from worker.engine.job import Job

RESERVED = 256  # cells of an answer that must be there at its start
WORTH_WAITING = 32  # tokens; a job waits for another to decode as many of its own prompt
LEAST_CHUNK = 8  # tokens of prompts in a step
CHUNK = 32  # the same, before any step was timed
LEAST_CHECKPOINTS = 4
LAST = 4  # tokens of a prompt after its checkpoint; the next prompt of a conversation may have others there


def common_prefix(one: list[int], other: list[int]) -> int:
    """Return the number of tokens with which both begin."""
    n = min(len(one), len(other))
    for start in range(0, n, 256):
        end = min(start + 256, n)
        if one[start:end] != other[start:end]:
            return next(i for i in range(start, end) if one[i] != other[i])
    return n


@dataclass(eq=False, slots=True)
class Stretch:
    """Consecutive cells that the same sequences use."""

    length: int
    users: set[Sequence]


@dataclass(eq=False, slots=True)
class Checkpoint:
    """The state of a model after the first `n` tokens of a sequence, and of sequences that were copied from it."""

    n: int
    used_at: int  # as `Sequence.used_at`
    state: Any = None  # the engine's


@dataclass(eq=False, slots=True)
class Sequence:
    """A sequence of the engine's context."""

    id: int
    tokens: list[int] = field(default_factory=list)  # in the context
    stretches: list[Stretch] = field(default_factory=list)  # their cells
    job: Job | None = None  # that decodes in it
    client: str = ""  # of that job, or of the last one
    began: int = 0  # orders jobs by their first start
    prompt: list[int] = field(default_factory=list)  # of the running job, if this sequence decodes it
    reserved: int = 0  # cells that a running job may still take without asking
    used_at: int = 0  # orders sequences by their last use
    checkpoints: list[Checkpoint] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)  # numbers of tokens after which to take one, ascending

    @property
    def is_running(self) -> bool:
        return self.job is not None

    @property
    def is_idle(self) -> bool:
        return bool(self.tokens) and not self.is_running


class Cells:
    """Counts the cells that sequences use, each once, however many sequences share it."""

    def __init__(self) -> None:
        self.used = 0

    def append(self, sequence: Sequence, n: int) -> None:
        """Add `n` cells to a sequence."""
        self.used += n
        if sequence.stretches and sequence.stretches[-1].users == {sequence}:
            sequence.stretches[-1].length += n
        elif n:
            sequence.stretches.append(Stretch(n, {sequence}))

    def share(self, source: Sequence, target: Sequence, n: int) -> None:
        """Let an empty sequence begin with the first `n` cells of another."""
        target.stretches = source.stretches[: self._split(source, n)]
        for stretch in target.stretches:
            stretch.users.add(target)

    def truncate(self, sequence: Sequence, n: int) -> None:
        """Drop the cells of a sequence after its first `n`."""
        at = self._split(sequence, n)
        for stretch in sequence.stretches[at:]:
            stretch.users.discard(sequence)
            if not stretch.users:
                self.used -= stretch.length
        del sequence.stretches[at:]

    @staticmethod
    def _split(sequence: Sequence, n: int) -> int:
        """Return the number of stretches with the first `n` cells, after dividing the one that crosses this limit."""
        for at, stretch in enumerate(sequence.stretches):
            if n <= 0:
                return at
            if stretch.length > n:
                rest = Stretch(stretch.length - n, set(stretch.users))
                stretch.length = n
                for user in stretch.users:
                    user.stretches.insert(user.stretches.index(stretch) + 1, rest)
                return at + 1
            n -= stretch.length
        return len(sequence.stretches)


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove all tokens of a sequence."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Cut:
    """Remove the tokens of a sequence after its first `n`."""

    sequence: Sequence
    n: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Let an empty sequence begin with the first `n` tokens of another."""

    source: Sequence
    target: Sequence
    n: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Return to a checkpoint.  What a sequence has beyond it is cut, or was not copied."""

    sequence: Sequence
    checkpoint: Checkpoint


Change = Drop | Cut | Copy | Restore


@dataclass(frozen=True, slots=True)
class Admission:
    """A job may start: in these sequences, one for each answer, after these changes of the context, in order.

    A job that was preempted has sequences for the answers that had not ended.
    """

    job: Job
    sequences: list[Sequence]  # the first one decodes the prompt
    changes: list[Change]
    n_cached: int  # tokens of the prompt that the first one already has


@dataclass(eq=False, slots=True)
class _Waiter:
    job: Job
    tokens: list[int]  # its prompt; if it was preempted and has one answer left, with the tokens of that
    generated: list[int]  # number of tokens of each answer
    began: int = 0  # as `Sequence.began`; 0: the job was not preempted
    leader: Sequence | None = None  # decodes a prompt with the same beginning
    prompt: list[int] = field(default_factory=list)  # that prompt
    n_shared: int = 0  # length of that beginning


class Queue:
    """Jobs that wait.  Clients take turns; the jobs of one client keep their order.  Preempted jobs come first, in the
    order of their first start."""

    def __init__(self) -> None:
        self._preempted: list[_Waiter] = []
        self._clients: dict[str, deque[_Waiter]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Job]:
        return (waiter.job for waiter in self.in_turn())

    def add(self, job: Job) -> None:
        self._clients.setdefault(job.client, deque()).append(_Waiter(job, job.tokens, [0] * job.choices))

    def put_back(self, job: Job, answers: list[list[int]], began: int) -> None:
        """Add a job that was preempted, with the tokens of the answers that it has not ended."""
        tokens = job.tokens + answers[0] if len(answers) == 1 else job.tokens
        self._preempted.append(_Waiter(job, tokens, [*map(len, answers)], began))
        self._preempted.sort(key=lambda waiter: waiter.began)

    def remove(self, job: Job) -> bool:
        """Remove a job and return whether it was there."""
        waiter = next((waiter for waiter in self.in_turn() if waiter.job is job), None)
        if waiter is None:
            return False
        if waiter.began:
            self._preempted.remove(waiter)
            return True
        self._clients[job.client].remove(waiter)
        if not self._clients[job.client]:
            del self._clients[job.client]
        return True

    def take(self, waiter: _Waiter) -> None:
        """Remove a job that starts; its client's next turn comes after those of the others."""
        client = waiter.job.client
        self.remove(waiter.job)
        if client in self._clients and not waiter.began:
            self._clients[client] = self._clients.pop(client)

    def in_turn(self) -> Iterator[_Waiter]:
        """Yield the jobs in the order in which they would start: one of each client, then the next one of each."""
        yield from [*self._preempted]
        left = [iter([*waiters]) for waiters in self._clients.values()]
        while left:
            remaining = []
            for waiters in left:
                if (waiter := next(waiters, None)) is not None:
                    yield waiter
                    remaining.append(waiters)
            left = remaining


class Slots:
    """The sequences of a context and the jobs that wait for one."""

    def __init__(
        self,
        *,
        n_sequences: int,
        parallel: int,
        n_cells: int,
        context_length: int,
        shared_prefixes: bool,
        rewinds: bool,
        n_checkpoints: int = 0,
    ) -> None:
        """`rewinds`: a sequence can return to any earlier token.  Otherwise it can return to a checkpoint, of which
        there are `n_checkpoints` at most; without them, no tokens are kept and none are shared."""
        self.sequences = [Sequence(id_) for id_ in range(n_sequences)]
        self.queue = Queue()
        self.cells = Cells()
        self._parallel = parallel
        self._n_cells = n_cells
        self._context_length = context_length
        self._shared_prefixes = shared_prefixes
        self._rewinds = rewinds
        self._n_checkpoints = 0 if rewinds else n_checkpoints
        self._uses = self._starts = 0
        self._is_settled = True  # no job that waits can start before something changes
        self._is_full = False  # cells ran out, and no job has ended since

    @property
    def n_running(self) -> int:
        return sum(sequence.is_running for sequence in self.sequences)

    def add(self, job: Job) -> None:
        """Let a job wait."""
        self.queue.add(job)
        self._is_settled = False

    def withdraw(self, job: Job) -> bool:
        """Remove a job that waits, and return whether it did."""
        self._is_settled = False
        return self.queue.remove(job)

    def excess(self, arrived: list[Job], most: int) -> list[Job]:
        """Remove those of the jobs that just arrived, in this order, for which no place is left: `most` may wait.
        Preempted ones do not count; those of a request that was accepted do, and are not removed."""
        waiting = Counter(waiter.job.client for waiter in self.queue.in_turn() if not waiter.began)
        new = [job for job in arrived if job in self.queue and not job.is_accepted]
        waiting.subtract(job.client for job in new)
        excess = []
        for job in new:
            if has_place(job.client, waiting, most):
                waiting[job.client] += 1
            else:
                self.queue.remove(job)
                excess.append(job)
        return excess

    # ---- starting

    def admit(self) -> Admission | None:
        """Start the next job, if one can: returns None if none can.

        A job that waits for another's prompt lets others pass; one that waits for a sequence or for cells does not.
        Once a job was preempted, none starts before another has ended.
        """
        if self._is_settled or self._is_full:
            return None
        self._is_settled = True
        n_running = self.n_running
        for waiter in self.queue.in_turn():
            if n_running + len(waiter.generated) > self._parallel:
                return None
            if self._follows(waiter):
                self._is_settled = False
            else:
                return self._start(waiter, is_alone=n_running == 0)
        return None

    def _follows(self, waiter: _Waiter) -> bool:
        """Return whether a job waits for another to decode a beginning of its prompt."""
        leader = waiter.leader
        if leader is not None and leader.prompt is waiter.prompt and len(leader.tokens) < waiter.n_shared:
            return True
        waiter.leader = None
        tokens = waiter.tokens
        candidates = [s for s in self.sequences if _is_in_prompt(s) and self._may_share(s, waiter.job)]
        if not candidates or not self._rewinds or waiter.job.scores_prompt:
            return False
        longest = {id(s): min(common_prefix(tokens, s.prompt), len(tokens) - 1) for s in candidates}
        leader = max(candidates, key=lambda s: longest[id(s)])
        n_shared, n_cached = longest[id(leader)], self._source(waiter)[1]
        if n_shared < n_cached + WORTH_WAITING:
            return False
        waiter.leader, waiter.prompt, waiter.n_shared = leader, leader.prompt, n_shared
        return True

    def _may_share(self, sequence: Sequence, job: Job) -> bool:
        return self._shared_prefixes or sequence.client == job.client

    def _source(self, waiter: _Waiter) -> tuple[Sequence | None, int]:
        """Return the sequence with the longest beginning of a job's prompt, and that length.  The last token of a
        prompt is always decoded again, for its logits; all of them are if their logits are to be read."""
        if waiter.job.scores_prompt:
            return None, 0
        best, n_best = None, 0
        for sequence in self.sequences:
            if sequence.tokens and self._may_share(sequence, waiter.job):
                n = self._reusable(sequence, min(common_prefix(waiter.tokens, sequence.tokens), len(waiter.tokens) - 1))
                if n > n_best or (n == n_best and best is not None and not best.is_idle and sequence.is_idle):
                    best, n_best = sequence, n
        return (best, n_best) if n_best else (None, 0)

    def _reusable(self, sequence: Sequence, n: int) -> int:
        """Return how many of the first `n` tokens of a sequence another one can begin with."""
        if self._rewinds or n == len(sequence.tokens):
            return n
        return max((checkpoint.n for checkpoint in sequence.checkpoints if checkpoint.n <= n), default=0)

    def _marks(self, waiter: _Waiter, n_cached: int) -> list[int]:
        """Return where to take checkpoints in a prompt: near its end, for the next one of the conversation, and where
        it leaves another prompt, for a third one that begins like both."""
        if not self._n_checkpoints:
            return []
        tokens = waiter.tokens
        sharable = [s for s in self.sequences if s.tokens and self._may_share(s, waiter.job)]
        end = len(tokens) - LAST
        fork = max((common_prefix(tokens, sequence.tokens) for sequence in sharable), default=0)
        marks = [fork, end] if fork + WORTH_WAITING <= end else [end]
        return [mark for mark in marks if mark >= n_cached + WORTH_WAITING]

    def _start(self, waiter: _Waiter, *, is_alone: bool) -> Admission | None:
        job = waiter.job
        source, n_cached = self._source(waiter)
        n_prompt = len(waiter.tokens) - n_cached
        reserves = self._reserves(waiter)
        needed = n_prompt + sum(reserves)
        kept = self._cells_of_running() + self._cells_outside_running(source, n_cached)
        if not is_alone and kept + self._promised() + needed > self._n_cells:
            return None

        changes: list[Change] = []
        marks = self._marks(waiter, n_cached)
        targets = self._targets(len(reserves), source, n_cached)
        for target in targets:
            if target.tokens and target is not source:
                changes.append(self._drop(target))
        first = targets[0]
        if source is first:
            if n_cached < len(source.tokens):
                changes += self._restored(source, first, n_cached)
                changes.append(self._cut(source, n_cached))
        elif source is not None:
            changes.append(self._copy(source, first, n_cached))
            if n_cached < len(source.tokens):
                changes += self._restored(source, first, n_cached)
            source.used_at = self._tick()
        if not waiter.began:
            self._starts += 1
        for target, reserve in zip(targets, reserves, strict=True):
            target.job = job
            target.client = job.client
            target.began = waiter.began or self._starts
            target.reserved = reserve
        first.prompt = waiter.tokens
        first.marks = marks
        first.reserved += n_prompt
        while self.cells.used + self._promised() > self._n_cells and (victim := self.drop_idle()) is not None:
            changes.append(victim)
        self.queue.take(waiter)
        self._is_settled = False
        return Admission(job, targets, changes, n_cached)

    def _restored(self, source: Sequence, target: Sequence, n: int) -> list[Change]:
        """Return the change that lets a sequence return to the first `n` tokens of another, if it takes one."""
        if self._rewinds:
            return []
        checkpoint = next(checkpoint for checkpoint in source.checkpoints if checkpoint.n == n)
        checkpoint.used_at = self._tick()
        return [Restore(target, checkpoint)]

    def _reserves(self, waiter: _Waiter) -> list[int]:
        """Return the cells that each answer needs beside the tokens of the waiter: for what it has, if they have not,
        and for what it may add."""
        most = self._context_length - len(waiter.job.tokens)
        if waiter.job.max_tokens is not None:
            most = min(most, waiter.job.max_tokens)
        is_lone = len(waiter.generated) == 1
        return [(0 if is_lone else n) + min(RESERVED, most - n) for n in waiter.generated]

    def _targets(self, n: int, source: Sequence | None, n_cached: int) -> list[Sequence]:
        """Choose `n` sequences for a job: free ones, then idle ones, least recently used first.

        The source itself is the first of them if all its tokens are a beginning of the prompt, so that nothing of it is
        lost, or if there is no other.
        """
        available = [s for s in self.sequences if not s.is_running and s is not source]
        available.sort(key=lambda s: (bool(s.tokens), s.used_at))
        is_idle = source is not None and source.is_idle
        if source is not None and is_idle and (n_cached == len(source.tokens) or len(available) < n):
            available.insert(0, source)
        return available[:n]

    def _cells_of_running(self) -> int:
        stretches = {id(stretch): stretch for s in self.sequences if s.is_running for stretch in s.stretches}
        return sum(stretch.length for stretch in stretches.values())

    @staticmethod
    def _cells_outside_running(source: Sequence | None, n: int) -> int:
        """Count those of a sequence's first `n` cells that no running sequence uses."""
        count = 0
        for stretch in source.stretches if source is not None else ():
            if not any(user.is_running for user in stretch.users):
                count += min(stretch.length, n)
            n -= stretch.length
            if n <= 0:
                break
        return count

    def _promised(self) -> int:
        return sum(sequence.reserved for sequence in self.sequences)

    # ---- running

    def extend(self, sequence: Sequence, tokens: list[int]) -> None:
        """Record that the engine decoded these tokens in a running sequence."""
        sequence.tokens += tokens
        sequence.reserved = max(0, sequence.reserved - len(tokens))
        self.cells.append(sequence, len(tokens))

    def checkpoint(self, sequence: Sequence) -> Checkpoint | None:
        """Return a checkpoint to be filled in, if one is to be taken of the tokens that a sequence has.  It replaces
        the least recently used one if there are as many as may be."""
        if len(sequence.tokens) not in sequence.marks:
            return None
        sequence.marks.remove(len(sequence.tokens))
        kept = {id(each): each for other in self.sequences for each in other.checkpoints}
        if len(kept) >= self._n_checkpoints:
            oldest = min(kept.values(), key=lambda each: each.used_at)
            for other in self.sequences:
                if oldest in other.checkpoints:
                    other.checkpoints.remove(oldest)
        checkpoint = Checkpoint(len(sequence.tokens), self._tick())
        sequence.checkpoints.append(checkpoint)
        return checkpoint

    def fork(self, source: Sequence, target: Sequence) -> Copy:
        """Let another answer of the same job begin with the whole prompt."""
        return self._copy(source, target, len(source.tokens))

    def finish(self, sequence: Sequence, *, is_kept: bool) -> Drop | None:
        """End the job of a sequence, which becomes idle, or free if its tokens are not kept."""
        job = sequence.job
        self._release(sequence)
        if not any(other.job is job for other in self.sequences):
            self._is_full = False
        if sequence.tokens and not (is_kept and (self._rewinds or self._n_checkpoints)):
            return self._drop(sequence)
        return None

    def victim(self) -> Job | None:
        """Return the job to preempt when cells ran out; None if only one runs.

        It is the youngest with cells of its own: a job whose cells are all shared would free none.  The oldest job is
        never preempted, so that each becomes the oldest, and ends.
        """
        began = {sequence.job: sequence.began for sequence in self.sequences if sequence.job is not None}
        _, *younger = sorted(began, key=lambda job: began[job])
        owners = {job for job in younger if self._has_own_cells(job)}
        return max(younger, key=lambda job: (job in owners, began[job]), default=None)

    def _has_own_cells(self, job: Job) -> bool:
        stretches = (stretch for s in self.sequences if s.job is job for stretch in s.stretches)
        return any(all(user.job is job for user in stretch.users) for stretch in stretches)

    def put_back(self, job: Job, answers: list[list[int]]) -> list[Drop]:
        """Preempt a job, which waits from then on.  `answers`: the tokens of each answer that has not ended, those that
        were not decoded too."""
        sequences = [sequence for sequence in self.sequences if sequence.job is job]
        self.queue.put_back(job, answers, sequences[0].began)
        self._is_full = True
        for sequence in sequences:
            self._release(sequence)
        return [self._drop(sequence) for sequence in sequences]

    def _release(self, sequence: Sequence) -> None:
        sequence.job = None
        sequence.prompt = []
        sequence.marks = []
        sequence.reserved = 0
        sequence.used_at = self._tick()
        self._is_settled = False

    def drop_idle(self) -> Drop | None:
        """Drop the least recently used of the idle sequences, if there is one."""
        idle = [sequence for sequence in self.sequences if sequence.is_idle]
        return self._drop(min(idle, key=lambda sequence: sequence.used_at)) if idle else None

    def lost(self, sequence: Sequence) -> None:
        """Record that a sequence lost its tokens, and that none can return to an earlier token after all."""
        self._drop(sequence)
        self._rewinds = False
        self._n_checkpoints = 0
        for each in self.sequences:
            each.checkpoints = []
            each.marks = []

    def _tick(self) -> int:
        self._uses += 1
        return self._uses

    def _drop(self, sequence: Sequence) -> Drop:
        self._cut(sequence, 0)
        return Drop(sequence)

    def _cut(self, sequence: Sequence, n: int) -> Cut:
        self.cells.truncate(sequence, n)
        sequence.tokens = sequence.tokens[:n]
        sequence.checkpoints = [checkpoint for checkpoint in sequence.checkpoints if checkpoint.n <= n]
        return Cut(sequence, n)

    def _copy(self, source: Sequence, target: Sequence, n: int) -> Copy:
        self.cells.share(source, target, n)
        target.tokens = source.tokens[:n]
        target.checkpoints = [checkpoint for checkpoint in source.checkpoints if checkpoint.n <= n]
        return Copy(source, target, n)


def most_checkpoints(n_sequences: int) -> int:
    """Return the number of checkpoints of a context whose sequences cannot return to an earlier token."""
    return max(LEAST_CHECKPOINTS, n_sequences)


def _is_in_prompt(sequence: Sequence) -> bool:
    return len(sequence.tokens) < len(sequence.prompt)


class Budget:
    """The number of prompt tokens in a step beside running answers, learned from the times of the last steps."""

    def __init__(self, target_s: float, most: int) -> None:
        self._target_s = target_s
        self._most = most
        self._plain_s = 0.0  # a step without prompts
        self.n_tokens = min(CHUNK, most)

    def learn(self, n_prompt: int, seconds: float) -> None:
        """Adapt to the time of a step with this number of prompt tokens.

        A step without prompts may alone take longer than the target; a prompt then gets as much time again.
        """
        if n_prompt == 0:
            self._plain_s = seconds if self._plain_s == 0 else 0.8 * self._plain_s + 0.2 * seconds
            return
        target_s = max(self._target_s, 2 * self._plain_s)
        if n_prompt >= self.n_tokens or seconds > target_s:
            fitting = n_prompt * target_s / max(seconds, 1e-6)
            most = 2 * max(n_prompt, self.n_tokens)
            self.n_tokens = int(min(max(fitting, LEAST_CHUNK), most, self._most))


def shares(left: list[int], budget: int) -> list[int]:
    """Divide a step's prompt tokens among prompts, oldest first, with these numbers of tokens left.

    Half of them go to the oldest, so that it advances; the others to the shortest, so that short prompts do not wait
    for a long one.
    """
    taken = [0] * len(left)

    def take(i: int, most: int) -> None:
        nonlocal budget
        n = min(left[i] - taken[i], most, budget)
        taken[i] += n
        budget -= n

    if left:
        take(0, -(-budget // 2))
    for i in sorted(range(len(left)), key=lambda i: left[i]):
        take(i, budget)
    return taken


def queue_full(most: int) -> str:
    """Return the message for a client that has no place."""
    return f"The queue is full: {most} requests may wait, and a client may not have more of them than places are free."


def retry_after_s(n_waiting: int, parallel: int, request_s: float) -> int:
    """Return the time after which a place in the queue should be free, from the mean time of a request."""
    return max(1, min(60, math.ceil(request_s * (n_waiting + 1) / parallel)))
