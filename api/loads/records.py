"""Reads the records of loads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from api.loads.jobs import log, status
from api.single_flight import SingleFlight
from shared.errors import JobNotFound
from shared.instance import Instance
from shared.schema.http import JobStatus
from shared.store.instances import Instances


class Records:
    """Reads the records of loads.  Every method raises what UNAVAILABLE lists if Redis does not answer."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self._flight = SingleFlight(self._read)

    async def get(self, job_id: str) -> Instance:
        """Return the record of a load.  Raises JobNotFound."""
        instance = await self._flight(job_id)
        if instance is None:
            raise JobNotFound(f"Job '{job_id}' not found.", param="job_id")
        return instance

    async def newest(self, only: JobStatus | None, limit: int) -> list[Instance]:
        """Return up to `limit` records, newest first, only those with the status `only` unless it is None."""
        records: list[Instance] = []
        async with aclosing(self._instances.newest()) as newest:
            async for instance in newest:
                if only is None or status(instance) == only:
                    records.append(instance)
                if len(records) == limit:
                    break
        return records

    async def log(self, job_id: str) -> bytes:
        """Return the log of a load, which may be empty.  Raises JobNotFound."""
        instance = await self.get(job_id)  # first: the log of a load that has ended is complete
        return log(await self._instances.engine_log(job_id) or b"", instance)

    async def _read(self, ids: Sequence[str]) -> dict[str, Instance | None]:
        return {**dict.fromkeys(ids), **{instance.id: instance for instance in await self._instances.many(ids)}}
