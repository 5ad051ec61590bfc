"""The list of models in the form of Anthropic's API."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

from api.openai.models import ListedId
from api.pool.ids import Entry
from shared.errors import ModelNotFound
from shared.schema.http import Moment

MOST_MODELS = 1000  # of a page


class AnthropicModel(ListedId, frozen=True, kw_only=True, gc=False):
    """An id in the form of Anthropic's API, which has all that OpenAI's has but another `type`."""

    type: Annotated[Literal["model"], Meta(description="Always `model`.")] = "model"
    display_name: Annotated[str, Meta(description="Name of the model for people.")]
    created_at: Annotated[Moment, Meta(description="The same time as `created`.")]


class AnthropicModelList(Struct, frozen=True, kw_only=True):
    """A page of the ids by which clients can ask a model."""

    object: Annotated[Literal["list"], Meta(description="Always `list`.")] = "list"
    data: Annotated[list[AnthropicModel], Meta(description="The ids of this page.")]
    has_more: Annotated[bool, Meta(description="Whether there are more ids in the direction of the request.")]
    first_id: Annotated[str | None, Meta(description="The first id of the page, for `before_id`; null: it is empty.")]
    last_id: Annotated[str | None, Meta(description="The last id of the page, for `after_id`; null: it is empty.")]


def listed(entry: Entry) -> AnthropicModel:
    """Return an id in this form."""
    return AnthropicModel(
        id=entry.id,
        created=entry.created,
        state=entry.state,
        max_context_length=entry.model.max_context_length,
        loaded_context_length=entry.context_length,
        display_name=entry.model.display_name,
        created_at=datetime.fromtimestamp(entry.created, UTC),
    )


def page(entries: Sequence[Entry], limit: int, after_id: str | None, before_id: str | None) -> AnthropicModelList:
    """Return the first `limit` entries after one, or the last ones before one.

    Raises ModelNotFound if there is no entry with that id.
    """
    ids = [entry.id for entry in entries]
    if before_id is not None:
        earlier = entries[: _index(ids, "before_id", before_id)]
        chosen, has_more = earlier[-limit:], len(earlier) > limit
    else:
        later = entries if after_id is None else entries[_index(ids, "after_id", after_id) + 1 :]
        chosen, has_more = later[:limit], len(later) > limit
    return AnthropicModelList(
        data=[listed(entry) for entry in chosen],
        has_more=has_more,
        first_id=chosen[0].id if chosen else None,
        last_id=chosen[-1].id if chosen else None,
    )


def _index(ids: Sequence[str], name: str, value: str) -> int:
    if value not in ids:
        raise ModelNotFound(f"'{name}': no model has the id '{value}'.", param=name)
    return ids.index(value)
