"""Lists the ids by which clients can ask a model: the keys of the models, and the ids of loaded instances."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Literal, assert_never

import msgspec
from msgspec import UNSET, Struct, UnsetType

from api.pool.listing import is_usable, source_of
from api.pool.roster import Roster
from api.single_flight import SingleFlight
from shared.instance import Instance
from shared.lifecycle import State
from shared.lookup import by_name
from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.store.instances import Instances

Kind = Literal["llm", "vlm", "embeddings"]
Loaded = Literal["loaded", "loading", "not-loaded"]


class Entry(Struct, frozen=True, kw_only=True, gc=False):
    """An id, the model that it stands for, and the state of the instance with this id."""

    id: str
    model: Model
    state: Loaded = "not-loaded"
    context_length: int | UnsetType = UNSET  # of a loaded instance

    @property
    def kind(self) -> Kind:
        if self.model.type == "embedding":
            return "embeddings"
        return "vlm" if self.model.vision else "llm"

    @property
    def created(self) -> int:
        """When the files of the model were last changed, in seconds since the epoch; 0: not known."""
        return max([0, *(file.mtime_ns // 1_000_000_000 for file in self.model.files)])


class Ids:
    """The ids of a roster's models and instances, in alphabetical order of the models.

    A folder with several quantizations has its plain key, and the key of each.  The id of an instance that is a key as
    well stands for the instance.  An alias is listed like the key that it stands for.  Every method raises what
    UNAVAILABLE lists if Redis does not answer.
    """

    def __init__(self, roster: Roster, instances: Instances) -> None:
        self._roster = roster
        self._instances = instances
        self._flight = SingleFlight(self._read)
        self._models: Sequence[Model] = ()
        self._names: dict[str, Model] = {}  # of `_models`
        self._unloaded: dict[str, Entry] = {}  # of `_models`
        self._aliases: dict[str, str] = {}  # of `_models`: an alias, and the key that it stands for

    async def all(self) -> list[Entry]:
        return [*(await self._flight(None)).values()]

    async def one(self, name: str) -> Entry:
        """Return the entry with this id, or that of the model that a load of this name loads.  Raises ModelNotFound."""
        entries = await self._flight(None)
        request = self._roster.named(LoadRequest(model=name))
        found = entries.get(name) or entries.get(request.model)
        if found is None and request.model in self._names:  # such as the variant of a folder with one quantization
            found = entries.get(self._names[request.model].base)
        if found is None:
            raise self._roster.nowhere(LoadRequest(model=name), None)
        return found

    async def _read(self, _keys: Sequence[None]) -> dict[None, dict[str, Entry]]:
        # Refresh first: a client that sees a ready worker must also see its models.
        _, live = await asyncio.gather(self._roster.refresh(), self._instances.live())
        entries = {**self._keys()}
        for instance in live:
            match self._state(instance):
                case "loaded":
                    model = self._roster.model_of(instance) or source_of(instance)
                    context_length = UNSET if instance.load_config is None else instance.load_config.context_length
                    entries[instance.instance_id] = Entry(
                        id=instance.instance_id, model=model, state="loaded", context_length=context_length
                    )
                case "loading" if instance.instance_id in entries:
                    known = entries[instance.instance_id]
                    entries[instance.instance_id] = msgspec.structs.replace(known, state="loading")
                case "loading" | "not-loaded":  # an instance gets an id of its own once it can be asked
                    pass
                case state:
                    assert_never(state)
        for alias, key in self._aliases.items():
            entries.setdefault(alias, msgspec.structs.replace(entries[key], id=alias))
        return {None: dict(sorted(entries.items(), key=lambda item: (item[1].model.base, item[0])))}

    def _state(self, instance: Instance) -> Loaded:
        match instance.state:
            case State.QUEUED | State.LOADING:
                return "loading"
            case State.LOADED:
                return "loaded" if is_usable(instance, self._roster) else "not-loaded"
            case State.UNLOADING | State.UNLOADED | State.CANCELLED | State.FAILED | State.LOST:
                return "not-loaded"
            case _:
                assert_never(instance.state)

    def _keys(self) -> dict[str, Entry]:
        """Return the entries of the roster's models without instances, cached until the roster changes."""
        models = self._roster.models()
        if models is not self._models:
            self._models, self._names = models, by_name(models)
            bases = Counter(model.base for model in models)
            variants = [name for name, model in self._names.items() if bases[model.base] > 1]
            self._unloaded = {key: Entry(id=key, model=self._names[key]) for key in (*bases, *variants)}
            aliases = {alias for model in models for alias in model.settings.aliases}
            meant = {alias: self._roster.named(LoadRequest(model=alias)).model for alias in aliases}
            self._aliases = {alias: key for alias, key in meant.items() if key in self._unloaded}
        return self._unloaded
