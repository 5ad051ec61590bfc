"""The keys that clients load models by, from the places of their files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from shared import quantization

GGUF = ".gguf"
SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})", re.DOTALL)


class Place(NamedTuple):
    """Where a model lies under the models directory, all its shards taken together."""

    folders: tuple[str, ...]
    stem: str  # of the file's name, without "-00001-of-00003"


class Named(NamedTuple):
    key: str
    base: str
    variant: str


class Shard(NamedTuple):
    place: Place
    no: int  # from 1
    of: int  # 0: the file is not one of several


def shard(path: str) -> Shard:
    """The model, and the part of it, that a file under the models directory is by its name."""
    *folders, name = PurePosixPath(path).parts
    stem = name[: -len(GGUF)] if name.lower().endswith(GGUF) else name
    split = SHARD.fullmatch(stem)
    if split is None or not 1 <= int(split["no"]) <= int(split["count"]):
        return Shard(Place(tuple(folders), stem), 1, 0)
    return Shard(Place(tuple(folders), split["stem"]), int(split["no"]), int(split["count"]))


def base(place: Place) -> str:
    """The key of a place, without a variant: `publisher/name`, `name`, or a bare file's stem."""
    if not place.folders:
        return place.stem.lower()
    *publisher, name = (folder.lower() for folder in place.folders[-2:])
    return "/".join([*publisher, name.removesuffix("-gguf") or name])


def publisher(place: Place) -> str:
    return place.folders[-2] if len(place.folders) >= 2 else ""


def name_all(places: Sequence[Place]) -> list[Named]:
    """A key for each place: never the same twice, and the same for the same set of places in any order.

    A base that several places share tells them apart by their quantizations, where that is not enough by their
    stems, and where even those are equal (the same file name in two folders) by a number in the order of the paths.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    bases = [base(place) for place in places]
    tags = [quantization.tag(place.stem) for place in places]
    n_base, n_tag = Counter(bases), Counter(zip(bases, tags, strict=True))
    variants = [
        tag if n_base[shared] == 1 or (tag and n_tag[shared, tag] == 1) else place.stem.lower()
        for place, shared, tag in zip(places, bases, tags, strict=True)
    ]
    wanted = [
        shared if n_base[shared] == 1 else f"{shared}@{variant}"
        for shared, variant in zip(bases, variants, strict=True)
    ]
    n_wanted = Counter(wanted)
    taken = {key for key in wanted if n_wanted[key] == 1}
    named: dict[int, Named] = {}
    for i in order:
        suffix, n = "", 1
        while n_wanted[wanted[i]] > 1 and wanted[i] + suffix in taken:
            n += 1
            suffix = f"-{n}"
        taken.add(wanted[i] + suffix)
        named[i] = Named(wanted[i] + suffix, bases[i], variants[i] + suffix if variants[i] else "")
    return [named[i] for i in range(len(places))]
