"""Several clients with tokens of their own: what each may do, and what is counted and logged of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import CHAT, ENDLESS, answered, ask, chunks
from tests.support.responses import respond, responded
from tests.support.service import PATIENCE_S, STATUS, TINY, Client, Reply, Running, Service, error, up

MANAGE, ALICE, BOB, UNNAMED = "t-manage-61c0", "t-alice-9f2e", "t-bob-77aa", "t-unnamed-03d1"
LINES = f"{MANAGE} name=deploy scope=manage\n{ALICE} name=alice scope=infer\n{BOB} scope=infer name=bob\n{UNNAMED}\n"
TOKENS = (MANAGE, ALICE, BOB, UNNAMED)
NAMED = [("alice", ALICE), ("bob", BOB), ("", UNNAMED)]
MOST_TOKENS = 40
STRICT, SECRET = "acme/strict", "swordfish-5f1d"
TEMPLATE = """\
{%- macro deeper() %}{{ deeper() }}{% endmacro %}
{%- for message in messages %}
    {%- if 'refuse' in message.content %}{{ raise_exception('no: ' ~ message.content) }}{% endif %}
    {%- if 'crash' in message.content %}{{ deeper() }}{% endif %}
    {{- message.content }}
{%- endfor %}"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("tokens")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    synthetic.tiny_llama(home / f"models/{STRICT}/strict-f16.gguf", metadata={"tokenizer.chat_template": TEMPLATE})
    (home / "tokens").write_text(LINES)
    with up(
        home,
        token=MANAGE,
        LOADSTONE_API_TOKENS_FILE=str(home / "tokens"),
        LOADSTONE_MAX_OUTPUT_TOKENS=str(MOST_TOKENS),
        LOADSTONE_SHARED_PREFIXES="on",
        LOADSTONE_LOG_LEVEL="debug",
    ) as service:
        yield service


@pytest.fixture
def model(service: Service) -> str:
    return str(service.loaded(TINY)["instance_id"])


def as_client(service: Service, token: str) -> Client:
    return Client(service.url, token)


def test_a_scope_allows_what_the_documentation_says(service: Service, model: str) -> None:
    alice = as_client(service, ALICE)
    assert answered(alice, model=model, max_tokens=1)["usage"]["completion_tokens"] == 1
    assert alice.send("GET", "/v1/models").status == alice.send("GET", "/api/v1/models").status == 200
    error(alice.unload(model), 403, "invalid_request", "insufficient_scope")
    error(alice.load(TINY), 403, "invalid_request", "insufficient_scope")
    error(alice.send("GET", "/metrics"), 403, "invalid_request", "insufficient_scope")
    assert as_client(service, UNNAMED).unload(model).status == 200


def test_the_command_line_says_what_a_token_lacks(service: Service, model: str) -> None:
    def run(token: str, *words: str) -> Running:
        command = Running(service.directory / "command", *words, environ={"LOADSTONE_TOKEN": token})
        command.popen.wait(PATIENCE_S)
        assert token not in command.stdout + command.stderr
        return command

    refused = run(ALICE, "unload", model, "--url", service.url)
    assert (refused.popen.returncode, refused.stdout) == (1, "")
    assert "needs a token with the scope 'manage'; this one has 'infer'" in refused.stderr
    assert model in run(ALICE, "ls", "--url", service.url).stdout
    assert run(MANAGE, "unload", model, "--url", service.url).popen.returncode == 0


def test_tokens_are_counted_by_name(service: Service, model: str) -> None:
    def counted(token: str) -> list[float]:
        names = ("prompt_tokens_total", "cached_tokens_total", "generated_tokens_total")
        return [service.metric(name, token=token) for name in names]

    before = {name: counted(name) for name in ("alice", "bob", "deploy", "")}
    assert before["deploy"] == [0, 0, 0], "a name is counted from 0 on"
    usages = {name: answered(as_client(service, token), max_tokens=3, **ENDLESS)["usage"] for name, token in NAMED}
    for name, usage in usages.items():
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        added = [usage["prompt_tokens"], cached, usage["completion_tokens"]]
        assert counted(name) == [sum(pair) for pair in zip(before[name], added, strict=True)]
    assert counted("deploy") == [0, 0, 0]
    assert service.metric("requests_total", outcome="completed", token="bob") >= 1


def test_an_answer_ends_at_the_configured_number_of_tokens(service: Service, model: str) -> None:
    for fields in ({}, {"max_tokens": -1}, {"max_tokens": MOST_TOKENS + 1}, {"max_tokens": 10**30}):
        reply = answered(service, **ENDLESS, **fields)
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == MOST_TOKENS


def test_clients_share_prompts_if_the_operator_allows_it(service: Service, model: str) -> None:
    alice, bob = (answered(as_client(service, token), max_tokens=1)["usage"] for token in (ALICE, BOB))
    assert bob["prompt_tokens_details"]["cached_tokens"] == alice["prompt_tokens"] - 1


def test_a_stored_response_belongs_to_one_client(service: Service, model: str) -> None:
    alice, bob = as_client(service, ALICE), as_client(service, BOB)
    id_ = responded(alice, model=model, max_output_tokens=1)["id"]
    assert bob.send("GET", f"/v1/responses/{id_}").status == bob.send("DELETE", f"/v1/responses/{id_}").status == 404
    assert respond(bob, model=model, previous_response_id=id_).json()["error"]["code"] == "previous_response_not_found"
    assert bob.send("DELETE", "/v1/responses").json()["deleted"] == 0
    assert alice.send("GET", f"/v1/responses/{id_}").json()["id"] == id_


def test_nothing_that_a_client_sends_is_logged(service: Service) -> None:
    """Neither the prompt, the answer nor the token, also where the request fails."""
    strict = service.accepted(STRICT)["job_id"]
    assert service.job(strict, wait_s=20)["status"] == "loaded"
    alice = as_client(service, ALICE)

    def say(text: str, **fields: Any) -> Reply:
        return ask(alice, model=STRICT, **{"messages": [{"role": "user", "content": f"{text} {SECRET}"}], **fields})

    texts = [say("hello", max_tokens=3).text]
    texts += [str(chunks(alice, model=STRICT, messages=[{"role": "user", "content": SECRET}], max_tokens=3))]
    failed = [
        say("refuse"),
        say("crash"),
        say("long" * 10_000),
        say("x", tools=[{"type": "function", "function": {"name": f"{SECRET} {SECRET}"}}]),
        say("x", temperature=SECRET),
        say("x", messages=[{"role": SECRET, "content": SECRET}]),
        say("x", chat_template_kwargs={SECRET: 1}, n=1000),
        alice.post(CHAT, f'{{"messages": "{SECRET}'.encode()),
        alice.post("/v1/completions", {"model": STRICT, "prompt": SECRET, "suffix": SECRET}),
        alice.post("/v1/responses", {"model": STRICT, "input": [{"type": SECRET}], "tools": [{"type": SECRET}]}),
    ]
    assert [reply.status for reply in failed] == [400, 500, 400, 400, 400, 400, 400, 400, 400, 400]
    log = service.send("GET", f"{STATUS}/{strict}/logs").text
    shown = [service.send("GET", path).text for path in ("/api/v1/workers", "/metrics", STATUS)]
    service.unload_all()
    for text in (service.stderr, log, *shown):
        for secret in (SECRET, *TOKENS, *(hashlib.sha256(token.encode()).hexdigest() for token in TOKENS)):
            assert secret not in text
    assert "/v1/chat/completions" in shown[1]
