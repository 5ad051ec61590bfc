"""The Starlette application: routes, error handlers, middleware and lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.answering import Answering
from api.auth import Auth
from api.channel.channels import Channels
from api.downloads.intake import Downloads
from api.downloads.news import News
from api.errors import HANDLERS
from api.loads.demand import OnDemand
from api.loads.departures import Departures
from api.loads.follow import Follower
from api.loads.records import Records
from api.loads.stop import Stopper
from api.loads.submit import Intake
from api.outcome import Logged
from api.pool.ids import Ids
from api.pool.listing import Listing
from api.pool.loaded import Loaded
from api.pool.metrics import Requests, hand_over
from api.pool.roster import Roster
from api.pool.sweep import Sweep
from api.pool.view import View
from api.replies import Bodies, OpenReplies, most_replies
from api.routes import ROUTES
from api.state import State
from shared.settings import Settings, is_loopback, redis_url
from shared.store.connection import connected
from shared.store.responses import Responses
from shared.store.store import Store
from shared.telemetry import log, trace
from shared.telemetry.tally import Tally, named
from shared.tokens import read_tokens


class Traced:
    """Middleware: starts a span for every request, in the trace of the client or in a new one.

    All log lines of the request carry the ids.  They stay bound, because uvicorn logs an exception afterwards, and are
    replaced by those of the next request, which uvicorn may start in this one's context.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            span = trace.continued(Headers(scope=scope).getlist("traceparent"))
            log.begin(**span.ids)
            scope.setdefault("state", {})["traceparent"] = str(span)
        await self.app(scope, receive, send)


class LastReplies:
    """Middleware: once `draining` is set, closes connections after the reply, so that clients reconnect elsewhere."""

    def __init__(self, app: ASGIApp, draining: asyncio.Event) -> None:
        self.app = app
        self.draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self.draining.is_set():
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self.app(scope, receive, send_last)


def create_app(settings: Settings, closing: asyncio.Event, draining: asyncio.Event | None = None) -> Starlette:
    """Create the application.

    `draining` is set after a stop signal: new loads are refused from then on, other requests are served.  `closing` is
    set at the end of the drain: replies that wait for something end at once.
    """
    draining = draining or asyncio.Event()
    tokens = read_tokens(settings)
    names = {token.client: token.name for token in tokens if token.name}
    tally = Tally()
    for name in names.values():
        tally.add(named(name))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[State]:
        async with connected(redis_url(settings)) as redis, asyncio.TaskGroup() as group:
            store = Store(redis, settings.lease_s)
            roster = Roster(store.workers, settings)
            records = Records(store.instances)
            departures = Departures(store.instances)
            view = View(roster, store.instances)
            news = News(store.listen)
            follower = Follower(store.instances, store.listen, view.changed)
            sweep = Sweep(
                roster,
                view,
                store.instances,
                store.queue,
                store.listen,
                lease_s=settings.lease_s,
                load_attempts=settings.load_attempts,
            )
            intake = Intake(
                roster,
                store.queue,
                store.instances,
                records,
                departures,
                at_most=(settings.worker_queue_limit, settings.queue_limit),
            )
            channels = Channels(roster.last_seen, tally, names)
            on_demand = OnDemand(intake, records, follower, roster, store.queue, settings)
            answering = Answering(
                Loaded(roster, view),
                on_demand if settings.jit == "on" else None,
                channels,
                settings.request_wait_s,
            )

            async def close_channels() -> None:  # so that streams end with an error, not in the middle
                await closing.wait()
                await channels.close()

            parts = (
                sweep.run(),
                follower.run(),
                news.run(),
                departures.run(),
                hand_over(tally, store.counters),
                close_channels(),
            )
            tasks = [group.create_task(part) for part in parts]
            yield State(
                intake=intake,
                records=records,
                departures=departures,
                follower=follower,
                stopper=Stopper(store.instances, records, follower, settings.unload_wait_s),
                downloads=Downloads(roster, store.queue, store.downloads, store.instances, news),
                responses=Responses(
                    redis,
                    most=settings.responses,
                    most_bytes=settings.responses_bytes,
                    retain_s=settings.responses_retain_s,
                ),
                listing=Listing(roster, store.instances),
                ids=Ids(roster, store.instances),
                answering=answering,
                roster=roster,
                channels=channels,
                workers=store.workers,
                queue=store.queue,
                counters=store.counters,
                tally=tally,
                replies=OpenReplies(most_replies(settings.waiting_limit)),
                bodies=Bodies(),
                max_body_bytes=settings.max_body_bytes,
                draining=draining,
                closing=closing,
            )
            await on_demand.close()
            await channels.close()
            for task in tasks:
                task.cancel()

    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    middleware = [Middleware(Auth, tokens, is_loopback(settings.host))]
    if origins:  # outside of Auth: preflight requests of browsers carry no token
        middleware.insert(
            0, Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        )
    middleware[:0] = [
        Middleware(Traced),
        Middleware(Logged, names),
        Middleware(Requests, tally),
        Middleware(LastReplies, draining),
    ]
    app = Starlette(routes=ROUTES, exception_handlers=HANDLERS, middleware=middleware, lifespan=lifespan)
    app.router.redirect_slashes = False  # an unknown path is an error, not a redirect
    return app
