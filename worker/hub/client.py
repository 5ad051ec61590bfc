"""Reads from a hub of models over HTTP: only the configured one and the hosts that it may redirect to."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import httpcore
import msgspec
from msgspec import Struct

import shared
from shared.errors import DownloadFailed, ModelNotFound
from shared.settings import SettingsError
from worker.hub.choice import RemoteFile

PUBLIC = "https://huggingface.co"
# The hosts that the public hub, and mirrors of it, redirect to.
OF_PUBLIC = ("huggingface.co", "hf.co")
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
CONNECT_S = 10.0  # to one of the addresses of a host
READ_BYTES = 1 << 20  # of one read(2); httpcore's 64 KiB take four times the CPU time
MOST_LISTING_BYTES = 32 << 20
MOST_FILES = 100_000
MOST_FILE_BYTES = 1 << 42
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Access(Struct, frozen=True, kw_only=True):
    """How to reach the hub.  `hosts`: further `host` or `host:port` that it may redirect to."""

    endpoint: str = PUBLIC
    token: str = ""
    hosts: tuple[str, ...] = ()
    stall_s: float = 30.0  # time without a byte after which a connection is given up

    def __repr__(self) -> str:
        """Hide the token, since values appear in tracebacks."""
        return f"Access({self.endpoint})"


def access(environ: Mapping[str, str], hosts: str) -> Access:
    """Return the access that the variables of Hugging Face's own tools describe.  Raises SettingsError."""
    endpoint = environ.get("HF_ENDPOINT", "").strip() or PUBLIC
    try:
        origin = Origin.of(endpoint)
    except ValueError:
        origin = Origin("", "", 0)
    parts = urlsplit(endpoint)
    if origin.scheme not in ("https", "http") or not origin.host or "@" in parts.netloc or parts.query:
        raise SettingsError("HF_ENDPOINT must be an http:// or https:// URL, without a password.")
    token = environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise SettingsError("HF_TOKEN must have printable ASCII characters only.")
    named = tuple(host.strip() for host in hosts.split(",") if host.strip())
    return Access(endpoint=endpoint, token=token, hosts=named)


class Unavailable(Exception):
    """The request may succeed later, `after_s` seconds from now at the earliest.  The message is a sentence."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class Unreachable(Unavailable):
    """No connection to the host came about."""


class Gone(Exception):
    """A location that the hub gave is no longer valid."""


class Origin(NamedTuple):
    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Raises ValueError if the URL is malformed."""
        parts = urlsplit(url)
        return cls(parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0))


class Answer(NamedTuple):
    """The data of a file from the position `start` on, and the size of the file if the server tells it.

    `is_range` is False if the server ignored the range that was asked for, and sends the whole file.
    """

    start: int
    size: int | None
    chunks: Iterator[bytes]
    is_range: bool


class Repository(Struct, frozen=True):
    """The files of a repository at a commit."""

    name: str
    commit: str
    files: list[RemoteFile]


class _LFS(Struct):
    sha256: str = ""
    size: int = 0


class _Sibling(Struct):
    rfilename: str
    size: int | None = None
    lfs: _LFS | None = None


class _Info(Struct):
    sha: str
    siblings: list[_Sibling] = []
    id: str = ""


class Hub:
    """A client of the hub.  Its methods may be called by several threads."""

    def __init__(self, access: Access, connections: int = 1) -> None:
        self._access = access
        self._endpoint = access.endpoint.rstrip("/")
        self._origin = Origin.of(access.endpoint)
        self._named = {_host_and_port(host) for host in access.hosts} | {(self._origin.host, self._origin.port)}
        self._pool = httpcore.ConnectionPool(
            ssl.create_default_context(),
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=access.stall_s,
            network_backend=_Backend(self._is_named),
        )

    @property
    def stall_s(self) -> float:
        return self._access.stall_s

    def close(self) -> None:
        self._pool.close()

    def repository(self, name: str, revision: str) -> Repository:
        """List a repository at a revision.  Raises ModelNotFound, DownloadFailed and Unavailable."""
        url = f"{self._endpoint}/api/models/{quote(name)}/revision/{quote(revision, safe='')}?blobs=true"
        with self.get(url) as answer:
            self._check(answer, f"Repository '{name}' (revision '{revision}')")
            body = bytearray()
            for chunk in _chunks(answer):
                body += chunk
                if len(body) > MOST_LISTING_BYTES:
                    raise _wrong(f"The list of files of '{name}' exceeds {MOST_LISTING_BYTES:,} bytes.")
        try:
            info = msgspec.json.decode(body, type=_Info)
        except msgspec.MsgspecError as e:
            raise _wrong(f"The hub's reply about '{name}' is not a list of files: {e}.") from None
        if not COMMIT.fullmatch(info.sha) or len(info.siblings) > MOST_FILES:
            raise _wrong(f"The hub's reply about '{name}' has no commit, or more than {MOST_FILES:,} files.")
        return Repository(name, info.sha, [file for sibling in info.siblings if (file := _file(sibling))])

    def locate(self, repository: str, commit: str, path: str) -> str:
        """Return the URL that a file is read from.  Raises what `repository` raises."""
        url = f"{self._endpoint}/{quote(repository)}/resolve/{commit}/{quote(path)}"
        with self._sent(url, {"Range": "bytes=0-0"}) as (answer, where):
            self._check(answer, f"File '{path}' of '{repository}'")
            return where

    @contextmanager
    def read(self, url: str, start: int, end: int) -> Iterator[Answer]:
        """Read the bytes from `start` to before `end` of what `locate` returned.

        Raises Gone, Unavailable and DownloadFailed, also while the data is read.
        """
        with self._sent(url, {"Range": f"bytes={start}-{end - 1}"}) as (answer, _):
            if answer.status in (401, 403, 404, 410) and Origin.of(url) != self._origin:
                raise Gone
            self._check(answer, "The file")
            if answer.status == 200:
                length = _header(answer, "content-length")
                yield Answer(0, int(length) if length.isdecimal() else None, _chunks(answer), is_range=False)
                return
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", _header(answer, "content-range"))
            if found is None or int(found[1]) != start or int(found[2]) >= end:
                raise _wrong("The server sent another range of the file than was asked for.")
            yield Answer(start, int(found[3]), _chunks(answer), is_range=True)

    @contextmanager
    def get(self, url: str) -> Iterator[httpcore.Response]:
        with self._sent(url, {}) as (answer, _):
            yield answer

    @contextmanager
    def _sent(self, url: str, headers: dict[bytes | str, bytes | str]) -> Iterator[tuple[httpcore.Response, str]]:
        """Send a request, and follow redirects to allowed hosts; yield the response and its URL.

        The token goes to the hub only.  Raises Unavailable and DownloadFailed.
        """
        for _ in range(MOST_REDIRECTS + 1):
            origin = self._allowed(url)
            sent: dict[bytes | str, bytes | str] = {
                "Host": urlsplit(url).netloc.rpartition("@")[2],
                "User-Agent": f"loadstone/{shared.__version__}",
                "Accept-Encoding": "identity",
                **headers,
            }
            if self._access.token and origin == self._origin:
                sent["Authorization"] = f"Bearer {self._access.token}"
            with _translated(origin.host, self._access.stall_s):
                answer_of = self._pool.stream("GET", url, headers=sent, extensions={"timeout": self._timeouts()})
                with answer_of as answer:
                    location = _header(answer, "location")
                    if answer.status not in REDIRECTS or not location:
                        yield answer, url
                        return
            url = urljoin(url, location)
        raise _wrong(f"The hub redirects more than {MOST_REDIRECTS} times.")

    def _timeouts(self) -> dict[str, float]:
        return {"connect": CONNECT_S, "read": self._access.stall_s, "write": CONNECT_S, "pool": 60.0}

    def _allowed(self, url: str) -> Origin:
        """Return the origin of a URL.  Raises DownloadFailed if it is not one to read from."""
        try:
            origin = Origin.of(url)
        except ValueError:
            origin = Origin("", "", 0)
        of_public = origin.port == 443 and any(f".{origin.host}".endswith(f".{host}") for host in OF_PUBLIC)
        is_named = self._is_named(origin.host, origin.port)
        if "@" in urlsplit(url).netloc or origin.scheme not in ("https", "http") or not (is_named or of_public):
            raise _wrong(f"The hub redirects to '{origin.host}:{origin.port}', which is not an allowed host.")
        if origin.scheme != "https" == self._origin.scheme:
            raise _wrong(f"The hub redirects to '{origin.host}:{origin.port}' without TLS.")
        return origin

    def _is_named(self, host: str, port: int) -> bool:
        return (host, port) in self._named

    def _check(self, answer: httpcore.Response, what: str) -> None:
        """Raise the error that a response means, if any."""
        status = answer.status
        if status in (200, 206):
            return
        if status == 429 or status >= 500:
            wait = _header(answer, "retry-after")
            raise Unavailable(f"The hub replied with status {status}.", float(wait) if wait.isdecimal() else 0.0)
        code = _header(answer, "x-error-code")
        if status in (401, 403) and code != "RepoNotFound":
            hint = "Request access on its page" if self._access.token else "Set HF_TOKEN of the worker"
            raise DownloadFailed("gated_repository", f"{what}: access is restricted. {hint}, then try again.")
        if status in (401, 403, 404):
            raise ModelNotFound(f"{what} does not exist on the hub, or is private.", param="model")
        raise _wrong(f"{what}: the hub replied with status {status}.")


def _file(sibling: _Sibling) -> RemoteFile | None:
    """Return a file as the hub lists it; None if it has no size that a file can have."""
    lfs = sibling.lfs
    size = lfs.size if lfs is not None and lfs.size else sibling.size
    if size is None or not 0 <= size <= MOST_FILE_BYTES:
        return None
    digest = lfs.sha256.removeprefix("sha256:") if lfs is not None else ""
    return RemoteFile(sibling.rfilename, size, digest if SHA256.fullmatch(digest) else None)


def _wrong(sentence: str) -> DownloadFailed:
    return DownloadFailed("invalid_hub_reply", sentence)


def _header(answer: httpcore.Response, name: str) -> str:
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in answer.headers if key.lower() == wanted), "")


def _chunks(answer: httpcore.Response) -> Iterator[bytes]:
    stream = answer.stream
    assert isinstance(stream, Iterable)
    yield from stream


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    return parts.hostname or "", parts.port or 443


@contextmanager
def _translated(host: str, stall_s: float) -> Iterator[None]:
    """Translate faults of a connection.  The text of some contains what was sent, so it is not shown."""
    try:
        yield
    except httpcore.ConnectTimeout:
        raise Unreachable(f"'{host}' cannot be reached: no answer within {CONNECT_S:g} s.") from None
    except httpcore.TimeoutException:
        raise Unavailable(f"'{host}' sent nothing for {stall_s:g} s.") from None
    except httpcore.ConnectError as e:
        cause = e.args[0] if e.args else None
        if isinstance(cause, ssl.SSLCertVerificationError):  # it would be the same the next time
            why = f"The certificate of '{host}' cannot be verified: {cause.verify_message.rstrip('.')}"
            hint = "Set SSL_CERT_FILE of the worker if it is of an authority of your own"
            raise DownloadFailed("hub_unavailable", f"{why}. {hint}.") from None
        raise Unreachable(f"'{host}' cannot be reached: {e}.") from None
    except (httpcore.NetworkError, httpcore.ProtocolError):
        raise Unavailable(f"The connection to '{host}' broke.") from None
    except httpcore.UnsupportedProtocol:
        raise _wrong(f"'{host}' is reached neither by HTTP nor by HTTPS.") from None


class _Backend(httpcore.SyncBackend):
    """Connects to addresses of the internet, and to hosts that are configured, wherever they are.

    The addresses of a host share the time.
    The address that is checked is the one that is connected to: a name may resolve to another one the next time.
    """

    def __init__(self, is_named: Callable[[str, int], bool]) -> None:
        self._is_named = is_named
        self._silent: set[str] = set()  # addresses that did not answer, which are tried last

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:
            raise httpcore.ConnectError(f"its name cannot be resolved ({getattr(e, 'strerror', e)})") from None
        addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
        if not self._is_named(host, port):
            addresses = [one for one in addresses if ipaddress.ip_address(one.partition("%")[0]).is_global]
            if not addresses:
                raise httpcore.ConnectError("its address is not one of the internet")
        addresses = sorted(_alternating(addresses), key=lambda one: one in self._silent)
        deadline = time.monotonic() + (CONNECT_S if timeout is None else timeout)
        for n_left in range(len(addresses), 0, -1):
            address = addresses[-n_left]
            share_s = max(0.0, deadline - time.monotonic()) / n_left
            try:
                stream = super().connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                self._silent.add(address)
                if n_left == 1:
                    raise
            else:
                self._silent.discard(address)
                return _Stream(stream)
        raise AssertionError("there is at least one address")


def _alternating(addresses: Iterable[str]) -> list[str]:
    """Alternate between IPv6 and IPv4, of which one may lead nowhere."""
    families: dict[bool, list[str]] = {}
    for address in addresses:
        families.setdefault(":" in address, []).append(address)
    return [one for pair in zip_longest(*families.values()) for one in pair if one is not None]


class _Stream(httpcore.NetworkStream):
    """A connection that reads more at once."""

    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max(max_bytes, READ_BYTES), timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
