"""Translates a client's request to the message that a runner receives."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs

from shared.memory import plan as parameters
from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.settings import Settings
from worker.runner.protocol import Load, Serving


def plan(request: LoadRequest, model: Model, settings: Settings, devices: list[str], layers: list[int]) -> Load:
    """Return the `Load` for a request.  `devices` and `layers` are as in `Load`: GPUs, or none for the CPU."""
    return Load(
        shards=[str(Path(settings.roots[model.root], shard)) for shard in model.shards],
        total_bytes=model.size_bytes,
        can_map=model.can_map,
        check_tensors=settings.check_tensors == "on",
        devices=devices,
        layers=layers,
        is_whole=model.dimensions is not None and sum(layers) > model.dimensions.block_count,  # with the output
        serving=Serving(
            requests_waiting=settings.requests_waiting,
            request_wait_s=settings.request_wait_s,
            request_s=settings.request_s,
            max_output_tokens=settings.max_output_tokens,
            shared_prefixes=settings.shared_prefixes == "on",
        ),
        **structs.asdict(parameters.plan(request, model, settings)),
    )
