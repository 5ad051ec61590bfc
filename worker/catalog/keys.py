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


class Place(NamedTuple):
    """The location of a model under the models directory; all its shards share it."""

    folders: tuple[str, ...]
    stem: str  # of the file's name, without the suffix of a shard ("-00001-of-00003")


class Named(NamedTuple):
    key: str
    base: str
    variant: str


class Shard(NamedTuple):
    place: Place
    no: int  # from 1
    of: int  # number of shards; 0: the model is a single file


def shard(path: str) -> Shard:
    """Return the model's location and the shard number that a path under the models directory encodes."""
    *folders, name = PurePosixPath(path).parts
    stem = name[: -len(GGUF)] if name.lower().endswith(GGUF) else name
    split = SHARD.fullmatch(stem)
    if split is None or not 1 <= int(split["no"]) <= int(split["count"]):
        return Shard(Place(tuple(folders), stem), 1, 0)
    return Shard(Place(tuple(folders), split["stem"]), int(split["no"]), int(split["count"]))


def base(place: Place) -> str:
    """Return the key of a place without its variant: `publisher/name`, `name`, or the stem of a file in no folder."""
    if not place.folders:
        return place.stem.lower()
    *publisher, name = (folder.lower() for folder in place.folders[-2:])
    return "/".join([*publisher, name.removesuffix("-gguf") or name])


def publisher(place: Place) -> str:
    return place.folders[-2] if len(place.folders) >= 2 else ""


def name_all(places: Sequence[Place]) -> list[Named]:
    """Return a unique key for each place.  The keys depend on the set of places, not on their order.

    Places with the same base get a variant: their quantization or, if it is not unique, their stem.  If the stems are
    equal too (the same file name in two folders), a number in the order of the paths is appended.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    bases = [base(place) for place in places]
    tags = [quantization.tag(place.stem) for place in places]
    n_base, n_tag = Counter(bases), Counter(zip(bases, tags, strict=True))
    variants = [
        tag if n_base[shared] == 1 or (tag and n_tag[shared, tag] == 1) else place.stem.lower()
        for place, shared, tag in zip(places, bases, tags, strict=True)
    ]
    preferred = [
        shared if n_base[shared] == 1 else f"{shared}@{variant}"
        for shared, variant in zip(bases, variants, strict=True)
    ]
    n_preferred = Counter(preferred)
    assigned = {key for key in preferred if n_preferred[key] == 1}
    named: dict[int, Named] = {}
    for i in order:
        suffix, n = "", 1
        while n_preferred[preferred[i]] > 1 and preferred[i] + suffix in assigned:
            n += 1
            suffix = f"-{n}"
        assigned.add(preferred[i] + suffix)
        named[i] = Named(preferred[i] + suffix, bases[i], variants[i] + suffix if variants[i] else "")
    return [named[i] for i in range(len(places))]
