"""Rules of the engine loop's sequences: who starts where, what is shared, and what a step takes."""

from __future__ import annotations

import dataclasses
import random
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.job import Job
from worker.engine.slots import (
    LAST,
    LEAST_CHUNK,
    RESERVED,
    Admission,
    Budget,
    Change,
    Copy,
    Cut,
    Drop,
    Restore,
    Sequence,
    Slots,
    common_prefix,
    retry_after_s,
    shares,
)

END = 2  # a token that ends an answer


def job(tokens: list[int], *, client: str = "a", choices: int = 1, max_tokens: int | None = None) -> Job:
    return Job(client=client, tokens=tokens, choices=choices, max_tokens=max_tokens, arrived_at=0.0, deadline=1e9)


def slots(
    n_sequences: int = 4,
    *,
    parallel: int | None = None,
    n_cells: int = 4096,
    shared_prefixes: bool = False,
    rewinds: bool = True,
    n_checkpoints: int = 0,
) -> Slots:
    return Slots(
        n_sequences=n_sequences,
        parallel=parallel or n_sequences,
        n_cells=n_cells,
        context_length=n_cells,
        shared_prefixes=shared_prefixes,
        rewinds=rewinds,
        n_checkpoints=n_checkpoints,
    )


def started(slots: Slots) -> list[Admission]:
    admissions = []
    while admission := slots.admit():
        admissions.append(admission)
    return admissions


def run(slots: Slots, tokens: list[int], answer: list[int], client: str = "a") -> Admission:
    """Start a job, decode it, and end it."""
    slots.add(job(tokens, client=client))
    (admission,) = started(slots)
    (sequence,) = admission.sequences
    for end in [*sequence.marks, len(tokens)]:
        slots.extend(sequence, tokens[len(sequence.tokens) : end])
        slots.checkpoint(sequence)
    slots.extend(sequence, answer)
    slots.finish(sequence, is_kept=True)
    return admission


class Memory:
    """The engine's memory, by its documentation: which cell holds which token of which sequences, and, if it cannot
    rewind, after which tokens the model's state is."""

    def __init__(self, *, rewinds: bool) -> None:
        self.rewinds = rewinds
        self.states: dict[int, list[int]] = {}  # of each sequence
        self.cells: dict[int, list[tuple[int, int]]] = {}  # of a sequence: each token and its cell
        self._ids = count()

    def apply(self, change: Change) -> None:
        match change:
            case Drop(sequence):
                self.cells[sequence.id], self.states[sequence.id] = [], []
            case Cut(sequence, n):
                self.cells[sequence.id] = self.cells[sequence.id][:n]
                if self.rewinds:
                    self.states[sequence.id] = self.tokens(sequence)
                assert self.states[sequence.id] == self.tokens(sequence)
            case Copy(source, target, n):
                assert not self.cells.get(target.id), "a copy into a sequence that has tokens"
                self.cells[target.id] = self.cells[source.id][:n]
                self.states[target.id] = self.tokens(target) if self.rewinds else self.states[source.id]
            case Restore(sequence, checkpoint):
                assert not self.rewinds
                self.states[sequence.id] = checkpoint.state

    def decode(self, sequence: Sequence, tokens: list[int]) -> None:
        assert self.states.get(sequence.id, []) == self.tokens(sequence)
        self.states[sequence.id] = self.tokens(sequence) + tokens
        self.cells.setdefault(sequence.id, []).extend((token, next(self._ids)) for token in tokens)

    @property
    def used(self) -> int:
        return len({cell for cells in self.cells.values() for _, cell in cells})

    def tokens(self, sequence: Sequence) -> list[int]:
        return [token for token, _ in self.cells.get(sequence.id, [])]


class Run:
    """Random jobs in the sequences of a small context."""

    def __init__(self, seed: int, n_sequences: int, parallel: int, *, is_shared: bool, rewinds: bool) -> None:
        self.random = random.Random(seed)
        self.is_shared, self.parallel, self.n_cells = is_shared, parallel, 120
        self.slots = slots(
            n_sequences,
            parallel=parallel,
            n_cells=self.n_cells,
            shared_prefixes=is_shared,
            rewinds=rewinds,
            n_checkpoints=3,
        )
        self.memory = Memory(rewinds=rewinds)
        self.waiting: list[Job] = []
        self.running: dict[Job, dict[int, Sequence]] = {}  # the sequence of each answer that has not ended
        self.answers: dict[Job, list[list[int]]] = {}  # of jobs that began, in this order
        self.preempted: list[Job] = []
        self.ended: list[Job] = []
        self.owners: dict[int, str] = {}
        self.may_start = True

    def arrive(self) -> None:
        tokens = [self.random.randrange(2) for _ in range(self.random.randint(1, 60))]
        client, choices = self.random.choice("ab"), self.random.randint(1, self.parallel)
        new = job(tokens, client=client, choices=choices, max_tokens=self.random.choice([5, 40, None]))
        self.slots.add(new)
        self.waiting.append(new)

    def withdraw(self, job: Job) -> None:
        for jobs in (self.waiting, self.preempted):
            if job in jobs:
                jobs.remove(job)
        assert self.slots.withdraw(job)
        assert not self.slots.withdraw(job)

    def admit(self) -> None:
        for admission in started(self.slots):
            now = admission.job
            assert self.may_start, "a job started between a preemption and the next end"
            was_alone = not self.running
            tokens = now.tokens
            if now in self.preempted:
                self.preempted.remove(now)
                unfinished = [i for i in range(now.choices) if not self.is_over(now, i)]
                if len(unfinished) == 1:
                    tokens = tokens + self.answers[now][unfinished[0]]
            else:
                self.waiting.remove(now)
                unfinished = [*range(now.choices)]
                self.answers[now] = [[] for _ in unfinished]
            for change in admission.changes:
                if isinstance(change, Copy):
                    assert self.is_shared or self.owners[change.source.id] == now.client
                self.memory.apply(change)
            first, *others = admission.sequences
            assert self.memory.tokens(first) == tokens[: admission.n_cached] != tokens
            assert all(not self.memory.tokens(other) for other in others)
            self.running[now] = dict(zip(unfinished, admission.sequences, strict=True))
            self.owners.update({sequence.id: now.client for sequence in admission.sequences})
            if not was_alone:
                promised = sum(sequence.reserved for sequence in self.slots.sequences)
                assert self.slots.cells.used + promised <= self.n_cells

    def is_over(self, job: Job, choice: int) -> bool:
        return self.answers[job][choice][-1:] == [END]

    def parts(self) -> list[tuple[Job, int, list[int]]]:
        """Return what the running answers decode in a step: the job, the answer, and its tokens."""
        parts = []
        for now, sequences in self.running.items():
            first = next(iter(sequences.values()))
            has_prompt = len(first.tokens) >= len(now.tokens)
            for choice, sequence in sequences.items():
                goal = now.tokens if len(sequences) > 1 and not has_prompt else now.tokens + self.answers[now][choice]
                start = len(sequence.tokens)
                end = min([mark for mark in sequence.marks if mark > start] + [start + self.random.randint(1, 20)])
                if sequence is first or has_prompt:
                    parts.append((now, choice, goal[start:end]))
        return parts

    def decode(self) -> None:
        parts = self.parts()
        while self.slots.cells.used + sum(len(tokens) for _, _, tokens in parts) > self.n_cells:
            self.make_room()
            parts = self.parts()
        for now, choice, tokens in parts:
            sequences = self.running[now]
            sequence = sequences[choice]
            assert tokens
            self.slots.extend(sequence, tokens)
            self.memory.decode(sequence, tokens)
            if checkpoint := self.slots.checkpoint(sequence):
                checkpoint.state = self.memory.tokens(sequence)
            if len(sequence.tokens) == len(now.tokens):
                for other in sequences.values():
                    if not other.tokens:
                        self.memory.apply(self.slots.fork(sequence, other))
                if not any(self.answers[now]):
                    for answer in self.answers[now]:
                        answer.append(self.random.randrange(2))
                    continue
            if len(sequence.tokens) == len(now.tokens) + len(self.answers[now][choice]):
                self.answers[now][choice].append(self.random.randrange(2))
        for now, sequences in [*self.running.items()]:
            for choice, sequence in [*sequences.items()]:
                if len(self.answers[now][choice]) == now.max_tokens or len(sequence.tokens) + 1 >= self.n_cells:
                    self.end(now, choice)

    def make_room(self) -> None:
        if dropped := self.slots.drop_idle():
            self.memory.apply(dropped)
            return
        victim = self.slots.victim()
        if victim is None:
            (now,) = self.running
            self.end(now, [*self.running[now]][-1])
            return
        began = [job for job in self.answers if job in self.running]
        assert victim is not began[0], "the oldest job was preempted"
        sequences = self.running.pop(victim)
        used = self.memory.used
        for dropped in self.slots.put_back(victim, [self.answers[victim][choice] for choice in sequences]):
            self.memory.apply(dropped)
        assert victim is began[-1] or self.memory.used < used
        self.preempted.append(victim)
        self.may_start = False

    def end(self, job: Job, choice: int) -> None:
        """End an answer, and the job with its last one."""
        sequence = self.running[job].pop(choice)
        self.answers[job][choice].append(END)
        if not self.running[job]:
            del self.running[job]
            self.ended.append(job)
            self.may_start = True
        if dropped := self.slots.finish(sequence, is_kept=self.random.random() < 0.8):
            self.memory.apply(dropped)

    def check(self) -> None:
        mine = self.slots
        assert mine.cells.used == self.memory.used <= self.n_cells
        for sequence in mine.sequences:
            assert sequence.tokens == self.memory.tokens(sequence)
            assert sum(stretch.length for stretch in sequence.stretches) == len(sequence.tokens)
        assert len({id(checkpoint) for sequence in mine.sequences for checkpoint in sequence.checkpoints}) <= 3
        assert mine.n_running == sum(map(len, self.running.values())) <= self.parallel
        assert {*mine.queue} == {*self.waiting, *self.preempted}
        assert [*mine.queue][: len(self.preempted)] == [job for job in self.answers if job in self.preempted]


@given(
    seed=st.integers(0, 10**9),
    n_sequences=st.integers(1, 6),
    parallel=st.integers(1, 6),
    is_shared=st.booleans(),
    rewinds=st.booleans(),
)
def test_any_sequence_of_jobs_keeps_the_rules(
    seed: int, n_sequences: int, parallel: int, is_shared: bool, rewinds: bool
) -> None:
    """Random jobs arrive, decode, run out of cells, end and vanish.  The memory then has what the slots say, each job
    starts with a beginning of its own tokens and in the state of the model after it, clients share nothing, preempted
    jobs return in their order, and every job ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.engine.slots.RESERVED", 8)
        patch.setattr("worker.engine.slots.WORTH_WAITING", 4)
        run = Run(seed, n_sequences, min(parallel, n_sequences), is_shared=is_shared, rewinds=rewinds)
        for _ in range(60):
            match run.random.randrange(6):
                case 0:
                    run.arrive()
                case 1 | 2 | 3 if run.running:
                    run.decode()
                case 4 if run.running and run.random.random() < 0.5:
                    now = run.random.choice([*run.running])
                    for choice in [*run.running[now]]:
                        run.end(now, choice)
                case 5 if (waiting := run.waiting + run.preempted) and run.random.random() < 0.3:
                    run.withdraw(run.random.choice(waiting))
            run.admit()
            run.check()
        answers = sum(job.choices + 1 for job in [*run.running, *run.waiting, *run.preempted])
        for _ in range(answers * run.n_cells):  # the oldest job gets a token in each step
            if not run.running:
                break
            run.decode()
            run.admit()
            run.check()
        assert not run.running
        assert not len(run.slots.queue)


def full() -> tuple[Slots, Job]:
    """Return the slots of a full context, and the younger one of its two jobs.  The older one is in the first
    sequence."""
    mine = slots(n_cells=1000)
    jobs = [job([1] * 100), job([2] * 100)]
    for each in jobs:
        mine.add(each)
    for admission, n in zip(started(mine), (800, 200), strict=True):
        mine.extend(admission.sequences[0], admission.job.tokens + [7] * (n - 100))
    return mine, jobs[1]


def test_the_youngest_job_gives_its_cells_back() -> None:
    mine, young = full()
    assert mine.victim() is young
    mine.put_back(young, [[7] * 101])
    assert mine.cells.used == 800
    assert mine.victim() is None, "a job that runs alone"


def test_a_job_that_would_free_nothing_is_not_preempted() -> None:
    mine = slots(n_cells=1000, shared_prefixes=True)
    jobs = [job([1] * 100), job([2] * 100), job([1] * 100)]
    for each, n in zip(jobs, (100, 100, 0), strict=True):
        mine.add(each)
        for admission in started(mine):
            mine.extend(admission.sequences[0], admission.job.tokens[:n])
    assert mine.sequences[2].job is jobs[2]
    assert mine.victim() is jobs[1]


def test_nothing_starts_between_a_preemption_and_the_next_end() -> None:
    mine, young = full()
    mine.put_back(young, [[7] * 101])
    small = job([3], max_tokens=1)
    mine.add(small)
    assert started(mine) == []
    assert [*mine.queue] == [young, small]
    mine.finish(mine.sequences[0], is_kept=True)
    assert [admission.job for admission in started(mine)] == [young, small]


def test_a_preempted_job_starts_with_all_its_tokens() -> None:
    mine, young = full()
    mine.put_back(young, [[7] * 101])
    mine.finish(mine.sequences[0], is_kept=False)
    (again,) = started(mine)
    assert (again.job, again.n_cached) == (young, 0)
    assert again.sequences[0].prompt == [2] * 100 + [7] * 101
    assert again.sequences[0].reserved == 201 + RESERVED
    mine.extend(again.sequences[0], again.sequences[0].prompt)
    mine.finish(again.sequences[0], is_kept=True)
    assert run(mine, [2] * 100 + [7] * 101 + [9], []).n_cached == 201


def test_the_answers_of_a_preempted_job_share_its_prompt_again() -> None:
    mine = slots(n_cells=1000)
    old, several = job([1] * 100), job([2] * 100, choices=3, max_tokens=30)
    mine.add(old)
    mine.add(several)
    started(mine)
    mine.put_back(several, [[7] * 10, [8] * 20])
    mine.finish(mine.sequences[0], is_kept=False)
    (again,) = started(mine)
    first, second = again.sequences
    assert first.prompt == several.tokens
    assert (first.reserved, second.reserved) == (100 + 30, 30)


def test_jobs_in_excess_are_never_preempted_ones() -> None:
    mine, young = full()
    mine.put_back(young, [[7] * 101])
    jobs = [job([i]) for i in range(3)]
    for each in jobs:
        mine.add(each)
    assert mine.excess(jobs, 1) == jobs[1:]
    assert mine.withdraw(young)
    assert [*mine.queue] == jobs[:1]


def test_jobs_of_an_accepted_request_keep_their_place() -> None:
    """They count, for those that come after them."""
    mine = slots()
    accepted = [dataclasses.replace(job([i]), is_accepted=True) for i in range(2)]
    new = [job([i], client=f"{i}") for i in range(2)]
    for each in [*accepted, *new]:
        mine.add(each)
    assert mine.excess([*accepted, *new], 3) == new[1:]


def test_a_prompt_that_is_scored_reuses_nothing() -> None:
    """And waits for no other that begins like it."""
    mine = slots()
    run(mine, [*range(100)], [1])
    scored = dataclasses.replace(job([*range(101)]), scores_prompt=True)
    mine.add(scored)
    (first,) = started(mine)
    assert (first.job, first.n_cached) == (scored, 0)
    again = dataclasses.replace(scored)
    mine.add(again)
    assert [admission.job for admission in started(mine)] == [again]


def test_a_prompt_continues_the_sequence_it_begins_with() -> None:
    mine = slots()
    run(mine, [1, 2, 3], [4, 5])
    admission = run(mine, [1, 2, 3, 4, 5, 6, 7], [8])
    assert (admission.n_cached, admission.changes) == (5, [])


def test_the_last_token_of_a_prompt_is_always_decoded() -> None:
    mine = slots()
    run(mine, [1, 2, 3], [])
    assert run(mine, [1, 2, 3], []).n_cached == 2


def test_another_prompt_with_the_same_beginning_keeps_the_first() -> None:
    mine = slots()
    first = run(mine, [1, 2, 3, 4], [5])
    run(mine, [1, 2, 9, 9], [9])
    assert first.sequences[0].tokens == [1, 2, 3, 4, 5]
    assert mine.cells.used == 5 + 3


def test_a_running_sequence_shares_its_beginning() -> None:
    mine = slots()
    mine.add(job([1, 2, 3, 4]))
    (first,) = started(mine)
    mine.extend(first.sequences[0], [1, 2, 3, 4])
    mine.add(job([1, 2, 3, 9]))
    (second,) = started(mine)
    assert second.changes == [Copy(first.sequences[0], second.sequences[0], 3)]


def test_clients_share_no_beginning_unless_allowed() -> None:
    for is_shared, n_cached in [(False, 0), (True, 2)]:
        mine = slots(shared_prefixes=is_shared)
        run(mine, [1, 2, 3], [], client="a")
        assert run(mine, [1, 2, 3], [], client="b").n_cached == n_cached


def test_without_rewinding_a_sequence_continues_as_a_whole() -> None:
    mine = slots(rewinds=False, n_checkpoints=4)
    run(mine, [1] * 50, [2, 3])
    admission = run(mine, [1] * 50 + [2, 3, 4], [])
    assert (admission.n_cached, admission.changes) == (52, [])


def test_without_rewinding_a_prompt_begins_at_a_checkpoint() -> None:
    mine = slots(rewinds=False, n_checkpoints=4)
    (first,) = run(mine, [1] * 50, [2, 3]).sequences
    (checkpoint,) = first.checkpoints
    assert checkpoint.n == 50 - LAST
    admission = run(mine, [1] * 50 + [9], [])
    (second,) = admission.sequences
    assert admission.n_cached == checkpoint.n
    assert admission.changes == [Copy(first, second, checkpoint.n), Restore(second, checkpoint)]
    assert len(first.tokens) == 52
    assert run(mine, [1] * 10, []).n_cached == 0


def test_a_checkpoint_is_taken_where_two_prompts_part() -> None:
    mine = slots(8, rewinds=False, n_checkpoints=4)
    run(mine, [1] * 100 + [2] * 60, [])
    assert run(mine, [1] * 100 + [3] * 60, []).n_cached == 0
    assert run(mine, [1] * 100 + [4] * 60, []).n_cached == 100
    assert run(mine, [1] * 100 + [5] * 60, [], client="b").n_cached == 0


def test_the_least_recently_used_checkpoint_makes_room() -> None:
    mine = slots(8, rewinds=False, n_checkpoints=2)
    run(mine, [1] * 50, [])
    run(mine, [2] * 50, [])
    assert run(mine, [1] * 50, []).n_cached == 46
    run(mine, [3] * 50, [])
    assert [run(mine, [n] * 50, []).n_cached for n in (1, 3, 2)] == [46, 46, 0]


def test_nothing_is_kept_without_rewinding_and_checkpoints() -> None:
    mine = slots(rewinds=False)
    first = run(mine, [1, 2, 3], [4])
    assert not first.sequences[0].tokens
    assert run(mine, [1, 2, 3, 4], []).n_cached == 0


def test_equal_prompts_that_arrive_together_are_decoded_once() -> None:
    mine = slots(20, n_cells=32768)
    prompt = [*range(2000)]
    for _ in range(20):
        mine.add(job(prompt))
    (leader,) = started(mine)
    mine.extend(leader.sequences[0], prompt[:1000])
    assert started(mine) == []
    mine.extend(leader.sequences[0], prompt[1000:])
    assert [admission.n_cached for admission in started(mine)] == [1999] * 19
    assert mine.cells.used == 2000


def test_a_job_that_waits_for_a_prompt_lets_others_pass() -> None:
    mine = slots()
    mine.add(job([*range(100)]))
    mine.add(job([*range(100)]))
    mine.add(job([7] * 100))
    assert [admission.job.tokens[0] for admission in started(mine)] == [0, 7]


def test_a_job_whose_leader_vanishes_starts_itself() -> None:
    mine = slots()
    mine.add(job([*range(100)]))
    follower = job([*range(100)])
    mine.add(follower)
    (leader,) = started(mine)
    mine.finish(leader.sequences[0], is_kept=True)
    assert [admission.job for admission in started(mine)] == [follower]


def test_clients_take_turns_and_keep_their_own_order() -> None:
    mine = slots(1)
    jobs = [job([i], client="a") for i in range(4)] + [job([9], client="b"), job([8], client="b")]
    for each in jobs:
        mine.add(each)
    order = []
    while admissions := started(mine):
        (admission,) = admissions
        order.append(admission.job.tokens[0])
        mine.finish(admission.sequences[0], is_kept=False)
    assert order == [0, 9, 1, 8, 2, 3]


def test_a_large_job_is_not_passed_by_small_ones() -> None:
    mine = slots(n_cells=1000)
    mine.add(job([1] * 500))
    (first,) = started(mine)
    large, small = job([2] * 500), job([3], max_tokens=1)
    mine.add(large)
    mine.add(small)
    assert started(mine) == []
    mine.extend(first.sequences[0], [1] * 500)
    mine.finish(first.sequences[0], is_kept=True)
    assert [admission.job for admission in started(mine)] == [large, small]


def test_a_job_starts_only_with_cells_for_its_answer() -> None:
    mine = slots(n_cells=1000)
    mine.add(job([1] * 400))
    mine.add(job([2] * (1000 - 400 - 2 * RESERVED + 1)))
    assert len(started(mine)) == 1
    mine = slots(n_cells=1000)
    mine.add(job([1] * 400))
    mine.add(job([2] * (1000 - 400 - 2 * RESERVED)))
    assert len(started(mine)) == 2


def test_idle_sequences_make_room_least_recently_used_first() -> None:
    mine = slots(n_cells=1000)
    old = run(mine, [1] * 300, []).sequences[0]
    new = run(mine, [2] * 300, []).sequences[0]
    admission = run(mine, [3] * 300, [])
    assert admission.changes == [Drop(old)]
    assert len(new.tokens) == 300


def test_the_last_arrivals_are_in_excess() -> None:
    mine = slots(1)
    jobs = [job([i], client="") for i in range(5)]
    for each in jobs:
        mine.add(each)
    started(mine)
    assert mine.excess(jobs, 2) == jobs[3:]
    assert [*mine.queue] == jobs[1:3]
    late = job([9], client="")
    late.arrived_at = -1.0  # it took longer to render than those that wait, and does not take the place of one
    mine.add(late)
    assert mine.excess([late], 2) == [late]


@given(st.lists(st.sampled_from("aaaaabbc"), max_size=200), st.integers(1, 64), st.randoms())
def test_a_full_queue_has_a_place_for_another_client(arrivals: list[str], most: int, random_: random.Random) -> None:
    """Clients send as much as they like, and jobs start in between: nothing that was accepted is refused later."""
    mine = slots(1)
    mine.add(job([0]))
    (running,) = started(mine)
    for i, client in enumerate(arrivals):
        before, new = [*mine.queue], job([i], client=client)
        n_free, n_own = most - len(before), sum(each.client == client for each in before)
        mine.add(new)
        is_refused = mine.excess([new], most) == [new]
        assert is_refused == (n_own >= n_free)
        assert {*mine.queue} == {*before, *([] if is_refused else [new])}
        if random_.random() < 0.2:
            mine.finish(running.sequences[0], is_kept=False)
            (running,) = started(mine) or [running]
    clients = {each.client for each in mine.queue}
    if most >= 2 ** len(clients):  # each leaves at least half of the places that the others left
        newcomer = job([9], client="new")
        mine.add(newcomer)
        assert mine.excess([newcomer], most) == []


@given(st.lists(st.integers(0, 2), max_size=600), st.lists(st.integers(0, 2), max_size=600), st.integers(0, 600))
def test_the_common_prefix_is_the_longest(one: list[int], other: list[int], n: int) -> None:
    other = one[:n] + other
    length = common_prefix(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


@given(st.lists(st.integers(1, 3000), max_size=20), st.integers(0, 2048))
def test_prompts_divide_a_budget_without_loss(left: list[int], budget: int) -> None:
    taken = shares(left, budget)
    assert sum(taken) == min(budget, sum(left))
    assert all(0 <= n <= most for n, most in zip(taken, left, strict=True))
    if left and budget:
        assert taken[0] >= min(left[0], budget / 2)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    assert shares([8000, 3000, 20], 100) == [50, 30, 20]


@pytest.mark.parametrize(("token_s", "step_s"), [(0.001, 0.005), (0.02, 0.02), (1e-5, 0.001)])
def test_a_budget_converges_to_the_target_time(token_s: float, step_s: float) -> None:
    budget = Budget(0.1, 512)
    for _ in range(30):
        budget.learn(0, step_s)
        budget.learn(budget.n_tokens, step_s + token_s * budget.n_tokens)
    seconds = step_s + token_s * budget.n_tokens
    assert seconds <= 0.1 * 1.01 or budget.n_tokens == LEAST_CHUNK
    assert seconds > 0.08 or budget.n_tokens in (LEAST_CHUNK, 512)


def test_a_slow_model_spends_half_its_time_on_prompts() -> None:
    budget = Budget(0.1, 512)
    for _ in range(30):
        budget.learn(0, 1.0)
        budget.learn(budget.n_tokens, 1.0 + 0.01 * budget.n_tokens)
    assert 80 < budget.n_tokens <= 101


def test_a_retry_is_proposed_within_a_minute() -> None:
    assert retry_after_s(0, 4, 0.1) == 1
    assert retry_after_s(64, 4, 2.0) == 33
    assert retry_after_s(64, 1, 100.0) == 60
