"""Settings: a wrong value is refused with a sentence, and the documents list every setting."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, to_builtins

from shared.settings import (
    Settings,
    SettingsError,
    entry,
    from_environ,
    redis_url,
    to_environ,
    variable,
)

DOCUMENT = Path(__file__).parents[2] / "docs/configuration.md"
WRONG = {
    "port": ["65536", "-1", "http", "1.5", "1234 "],
    "redis_url": ["http://127.0.0.1:6379", "127.0.0.1:6379", "redis://", "redis://a b"],
    "insecure": ["yes", "2"],
    "api_workers": ["0", "65", "many"],
    "worker_listen": [
        "1234",
        "host",
        "host:",
        ":1234",
        "::1:1234",
        "[::1]",
        "host:65536",
        "h h:1",
        "host:1\n",
        "a/b:1",
    ],
    "worker_advertise": [":1234", "::1", "host:", "host:70000", "http://host", "host:1\n"],
    "worker_name": ["a/b", "two words", "a\n", "x" * 65, "ü"],
    "context_length": ["0", "4k"],
    "eval_batch_size": ["0", "x"],
    "flash_attention": ["true", "AUTO"],
    "offload_kv_cache_to_gpu": ["gpu"],
    "stall_limit_s": ["0", "-1", "nan", "inf", "1h"],
    "lease_s": ["2.9", "inf", "nan", "86400"],
    "log_level": ["verbose", "INFO"],
    "log_format": ["text"],
    "hub_hosts": ["http://host", "a b", "a,", "host:70000"],
    "models_dir": ["~no-such-user/models", "/models:~no-such-user/models"],
    "data_dir": ["~no-such-user/data"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_wrong_value_is_refused_with_what_is_allowed(field: str, value: str) -> None:
    with pytest.raises(SettingsError) as refused:
        from_environ({variable(field): value})
    sentence = str(refused.value)
    assert sentence.startswith(f"{variable(field)} is ")
    assert entry(field).allowed in sentence
    assert entry(field).secret or repr(value) in sentence


@pytest.mark.parametrize("value", ["http://user:hunter2@db:6379", "hunter2@db:6379", "hunter2"])
def test_refusal_of_a_redis_url_hides_its_password(value: str) -> None:
    with pytest.raises(SettingsError) as refused:
        from_environ({"LOADSTONE_REDIS_URL": value})
    assert "hunter2" not in str(refused.value)


def test_printed_settings_show_no_secret() -> None:
    settings = from_environ({"LOADSTONE_REDIS_URL": "redis://:hunter2@db", "LOADSTONE_API_TOKENS": "t0ken"})
    assert "hunter2" not in repr(settings)
    assert "t0ken" not in repr(settings)
    assert "'127.0.0.1'" in repr(settings)


def test_misspelt_variable_is_refused() -> None:
    with pytest.raises(SettingsError, match="LOADSTONE_MODEL_DIR is not a setting"):
        from_environ({"LOADSTONE_MODEL_DIR": "/models"})


SERVICE_LINKS = {  # as the kubelet sets them for a Service `loadstone`
    "LOADSTONE_SERVICE_HOST": "10.0.0.1",
    "LOADSTONE_SERVICE_PORT": "1234",
    "LOADSTONE_SERVICE_PORT_HTTP": "1234",
    "LOADSTONE_SERVICE_PORT_HTTP_METRICS": "1234",
    "LOADSTONE_PORT": "tcp://10.0.0.1:1234",
    "LOADSTONE_PORT_1234_TCP": "tcp://10.0.0.1:1234",
    "LOADSTONE_PORT_1234_TCP_PROTO": "tcp",
    "LOADSTONE_PORT_1234_TCP_PORT": "1234",
    "LOADSTONE_PORT_1234_TCP_ADDR": "10.0.0.1",
    "LOADSTONE_PORT_53_UDP": "udp://10.0.0.1:53",
    "LOADSTONE_PORT_53_UDP_PROTO": "udp",
}
IN_IPV6 = {"LOADSTONE_SERVICE_HOST": "fd00::a", "LOADSTONE_PORT_1234_TCP_ADDR": "fd00::a"}
IN_IPV6 |= {"LOADSTONE_PORT": "tcp://[fd00::a]:1234", "LOADSTONE_PORT_1234_TCP": "tcp://[fd00::a]:1234"}


@pytest.mark.parametrize("service", ["LOADSTONE", "LOADSTONE_API", "LOADSTONE_MODELS_2"])
@pytest.mark.parametrize("links", [SERVICE_LINKS, IN_IPV6])
def test_service_links_of_kubernetes_are_not_settings(service: str, links: dict[str, str]) -> None:
    environ = {service + name.removeprefix("LOADSTONE"): value for name, value in links.items()}
    settings = {"LOADSTONE_API_WORKERS": "2"}
    assert from_environ(environ | settings) == from_environ(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOADSTONE_PORT", "abc"),
        ("LOADSTONE_PORT", "http://10.0.0.1:1234"),
        ("LOADSTONE_PORT", "tcp://"),
        ("LOADSTONE_PORTT", "1"),
        ("LOADSTONE_PORTT", "tcp://10.0.0.1:1234"),
        ("LOADSTONE_API_PORT", "1234"),
        ("LOADSTONE_SERVICE_HOST", "example.org"),
        ("LOADSTONE_SERVICE_PORT", "http"),
        ("LOADSTONE_SERVICE_PORTS", "1234"),
        ("LOADSTONE_PORT_1234", "1234"),
        ("LOADSTONE_PORT_1234_TCP_NAME", "http"),
        ("LOADSTONE_REDIS_URL", "tcp://10.0.0.1:6379"),
    ],
)
def test_what_only_looks_like_a_service_link_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is "):
        from_environ({name: value})


def test_flags_override_variables_override_defaults() -> None:
    environ = {"LOADSTONE_PORT": "2000", "LOADSTONE_HOST": "::1", "LOADSTONE_LOG_LEVEL": "", "PORT": "1"}
    settings = from_environ(environ, {"port": "3000", "host": None})
    assert (settings.port, settings.host, settings.log_level) == (3000, "::1", "info")


@pytest.mark.parametrize(("field", "flag"), [("data_dir", "--data-dir"), ("api_workers", "--workers")])
def test_refusal_names_a_flag_as_it_is_spelt(field: str, flag: str) -> None:
    with pytest.raises(SettingsError, match=f"^{flag} is '': it must be "):
        from_environ({}, {field: ""})


def test_there_may_be_several_models_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = from_environ({"LOADSTONE_MODELS_DIR": "~/a:/b/:~/c d:"})
    assert settings.roots == [tmp_path / "a", Path("/b"), tmp_path / "c d"]
    assert from_environ(to_environ(settings)).roots == settings.roots
    assert from_environ({}).roots == [tmp_path / ".loadstone/models"]


def test_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = from_environ({"LOADSTONE_API_TOKENS_FILE": "~/tokens"})
    assert settings.api_tokens_file == tmp_path / "tokens"
    assert settings.data_dir == tmp_path / ".loadstone/data"


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that a field of this type accepts."""
    base, meta = kind.__origin__, next(m for m in kind.__metadata__ if isinstance(m, Meta))
    if get_origin(base) is Literal:
        return st.sampled_from(get_args(base))
    if base is int:
        return st.integers(int(meta.ge or 0), int(meta.le or 2**31))
    if base is float:
        low = meta.ge if meta.ge is not None else meta.gt
        return st.floats(low, meta.le, exclude_min=meta.ge is None)
    if base is bool:
        return st.booleans()
    paths = st.from_regex(r"\A/[a-zA-Z0-9 ._/ü-]{0,20}\Z").map(Path)
    if base is Path:
        return paths
    if base == Path | None:
        return st.none() | paths
    return st.from_regex(meta.pattern) if meta.pattern else st.from_regex(r"\A[!-~]{1,20}\Z")


ANY_SETTINGS = st.builds(Settings, **{field: values_of(entry(field).kind) for field in Settings.__struct_fields__})


@given(ANY_SETTINGS)
def test_settings_survive_a_round_trip_through_variables(settings: Settings) -> None:
    environ = to_environ(settings)
    assert from_environ(environ) == settings
    assert all(isinstance(value, str) for value in environ.values())


@pytest.mark.parametrize("variable", ["LOADSTONE_PORT", "LOADSTONE_EVICT", "LOADSTONE_DEVICE_RESERVE"])
def test_a_value_that_is_not_utf_8_is_refused_with_a_sentence(variable: str) -> None:
    with pytest.raises(SettingsError, match=rf"{variable} is '\\udcff': it must be"):
        from_environ({variable: os.fsdecode(b"\xff")})


def test_redis_url_is_required_without_up() -> None:
    with pytest.raises(SettingsError, match="LOADSTONE_REDIS_URL is not set"):
        redis_url(Settings())
    assert redis_url(Settings(redis_url="unix:///run/redis.sock")) == "unix:///run/redis.sock"


def documented_rows() -> list[str]:
    """Return the rows of the table of settings, as the type has them."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for field, default in to_builtins(Settings(), enc_hook=str).items():
        about = entry(field)
        shown = str(default).lower() if isinstance(default, bool) else default
        shown = f"{shown:g}" if isinstance(shown, float) else shown
        flags = f" Flag: `{about.flag}` of {', '.join(f'`{c}`' for c in about.flags)}." if about.flags else ""
        cell = f"`{shown}`" if shown not in (None, "") else ""
        rows.append(f"| `{variable(field)}` | {cell} | {about.meaning}. Allowed: {about.allowed}.{flags} |")
    return rows


def test_documents_list_every_setting() -> None:
    found = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert found, f"{DOCUMENT.name} has no settings table"
    assert [line for line in found[1].splitlines() if line.strip()] == documented_rows()
