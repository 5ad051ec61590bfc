"""Lists the models of a store of Ollama.  Always terminates, opens no model, and stays inside the store.

A manifest, `manifests/HOST/NAMESPACE/NAME/TAG`, names the files of a model by their digests; they are in `blobs`.  As
Ollama does it in August 2026 (its manifest/manifest.go and types/model/name.go).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.schema.model import FileStat
from worker.catalog.directory import OUTSIDE, Candidate, holds, read_start

MANIFESTS, BLOBS = "manifests", "blobs"
LIBRARY = "library"  # the namespace of models that have none in their names
DEPTH = 4  # of a manifest
MOST_BYTES = 1 << 20  # of a manifest; those of models in GGUF have some hundreds
DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
LAYER = "application/vnd.ollama.image."
MODEL, PROJECTOR, ADAPTER = f"{LAYER}model", f"{LAYER}projector", f"{LAYER}adapter"

UNREADABLE = "has a manifest that cannot be read"
NO_MODEL = "has no GGUF file"
ADAPTED = "has a LoRA adapter, which is not supported"


class Layer(Struct, frozen=True, rename="camel"):
    media_type: str
    digest: str


class Manifest(Struct, frozen=True):
    layers: list[Layer]


_decode = msgspec.json.Decoder(Manifest).decode


def walk(store: Path) -> list[Candidate]:
    """Return the files of all models, sorted by name.  Links to manifests are not followed.

    Raises OSError if the store cannot be listed.
    """
    root = os.path.realpath(store)
    if not holds(root, os.path.realpath(f"{root}/{MANIFESTS}")):
        return [Candidate(MANIFESTS, refusal=OUTSIDE, is_folder=True)]
    names = sorted(_names(f"{root}/{MANIFESTS}", DEPTH))
    return [candidate for name in names for candidate in _files(root, name)]


def _names(folder: str, depth: int) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the manifests below a folder, as their parts."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not _is_utf8(entry.name):
                    continue
                if depth > 1 and entry.is_dir(follow_symlinks=False):
                    yield from ((entry.name, *rest) for rest in _names(entry.path, depth - 1))
                elif depth == 1 and entry.is_file(follow_symlinks=False):
                    yield (entry.name,)
    except OSError:
        if depth == DEPTH:
            raise


def _files(root: str, name: tuple[str, ...]) -> Iterator[Candidate]:
    """Yield the files of the model with a manifest."""
    path = "/".join([MANIFESTS, *name])
    named = "/".join(part for i, part in enumerate(name[1:]) if i or part != LIBRARY)
    try:
        layers = _decode(read_start(Path(root, path), MOST_BYTES)).layers
    except (OSError, msgspec.MsgspecError):
        yield Candidate(path, refusal=UNREADABLE, named=named)
        return
    by_type = {layer.media_type: layer for layer in layers}  # as Ollama: the last of a type counts
    if MODEL not in by_type or ADAPTER in by_type:
        yield Candidate(path, refusal=ADAPTED if ADAPTER in by_type else NO_MODEL, named=named)
        return
    yield _file(root, by_type[MODEL], Candidate(path, named=named))
    if (
        PROJECTOR in by_type
        and not (projector := _file(root, by_type[PROJECTOR], Candidate(path, named=named))).refusal
    ):
        yield projector


def _file(root: str, layer: Layer, of: Candidate) -> Candidate:
    digest = DIGEST.fullmatch(layer.digest)
    if digest is None:
        return of._replace(refusal=UNREADABLE)
    path = f"{BLOBS}/sha256-{digest[1]}"
    try:
        info = Path(root, path).stat()
    except OSError as e:
        return of._replace(path=path, refusal=f"cannot be read: {e.strerror}")
    if not holds(root, os.path.realpath(f"{root}/{path}")):
        return of._replace(path=path, refusal=OUTSIDE)
    return of._replace(path=path, stat=FileStat.of(info))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
