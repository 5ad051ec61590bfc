"""The service conforms to its OpenAPI document, checked by schemathesis, and shows it as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import configuration
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, StopReason, events, from_schema

from api.routes import ROUTES
from shared import paths
from shared.paths import ESTIMATE, LOAD
from shared.synthetic import models as synthetic
from tests.support.service import Service, error, until, up

TOKEN = "a-token-of-the-tests"
MODEL, CONTEXT_LENGTH = "acme/tiny", 4096
DESCRIBED = [route for route in ROUTES if route.include_in_schema]
ASKING = (  # a model
    paths.CHAT_COMPLETIONS,
    paths.COMPLETIONS,
    paths.NATIVE_CHAT,
    paths.RESPONSES,
    paths.RESPONSES_INPUT_TOKENS,
    paths.MESSAGES,
    paths.COUNT_TOKENS,
    paths.V0_CHAT_COMPLETIONS,
    paths.V0_COMPLETIONS,
    paths.V0_EMBEDDINGS,
    paths.EMBEDDINGS,
    *paths.RERANKS,
    paths.CHAT_INPUT_TOKENS,
    paths.TOKENIZE,
    paths.DETOKENIZE,
    paths.TOKENIZER_INFO,
    paths.APPLY_TEMPLATE,
)
# 501: the model of the tests is no reranker.
BY_TYPE = {"not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "501"]}}
CONFIG: dict[str, Any] = {
    # Their document cannot say that a model must be loaded, or that tools and images are refused by name.
    "operations": [
        *(
            {"include-path": path, "checks": {"positive_data_acceptance": {"enabled": False}, **BY_TYPE}}
            for path in ASKING
        ),
        {  # there is no hub
            "include-path": paths.DOWNLOAD,
            "checks": {"positive_data_acceptance": {"enabled": False}, "not_a_server_error": {"enabled": False}},
        },
    ],
    "seed": 1,
    "cache": {"enabled": False},
    "generation": {"deterministic": True, "database": "none", "max-examples": 20},
    "headers": {"Authorization": f"Bearer {TOKEN}"},
    "checks": {
        # 404: no model has the generated name.  409: the load has ended and cannot be cancelled.  422: the generated
        # Idempotency-Key was used with another request; no other error has this status.
        "positive_data_acceptance": {"expected-statuses": ["2xx", "404", "409", "422"]},
        "negative_data_rejection": {"expected-statuses": ["400", "404", "405", "415"]},
    },
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("openapi")
    metadata = {"llama.context_length": CONTEXT_LENGTH}
    synthetic.tiny_llama(home / "models" / MODEL / "tiny-f16.gguf", metadata=metadata)
    # Schemathesis waits 10 s for a reply, and most requests set no limit.
    settings: dict[str, Any] = {"LOADSTONE_MAX_OUTPUT_TOKENS": "16", "LOADSTONE_DOWNLOADS": "off"}
    with up(home, token=TOKEN, LOADSTONE_API_TOKENS=TOKEN, **settings) as service:
        until(lambda: MODEL in service.models(), "the model is listed")
        yield service


@contextmanager
def hooks(service: Service) -> Iterator[Counter[str]]:
    """Adapt the generated requests; yield a count of the replies to loads by status and content type.

    Of the valid loads and estimates every third names the existing model, and of the valid loads every fifth requests
    events.  A load's instance is unloaded at once, so that later requests find the load ended.  A schema does not
    express the limits of a model, the workers and devices of a pool, or the length of a split: they are applied here.
    """
    replies: Counter[str] = Counter()
    sent = 0

    def is_load(case: Any) -> bool:
        return case.method == "POST" and case.operation.path == LOAD and isinstance(case.body, dict)

    def is_estimate(case: Any) -> bool:
        return case.method == "POST" and case.operation.path == ESTIMATE and isinstance(case.body, dict)

    def before_call(context: Any, case: Any, kwargs: Any) -> None:
        nonlocal sent
        if not (is_load(case) or is_estimate(case)) or case.meta.generation.mode.is_negative:
            return
        sent += 1
        if sent % 3 == 0:
            case.body = {**case.body, "model": MODEL}
        if "gpu" in case.body:
            gpu = {name: value for name, value in case.body["gpu"].items() if name not in ("worker", "devices")}
            if isinstance(gpu.get("split"), list):
                gpu["split"] = "even"
            case.body = {**case.body, "gpu": gpu}
        if "ttl_seconds" in case.body:  # so that it does not expire before its unload
            case.body = {**case.body, "ttl_seconds": max(60, case.body["ttl_seconds"])}
        if case.body["model"] == MODEL:
            limits = {"context_length": CONTEXT_LENGTH, "parallel": case.body.get("eval_batch_size", 64)}
            for name in ("context_length", "physical_batch_size"):
                limits["parallel"] = min(limits["parallel"], case.body.get(name, 64))
            case.body = {
                name: min(value, limits[name]) if name in limits else value for name, value in case.body.items()
            }
        if "kv_cache_type" in case.body:  # a quantized cache needs it
            case.body = {name: value for name, value in case.body.items() if name != "flash_attention"}
        if sent % 5 == 0 and is_load(case):
            case.headers["Accept"] = "text/event-stream"

    def after_call(context: Any, case: Any, response: Any) -> None:
        if not is_load(case):
            return
        replies[f"{response.status_code} {response.headers['content-type'][0].partition(';')[0]}"] += 1
        if response.status_code == 202:
            job = service.send("GET", f"{response.headers['location'][0]}?wait=20")
            assert job.json()["status"] == "loaded", job.text
        if response.status_code in (200, 202):
            service.unload_all()

    schemathesis.hook(before_call)
    schemathesis.hook(after_call)
    try:
        yield replies
    finally:
        schemathesis.hooks.unregister(before_call)
        schemathesis.hooks.unregister(after_call)


def problem(event: events.ScenarioFinished, case_id: str, check: Any) -> str:
    """Describe a failed check with its request and the reply."""
    interaction = event.recorder.interactions.get(case_id)
    reply = (
        f"{interaction.response.status_code} {interaction.response.text[:500]}"
        if interaction and interaction.response
        else "no reply"
    )
    request = event.recorder.cases[case_id].value.as_curl_command()
    return f"{check.name}: {check.failure_info.failure}\n{request}\n{reply}"


def test_the_service_does_what_its_document_says(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_all_checks()
    monkeypatch.setattr(configuration, "__hypothesis_home_directory", tmp_path)
    problems: list[str] = []
    tested: set[str] = set()
    passed: set[str] = set()
    document = service.send("GET", "/openapi.json").json()
    config = SchemathesisConfig.from_dict({**CONFIG, "base-url": service.url})
    schema = schemathesis.openapi.from_dict(document, config=config)
    with hooks(service) as replies:
        for event in from_schema(schema).execute():
            match event:
                case events.NonFatalError() | events.FatalError():
                    problems.append(str(event))
                case events.EngineFinished():
                    assert event.stop_reason is StopReason.COMPLETED
                case events.ScenarioFinished():
                    tested |= {node.value.operation.label for node in event.recorder.cases.values()}
                    for case_id, checks in event.recorder.checks.items():
                        passed |= {check.name for check in checks if check.status is Status.SUCCESS}
                        failed = [check for check in checks if check.status is not Status.SUCCESS]
                        problems += [problem(event, case_id, check) for check in failed]
    assert not problems, "\n\n".join(problems)
    assert tested == {
        f"{method} {route.path}" for route in DESCRIBED for method in route.methods or () if method != "HEAD"
    }
    assert passed == set(CHECKS.get_all_names())
    assert {"200 application/json", "200 text/event-stream", "202 application/json"} <= set(replies)


class Page(HTMLParser):
    """The text, tags, anchors and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.anchors.append(value or "")
            elif name in ("href", "src", "action", "data", "srcset"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_path_and_fetches_nothing(service: Service) -> None:
    reply = service.send("GET", "/docs")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["content-security-policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    page = Page(reply.text)
    assert [route.path for route in DESCRIBED if f"{route.path}\n" not in page.text + "\n"] == []
    assert not page.tags & {"script", "link", "img", "iframe", "form"}
    assert "url(" not in reply.text
    assert "@import" not in reply.text
    assert len(page.anchors) == len(set(page.anchors))
    assert set(page.links) <= {"openapi.json", *(f"#{anchor}" for anchor in page.anchors)}


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/"])
def test_the_document_and_the_page_need_no_token(service: Service, path: str) -> None:
    service.loaded(MODEL)
    reply = service.send("GET", path, headers={"Authorization": ""}, follow_redirects=True)
    assert reply.status == 200
    assert MODEL not in reply.text
    assert "<title>Loadstone API</title>" in reply.text or path == "/openapi.json"


def test_a_refused_method_names_the_methods_of_all_routes(service: Service) -> None:
    reply = service.send("PUT", f"{LOAD}/status/load_1")
    error(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "DELETE, GET, HEAD"


@pytest.mark.parametrize("number", ["301", "1" + 12 * "0", "9" * 5000])
def test_a_number_over_a_limit_counts_as_the_limit(service: Service, number: str) -> None:
    reply = service.send("GET", f"{LOAD}/status?limit={number}")
    assert reply.status == 200, reply.text
    error(service.send("GET", f"{LOAD}/status?limit=-{number}"), 400, "invalid_request", "invalid_value", "limit")
