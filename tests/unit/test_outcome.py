"""What the log says of a request, where several parts know something of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message

from api import outcome
from api.channel.answer import Answer
from api.outcome import Logged, Outcome, current
from shared import paths
from shared.channel.messages import Ended, Failed, Queued, Refused, Started, Usage
from shared.errors import QueueTimeout, RequestFailed, RunnerLost
from shared.instance import Instance
from shared.schema.http import LoadRequest

INSTANCE = Instance(
    id="load_1", instance_id="p/m", model="p/m", key="p/m", type="llm", worker="w", request=LoadRequest(model="p/m")
)
USAGE = Usage(
    prompt_tokens=10,
    cached_tokens=4,
    generated_tokens=3,
    reasoning_tokens=0,
    wait_s=0.5,
    prompt_s=1.0,
    generation_s=2.0,
)


def answer(*messages: Refused | Queued | Started | Ended | Failed) -> Answer:
    made = Answer()
    for message in messages:
        made.put(message)
    return made


def test_several_answers_add_up() -> None:
    noted = Outcome()
    for _ in range(2):
        noted.answered(INSTANCE, answer(Ended(id=1, usage=USAGE)))
    assert noted.tokens == {"prompt_tokens": 20, "cached_tokens": 8, "generated_tokens": 6}
    assert noted.seconds == {"wait_s": 1.0, "prompt_s": 2.0, "generation_s": 4.0}
    assert noted.name == "completed"


def test_an_unfinished_answer_has_the_tokens_of_its_prompt() -> None:
    noted = Outcome()
    noted.answered(INSTANCE, answer(Queued(id=1, prompt_tokens=10, ahead=0), Started(id=1, cached_tokens=4)))
    assert (noted.name, noted.tokens) == ("cancelled", {"prompt_tokens": 10, "cached_tokens": 4})


def test_the_more_precise_of_reply_and_answer_is_logged() -> None:
    noted = Outcome()
    noted.answered(INSTANCE, answer(Failed(id=1, code="deadline", message="")))
    noted.refused(RequestFailed("").body())
    assert noted.name == "deadline"
    lost = Answer()
    lost.fail(RunnerLost(""))
    noted.answered(INSTANCE, lost)
    noted.refused(QueueTimeout("").body())  # of the load for the second attempt
    assert noted.name == "queue_timeout"


def test_outside_of_a_request_nothing_is_kept() -> None:
    current().name = "completed"
    assert current().name == ""


def test_an_unexpected_exception_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []

    class Log:
        def info(self, _event: str, **fields: Any) -> None:
            lines.append(fields)

    async def broken(*_: Any) -> None:
        current().answered(INSTANCE, answer(Queued(id=1, prompt_tokens=10, ahead=0)))
        raise KeyError

    async def receive() -> Message:
        raise AssertionError

    async def send(_: Message) -> None:
        raise AssertionError

    monkeypatch.setattr(outcome, "_log", Log())
    scope = {"type": "http", "method": "POST", "path": paths.CHAT_COMPLETIONS, "state": {"caller": "c"}}
    with pytest.raises(KeyError):
        asyncio.run(Logged(broken, {"c": "alice"})(scope, receive, send))
    (line,) = lines
    assert (line["outcome"], line["status"], line["token"]) == ("internal_error", 500, "alice")
    assert (line["model"], line["instance"], line["worker"]) == ("p/m", "p/m", "w")
