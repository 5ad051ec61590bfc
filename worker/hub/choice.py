"""Chooses the files of a repository that are one model in one quantization, by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from shared import lookup
from shared.errors import InvalidValue
from shared.schema.model import Model
from worker.catalog import keys
from worker.catalog.keys import GGUF, Place

# What repositories have beside models: image encoders, importance matrices, and draft models, by the names that
# llama.cpp knows them by (common/download.cpp).
BESIDE = re.compile(r"(?i:mmproj|imatrix)|(mtp|eagle3|dflash|dspark)-")
REPOSITORY = ("", "-gguf")  # the folders around its files: a folder whose name tells a quantization is for this one
MOST_SHOWN = 50  # candidates in an error


class RemoteFile(Struct, frozen=True):
    """A file of a repository.  `sha256` is None if the hub does not tell it."""

    path: str  # in the repository, with slashes
    size: int  # bytes
    sha256: str | None = None


class Quantization(Struct, frozen=True):
    """The files of one model in one quantization, first shard first."""

    name: str  # its label, or the path without suffix if no label tells it from the others
    label: str  # "Q4_K_M"; "" if the names of the files tell none
    files: list[RemoteFile]

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


def quantizations(files: Sequence[RemoteFile]) -> list[Quantization]:
    """Return what a repository offers, the smallest first.  A model of which a shard is missing is left out."""
    groups: dict[Place, dict[int, dict[int, RemoteFile]]] = {}  # by number of shards, then by number
    for file in files:
        if file.path.lower().endswith(GGUF) and not BESIDE.search(file.path.rpartition("/")[2]):
            place, no, of = keys.shard(file.path)
            groups.setdefault(place, {}).setdefault(of, {})[no] = file
    complete = {
        place: [parts[no] for no in sorted(parts)]
        for place, splits in groups.items()
        for of, parts in sorted(splits.items(), reverse=True)  # a single file has precedence
        if len(parts) >= of
    }
    labels = {place: keys.label(place._replace(folders=REPOSITORY + place.folders)) for place in complete}
    n = Counter(labels.values())
    found = [
        Quantization(label if label and n[label] == 1 else _path(place), label, complete[place])
        for place, label in labels.items()
    ]
    return sorted(found, key=lambda one: (one.size_bytes, one.name))


def choose(files: Sequence[RemoteFile], quantization: str | None) -> list[RemoteFile]:
    """Return the files of one model, first shard first.

    `quantization`: its name, or the name or path of the file, in any case; None: what the plain key of these files
    would select.  Raises InvalidValue, with the candidates, if that is none or more than one.
    """
    offered = quantizations(files)
    if not offered:
        raise InvalidValue("The repository has no GGUF model.", param="model")
    if quantization is None:
        label = _preferred(offered).label
        fitting = [one for one in offered if one.label == label]
        what = f"several models{f' in {label}' if label else ''}"
    else:
        fitting = [one for one in offered if quantization.lower().removesuffix(GGUF) in _names(one)]
        what = f"several models in '{quantization}'" if fitting else f"no model in '{quantization}'"
    if len(fitting) == 1:
        return fitting[0].files
    raise _unclear(what, fitting or offered)


def _preferred(offered: Sequence[Quantization]) -> Quantization:
    """Return what a plain key selects, by the rule for models on a disk."""
    models = [
        Model(
            key=str(i),
            base="",
            variant=one.name.lower(),
            shards=[],
            size_bytes=one.size_bytes,
            quantization=one.label or None,
        )
        for i, one in enumerate(offered)
    ]
    return offered[models.index(lookup.preferred(models))]


def _names(one: Quantization) -> set[str]:
    """Return the names that choose it, in lower case."""
    place = keys.shard(one.files[0].path).place
    first = one.files[0].path.lower().removesuffix(GGUF)
    names = {one.label.lower(), keys.tag(place), place.stem.lower(), _path(place).lower(), first}
    return {*names, first.rpartition("/")[2]} - {""}


def _path(place: Place) -> str:
    return "/".join([*place.folders, place.stem])


def _unclear(what: str, candidates: Sequence[Quantization]) -> InvalidValue:
    shown = candidates[:MOST_SHOWN]
    more = f" and {len(candidates) - MOST_SHOWN} more" if len(candidates) > MOST_SHOWN else ""
    return InvalidValue(
        f"The repository has {what}. Name one of: {', '.join(one.name for one in shown)}{more}.",
        param="quantization",
        candidates=[{"quantization": one.name, "size_bytes": one.size_bytes} for one in shown],
    )
