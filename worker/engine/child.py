"""The runner: a process that holds one model's memory and gives it back by dying.

It is forked from a server that has imported this module and nothing that touches a device.  It starts the engine,
prewarms if it has time, measures loads on request, loads one model, and then waits.  It ends when its channel to the
worker ends.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import assert_never

from shared import libc
from worker import framing
from worker.engine import llama
from worker.engine.confine import confine
from worker.engine.prewarm import prewarm
from worker.engine.progress import Throttled
from worker.runner.protocol import (
    NO_GPU,
    Failed,
    FromRunner,
    Load,
    Measure,
    Measured,
    Ping,
    Pong,
    Stop,
    ToRunner,
    Warm,
    decode_to_runner,
    frame,
)

ORPHANED = 3  # exit status
IDLE_S = 0.02  # without a message; then a runner for the CPU prewarms


def main(control: socket.socket, output: socket.socket, visible: str | None) -> None:
    """The process's whole life.  `output` becomes its stdout and stderr: the engine writes there.

    `visible`: the GPUs that it may use, as CUDA_VISIBLE_DEVICES names them; None: those of what it is told first.
    """
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    confine(control.fileno())
    os.environ["GGML_NO_BACKTRACE"] = "1"  # or an abort would fork a debugger

    inbox: queue.SimpleQueue[Load | Measure] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(message: FromRunner) -> None:
        with sending:
            control.sendall(frame(message))

    threading.Thread(target=read_channel, args=(control, inbox, send), daemon=True).start()
    log = None if visible is None else llama.initialise(visible)
    send(Warm(llama.has_cuda()))
    if visible == NO_GPU and log is not None:
        with suppress(queue.Empty):
            inbox.put(inbox.get(timeout=IDLE_S))
        if inbox.empty():
            prewarm(log)
    told = inbox.get()
    load = told.load if isinstance(told, Measure) else told
    if load.traceparent:  # where OpenTelemetry's convention has it, for libraries that look
        os.environ["TRACEPARENT"] = load.traceparent
    if log is None:
        log = llama.initialise(",".join(load.devices) or NO_GPU)
    try:
        while isinstance(told, Measure):
            send(Measured(llama.measure(told.load, log)))
            told = inbox.get()
        loaded = llama.Loaded(told, log, Throttled(send, told.total_bytes))
    except llama.LoadError as e:
        log.write()
        send(Failed(str(e)))
        return
    send(loaded.ready(told))
    log.write()
    libc.trim_heap()  # 7 MB after the vocabulary of 150,000 tokens
    threading.Event().wait()  # until the reader thread ends the process


def read_channel(
    control: socket.socket, inbox: queue.SimpleQueue[Load | Measure], send: Callable[[FromRunner], None]
) -> None:
    """Receive messages, in a thread of its own.  Stop, the end of the stream, or noise in it ends the process at once,
    whatever the main thread does."""
    try:
        with control.makefile("rb") as stream:
            while (data := framing.read_blocking(stream)) is not None:
                message: ToRunner = decode_to_runner(data)
                match message:
                    case Load() | Measure():
                        inbox.put(message)
                    case Ping():
                        with suppress(OSError):  # the end of the stream is about to be read
                            send(Pong())
                    case Stop():
                        os._exit(0)
                    case _:
                        assert_never(message)
    finally:  # also after a message that cannot be read: without its lifeline a runner must not live on
        os._exit(ORPHANED)
