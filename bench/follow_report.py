"""From what `bench.follow` measured to the Markdown that shows it."""

from __future__ import annotations

from msgspec import Struct

from bench.follow import AT_ONCE, N_ROUNDS, Followed, Idle, N, Round, What
from bench.report import percentile, table

NAMES: dict[What, str] = {"accept": "accepting a load", "poll": "polling a job", "bare": "bare handler"}
PROCESSES = ("api", "handler", "redis", "worker", "client")


class Level(Struct, frozen=True, kw_only=True):
    """The rounds of one subject with so many requests at once, taken together."""

    n: int
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: dict[str, float]  # per request

    @classmethod
    def of(cls, rounds: list[Round]) -> Level:
        latencies = [seconds for one in rounds for seconds in one.latencies_s]
        n = len(latencies)
        return cls(
            n=n,
            per_s=n / sum(one.wall_s for one in rounds),
            p50_ms=percentile(latencies, 0.5) * 1000,
            p99_ms=percentile(latencies, 0.99) * 1000,
            cpu_ms={name: sum(one.cpu_s[name] for one in rounds) / n * 1000 for name in PROCESSES},
        )


def markdown(followed: Followed) -> str:
    levels = {
        (what, at_once): Level.of([one for one in followed.rounds if (one.what, one.at_once) == (what, at_once)])
        for at_once in AT_ONCE
        for what in NAMES
    }
    lines = ["## Accepting and polling, against a bare handler", ""]
    for (what, at_once), level in levels.items():
        if what != "bare":
            lines.append(_ratios(f"{NAMES[what]}, {at_once} at once", level, levels["bare", at_once]))
    lines += ["", *_rows(levels)]
    lines += [
        "",
        f"{N_ROUNDS} rounds of each in turn, {N['accept']} loads, {N['poll']} polls or {N['bare']} bare requests in "
        "a round, after one that is not counted. A first tiny load was held meanwhile, its runner stopped by "
        "SIGSTOP, so that no load ran: each accepted one (`Prefer: respond-async`, 202) waited behind it under a "
        "name of its own (`key:2`, `key:3`, ...), its delivery was taken by the worker, and after the round all "
        "were cancelled and Redis showed nothing left. The polled job is the held load. Bare is a Starlette handler "
        "under the same uvicorn options that decodes a small JSON body and sends Redis one INCR: same Redis, same "
        "client process, kept connections. CPU is per request, with the work that a round leaves behind; the "
        "worker's takes its share of the same cores.",
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
        f"CPU of the server process {server / handler:.1f} ({server:.2f} ms / {handler:.2f} ms)"
    )


def _rows(levels: dict[tuple[What, int], Level]) -> list[str]:
    rows = []
    for (what, at_once), level in levels.items():
        no = "api" if what == "bare" else "handler"
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
