"""The directories of models: what lies in them, who may write to them, and how workers know that they share one."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, assert_never

from msgspec import Struct, structs

from worker.catalog import ollama
from worker.catalog.directory import read_start
from worker.catalog.keys import REPOSITORY

Kind = Literal["files", "huggingface", "ollama"]

ID_FILE = ".loadstone-store"  # hidden from the catalog
ID = re.compile(r"[0-9a-f]{32}")
OF_CACHE = re.compile(r"[a-z]+--.+", re.DOTALL)  # models, datasets, spaces


class ReadOnly(Exception):
    """No directory of models may be written to.  The message is a sentence, without paths."""


class Store(Struct, frozen=True):
    """A directory of models.

    `id`: equal for all workers that see this directory, wherever they have it mounted; "" until `identified`.
    `refusal`: why nothing is written to it, continuing a sentence that begins with the directory; "" if it may be.
    """

    id: str
    path: Path
    kind: Kind
    refusal: str

    @property
    def is_read_only(self) -> bool:
        return bool(self.refusal)


def kind(root: Path) -> Kind:
    """Return the kind of a directory of models, by what is in it.  Raises OSError if it cannot be listed.

    A directory in which folders of Hugging Face's cache lie beside others is one of files.
    """
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    if {ollama.MANIFESTS, ollama.BLOBS} <= folders:
        return "ollama"
    is_cache = any(REPOSITORY.fullmatch(folder) for folder in folders)
    return "huggingface" if is_cache and all(OF_CACHE.fullmatch(folder) for folder in folders) else "files"


def seen(root: Path) -> Store:
    """Look at a directory of models."""
    try:
        found, id_ = kind(root), _id(root)
    except OSError as e:
        return Store("", root, "files", f"cannot be read: {e.strerror}")
    return Store(id_, root, found, _refusal(root, found))


def writable(roots: Sequence[Path]) -> Store:
    """Return the first directory that may be written to, with its id.  Raises ReadOnly and OSError."""
    stores = [seen(root) for root in roots]
    for store in stores:
        if not store.is_read_only:
            return identified(store)
    reasons = "; ".join(f"{i}: it {store.refusal}" for i, store in enumerate(stores, 1))
    raise ReadOnly(f"No models directory may be written to ({reasons}).")


def identified(store: Store) -> Store:
    """Return the store with its id, which is created if there is none.  Raises OSError.

    Of several workers that create it at once, all get the same: link(2) is atomic on network file systems too.
    """
    if store.id:
        return store
    path, beside = store.path / ID_FILE, store.path / f"{ID_FILE}.{uuid.uuid4().hex}"
    beside.write_text(uuid.uuid4().hex)
    try:
        os.link(beside, path)
    except OSError:  # there is one now, or the file system has no links, and so belongs to one host
        if not _id(store.path):
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return structs.replace(store, id=_id(store.path))


def _id(root: Path) -> str:
    try:
        content = read_start(root / ID_FILE, 64).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""
    return content if ID.fullmatch(content) else ""


def _refusal(root: Path, kind: Kind) -> str:
    match kind:
        case "huggingface":
            return "is a cache of Hugging Face, which is only read"
        case "ollama":
            return "is a store of Ollama, which is only read"
        case "files":
            return "" if os.access(root, os.W_OK | os.X_OK) else "is not writable for the worker"
        case _:
            assert_never(kind)
