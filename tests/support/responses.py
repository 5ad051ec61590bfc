"""A strict reader of streamed responses, and requests for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from shared import paths
from tests.support.service import PATIENCE_S, Client, Reply

LAST = {"response.completed": "completed", "response.incomplete": "incomplete", "response.failed": "failed"}
TEXTS = {"reasoning": ("reasoning_text", "reasoning_text"), "message": ("output_text", "output_text")}


def respond(client: Client, **fields: Any) -> Reply:
    return client.post(paths.RESPONSES, {"input": "Hello", "temperature": 0, **fields})


def responded(client: Client, **fields: Any) -> Any:
    """Return a response that must succeed."""
    reply = respond(client, **fields)
    assert reply.status == 200, reply.text
    return reply.json()


@contextmanager
def responding(client: Client, *, path: str = paths.RESPONSES, **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """Send a streamed request; yield its events.  Leaving the block disconnects."""
    headers = {"Authorization": f"Bearer {client.token}"} if client.token else {}
    body = {"input": "Hello", "temperature": 0, "stream": True, **fields}
    with (
        httpx.Client(base_url=client.url, timeout=PATIENCE_S, trust_env=False, headers=headers) as http,
        http.stream("POST", path, json=body) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        received = events(reply.iter_lines())
        yield received


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the data of events, each of which must have its name."""
    for line in lines:
        if line in ("", ":"):
            continue
        assert line.startswith("event: "), line
        data = next(lines)
        assert data.startswith("data: "), data
        event: dict[str, Any] = json.loads(data.removeprefix("data: "))
        assert event["type"] == line.removeprefix("event: ")
        yield event


def read(received: Iterator[dict[str, Any]]) -> Any:
    """Read all events, which must be as the API has them; return the response at the end."""
    reader = Reader()
    for event in received:
        reader.take(event)
    assert reader.response is not None, "a stream ends with its response"
    return reader.response


class Reader:
    """Takes the events of one response in order, and fails at the first one that is not as it must be."""

    def __init__(self) -> None:
        self.response: Any = None
        self._began: Any = None
        self._n_events = 0
        self._items: list[Any] = []
        self._item: Any = None
        self._text: str | None = None  # of the open part, or of the arguments
        self._logprobs: list[Any] = []
        self._has_part = False
        self._is_done = False

    def take(self, event: dict[str, Any]) -> None:
        assert self.response is None, "nothing follows the last event"
        assert event["sequence_number"] == self._n_events
        self._n_events += 1
        kind = event["type"]
        if self._n_events <= 2:
            assert kind == ("response.created", "response.in_progress")[self._n_events - 1]
            self._begin(event["response"])
        elif kind in LAST:
            self._end(kind, event["response"])
        else:
            assert event["output_index"] == len(self._items)
            self._take_of_item(kind, event)

    def _begin(self, response: Any) -> None:
        assert self._began in (None, response)
        self._began = response
        assert (response["status"], response["output"], response["usage"]) == ("in_progress", [], None)

    def _end(self, kind: str, response: Any) -> None:
        assert response["status"] == LAST[kind]
        assert response["output"] == self._items
        same = response.keys() - {
            *("status", "output", "usage", "completed_at", "incomplete_details", "error", "store")
        }
        assert {name: response[name] for name in same} == {name: self._began[name] for name in same}
        assert (response["error"] is not None) == (kind == "response.failed")
        assert (response["incomplete_details"] is not None) == (kind == "response.incomplete")
        if kind != "response.failed":
            assert self._item is None, "every item ends"
            assert self._items, "an answer has an item"
            cut = [item["status"] == "incomplete" for item in self._items]
            assert cut == [False] * (len(cut) - 1) + [kind == "response.incomplete"]
        self.response = response

    def _take_of_item(self, kind: str, event: dict[str, Any]) -> None:
        if kind == "response.output_item.added":
            assert self._item is None, "one item at a time"
            self._item, self._text, self._has_part, self._is_done = event["item"], None, False, False
            assert self._item["status"] == "in_progress"
            if self._item["type"] == "function_call":
                assert self._item["arguments"] == ""
                self._text = ""
            else:
                assert self._item["content"] == []
            return
        if kind == "response.output_item.done":
            self._take_item(event["item"])
            return
        assert event["item_id"] == self._item["id"]
        if self._item["type"] == "function_call":
            self._take_of_call(kind, event)
        else:
            assert event["content_index"] == 0
            self._take_of_part(kind, event)

    def _take_item(self, item: Any) -> None:
        assert self._is_done
        assert not self._has_part, "a part ends before its item"
        assert {name: item[name] for name in ("id", "type")} == {name: self._item[name] for name in ("id", "type")}
        if item["type"] == "function_call":
            assert {**item, "arguments": "", "status": "in_progress"} == self._item
            assert item["arguments"] == self._text
        else:
            (part,) = item["content"]
            assert part["text"] == self._text
            assert {**item, "content": [], "status": "in_progress"} == self._item
        self._items.append(item)
        self._item = None

    def _take_of_call(self, kind: str, event: dict[str, Any]) -> None:
        assert not self._is_done
        assert self._text is not None
        if kind == "response.function_call_arguments.delta":
            assert event["delta"]
            self._text += event["delta"]
        else:
            assert kind == "response.function_call_arguments.done"
            assert (event["arguments"], event["name"]) == (self._text, self._item["name"])
            self._is_done = True

    def _take_of_part(self, kind: str, event: dict[str, Any]) -> None:
        part, name = TEXTS[self._item["type"]]
        if kind == "response.content_part.added":
            assert not self._has_part
            self._has_part, self._text, self._logprobs = True, "", []
            assert (event["part"]["type"], event["part"]["text"]) == (part, "")
            return
        assert self._has_part
        assert self._text is not None
        if kind == f"response.{name}.delta":
            assert not self._is_done
            assert event["delta"]
            self._text += event["delta"]
            self._logprobs += event.get("logprobs", [])
        elif kind == f"response.{name}.done":
            assert event["text"] == self._text
            assert event.get("logprobs", [])[: len(self._logprobs)] == self._logprobs
            self._is_done = True
        else:
            assert kind == "response.content_part.done"
            assert self._is_done
            assert (event["part"]["type"], event["part"]["text"]) == (part, self._text)
            self._has_part = False
