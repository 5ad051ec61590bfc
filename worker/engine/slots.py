"""Decides which job decodes in which sequence, who waits, and how much of a prompt a step takes.  Pure: no engine, no
clock.

A sequence is free, running (a job decodes in it), or idle: it keeps the tokens of a finished job, for a job with the
same beginning.  Sequences share the cells of a common beginning.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.places import has_place
from worker.engine.job import Job

RESERVED = 256  # cells of an answer that must be there at its start
WORTH_WAITING = 32  # tokens; a job waits for another to decode as many of its own prompt
LEAST_CHUNK = 8  # tokens of prompts in a step
CHUNK = 32  # the same, before any step was timed


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
class Sequence:
    """A sequence of the engine's context."""

    id: int
    tokens: list[int] = field(default_factory=list)  # in the context
    stretches: list[Stretch] = field(default_factory=list)  # their cells
    is_running: bool = False
    client: str = ""
    prompt: list[int] = field(default_factory=list)  # of the running job, if this sequence decodes it
    reserved: int = 0  # cells that a running job may still take without asking
    used_at: int = 0  # orders sequences by their last use

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


Change = Drop | Cut | Copy


@dataclass(frozen=True, slots=True)
class Admission:
    """A job may start: in these sequences, one for each answer, after these changes of the context, in order."""

    job: Job
    sequences: list[Sequence]  # the first one decodes the prompt
    changes: list[Change]
    n_cached: int  # tokens of the prompt that the first one already has


@dataclass(eq=False, slots=True)
class _Waiter:
    job: Job
    leader: Sequence | None = None  # decodes a prompt with the same beginning
    prompt: list[int] = field(default_factory=list)  # that prompt
    n_shared: int = 0  # length of that beginning


class Queue:
    """Jobs that wait.  Clients take turns; the jobs of one client keep their order."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[_Waiter]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Job]:
        return (waiter.job for waiter in self.in_turn())

    def add(self, job: Job) -> None:
        self._clients.setdefault(job.client, deque()).append(_Waiter(job))

    def remove(self, job: Job) -> bool:
        """Remove a job and return whether it was there."""
        waiters = self._clients.get(job.client, ())
        waiter = next((waiter for waiter in waiters if waiter.job is job), None)
        if waiter is None:
            return False
        self._clients[job.client].remove(waiter)
        if not self._clients[job.client]:
            del self._clients[job.client]
        return True

    def take(self, job: Job) -> None:
        """Remove a job that starts; its client's next turn comes after those of the others."""
        self.remove(job)
        if job.client in self._clients:
            self._clients[job.client] = self._clients.pop(job.client)

    def in_turn(self) -> Iterator[_Waiter]:
        """Yield the jobs in the order in which they would start: one of each client, then the next one of each."""
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
    ) -> None:
        """`rewinds`: a sequence can return to an earlier token; otherwise no tokens are kept and none are shared."""
        self.sequences = [Sequence(id_) for id_ in range(n_sequences)]
        self.queue = Queue()
        self.cells = Cells()
        self._parallel = parallel
        self._n_cells = n_cells
        self._context_length = context_length
        self._shared_prefixes = shared_prefixes
        self._rewinds = rewinds
        self._uses = 0
        self._is_settled = True  # no job that waits can start before something changes

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
        """Remove those of the jobs that just arrived, in this order, for which no place is left: `most` may wait."""
        waiting = Counter(job.client for job in self.queue)
        new = [job for job in arrived if job in self.queue]
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
        """
        if self._is_settled:
            return None
        self._is_settled = True
        n_running = self.n_running
        for waiter in self.queue.in_turn():
            if n_running + waiter.job.choices > self._parallel:
                return None
            if self._follows(waiter):
                self._is_settled = False
            else:
                return self._start(waiter.job, is_alone=n_running == 0)
        return None

    def _follows(self, waiter: _Waiter) -> bool:
        """Return whether a job waits for another to decode a beginning of its prompt."""
        leader = waiter.leader
        if leader is not None and leader.prompt is waiter.prompt and len(leader.tokens) < waiter.n_shared:
            return True
        waiter.leader = None
        job = waiter.job
        candidates = [s for s in self.sequences if _is_in_prompt(s) and self._may_share(s, job)]
        if not candidates:
            return False
        longest = {id(s): min(common_prefix(job.tokens, s.prompt), len(job.tokens) - 1) for s in candidates}
        leader = max(candidates, key=lambda s: longest[id(s)])
        n_shared, n_cached = longest[id(leader)], self._source(job)[1]
        if n_shared < n_cached + WORTH_WAITING:
            return False
        waiter.leader, waiter.prompt, waiter.n_shared = leader, leader.prompt, n_shared
        return True

    def _may_share(self, sequence: Sequence, job: Job) -> bool:
        return self._rewinds and (self._shared_prefixes or sequence.client == job.client)

    def _source(self, job: Job) -> tuple[Sequence | None, int]:
        """Return the sequence with the longest beginning of a job's prompt, and that length.  The last token of a
        prompt is always decoded again, for its logits."""
        best, n_best = None, 0
        for sequence in self.sequences:
            if sequence.tokens and self._may_share(sequence, job):
                n = min(common_prefix(job.tokens, sequence.tokens), len(job.tokens) - 1)
                if n > n_best or (n == n_best and best is not None and not best.is_idle and sequence.is_idle):
                    best, n_best = sequence, n
        return (best, n_best) if n_best else (None, 0)

    def _start(self, job: Job, *, is_alone: bool) -> Admission | None:
        source, n_cached = self._source(job)
        reserve = min(RESERVED, self._context_length - len(job.tokens), job.max_tokens or RESERVED)
        needed = len(job.tokens) - n_cached + job.choices * reserve
        kept = self._cells_of_running() + self._cells_outside_running(source, n_cached)
        if not is_alone and kept + self._promised() + needed > self._n_cells:
            return None

        changes: list[Change] = []
        targets = self._targets(job, source, n_cached)
        for target in targets:
            if target.tokens and target is not source:
                changes.append(self._drop(target))
        first = targets[0]
        if source is first:
            if n_cached < len(source.tokens):
                changes.append(self._cut(source, n_cached))
        elif source is not None:
            changes.append(self._copy(source, first, n_cached))
            source.used_at = self._tick()
        for target in targets:
            target.is_running = True
            target.client = job.client
            target.reserved = reserve
        first.prompt = job.tokens
        first.reserved += len(job.tokens) - n_cached
        while self.cells.used + self._promised() > self._n_cells and (victim := self.drop_idle()) is not None:
            changes.append(victim)
        self.queue.take(job)
        self._is_settled = False
        return Admission(job, targets, changes, n_cached)

    def _targets(self, job: Job, source: Sequence | None, n_cached: int) -> list[Sequence]:
        """Choose the sequences of a job: free ones, then idle ones, least recently used first.

        The source itself is the first of them if all its tokens are a beginning of the prompt, so that nothing of it is
        lost, or if there is no other.
        """
        available = [s for s in self.sequences if not s.is_running and s is not source]
        available.sort(key=lambda s: (bool(s.tokens), s.used_at))
        is_idle = source is not None and source.is_idle
        if source is not None and is_idle and (n_cached == len(source.tokens) or len(available) < job.choices):
            available.insert(0, source)
        return available[: job.choices]

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

    def fork(self, source: Sequence, target: Sequence) -> Copy:
        """Let another answer of the same job begin with the whole prompt."""
        return self._copy(source, target, len(source.tokens))

    def finish(self, sequence: Sequence, *, is_kept: bool) -> Drop | None:
        """End the job of a sequence, which becomes idle, or free if its tokens are not kept."""
        sequence.is_running = False
        sequence.prompt = []
        sequence.reserved = 0
        sequence.used_at = self._tick()
        self._is_settled = False
        if sequence.tokens and not (is_kept and self._rewinds):
            return self._drop(sequence)
        return None

    def drop_idle(self) -> Drop | None:
        """Drop the least recently used of the idle sequences, if there is one."""
        idle = [sequence for sequence in self.sequences if sequence.is_idle]
        return self._drop(min(idle, key=lambda sequence: sequence.used_at)) if idle else None

    def lost(self, sequence: Sequence) -> None:
        """Record that a sequence lost its tokens, and that sequences cannot return to an earlier token after all."""
        self._drop(sequence)
        self._rewinds = False

    def _tick(self) -> int:
        self._uses += 1
        return self._uses

    def _drop(self, sequence: Sequence) -> Drop:
        self._cut(sequence, 0)
        return Drop(sequence)

    def _cut(self, sequence: Sequence, n: int) -> Cut:
        self.cells.truncate(sequence, n)
        sequence.tokens = sequence.tokens[:n]
        return Cut(sequence, n)

    def _copy(self, source: Sequence, target: Sequence, n: int) -> Copy:
        self.cells.share(source, target, n)
        target.tokens = source.tokens[:n]
        return Copy(source, target, n)


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
