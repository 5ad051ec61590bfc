"""Render the measurements of `bench.follow` as Markdown."""

from __future__ import annotations

from msgspec import Struct

from bench.follow import API_PROCESSES, AT_ONCE, N_MODELS, N_ROUNDS, Followed, Idle, Round, What
from bench.report import Goal, goal, percentile, table

NAMES: dict[What, str] = {
    "accept": "accepting a load",
    "bare, Redis": "bare route with a round trip to Redis",
    "poll": "polling a job",
    "bare, poll": "bare route with the bytes of a job",
    "list": f"listing {N_MODELS} models",
    "bare, list": "bare route with the bytes of the list",
}
AGAINST: dict[What, What] = {"accept": "bare, Redis", "poll": "bare, poll", "list": "bare, list"}
LEAST = 0.5  # smallest share of the bare route's rate, for polls and lists
PROCESSES = ("api", "handler", "redis", "worker", "client")


class Level(Struct, frozen=True, kw_only=True):
    """All rounds of one subject with the same number of concurrent requests."""

    n: int
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: dict[str, float]  # per request, by kind of process

    @classmethod
    def of(cls, rounds: list[Round]) -> Level:
        latencies = [seconds for one in rounds for seconds in one.latencies_s]
        n = len(latencies)
        return cls(
            n=n,
            per_s=n / sum(one.wall_s for one in rounds),
            p50_ms=percentile(latencies, 0.5) * 1000,
            p99_ms=percentile(latencies, 0.99) * 1000,
            cpu_ms={
                kind: sum(s for one in rounds for name, s in one.cpu_s.items() if name.split()[0] == kind) / n * 1000
                for kind in PROCESSES
            },
        )


def levels(followed: Followed) -> dict[tuple[What, int], Level]:
    return {
        (what, at_once): Level.of([one for one in followed.rounds if (one.what, one.at_once) == (what, at_once)])
        for at_once in AT_ONCE
        for what in NAMES
    }


def goals(followed: Followed) -> list[Goal]:
    """Return the goals: the rate of the bare route is at most twice the service's, for polls and lists."""
    by_level = levels(followed)
    return [
        goal(f"{NAMES[what]}, {n} at once: bare / service, rates", bare.per_s / by_level[what, n].per_s, 1 / LEAST, "x")
        for what, of in AGAINST.items()
        if what != "accept"
        for n in AT_ONCE
        for bare in [by_level[of, n]]
    ]


def markdown(followed: Followed) -> str:
    by_level = levels(followed)
    lines = [f"## The API under load: {API_PROCESSES} API processes, {N_MODELS} models", ""]
    lines += [
        _ratios(f"{NAMES[what]}, {n} at once", by_level[what, n], by_level[against, n])
        for what, against in AGAINST.items()
        for n in AT_ONCE
    ]
    verdicts = goals(followed)
    lines += [
        f"- at least {LEAST} of the bare route's rate, polling and listing: {sum(one.met for one in verdicts)} of "
        f"{len(verdicts)} met",
        "",
        *_rows(by_level),
        "",
        f"{N_ROUNDS} rounds of each in turn, after one uncounted round; connections are kept. A first tiny load was "
        "held meanwhile, its runner stopped by SIGSTOP, so that no load ran: each accepted load (`Prefer: "
        "respond-async`, 202) was queued behind it with its own name (`key:2`, `key:3`, ...). The worker took its "
        "delivery. After the round all loads were cancelled, and Redis had no other instance left. The polls read "
        "these jobs in turn. The bare routes belong to a Starlette application without middleware, in as many "
        "processes and with the same uvicorn options: constant bytes, or a small JSON body decoded and one INCR sent "
        "to the same Redis. There is one client process. CPU time is per request and includes work after the replies; "
        "the worker and the client share the cores with the API.",
        "",
        *_idle(followed.idle),
    ]
    return "\n".join(lines)


def _ratios(what: str, level: Level, bare: Level) -> str:
    server, handler = level.cpu_ms["api"], bare.cpu_ms["handler"]
    return (
        f"- {what}: rate service / bare = {level.per_s / bare.per_s:.2f} ({level.per_s:.0f}/s / {bare.per_s:.0f}/s), "
        f"p50 {level.p50_ms / bare.p50_ms:.1f} ({level.p50_ms:.2f} ms / {bare.p50_ms:.2f} ms), "
        f"p99 {level.p99_ms / bare.p99_ms:.1f} ({level.p99_ms:.2f} ms / {bare.p99_ms:.2f} ms), "
        f"CPU of the server processes {server / handler:.1f} ({server:.2f} ms / {handler:.2f} ms)"
    )


def _rows(levels: dict[tuple[What, int], Level]) -> list[str]:
    rows = []
    for (what, at_once), level in levels.items():
        no = "api" if what.startswith("bare") else "handler"
        cpu = ["" if name == no else f"{level.cpu_ms[name]:.3f}" for name in PROCESSES]
        figures = [f"{level.per_s:.0f}", f"{level.p50_ms:.2f}", f"{level.p99_ms:.2f}"]
        rows.append([NAMES[what], str(at_once), str(level.n), *figures, *cpu])
    heads = ["", "at once", "requests", "per s", "p50 ms", "p99 ms", *(f"CPU ms, {name}" for name in PROCESSES)]
    return table(heads, rows)


def _idle(idle: Idle) -> list[str]:
    """Render the idle costs; there is no bare counterpart, and each should be close to zero."""
    calls = sorted(idle.commands.items(), key=lambda item: -item[1])
    return [
        f"## Idle for {idle.seconds:.0f} s, with one tiny model loaded",
        "",
        f"- all processes: {sum(idle.cpu_s.values()) / idle.seconds:.2%} of a core",
        f"- Redis: {idle.reads / idle.seconds:.1f} requests per second with "
        f"{sum(idle.commands.values()) / idle.seconds:.1f} commands, including those in scripts",
        "",
        *table(["process", "% of a core"], [[name, f"{s / idle.seconds:.2%}"] for name, s in idle.cpu_s.items()]),
        "",
        "Commands per second: " + ", ".join(f"{name} {n / idle.seconds:.1f}" for name, n in calls) + ".",
    ]
