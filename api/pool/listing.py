"""Lists the models and the workers of a pool."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from itertools import chain, count
from typing import Any

import msgspec
from msgspec import UNSET

from api.pool.roster import Roster
from api.single_flight import SingleFlight
from shared.instance import Instance
from shared.lifecycle import State
from shared.lookup import is_variant, preferred
from shared.schema.http import (
    Capabilities,
    HeldInstance,
    ListedModel,
    ListedWorker,
    LoadConfig,
    LoadedInstance,
    ModelList,
    Quantization,
    Reasoning,
)
from shared.schema.memory import Holding
from shared.schema.model import Model
from shared.store.instances import Instances


class Listing:
    """Lists the models and the workers of a roster.

    Every method raises what UNAVAILABLE lists if Redis does not answer.
    """

    def __init__(self, roster: Roster, instances: Instances) -> None:
        self._roster = roster
        self._instances = instances
        self._flight = SingleFlight(self._read)
        self._models: Sequence[Model] = ()
        self._unloaded: list[ListedModel] = []  # of `_models`
        self._key_of: dict[str, str] = {}  # of the entry of each of `_models`, by `full_key`

    async def models(self) -> bytes:
        """Return all models that can be loaded, with their loaded instances, sorted by key: a ModelList as JSON.

        Each name that loads a model is the `key` of an entry or one of its `variants`.
        """
        return await self._flight(None)

    async def workers(self) -> list[ListedWorker]:
        """Return all live workers, with their instances in all states that are not terminal."""
        await self._roster.refresh()  # so that a listed worker accepts loads
        held: dict[str, list[HeldInstance]] = {}
        holdings = {(name, one.instance_id): one for name, worker in self._roster.alive.items() for one in worker.held}
        for instance in _oldest_first(await self._instances.live()):
            held.setdefault(instance.worker, []).append(
                HeldInstance(
                    id=instance.instance_id,
                    job_id=instance.id,
                    state=instance.state,
                    model=instance.model,
                    devices=instance.devices,
                    size_bytes=instance.total_size_bytes,
                    **_work(holdings.get((instance.worker, instance.instance_id))),
                )
            )
        return [
            ListedWorker(
                name=worker.name,
                state=snapshot.state,
                devices=snapshot.devices,
                instances=held.get(worker.name, []),
                lease_age_seconds=round(max(0.0, snapshot.lease_s - worker.lease_left_s), 3),
                version=snapshot.version,
                engine=snapshot.engine,
                problems=snapshot.problems,
            )
            for worker in self._roster.workers
            if (snapshot := worker.snapshot) is not None
        ]

    async def _read(self, _keys: Sequence[None]) -> dict[None, bytes]:
        # Refresh first: a client that sees a ready worker must also see its models.
        _, live = await asyncio.gather(self._roster.refresh(), self._instances.live())
        unloaded = self._listed()
        used = {(name, held.instance_id): held.used_at for name, one in self._roster.alive.items() for held in one.held}
        loaded: dict[str, list[LoadedInstance]] = {}
        gone = Gone(chain(self._key_of.keys(), self._key_of.values()))
        for instance in _oldest_first(live):
            if is_usable(instance, self._roster) and instance.load_config is not None:
                model = self._roster.model_of(instance)
                used_at = used.get((instance.worker, instance.instance_id), 0.0)
                entry = _loaded(instance, instance.load_config, model, used_at)
                if model is None or (key := self._key_of.get(model.full_key)) is None:
                    gone.add(instance, entry)
                else:
                    loaded.setdefault(key, []).append(entry)
        entries = [
            msgspec.structs.replace(entry, loaded_instances=loaded[entry.key]) if entry.key in loaded else entry
            for entry in unloaded
        ]
        if gone_models := gone.models():
            entries = sorted([*entries, *gone_models], key=_key)
        return {None: msgspec.json.encode(ModelList(models=entries))}

    def _listed(self) -> list[ListedModel]:
        """Return the entries without instances, sorted by key, cached until the roster changes."""
        models = self._roster.models()
        if models is not self._models:
            groups = grouped(models)
            self._models, self._unloaded = models, [listed_group(key, groups[key]) for key in sorted(groups)]
            self._key_of = {model.full_key: key for key, group in groups.items() for model in group}
        return self._unloaded


def grouped(models: Iterable[Model]) -> dict[str, list[Model]]:
    """Group models by the entries of the list, with their keys: the quantizations of a model are one entry.

    The first model of a group is the one that the key loads.  A folder may have other models too: the plain key of the
    folder loads one, and the others are entries of their own.
    """
    beside: dict[str, list[Model]] = {}
    for model in models:
        beside.setdefault(model.base, []).append(model)
    groups: dict[str, list[Model]] = {}
    for base, all_ in beside.items():
        selected = preferred(all_)
        variants = [model for model in all_ if model is not selected and is_variant(model, selected)]
        groups[base] = [selected, *variants]
        groups |= {model.full_key: [model] for model in all_ if not is_variant(model, selected)}
    return groups


class Gone:
    """Lists the instances whose files are no longer in a models directory: they hold memory until they are unloaded."""

    def __init__(self, taken: Iterable[str]) -> None:
        """`taken` are the names of the other models."""
        self._taken = taken
        self._found: list[tuple[Model, list[LoadedInstance]]] = []

    def add(self, instance: Instance, loaded: LoadedInstance) -> None:
        """Add an instance to those of the same files."""
        source = source_of(instance)
        for model, others in self._found:
            if (model.shards, model.files, model.base) == (source.shards, source.files, source.base):
                others.append(loaded)
                return
        self._found.append((source, [loaded]))

    def models(self) -> list[ListedModel]:
        """Return the models, with their last keys unless these belong to other files now."""
        taken = {*self._taken}
        models: list[ListedModel] = []
        for model, loaded in self._found:
            named = [model.key, model.full_key]
            key = next(key for key in chain(named, (f"{model.key}-{n}" for n in count(2))) if key not in taken)
            taken.add(key)
            models.append(msgspec.structs.replace(listed(model), key=key, loaded_instances=loaded))
        return models


def is_usable(instance: Instance, roster: Roster) -> bool:
    """Return whether an instance is loaded, by a worker that is alive and does not drain."""
    holder = roster.alive.get(instance.worker)
    is_there = holder is not None and holder.epoch == instance.epoch and holder.state == "ready"
    return instance.state is State.LOADED and is_there


def source_of(instance: Instance) -> Model:
    """Return the model of an instance as its record has it.  The record of an older version does not describe it."""
    return instance.source or Model(
        key=instance.key,
        base=instance.key,
        variant="",
        shards=[],
        size_bytes=instance.total_size_bytes,
        type=instance.type,
        display_name=instance.model,
    )


def _loaded(instance: Instance, config: LoadConfig, model: Model | None, used_at: float) -> LoadedInstance:
    """Return the list entry of an instance.  `used_at`: its last use, as its worker published it."""
    idle_at = msgspec.structs.replace(instance, used_at=max(instance.used_at or 0.0, used_at)).idle_at
    return LoadedInstance(
        id=instance.instance_id,
        config=config,
        variant=model.full_key if model is not None and model.variant else UNSET,
        worker=instance.worker,
        devices=instance.devices,
        remaining_ttl_seconds=UNSET if idle_at is None else round(max(0.0, idle_at - time.time()), 3),
    )


def _key(model: ListedModel) -> str:
    return model.key


def listed_group(key: str, models: Sequence[Model]) -> ListedModel:
    """Return the list entry of the variants of a model, the selected one first, without instances."""
    selected, variants = models[0], sorted(model.full_key for model in models if model.variant)
    return msgspec.structs.replace(
        listed(selected),
        key=key,
        variants=variants or UNSET,
        selected_variant=selected.full_key if selected.variant else UNSET,
    )


def listed(model: Model) -> ListedModel:
    """Return the list entry of a model without instances and variants."""
    is_llm = model.type == "llm"
    return ListedModel(
        type=model.type,
        publisher=model.publisher,
        key=model.key,
        display_name=model.display_name,
        architecture=model.architecture if is_llm else UNSET,
        quantization=Quantization(
            name=model.quantization,
            bits_per_weight=None if model.bits_per_weight is None else math.floor(model.bits_per_weight),
        ),
        size_bytes=model.size_bytes,
        params_string=model.params_string,
        loaded_instances=[],
        max_context_length=model.max_context_length,
        format="gguf",
        capabilities=_capabilities(model) if is_llm else UNSET,
        description=model.description if is_llm else UNSET,
    )


def _work(held: Holding | None) -> dict[str, Any]:
    """Return what an instance does, as its worker published it; nothing if it has not."""
    if held is None:
        return {}
    return {
        "requests_running": held.running,
        "requests_waiting": held.waiting,
        "kv_cells_used": held.cells,
        "generated_tokens_per_second": round(held.tokens_per_second, 1),
    }


def _capabilities(model: Model) -> Capabilities:
    options = model.reasoning
    default = "on" if "on" in options else "medium"
    return Capabilities(
        vision=model.vision,
        trained_for_tool_use=model.trained_for_tool_use,
        reasoning=Reasoning(allowed_options=options, default=default) if options else UNSET,
    )


def _oldest_first(instances: Iterable[Instance]) -> list[Instance]:
    return sorted(instances, key=lambda instance: (instance.created_at, instance.id))
