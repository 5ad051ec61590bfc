"""`models.toml`: aliases, the default model, the defaults of loads and of requests, and preloading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import answered
from tests.support.service import STATUS, TINY, Service, until, up

ALIAS, PLAIN, PROMPT = "gpt-4o-mini", "acme/plain", "Answer in one word."
SETTINGS = f"""
default_model = "acme/tiny"

[models."acme/tiny"]
aliases = ["{ALIAS}"]
context_length = 512
parallel = 2
system_prompt = "{PROMPT}"
preload = true
pin = true

[models."acme/tiny".sampling]
temperature = 0
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return a service whose worker has preloaded the model with settings."""
    home = tmp_path_factory.mktemp("settings")
    for model in (TINY, PLAIN):
        synthetic.tiny_llama(home / f"models/{model}/model-f16.gguf")
    (home / "models/models.toml").write_text(SETTINGS)
    with up(home, LOADSTONE_JIT="off") as service:
        until(lambda: TINY in service.instances(), "the model is preloaded")
        yield service


def write(service: Service, text: str) -> None:
    new = Path(service.models_dir, "models.new")
    new.write_text(text)
    new.replace(service.models_dir / "models.toml")


def problems(service: Service) -> list[str]:
    (worker,) = service.send("GET", "/api/v1/workers").json()["workers"]
    found: list[str] = worker["problems"]
    return found


def prompt_tokens(service: Service, model: str, *contents: str) -> int:
    messages = [{"role": role, "content": text} for role, text in zip(("user", "system"), contents, strict=False)]
    reply = answered(service, model=model, messages=messages[::-1], max_tokens=1)
    return int(reply["usage"]["prompt_tokens"])


def test_a_preloaded_model_has_a_job_and_its_settings(service: Service) -> None:
    jobs = service.send("GET", STATUS).json()["jobs"]
    assert [job["instance_id"] for job in jobs if job["model"] == TINY] == [TINY]
    instance = service.instances()[TINY]
    assert (instance["config"]["context_length"], instance["config"]["parallel"]) == (512, 2)
    assert "remaining_ttl_seconds" not in instance


@pytest.mark.parametrize("name", [ALIAS, ALIAS.upper(), None, TINY])
def test_an_alias_and_no_name_mean_the_model(service: Service, name: str | None) -> None:
    assert answered(service, model=name, max_tokens=1)["model"] == TINY


def test_an_alias_is_listed_and_can_be_loaded(service: Service) -> None:
    listed = {one["id"]: one for one in service.send("GET", "/v1/models").json()["data"]}
    assert listed[ALIAS] == {**listed[TINY], "id": ALIAS}
    assert service.send("GET", f"/v1/models/{ALIAS}").json()["id"] == ALIAS
    loaded = service.loaded(ALIAS, context_length=256, echo_load_config=True)
    try:
        assert loaded["instance_id"] == f"{TINY}:2"
        assert loaded["load_config"]["context_length"] == 256, "the request wins"
        assert loaded["load_config"]["parallel"] == 2
    finally:
        service.unload(f"{TINY}:2")


def test_a_request_gets_the_sampling_of_the_model(service: Service) -> None:
    def texts(**fields: Any) -> set[str]:
        replies = [answered(service, model=TINY, max_tokens=8, **fields) for _ in range(3)]
        return {reply["choices"][0]["message"]["content"] for reply in replies}

    greedy = texts(temperature=None)
    assert len(greedy) == 1
    assert texts(temperature=2, top_p=1, min_p=0, top_k=0) != greedy, "the request wins"


def test_a_conversation_without_a_system_prompt_gets_one(service: Service) -> None:
    service.loaded(PLAIN)
    try:
        asked = prompt_tokens(service, PLAIN, "Hello", PROMPT)
        assert prompt_tokens(service, PLAIN, "Hello") < asked
        assert prompt_tokens(service, TINY, "Hello") == asked
        own = prompt_tokens(service, PLAIN, "Hello", "No.")
        assert prompt_tokens(service, TINY, "Hello", "No.") == own, "the request wins"
    finally:
        service.unload(PLAIN)


def test_a_mistake_is_shown_and_the_last_settings_stay(service: Service) -> None:
    assert problems(service) == []
    write(service, SETTINGS.replace("pin = true", "pin = 1"))
    mistake = 'models.toml: models."acme/tiny".pin: expected `bool`, got `int`'
    until(lambda: problems(service) == [mistake], "the mistake is shown")
    assert "settings of models are wrong" in service.stderr
    assert answered(service, model=ALIAS, max_tokens=1)["model"] == TINY
    write(service, SETTINGS.replace(ALIAS, "another"))
    until(lambda: service.send("GET", "/v1/models/another").status == 200, "the change is noticed")
    assert problems(service) == []
    write(service, SETTINGS)
    until(lambda: service.send("GET", f"/v1/models/{ALIAS}").status == 200, "the settings are back")
