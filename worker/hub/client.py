"""Reads from a hub of models over HTTP: only the configured one and the hosts that it may redirect to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import msgspec
from msgspec import Struct

import shared
from shared.errors import DownloadFailed, ModelNotFound
from shared.settings import SettingsError
from worker.hub.choice import RemoteFile
from worker.hub.connection import Connections, Origin, Unavailable

PUBLIC = "https://huggingface.co"
# The hosts that the public hub, and mirrors of it, redirect to.
OF_PUBLIC = ("huggingface.co", "hf.co")
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
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


class Gone(Exception):
    """A location that the hub gave is no longer valid."""


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

    def __init__(self, access: Access) -> None:
        self._access = access
        self._endpoint = access.endpoint.rstrip("/")
        self._origin = Origin.of(access.endpoint)
        self._named = {_host_and_port(host) for host in access.hosts} | {(self._origin.host, self._origin.port)}
        self._connections = Connections(self._is_named, access.stall_s)

    @property
    def stall_s(self) -> float:
        return self._access.stall_s

    def close(self) -> None:
        self._connections.close()

    def repository(self, name: str, revision: str) -> Repository:
        """List a repository at a revision.  Raises ModelNotFound, DownloadFailed and Unavailable."""
        url = f"{self._endpoint}/api/models/{quote(name)}/revision/{quote(revision, safe='')}?blobs=true"
        with self._sent(url, {}) as (answer, where):
            self._check(answer, f"Repository '{name}' (revision '{revision}')")
            body = bytearray()
            for chunk in self._chunks(answer, where):
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
        with self._sent(url, {"Range": f"bytes={start}-{end - 1}"}) as (answer, where):
            if answer.status in (401, 403, 404, 410) and Origin.of(url) != self._origin:
                raise Gone
            self._check(answer, "The file")
            if answer.status == 200:
                yield Answer(0, answer.length, self._chunks(answer, where), is_range=False)
                return
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("content-range", ""))
            if found is None or int(found[1]) != start or int(found[2]) >= end:
                raise _wrong("The server sent another range of the file than was asked for.")
            yield Answer(start, int(found[3]), self._chunks(answer, where), is_range=True)

    @contextmanager
    def _sent(self, url: str, headers: Mapping[str, str]) -> Iterator[tuple[HTTPResponse, str]]:
        """Send a request, and follow redirects to allowed hosts; yield the response and its URL.

        The token goes to the hub only.  Raises Unavailable and DownloadFailed.
        """
        for _ in range(MOST_REDIRECTS + 1):
            origin = self._allowed(url)
            sent = {"User-Agent": f"loadstone/{shared.__version__}", **headers}
            if self._access.token and origin == self._origin:
                sent["Authorization"] = f"Bearer {self._access.token}"
            with self._connections.get(url, sent) as answer:
                location = answer.headers.get("location", "")
                if answer.status not in REDIRECTS or not location:
                    yield answer, url
                    return
            url = urljoin(url, location)
        raise _wrong(f"The hub redirects more than {MOST_REDIRECTS} times.")

    def _chunks(self, answer: HTTPResponse, url: str) -> Iterator[bytes]:
        return self._connections.chunks(answer, Origin.of(url).host)

    def _allowed(self, url: str) -> Origin:
        """Return the origin of a URL.  Raises DownloadFailed if it is not one to read from."""
        try:
            origin = Origin.of(url)
        except ValueError:
            origin = Origin("", "", 0)
        of_public = origin.port == 443 and any(f".{origin.host}".endswith(f".{host}") for host in OF_PUBLIC)
        is_named = self._is_named(origin.host, origin.port)
        if not re.fullmatch("[!-~]+", url) or "@" in urlsplit(url).netloc:
            raise _wrong("The hub redirects to what is not a URL of a file.")
        if origin.scheme not in ("https", "http") or not (is_named or of_public):
            raise _wrong(f"The hub redirects to '{origin.host}:{origin.port}', which is not an allowed host.")
        if origin.scheme != "https" == self._origin.scheme:
            raise _wrong(f"The hub redirects to '{origin.host}:{origin.port}' without TLS.")
        return origin

    def _is_named(self, host: str, port: int) -> bool:
        return (host, port) in self._named

    def _check(self, answer: HTTPResponse, what: str) -> None:
        """Raise the error that a response means, if any."""
        status = answer.status
        if status in (200, 206):
            return
        if status == 429 or status >= 500:
            wait = answer.headers.get("retry-after", "")
            raise Unavailable(f"The hub replied with status {status}.", float(wait) if wait.isdecimal() else 0.0)
        code = answer.headers.get("x-error-code", "")
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


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    return parts.hostname or "", parts.port or 443
