"""The engine loop with tiny random models in the real engine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.channel.messages import Sampling, Stop, TokenLogprobs
from shared.synthetic.models import tiny_bert, tiny_gemma3, tiny_llama
from tests.support import architectures
from tests.support.child import in_child
from tests.support.generation import Answered, Trial, ids_of
from worker.engine import slots
from worker.engine.job import Done, Job, Waiting
from worker.engine.slots import Cut, Restore

NEAR = 0.05  # of log probabilities: batches of other sizes use other kernels


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama") / "models"
    tiny_llama(root / "p/m/m.gguf", tokenizer="bpe")
    return root


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gemma") / "models"
    tiny_gemma3(root / "p/m/m.gguf")
    return root


def prompt(n: int, start: int = 0) -> list[int]:
    """Return tokens that are the text of something."""
    return [40 + (start + i * i) % 180 for i in range(n)]


def top(answered: Answered) -> list[TokenLogprobs]:
    return answered.logprobs[0]


def is_near(one: Answered, other: Answered) -> bool:
    """Return whether the first tokens of two answers have the same log probabilities."""
    return is_close(top(one)[0], top(other)[0])


def is_close(one: TokenLogprobs, other: TokenLogprobs) -> bool:
    """Return whether two tokens have the same log probabilities."""
    mine = {each.token: each.logprob for each in one.top}
    theirs = {each.token: each.logprob for each in other.top}
    return len({*mine} & {*theirs}) >= 8 and all(abs(mine[t] - theirs[t]) < NEAR for t in {*mine} & {*theirs})


def batched(root: Path) -> None:
    trial = Trial(root)
    tokens = [prompt(n, n) for n in (30, 7, 300, 90)]
    alone = [
        trial.run(trial.job(t, sampling=trial.endless(temperature=0), max_tokens=5, logprobs=10, client=str(i)))[0]
        for i, t in enumerate(tokens)
    ]
    jobs = [
        trial.job(t, sampling=trial.endless(temperature=0), max_tokens=5, logprobs=10, client=f"again {i}")
        for i, t in enumerate(tokens)
    ]
    together = trial.run(*jobs)
    assert all(is_near(one, other) for one, other in zip(alone, together, strict=True))
    assert [answered.cached_tokens for answered in together] == [0] * 4
    assert all(answered.kinds == ["Waiting", "Begun", "Done"] for answered in together)
    assert all(answered.last.generated_tokens == answered.n_tokens == 5 for answered in together)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_batch_computes_what_lone_requests_compute(kind: str, request: pytest.FixtureRequest) -> None:
    in_child(batched, request.getfixturevalue(kind))


def reused(root: Path) -> None:
    trial = Trial(root)
    first = trial.run(trial.job(prompt(700), sampling=trial.endless(temperature=0), max_tokens=20, logprobs=10))[0]
    longer = [*prompt(700), *trial.loop._slots.sequences[0].tokens[700:], *prompt(30, 5)]
    for tokens, n_cached in [(longer, 719), ([*prompt(400), *prompt(50, 9)], 400), (prompt(700), 699)]:
        again, fresh = (
            trial.run(
                trial.job(tokens, sampling=trial.endless(temperature=0), max_tokens=2, logprobs=10, client=client)
            )[0]
            for client in ("a", f"fresh {n_cached}")
        )
        assert (again.cached_tokens, fresh.cached_tokens) == (n_cached, 0)
        assert is_near(again, fresh)
    assert first.last.cached_tokens == 0


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_reused_prefix_computes_what_a_fresh_one_computes(kind: str, request: pytest.FixtureRequest) -> None:
    """Of a sliding window 512 tokens wide too."""
    in_child(reused, request.getfixturevalue(kind))


def decoded_once(root: Path) -> None:
    trial = Trial(root, parallel=8, context_length=8192)
    tokens = prompt(1000)
    answers = trial.run(*[trial.job(tokens, max_tokens=4) for _ in range(8)])
    assert [answered.cached_tokens for answered in answers] == [0] + [999] * 7
    assert trial.loop.counters.prompt_tokens == 1000 + 7


def test_requests_with_one_prompt_decode_it_once(llama: Path) -> None:
    in_child(decoded_once, llama)


def several_choices(root: Path) -> None:
    trial = Trial(root)
    options: dict[str, Any] = {"max_tokens": 8, "logprobs": 1}
    (one,) = trial.run(trial.job(prompt(100), choices=3, sampling=trial.endless(seed=7), **options))
    assert trial.loop.counters.prompt_tokens == 100
    assert one.finishes == dict.fromkeys(range(3), "length")
    assert one.last.generated_tokens == one.n_tokens == 24
    assert len({*map(tuple, (ids_of(one, choice) for choice in range(3)))}) == 3
    for choice in range(3):
        sampling = trial.endless(seed=7 + choice)
        (alone,) = trial.run(trial.job(prompt(100), sampling=sampling, client=f"{choice}", **options))
        assert ids_of(alone)[0] == ids_of(one, choice)[0]


def test_several_answers_share_a_prompt_and_differ(llama: Path) -> None:
    in_child(several_choices, llama)


def seeds(root: Path) -> None:
    trial = Trial(root)

    def drawn(client: str, **sampling: Any) -> list[bytes]:
        (answered,) = trial.run(
            trial.job(prompt(50), client=client, sampling=trial.endless(**sampling), max_tokens=12, logprobs=1)
        )
        return ids_of(answered)

    assert drawn("a", seed=5) == drawn("b", seed=5)
    assert drawn("c", seed=5) != drawn("d", seed=6)
    assert drawn("e", seed=0xFFFFFFFF) == drawn("f", seed=0xFFFFFFFF)
    assert drawn("g") != drawn("h")
    assert drawn("i", top_k=1) == drawn("j", temperature=0)
    wide = drawn("k", seed=1, top_k=0, top_p=1.0, min_p=0.0, temperature=5.0)
    assert wide != drawn("l", seed=1, top_k=2, top_p=1.0, min_p=0.0, temperature=5.0)


def test_a_seed_repeats_the_draws(llama: Path) -> None:
    in_child(seeds, llama)


def threaded(root: Path) -> None:
    trial = Trial(root)

    def drawn() -> list[list[bytes]]:
        jobs = [
            trial.job(prompt(30, i), client=f"{i}", sampling=trial.endless(seed=i), max_tokens=20, logprobs=1)
            for i in range(4)
        ]
        answers = [ids_of(answered) for answered in trial.run(*jobs)]
        while (dropped := trial.loop._slots.drop_idle()) is not None:
            trial.engine.apply(dropped)
        return answers

    alone = drawn()
    trial.loop._draws._tokens_of_a_thread = 1
    trial.loop._draws._n_threads = 4
    assert drawn() == alone
    assert trial.loop._draws._threads is not None


def test_several_threads_draw_what_one_draws(llama: Path) -> None:
    in_child(threaded, llama)


def unable_to_rewind(root: Path) -> None:
    trial = Trial(root, parallel=1)
    del trial.loop._slots.sequences[1:]
    apply = trial.engine.apply
    trial.engine.apply = lambda change: not isinstance(change, Cut) and apply(change)  # type: ignore[method-assign]
    options: dict[str, Any] = {"sampling": trial.endless(temperature=0), "max_tokens": 2, "logprobs": 10}
    answers = [trial.run(trial.job(prompt(60), **options))[0] for _ in range(3)]
    assert [answered.cached_tokens for answered in answers] == [0, 0, 0]
    assert all(is_near(answers[0], other) for other in answers)
    assert trial.loop.counters.cells == 0


def test_a_sequence_that_cannot_rewind_starts_anew(llama: Path) -> None:
    """The engine says so only when it is asked."""
    in_child(unable_to_rewind, llama)


def biased(root: Path) -> None:
    trial = Trial(root)
    (forced,) = trial.run(
        trial.job(prompt(9), max_tokens=6, logprobs=2, sampling=trial.endless(logit_bias={230: 100.0}, top_k=1))
    )
    piece = trial.engine.vocabulary.piece(230, is_shown=True)
    assert ids_of(forced) == [piece] * 6
    assert top(forced)[0].logprob < top(forced)[0].top[0].logprob, "log probabilities are those of the model"
    (penalised,) = trial.run(
        trial.job(
            prompt(9),
            max_tokens=6,
            logprobs=0,
            sampling=trial.endless(logit_bias={230: 100.0}, temperature=0, presence_penalty=200.0),
        )
    )
    assert ids_of(penalised).count(piece) == 1
    for sampling in (Sampling(logit_bias={10**6: 1.0}), Sampling(repeat_penalty=0), Sampling(temperature=float("nan"))):
        (rejected,) = trial.run(trial.job(prompt(9), sampling=sampling))
        assert (rejected.kinds, rejected.code) == (["Rejected"], "invalid_request")


def test_biases_and_penalties_change_the_choice(llama: Path) -> None:
    in_child(biased, llama)


def likely(root: Path) -> None:
    trial = Trial(root)
    (answered,) = trial.run(trial.job(prompt(9), max_tokens=3, logprobs=10_000, sampling=trial.endless(temperature=0)))
    for each in top(answered):
        probabilities = np.exp([other.logprob for other in each.top])
        assert abs(probabilities.sum() - 1) < 1e-4
        assert each.token == each.top[0].token
        assert each.logprob == each.top[0].logprob == max(other.logprob for other in each.top)


def test_log_probabilities_are_of_the_whole_vocabulary(llama: Path) -> None:
    in_child(likely, llama)


def ended(root: Path) -> None:
    trial = Trial(root, context_length=256)
    (whole,) = trial.run(trial.job(prompt(9), max_tokens=40, sampling=trial.endless(temperature=0)))
    assert (whole.finishes, whole.stops) == ({0: "length"}, {0: Stop("max_tokens")})
    text = whole.texts[0]
    stop = text[10:13]
    (stopped,) = trial.run(
        trial.job(prompt(9), max_tokens=40, sampling=trial.endless(temperature=0), stop=["never", stop])
    )
    assert (stopped.finishes, stopped.stops) == ({0: "stop"}, {0: Stop("string", stop)})
    assert stopped.texts[0] == text[: text.index(stop)]
    (by_template,) = trial.run(
        trial.job(prompt(9), max_tokens=40, sampling=trial.endless(temperature=0), ends=["never", stop])
    )
    assert (by_template.texts, by_template.stops) == (stopped.texts, {0: Stop("eos")})
    (full,) = trial.run(trial.job(prompt(200), sampling=trial.endless(temperature=0)))
    assert (full.finishes, full.stops) == ({0: "length"}, {0: Stop("context")})
    assert 200 + full.n_tokens == 256
    end = next(token for token in range(trial.engine.vocabulary.n_tokens) if trial.engine.vocabulary.is_end(token))
    (over,) = trial.run(trial.job(prompt(9), sampling=trial.endless(logit_bias={end: 100.0})))
    assert (over.texts, over.finishes, over.stops) == ({0: ""}, {0: "stop"}, {0: Stop("eos")})
    (long,) = trial.run(trial.job(prompt(256)))
    assert long.code == "invalid_request"


def test_an_answer_ends_at_a_stop_a_limit_or_the_context(llama: Path) -> None:
    in_child(ended, llama)


def certain(trial: Trial, **options: Any) -> dict[str, Any]:
    """Return options of answers in which batches of another size choose the same tokens: random ones with a
    penalty for each repetition, of probabilities that the model hardly changes."""
    ids = [trial.loop.tokenize(f"{letter}", True)[-1] for letter in "abcdefgh"]
    bias = {token: 1000.0 - 10 * n for n, token in enumerate(ids)}
    sampling = trial.endless(logit_bias=bias, temperature=100.0, top_k=8, frequency_penalty=7.0, seed=5)
    return {"sampling": sampling, "logprobs": 10, "stop": ["abababab"], **options}


def preempted(root: Path) -> None:
    slots.RESERVED = 64
    trial = Trial(root, context_length=512)
    several = {"choices": 2, "max_tokens": 160}
    described: list[tuple[int, dict[str, Any]]] = [(20, {}), (30, {}), (40, several)]
    alone = [trial.run(trial.job(prompt(n, n), **certain(trial, **options)))[0] for n, options in described]
    assert trial.loop.counters.preemptions == 0
    jobs = [trial.job(prompt(n, n), **certain(trial, **options), client="b") for n, options in described]
    answers = trial.run(*jobs)
    assert trial.loop.counters.preemptions > 1
    for one, other in zip(answers, alone, strict=True):
        assert one.kinds == ["Waiting", "Begun", "Done"]
        assert one.finishes == other.finishes
        assert one.texts == other.texts
        assert one.last.generated_tokens == one.n_tokens == other.n_tokens
        assert one.last.cached_tokens == one.cached_tokens == 0
        for choice, reported in one.logprobs.items():
            expected = other.logprobs[choice]
            assert all(is_close(mine, theirs) for mine, theirs in zip(reported, expected, strict=True))
    assert [answered.n_tokens for answered in answers] == [492, 482, 320]


def test_without_cells_the_youngest_request_goes_on_later(llama: Path) -> None:
    """With its random numbers, its penalties and its text as they were."""
    in_child(preempted, llama)


def full_context(root: Path) -> None:
    trial = Trial(root, context_length=512)
    (lone,) = trial.run(trial.job(prompt(200), choices=4, sampling=trial.endless(temperature=0)))
    assert lone.kinds == ["Waiting", "Begun", "Done"]
    assert set(lone.finishes.values()) == {"length"}
    assert lone.n_tokens < 4 * 312
    assert trial.loop.counters.preemptions == 0


def test_a_lone_request_without_cells_ends(llama: Path) -> None:
    in_child(full_context, llama)


def ended_while_preempted(root: Path) -> None:
    slots.RESERVED = 64
    trial = Trial(root, context_length=512, most_wait_s=30.0, most_waiting=1)
    loop = trial.loop
    options: dict[str, Any] = {"sampling": trial.endless(temperature=0, presence_penalty=0.5)}
    for end in ("cancel", "deadline", "wait"):
        old, young = (trial.job(prompt(n, n), client=end, **options) for n in (150, 50))
        n = loop.counters.preemptions
        for job in (old, young):
            loop.submit(job)
        loop.step()
        while loop.counters.running == 2:
            loop.step()
        assert loop.counters.preemptions == n + 1
        assert (loop.counters.running, loop.counters.waiting) == (1, 1)
        n_tokens = trial.answered(young).n_tokens
        match end:
            case "cancel":
                loop.cancel(young)
            case "deadline":
                young.deadline = time.monotonic()
            case "wait":
                young.arrived_at -= 31
                late = [trial.job(prompt(9), client=end, max_tokens=1) for _ in range(2)]
                for job in late:
                    loop.submit(job)
        loop.step()
        trial.finish()
        answered = trial.answered(young)
        assert trial.answered(old).kinds == ["Waiting", "Begun", "Done"]
        if end == "wait":
            assert answered.kinds == ["Waiting", "Begun", "Done"]
            assert [trial.answered(job).kinds[-1] for job in late] == ["Done", "Rejected"]
        else:
            assert answered.n_tokens == n_tokens
            assert answered.kinds == ["Waiting", "Begun"] + ["Broken"] * (end == "deadline")
        assert loop._preempted == {}


def test_a_preempted_request_ends_by_its_client_and_its_deadline(llama: Path) -> None:
    """The limits of the queue do not hold for it: it was begun."""
    in_child(ended_while_preempted, llama)


def cancelled(root: Path) -> None:
    trial = Trial(root, parallel=2, context_length=4096)
    other = trial.job(prompt(20), client="b", max_tokens=30, sampling=trial.endless(temperature=0))
    in_answer, in_prompt, in_queue = (trial.job(prompt(n, n)) for n in (10, 2000, 50))
    loop = trial.loop
    loop.submit(other)
    loop.submit(in_answer)
    loop.step()
    loop.submit(in_queue)
    loop.step()
    assert trial.answered(in_answer).n_tokens > 0
    loop.cancel(in_queue)
    loop.cancel(in_answer)
    loop.submit(in_prompt)
    loop.step()
    n_tokens = trial.answered(in_answer).n_tokens
    assert (loop.counters.running, loop.counters.waiting) == (2, 0)
    loop.cancel(in_prompt)
    loop.step()
    assert loop.counters.running == 1
    assert loop.counters.prompt_tokens < 2000
    trial.finish()
    loop.cancel(in_prompt)
    loop.submit(trial.job(prompt(5), max_tokens=1))
    trial.loop.step()
    trial.finish()
    assert trial.answered(in_answer).n_tokens == n_tokens
    assert trial.answered(in_queue).kinds == ["Waiting"]
    assert trial.answered(in_prompt).kinds == ["Waiting", "Begun"]
    assert trial.answered(other).kinds == ["Waiting", "Begun", "Done"]


def test_a_cancelled_request_ends_at_any_stage(llama: Path) -> None:
    in_child(cancelled, llama)


def aborted(root: Path) -> None:
    trial = Trial(root)
    jobs = [
        trial.job(prompt(n, n), sampling=trial.endless(temperature=0), max_tokens=6, logprobs=10, client=f"{n}")
        for n in (20, 900)
    ]
    plain = trial.run(*jobs)
    again = [
        trial.job(
            job.tokens, sampling=trial.endless(temperature=0), max_tokens=6, logprobs=10, client=f"x {job.client}"
        )
        for job in jobs
    ]
    resume, decode = trial.engine.resume, trial.engine.decode
    statuses: list[int] = []

    def interrupt() -> None:
        resume()
        if len(statuses) % 2 == 0:
            trial.engine.abort()

    def counted() -> int:
        statuses.append(decode())
        return statuses[-1]

    trial.engine.resume, trial.engine.decode = interrupt, counted  # type: ignore[method-assign]
    answers = trial.run(*again)
    assert statuses.count(2) == statuses.count(0) > 3
    assert all(is_near(one, other) for one, other in zip(plain, answers, strict=True))
    assert [answered.n_tokens for answered in answers] == [6, 6]


def test_an_aborted_batch_is_decoded_again(llama: Path) -> None:
    in_child(aborted, llama)


def limited(root: Path) -> None:
    trial = Trial(root, parallel=1, most_waiting=2, most_wait_s=30.0)
    jobs = [trial.job(prompt(10, i), max_tokens=2, client="") for i in range(5)]
    answers = trial.run(*jobs)
    assert [answered.kinds[-1] for answered in answers] == ["Done"] * 3 + ["Rejected"] * 2
    assert answers[3].code == "queue_full"
    assert answers[3].last.retry_after_s >= 1
    ahead = [outcome.ahead for outcome in trial.outcomes if isinstance(outcome, Waiting)]
    assert ahead == [0, 0, 1]
    running, late = trial.job(prompt(10)), trial.job(prompt(10), arrived_at=time.monotonic() - 31)
    accepted = trial.job(prompt(10), arrived_at=late.arrived_at, is_accepted=True, max_tokens=1)
    trial.loop.submit(running)
    trial.loop.step()
    trial.loop.submit(late)
    trial.loop.submit(accepted)
    trial.loop.step()
    trial.loop.step()
    assert trial.answered(late).code == "queue_timeout"
    running.deadline = time.monotonic()
    trial.loop.step()
    assert trial.answered(running).code == "deadline"
    trial.finish()
    assert trial.answered(accepted).kinds[-1] == "Done"
    assert (trial.loop.counters.running, trial.loop.counters.waiting) == (0, 0)


def crowded(root: Path) -> None:
    trial = Trial(root, parallel=1, most_waiting=64)
    greedy = [trial.job(prompt(10, i), client="greedy", max_tokens=2) for i in range(60)]
    for job in greedy:
        trial.loop.submit(job)
    trial.loop.step()
    other = trial.job(prompt(10, 99), client="other", max_tokens=2)
    trial.loop.submit(other)
    trial.loop.step()
    trial.finish()
    done = [outcome.job for outcome in trial.outcomes if isinstance(outcome, Done)]
    assert done.index(other) <= 2, "after the one that ran, and at most one turn of the other client"
    refused = [job for job in greedy if trial.answered(job).kinds == ["Rejected"]]
    assert refused == greedy[1 + 32 :]
    assert {trial.answered(job).code for job in refused} == {"queue_full"}


def test_a_client_that_sends_much_does_not_delay_another(llama: Path) -> None:
    in_child(crowded, llama)


def test_a_request_ends_when_its_time_is_up(llama: Path) -> None:
    in_child(limited, llama)


def failing(root: Path) -> None:
    trial = Trial(root)
    from worker.engine.decode import EngineError

    (before,) = trial.run(trial.job(prompt(300), sampling=trial.endless(temperature=0), max_tokens=3, logprobs=10))
    decode, logits = trial.engine.decode, trial.engine.logits

    def fail() -> int:
        decode()  # and leaves its tokens behind
        trial.engine.decode = decode  # type: ignore[method-assign]
        raise EngineError("no reason")

    def broken() -> Any:
        rows = logits()
        rows[:] = np.nan
        return rows

    trial.engine.decode = fail  # type: ignore[method-assign]
    (answered,) = trial.run(trial.job(prompt(300), client="b"))
    assert (answered.kinds, answered.code) == (["Waiting", "Begun", "Broken"], "engine_failed")
    trial.engine.logits = broken  # type: ignore[method-assign]
    for sampling in (trial.endless(temperature=0), trial.endless()):
        (answered,) = trial.run(trial.job(prompt(300), sampling=sampling, client="b"))
        assert answered.code == "engine_failed"
    calls = iter(range(100))
    trial.engine.logits = lambda: broken() if next(calls) else logits()  # type: ignore[method-assign]
    (answered,) = trial.run(trial.job(prompt(300), choices=2, sampling=trial.endless(), client="b"))
    assert (answered.kinds.count("Broken"), answered.code) == (1, "engine_failed")
    trial.engine.logits = logits  # type: ignore[method-assign]
    (after,) = trial.run(
        trial.job(prompt(300), sampling=trial.endless(temperature=0), max_tokens=3, logprobs=10, client="c")
    )
    assert is_near(before, after)
    (rejected,) = trial.run(trial.job([10**6]))
    assert rejected.code == "invalid_request"


def test_an_error_of_the_engine_ends_its_requests_only(llama: Path) -> None:
    in_child(failing, llama)


def failing_on_a_gpu(root: Path) -> None:
    from tests.support.fakegpu import ALLOC_FAILED, FAILED, SUCCESS

    trial = Trial(root, parallel=2, n_on_gpu=5)

    def job(n: int, client: str) -> Job:
        sampling = trial.endless(temperature=0)
        return trial.job(prompt(n, n), sampling=sampling, max_tokens=3, logprobs=10, client=client)

    (before,) = trial.run(job(900, "a"))
    for statuses in ([FAILED], [SUCCESS, ALLOC_FAILED], [SUCCESS, SUCCESS, FAILED]):  # a prompt's parts, then a token
        client = f"b{len(statuses)}"
        trial.gpu.statuses = [*statuses]
        (broken,) = trial.run(job(900, client))
        assert (broken.kinds, broken.code) == (["Waiting", "Begun", "Broken"], "engine_failed")
        assert broken.last.message.endswith(f"failed with error {statuses[-1]}")
        assert not trial.gpu.statuses
        (after,) = trial.run(job(900, client))
        assert after.cached_tokens == 0, "the failed batch leaves nothing behind"
        assert is_near(before, after)
    trial.gpu.statuses = [FAILED]
    *both, third, fourth = trial.run(job(30, "c"), job(40, "d"), job(30, "e"), job(900, "f"))
    assert [each.code for each in both] == ["engine_failed"] * 2
    assert [each.n_tokens for each in (third, fourth)] == [3, 3], "they waited, and were not in the batch"
    assert is_near(before, fourth)


def test_a_gpu_that_fails_ends_the_requests_of_its_batch(llama: Path) -> None:
    in_child(failing_on_a_gpu, llama)


def restored(root: Path) -> None:
    trial = Trial(root, parallel=8)
    first = trial.job(prompt(300), max_tokens=8)
    trial.run(first)
    answer = next(sequence.tokens[300:] for sequence in trial.loop._slots.sequences if sequence.tokens)
    cases = [
        ("the whole sequence", [*first.tokens, *answer, *prompt(40, 5)], 307),
        ("the same prompt", first.tokens, 300 - slots.LAST),
        ("the next turn", [*first.tokens, *prompt(60, 7)], 300 - slots.LAST),
        ("half of the prompt", [*prompt(150), *prompt(70, 9)], 0),
        ("the same half", [*prompt(150), *prompt(70, 11)], 150),
    ]
    for name, tokens, n_cached in cases:
        before = trial.loop.counters.prompt_tokens
        again, fresh = (
            trial.run(
                trial.job(tokens, sampling=trial.endless(temperature=0), max_tokens=2, logprobs=10, client=client)
            )[0]
            for client in ("a", name)
        )
        assert (again.cached_tokens, fresh.cached_tokens) == (n_cached, 0), name
        assert trial.loop.counters.prompt_tokens == before + 2 * len(tokens) - n_cached
        assert is_near(again, fresh), name
        for sequence in trial.loop._slots.sequences:  # of the client that shares nothing: room for the next case
            if sequence.client == name:
                trial.engine.apply(trial.loop._slots._drop(sequence))
    sizes = {each.state.nbytes for sequence in trial.loop._slots.sequences for each in sequence.checkpoints}
    assert all(abs(size / trial.loaded.state_bytes - 1) < 0.03 for size in sizes)


@pytest.mark.parametrize("architecture", ["mamba", "jamba", "granitehybrid"])
def test_a_recurrent_model_goes_on_from_a_checkpoint(architecture: str, tmp_path: Path) -> None:
    """It computes what a fresh sequence computes."""
    architectures.write_random(tmp_path / "models/p/m/m.gguf", architecture)
    in_child(restored, tmp_path / "models")


def not_restored(root: Path) -> None:
    trial = Trial(root)
    first = prompt(60)
    options: dict[str, Any] = {"sampling": trial.endless(temperature=0), "max_tokens": 2, "logprobs": 10}
    (one,) = trial.run(trial.job(first, **options))
    apply = trial.engine.apply
    trial.engine.apply = lambda change: not isinstance(change, Restore) and apply(change)  # type: ignore[method-assign]
    others = [trial.run(trial.job(first, **options))[0] for _ in range(2)]
    assert [other.cached_tokens for other in others] == [0, 0]
    assert all(is_near(one, other) for other in others)


def without_rewind(root: Path) -> None:
    trial = Trial(root)
    tokens = prompt(40)
    first = trial.run(trial.job(tokens, choices=2, max_tokens=4), trial.job(tokens, max_tokens=4))
    second = trial.run(trial.job(tokens, choices=3, max_tokens=4))
    assert [answered.cached_tokens for answered in (*first, *second)] == [0, 0, 40 - slots.LAST]
    assert [answered.n_tokens for answered in (*first, *second)] == [8, 4, 12]
    not_restored(root)


@pytest.mark.parametrize("architecture", ["qwen3next", "lfm2"])
def test_a_hybrid_model_gives_several_answers(architecture: str, tmp_path: Path) -> None:
    """And starts anew if the engine cannot restore a checkpoint."""
    architectures.write_random(tmp_path / "models/p/m/m.gguf", architecture)
    in_child(without_rewind, tmp_path / "models")


def idle(root: Path) -> None:
    trial = Trial(root)
    done = threading.Event()
    hand_out = trial.loop._hand_out

    def handed_out(outcomes: list[Any]) -> None:
        hand_out(outcomes)
        if any(type(outcome).__name__ == "Done" for outcome in outcomes):
            done.set()

    trial.loop._hand_out = handed_out
    threading.Thread(target=trial.loop.run, daemon=True).start()
    for _ in range(2):
        job = trial.job(prompt(20), max_tokens=5)
        trial.loop.submit(job)
        assert done.wait(30)
        done.clear()
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05


def test_an_idle_loop_uses_no_processor_and_wakes_up(llama: Path) -> None:
    in_child(idle, llama)


def no_text(root: Path) -> None:
    from worker.engine import llama as engine

    assert engine.lib
    trial = Trial(root, parallel=1, context_length=256)
    (rejected,) = trial.run(trial.job([5, 6]))
    assert rejected.code == "invalid_request"


def test_a_model_that_generates_no_text_refuses_requests(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "models/p/m/m.gguf")
    in_child(no_text, tmp_path / "models")


def test_threads_of_the_engine_do_not_spin() -> None:
    """A spinning thread takes the core of the one that it waits for."""
    done = subprocess.run(
        [sys.executable, "-c", "import worker.engine.llama"],
        env={**os.environ, "OMP_DISPLAY_ENV": "verbose"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GOMP_SPINCOUNT = '0'" in done.stderr
