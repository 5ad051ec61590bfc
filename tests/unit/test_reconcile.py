"""What a worker does about instances whose records do not match."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from shared.instance import Instance
from shared.lifecycle import State
from shared.schema.http import LoadRequest
from worker.reconcile import Action, Deliver, GiveUp, Rewrite, Stop, decide

QUEUED = Instance(id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=LoadRequest(model="p/m"), rev=1)
LOADED = msgspec.structs.replace(QUEUED, state=State.LOADED, epoch="e", rev=5)


@dataclass
class Resident:
    instance: Instance | None
    id: str = "load_1"
    claimed: bool = True


def changed(record: Instance, **fields: object) -> Instance:
    return msgspec.structs.replace(record, **fields)


@pytest.mark.parametrize(
    ("record", "actions"),
    [
        (LOADED, []),
        (None, [Rewrite("load_1", or_stop=True)]),
        (changed(LOADED, epoch="another"), [Rewrite("load_1", or_stop=True)]),
        (changed(LOADED, stop_requested=True), [Stop("load_1")]),
        (changed(LOADED, rev=4), [Rewrite("load_1", or_stop=False)]),
    ],
)
def test_a_claimed_instance_follows_its_record(record: Instance | None, actions: list[Action]) -> None:
    records = [] if record is None else [record]
    assert decide([Resident(LOADED)], {"load_1"}, records, "w", "e") == actions


@pytest.mark.parametrize(
    ("record", "actions"),
    [
        (QUEUED, [Deliver("load_1", 0.0)]),
        (changed(QUEUED, not_before=9.5), [Deliver("load_1", 9.5)]),
        (changed(QUEUED, refused=["w"]), []),
        (LOADED, [GiveUp(LOADED)]),
        (changed(LOADED, epoch="another"), []),
    ],
)
def test_a_record_without_an_instance_is_taken_or_given_up(record: Instance, actions: list[Action]) -> None:
    assert decide([], set(), [record], "w", "e") == actions


def test_a_claim_made_while_records_are_read_stays() -> None:
    """The record was read before the claim: it is still queued, without an epoch."""
    assert decide([], {"load_1"}, [QUEUED], "w", "e") == []
