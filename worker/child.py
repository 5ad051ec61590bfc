"""The runner: a process that holds one model's memory and gives it back by dying.

It is forked from a server that has imported this module and nothing that touches a device, gets warm, waits for one
Load, and then only lives.  The worker is its lifeline: when the channel ends, so does the process.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from shared.schema import Phase
from worker import llama
from worker.confine import confine
from worker.protocol import (
    LENGTH,
    Failed,
    FromRunner,
    Load,
    Ping,
    Pong,
    Progress,
    Stop,
    ToRunner,
    Warm,
    decode_to_runner,
    frame,
)

ORPHANED = 3  # exit status


def main(control: socket.socket, output: socket.socket) -> None:
    """The process's whole life.  `output` becomes its stdout and stderr: the engine writes there."""
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    confine(control.fileno())
    os.environ["GGML_NO_BACKTRACE"] = "1"  # or an abort would fork a debugger

    inbox: queue.SimpleQueue[Load] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(message: FromRunner) -> None:
        with sending:
            control.sendall(frame(message))

    threading.Thread(target=read_channel, args=(control, inbox, send), daemon=True).start()
    log = llama.initialise()
    send(Warm(llama.devices()))
    load = inbox.get()
    log.lines.clear()
    try:
        loaded = llama.Loaded(load, log, Throttled(send, load.total_bytes))
    except llama.LoadError as e:
        log.write()
        send(Failed(str(e), llama.devices()))
        return
    send(loaded.ready(load))
    log.write()
    threading.Event().wait()  # until the reader thread ends the process


class Throttled:
    """Progress in steps: at each change of phase, at each percent of the bytes, and every 200 ms in between."""

    def __init__(self, send: Callable[[Progress], None], total_bytes: int) -> None:
        self.send, self.step = send, max(1, total_bytes // 100)
        self.phase: Phase | None = None
        self.sent_bytes, self.sent_at = 0, 0.0

    def __call__(self, phase: Phase, loaded_bytes: int) -> None:
        now = time.monotonic()
        advanced = max(0, loaded_bytes - self.sent_bytes)
        if phase != self.phase or advanced >= self.step or (advanced and now - self.sent_at >= 0.2):
            self.phase, self.sent_bytes, self.sent_at = phase, self.sent_bytes + advanced, now
            self.send(Progress(phase, self.sent_bytes))


def read_channel(control: socket.socket, inbox: queue.SimpleQueue[Load], send: Callable[[FromRunner], None]) -> None:
    """Reader thread.  Stop, or the end of the stream, ends the process whatever the main thread is deep in."""
    with control.makefile("rb") as stream:
        while True:
            head = stream.read(LENGTH.size)
            if len(head) < LENGTH.size:
                os._exit(ORPHANED)
            message: ToRunner = decode_to_runner(stream.read(LENGTH.unpack(head)[0]))
            match message:
                case Load():
                    inbox.put(message)
                case Ping():
                    with suppress(OSError):  # the end of the stream is about to be read
                        send(Pong())
                case Stop():
                    os._exit(0)
