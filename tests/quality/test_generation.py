"""The engine loop with SmolLM2."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from shared.channel.messages import Sampling
from tests.support.child import in_child
from tests.support.generation import Answered, Trial

PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CAPITAL = PROMPT.format("What is the capital of France?")
GREEDY = Sampling(temperature=0)
NEAR = 0.3  # of the probable tokens' log probabilities: the weights have four bits


@pytest.fixture(scope="module")
def root(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with SmolLM2 only."""
    path = tmp_path_factory.mktemp("smollm2") / "models/p/m/m.gguf"
    path.parent.mkdir(parents=True)
    path.symlink_to(smollm2)
    return path.parents[2]


def is_near(one: Answered, other: Answered) -> bool:
    first, second = one.logprobs[0][0], other.logprobs[0][0]
    mine = {each.token: each.logprob for each in first.top[:5]}
    theirs = {each.token: each.logprob for each in second.top}
    return first.token == second.token and all(abs(mine[token] - theirs[token]) < NEAR for token in mine)


def answers(root: Path) -> None:
    trial = Trial(root)
    capital, story, counted = trial.run(
        trial.job(CAPITAL, sampling=GREEDY, max_tokens=20, logprobs=20),
        trial.job(PROMPT.format("Tell me a story."), sampling=Sampling(seed=3), max_tokens=20),
        trial.job(PROMPT.format("Count from one to ten."), sampling=GREEDY, max_tokens=30, stop=["five", "5"]),
    )
    assert capital.texts == {0: "The capital of France is Paris."}
    assert (capital.finishes, story.finishes) == ({0: "stop"}, {0: "length"})
    assert story.n_tokens == 20
    assert not {"five", "5"} & {*counted.texts[0].split()}
    (alone,) = trial.run(trial.job(CAPITAL, sampling=GREEDY, max_tokens=20, logprobs=20, client="b"))
    assert alone.cached_tokens == 0
    assert is_near(capital, alone)
    turn = CAPITAL + capital.texts[0] + "<|im_end|>\n" + PROMPT.format("And of Germany?")
    again, fresh = (
        trial.run(trial.job(turn, sampling=GREEDY, max_tokens=20, logprobs=20, client=client))[0] for client in "bc"
    )
    assert again.cached_tokens is not None
    assert again.cached_tokens > len(trial.loop.tokenize(CAPITAL, True))
    assert fresh.cached_tokens == 0
    assert is_near(again, fresh)
    assert "Berlin" in fresh.texts[0]


def test_smollm2_answers_alone_in_a_batch_and_in_a_conversation(root: Path) -> None:
    in_child(answers, root)


def vanished(root: Path) -> None:
    trial = Trial(root)
    long = trial.job("word " * 480, max_tokens=1)
    threading.Thread(target=trial.loop.run, daemon=True).start()
    trial.loop.submit(long)
    while long not in trial.loop._in_batch:
        time.sleep(0.001)
    trial.loop.cancel(long)
    while trial.loop.counters.running or trial.loop._in_batch:
        time.sleep(0.001)
    assert trial.loop.counters.prompt_tokens == 0


def test_a_cancelled_prompt_ends_in_the_middle_of_a_batch(root: Path) -> None:
    in_child(vanished, root)
