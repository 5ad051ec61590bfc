"""From what `bench.follow` measured to the Markdown that shows it."""

from __future__ import annotations

from msgspec import Struct

from bench.follow import API_PROCESSES, AT_ONCE, N_MODELS, N_ROUNDS, Followed, Idle, Round, What
from bench.report import Goal, goal, percentile, table

NAMES: dict[What, str] = {
    "accept": "accepting a load",
    "bare, Redis": "bare route with a round trip to Redis",
    "poll": "polling a job",
    "bare, poll": "bare route, as many bytes as the job",
    "list": f"listing {N_MODELS} models",
    "bare, list": "bare route, as many bytes as the list",
}
AGAINST: dict[What, What] = {"accept": "bare, Redis", "poll": "bare, poll", "list": "bare, list"}
LEAST = 0.5  # of the bare route's rate, of a poll and a list
PROCESSES = ("api", "handler", "redis", "worker", "client")


class Level(Struct, frozen=True, kw_only=True):
    """The rounds of one subject with so many requests at once, taken together."""

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
    """A rate's share of the bare route's, the other way round: at most twice the time."""
    found = levels(followed)
    return [
        goal(f"{NAMES[what]}, {n} at once: bare / service, rates", bare.per_s / found[what, n].per_s, 1 / LEAST, "x")
        for what, of in AGAINST.items()
        if what != "accept"
        for n in AT_ONCE
        for bare in [found[of, n]]
    ]


def markdown(followed: Followed) -> str:
    found = levels(followed)
    lines = [f"## The API under load: {API_PROCESSES} API processes, {N_MODELS} models", ""]
    lines += [
        _ratios(f"{NAMES[what]}, {n} at once", found[what, n], found[against, n])
        for what, against in AGAINST.items()
        for n in AT_ONCE
    ]
    verdicts = goals(followed)
    lines += [
        f"- at least {LEAST} of the bare route's rate, polling and listing: {sum(one.met for one in verdicts)} of "
        f"{len(verdicts)} met",
        "",
        *_rows(found),
        "",
        f"{N_ROUNDS} rounds of each in turn, after one that is not counted; connections are kept. A first tiny load "
        "was held meanwhile, its runner stopped by SIGSTOP, so that no load ran: each accepted one (`Prefer: "
        "respond-async`, 202) waited behind it under a name of its own (`key:2`, `key:3`, ...), its delivery was taken "
        "by the worker, and after the round all were cancelled and Redis showed nothing left. Polled are "
        "these, in turn. Bare routes are "
        " of a Starlette application without middleware in as many processes under the same "
        "uvicorn options: constant bytes, or a small JSON body decoded and one INCR sent to the same Redis. One client "
        "process. CPU is per request, with the work that a round leaves behind; the worker's and the client's take "
        "their share of the same cores.",
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
    """There is nothing to compare it to: each should be nothing."""
    calls = sorted(idle.commands.items(), key=lambda item: -item[1])
    return [
        f"## Doing nothing for {idle.seconds:.0f} s, one tiny model loaded",
        "",
        f"- all processes: {sum(idle.cpu_s.values()) / idle.seconds:.2%} of a core",
        f"- Redis: {idle.reads / idle.seconds:.1f} requests per second, in which "
        f"{sum(idle.commands.values()) / idle.seconds:.1f} commands with those within scripts",
        "",
        *table(["process", "% of a core"], [[name, f"{s / idle.seconds:.2%}"] for name, s in idle.cpu_s.items()]),
        "",
        "Commands per second: " + ", ".join(f"{name} {n / idle.seconds:.1f}" for name, n in calls) + ".",
    ]
