"""The paths of the API: routed by the server, described in the document, requested by the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpcore
import pytest
from starlette.routing import Match

from api.openapi.operations import OPERATIONS
from api.routes import ROUTES
from cli.client import Client
from cli.failure import Failure
from shared import paths
from shared.schema.http import DownloadRequest, LoadRequest

JOB_ID = f"load_{'0' * 32}"
DESCRIBED = [route for route in ROUTES if route.include_in_schema]
ROUTED = {(method, route.path) for route in DESCRIBED for method in route.methods or () if method != "HEAD"}

Requests = list[tuple[str, str]]


@pytest.fixture
def requests() -> Requests:
    """Methods and raw paths of the client's requests."""
    return []


@pytest.fixture
def client(requests: Requests) -> Iterator[Client]:
    """A client whose requests are recorded and refused."""

    class Refusing(httpcore.ConnectionPool):
        @contextmanager
        def stream(self, method: str, url: httpcore.URL, **_: Any) -> Iterator[httpcore.Response]:  # type: ignore[override]
            requests.append((method, url.target.decode()))
            yield httpcore.Response(404)

    with Client("http://loadstone.example") as client:
        client._http = Refusing()
        yield client


def route_of(method: str, path: str) -> str:
    """Return the path of the route that matches a request."""
    scope = {"type": "http", "method": method, "path": path}
    return next(route.path for route in ROUTES if route.matches(scope)[0] is Match.FULL)


def test_each_path_is_routed_and_described() -> None:
    values = [value for name, value in vars(paths).items() if name.isupper()]
    declared = {path for value in values for path in ([value] if isinstance(value, str) else value)}
    assert {path for _, path in ROUTED} | {paths.ROOT, paths.MESSAGES} == declared
    assert set(OPERATIONS) == ROUTED


def test_the_client_requests_each_route_of_the_api(client: Client, requests: Requests) -> None:
    request = LoadRequest(model="p/m")
    calls: list[Callable[[], Any]] = [
        client.models,
        client.workers,
        client.jobs,
        lambda: client.unload("p/m"),
        lambda: client.job(JOB_ID),
        lambda: client.cancel(JOB_ID),
        lambda: client.logs(JOB_ID),
        lambda: client.estimate(request),
        lambda: client.submit(request, "a-key"),
        lambda: next(client.follow(JOB_ID)),
        lambda: client.download(DownloadRequest(model="p/m"), "a-key"),
        lambda: next(client.follow_download(JOB_ID)),
        lambda: client.change_download(JOB_ID, "pause"),
        lambda: client.change_download(JOB_ID, "resume"),
        lambda: client.remove("p/m", None),
    ]
    for call in calls:
        with suppress(Failure):
            call()
    requested = {(method, route_of(method, path)) for method, path in requests}
    others = {
        ("POST", paths.NATIVE_CHAT),
        ("GET", paths.DOWNLOADS),
        ("GET", paths.ONE_DOWNLOAD),
        ("DELETE", paths.ONE_DOWNLOAD),
    }
    assert requested | others == {(method, path) for method, path in ROUTED if path.startswith("/api/v1/")}


@pytest.mark.parametrize("job_id", ["..", "a/b", "a?b#c", "a%2Fb", "é", "{job_id}"])
def test_a_job_id_is_encoded_as_one_segment(client: Client, requests: Requests, job_id: str) -> None:
    for call in (client.job, client.logs):
        with suppress(Failure):
            call(job_id)
    assert [route_of("GET", path) for _, path in requests] == [paths.JOB, paths.JOB_LOGS]
    assert not any(set(path) & set(".?#{") or not path.isascii() for _, path in requests)
