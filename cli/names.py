"""Finds the load that a person means by the id of its job, by that of its instance, or by a prefix of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cli.failure import Failure, error

SHOWN_N = 10  # candidates of an ambiguous prefix


class Load(NamedTuple):
    """The ids of a load."""

    job_id: str
    instance_id: str


def meant(word: str, preferred: Sequence[Load], others: Sequence[Load]) -> Load | None:
    """Return the load that `word` means, None if there is none.  Both sequences have the newest load first.

    A whole id is preferred to a prefix, and then a preferred load to another.  Several loads had the same instance id,
    one after the other: the newest of them is meant.  Raises Failure if the word is a prefix of several.
    """
    for loads in (preferred, others):
        if whole := next((load for load in loads if word in load), None):
            return whole
    for loads in (preferred, others) if word else ():
        newest = {load.instance_id: load for load in reversed(loads) if load.instance_id.startswith(word)}
        found = {*newest.values(), *(load for load in loads if load.job_id.startswith(word))}
        if len(found) > 1:
            shown = [f"{load.instance_id} ({load.job_id})" for load in loads if load in found]
            more = "" if len(shown) <= SHOWN_N else f" and {len(shown) - SHOWN_N} more"
            raise Failure(error("ambiguous", f"'{word}' is ambiguous: {', '.join(shown[:SHOWN_N])}{more}."))
        if found:
            return found.pop()
    return None
