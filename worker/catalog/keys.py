"""Derives the keys by which clients load models from the paths of their files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from shared import quantization

GGUF = ".gguf"
SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
REPOSITORY = re.compile(r"models--(?:(?P<owner>.+?)--)?(?P<name>.+)", re.DOTALL)  # a folder of Hugging Face's cache
SNAPSHOTS = "snapshots"  # its subfolder with a folder for each revision
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Place(NamedTuple):
    """The location of a model under a models directory; all its shards share it."""

    folders: tuple[str, ...]
    stem: str  # of the file's name, without the suffix of a shard ("-00001-of-00003")
    revision: str = ""  # of a repository in Hugging Face's cache, unless it is the current one
    root: int = 0  # index of the models directory
    variant: str = ""  # of a key in a store of Ollama: the tag in lower case


class Home(NamedTuple):
    """The folder that names a model, and the models beside it."""

    folders: tuple[str, ...]
    revision: str = ""
    root: int = 0
    variant: str = ""


class Named(NamedTuple):
    key: str
    base: str
    variant: str


class Shard(NamedTuple):
    place: Place
    no: int  # from 1
    of: int  # number of shards; 0: the model is a single file


def shard(path: str, revision: str = "", root: int = 0) -> Shard:
    """Return the model's location and the shard number that a path under a models directory encodes."""
    *folders, name = PurePosixPath(path).parts
    stem = name[: -len(GGUF)] if name.lower().endswith(GGUF) else name
    split = SHARD.fullmatch(stem)
    if split is None or not 1 <= int(split["no"]) <= int(split["count"]):
        return Shard(Place(tuple(folders), stem, revision, root), 1, 0)
    return Shard(Place(tuple(folders), split["stem"], revision, root), int(split["no"]), int(split["count"]))


def tagged(name: str, root: int = 0) -> Place:
    """Return the location of a model with this name in a store of Ollama, `publisher/name/tag` or `name/tag`."""
    *folders, tag = name.split("/")
    return Place(tuple(folders), tag, root=root, variant=tag.lower())


def snapshot(folders: Sequence[str]) -> int | None:
    """Return the index of the folder of a revision in Hugging Face's cache, `models--OWNER--NAME/snapshots/COMMIT`.

    None if no folder is one.
    """
    for i in range(len(folders) - 1, 1, -1):
        if folders[i - 1] == SNAPSHOTS and REPOSITORY.fullmatch(folders[i - 2]) and COMMIT.fullmatch(folders[i]):
            return i
    return None


def home(place: Place) -> Home:
    """Return the folder that names a model: not a folder for one quantization, nor one of Hugging Face's cache."""
    return Home(_split(place.folders)[0], place.revision, place.root, place.variant)


def tag(place: Place) -> str:
    """Return the quantization that the names of a file and its folder tell, in lower case; "" if they tell none."""
    of_folder, of_file = quantization.tag(_split(place.folders)[1]), quantization.tag(place.stem)
    return of_folder if of_folder.endswith(of_file) else of_file  # UD-Q2_K_XL/m-Q2_K_XL.gguf


def title(place: Place) -> str:
    """Return what is shown of a model without a name in its header."""
    return f"{place.folders[-1]}:{place.stem}" if place.variant else place.stem


def label(place: Place) -> str:
    """Return the quantization that the names of a file and its folder tell, as it is shown; "" if they tell none."""
    return re.sub(r"^FP(?=\d)", "F", tag(place).upper())


def _split(folders: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Return the folders that name a model, and the folder for one of its quantizations, "" if there is none."""
    if (i := snapshot(folders)) is not None and (repository := REPOSITORY.fullmatch(folders[i - 2])):
        owner, name = repository["owner"], repository["name"]
        return ((owner, name) if owner else (name,)), folders[-1] if len(folders) > i + 1 else ""
    if len(folders) >= 2 and _is_quantization(folders[-1], folders[-2]):
        return folders[:-1], folders[-1]
    return folders, ""


def _is_quantization(folder: str, parent: str) -> bool:
    """Return whether a folder is for one quantization of the model that its parent names: `M-GGUF/Q8_0`, `M/M-Q8_0`."""
    found, folder, parent = quantization.tag(folder), folder.lower(), parent.lower()
    is_part = parent.endswith("-gguf") or folder.removesuffix(found).rstrip("-_.") == parent
    return bool(found) and (found == folder or is_part)


def base(place: Place) -> str:
    """Return the key of a place without its variant: `publisher/name`, `name`, or the stem of a file in no folder."""
    folders = home(place).folders
    if not folders:
        return place.stem.lower()
    *publisher, name = (folder.lower() for folder in folders[-2:])
    key = "/".join([*publisher, name.removesuffix("-gguf") or name])
    return f"{key}@{place.revision}" if place.revision else key


def publisher(home: Home) -> str:
    return home.folders[-2] if len(home.folders) >= 2 else ""


def name_all(models: Sequence[Place], others: Sequence[Place] = ()) -> list[Named]:
    """Return a unique key for each model, then for each of `others`.  The keys do not depend on the places' order.

    Places with the same base get a variant: their tag or quantization or, if it is not unique, their stem.  If
    the stems are equal too (the same file name in two folders), a number in the order of the paths is appended.

    `others` are files that cannot be loaded.  They have no influence on the keys of models.
    """
    told = [_Told(place, base(place), place.variant or tag(place)) for place in (*models, *others)]
    named = _name(told[: len(models)], told[: len(models)], set())
    return named + _name(told[len(models) :], told, {name.key for name in named})


class _Told(NamedTuple):
    """A place, and what its path tells."""

    place: Place
    base: str
    tag: str  # the quantization, or the tag of Ollama


def _name(places: Sequence[_Told], among: Sequence[_Told], taken: set[str]) -> list[Named]:
    """Return a key for each place that is unique `among` all, and not in `taken`."""
    n_base, n_tag = Counter(told.base for told in among), Counter((told.base, told.tag) for told in among)
    variants = [
        told.tag
        if n_base[told.base] == 1 or (told.tag and n_tag[told.base, told.tag] == 1)
        else told.place.stem.lower()
        for told in places
    ]
    preferred = [
        told.base if n_base[told.base] == 1 else f"{told.base}@{variant}"
        for told, variant in zip(places, variants, strict=True)
    ]
    n_preferred = Counter(preferred)
    assigned = taken | {key for key in preferred if n_preferred[key] == 1}
    named: dict[int, Named] = {}
    for i in sorted(range(len(places)), key=lambda i: places[i].place):
        suffix, n = "", 1
        is_unique = n_preferred[preferred[i]] == 1 and preferred[i] not in taken
        while not is_unique and preferred[i] + suffix in assigned:
            n += 1
            suffix = f"-{n}"
        assigned.add(preferred[i] + suffix)
        named[i] = Named(preferred[i] + suffix, places[i].base, variants[i] + suffix if variants[i] else "")
    return [named[i] for i in range(len(places))]
