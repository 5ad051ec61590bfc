"""The use cases: load a model, unload an instance, list what there is."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing, suppress
from typing import NoReturn

from msgspec import UNSET

from api.follow import Follower
from api.roster import Roster
from shared import log
from shared.errors import ErrorBody, InvalidValue, LoadFailed, ModelNotFound, NoWorker, QueueUnavailable, ServiceError
from shared.lifecycle import TERMINAL, Event, State
from shared.schema import (
    Capabilities,
    Instance,
    ListedModel,
    LoadedInstance,
    LoadRequest,
    Model,
    Quantization,
)
from shared.store import UNAVAILABLE, Fenced, NoLease, Store, queue_of

UNLOAD_DEADLINE_S = 60.0


class ReportedFailure(ServiceError):
    """A failure that a worker already put into words."""

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self._body = body

    def body(self) -> ErrorBody:
        return self._body


class Loads:
    def __init__(self, store: Store, roster: Roster, follower: Follower) -> None:
        self.store = store
        self.roster = roster
        self.follower = follower

    async def submit(self, request: LoadRequest) -> Instance:
        """Accept a load: choose a worker, write the record, put the delivery into the worker's queue.

        Raises ModelNotFound, NoWorker, InvalidValue (against the model's limits) and LoadFailed for a file that its
        worker could not read.
        """
        for last in (False, True):
            workers, model = self.roster.with_model(request.model)
            if workers:
                with suppress(NoLease):
                    return await self._create(request, *workers[0])
            if not last:
                await self.roster.refresh()  # it may be a beat behind
        if model is None:
            raise ModelNotFound(f"Model {request.model} not found in downloaded models", param="model")
        raise NoWorker(f"No worker that has {request.model} is alive. Try again shortly.")

    async def _create(self, request: LoadRequest, worker: str, model: Model) -> Instance:
        """Write the record and its delivery.  Raises NoLease if the worker has just gone."""
        if model.problem is not None:
            raise LoadFailed(model.problem.code, model.type, request.model, model.problem.message)
        check(request, model)
        instance = await self.store.create(
            Instance(
                id=f"load_{uuid.uuid4().hex}",
                model=request.model,
                key=model.key,
                type=model.type,
                worker=worker,
                request=request,
                total_size_bytes=model.size_bytes,
            )
        )
        self.roster.placed(worker)
        try:
            await self.store.redis.enqueue_job(
                "load", instance.id, _job_id=instance.id, _queue_name=queue_of(worker), _expires=3600
            )
            await self.store.ring(worker)
        except UNAVAILABLE as e:  # the record stands: its worker finds it at one of its next beats
            log.get("api").warning("delivery lost", action="delivery_lost", instance=instance.id, error=str(e))
        return instance

    async def loaded(self, instance: Instance) -> Instance:
        """Follow a load to its end.  Returns the record at `loaded`; raises what became of it otherwise."""
        async with aclosing(self.follower.follow(instance)) as revisions:
            async for revision in revisions:
                if revision.state is State.LOADED:
                    return revision
                if revision.state in TERMINAL:
                    _raise_outcome(revision)
        raise QueueUnavailable("The log of this load ended without an outcome.")

    async def unload(self, instance_id: str) -> None:
        """Stop an instance and return once its runner is gone; one that is not loaded yet is cancelled.

        Raises ModelNotFound, also where its worker died meanwhile, and QueueUnavailable after UNLOAD_DEADLINE_S.
        """
        id_ = await self.store.named(instance_id)
        instance = await self.store.get(id_) if id_ else None
        if id_ is None or instance is None or not await self.store.request_stop(id_):
            raise _not_loaded(instance_id)
        if instance.state is State.QUEUED and await self._cancelled_in_queue(instance):
            return
        try:
            async with asyncio.timeout(UNLOAD_DEADLINE_S), aclosing(self.follower.follow(instance)) as revisions:
                async for revision in revisions:
                    if revision.state is State.LOST:
                        raise _not_loaded(instance_id)
        except TimeoutError:
            raise QueueUnavailable(f"'{instance_id}' was asked to stop and has not yet. Try again shortly.") from None

    async def _cancelled_in_queue(self, instance: Instance) -> bool:
        try:
            await self.store.commit(instance, instance.after(Event.STOP))
        except Fenced:
            return False  # its worker was quicker
        return True

    async def models(self) -> list[ListedModel]:
        """Every model that can be loaded, with its instances that are loaded now."""
        await self.roster.refresh()  # a worker that is ready must be seen at once
        loaded: dict[str, list[LoadedInstance]] = {}
        for instance in sorted(await self.store.live(), key=lambda i: (i.created_at, i.id)):
            holder = self.roster.alive.get(instance.worker)
            usable = instance.state is State.LOADED and holder is not None and holder.epoch == instance.epoch
            if usable and instance.load_config is not None:
                loaded.setdefault(instance.key, []).append(
                    LoadedInstance(id=instance.instance_id, config=instance.load_config, worker=instance.worker)
                )
        return [listed(model, loaded.get(model.key, [])) for model in self.roster.listed()]


def check(request: LoadRequest, model: Model) -> None:
    """Refuse what the model cannot do, and what llama.cpp would abort on.  Raises InvalidValue."""
    if request.context_length is not UNSET and request.context_length > model.max_context_length:
        raise InvalidValue(
            f"'context_length': {request.context_length} is more than the maximum of {model.max_context_length} "
            f"tokens that '{request.model}' supports.",
            param="context_length",
            maximum=model.max_context_length,
        )
    if model.type != "llm":
        return
    if model.expert_count and request.num_experts is not UNSET and request.num_experts > model.expert_count:
        raise InvalidValue(
            f"'num_experts': expected integer from 1 to {model.expert_count}, got {request.num_experts}.",
            param="num_experts",
            maximum=model.expert_count,
        )
    if request.parallel is not UNSET:
        limits = {
            "context_length": model.max_context_length if request.context_length is UNSET else request.context_length,
            "eval_batch_size": request.eval_batch_size,
        }
        for name, limit in limits.items():
            if limit is not UNSET and limit < request.parallel:
                raise InvalidValue(
                    f"'parallel': {request.parallel} sequences do not fit into {limit} tokens of '{name}'.",
                    param="parallel",
                    maximum=limit,
                )


def listed(model: Model, loaded: list[LoadedInstance]) -> ListedModel:
    llm = model.type == "llm"
    return ListedModel(
        type=model.type,
        publisher=model.publisher,
        key=model.key,
        display_name=model.display_name,
        architecture=model.architecture if llm else UNSET,
        quantization=Quantization(name=model.quantization, bits_per_weight=model.bits_per_weight),
        size_bytes=model.size_bytes,
        params_string=model.params_string,
        loaded_instances=loaded,
        max_context_length=model.max_context_length,
        format="gguf",
        capabilities=Capabilities(vision=model.vision, trained_for_tool_use=model.trained_for_tool_use)
        if llm
        else UNSET,
        description=model.description if llm else UNSET,
    )


def _not_loaded(instance_id: str) -> ModelNotFound:
    return ModelNotFound(f"Model with instance identifier '{instance_id}' is not loaded.", param="instance_id")


def _raise_outcome(instance: Instance) -> NoReturn:
    if instance.error is not None:
        raise ReportedFailure(instance.error)
    if instance.state is State.CANCELLED:
        raise LoadFailed("load_cancelled", instance.type, instance.model, "the load was cancelled")
    if instance.epoch is None:
        raise NoWorker(f"The worker '{instance.worker}' went away before it took the load. Try again shortly.")
    raise LoadFailed("worker_lost", instance.type, instance.model, f"the worker '{instance.worker}' is gone")
