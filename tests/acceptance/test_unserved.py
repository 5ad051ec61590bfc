"""Routes of other APIs that are not served yet, and the form of the errors at the paths of these APIs."""

from __future__ import annotations

import json
import socket

import pytest

from api.unserved import UNSERVED
from tests.support.service import Service, openai_error


def test_an_unknown_path_below_v1_has_openais_form(service: Service) -> None:
    for method, path in (("GET", "/v1"), ("POST", "/v1/nothing"), ("GET", "/api/v0/nothing"), ("POST", "/rerank/x")):
        message = openai_error(service.send(method, path), 404, "invalid_request_error", None)
        assert message == f"Unexpected endpoint or method. ({method} {path})"


def test_a_wrong_method_has_the_form_of_its_path(service: Service) -> None:
    reply = service.send("PUT", "/v1/responses/resp_1")
    openai_error(reply, 405, "invalid_request_error", "method_not_supported")
    assert reply.headers["allow"] == "DELETE, GET, HEAD"
    reply = service.send("GET", "/v1/chat/completions")
    openai_error(reply, 405, "invalid_request_error", "method_not_supported")
    assert reply.headers["allow"] == "POST"
    reply = service.send("GET", "/v1/messages")
    assert (reply.status, reply.json()["error"]["type"]) == (405, "invalid_request_error")
    assert (reply.json()["type"], reply.headers["allow"]) == ("error", "POST")


def test_the_websocket_protocol_of_lm_studio_stays_refused(service: Service) -> None:
    assert service.send("GET", "/lmstudio-greeting").status == 404


@pytest.mark.parametrize(("method", "path"), UNSERVED)
def test_a_route_that_is_not_served_yet_says_so(service: Service, method: str, path: str) -> None:
    path = path.format(response_id="resp_1", job_id="job_1")
    reply = service.send(method, path, content=b'{"model": "acme/llm"}' if method == "POST" else b"")
    assert reply.status == 501
    error = reply.json()["error"]
    assert error["message"] == (
        f"{method} {path} is not implemented yet: this version of Loadstone loads, unloads and lists models, "
        "and answers chat and text completions, and /docs describes everything that it serves."
    )
    assert reply.headers["x-should-retry"] == "false", "client libraries repeat other requests with a 5xx"
    if path.startswith("/v1/messages"):
        assert (reply.json()["type"], error["type"], error["code"]) == ("error", "api_error", "not_implemented")
    elif path.startswith("/api/v1/"):
        assert error["type"] == "not_implemented"
    else:
        openai_error(reply, 501, "not_supported_error", "not_implemented")


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_connection_serves_on_after_a_body_that_nobody_read(service: Service, framing: str) -> None:
    """A body of 3 MiB does not fit into the buffers on the way."""
    size = 3 << 20
    head = "POST /v1/responses/resp_1/cancel HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    if framing == "length":
        sent = f"{head}Content-Length: {size}\r\n\r\n".encode() + b"x" * size
    else:
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        sent = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * (size >> 16) + b"0\r\n\r\n"
    sent += b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(sent)
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    first, _, second = received.partition(b"HTTP/1.1 200 ")
    assert first.startswith(b"HTTP/1.1 501 ")
    assert json.loads(first.partition(b"\r\n\r\n")[2])["error"]["code"] == "not_implemented"
    assert second.endswith(b"ok\n")


def test_the_root_leads_to_the_page(service: Service) -> None:
    reply = service.send("GET", "/", follow_redirects=False)
    assert (reply.status, reply.headers["location"]) == (307, "/docs")
    assert service.send("GET", "/", follow_redirects=True).headers["content-type"] == "text/html; charset=utf-8"
