"""Downloads of models: what is fetched, and the record of a job with its lifecycle."""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Struct

from shared.errors import ErrorBody, InvalidValue

PREFIX = "job_"  # of the ids of downloads
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")  # of the URLs that name a model; its hub is a setting
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
REPOSITORY = re.compile(rf"{NAME}/{NAME}")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+,()=@-]{0,199}")
MOST_FOLDERS = 4
MOST_FILES = 1000  # of one model
SHOWN = 200  # characters of a name in an error

Wanted = Literal["run", "pause", "cancel"]


class State(StrEnum):
    DOWNLOADING = "downloading"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Event(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    FINISH = "finish"  # the files are in their place
    FAIL = "fail"
    CANCEL = "cancel"


S, E = State, Event

NEXT: dict[State, dict[Event, State]] = {  # a state without a row is terminal
    S.DOWNLOADING: {E.PAUSE: S.PAUSED, E.FINISH: S.COMPLETED, E.FAIL: S.FAILED, E.CANCEL: S.CANCELLED},
    S.PAUSED: {E.RESUME: S.DOWNLOADING, E.CANCEL: S.CANCELLED},
    S.FAILED: {E.RESUME: S.DOWNLOADING, E.CANCEL: S.CANCELLED},
}
OVER = frozenset({S.COMPLETED, S.FAILED, S.CANCELLED})  # nothing happens to it until a client asks


class IllegalTransition(Exception):
    """The event is not permitted in this state.  Nothing was changed."""


class File(Struct, frozen=True):
    """A file of a repository.  `sha256` is None if the hub does not tell it."""

    path: str
    size: int
    sha256: str | None = None


class Plan(Struct, frozen=True, kw_only=True):
    """The files of one model at a commit: what is fetched, whenever it is."""

    repository: str
    commit: str
    files: list[File]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """Name the plan: two downloads with the same digest fetch the same."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:32]


class InspectRequest(Struct, frozen=True, kw_only=True):
    """Asks a worker what a download would fetch."""

    repository: str
    revision: str
    quantization: str | None


class Offer(Struct, frozen=True, kw_only=True, tag="offer"):
    """What a download would fetch, and where to.  `is_here`: the files are there already."""

    plan: Plan
    store: str  # id of the models directory
    is_here: bool
    free_bytes: int  # without what is kept free


class Refusal(Struct, frozen=True, tag="refusal"):
    """Why a worker cannot download it."""

    error: ErrorBody


class Removed(Struct, frozen=True, tag="removed"):
    """The files of a model are removed."""


class Download(Struct, frozen=True, kw_only=True):
    """The record of a download.  Times are seconds since the epoch."""

    id: str
    model: str  # as the client named it
    worker: str
    store: str  # id of the models directory
    plan: Plan
    state: State = State.DOWNLOADING
    rev: int = 1
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    downloaded_bytes: int = 0
    bytes_per_second: float | None = None
    error: ErrorBody | None = None

    @property
    def target(self) -> str:
        """Name what is fetched and where to: there is one live download of it."""
        return f"{self.store}:{self.plan.digest}"

    @property
    def ids(self) -> dict[str, str]:
        """The fields that log lines about this download carry."""
        return {"job_id": self.id, "repository": self.plan.repository}

    def after(self, event: Event, at: float, error: ErrorBody | None = None) -> Download:
        """Return the record after `event`.  Raises IllegalTransition."""
        following = NEXT.get(self.state, {}).get(event)
        if following is None:
            raise IllegalTransition(f"{event} while {self.state}")
        return msgspec.structs.replace(
            self,
            state=following,
            error=error,
            completed_at=at if following in OVER else None,
            bytes_per_second=None,
            downloaded_bytes=self.plan.total_bytes if following is State.COMPLETED else self.downloaded_bytes,
        )


class Source(NamedTuple):
    """What a client names: a repository, and a quantization or a revision if it tells them."""

    repository: str
    quantization: str | None = None
    revision: str | None = None


def source(model: str) -> Source:
    """Return what a name means: `org/name`, `org/name@quantization`, or the URL of either or of a file.

    Raises InvalidValue.
    """
    name, quantization, revision = model, None, None
    if "://" in model:
        try:
            parts = urlsplit(model)
        except ValueError:
            raise _invalid(model, "the URL is malformed") from None
        if parts.scheme not in ("https", "http") or parts.netloc.lower() not in HOSTS:
            raise _invalid(model, f"a URL begins with https://{HOSTS[0]}/")
        folders = [unquote(folder) for folder in parts.path.strip("/").split("/")]
        name, rest = "/".join(folders[:2]), folders[2:]
        if len(rest) >= 2 and rest[0] in ("tree", "blob", "resolve"):
            revision, quantization = rest[1], "/".join(rest[2:]) or None
        elif rest:
            raise _invalid(model, "a URL is that of a repository or of one of its files")
    elif "@" in model:
        name, _, quantization = model.partition("@")
    if not is_repository(name):
        raise _invalid(model, "expected 'publisher/name', 'publisher/name@quantization' or a Hugging Face URL")
    if quantization == "":
        raise _invalid(model, "the quantization after '@' is missing")
    return Source(name, quantization, revision)


def is_repository(name: str) -> bool:
    return bool(REPOSITORY.fullmatch(name)) and ".." not in name and "--" not in name


def is_revision(name: str) -> bool:
    return bool(REVISION.fullmatch(name)) and ".." not in name


def is_path(path: str) -> bool:
    """Return whether a path of a repository may be one under the models directory."""
    folders = path.split("/")
    return len(folders) <= MOST_FOLDERS and all(FOLDER.fullmatch(folder) for folder in folders)


def _invalid(model: str, what: str) -> InvalidValue:
    return InvalidValue(f"'model': {what}, got {model[:SHOWN]!r}.", param="model")
