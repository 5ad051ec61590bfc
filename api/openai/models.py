"""The list of models in the form of OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from api.pool.ids import Entry, Kind, Loaded

OWNER = "organization_owner"  # as LM Studio says


class ListedId(Struct, frozen=True, kw_only=True, gc=False):
    """What every form of an entry has."""

    id: Annotated[str, Meta(description="Key of a model, or id of a loaded instance.")]
    object: Annotated[Literal["model"], Meta(description="Always `model`.")] = "model"
    created: Annotated[
        int, Meta(description="When the files of the model were last changed, in seconds since the epoch.")
    ]
    owned_by: Annotated[str, Meta(description="Always `organization_owner`, as in LM Studio.")] = OWNER
    state: Annotated[Loaded, Meta(description="State of the instance with this id.")]
    max_context_length: Annotated[int, Meta(description="The largest context of the model, in tokens.")]
    loaded_context_length: Annotated[
        int | UnsetType, Meta(description="Size of the context of the loaded instance, in tokens.")
    ] = UNSET


class OpenAIModel(ListedId, frozen=True, kw_only=True, gc=False):
    """An id in the form of OpenAI's API, with extensions from `state` on."""

    type: Annotated[Kind, Meta(description="Kind of the model; `vlm` is an LLM that understands images.")]


class OpenAIModelList(Struct, frozen=True, kw_only=True):
    """The ids by which clients can ask a model."""

    object: Annotated[Literal["list"], Meta(description="Always `list`.")] = "list"
    data: Annotated[list[OpenAIModel], Meta(description="The ids.")]


def listed(entry: Entry) -> OpenAIModel:
    """Return an id in this form."""
    return OpenAIModel(
        id=entry.id,
        created=entry.created,
        state=entry.state,
        type=entry.kind,
        max_context_length=entry.model.max_context_length,
        loaded_context_length=entry.context_length,
    )
