"""Making what a worker holds match what the records say: first decided, then done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """What a worker holds of one instance."""

    @property
    def id(self) -> str: ...
    @property
    def claimed(self) -> bool: ...
    @property
    def instance(self) -> Instance | None:
        """The record as it was written last; None before it was claimed."""


class Stop(Struct, frozen=True):
    """Stop what is held: a stop was requested."""

    id: str


class Rewrite(Struct, frozen=True):
    """Redis lost the record of what is held, or its last revisions.  What it does not take again is stopped if
    `or_stop`."""

    id: str
    or_stop: bool


class Deliver(Struct, frozen=True):
    """Take it from the queue: its delivery was lost, or it is to be begun at `not_before`."""

    id: str
    not_before: float


class GiveUp(Struct, frozen=True):
    """We claimed it and do not hold it: the reply to the claim was lost, or it is an earlier process's."""

    record: Instance


Action = Stop | Rewrite | Deliver | GiveUp


def decide(held: Iterable[Held], records: Sequence[Instance], worker: str, epoch: str) -> list[Action]:
    """Decide what to do so that what is held matches the live records of a worker.

    `held` is all that the worker holds or waits for; `records` are the live records of this worker, and of what it
    holds.
    """
    actions: list[Action] = []
    by_id = {record.id: record for record in records}
    ids = set()
    for one in held:
        ids.add(one.id)
        if not one.claimed:
            continue
        record = by_id.get(one.id)
        if record is None or record.epoch != epoch:
            actions.append(Rewrite(one.id, or_stop=True))
        elif record.stop_requested:
            actions.append(Stop(one.id))
        elif one.instance is not None and record.rev < one.instance.rev:
            actions.append(Rewrite(one.id, or_stop=False))
    for record in records:
        if record.id in ids:
            continue
        match record.state:
            case State.QUEUED:
                if worker not in record.refused:  # else an API is to find it another worker
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
    """Does what `decide` says."""

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
        """`attempts`: how often a load is begun before it fails.  `deliver` takes a load and when to begin it, in
        seconds since the epoch; `stop` stops one that is held."""
        self._name, self._epoch = name, epoch
        self._attempts = attempts
        self._instances = instances
        self._desired = desired
        self._residents = residents
        self._deliver = deliver
        self._stop = stop

    async def reconcile(self) -> None:
        """Compare once, and act.  Raises what UNAVAILABLE lists."""
        claimed = [held.id for held in self._residents.values() if held.claimed]
        records = await self._instances.live_at(self._name, claimed)
        for action in decide([*self._residents.values()], records, self._name, self._epoch):
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
        """Give up a claimed instance that nobody holds any more: one that was never loaded is begun again.

        Raises what UNAVAILABLE lists.
        """
        if record.state is State.LOADED and not record.stop_requested:
            self._desired.add(record)
        with suppress(Fenced), log.about(record):
            record, _ = await commit(self._instances, record, record.abandoned(self._attempts))
            if record.state is State.QUEUED and record.stop_requested:
                await commit(self._instances, record, record.after(Event.STOP))

    async def _is_kept(self, id_: str) -> bool:
        """Return whether a loaded instance stays although its record is not as we left it: Redis was emptied, or lost
        what it was told last, and is told again.  If another writer moved it on, or its id was given away, it is not
        ours."""
        held = self._residents.get(id_)
        loaded = None if held is None else held.instance
        if not self._desired.is_on or loaded is None or loaded.state is not State.LOADED:
            return False
        found = await self._instances.rewrite(loaded)
        match found:
            case "written":
                with log.about(loaded):
                    _log.warning("record written again", action="record_rewritten")
                return True
            case "there":
                return True
            case "newer" | "name taken":
                return False
            case _:
                assert_never(found)
