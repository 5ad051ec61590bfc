"""Chat completions over HTTP, as a client of OpenAI's API sends and reads them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.support.service import PATIENCE_S, TINY, Client, Reply

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
EOS = 2  # of the tokenizer of `synthetic.tiny_llama`
ENDLESS = {"logit_bias": {str(EOS): -100}}  # up to the end of the context
DONE = "[DONE]"


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "temperature": 0, **fields}


def ask(client: Client, **fields: Any) -> Reply:
    return client.post(CHAT, body(**fields))


def answered(client: Client, **fields: Any) -> Any:
    """Return the reply to a request that must succeed."""
    reply = ask(client, **fields)
    assert reply.status == 200, reply.text
    return reply.json()


@contextmanager
def streaming(client: Client, *, path: Any = CHAT, **fields: Any) -> Iterator[Iterator[str]]:
    """Send a streamed request; yield the data of its events.  Leaving the block disconnects."""
    headers = {"Authorization": f"Bearer {client.token}"} if client.token else {}
    with (
        httpx.Client(base_url=client.url, timeout=PATIENCE_S, trust_env=False, headers=headers) as http,
        http.stream("POST", path, json=body(stream=True, **fields)) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        received = events(reply.iter_lines())  # kept here: without a reference to it, httpx closes the connection
        yield received


def events(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        assert line in ("", ":") or line.startswith("data: "), line
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def chunks(client: Client, **fields: Any) -> list[Any]:
    """Return the chunks of a streamed request that must succeed."""
    with streaming(client, **fields) as received:
        *data, last = received
    assert last == DONE
    return [json.loads(each) for each in data]


def begun(received: Iterator[str]) -> None:
    """Wait for the first text of an answer."""
    next(data for data in received if json.loads(data)["choices"][0]["delta"].get("content"))


def rest(received: Iterator[str]) -> Any:
    """Read up to the end of a stream that must end with an error; return the error."""
    *data, last = received
    assert DONE not in data
    assert all(choice["finish_reason"] is None for each in data for choice in json.loads(each)["choices"])
    (error,) = json.loads(last).values()
    assert set(error) == {"message", "type", "param", "code"}
    return error


def connected(client: Client, *, path: Any = CHAT, **fields: Any) -> socket.socket:
    """Send a request on a connection of its own, and read nothing."""
    content = json.dumps(body(**fields)).encode()
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=PATIENCE_S)
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}"]
    head += [f"Authorization: Bearer {client.token}"] if client.token else []
    connection.sendall("\r\n".join([*head, "", ""]).encode() + content)
    return connection


def busy(client: Client, instance: str = TINY) -> tuple[float, float]:
    """Return how many requests of an instance run and wait, as the worker published them last, if it did."""
    if f'loadstone_requests_waiting{{instance="{instance}"' not in client.send("GET", "/metrics").text:
        return 0, 0
    labels = {"instance": instance}
    return client.metric("requests_running", **labels), client.metric("requests_waiting", **labels)
