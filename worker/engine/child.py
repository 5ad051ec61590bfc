"""The runner: a process that holds one model and frees its memory by exiting.

It is forked from a server that has imported this module but has touched no device.  It starts the engine, prewarms if
it is idle, does dry runs on request, loads one model, and then waits.  It exits when its channel to the worker closes.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import assert_never

from shared import framing, libc
from shared.schema.http import EngineBuild
from worker.chat import code
from worker.chat.handle import Helper
from worker.engine import llama
from worker.engine.confine import ModelFiles, confine, restrict
from worker.engine.prewarm import prewarm
from worker.engine.progress import Throttled
from worker.engine.serving import Serving
from worker.runner.protocol import (
    NO_GPU,
    Busy,
    Close,
    Closed,
    CloseIfUnused,
    Failed,
    FromRunner,
    Load,
    Measure,
    Measured,
    Open,
    Ping,
    Stop,
    ToRunner,
    Warm,
    decode_to_runner,
    frame,
)

ORPHANED = 3  # exit status
CLOSING_S = 0.2  # for API processes to read that the instance is unloaded
IDLE_S = 0.02  # without a message; then a runner for the CPU prewarms
ENGINE = EngineBuild(  # found out in the server, once for all runners
    llama_cpp_python=llama.version,
    llama_cpp_commit=llama.commit(),
    backends=llama.backends(),
    chat_unavailable=code.available(),
)


def main(control: socket.socket, hand_over: socket.socket, output: socket.socket, visible: str | None) -> None:
    """Run the process.  `output` becomes stdout and stderr, to which the engine writes; on `hand_over` the listener
    hands it the connections of API processes.

    `visible`: the value of CUDA_VISIBLE_DEVICES; None: the GPUs of the first Load or Measure.
    """
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    confine(control.fileno(), hand_over.fileno())
    os.environ["GGML_NO_BACKTRACE"] = "1"  # otherwise an abort forks a debugger
    chat = Helper(confine) if ENGINE.chat_unavailable is None else None  # forks: before any thread, and any GPU
    restrict(on_gpu=visible != NO_GPU)
    files = ModelFiles(on_gpu=visible != NO_GPU)

    inbox: queue.SimpleQueue[Load | Measure] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(message: FromRunner) -> None:
        with sending:
            control.sendall(frame(message))

    serving = Serving(hand_over)
    threading.Thread(target=read_channel, args=(control, inbox, send, serving, files), daemon=True).start()
    log = None if visible is None else llama.initialise(visible)
    send(Warm(ENGINE))
    if visible == NO_GPU and log is not None:
        with suppress(queue.Empty):
            inbox.put(inbox.get(timeout=IDLE_S))
        if inbox.empty():
            prewarm(log)
    message = inbox.get()
    files.restrict_last_thread()
    load = message.load if isinstance(message, Measure) else message
    set_trace(load)
    if log is None:
        log = llama.initialise(",".join(load.devices) or NO_GPU)
    dry_runs = llama.DryRuns(log)
    try:
        while isinstance(message, Measure):
            send(Measured(dry_runs.measure(message.load)))
            message = inbox.get()
        dry_runs.close()
        set_trace(message)
        loaded = llama.Loaded(message, log, Throttled(send, message.total_bytes), chat)
    except llama.LoadError as e:
        log.write()
        if chat is not None:
            chat.close()
        send(Failed(str(e)))  # last: the worker then closes the channel, to which a thread that reads the file reports
        return
    send(loaded.ready(message))
    if chat is not None and loaded.capabilities is None:
        chat.close()
    log.write()
    libc.trim_heap()  # frees 7 MB after a vocabulary of 150,000 tokens
    serving.run(message, loaded, log, chat or ENGINE.chat_unavailable or "")


def set_trace(load: Load) -> None:
    """Set OpenTelemetry's environment variable for the span of a load; libraries may read it."""
    if load.traceparent:
        os.environ["TRACEPARENT"] = load.traceparent


def read_channel(
    control: socket.socket,
    inbox: queue.SimpleQueue[Load | Measure],
    send: Callable[[FromRunner], None],
    serving: Serving,
    files: ModelFiles,
) -> None:
    """Receive messages, in a separate thread.  Stop, the end of the stream, or an invalid message ends the process at
    once, whatever the main thread does."""

    def tell(message: FromRunner) -> None:
        with suppress(OSError):  # the channel closed; the next read returns the end of the stream
            send(message)

    try:
        with control.makefile("rb") as stream:
            while (data := framing.read_blocking(stream)) is not None:
                message: ToRunner = decode_to_runner(data)
                match message:
                    case Load() | Measure():
                        files.choose(message.shards if isinstance(message, Load) else message.load.shards)
                        inbox.put(message)
                    case Ping():
                        tell(serving.load())
                    case CloseIfUnused(id=id_, since=since):
                        tell(Closed(id_) if serving.gate.close_if_unused(since) else Busy(id_))
                    case Close(id=id_):
                        serving.gate.close(partial(tell, Closed(id_)))
                    case Open():
                        serving.gate.open()
                    case Stop():
                        serving.close(CLOSING_S)
                        os._exit(0)
                    case _:
                        assert_never(message)
    finally:  # also after an invalid message: a runner without its channel must not keep running
        os._exit(ORPHANED)
