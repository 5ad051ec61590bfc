"""The list of models of LM Studio's API before its version 1."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from api.pool.ids import Entry, Kind, Loaded

Capability = Literal["tool_use", "vision"]


class LegacyModel(Struct, frozen=True, kw_only=True, gc=False):
    """An entry of LM Studio's older model list.  It has a string where a file does not say: clients require one."""

    id: Annotated[str, Meta(description="Key of a model, or id of a loaded instance.")]
    object: Annotated[Literal["model"], Meta(description="Always `model`.")] = "model"
    type: Annotated[Kind, Meta(description="Kind of the model; `vlm` is an LLM that understands images.")]
    publisher: Annotated[str, Meta(description="Publisher of the model; empty if unknown.")]
    arch: Annotated[str, Meta(description="Architecture, under its name in llama.cpp.")]
    compatibility_type: Annotated[Literal["gguf"], Meta(description="Format of the file: always `gguf`.")] = "gguf"
    quantization: Annotated[str, Meta(description="Name of the quantization; empty if unknown.")]
    state: Annotated[Loaded, Meta(description="State of the instance with this id.")]
    max_context_length: Annotated[int, Meta(description="The largest context of the model, in tokens.")]
    loaded_context_length: Annotated[
        int | UnsetType, Meta(description="Size of the context of the loaded instance, in tokens.")
    ] = UNSET
    capabilities: Annotated[
        list[Capability] | UnsetType,
        Meta(description="`tool_use`: the model is trained to call tools. `vision`: it understands images."),
    ] = UNSET


class LegacyModelList(Struct, frozen=True, kw_only=True):
    """The ids by which clients can ask a model."""

    object: Annotated[Literal["list"], Meta(description="Always `list`.")] = "list"
    data: Annotated[list[LegacyModel], Meta(description="The ids.")]


def listed(entry: Entry) -> LegacyModel:
    """Return an id in this form."""
    model = entry.model
    capabilities: list[Capability] = []
    if entry.kind != "embeddings":
        capabilities += ["tool_use"] if model.trained_for_tool_use else []
        capabilities += ["vision"] if model.vision else []
    return LegacyModel(
        id=entry.id,
        type=entry.kind,
        publisher=model.publisher,
        arch=model.architecture,
        quantization=model.quantization or "",
        state=entry.state,
        max_context_length=model.max_context_length,
        loaded_context_length=entry.context_length,
        capabilities=capabilities or UNSET,
    )
