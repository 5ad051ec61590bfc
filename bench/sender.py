"""Sends requests through `bench.client`, which runs in its own process."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from bench.client import Answer, Sent, Task
from bench.subjects import Failure, running

WITHIN_S = 60.0


class Sender:
    def __init__(self, stdin: IO[str], stdout: IO[str], log: Path) -> None:
        self._stdin, self._stdout, self._log = stdin, stdout, log

    def send(self, port: int, requests: list[str], at_once: int = 1, *, bodies: bool = True) -> Sent:
        """Send requests; return the replies, with empty bodies unless `bodies`.  Raises Failure if one is missing."""
        task = Task(port=port, requests=requests, at_once=at_once, within_s=WITHIN_S, bodies=bodies)
        self._stdin.write(msgspec.json.encode(task).decode() + "\n")
        self._stdin.flush()
        if not select.select([self._stdout], [], [], WITHIN_S + 5)[
            0
        ]:  # nothing is buffered: there is one line for each task
            raise Failure(f"the benchmark's client wrote nothing for {WITHIN_S + 5:g} s; see {self._log}")
        line = self._stdout.readline()
        if not line:
            raise Failure(f"the benchmark's client has exited; see {self._log}")
        return msgspec.json.decode(line, type=Sent)


@contextmanager
def sender(out: Path) -> Iterator[Sender]:
    log = out / "client.log"
    with log.open("w") as stderr, running([sys.executable, "-m", "bench.client"], stderr) as process:
        assert process.stdin
        assert process.stdout
        yield Sender(process.stdin, process.stdout, log)


def check(answers: list[Answer], status: int) -> None:
    """Raise Failure if an answer has another status."""
    for answer in answers:
        if answer.status != status:
            raise Failure(f"the reply has status {answer.status} instead of {status}: {answer.body}")
