"""A strict reader of the events of LM Studio's chat, and requests for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from shared import paths
from tests.support.responses import responding
from tests.support.service import Client, Reply

ORDER = ("chat.start", "model_load", "prompt_processing", "reasoning", "message", "chat.end")
FIELDS = {
    "chat.start": {"model_instance_id"},
    "model_load.start": {"model_instance_id"},
    "model_load.progress": {"model_instance_id", "progress"},
    "model_load.end": {"model_instance_id", "load_time_seconds"},
    "prompt_processing.progress": {"progress"},
    "reasoning.delta": {"content"},
    "message.delta": {"content"},
    "error": {"error"},
    "chat.end": {"result"},
}
PLAIN = {f"{phase}.{edge}" for phase in ORDER[2:5] for edge in ("start", "end")}  # events without fields


def say(client: Client, **fields: Any) -> Reply:
    return client.post(paths.NATIVE_CHAT, {"input": "Hello", "temperature": 0, **fields})


def said(client: Client, **fields: Any) -> Any:
    """Return an answer that must succeed."""
    reply = say(client, **fields)
    assert reply.status == 200, reply.text
    return reply.json()


def saying(client: Client, **fields: Any) -> AbstractContextManager[Iterator[dict[str, Any]]]:
    """Send a streamed request; yield its events.  Leaving the block disconnects."""
    return responding(client, path=paths.NATIVE_CHAT, **fields)


def read(received: Iterator[dict[str, Any]], *, loads: bool = False) -> Any:
    """Read all events, which must be as LM Studio has them; return the result at the end."""
    reader = Reader()
    for event in received:
        reader.take(event)
    assert reader.result is not None, "a stream ends with its result"
    assert ("model_load" in reader.phases) == loads
    return reader.result


class Reader:
    """Takes the events of one answer in order, and fails at the first one that is not as it must be.

    Each phase comes at most once, in the order of ORDER, from its start to its end.
    """

    def __init__(self) -> None:
        self.result: Any = None
        self.error: Any = None
        self.phases: list[str] = []
        self._open = ""
        self._progress = 0.0
        self._instance_id = ""
        self._texts: dict[str, str] = {}

    def take(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        assert kind in FIELDS or kind in PLAIN, kind
        assert event.keys() - {"type"} == FIELDS.get(kind, set())
        assert self.result is None, "nothing follows the end"
        assert self.error is None or kind == "chat.end", "only the end follows an error"
        phase, _, edge = kind.partition(".")
        if kind == "error":
            assert self.phases, "there is a start"
            self.error = event["error"]
            assert {"type", "message"} <= self.error.keys()
        elif kind in ("chat.start", "chat.end"):
            assert not self._open or self.error is not None, "each phase ends"
            self._enter(kind)
            if kind == "chat.start":
                self._instance_id = event["model_instance_id"]
            else:
                self._end(event["result"])
        elif edge == "start":
            assert not self._open, "one phase at a time"
            self._enter(phase)
            self._open, self._progress = phase, 0.0
        else:
            assert self._open == phase
            self._more(phase, edge, event)
        assert event.get("model_instance_id", self._instance_id) == self._instance_id

    def _enter(self, phase: str) -> None:
        assert not self.phases or ORDER.index(phase) > ORDER.index(self.phases[-1])
        assert bool(self.phases) == (phase != "chat.start"), "the start is first"
        self.phases.append(phase)

    def _more(self, phase: str, edge: str, event: dict[str, Any]) -> None:
        if edge == "end":
            self._open = ""
        elif edge == "progress":
            assert self._progress <= event["progress"] <= 1
            self._progress = event["progress"]
        else:
            assert event["content"]
            self._texts[phase] = self._texts.get(phase, "") + event["content"]

    def _end(self, result: Any) -> None:
        assert result.keys() - {"response_id"} == {"model_instance_id", "output", "stats"}
        assert result["model_instance_id"] == self._instance_id
        texts = {item["type"]: item["content"] for item in result["output"]}
        assert len(texts) == len(result["output"])
        assert [*texts] == [phase for phase in ("reasoning", "message") if phase in texts]
        assert {kind: text for kind, text in texts.items() if text} == self._texts
        assert ("response_id" in result) <= (self.error is None), "a failed answer cannot be continued"
        assert re.fullmatch("resp_[0-9a-f]{48}", result.get("response_id", "resp_" + "0" * 48))
        if self.error is None:
            assert {"prompt_processing", *texts} <= {*self.phases}
            assert ("model_load" in self.phases) == ("model_load_time_seconds" in result["stats"])
        assert (result["stats"]["stop_reason"] == "failed") == (self.error is not None)
        self.result = result
