"""The model that a client means by a name."""

from __future__ import annotations

from collections.abc import Sequence

from shared import quantization
from shared.schema.model import Model

PREFERRED_BITS = 4.5  # per weight: what a folder's plain key means, where there is a choice


def by_name(models: Sequence[Model]) -> dict[str, Model]:
    """The model that a client means by each name there is.

    That is the model with this key; a folder's only model by `key@variant`; or, by the plain key of a folder of
    several quantizations, the usable one whose bits per weight are closest to 4.5 (estimated from the name of the
    quantization until they are known; the smaller one of two that are equally close).
    """
    found: dict[str, Model] = {}
    for model in sorted(models, key=_preference, reverse=True):
        found[model.base] = model
    found |= {f"{model.base}@{model.variant}": model for model in reversed(models) if model.variant}
    return found | {model.key: model for model in reversed(models)}


def _preference(model: Model) -> tuple[bool, float, int, str]:
    bits = model.bits_per_weight
    if bits is None:
        bits = quantization.nominal_bits(model.quantization or model.variant)
    distance = abs(bits - PREFERRED_BITS) if bits is not None else float("inf")
    return model.problem is not None, distance, model.size_bytes, model.key
