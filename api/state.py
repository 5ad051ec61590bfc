"""The state that routes use."""

from __future__ import annotations

import asyncio
from typing import NotRequired, TypedDict

from api.answering import Answering
from api.channel.channels import Channels
from api.downloads.intake import Downloads
from api.loads.departures import Departures
from api.loads.follow import Follower
from api.loads.records import Records
from api.loads.stop import Stopper
from api.loads.submit import Intake
from api.pool.ids import Ids
from api.pool.listing import Listing
from api.pool.roster import Roster
from api.replies import Bodies, OpenReplies
from shared.store.counters import Counters
from shared.store.queue import Queue
from shared.store.responses import Responses
from shared.store.workers import Workers
from shared.telemetry.tally import Tally
from shared.tokens import Scope


class State(TypedDict):
    """The state of a `Request[State]`: the objects that the lifespan yields, and the additions of middleware."""

    intake: Intake
    records: Records
    departures: Departures
    follower: Follower
    stopper: Stopper
    downloads: Downloads
    responses: Responses
    listing: Listing
    ids: Ids
    answering: Answering
    roster: Roster
    channels: Channels
    workers: Workers
    queue: Queue
    counters: Counters
    tally: Tally
    replies: OpenReplies
    bodies: Bodies
    max_body_bytes: int  # of a request to a model
    draining: asyncio.Event
    closing: asyncio.Event
    caller: NotRequired[str]  # the client of the token; `api.auth.Auth` adds it
    scope: NotRequired[Scope]  # of the token, `manage` if there are no tokens; `api.auth.Auth` adds it
    traceparent: NotRequired[str]  # of this request's span; `api.app.Traced` adds it
