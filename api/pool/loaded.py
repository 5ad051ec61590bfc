"""The loaded instances, by the names that clients use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from api.pool.listing import is_usable, source_of
from api.pool.roster import Roster
from api.single_flight import SingleFlight
from shared import paths
from shared.errors import InvalidValue, MissingParameter, ModelNotLoaded
from shared.instance import Instance
from shared.schema.http import LoadRequest
from shared.store.instances import Instances


class Loaded:
    """Finds the instance that answers a request."""

    def __init__(self, roster: Roster, instances: Instances) -> None:
        self._roster = roster
        self._instances = instances
        self._flight = SingleFlight(self._read)

    async def llm(self, name: str | None, busy: Callable[[Instance], int], without: Collection[str] = ()) -> Instance:
        """Return the loaded LLM that `name` means: the id of an instance, or a key of its model.

        Of several instances of a key, returns the one for which `busy` is lowest, the oldest of these.  A plain key
        also means a loaded variant that it does not select.  Without a name, returns
        that of the default model, or else the only loaded LLM.  `without`:
        ids of loads whose instances do not count.  Raises
        ModelNotFound, ModelNotLoaded, MissingParameter, InvalidValue if the name is that of an embedding model, and
        what UNAVAILABLE lists.
        """
        loaded = [instance for instance in await self._flight(None) if instance.id not in without]
        name = name or self._roster.named(LoadRequest(model="")).model  # the default model
        if not name:
            llms = [instance for instance in loaded if instance.type == "llm"]
            if len(llms) != 1:
                raise MissingParameter(f"'model' is required: {len(llms) or 'no'} LLMs are loaded.", param="model")
            return llms[0]
        found = [instance for instance in loaded if instance.instance_id == name] or self._with_key(name, loaded)
        if found and found[0].type != "llm":
            raise _no_llm(name)
        return min(found, key=busy)

    def _with_key(self, name: str, loaded: Sequence[Instance]) -> list[Instance]:
        """Return the instances of a model, at least one.  Raises ModelNotFound, ModelNotLoaded and InvalidValue."""
        request = self._roster.named(LoadRequest(model=name))
        models = self._roster.meant(request.model)
        if not models:
            raise self._roster.nowhere(request, None)
        keys = {worker: model.full_key for worker, model in models.items()}
        of = {instance.id: self._roster.model_of(instance) or source_of(instance) for instance in loaded}
        found = [one for one in loaded if keys.get(one.worker) == of[one.id].full_key]
        found = found or [one for one in loaded if of[one.id].base == request.model]
        if not found and all(model.type == "embedding" for model in models.values()):
            raise _no_llm(name)
        if not found:
            message = f"Model '{name}' is not loaded. Load it with POST {paths.LOAD}."
            raise ModelNotLoaded(message, request.model, param="model")
        return found

    async def _read(self, _keys: Sequence[None]) -> dict[None, list[Instance]]:
        _, live = await asyncio.gather(self._roster.refresh(), self._instances.live())
        return {None: [instance for instance in live if is_usable(instance, self._roster)]}


def _no_llm(name: str) -> InvalidValue:
    return InvalidValue(f"'model': '{name}' is an embedding model, which does not chat.", param="model")
