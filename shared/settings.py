"""All settings: one frozen struct, read once from `LOADSTONE_*` variables and passed down.

Only the `__main__` modules and the command line read the environment.
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
OF_CLIENTS = frozenset({"LOADSTONE_URL", "LOADSTONE_TOKEN"})  # variables of the client commands, not settings
# Kubernetes sets variables in the pods of a namespace for each of its Services.  For a Service `loadstone` or
# `loadstone-api`, their names begin as those of settings do (pkg/kubelet/envvars of Kubernetes).
SERVICE_LINK = re.compile(
    r"""LOADSTONE(_[A-Z0-9]+)*_
    (   SERVICE_HOST = [\d.:a-f]+
    |   SERVICE_PORT(_[A-Z0-9_]+)? = \d+
    |   PORT(_\d+_(TCP|UDP|SCTP))? = (tcp|udp|sctp)://\S+
    |   PORT_\d+_(TCP|UDP|SCTP)_ ( PROTO=(tcp|udp|sctp) | PORT=\d+ | ADDR=[\d.:a-f]+ )
    )""",
    re.VERBOSE,
)
_HOST = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)"
_PORT = r"([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
PATHS = ("models_dir", "data_dir", "api_tokens_file", "lock_dir")


class SettingsError(Exception):
    """A setting has an invalid value.  The message names the variable, the value and the allowed values.

    It never contains a secret: of a value that may contain a password or a token, it shows at most the URL scheme.
    """


def setting(
    help_text: str, allowed: str, *, flags: tuple[str, ...] = (), flag: str = "", secret: bool = False, **limits: Any
) -> Meta:
    """Describe a setting.

    `allowed` completes the sentence "it must be ...".  `flags` names the commands that accept the setting as a flag;
    `flag` is the flag's spelling if it differs from the field's name.  The value of a `secret` is never shown.
    """
    extra = {"allowed": allowed, "flags": flags, "flag": flag, "secret": secret}
    return Meta(description=help_text, extra=extra, **limits)


class Entry(Struct, frozen=True, kw_only=True):
    """A setting as the command line and the documentation show it."""

    kind: Any
    meaning: str
    allowed: str
    flag: str
    flags: tuple[str, ...]
    secret: bool


class Settings(Struct, frozen=True, kw_only=True):
    host: Annotated[
        str,
        setting("address that the API listens on", "a host name or an IP address", flags=("up", "api"), min_length=1),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        setting(
            "TCP port that the API listens on; 0 selects a free port",
            "an integer from 0 to 65535",
            flags=("up", "api"),
            ge=0,
            le=65535,
        ),
    ] = 1234
    models_dir: Annotated[
        Path,
        setting(
            "directories with the models of the worker: GGUF files, the cache of Hugging Face, or a store of Ollama; "
            "of the same model in two of them, the first is used",
            "a directory, or several separated by colons",
            flags=("up", "worker"),
        ),
    ] = Path("~/.loadstone/models")
    data_dir: Annotated[
        Path,
        setting(
            "directory for the embedded Redis, the worker's state, the catalog cache and lock files",
            "a directory",
            flags=("up", "worker"),
        ),
    ] = Path("~/.loadstone/data")
    redis_url: Annotated[
        str,
        setting(
            "URL of the Redis server, which may contain a password; if it is not set, `up` starts an embedded server",
            "a redis://, rediss:// or unix:// URL",
            flags=("up", "api", "worker"),
            secret=True,
            pattern=r"^((rediss?|unix)://\S+)?\Z",
        ),
    ] = ""
    api_tokens: Annotated[
        str, setting("bearer tokens that the API accepts", "a comma-separated list of tokens", secret=True)
    ] = ""
    api_tokens_file: Annotated[
        Path | None,
        setting(
            "file with the bearer tokens that the API accepts, one per line, each optionally with a name and a scope",
            "a readable file",
            flags=("up", "api"),
        ),
    ] = None
    insecure: Annotated[
        bool,
        setting(
            "allow the API to listen on a non-loopback address without tokens",
            "true or false (or 1 or 0)",
            flags=("up", "api"),
        ),
    ] = False
    cors_origins: Annotated[
        str,
        setting(
            "origins whose web pages may call the API from a browser (CORS); * allows any origin",
            "a comma-separated list of origins",
        ),
    ] = ""
    api_workers: Annotated[
        int,
        setting("number of API processes", "an integer from 1 to 64", flags=("api",), flag="--workers", ge=1, le=64),
    ] = 1
    worker_name: Annotated[
        str,
        setting(
            "name of the worker, unique in the pool; default: the host name",
            "1 to 64 letters, digits, dots, dashes or underscores",
            flags=("worker",),
            pattern=r"^[A-Za-z0-9._-]{0,64}\Z",
        ),
    ] = ""
    worker_listen: Annotated[
        str,
        setting(
            "address on which the worker accepts requests from API processes that cannot open its socket file, such as "
            "those of other hosts; port 0 selects a free port; default: none",
            "HOST:PORT, with an IPv6 address in brackets",
            flags=("worker",),
            pattern=rf"^({_HOST}:{_PORT})?\Z",
        ),
    ] = ""
    worker_advertise: Annotated[
        str,
        setting(
            "address at which API processes reach the worker if it is not the one that it listens on, as behind NAT; "
            "default: the local address of its connection to Redis",
            "HOST or HOST:PORT, with an IPv6 address in brackets",
            flags=("worker",),
            pattern=rf"^({_HOST}(:{_PORT})?)?\Z",
        ),
    ] = ""
    devices: Annotated[
        str,
        setting(
            "devices that the worker uses: NVIDIA GPUs by index or UUID, and cpu; default: all devices",
            "a comma-separated list of indexes, UUIDs and cpu",
            flags=("up", "worker"),
            pattern=r"^( *[A-Za-z0-9-]+ *(, *[A-Za-z0-9-]+ *)*)?\Z",
        ),
    ] = ""
    device_reserve: Annotated[
        str,
        setting(
            "memory to keep free on each device; default: 5%, and at least 512MiB",
            "a number of bytes, a number followed by MiB or GiB, or a percentage such as 10%",
            flags=("up", "worker"),
            pattern=r"^((\d{1,18}|\d{1,9}MiB|\d{1,6}GiB|\d{1,2}(\.\d{1,3})?%))?\Z",
        ),
    ] = ""
    lock_dir: Annotated[
        Path | None,
        setting(
            "directory for the GPU lock files, shared by all workers of a host; default: in the data directory",
            "a directory",
            flags=("worker",),
        ),
    ] = None
    evict: Annotated[
        Literal["idle", "any", "off"],
        setting(
            "instances that may be unloaded to make room for a load: only those with a TTL (idle), any, or none (off)",
            "idle, any or off",
            flags=("up", "worker"),
        ),
    ] = "idle"
    gpu_offload: Annotated[
        Literal["max", "auto"],
        setting(
            "layers to place on GPUs if the request does not specify it: all (max), or as many as fit (auto)",
            "max or auto",
            flags=("up", "worker"),
        ),
    ] = "max"
    loads_at_once: Annotated[
        int,
        setting(
            "maximum number of loads that a worker runs concurrently; 0: one per device",
            "an integer from 0 to 64",
            ge=0,
            le=64,
        ),
    ] = 0
    worker_queue_limit: Annotated[
        int,
        setting("maximum number of loads that wait for one worker", "an integer from 1 to 1000000", ge=1, le=1_000_000),
    ] = 128
    queue_limit: Annotated[
        int,
        setting(
            "maximum number of loads that wait in the whole pool", "an integer from 1 to 1000000", ge=1, le=1_000_000
        ),
    ] = 1024
    waiting_limit: Annotated[
        int,
        setting(
            "maximum number of replies that an API process holds open: answers of models, and waiting requests, long "
            "polls and event streams of loads; of one token, at most half",
            "an integer from 1 to 1000000",
            ge=1,
            le=1_000_000,
        ),
    ] = 1024
    load_attempts: Annotated[
        int,
        setting(
            "maximum number of attempts at a load whose worker becomes unavailable",
            "an integer from 1 to 100",
            ge=1,
            le=100,
        ),
    ] = 3
    restore: Annotated[
        Literal["on", "off"],
        setting("reload the instances of a worker when it restarts", "on or off", flags=("up", "worker")),
    ] = "on"
    check_tensors: Annotated[
        Literal["on", "off"],
        setting("check all weights of a model for NaN and infinity; loads take about twice as long", "on or off"),
    ] = "off"
    context_length: Annotated[
        int,
        setting(
            "default context length of LLMs and causal embedding models, in tokens", "an integer of at least 1", ge=1
        ),
    ] = 4096
    eval_batch_size: Annotated[
        int, setting("default evaluation batch size of LLMs, in tokens", "an integer of at least 1", ge=1)
    ] = 512
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        setting("default for flash attention; auto: the engine decides", "auto, on or off"),
    ] = "auto"
    offload_kv_cache_to_gpu: Annotated[
        bool, setting("default for keeping the KV cache on the GPU", "true or false (or 1 or 0)")
    ] = True
    repack: Annotated[
        Literal["on", "off"],
        setting(
            "rearrange quantized weights for the CPU while loading; decoding is faster, but loads take longer and up "
            "to twice the memory",
            "on or off",
            flags=("up", "worker"),
        ),
    ] = "off"
    jit: Annotated[
        Literal["on", "off"],
        setting("load a model when a request names it and it is not loaded", "on or off", flags=("up", "api")),
    ] = "on"
    jit_ttl_s: Annotated[
        float,
        setting(
            "default time after which an unused model that was loaded on demand is unloaded, in seconds",
            "a number greater than 0 and at most 316224000",
            gt=0,
            le=316_224_000,
        ),
    ] = 3600.0
    jit_context: Annotated[
        int,
        setting(
            "largest context of an LLM that is loaded on demand, in tokens; it gets less if more does not fit",
            "an integer of at least 1",
            ge=1,
        ),
    ] = 32768
    requests_waiting: Annotated[
        int,
        setting(
            "maximum number of requests that wait for one instance; of one token, at most half",
            "an integer from 1 to 65536",
            ge=1,
            le=65536,
        ),
    ] = 64
    request_wait_s: Annotated[
        float,
        setting(
            "maximum time for which a request waits for an instance, in seconds",
            "a number greater than 0 and at most 86400",
            gt=0,
            le=86400,
        ),
    ] = 60.0
    request_s: Annotated[
        float,
        setting(
            "maximum duration of a request to an instance, in seconds",
            "a number greater than 0 and at most 86400",
            gt=0,
            le=86400,
        ),
    ] = 600.0
    max_body_bytes: Annotated[
        int,
        setting(
            "maximum size of the body of a request to a model, in bytes; an API process answers no other request while "
            "it decodes one",
            "an integer from 1024 to 33554432",
            ge=1024,
            le=32 << 20,
        ),
    ] = 8 << 20
    max_output_tokens: Annotated[
        int,
        setting(
            "maximum number of tokens of an answer; a request for more gets that many; 0: up to the end of the context",
            "an integer of at least 0",
            ge=0,
        ),
    ] = 0
    shared_prefixes: Annotated[
        Literal["on", "off"],
        setting(
            "reuse the tokens of a prompt for the requests of all clients that begin with the same text, not only for "
            "those with the same token; a client can then learn by the time of an answer what others sent",
            "on or off",
        ),
    ] = "off"
    responses: Annotated[
        int,
        setting(
            "maximum number of responses that are stored for one token, for requests that continue them; the oldest "
            "are removed first; 0: none are stored",
            "an integer from 0 to 10000",
            ge=0,
            le=10_000,
        ),
    ] = 1000
    responses_bytes: Annotated[
        int,
        setting(
            "maximum size of the responses that are stored for one token, with their conversations, in bytes of Redis' "
            "memory",
            "an integer from 1024 to 1073741824",
            ge=1024,
            le=1 << 30,
        ),
    ] = 64 << 20
    responses_retain_s: Annotated[
        int,
        setting(
            "time for which a response is stored, in seconds",
            "an integer from 1 to 31536000",
            ge=1,
            le=365 * 86400,
        ),
    ] = 86400
    downloads: Annotated[
        Literal["on", "off"],
        setting(
            "download models from the hub of HF_ENDPOINT (default: https://huggingface.co), with the token HF_TOKEN, "
            "and estimate those that it has",
            "on or off",
            flags=("up", "worker"),
        ),
    ] = "on"
    hub_hosts: Annotated[
        str,
        setting(
            "further hosts that the hub may redirect downloads to, also with private addresses; without a port, 443",
            "a comma-separated list of HOST or HOST:PORT",
            flags=("worker",),
            pattern=rf"^( *{_HOST}(:{_PORT})? *(, *{_HOST}(:{_PORT})? *)*)?\Z",
        ),
    ] = ""
    stall_limit_s: Annotated[
        float,
        setting(
            "time without progress after which a load or a download fails, in seconds",
            "a number greater than 0 and at most 86400",
            gt=0,
            le=86400,
        ),
    ] = 300.0
    unload_wait_s: Annotated[
        float,
        setting(
            "time that requests get to end when their instance is unloaded, in seconds",
            "a number from 0 to 3600",
            ge=0,
            le=3600,
        ),
    ] = 10.0
    drain_s: Annotated[
        float,
        setting(
            "time that requests get to end after a stop signal to an API process or a worker, in seconds",
            "a number from 0 to 3600",
            flags=("api", "worker"),
            ge=0,
            le=3600,
        ),
    ] = 20.0
    lease_s: Annotated[
        float,
        setting(
            "time without a heartbeat after which a worker is considered dead, in seconds",
            "a number from 3 to 3600",
            ge=3,
            le=3600,
        ),
    ] = 10.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        setting("minimum severity of the log lines", "debug, info, warning or error", flags=("up", "api", "worker")),
    ] = "info"
    log_format: Annotated[
        Literal["console", "json"],
        setting("format of the log lines on stderr", "console or json", flags=("up", "api", "worker")),
    ] = "console"

    @property
    def roots(self) -> list[Path]:
        """The models directories.  There is at least one."""
        return _roots(self.models_dir)

    @property
    def name(self) -> str:
        """The name of the worker; by default the host name."""
        return self.worker_name or socket.gethostname()

    def kept_free(self, total_bytes: int) -> int:
        """Return how many bytes of a device with `total_bytes` are kept free of loads."""
        number = re.match(r"[\d.]*", self.device_reserve)
        if number is None or not number[0]:
            return max(total_bytes // 20, 512 << 20)
        if self.device_reserve.endswith("%"):
            return int(total_bytes * float(number[0]) / 100)
        unit = {"MiB": 1 << 20, "GiB": 1 << 30}.get(self.device_reserve[number.end() :], 1)
        return int(number[0]) * unit

    def __repr__(self) -> str:
        """Mask secret values, since settings appear in tracebacks."""
        values = {field: getattr(self, field) for field in self.__struct_fields__}
        shown = (f"{f}={'***' if value and entry(f).secret else repr(value)}" for f, value in values.items())
        return f"Settings({', '.join(shown)})"


def variable(field: str) -> str:
    """Return the environment variable of a field."""
    return PREFIX + field.upper()


def from_environ(environ: Mapping[str, str], flags: Mapping[str, object] = {}) -> Settings:
    """Read the settings from `LOADSTONE_*` variables; `flags` (field to value, None if not given) override them.

    An empty variable counts as unset.  Raises SettingsError for an invalid value, and for a `LOADSTONE_*` variable that
    is not a setting: a misspelt name would otherwise be ignored silently.  Only service links are ignored.
    """
    known = {variable(field): field for field in Settings.__struct_fields__}
    values: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or not text or name in OF_CLIENTS:
            continue
        if SERVICE_LINK.fullmatch(f"{name}={text}"):
            continue
        if name not in known:
            raise SettingsError(f"{name} is not a setting of Loadstone. The documentation lists all settings.")
        values[known[name]] = _convert(name, text, known[name])
    for field, value in flags.items():
        if value is not None:
            values[field] = _convert(entry(field).flag, value, field)
    settings = Settings(**values)
    homes = {field: _expand(field, value) for field in PATHS if (value := getattr(settings, field)) is not None}
    return msgspec.structs.replace(settings, **homes)


def to_environ(settings: Settings) -> dict[str, str]:
    """Return the environment variables that give a child process these settings."""
    values = msgspec.to_builtins(settings, enc_hook=str)
    return {
        variable(field): str(value).lower() if isinstance(value, bool) else str(value)
        for field, value in values.items()
        if value is not None
    }


def entry(field: str) -> Entry:
    """Return the entry of a field."""
    return _ENTRIES[field]


def _entries() -> dict[str, Entry]:
    entries = {}
    for field, kind in get_type_hints(Settings, include_extras=True).items():
        meta = next(m for m in kind.__metadata__ if isinstance(m, Meta))
        facts = dict(meta.extra or {})
        facts["flag"] = facts["flag"] or "--" + field.replace("_", "-")
        entries[field] = Entry(kind=kind, meaning=meta.description or "", **facts)
    return entries


_ENTRIES = _entries()


def _convert(name: str, value: object, field: str) -> Any:
    """Convert `value` to the field's type.  Raises SettingsError, naming `name`, the variable or flag of the value."""
    about = entry(field)
    try:
        return msgspec.convert(value, about.kind, strict=False, dec_hook=_path)
    except (msgspec.ValidationError, UnicodeEncodeError):  # the second: of bytes that are not UTF-8
        shown = repr(str(value))
        if about.secret:
            scheme = re.match(r"[a-z][a-z0-9+.-]*://", str(value))
            shown = repr(f"{scheme[0] if scheme else ''}***")
        raise SettingsError(f"{name} is {shown}: it must be {about.allowed}.") from None


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    raise ValueError("not a path")


def _roots(models_dir: Path) -> list[Path]:
    return [Path(path) for path in str(models_dir).split(":") if path] or [models_dir]


def _expand(field: str, path: Path) -> Path:
    try:
        if field == "models_dir":
            return Path(":".join(str(root.expanduser()) for root in _roots(path)))
        return path.expanduser()
    except RuntimeError:  # the user does not exist or has no home directory
        raise SettingsError(
            f"{variable(field)} is '{path}': it must be {entry(field).allowed} (the home directory is unknown)."
        ) from None


def is_loopback(host: str) -> bool:
    """Return whether a host name or IP address (IPv6 with or without brackets) always means this machine."""
    host = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def redis_url(settings: Settings) -> str:
    """Return the URL of the Redis server.  Raises SettingsError if unset: only `loadstone up` embeds a server."""
    if not settings.redis_url:
        raise SettingsError(f"{variable('redis_url')} is not set: it must be a redis://, rediss:// or unix:// URL.")
    return settings.redis_url
