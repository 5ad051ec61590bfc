"""What a runner serves once its model is loaded: joins the channels, the requests and the engine loop."""

from __future__ import annotations

import os
import select
import socket
import threading
import traceback

from worker.chat.handle import Helper
from worker.engine.channels import Channels
from worker.engine.confine import seal
from worker.engine.decode import Engine, decoding_threads
from worker.engine.embedding import Embedding
from worker.engine.gate import Gate
from worker.engine.llama import Loaded, Log
from worker.engine.loop import Counters, Loop
from worker.engine.requests import BROKEN, Ends, Requests
from worker.engine.texts import Pairs, TextRequests
from worker.runner.protocol import Load, Pong

LATEST_S = 0.05  # after Ready
NO_TEMPLATE = "The model has no chat template."


class Serving:
    """What a runner serves: nothing, until `run`.  `gate`, `load` and `close` are for another thread."""

    def __init__(self, hand_over: socket.socket) -> None:
        self.gate = Gate()
        self._counters = Counters()  # of the engine loop
        self._hand_over = hand_over
        self._channels = Channels(hand_over)

    def run(self, load: Load, loaded: Loaded, log: Log, chat: Helper | str) -> None:
        """Serve requests to the model, in this thread and that of the channels, until the process ends.

        `chat`: a sentence that says why there is none, if so.  Starts at the first connection, or a little later: until
        then the reply to the load is under way, which would wait for a core.
        """
        select.select([self._hand_over], [], [], LATEST_S)
        if isinstance(chat, Helper) and loaded.untried is not None:
            chat.compile(loaded.untried)
        engine = self._engine(load, loaded, log)
        if not load.devices:  # a driver opens files at any time
            seal()
        if load.embedding:
            self._embed(load, loaded, engine)
            return
        if not engine.can_generate:
            self._channels.start(None)
            threading.Event().wait()
            return
        loop = Loop(
            engine,
            lambda outcomes: requests.hand_out(outcomes),
            context_length=load.n_ctx,
            parallel=load.parallel,
            on_gpu=bool(load.devices),
            most_waiting=load.serving.requests_waiting,
            most_wait_s=load.serving.request_wait_s,
            shared_prefixes=load.serving.shared_prefixes,
        )
        requests = Requests(
            loop,
            NO_TEMPLATE if loaded.capabilities is None and isinstance(chat, Helper) else chat,
            self._channels.loop,
            self.gate,
            ends=Ends(*loaded.ends()),
            context_length=load.n_ctx,
            parallel=load.parallel,
            request_s=load.serving.request_s,
            max_output_tokens=load.serving.max_output_tokens or load.n_ctx,
            most_waiting=load.serving.requests_waiting,
        )
        self._run(loop, requests)

    def _embed(self, load: Load, loaded: Loaded, engine: Engine) -> None:
        loop = Embedding(
            engine,
            lambda results: requests.hand_out(results),
            on_gpu=bool(load.devices),
            most_waiting=load.serving.requests_waiting,
            most_wait_s=load.serving.request_wait_s,
        )
        requests = TextRequests(
            loop,
            self._channels.loop,
            self.gate,
            pairs=_pairs(loaded) if engine.ranks else None,
            context_length=load.n_ctx,
            request_s=load.serving.request_s,
            most_waiting=load.serving.requests_waiting,
        )
        self._run(loop, requests)

    def _run(self, loop: Loop | Embedding, requests: Requests | TextRequests) -> None:
        self._counters = loop.counters
        self._channels.start(requests.serve)
        try:
            loop.run()
        finally:  # an exception: the state of the engine is unknown
            traceback.print_exc()
            os._exit(BROKEN)  # at once: an orderly exit would wait for the other threads

    def _engine(self, load: Load, loaded: Loaded, log: Log) -> Engine:
        n_threads = decoding_threads(load.total_bytes, on_gpu=bool(load.devices))
        return Engine(loaded, log, n_outputs_max=load.n_outputs_max, n_threads=n_threads)

    def load(self) -> Pong:
        """Return the numbers of the requests now."""
        counters = self._counters
        return Pong(
            running=counters.running,
            waiting=max(counters.waiting, self.gate.n_requests - counters.running),
            cells=counters.cells,
            preemptions=counters.preemptions,
            used_at=self.gate.used_at,
        )

    def close(self, within_s: float) -> None:
        """Tell all API processes that the instance is unloaded, and wait until they know it, up to `within_s`."""
        self._channels.close(within_s)


def _pairs(loaded: Loaded) -> Pairs:
    template, begin, between, end = loaded.pairs()
    return Pairs(template=template, begin=begin, between=between, end=end)
