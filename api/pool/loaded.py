"""The instance that answers a request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice, repeat
from typing import assert_never

from msgspec import UNSET

from api.pool.roster import Roster
from api.pool.view import Copies, View, seed_of
from api.single_flight import SingleFlight
from shared import paths
from shared.errors import MissingParameter, ModelNotLoaded, ServiceError, WrongModelType
from shared.instance import Instance
from shared.schema.http import LoadRequest
from shared.schema.model import ModelType
from shared.store.connection import UNAVAILABLE

Busy = Callable[[Instance], int]


class Loaded:
    """Finds the instance that answers a request, without a trip to Redis if the view has one.

    Otherwise reads what the view lacks: a client may have loaded the model just now, through another process.
    """

    def __init__(self, roster: Roster, view: View) -> None:
        self._roster = roster
        self._view = view
        self._flight = SingleFlight(self._read)

    async def instance(
        self,
        name: str | None,
        busy: Busy,
        without: Collection[str] = (),
        beginning: bytes = b"",
        type_: ModelType | None = "llm",
    ) -> Instance:
        """Return the loaded instance that `name` means: by its id, or by a name of its model.

        Without a name, returns one of the default model if that is to be an LLM, or else the only loaded one of a model
        of this type.  Of several instances, `choose` selects one by the number of requests that each has (`busy`) and
        the beginning of the conversation.  `without`: ids of loads whose instances do not count.

        `type_` is None for any; without a name, that means an LLM.

        Raises ModelNotFound, ModelNotLoaded, MissingParameter, WrongModelType if the name is that of a model of another
        type, and what UNAVAILABLE lists if the view has no instance.
        """
        model = self._model(name, type_)
        found = self._found(name, model, without, type_)
        if self._is_clear(model, found):
            return choose(found, busy, beginning)
        try:
            await self._flight(None)
        except UNAVAILABLE:
            if not found.others:
                raise
        model = self._model(name, type_)
        found = self._found(name, model, without, type_)
        if self._is_clear(model, found):
            return choose(found, busy, beginning)
        if found.others and not found.open:
            return min(found.others, key=busy)
        raise self._missing(name, model, len(found.open), type_)

    def _model(self, name: str | None, type_: ModelType | None) -> str:
        """Return the name of a model as the list has it, "" for none.  The default model is for requests to LLMs."""
        return self._roster.named(LoadRequest(model=name or "")).model if name or type_ != "embedding" else ""

    def _found(self, name: str | None, model: str, without: Collection[str], type_: ModelType | None) -> Copies:
        """Return the loaded instances that a name means.  Raises WrongModelType if they are of another type."""
        if not model:
            found = self._view.of_type(type_ or "llm")
        else:
            found = self._view.with_key(model)
            if not found.open and not found.others:
                found = self._view.with_id(name or model)
        if type_ and any(instance.type != type_ for instance in (*found.open[:1], *found.others[:1])):
            raise _wrong_type(name or model, type_)
        return found.without(without) if without else found

    def _missing(self, name: str | None, model: str, n_loaded: int, type_: ModelType | None) -> ServiceError:
        """Return the error for a request whose name means no loaded instance, or no name one of several."""
        if not model:
            kind = "embedding models" if type_ == "embedding" else "LLMs"
            return MissingParameter(f"'model' is required: {n_loaded or 'no'} {kind} are loaded.", param="model")
        models = self._roster.meant(model)
        if not models:
            return self._roster.nowhere(LoadRequest(model=model), None)
        if type_ and all(each.type != type_ for each in models.values()):
            return _wrong_type(name or model, type_)
        message = f"Model '{name or model}' is not loaded. Load it with POST {paths.LOAD}."
        return ModelNotLoaded(message, model, param="model")

    async def _read(self, _keys: Sequence[None]) -> dict[None, None]:
        await asyncio.gather(self._roster.refresh(), self._view.catch_up())
        return {None: None}

    @staticmethod
    def _is_clear(model: str, found: Copies) -> bool:
        """Return whether an instance answers: one of a model, or the only one of its type if no model is named."""
        return bool(found.open) if model else len(found.open) == 1


def choose(copies: Copies, busy: Busy, beginning: bytes) -> Instance:
    """Choose among instances that can be asked, of which there is at least one.

    Of two that the beginning of a conversation selects by rendezvous hashing, the first has its tokens if it was asked
    before; the second is chosen if it is clearly less busy.  Without a beginning, the less busy one of any two.
    """
    digest = seed_of(beginning) if beginning else random.getrandbits(56)
    first, *others = islice(_by_weight(copies, digest), 2)
    for second in others:
        parallel = UNSET if first.load_config is None else first.load_config.parallel
        margin = max(1, parallel // 2 if parallel is not UNSET else 0) if beginning else 0
        if busy(first) - busy(second) > margin:
            return second
    return first


def _by_weight(copies: Copies, digest: int) -> Iterator[Instance]:
    """Yield instances in the order of a hash of each one's seed with a digest.

    The hash of a tuple of small integers is the same in every process.
    """
    weights = [*map(hash, zip(copies.seeds, repeat(digest)))]
    for _ in copies.open:
        i = weights.index(max(weights))
        weights[i] = -(2**63)  # lower than any
        yield copies.open[i]


def _wrong_type(name: str, type_: ModelType) -> WrongModelType:
    match type_:
        case "llm":
            what = "an embedding model, which does not chat"
        case "embedding":
            what = "an LLM, not an embedding model"
        case _:
            assert_never(type_)
    return WrongModelType(f"'model': '{name}' is {what}.", param="model")
