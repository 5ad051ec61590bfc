"""Estimates the memory of a load, and whether it fits."""

from __future__ import annotations

from msgspec import Struct, structs

from api.pool.roster import Candidate, Measured, Roster, is_same
from shared.download import InspectRequest, source
from shared.errors import InvalidRequest, InvalidValue, LoadFailed, ModelNotFound
from shared.memory.estimate import MOST_BYTES
from shared.memory.placement import DRY_RUNS, Constraints, Demand, Placement, available, once_gone, place, place_now
from shared.memory.plan import with_settings
from shared.schema.http import EstimatedDevice, EstimatedQuantization, EstimateResult, LoadRequest
from shared.schema.memory import CPU, Holding
from shared.schema.model import Model, Weights
from shared.schema.snapshot import Quantized, Sizing, WorkerSnapshot
from shared.store.queue import Queue

REVISION = "main"  # unless the name has one


async def estimated(request: LoadRequest, roster: Roster, queue: Queue) -> EstimateResult:
    """Estimate where a load would go, from the latest snapshots of the workers.  Loads nothing.

    If the formula is not verified for the configuration (`shared.memory.estimate`), the engine of a worker does dry
    runs; `exact` is False if the worker does not reply.  If the load fits nowhere, the devices are those with the most
    room.

    Raises what the load would raise before it is accepted: ModelNotFound, NoWorker, InvalidValue, LoadFailed; and what
    UNAVAILABLE lists if Redis does not answer.
    """
    await roster.refresh()  # estimate with the memory that is free now, not a beat ago
    request = roster.named(request)
    candidates, known = roster.candidates(request)
    if not candidates:
        raise roster.nowhere(request, known)
    return await _estimated(with_settings(request, candidates[0].model), candidates, roster, queue)


class Question(Struct, frozen=True):
    """What a worker is asked about a model of the hub."""

    worker: str
    asked: InspectRequest


def asked_of_hub(request: LoadRequest, roster: Roster) -> Question | None:
    """Return the question for a model that no worker has; None if its name is no repository's, or none has a hub."""
    worker = next((name for name, one in sorted(roster.alive.items()) if one.has_hub and one.state == "ready"), None)
    try:
        named = source(request.model)
    except InvalidValue:
        return None
    if worker is None:
        return None
    asked = InspectRequest(
        repository=named.repository, revision=named.revision or REVISION, quantization=named.quantization
    )
    return Question(worker, asked)


async def estimated_by_hub(
    request: LoadRequest, question: Question, absent: ModelNotFound, roster: Roster, queue: Queue
) -> EstimateResult:
    """Estimate where the load of a model of the hub would go if it were downloaded, from the headers of its files.

    Raises what `estimated` raises; `absent` with the hub's reason in its detail if it does not describe the model; and
    InvalidValue with the candidates if the name does not tell the quantization.
    """
    described = await queue.described(question.worker, question.asked)
    if described is None or described.model is None:
        error = None if described is None else described.error
        if error is not None and error.type == InvalidRequest.type:
            raise InvalidValue(error.message, param="model", **(error.detail or {}))
        hub = error.message if error else "The worker did not answer in time."
        raise ModelNotFound(str(absent), param="model", hub=hub)
    await roster.refresh()
    model = described.model
    candidates = roster.everywhere(request, model)
    if not candidates:
        raise roster.nowhere(request, model)
    result = await _estimated(request, candidates, roster, queue)
    offers = [
        EstimatedQuantization(name=offer.name, size_bytes=offer.size_bytes, fits=_fits(offer, model, request, roster))
        for offer in described.quantizations
    ]
    return structs.replace(result, quantizations=offers)


def _fits(offer: Quantized, model: Model, request: LoadRequest, roster: Roster) -> bool:
    """Return whether a quantization of a model fits, whose weights are scaled from those of another one."""
    scaled = structs.replace(model, size_bytes=offer.size_bytes, weights=_scaled(model, offer.size_bytes))
    return roster.choose(roster.everywhere(request, scaled), request)[1] is not None


def _scaled(model: Model, size_bytes: int) -> Weights | None:
    def scaled(n: int) -> int:
        return n * size_bytes // max(1, model.size_bytes)

    weights = model.weights
    return weights and structs.replace(
        weights,
        input_bytes=scaled(weights.input_bytes),
        repeating_bytes=scaled(weights.repeating_bytes),
        output_bytes=scaled(weights.output_bytes),
        block_bytes=[*map(scaled, weights.block_bytes)],
    )


async def _estimated(request: LoadRequest, candidates: list[Candidate], roster: Roster, queue: Queue) -> EstimateResult:
    best, placed = roster.choose(candidates, request)
    model = best.model
    if model.problem is not None:
        raise LoadFailed(model.problem.code, model.type, request.model, model.problem.message)
    figures, alive = roster.figures(candidates, best, request, queue), roster.alive
    requirements = await figures.requirements()
    if not figures.is_checked:
        candidates = [one for one in candidates if is_same(one.model, model)]
        best, placed = roster.choose(candidates, request, Measured(model, requirements))
    snapshot = roster.alive.get(best.worker) or alive[best.worker]  # it may have gone meanwhile
    demand = Demand(requirements, Constraints.of(request.gpu), best.model.key)
    verdict = await _verified(placed or _roomiest(demand, snapshot), demand, best, request, snapshot, queue)
    fits, placed = placed is not None and verdict.fits, verdict.placed
    free = available(snapshot.devices)
    devices = [
        EstimatedDevice(
            id=one.id,
            worker=best.worker,
            weights_bytes=one.weights_bytes,
            context_bytes=one.context_bytes,
            compute_bytes=one.compute_bytes,
            total_bytes=one.total_bytes,
            free_bytes=max(0, free[one.id]),
        )
        for one in placed.usage
        if one.id in free  # the engine also reports a CPU that is not among the worker's devices
    ]
    return EstimateResult(
        model=request.model,
        fits=fits,
        devices=devices,
        total_bytes=sum(device.total_bytes for device in devices),
        evicts=[held.instance_id for held in placed.evicts] if fits else [],
        max_context_length_that_fits=await figures.largest_context_length(
            roster.has_room(candidates, best.model, request, {best.worker: verdict.beside}), fits=fits
        ),
        exact=placed.exact,
    )


class _Verdict(Struct, frozen=True):
    """A placement as the engine sees it.  `beside`: the memory that it takes beyond the requirements, if any."""

    placed: Placement
    fits: bool = True
    beside: list[Holding] = []


async def _verified(
    placed: Placement,
    demand: Demand,
    candidate: Candidate,
    request: LoadRequest,
    snapshot: WorkerSnapshot,
    queue: Queue,
) -> _Verdict:
    """Have the engine check a placement that is not exact.  Looks for another place, as a worker does in a load, if the
    placement does not fit."""
    room = once_gone(available(snapshot.devices), placed.evicts)
    beside: list[Holding] = []
    for _ in range(DRY_RUNS):
        if placed.exact:
            return _Verdict(placed)
        model = candidate.model
        sizing = Sizing(request=request, key=model.key, source=model.source, gpus=placed.gpus, layers=placed.layers)
        usages = await queue.sized(candidate.worker, sizing)
        if usages is None:
            return _Verdict(placed)
        usage, estimated = usages[0], placed.bytes
        placed = structs.replace(placed, usage=usage, exact=True)
        more = {one.id: max(0, one.total_bytes - estimated.get(one.id, 0)) for one in usage}
        beside = [Holding(instance_id="", key="", devices=more, used_at=0.0, is_evictable=False)]
        if all(one.total_bytes <= room[one.id] for one in usage if one.id in room):
            return _Verdict(placed, beside=beside)
        devices = [
            structs.replace(device, available_bytes=room[device.id] - more.get(device.id, 0))
            for device in snapshot.devices
        ]
        other = place(demand, structs.replace(snapshot, devices=devices, held=[]))
        if other is None:
            break
        placed = structs.replace(other, evicts=placed.evicts)
    return _Verdict(placed, fits=False, beside=beside)


def _roomiest(demand: Demand, snapshot: WorkerSnapshot) -> Placement:
    """Return the placement as if there were enough room: on one GPU, if the worker has any and the request does not ask
    for a split."""
    requirements, constraints = demand.requirements, demand.constraints
    gpus = [device for device in snapshot.devices if device.id in constraints.gpus(snapshot.devices)]
    if not gpus or not demand.n_on_gpus:
        return Placement(usage=[requirements.on_cpu()], exact=requirements.is_exact(0, requirements.n_layers))
    if constraints.split is not None:
        vast = [structs.replace(device, available_bytes=MOST_BYTES) for device in snapshot.devices]
        if (placed := place_now(demand, structs.replace(snapshot, devices=vast))) is not None:
            return placed
    gpu = max(gpus, key=lambda device: device.available_bytes).id
    has_cpu = any(device.id == CPU for device in snapshot.devices)
    return Placement(
        gpus=[gpu],
        layers=[demand.n_on_gpus],
        usage=[
            requirements.on_gpu(gpu, demand.first, requirements.n_layers),
            *([requirements.beside_gpus(demand.first)] if has_cpu else []),
        ],
        exact=requirements.is_exact(1, demand.first),
    )
