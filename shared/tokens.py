"""The bearer tokens that the API accepts, with their names and scopes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal, TypeGuard, get_args

from msgspec import Struct, structs

from shared.settings import Settings, SettingsError, is_loopback, variable

Scope = Literal[
    "infer",  # requests to models, and the lists of models
    "manage",  # everything
]
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = "TOKEN, optionally followed by name=NAME and scope=infer or scope=manage, separated by spaces"


class Token(Struct, frozen=True, kw_only=True):
    """A token that a client may send: its SHA-256 alone, so that it is in no traceback."""

    digest: bytes
    client: str = ""  # tells its client from those with other tokens; "" if there is only one token
    name: str = ""  # for the metrics
    scope: Scope = "manage"


def digest(token: str) -> bytes:
    """Return the digest of a token as a client sends it, in a header."""
    return hashlib.sha256(token.encode("latin-1")).digest()


def read_tokens(settings: Settings) -> list[Token]:
    """Return the configured bearer tokens, or an empty list if none are configured.

    The variable is a comma-separated list of tokens.  Each line of the file has one, and optionally its name and its
    scope.  Blank entries and surrounding white space are ignored.  Raises SettingsError for a file that cannot be read,
    for a file or list without a token, for a token with characters other than visible ASCII (RFC 6750 allows fewer
    characters, but proxies pass these), and for a line that is not as it should be.
    """
    tokens: dict[bytes, Token] = {}
    if settings.api_tokens:
        tokens = {token.digest: token for token in _listed(variable("api_tokens"), settings.api_tokens)}
    if settings.api_tokens_file is not None:
        tokens |= _in_file(settings.api_tokens_file, tokens)
    if len(tokens) == 1:
        return [*tokens.values()]
    return [structs.replace(token, client=token.digest.hex()) for token in tokens.values()]


def _listed(name: str, text: str) -> list[Token]:
    tokens = [token for one in text.split(",") if (token := one.strip())]
    if not tokens:
        raise SettingsError(f"{name} contains no token: add at least one, or unset it.")
    if not all(map(_is_visible, tokens)):
        raise SettingsError(
            f"{name} contains an invalid token: tokens must be visible ASCII (letters, digits, punctuation)."
        )
    return [Token(digest=digest(token)) for token in tokens]


def _in_file(file: Path, others: dict[bytes, Token]) -> dict[bytes, Token]:
    """Return the tokens of a file.  `others` are those that it may repeat, but not change."""
    name = variable("api_tokens_file")
    tokens: dict[bytes, Token] = {}
    lines: dict[str, int] = {}  # by name
    for number, line in enumerate(_lines(name, file), 1):
        if not (words := line.split()):
            continue
        try:
            token = _token(*words)
        except ValueError as e:
            raise SettingsError(f"{name}, line {number}: {e}.") from None
        if token.name and (first := lines.setdefault(token.name, number)) != number:
            raise SettingsError(f"{name}, line {number}: line {first} has the name '{token.name}' already.")
        if (others | tokens).get(token.digest, token) != token:
            raise SettingsError(f"{name}, line {number}: the token occurs twice, with another name or scope.")
        tokens[token.digest] = token
    if not tokens:
        raise SettingsError(f"{name} contains no token: add at least one, or unset it.")
    return tokens


def _token(token: str, *fields: str) -> Token:
    """Read the words of a line.  Raises ValueError with the reason, which has no word of the line: a word that is not a
    field may be a part of a secret."""
    if not _is_visible(token):
        raise ValueError("the token must be visible ASCII (letters, digits, punctuation)")
    given = dict(field.split("=", 1) for field in fields if "=" in field)
    if len(given) < len(fields) or given.keys() - {"name", "scope"}:
        raise ValueError(f"it must be {LINE}")
    name, scope = given.get("name"), given.get("scope", "manage")
    if name is not None and not NAME.fullmatch(name):
        raise ValueError("the name must be 1 to 64 letters, digits, dots, dashes or underscores")
    if not _is_scope(scope):
        raise ValueError("the scope must be infer or manage")
    return Token(digest=digest(token), name=name or "", scope=scope)


def _is_visible(token: str) -> bool:
    return all("!" <= c <= "~" for c in token)


def _is_scope(text: str) -> TypeGuard[Scope]:
    return text in get_args(Scope)


def _lines(name: str, file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise SettingsError(f"{name} is '{file}': it must be a readable file ({reason}).") from None


def check_exposure(settings: Settings) -> None:
    """Raise SettingsError if the API would listen on a non-loopback address without tokens and without --insecure."""
    if not is_loopback(settings.host) and not settings.insecure and not read_tokens(settings):
        raise SettingsError(
            f"{variable('host')} is '{settings.host}', which other machines can reach, but no token is set: set "
            f"{variable('api_tokens_file')} or {variable('api_tokens')}, listen on 127.0.0.1, or use --insecure."
        )
