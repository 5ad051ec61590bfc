"""Finds the models that a projector belongs to: the image encoder of a vision model, in a file of its own.

Nothing in a projector names its model for certain, and a folder may have several models.  The evidence is, in this
order: the names of the files, the names in their headers, and the embedding length that the projector produces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from shared import quantization

GENERIC = frozenset({"mmproj", "model", "ggml", "gguf", "projector", "vision", "encoder", "imat", "imatrix", "i1"})

Words = tuple[str, ...]


class Described(Struct, frozen=True):
    """The names of a file and its header, and the embedding length of the model, 0 if it is unknown.

    `is_exact`, of a projector: its header describes the model that it belongs to.  Old ones describe the encoder.
    """

    stem: str
    names: Sequence[str] = ()
    width: int = 0
    is_exact: bool = False


def owners(projector: Described, models: Sequence[Described], *, in_folder: bool) -> set[Words]:
    """Return the models that a projector belongs to, by the `words` of their stems.

    `models` are the files beside it: all quantizations of one or more models.  `in_folder`: their folder names a model,
    so that the projector belongs to all of them if nothing tells them apart.
    """
    possible = [model for model in models if not (projector.is_exact and _differs(projector, model))]
    fitting = _words_of(model for model in possible if projector.width and model.width == projector.width)
    if named := _named(projector, possible):
        return named & fitting or named
    is_of_another = bool(words(projector.stem) or (projector.is_exact and projector.names))
    if is_of_another and not in_folder:
        return set()
    is_alone = len(_words_of(models)) == 1
    return fitting or (_words_of(possible) if in_folder or is_alone else set())


def words(name: str) -> Words:
    """Split a name into words, in lower case, without its quantization and words that name no model."""
    found = re.findall(r"[^\W_]+", quantization.TAG.sub(" ", name).lower())
    return tuple(word for word in found if word not in GENERIC)


def _words_of(models: Iterable[Described]) -> set[Words]:
    return {words(model.stem) for model in models}


def _differs(projector: Described, model: Described) -> bool:
    return bool(projector.width and model.width) and projector.width != model.width


def _named(projector: Described, models: Sequence[Described]) -> set[Words]:
    """Return the models that share the first possible name with a projector; else those that it is a part of."""
    names = _all_words(projector)
    for name in names:
        if same := _words_of(model for model in models if name in _all_words(model)):
            return same
    for name in names:
        if related := _words_of(model for model in models if any(_is_part(name, of) for of in _all_words(model))):
            return related
    return set()


def _all_words(file: Described) -> list[Words]:
    return [found for name in (file.stem, *file.names) if (found := words(name))]


def _is_part(projector: Words, model: Words) -> bool:
    """Return whether a model's name contains a projector's, or is its end: `gemma-3-4b` of `google_gemma-3-4b`."""
    starts = range(len(model) - len(projector) + 1)
    return any(model[i : i + len(projector)] == projector for i in starts) or projector[-len(model) :] == model
