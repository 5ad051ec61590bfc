"""The configured tokens: where they come from, how a line of the file is read, and that no error shows one."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.settings import Settings, SettingsError, from_environ, is_loopback
from shared.tokens import Scope, Token, check_exposure, digest, read_tokens


def token(text: str, name: str = "", scope: Scope = "manage") -> Token:
    """Return one of several tokens."""
    return Token(digest=digest(text), client=digest(text).hex(), name=name, scope=scope)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def test_tokens_come_from_the_variable_and_the_file(file: Path) -> None:
    file.write_text("first:with:colons\n\n  second  \r\nwith,comma\n")
    settings = from_environ({"LOADSTONE_API_TOKENS": "a, b:c,,a", "LOADSTONE_API_TOKENS_FILE": str(file)})
    assert read_tokens(settings) == [*map(token, ["a", "b:c", "first:with:colons", "second", "with,comma"])]


def test_one_token_for_all_makes_them_one_client(file: Path) -> None:
    file.write_text("one name=all\n")
    assert read_tokens(Settings(api_tokens="two")) == [Token(digest=digest("two"))]
    assert read_tokens(Settings(api_tokens_file=file)) == [Token(digest=digest("one"), name="all")]


def test_default_is_no_tokens() -> None:
    assert read_tokens(Settings()) == []


def test_a_line_may_have_a_name_and_a_scope(file: Path) -> None:
    file.write_text(
        "name=x\nt1 name=alice\n\nt2\tscope=infer  name=bob.2-b_\n  t3 scope=manage\nscope=infer scope=infer\n"
    )
    assert read_tokens(Settings(api_tokens="t3", api_tokens_file=file)) == [
        token("t3"),
        token("name=x"),
        token("t1", "alice"),
        token("t2", "bob.2-b_", "infer"),
        token("scope=infer", scope="infer"),
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("words", "it must be TOKEN, optionally followed by name=NAME and scope=infer or scope=manage"),
        ("role=hush", "it must be TOKEN, optionally"),
        ("# hush", "it must be TOKEN, optionally"),
        ("name=hush name=hush", "it must be TOKEN, optionally"),
        ("Name=hush", "it must be TOKEN, optionally"),
        ("name=", "the name must be 1 to 64 letters, digits, dots, dashes or underscores"),
        ("name=hush|", "the name must be"),
        ("name=" + "a" * 65, "the name must be"),
        ("scope=", "the scope must be infer or manage"),
        ("scope=hush", "the scope must be infer or manage"),
        ("scope=INFER", "the scope must be infer or manage"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(file: Path, fields: str, reason: str) -> None:
    file.write_text(f"fine name=alice\n\ns3cret {fields}\n")
    with pytest.raises(SettingsError) as refused:
        read_tokens(Settings(api_tokens_file=file))
    assert str(refused.value).startswith(f"LOADSTONE_API_TOKENS_FILE, line 3: {reason}")
    assert not any(word in str(refused.value) for word in ("s3cret", "hush", "words", "fine"))


def test_a_name_or_a_token_cannot_mean_two_things(file: Path) -> None:
    file.write_text("one name=alice\ntwo name=bob\nthree name=alice\n")
    with pytest.raises(SettingsError, match="line 3: line 1 has the name 'alice' already"):
        read_tokens(Settings(api_tokens_file=file))
    file.write_text("one name=alice\none scope=infer\n")
    with pytest.raises(SettingsError, match="line 2: the token occurs twice, with another name or scope"):
        read_tokens(Settings(api_tokens_file=file))
    file.write_text("one scope=infer\n")
    with pytest.raises(SettingsError, match="line 1: the token occurs twice, with another name or scope"):
        read_tokens(Settings(api_tokens="one", api_tokens_file=file))


@pytest.mark.parametrize("text", ["gehe1m-ü", "two words", "nul\0", "\ufeffbom"])
def test_unsendable_token_is_refused_and_not_shown(file: Path, text: str) -> None:
    file.write_text(f"fine\n{text}\n", "utf-8")
    for settings in (Settings(api_tokens=f"fine,{text}"), Settings(api_tokens_file=file)):
        with pytest.raises(SettingsError, match="LOADSTONE_API_TOKENS") as refused:
            read_tokens(settings)
        assert text not in str(refused.value)


def test_empty_token_lists_are_refused(file: Path) -> None:
    file.write_text("\n \n")
    for settings in (Settings(api_tokens=" , "), Settings(api_tokens_file=file)):
        with pytest.raises(SettingsError, match="contains no token"):
            read_tokens(settings)


@pytest.mark.parametrize(
    ("make", "reason"), [("absent", "No such file"), ("directory", "directory"), ("binary", "text")]
)
def test_unreadable_token_file_is_refused_with_a_sentence(file: Path, make: str, reason: str) -> None:
    if make == "directory":
        file.mkdir()
    elif make == "binary":
        file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=f"LOADSTONE_API_TOKENS_FILE is .*{reason}"):
        read_tokens(Settings(api_tokens_file=file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST.", "a.localhost"])
def test_loopback_address_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    check_exposure(Settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org", "0", ""])
def test_reachable_address_needs_a_token_or_insecure(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(SettingsError, match="no token is set"):
        check_exposure(Settings(host=host))
    check_exposure(Settings(host=host, insecure=True))
    check_exposure(Settings(host=host, api_tokens="secret"))
