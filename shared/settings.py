"""All settings: one frozen struct, read once from `LOADSTONE_*` variables and passed down.

Nobody below a `__main__` or the command line reads the environment.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, Struct

PREFIX = "LOADSTONE_"
OF_CLIENTS = frozenset({"LOADSTONE_URL", "LOADSTONE_TOKEN"})  # read by the client commands; no settings
PATHS = ("models_dir", "data_dir", "api_tokens_file", "lock_dir")


class SettingsError(Exception):
    """A setting has a value that cannot be used; the sentence names the variable, the value and what is allowed.

    Of a value that may hold a password or a token it shows at most the scheme of a URL.
    """


def setting(
    help_text: str, allowed: str, *, flags: tuple[str, ...] = (), flag: str = "", secret: bool = False, **limits: Any
) -> Meta:
    """What there is to know about a setting.

    `allowed` ends the sentence "it must be ...".  `flags` names the commands that take the setting as a flag, and
    `flag` is its spelling where that is not the field's name.  The value of a `secret` is never shown.
    """
    extra = {"allowed": allowed, "flags": flags, "flag": flag, "secret": secret}
    return Meta(description=help_text, extra=extra, **limits)


class Entry(Struct, frozen=True, kw_only=True):
    """A setting as the command line and the README show it."""

    kind: Any
    meaning: str
    allowed: str
    flag: str
    flags: tuple[str, ...]
    secret: bool


class Settings(Struct, frozen=True, kw_only=True):
    host: Annotated[
        str, setting("address the API listens on", "a host name or an address", flags=("up", "api"), min_length=1)
    ] = "127.0.0.1"
    port: Annotated[
        int,
        setting(
            "port the API listens on; 0 picks a free one",
            "an integer from 0 to 65535",
            flags=("up", "api"),
            ge=0,
            le=65535,
        ),
    ] = 1234
    models_dir: Annotated[
        Path, setting("directory with the GGUF files of a worker", "a directory", flags=("up", "worker"))
    ] = Path("~/.loadstone/models")
    data_dir: Annotated[
        Path,
        setting(
            "directory for the embedded Redis, the catalog's cache and locks", "a directory", flags=("up", "worker")
        ),
    ] = Path("~/.loadstone/data")
    redis_url: Annotated[
        str,
        setting(
            "Redis to use instead of the embedded one; may hold a password",
            "a redis://, rediss:// or unix:// URL",
            flags=("up", "api", "worker"),
            secret=True,
            pattern=r"^((rediss?|unix)://\S+)?\Z",
        ),
    ] = ""
    api_tokens: Annotated[
        str, setting("bearer tokens that clients may use", "a comma-separated list of tokens", secret=True)
    ] = ""
    api_tokens_file: Annotated[
        Path | None, setting("file with bearer tokens, one per line", "a readable file", flags=("up", "api"))
    ] = None
    insecure: Annotated[
        bool,
        setting("listen beyond loopback although no token is set", "true or false (or 1 or 0)", flags=("up", "api")),
    ] = False
    cors_origins: Annotated[
        str, setting("origins whose browser pages may call the API; * is any", "a comma-separated list of origins")
    ] = ""
    api_workers: Annotated[
        int,
        setting("API processes", "an integer from 1 to 64", flags=("api",), flag="--workers", ge=1, le=64),
    ] = 1
    worker_name: Annotated[
        str,
        setting(
            "name of a worker, unique in its pool; default: the host's name",
            "1 to 64 letters, digits, dots, dashes or underscores",
            flags=("worker",),
            pattern=r"^[A-Za-z0-9._-]{0,64}\Z",
        ),
    ] = ""
    devices: Annotated[
        str,
        setting(
            "devices that a worker loads into: NVIDIA GPUs by index or UUID, and cpu; default: all",
            "a comma-separated list of indexes, UUIDs and cpu",
            flags=("up", "worker"),
            pattern=r"^( *[A-Za-z0-9-]+ *(, *[A-Za-z0-9-]+ *)*)?\Z",
        ),
    ] = ""
    device_reserve: Annotated[
        str,
        setting(
            "memory of each device that is kept free; default: the larger of 5% and 512MiB",
            "bytes, with MiB or GiB after the number, or a percentage, as 10%",
            flags=("up", "worker"),
            pattern=r"^((\d{1,18}|\d{1,9}MiB|\d{1,6}GiB|\d{1,2}(\.\d{1,3})?%))?\Z",
        ),
    ] = ""
    lock_dir: Annotated[
        Path | None,
        setting(
            "directory of locks, one for each GPU, that the workers of a host share; default: in the data directory",
            "a directory",
            flags=("worker",),
        ),
    ] = None
    evict: Annotated[
        Literal["idle", "any", "off"],
        setting(
            "instances that may be unloaded to make room for a load: those with a TTL (idle), any, or none (off)",
            "idle, any or off",
            flags=("up", "worker"),
        ),
    ] = "idle"
    gpu_offload: Annotated[
        Literal["max", "auto"],
        setting(
            "layers that go to GPUs, of a load that does not say: all, or as many as there is room for",
            "max or auto",
            flags=("up", "worker"),
        ),
    ] = "max"
    loads_at_once: Annotated[
        int,
        setting(
            "loads that a worker runs at once; 0: one for each of its devices", "an integer from 0 to 64", ge=0, le=64
        ),
    ] = 0
    worker_queue_limit: Annotated[
        int,
        setting("loads that may wait for one worker", "an integer from 1 to 1000000", ge=1, le=1_000_000),
    ] = 128
    queue_limit: Annotated[
        int,
        setting("loads that may wait in all", "an integer from 1 to 1000000", ge=1, le=1_000_000),
    ] = 1024
    waiting_limit: Annotated[
        int,
        setting(
            "replies that an API process holds open for loads: waiting ones, long polls, streams",
            "an integer from 1 to 1000000",
            ge=1,
            le=1_000_000,
        ),
    ] = 1024
    load_attempts: Annotated[
        int,
        setting(
            "times that a load is begun before it fails, where workers end under it",
            "an integer from 1 to 100",
            ge=1,
            le=100,
        ),
    ] = 3
    restore: Annotated[
        Literal["on", "off"],
        setting("load again, when a worker comes back, what it held", "on or off", flags=("up", "worker")),
    ] = "on"
    check_tensors: Annotated[
        Literal["on", "off"],
        setting("look at every weight of a load, and refuse NaN and infinity; takes about as long again", "on or off"),
    ] = "off"
    context_length: Annotated[
        int,
        setting("context length of a load that asks for none (LLMs), in tokens", "an integer of at least 1", ge=1),
    ] = 4096
    eval_batch_size: Annotated[
        int, setting("evaluation batch size of a load that asks for none, in tokens", "an integer of at least 1", ge=1)
    ] = 512
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        setting("flash attention of a load that does not say; auto: the engine decides", "auto, on or off"),
    ] = "auto"
    offload_kv_cache_to_gpu: Annotated[
        bool, setting("keep the KV cache of a load that does not say on the GPU", "true or false (or 1 or 0)")
    ] = True
    repack: Annotated[
        Literal["on", "off"],
        setting(
            "rearrange quantized weights for the CPU while loading: decoding is faster, a load takes longer and up to "
            "twice the memory",
            "on or off",
            flags=("up", "worker"),
        ),
    ] = "off"
    stall_limit_s: Annotated[
        float,
        setting(
            "a load without any progress for this long is failed, in seconds",
            "a number over 0, at most 86400",
            gt=0,
            le=86400,
        ),
    ] = 300.0
    drain_s: Annotated[
        float,
        setting(
            "an API process that is told to stop answers for this long, in seconds, while /readyz says 503",
            "a number from 0 to 3600",
            flags=("api",),
            ge=0,
            le=3600,
        ),
    ] = 5.0
    lease_s: Annotated[
        float,
        setting(
            "a worker without a sign of life for this long is taken for dead, in seconds",
            "a number from 3 to 3600",
            ge=3,
            le=3600,
        ),
    ] = 10.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        setting("least severe log lines to write", "debug, info, warning or error", flags=("up", "api", "worker")),
    ] = "info"
    log_format: Annotated[
        Literal["console", "json"],
        setting("form of the log lines on stderr", "console or json", flags=("up", "api", "worker")),
    ] = "console"

    @property
    def name(self) -> str:
        """The worker's name: the one that was set, or the host's."""
        return self.worker_name or socket.gethostname()

    def kept_free(self, total_bytes: int) -> int:
        """How much of a device's memory is never given to loads."""
        number = re.match(r"[\d.]*", self.device_reserve)
        if number is None or not number[0]:
            return max(total_bytes // 20, 512 << 20)
        if self.device_reserve.endswith("%"):
            return int(total_bytes * float(number[0]) / 100)
        unit = {"MiB": 1 << 20, "GiB": 1 << 30}.get(self.device_reserve[number.end() :], 1)
        return int(number[0]) * unit

    def __repr__(self) -> str:
        """Without the values that may hold a secret: settings end up in tracebacks."""
        values = {field: getattr(self, field) for field in self.__struct_fields__}
        shown = (f"{f}={'***' if value and entry(f).secret else repr(value)}" for f, value in values.items())
        return f"Settings({', '.join(shown)})"


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def from_environ(environ: Mapping[str, str], flags: Mapping[str, object] = {}) -> Settings:
    """Settings from `LOADSTONE_*` variables, overridden by `flags` (field to value; None is not given).

    An empty variable is not set.  Raises SettingsError for a value that is not allowed, and for a `LOADSTONE_*`
    variable that names no setting, since a misspelt one would be ignored in silence.
    """
    known = {variable(field): field for field in Settings.__struct_fields__}
    values: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or not text or name in OF_CLIENTS:
            continue
        if name not in known:
            raise SettingsError(f"{name} is not a setting of Loadstone; the README lists those that are.")
        values[known[name]] = _convert(name, text, known[name])
    for field, value in flags.items():
        if value is not None:
            values[field] = _convert(entry(field).flag, value, field)
    settings = Settings(**values)
    homes = {field: _expand(field, value) for field in PATHS if (value := getattr(settings, field)) is not None}
    return msgspec.structs.replace(settings, **homes)


def to_environ(settings: Settings) -> dict[str, str]:
    """The variables that give these settings: what a child process is started with."""
    values = msgspec.to_builtins(settings, enc_hook=str)
    return {
        variable(field): str(value).lower() if isinstance(value, bool) else str(value)
        for field, value in values.items()
        if value is not None
    }


def entry(field: str) -> Entry:
    """The entry of a field."""
    return _ENTRIES[field]


def _entries() -> dict[str, Entry]:
    found = {}
    for field, kind in get_type_hints(Settings, include_extras=True).items():
        meta = next(m for m in kind.__metadata__ if isinstance(m, Meta))
        facts = dict(meta.extra or {})
        facts["flag"] = facts["flag"] or "--" + field.replace("_", "-")
        found[field] = Entry(kind=kind, meaning=meta.description or "", **facts)
    return found


_ENTRIES = _entries()


def _convert(name: str, value: object, field: str) -> Any:
    """`value` as the field's type, or the sentence that says what is wrong with it; `name` is where it was given."""
    about = entry(field)
    try:
        return msgspec.convert(value, about.kind, strict=False, dec_hook=_path)
    except msgspec.ValidationError:
        shown = repr(str(value))
        if about.secret:
            scheme = re.match(r"[a-z][a-z0-9+.-]*://", str(value))
            shown = repr(f"{scheme[0] if scheme else ''}***")
        raise SettingsError(f"{name} is {shown}: it must be {about.allowed}.") from None


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    raise ValueError("not a path")


def _expand(field: str, path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such user, or this one has no home
        raise SettingsError(
            f"{variable(field)} is '{path}': it must be {entry(field).allowed}, and that home directory is not known."
        ) from None


def read_tokens(settings: Settings) -> frozenset[bytes]:
    """The configured bearer tokens; empty where none are configured.

    The file holds one per line, the variable a comma-separated list; blank lines and surrounding white space do
    not count.  Raises SettingsError for a file that cannot be read, for a file or list that is set but holds no
    token, and for a token that is not visible ASCII (RFC 6750 allows less, but proxies pass this).
    """
    sources = []
    if settings.api_tokens:
        sources.append((variable("api_tokens"), settings.api_tokens.split(",")))
    if settings.api_tokens_file is not None:
        sources.append((variable("api_tokens_file"), _lines(settings.api_tokens_file)))
    tokens = set()
    for name, texts in sources:
        found = {text.strip() for text in texts} - {""}
        if not found:
            raise SettingsError(f"{name} holds no token: it must hold at least one, or not be set.")
        if not all("!" <= c <= "~" for token in found for c in token):
            raise SettingsError(
                f"{name} holds a token that is not visible ASCII: it must be letters, digits and signs."
            )
        tokens |= {token.encode() for token in found}
    return frozenset(tokens)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text"
        raise SettingsError(
            f"{variable('api_tokens_file')} is '{file}': it must be a readable file ({reason})."
        ) from None


def check_exposure(settings: Settings) -> None:
    """Refuse to serve strangers by accident.  Raises SettingsError when listening beyond loopback without tokens."""
    if not is_loopback(settings.host) and not settings.insecure and not read_tokens(settings):
        raise SettingsError(
            f"{variable('host')} is '{settings.host}', which others can reach, and no token is set: set "
            f"{variable('api_tokens_file')} or {variable('api_tokens')}, listen on 127.0.0.1, or give --insecure."
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address (an IPv6 one with or without brackets) can only mean this machine."""
    host = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def redis_url(settings: Settings) -> str:
    """The Redis to use.  Raises SettingsError where there is none: only `loadstone up` brings its own."""
    if not settings.redis_url:
        raise SettingsError(f"{variable('redis_url')} is not set: it must be a redis://, rediss:// or unix:// URL.")
    return settings.redis_url
