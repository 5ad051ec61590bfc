"""What a load would take, and whether it would fit: the use case of an estimate."""

from __future__ import annotations

from api.models import check, nowhere
from api.roster import Roster
from shared.errors import LoadFailed
from shared.estimate import estimate, fits, largest_context_length
from shared.plan import plan
from shared.schema import EstimatedDevice, EstimateResult, LoadRequest
from shared.settings import Settings


async def estimated(request: LoadRequest, roster: Roster, settings: Settings) -> EstimateResult:
    """On the one device with the most free bytes, of all live workers that have the model.  Loads nothing.

    It is a formula over what the workers published; `exact` is False where that was not compared with the engine
    (`shared.estimate`), and where the worker has several devices, over which a load would be spread.  What would be
    exact there is a dry run by the engine in a runner, which does not exist yet.  Nothing is evicted yet either.

    Raises what a load of this request would, before it is accepted: ModelNotFound, NoWorker, InvalidValue, LoadFailed.
    """
    await roster.refresh()  # what is free now
    workers, known = roster.with_model(request.model)
    usable = [(device, worker, model) for worker, model in workers for device in roster.alive[worker].devices]
    if not usable:
        raise nowhere(request.model, known)
    device, worker, model = max(usable, key=lambda found: (found[2].problem is None, found[0].free_bytes))
    if model.problem is not None:
        raise LoadFailed(model.problem.code, model.type, request.model, model.problem.message)
    check(request, model)
    needed = estimate(model, plan(request, model, settings), device.kind)
    return EstimateResult(
        model=request.model,
        fits=fits(needed, [device]),
        devices=[
            EstimatedDevice(
                id=device.id,
                worker=worker,
                weights_bytes=needed.weights_bytes,
                context_bytes=needed.context_bytes,
                compute_bytes=needed.compute_bytes,
                total_bytes=needed.total_bytes,
                free_bytes=device.free_bytes,
            )
        ],
        total_bytes=needed.total_bytes,
        evicts=[],
        max_context_length_that_fits=largest_context_length(request, model, settings, [device]),
        exact=needed.exact and len(roster.alive[worker].devices) == 1,
    )
