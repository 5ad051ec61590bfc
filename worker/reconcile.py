"""Reconciles the instances that a worker holds with their records: a pure decision, then its execution."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol, assert_never

from msgspec import Struct

from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.store.instances import Fenced, Instances
from shared.telemetry import log
from worker.desired import Desired
from worker.record import commit

_log = log.get("worker")


class Held(Protocol):
    """An instance that a worker holds, or is about to load."""

    @property
    def id(self) -> str: ...
    @property
    def claimed(self) -> bool: ...
    @property
    def instance(self) -> Instance | None:
        """The record as this worker wrote it last; None before the claim."""


class Stop(Struct, frozen=True):
    """Stop a held instance: a stop was requested."""

    id: str


class Rewrite(Struct, frozen=True):
    """Write the record of a held instance again: Redis lost it, or its last revisions.

    If `or_stop`, the instance is stopped if the record cannot be rewritten.
    """

    id: str
    or_stop: bool


class Deliver(Struct, frozen=True):
    """Accept a queued instance whose delivery was lost, or that is scheduled for `not_before`."""

    id: str
    not_before: float


class GiveUp(Struct, frozen=True):
    """Give up an instance that is claimed by this worker but not held: the reply to the claim was lost."""

    record: Instance


Action = Stop | Rewrite | Deliver | GiveUp


def decide(
    claimed: Iterable[Held], held: Collection[str], records: Sequence[Instance], worker: str, epoch: str
) -> list[Action]:
    """Return the actions that make the held instances match their records.

    `claimed` are the instances that were claimed before `records` were read: the records of those that were claimed
    meanwhile may be older than the claim.  `held` are the ids of all loads that the worker holds or has accepted now.
    `records` are the live records of this worker and those of `claimed`.
    """
    actions: list[Action] = []
    by_id = {record.id: record for record in records}
    for resident in claimed:
        record = by_id.get(resident.id)
        if record is None or record.epoch != epoch:
            actions.append(Rewrite(resident.id, or_stop=True))
        elif record.stop_requested:
            actions.append(Stop(resident.id))
        elif resident.instance is not None and record.rev < resident.instance.rev:
            actions.append(Rewrite(resident.id, or_stop=False))
    for record in records:
        if record.id in held:
            continue
        match record.state:
            case State.QUEUED:
                if worker not in record.refused:  # a refused load waits for an API to choose another worker
                    actions.append(Deliver(record.id, record.not_before))
            case State.LOADING | State.LOADED | State.UNLOADING:
                if record.epoch == epoch:
                    actions.append(GiveUp(record))
            case State.UNLOADED | State.CANCELLED | State.FAILED | State.LOST:
                pass
            case _:
                assert_never(record.state)
    return actions


class Reconciler:
    """Executes the actions that `decide` returns."""

    def __init__(
        self,
        name: str,
        epoch: str,
        attempts: int,
        instances: Instances,
        desired: Desired,
        residents: Mapping[str, Held],
        deliver: Callable[[str, float], None],
        stop: Callable[[str], None],
    ) -> None:
        """`attempts`: how often a load is started before it fails.  `deliver` takes the id of a load and its earliest
        start, in seconds since the epoch.  `stop` takes the id of a held load."""
        self._name, self._epoch = name, epoch
        self._attempts = attempts
        self._instances = instances
        self._desired = desired
        self._residents = residents
        self._deliver = deliver
        self._stop = stop

    async def reconcile(self) -> None:
        """Compare held instances and records once, and act.  Raises what UNAVAILABLE lists."""
        claimed = [held for held in self._residents.values() if held.claimed]
        records = await self._instances.live_at(self._name, [held.id for held in claimed])
        for action in decide(claimed, self._residents.keys(), records, self._name, self._epoch):
            match action:
                case Stop():
                    self._stop(action.id)
                case Rewrite():
                    if not await self._is_kept(action.id) and action.or_stop:
                        self._stop(action.id)
                case Deliver():
                    self._deliver(action.id, action.not_before)
                case GiveUp():
                    await self.give_up(action.record)
                case _:
                    assert_never(action)

    async def give_up(self, record: Instance) -> None:
        """Give up a claimed instance that no process holds: it is lost, or requeued if it was never loaded.

        Raises what UNAVAILABLE lists.
        """
        if record.state is State.LOADED and not record.stop_requested:
            self._desired.add(record)
        with suppress(Fenced), log.about(record):
            record, _ = await commit(self._instances, record, record.abandoned(self._attempts))
            if record.state is State.QUEUED and record.stop_requested:
                await commit(self._instances, record, record.after(Event.STOP))

    async def _is_kept(self, id_: str) -> bool:
        """Rewrite the record of a loaded instance that Redis lost, in whole or in part.

        Returns whether the instance may stay.  It may not if another writer changed the record, or if its `instance_id`
        now belongs to another load.
        """
        held = self._residents.get(id_)
        loaded = None if held is None else held.instance
        if not self._desired.is_on or loaded is None or loaded.state is not State.LOADED:
            return False
        result = await self._instances.rewrite(loaded)
        match result:
            case "written":
                with log.about(loaded):
                    _log.warning("record rewritten", action="record_rewritten")
                return True
            case "there":
                return True
            case "newer" | "name taken":
                return False
            case _:
                assert_never(result)
