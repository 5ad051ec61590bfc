"""Access to the API: tokens where any are configured, else loopback host names only; and the CORS rules."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.access import ACCESS
from api.app import create_app
from api.auth import Auth
from api.routes import ROUTES
from shared.settings import Settings
from shared.tokens import Token, digest

LOOPBACK, EXPOSED = True, False
PATH = "/api/v1/models"


async def call(
    *headers: tuple[bytes, bytes],
    tokens: frozenset[bytes] = frozenset(),
    loopback: bool = LOOPBACK,
    path: str = PATH,
    kind: str = "http",
) -> tuple[int, dict[str, Any], dict[bytes, bytes]]:
    """Return the status, error and headers of the answer; status 204 means that the request reached the application."""
    sent: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "method": "GET", "path": path, "headers": list(headers), "query_string": b""}
    await Auth(app, [Token(digest=digest(token.decode())) for token in tokens], loopback)(scope, receive, send)
    body = sent[1]["body"]
    return sent[0]["status"], msgspec.json.decode(body)["error"] if body else {}, dict(sent[0]["headers"])


def bearer(value: bytes) -> tuple[bytes, bytes]:
    return b"authorization", value


# ---- tokens


@pytest.mark.parametrize("token", [b"secret", b"id:secret", b"sk-lm-abc:def", b"a=b,c;d", b"!~", b"x" * 4000])
@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER", b"bEaReR"])
async def test_a_configured_token_is_accepted(token: bytes, scheme: bytes) -> None:
    known = frozenset({b"another", token})
    assert (await call(bearer(scheme + b" " + token), tokens=known))[0] == 204
    assert (await call(bearer(scheme + b"   " + token + b" "), tokens=known))[0] == 204


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer    ",
        b"Basic secret",
        b"secret",
        b"Bearersecret",
        b"Token secret",
        b"Bearer\tsecret",
        b"\xff\xfe secret",
    ],
)
async def test_a_request_without_a_token_is_refused(value: bytes | None) -> None:
    headers = [] if value is None else [bearer(value)]
    status, error, answer = await call(*headers, tokens=frozenset({b"secret"}))
    assert (status, error["type"], error["code"]) == (401, "invalid_request", "invalid_api_key")
    assert error["message"] == "A bearer token is required: send the header 'Authorization: Bearer TOKEN'."
    assert answer[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize(
    "value",
    [b"Bearer wrong", b"Bearer secre", b"Bearer secret2", b"Bearer SECRET", b"Bearer \xff\x00\xe9", b"bearer a b"],
)
async def test_a_wrong_token_is_refused_and_not_repeated(value: bytes) -> None:
    status, error, answer = await call(bearer(value), tokens=frozenset({b"secret"}))
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert error["message"] == "The bearer token is invalid."
    assert answer[b"www-authenticate"] == b"Bearer"


@given(st.binary(max_size=40))
def test_only_a_bearer_token_gives_access(value: bytes) -> None:
    token = b"K7-2f61c0"
    status = asyncio.run(call(bearer(value), tokens=frozenset({token})))[0]
    scheme, _, rest = value.partition(b" ")
    assert status == (204 if scheme.lower() == b"bearer" and rest.strip() == token else 401)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/docs", "/openapi.json"])
async def test_health_and_documents_need_no_token(path: str) -> None:
    assert (await call(tokens=frozenset({b"secret"}), path=path))[0] == 204
    assert (await call((b"host", b"evil.com"), path=path))[0] == 403


@pytest.mark.parametrize("path", ["/healthz/", "/docs/", "//", "/metrics", "/docs/x", "/v1/models", "/v1/messages"])
async def test_all_other_paths_need_a_token(path: str) -> None:
    assert (await call(tokens=frozenset({b"secret"}), path=path))[0] == 401


KEYED = ["/v1/messages", "/v1/messages/count_tokens", "/v1/models", "/v1/models/acme/tiny"]


@pytest.mark.parametrize("path", KEYED)
async def test_a_token_may_be_sent_as_an_api_key(path: str) -> None:
    """Anthropic's clients send `X-API-Key`, and some send both headers, one of them with a placeholder."""
    key, wrong = (b"x-api-key", b"secret"), (b"x-api-key", b"wrong")
    tokens = frozenset({b"another", b"secret"})
    for headers in ([key], [key, bearer(b"Bearer wrong")], [wrong, bearer(b"Bearer secret")], [key, bearer(b"")]):
        assert (await call(*headers, tokens=tokens, path=path))[0] == 204
    for headers in ([wrong], [(b"x-api-key", b"")], [wrong, bearer(b"Bearer wrong")], []):
        status, error, answer = await call(*headers, tokens=tokens, path=path)
        assert (status, answer[b"www-authenticate"]) == (401, b"Bearer")
        assert "secret" not in error["message"]
    assert "or 'X-API-Key: TOKEN'" in error["message"]


@pytest.mark.parametrize("path", [PATH, "/api/v0/models", "/v1/chat/completions", "/v1/models2"])
async def test_other_paths_take_no_api_key(path: str) -> None:
    assert (await call((b"x-api-key", b"secret"), tokens=frozenset({b"secret"}), path=path))[0] == 401


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_without_tokens_any_key_will_do(path: str) -> None:
    """Clients send a placeholder if they have no key."""
    for header in (bearer(b"Bearer fake-api-key"), bearer(b"Bearer"), bearer(b"x"), (b"x-api-key", b"dummy")):
        assert (await call((b"host", b"localhost"), header, path=path))[0] == 204


async def test_a_refusal_has_the_form_of_its_api() -> None:
    tokens = frozenset({b"secret"})
    message = "A bearer token is required: send the header 'Authorization: Bearer TOKEN'."
    openai = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    assert (await call(tokens=tokens, path="/v1/embeddings"))[1] == openai
    assert (await call(tokens=tokens, path="/v1/messages"))[1]["type"] == "authentication_error"


async def test_a_token_is_accepted_with_any_host_name() -> None:
    answer = await call((b"host", b"evil.com"), bearer(b"Bearer s"), tokens=frozenset({b"s"}))
    assert answer[0] == 204


async def test_lifespan_events_need_no_token() -> None:
    assert (await call(tokens=frozenset({b"secret"}), kind="lifespan"))[0] == 204


# ---- the Host header


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:1234",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:1234",
        "127.1.2.3",
        "[::1]",
        "[::1]:1234",
        "foo.localhost",
        "foo.localhost:1234",
    ],
)
async def test_a_loopback_host_name_is_accepted(host: str) -> None:
    assert (await call((b"host", host.encode())))[0] == 204


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:1234",
        "",
        ":1234",
        "127.0.0.1.evil.com",
        "localhost.evil.com",
        "notlocalhost",
        "evil.com#localhost",
        "evil.com/@localhost",
        "10.0.0.1",
        "0.0.0.0",
        "[::2]",
        "[::1",
        "[evil.com]:1",
        "127.0.0.1 evil.com",
        "\xff\xfe",
        "2130706433.evil.com",
    ],
)
async def test_another_host_name_is_refused(host: str) -> None:
    status, error, _ = await call((b"host", host.encode("latin-1")))
    assert (status, error["type"], error["code"]) == (403, "invalid_request", "forbidden_host")


async def test_a_missing_host_header_is_refused() -> None:
    assert (await call())[0] == 403


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_a_probe_needs_no_host_header(path: str) -> None:
    """HTTP/1.0, which some load balancers speak, has none."""
    assert (await call(path=path))[0] == 204
    assert (await call((b"host", b"evil.com"), path=path))[0] == 403


@pytest.mark.parametrize("hosts", [(b"localhost", b"localhost"), (b"localhost", b"evil.com"), (b"", b"")])
@pytest.mark.parametrize("path", [PATH, "/healthz"])
@pytest.mark.parametrize("tokens", [frozenset(), frozenset({b"secret"})])
async def test_two_host_headers_are_refused(hosts: tuple[bytes, ...], path: str, tokens: frozenset[bytes]) -> None:
    headers = [(b"host", host) for host in hosts]
    status, error, _ = await call(*headers, bearer(b"Bearer secret"), path=path, tokens=tokens)
    assert (status, error["code"], error["param"]) == (400, "invalid_value", "Host")


@given(st.binary(max_size=30))
def test_any_host_header_is_answered(host: bytes) -> None:
    assert asyncio.run(call((b"host", host)))[0] in {204, 403}


async def test_an_exposed_server_accepts_other_host_names() -> None:
    assert (await call((b"host", b"gpu-host-1:1234"), loopback=EXPOSED))[0] == 204


# ---- browsers


def client(settings: Settings) -> httpx.AsyncClient:
    """Return a client of the whole application without its lifespan: no request here reaches Redis."""
    app = create_app(settings, asyncio.Event())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:1234")


PREFLIGHT = {
    "Origin": "https://chat.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-api-key, anthropic-version, x-stainless-lang",
}


async def test_a_page_of_an_unlisted_origin_cannot_read_answers() -> None:
    async with client(Settings()) as http:
        for answer in (
            await http.options("/api/v1/models/load", headers=PREFLIGHT),
            await http.get("/healthz", headers={"Origin": "https://chat.example"}),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_a_preflight_needs_no_token() -> None:
    settings = Settings(cors_origins="https://chat.example, http://other.example", api_tokens="secret")
    async with client(settings) as http:
        answer = await http.options("/api/v1/models/load", headers=PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        allowed = answer.headers["access-control-allow-headers"].split(", ")
        assert {*PREFLIGHT["Access-Control-Request-Headers"].split(", ")} <= {*allowed}
        refused = await http.options("/api/v1/models/load", headers={**PREFLIGHT, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers


async def test_a_page_can_read_the_reason_of_a_refusal() -> None:
    async with client(Settings(cors_origins="*", api_tokens="secret")) as http:
        answer = await http.get(PATH, headers={"Origin": "https://chat.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "*")
        options = await http.options(PATH)
        assert options.status_code == 401, "without the headers of a preflight, OPTIONS needs a token"


# ---- scopes


MANAGED = {  # by the documentation; all others are for either scope, or open
    *(("POST", f"/api/v1/models/{verb}") for verb in ("load", "unload", "estimate", "download")),
    *(("GET", f"/api/v1/models/load/status{rest}") for rest in ("", "/{job_id}", "/{job_id}/events", "/{job_id}/logs")),
    ("DELETE", "/api/v1/models/load/status/{job_id}"),
    *(("GET", f"/api/v1/models/download/status{rest}") for rest in ("", "/{job_id}", "/{job_id}/events")),
    *(("POST", f"/api/v1/models/download/status/{{job_id}}/{verb}") for verb in ("pause", "resume")),
    ("DELETE", "/api/v1/models/download/status/{job_id}"),
    ("DELETE", "/api/v1/models/{model_id}"),
    ("GET", "/api/v1/workers"),
    ("GET", "/metrics"),
}
ROUTED = [(min((route.methods or set()) - {"HEAD"}), route.path) for route in ROUTES]


def test_the_table_of_access_has_exactly_the_routes() -> None:
    assert sorted(ACCESS) == sorted(ROUTED)
    assert {route for route, access in ACCESS.items() if access == "manage"} == MANAGED


@pytest.mark.parametrize(("method", "path"), ROUTED)
async def test_a_scope_opens_its_routes_and_no_others(tmp_path: Path, method: str, path: str) -> None:
    """What is not refused fails here, without Redis and a lifespan, or is answered."""
    (tmp_path / "tokens").write_text("one\ntwo scope=manage\nthree scope=infer\n")
    app = create_app(Settings(api_tokens_file=tmp_path / "tokens"), asyncio.Event())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:1234") as http:
        for token, is_allowed in (("one", True), ("two", True), ("three", (method, path) not in MANAGED)):
            for verb in {method, "HEAD"} if method == "GET" else {method}:
                headers = {"Authorization": f"Bearer {token}"}
                answer = await http.request(verb, path.replace("{job_id}", f"load_{32 * '0'}"), headers=headers)
                assert (answer.status_code in (401, 403)) == (not is_allowed)
                if not is_allowed and verb == method:
                    code, message = answer.json()["error"]["code"], answer.json()["error"]["message"]
                    assert (answer.status_code, code) == (403, "insufficient_scope")
                    assert "needs a token with the scope 'manage'; this one has 'infer'" in message


async def test_a_path_or_method_that_does_not_exist_needs_no_scope(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("three scope=infer\n")
    async with client(Settings(api_tokens_file=tmp_path / "tokens")) as http:
        http.headers["Authorization"] = "Bearer three"
        assert (await http.get("/api/v1/nothing")).status_code == 404
        assert (await http.get("/api/v1/models/unload")).status_code == 405
