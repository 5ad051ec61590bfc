"""Estimates the memory of a load, and whether it fits."""

from __future__ import annotations

from msgspec import structs

from api.pool.roster import Candidate, Roster
from shared.errors import LoadFailed
from shared.memory.placement import Constraints, Placement, available, once_gone
from shared.schema.http import EstimatedDevice, EstimateResult, LoadRequest
from shared.schema.memory import CPU, Usage
from shared.schema.snapshot import Sizing
from shared.store.queue import Queue


async def estimated(request: LoadRequest, roster: Roster, queue: Queue) -> EstimateResult:
    """Estimate where a load would go, from the latest snapshots of the workers.  Loads nothing.

    If the formula is not verified for the configuration (`shared.memory.estimate`), the engine of the worker does a dry
    run; `exact` is False if the worker does not reply.  If the load fits nowhere, the devices are those with the most
    room.

    Raises what the load would raise before it is accepted: ModelNotFound, NoWorker, InvalidValue, LoadFailed; and what
    UNAVAILABLE lists if Redis does not answer.
    """
    await roster.refresh()  # estimate with the memory that is free now, not a beat ago
    candidates, known = roster.candidates(request)
    if not candidates:
        raise roster.nowhere(request, known)
    best, placed = roster.choose(candidates, request)
    model = best.model
    if model.problem is not None:
        raise LoadFailed(model.problem.code, model.type, request.model, model.problem.message)
    fits = placed is not None
    if placed is None:
        placed = _roomiest(best, request, roster)
    if not placed.exact:
        sizing = Sizing(request=request, key=model.key, source=model.source, gpus=placed.gpus, layers=placed.layers)
        usage = await queue.sized(best.worker, sizing)
        if usage is not None:
            placed = structs.replace(placed, usage=usage, exact=True)
            fits = fits and _has_room(best, placed, roster)
    free = available(roster.alive[best.worker].devices)
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
        evicts=[held.instance_id for held in placed.evicts],
        max_context_length_that_fits=roster.largest_context_length(candidates, model, request),
        exact=placed.exact,
    )


def _roomiest(candidate: Candidate, request: LoadRequest, roster: Roster) -> Placement:
    """Return the placement as if there were enough room: on one GPU, if the worker has any."""
    requirements, constraints = roster.requirements(candidate.model, request), Constraints.of(request.gpu)
    devices = roster.alive[candidate.worker].devices
    gpus = [device for device in devices if device.id in constraints.gpus(devices)]
    n = constraints.n_layers(requirements)
    if not gpus or not n:
        return Placement(usage=[requirements.on_cpu()], exact=requirements.is_exact(0, requirements.n_layers))
    gpu = max(gpus, key=lambda device: device.available_bytes).id
    first = requirements.n_layers - n
    beside: list[Usage] = [requirements.beside_gpus(first)] if any(device.id == CPU for device in devices) else []
    return Placement(
        gpus=[gpu],
        layers=[n],
        usage=[requirements.on_gpu(gpu, first, requirements.n_layers), *beside],
        exact=requirements.is_exact(1, first),
    )


def _has_room(candidate: Candidate, placed: Placement, roster: Roster) -> bool:
    """Return whether the usage that the engine reported fits, once the evicted instances are unloaded."""
    room = once_gone(available(roster.alive[candidate.worker].devices), placed.evicts)
    return all(one.total_bytes <= room[one.id] for one in placed.usage if one.id in room)
