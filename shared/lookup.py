"""Lookup of models by the names that clients use."""

from __future__ import annotations

from collections.abc import Sequence

from shared import quantization
from shared.schema.model import Model

PREFERRED_BITS = 4.5  # per weight; selects among the quantizations of a folder


def by_name(models: Sequence[Model]) -> dict[str, Model]:
    """Map each name that a client may use to its model.

    A name is the key of a model; `key@variant`, also if the folder has only one model; or the plain key of a folder
    with several quantizations.  The plain key selects a usable model with close to PREFERRED_BITS bits per weight, the
    smaller one of two that are equally close.  Until the header is read, bits are estimated from the quantization name.
    """
    names: dict[str, Model] = {}
    for model in sorted(models, key=_preference, reverse=True):
        names[model.base] = model
    names |= {f"{model.base}@{model.variant}": model for model in reversed(models) if model.variant}
    return names | {model.key: model for model in reversed(models)}


def _preference(model: Model) -> tuple[bool, float, int, str]:
    bits = model.bits_per_weight
    if bits is None:
        bits = quantization.nominal_bits(model.quantization or model.variant)
    distance = abs(bits - PREFERRED_BITS) if bits is not None else float("inf")
    return model.problem is not None, distance, model.size_bytes, model.key
