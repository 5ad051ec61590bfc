"""The messages between a worker and a process that talks to the hub."""

from __future__ import annotations

from msgspec import Struct, msgpack

from shared.download import InspectRequest, Offer, Plan, Refusal
from shared.schema.snapshot import Described
from worker.hub.client import Access


class Inspect(Struct, frozen=True, kw_only=True, tag="inspect"):
    """Find what a download would fetch, and whether there is room for it."""

    access: Access
    root: str  # the models directory
    store: str  # its id
    request: InspectRequest


class Fetch(Struct, frozen=True, kw_only=True, tag="fetch"):
    """Fetch what is missing of a plan, and put it into its place."""

    access: Access
    root: str
    plan: Plan
    patience_s: float


class Describe(Struct, frozen=True, kw_only=True, tag="describe"):
    """Describe a model by the headers of its files."""

    access: Access
    request: InspectRequest
    directory: str  # for the headers; the process creates it


Ask = Inspect | Fetch | Describe


class Progressed(Struct, frozen=True, tag="progressed"):
    bytes: int  # that are there


class Finished(Struct, frozen=True, tag="finished"):
    """The files are in their place."""


class Busy(Struct, frozen=True, tag="busy"):
    """Another process fetches the same into the same directory."""


class Description(Struct, frozen=True, tag="description"):
    """A model, or why there is none.

    `files`: names of those with the headers, one for each shard; none if they are not there.
    """

    described: Described
    files: list[str] = []
    is_unreachable: bool = False  # the hub


Told = Offer | Progressed | Finished | Busy | Refusal | Description

decode_ask = msgpack.Decoder(Ask).decode
decode_told = msgpack.Decoder(Told).decode
