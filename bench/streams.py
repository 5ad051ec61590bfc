"""Streams answers from a local server and notes when each piece of text arrives.

`python -m bench.streams` answers each `Round` on stdin with a list of `Stream`, both as lines of JSON.  It is a process
of its own, so that reading costs the measured servers nothing but CPU time, and each of them the same.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

import msgspec
import uvloop
from msgspec import Struct

GENERATED, PROMPT, CACHED = (
    re.compile(rb'"%b":(\d+)' % name) for name in (b"completion_tokens", b"prompt_tokens", b"cached_tokens")
)
OWN = [re.compile(rb'"%b":([0-9.e+-]+)' % name) for name in (b"queued_ms", b"prompt_ms")]
TEXT = re.compile(rb'"(?:content|text)":"(?!")')


class Round(Struct, frozen=True, kw_only=True):
    """Send these bodies at the same time, each over a connection of its own."""

    port: int
    path: str
    bodies: list[str]
    within_s: float


class Stream(Struct, frozen=True, kw_only=True):
    """A streamed answer; times are in seconds since the first request of its round was written."""

    sent_s: float
    texts_s: list[float]  # of each piece of text
    ended_s: float
    tokens: int  # generated, by the server's own count
    prompt_tokens: int
    cached_tokens: int  # of the prompt
    own_ms: float  # to the first token, by the server's own count
    error: str = ""

    @property
    def first_ms(self) -> float:
        """Milliseconds to the first text; to the end if there is none."""
        return ((self.texts_s[0] if self.texts_s else self.ended_s) - self.sent_s) * 1000

    @property
    def step_ms(self) -> float:
        """Milliseconds between two tokens; 0 if there are no two."""
        return (
            (self.texts_s[-1] - self.texts_s[0]) * 1000 / (self.tokens - 1) if self.tokens > 1 and self.texts_s else 0.0
        )


async def stream(task: Round, body: str, started: float) -> Stream:
    reader, writer = await asyncio.open_connection("127.0.0.1", task.port, limit=1 << 24)
    content = body.encode()
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (task.path.encode(), len(content), content)
    )
    sent_s = time.monotonic() - started
    texts: list[float] = []
    rest, everything = b"", []
    while chunk := await reader.read(1 << 16):
        now = time.monotonic() - started
        everything.append(chunk)
        complete, end, rest = (rest + chunk).rpartition(b"\n\n")
        texts += [now] * len(TEXT.findall(complete + end))
    writer.close()
    reply = b"".join(everything)
    counts = [pattern.search(reply) for pattern in (GENERATED, PROMPT, CACHED)]
    tokens, prompt_tokens, cached_tokens = (int(count[1]) if count else 0 for count in counts)
    own = [pattern.search(reply) for pattern in OWN]
    return Stream(
        sent_s=sent_s,
        texts_s=texts,
        ended_s=time.monotonic() - started,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        own_ms=sum(float(time_[1]) for time_ in own if time_),
        error="" if b"data: [DONE]" in reply else reply[-500:].decode("utf-8", "replace"),
    )


async def streams(task: Round) -> list[Stream]:
    started = time.monotonic()
    async with asyncio.timeout(task.within_s):
        return await asyncio.gather(*(stream(task, body, started) for body in task.bodies))


def main() -> None:
    for line in sys.stdin:
        answers = uvloop.run(streams(msgspec.json.decode(line, type=Round)))
        print(json.dumps(msgspec.to_builtins(answers)), flush=True)


if __name__ == "__main__":
    main()
