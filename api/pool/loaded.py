"""The instance that answers a request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice, repeat

from msgspec import UNSET

from api.pool.roster import Roster
from api.pool.view import Copies, View, seed_of
from api.single_flight import SingleFlight
from shared import paths
from shared.errors import InvalidValue, MissingParameter, ModelNotLoaded, ServiceError
from shared.instance import Instance
from shared.schema.http import LoadRequest
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

    async def llm(
        self, name: str | None, busy: Busy, without: Collection[str] = (), beginning: bytes = b""
    ) -> Instance:
        """Return the loaded LLM that `name` means: the id of an instance, or a name of its model.

        Without a name, returns that of the default model, or else the only loaded LLM.  Of several instances, `choose`
        selects one by the number of requests that each has (`busy`) and the beginning of the conversation.  `without`:
        ids of loads whose instances do not count.

        Raises ModelNotFound, ModelNotLoaded, MissingParameter, InvalidValue if the name is that of an embedding model,
        and what UNAVAILABLE lists if the view has no instance.
        """
        found = self._found(name, without)
        if self._is_clear(name, found):
            return choose(found, busy, beginning)
        try:
            await self._flight(None)
        except UNAVAILABLE:
            if not found.others:
                raise
        found = self._found(name, without)
        if self._is_clear(name, found):
            return choose(found, busy, beginning)
        if found.others and not found.open:
            return min(found.others, key=busy)
        raise self._missing(name, len(found.open))

    def _found(self, name: str | None, without: Collection[str]) -> Copies:
        """Return the loaded instances that a name means.  Raises InvalidValue if they are not of an LLM."""
        model = self._roster.named(LoadRequest(model=name or "")).model
        if not model:
            found = self._view.llms()
        else:
            found = self._view.with_key(model)
            if not found.open and not found.others:
                found = self._view.with_id(name or model)
        if any(instance.type != "llm" for instance in (*found.open[:1], *found.others[:1])):
            raise _no_llm(name or model)
        return found.without(without) if without else found

    def _missing(self, name: str | None, n_loaded: int) -> ServiceError:
        """Return the error for a request whose name means no loaded instance, or no name one of several."""
        request = self._roster.named(LoadRequest(model=name or ""))
        if not request.model:
            return MissingParameter(f"'model' is required: {n_loaded or 'no'} LLMs are loaded.", param="model")
        models = self._roster.meant(request.model)
        if not models:
            return self._roster.nowhere(request, None)
        if all(model.type == "embedding" for model in models.values()):
            return _no_llm(name or request.model)
        message = f"Model '{name or request.model}' is not loaded. Load it with POST {paths.LOAD}."
        return ModelNotLoaded(message, request.model, param="model")

    async def _read(self, _keys: Sequence[None]) -> dict[None, None]:
        await asyncio.gather(self._roster.refresh(), self._view.catch_up())
        return {None: None}

    def _is_clear(self, name: str | None, found: Copies) -> bool:
        """Return whether an instance answers: one of a model, or the only LLM for a request that names none."""
        if name or self._roster.named(LoadRequest(model="")).model:
            return bool(found.open)
        return len(found.open) == 1


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


def _no_llm(name: str) -> InvalidValue:
    return InvalidValue(f"'model': '{name}' is an embedding model, which does not chat.", param="model")
