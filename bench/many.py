"""Concurrent loads: measured with `python -m bench many`.

Two cold models at once, compared with reading both files; two loads of one cold file, and the bytes read from the disk;
and a hundred tiny loads sent to one worker at once, compared with single ones.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from bench import pagecache
from bench.client import request
from bench.report import Goal, goal, percentile, table
from bench.sender import Sender, check, sender
from bench.subjects import CONTEXT_LENGTH, service
from worker.engine.prefetch import prefetch

LOAD, UNLOAD = "/api/v1/models/load", "/api/v1/models/unload"
ROUNDS = 3
N_TINY, N_ALONE = 100, 20
PAUSE_S = 1.0
SECTOR = 512  # bytes, of /sys/dev/block/*/stat: Documentation/block/stat.rst


class Side(Struct, frozen=True, kw_only=True):
    """One round of two concurrent cold loads."""

    read_s: float  # one file after the other, on an otherwise idle machine
    loads_s: list[float]
    disk_bytes: int

    @property
    def both_s(self) -> float:
        return max(self.loads_s)


class Many(Struct, frozen=True, kw_only=True):
    n_bytes: dict[str, int]  # by name of the measurement; each file counts once
    sides: dict[str, list[Side]]
    alone_s: list[float]  # tiny loads, one after the other with pauses
    together_s: list[float]  # tiny loads, all sent at once: each until its reply
    all_s: float
    serial_s: float  # the same number, each sent after the reply to the one before


TWO, SAME = "two models at once", "one model twice at once"


def measure(models: dict[str, Path], tiny: str, models_dir: Path, out: Path, say: Callable[[str], None]) -> Many:
    """Measure loads of two large models, given by key, and of a tiny one."""
    keys = [*models]
    pairs = {TWO: keys, SAME: [keys[0], keys[0]]}
    with service(models_dir, out, LOADSTONE_LOADS_AT_ONCE="2") as up, sender(out) as client:
        service_ = Loads(up.port, client)
        sides: dict[str, list[Side]] = {name: [] for name in pairs}
        for n in range(ROUNDS + 1):
            for name, both in pairs.items():
                say(f"{name}, round {n}")
                side = service_.side(both, [models[key] for key in dict.fromkeys(both)])
                if n > 0:
                    sides[name].append(side)
    with service(models_dir, out) as up, sender(out) as client:
        service_ = Loads(up.port, client)
        say("tiny loads, alone")
        alone_s = []
        for _ in range(N_ALONE):
            time.sleep(PAUSE_S / 4)
            alone_s += service_.load([tiny])
        say(f"{N_TINY} tiny loads, one after the other")
        started = time.perf_counter()
        service_.load([tiny] * N_TINY, at_once=1)
        serial_s = time.perf_counter() - started - service_.unload_s
        say(f"{N_TINY} tiny loads at once")
        together_s = service_.load([tiny] * N_TINY)
    return Many(
        n_bytes={name: sum(models[key].stat().st_size for key in {*both}) for name, both in pairs.items()},
        sides=sides,
        alone_s=alone_s,
        together_s=together_s,
        all_s=max(together_s),
        serial_s=serial_s,
    )


class Loads:
    def __init__(self, port: int, client: Sender) -> None:
        self.port, self.client = port, client
        self.unload_s = 0.0  # of the last loads
        time.sleep(PAUSE_S)  # wait for the first runner of the worker

    def load(self, keys: Sequence[str], at_once: int = 0) -> list[float]:
        """Load these models, `at_once` at a time or all, and unload them; return the seconds of each load."""
        sent = self.client.send(self.port, [_load(key) for key in keys], at_once or len(keys))
        check(sent.answers, 200)
        started = time.perf_counter()
        ids = [json.loads(answer.body)["instance_id"] for answer in sent.answers]
        unloads = [request("POST", UNLOAD, json.dumps({"instance_id": id_})) for id_ in ids]
        check(self.client.send(self.port, unloads, 4).answers, 200)
        self.unload_s = time.perf_counter() - started
        return [answer.seconds for answer in sent.answers]

    def side(self, keys: Sequence[str], files: Sequence[Path]) -> Side:
        with _cold(files):
            started = time.perf_counter()
            for path in files:
                _read(path)
            read_s = time.perf_counter() - started
        with _cold(files):
            before = _disk_bytes(files[0])
            loads_s = self.load(keys)
            disk_bytes = _disk_bytes(files[0]) - before
        return Side(read_s=read_s, loads_s=loads_s, disk_bytes=disk_bytes)


def _load(key: str) -> str:
    return request("POST", LOAD, json.dumps({"model": key, "context_length": CONTEXT_LENGTH}))


@contextmanager
def _cold(files: Sequence[Path]) -> Iterator[None]:
    for path in files:
        _read(path)
        pagecache.drop(path)
    time.sleep(PAUSE_S)
    yield


def _read(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    prefetch(fd, lambda n: None)
    os.close(fd)


def _disk_bytes(path: Path) -> int:
    """Return the bytes that all processes have read from the disk of a file."""
    device = path.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(stat[2]) * SECTOR


# ---- the report


def goals(many: Many) -> list[Goal]:
    two, same = many.sides[TWO], many.sides[SAME]
    return [
        goal(
            "two cold models at once / reading both, medians",
            _median(two, lambda side: side.both_s) / _median(two, lambda side: side.read_s),
            1 / 0.9,
            "x",
        ),
        goal(
            "bytes read from the disk for two loads of one model / its size",
            max(one.disk_bytes for one in same) / many.n_bytes[SAME],
            1.05,
            "x",
        ),
    ]


def markdown(many: Many) -> str:
    verdicts = goals(many)
    lines = [f"## Concurrent loads: {sum(one.met for one in verdicts)} of {len(verdicts)} goals met", ""]
    lines += [
        f"- {one.what}: {one.measured:.2f}, limit {one.limit:.2f}, {'met' if one.met else '**missed**'}"
        for one in verdicts
    ]
    rows = [
        [
            name,
            f"{many.n_bytes[name] / 1e9:.1f}",
            f"{_median(sides, lambda side: side.read_s):.2f}",
            f"{_median(sides, lambda side: side.both_s):.2f}",
            f"{many.n_bytes[name] / _median(sides, lambda side: side.both_s) / 1e9:.2f}",
            f"{statistics.median(one.disk_bytes for one in sides) / 1e9:.2f}",
        ]
        for name, sides in many.sides.items()
    ]
    heads = ["cold", "GB", "reading only, s", "both loaded, s", "GB/s", "read from the disk, GB"]
    lines += ["", *table(heads, rows), ""]
    each = many.all_s / N_TINY / statistics.median(many.alone_s)
    lines += [f"- each of {N_TINY} tiny loads at once takes {each:.2f} times as long as a single one", ""]
    tiny = [
        ("single, with pauses", many.alone_s, sum(many.alone_s)),
        (f"{N_TINY} at once", many.together_s, many.all_s),
    ]
    rows = [
        [name, str(len(seconds)), *(f"{percentile(seconds, q) * 1000:.0f}" for q in (0.5, 0.99)), f"{total:.2f}"]
        for name, seconds, total in tiny
    ]
    rows.append([f"{N_TINY} one after the other", str(N_TINY), "", "", f"{many.serial_s:.2f}"])
    lines += table(["tiny", "loads", "p50, ms", "p99, ms", "total, s"], rows)
    lines += [
        "",
        f"Medians of {ROUNDS} rounds after one uncounted round; two loads at once on the CPU "
        "(`LOADSTONE_LOADS_AT_ONCE=2`), each from its request to its reply, including the context and a decoded token. "
        "Reading only: both files, one after the other, as Loadstone reads. The disk's figure counts the reads of all "
        "processes. The tiny loads are of one model, on one worker that loads one at a time, each in its own process; "
        f"the last of them waits for the {N_TINY - 1} before it.",
    ]
    return "\n".join(lines)


def _median(sides: list[Side], figure: Callable[[Side], float]) -> float:
    return statistics.median(map(figure, sides))
