"""A runner whose channels are served by an echo instead of the engine: the rest of it is real."""

from __future__ import annotations

import asyncio
import os
import socket
import threading

from shared.channel.messages import Cancel, Delta, Deltas, Ended, Generate, Queued, Started, Usage

# Conversations, and what becomes of them.
ECHO = b"echo"  # `max_tokens` deltas, each a digit
HANG = b"hang"  # nothing after Started
FLOOD = b"flood"  # deltas without end, as fast as they are read
BURST = b"burst"  # 10 MB at once
CRASH = b"crash"  # the process aborts
DEAF = b"deaf"  # the channels' loop hangs
PIECE = "x" * 1000
USAGE = Usage(
    prompt_tokens=7,
    cached_tokens=5,
    generated_tokens=3,
    reasoning_tokens=0,
    wait_s=0.5,
    prompt_s=0.25,
    generation_s=0.125,
)


def run_child(control: socket.socket, hand_over: socket.socket, output: socket.socket, visible: str | None) -> None:
    """Run in the place of `worker.runner.warm.run_child`."""
    # Imported here: only the process of a runner may import the engine.
    from worker.engine import channels, child, serving

    class Echoing(channels.Channels):
        def start(self, _: channels.Serve | None) -> None:
            super().start(echo)

    async def echo(channel: channels.Channel) -> None:
        say("channel begun")
        flooding: dict[int, asyncio.Task[None]] = {}
        async for message in channel:
            match message:
                case Generate(id=id_):
                    channel.send(Queued(id=id_, prompt_tokens=7, ahead=0))
                    channel.send(Started(id=id_, cached_tokens=5))
                    if message.conversation == ECHO:
                        for i in range(message.max_tokens or 0):
                            channel.send(Deltas([Delta(id=id_, text=str(i % 10))]))
                        channel.send(Deltas([Delta(id=id_, finish="stop")]))
                        channel.send(Ended(id=id_, usage=USAGE))
                    elif message.conversation == FLOOD:
                        flooding[id_] = asyncio.create_task(flood(channel, id_))
                    elif message.conversation == BURST:
                        for _ in range(10_000):
                            channel.send(Deltas([Delta(id=id_, text=PIECE)]))
                    elif message.conversation == CRASH:
                        os.abort()
                    elif message.conversation == HANG:
                        say("hanging")
                    elif message.conversation == DEAF:
                        say("deaf")
                        threading.Event().wait()
                case Cancel(id=id_):
                    say(f"cancelled {id_}")
                    if id_ in flooding:
                        flooding.pop(id_).cancel()
        for task in flooding.values():
            task.cancel()
        say("channel ended")

    async def flood(channel: channels.Channel, id_: int) -> None:
        while not channel.closed.is_set():
            if not channel._is_behind:  # otherwise the channel would be closed, if this process is faster
                channel.send(Deltas([Delta(id=id_, text=PIECE)]))
            await asyncio.sleep(0)

    vars(serving)["Channels"] = Echoing  # of this process alone
    child.main(control, hand_over, output, visible)


def say(line: str) -> None:
    """Write a line to the output of the runner."""
    os.write(1, f"{line}\n".encode())
