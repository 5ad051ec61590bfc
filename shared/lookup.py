"""Lookup of models by the names that clients use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from shared import quantization
from shared.instance import Instance
from shared.schema.model import Model

PREFERRED_BITS = 4.5  # per weight; selects among the quantizations of a folder
SIMILAR, NEAR = 3, 0.7  # number of suggestions for an unknown name; their least similarity, from 0 to 1
SHORTEST, LONGEST = 3, 100  # characters of a name for which there are suggestions
SUFFIX = re.compile(r"-gguf(?=@|:\d+$|$)")  # of a key; a variant or the number of an instance may follow


def by_name(models: Sequence[Model]) -> dict[str, Model]:
    """Map each name that a client may use to its model.

    A name is the key of a model; `key@variant`, also if the folder has only one model; or the plain key of a folder
    with several quantizations.  The plain key selects a usable model with close to PREFERRED_BITS bits per weight, the
    smaller one of two that are equally close.  Until the header is read, bits are estimated from the quantization name.
    """
    names: dict[str, Model] = {}
    for model in sorted(models, key=_preference, reverse=True):
        names[model.base] = model
    names |= {model.full_key: model for model in reversed(models) if model.variant}
    return names | {model.key: model for model in reversed(models)}


def folded(name: str) -> str:
    """Return a name as names are compared: in lower case, and without the `-gguf` after its key."""
    return SUFFIX.sub("", name.lower(), count=1)


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Map each name in lower case, and each folded name, to the name.  A name itself has precedence."""
    known = [*names]
    return {folded(name): name for name in known} | {name: name for name in known}


def spelled(spellings: Mapping[str, str], name: str) -> str | None:
    """Return the name that a client means, whatever the case and with or without `-gguf`; None if it is unknown."""
    return spellings.get(name.lower()) or spellings.get(folded(name))


def further_names(models: Sequence[Model]) -> dict[str, str]:
    """Map each alias of models, folded, to a name of its model, and "" to that of the default model.

    The alias of all quantizations of a folder means its plain key, which selects one of them.
    """
    names = by_name(models)
    found: dict[str, str] = {}
    for model in sorted(models, key=_preference):
        is_selected = names.get(model.base) is model
        for alias in (*model.settings.aliases, *([""] if model.settings.is_default else [])):
            found.setdefault(folded(alias), model.base if is_selected else model.full_key)
    return found


def similar(name: str, names: Iterable[str]) -> list[str]:
    """Return up to SIMILAR of `names` that contain a name or are nearly equal, the nearest first.

    Publishers are not compared: many publish the same model.  Variants are similar only to a variant.
    """
    asked = _without_publisher(folded(name))
    if not SHORTEST <= len(asked) <= LONGEST:
        return []
    others: dict[str, list[str]] = {}
    for other in sorted(names):
        if ("@" in other) == ("@" in asked):
            others.setdefault(_without_publisher(other), []).append(other)
    containing = [other for other in others if asked in other]
    near = difflib.get_close_matches(asked, others, SIMILAR, NEAR)
    return [name for other in dict.fromkeys([*containing, *near]) for name in others[other]][:SIMILAR]


def preferred(models: Iterable[Model]) -> Model:
    """Return the model that a plain key selects among those with the same base.  There is at least one."""
    return min(models, key=_preference)


def is_variant(model: Model, of: Model) -> bool:
    """Return whether two models with the same base are one model in two quantizations, by their headers.

    A file whose name tells no variant has only the plain key, and so it is a variant of whatever has that key.
    """
    return not model.variant or _shape(model) == _shape(of)


def of_instance(models: Mapping[str, Model], instance: Instance) -> Model | None:
    """Return the model that an instance is loaded from, whatever its key is now; None if its files are gone.

    `models` are those of its worker, at least by their keys.
    """
    return of_source(models, instance.source, instance.key)


def of_source(models: Mapping[str, Model], source: Model | None, key: str) -> Model | None:
    """Return the model with the files of `source`; that of `key` if a process of an older version left these out."""
    if source is None or not source.files:
        return models.get(key)
    model = models.get(source.key)
    if model is not None and _is_unchanged(model, source):
        return model
    moved: Model | None = None
    copied: Model | None = None
    for model in models.values():
        if _is_unchanged(model, source):
            return model
        if model.files == source.files:
            moved = model
        if _is_copy(model, source):
            copied = model
    return moved or copied


def _is_unchanged(model: Model, source: Model) -> bool:
    return model.shards == source.shards and model.files == source.files


def _is_copy(model: Model, source: Model) -> bool:
    """Return whether a model has the paths, the sizes and the header of `source`: it was copied or downloaded again.

    In another models directory, which has it hide `source` or be hidden, it has the key instead of the paths.
    """
    return (
        (model.shards == source.shards or (model.root != source.root and model.full_key == source.full_key))
        and [file.size for file in model.files] == [file.size for file in source.files]
        and _header(model) == _header(source)
    )


def _header(model: Model) -> tuple[object, ...]:
    return model.type, model.architecture, model.display_name, model.max_context_length, model.expert_count


def _without_publisher(name: str) -> str:
    return name.rpartition("/")[2]


def _shape(model: Model) -> tuple[object, ...]:
    size = model.dimensions and (model.dimensions.block_count, model.dimensions.embedding_length)
    return model.type, model.architecture, model.expert_count, size


def _preference(model: Model) -> tuple[bool, float, int, bool, str]:
    bits = model.bits_per_weight
    if bits is None:
        bits = quantization.nominal_bits(model.quantization or model.variant)
    distance = abs(bits - PREFERRED_BITS) if bits is not None else float("inf")
    return model.problem is not None, distance, model.size_bytes, not model.variant, model.key
