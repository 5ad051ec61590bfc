"""The engine loop of an embedding model: the runner's main thread, which computes the vectors of all requests in steps.

A step takes what arrived, fills one batch with whole texts of all clients in turn, computes it, and hands out the
vectors.  Without a job the thread sleeps.  Facts about llama.cpp were read from its source at commit 0c1e57098.
"""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.places import has_place
from worker.engine.decode import ABORTED, Engine, EngineError, Ids
from worker.engine.loop import Counters
from worker.engine.slots import queue_full, retry_after_s

CPU_TOKENS = 512  # of a batch on a CPU: more are no faster, and attention computes all texts of a batch with all
WEIGHT = 0.2  # of the last job in the mean time of a job

EndedCode = Literal["queue_full", "queue_timeout", "deadline", "engine_failed"]


@dataclass(eq=False, slots=True, kw_only=True)
class Texts:
    """Texts to compute the vectors of.  Identity is its key."""

    client: str  # opaque; clients take turns
    tokens: Sequence[Ids]  # of each text: at least one, and not more than a batch has
    arrived_at: float  # by the monotonic clock
    deadline: float  # by the monotonic clock
    n_done: int = 0  # texts whose vectors were handed out
    began_at: float = 0.0  # of its first batch; 0: none yet


@dataclass(frozen=True, slots=True)
class Waits:
    """The texts wait for a batch."""

    texts: Texts
    ahead: int  # number of jobs before them


@dataclass(frozen=True, slots=True)
class Computed:
    """The vectors of the next texts of a job: a row for each."""

    texts: Texts
    vectors: NDArray[np.float32]
    is_last: bool


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The job ended before all its vectors were computed."""

    texts: Texts
    code: EndedCode
    message: str
    retry_after_s: int = 0


Result = Waits | Computed | Unfinished


class Turns:
    """Jobs that have texts left.  Clients take turns; the jobs of one client keep their order."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[Texts]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def jobs(self) -> list[Texts]:
        return [job for jobs in self._clients.values() for job in jobs]

    def add(self, job: Texts) -> None:
        self._clients.setdefault(job.client, deque()).append(job)

    def remove(self, job: Texts) -> None:
        """Remove a job if it is there."""
        jobs = self._clients.get(job.client, deque())
        if job in jobs:
            jobs.remove(job)
        if not jobs:
            self._clients.pop(job.client, None)

    def fill(self, most_tokens: int, most_texts: int) -> list[tuple[Texts, Ids]]:
        """Return the texts of the next batch: one of each client, then the next one of each, while they fit.

        The first text is taken even if it alone is longer than `most_tokens`.  The next batch begins with another
        client.
        """
        left = {client: _texts(jobs) for client, jobs in self._clients.items()}
        ready = {client: next(texts) for client, texts in left.items()}
        parts: list[tuple[Texts, Ids]] = []
        n_tokens = 0
        while ready:
            for client, (job, text) in [*ready.items()]:
                if parts and (n_tokens + len(text) > most_tokens or len(parts) == most_texts):
                    del ready[client]
                    continue
                parts.append((job, text))
                n_tokens += len(text)
                if (following := next(left[client], None)) is None:
                    del ready[client]
                else:
                    ready[client] = following
        if parts:
            first = parts[0][0].client
            self._clients[first] = self._clients.pop(first)
        return parts


def _texts(jobs: Iterable[Texts]) -> Iterator[tuple[Texts, Ids]]:
    return ((job, text) for job in jobs for text in islice(job.tokens, job.n_done, None))


class Embedding:
    """Computes vectors.  `submit`, `cancel` and `counters` are for other threads."""

    def __init__(
        self,
        engine: Engine,
        hand_out: Callable[[list[Result]], None],
        *,
        on_gpu: bool,
        most_waiting: int = 64,
        most_wait_s: float = 60.0,
    ) -> None:
        """`hand_out` is called in the loop's thread, before and after a batch; it must not block.

        `most_waiting`, `most_wait_s`: limits of jobs none of whose texts was in a batch yet.
        """
        self.counters = Counters()
        self.vocabulary = engine.vocabulary
        self.longest = engine.batch.n_batch  # tokens of a text
        self._engine = engine
        self._hand_out = hand_out
        self._most_tokens = engine.batch.n_batch if on_gpu else min(CPU_TOKENS, engine.batch.n_batch)
        self._most_waiting = most_waiting
        self._most_wait_s = most_wait_s
        self._inbox: queue.SimpleQueue[tuple[Texts, bool]] = queue.SimpleQueue()  # a job, and whether to cancel it
        self._turns = Turns()
        self._in_batch: frozenset[Texts] = frozenset()
        self._out: list[Result] = []
        self._job_s = 1.0  # mean time of a job

    # ---- for other threads

    def submit(self, job: Texts) -> None:
        """Take a job.  Its results follow."""
        self._inbox.put((job, False))

    def cancel(self, job: Texts) -> None:
        """End a job.  Results of one batch may still follow."""
        self._inbox.put((job, True))
        if self._in_batch == {job}:
            self._engine.abort()

    # ---- the loop

    def run(self) -> None:
        """Compute for ever.  An exception is fatal to the process: the state of the engine is unknown."""
        while True:
            self.step()

    def step(self) -> None:
        """Do one step.  Blocks until there is something to do."""
        self._engine.resume()
        self._take()
        self._expire(time.monotonic())
        self._compute()
        jobs = self._turns.jobs()
        self.counters.running = sum(job.began_at > 0 for job in jobs)
        self.counters.waiting = len(jobs) - self.counters.running
        self._engine.write_log()
        self._flush()

    def _flush(self) -> None:
        """Hand out the results so far."""
        if self._out:
            out, self._out = self._out, []
            self._hand_out(out)

    def _take(self) -> None:
        """Take what arrived, waiting for it if there is nothing else to do."""
        is_idle = not len(self._turns)
        while is_idle or not self._inbox.empty():
            job, is_cancelled = self._inbox.get()
            is_idle = False
            if is_cancelled:
                self._turns.remove(job)
                continue
            ahead = len(self._turns)
            waiting = Counter(other.client for other in self._turns.jobs() if not other.began_at)
            if has_place(job.client, waiting, self._most_waiting):
                self._turns.add(job)
                self._out.append(Waits(job, ahead))
            else:
                message = queue_full(self._most_waiting)
                self._out.append(Unfinished(job, "queue_full", message, retry_after_s(ahead, 1, self._job_s)))

    def _expire(self, now: float) -> None:
        """End what has waited or taken too long."""
        for job in self._turns.jobs():
            if not job.began_at and now >= min(job.deadline, job.arrived_at + self._most_wait_s):
                self._end(job, "queue_timeout", f"The request waited for {now - job.arrived_at:.0f} s.")
            elif job.began_at and now >= job.deadline:
                self._end(job, "deadline", f"The request took {now - job.arrived_at:.0f} s.")

    def _end(self, job: Texts, code: EndedCode, message: str) -> None:
        self._turns.remove(job)
        self._out.append(Unfinished(job, code, message))

    def _compute(self) -> None:
        """Compute one batch, and add its vectors to the results."""
        parts = self._turns.fill(self._most_tokens, self._engine.n_sequences)
        if not parts:
            return
        now = time.monotonic()
        batch = self._engine.batch
        batch.clear()
        for seq_id, (job, tokens) in enumerate(parts):
            job.began_at = job.began_at or now
            batch.add(tokens, 0, seq_id, n_outputs=len(tokens))
        self._in_batch = frozenset(job for job, _ in parts)
        self._flush()  # a request that ends the process here must count as accepted, or it is sent to another one
        try:
            is_aborted = self._engine.decode() == ABORTED
            vectors = None if is_aborted else self._engine.vectors(len(parts))
        except EngineError as e:
            for job in self._in_batch:
                self._end(job, "engine_failed", str(e))
            return
        finally:
            self._in_batch = frozenset()
            self._engine.forget()
        if vectors is None:
            return
        if not self._engine.ranks:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        rows: dict[Texts, list[NDArray[np.float32]]] = {}
        for (job, _), row in zip(parts, vectors, strict=True):
            rows.setdefault(job, []).append(row)
        for job, own in rows.items():
            job.n_done += len(own)
            is_last = job.n_done == len(job.tokens)
            if is_last:
                self._turns.remove(job)
                self._job_s += WEIGHT * (time.monotonic() - job.began_at - self._job_s)
            self._out.append(Computed(job, np.stack(own), is_last))
