"""The engine loop with a real model, for functions that run in a child process (`tests.support.child`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.channel.messages import Sampling, Stop, TokenLogprobs
from shared.memory.plan import plan
from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.settings import Settings
from tests.integration.conftest import catalog
from tests.support.noalloc import GPUS, load
from worker.engine.job import Begun, Job, Outcome, Piece, Waiting
from worker.runner.protocol import NO_GPU


@dataclass
class Answered:
    """What became of a job."""

    texts: dict[int, str] = field(default_factory=dict)  # by choice
    finishes: dict[int, str] = field(default_factory=dict)
    stops: dict[int, Stop] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)  # of outcomes other than pieces, in order
    cached_tokens: int | None = None
    n_tokens: int = 0
    last: Any = None  # Done, Rejected or Broken

    @property
    def code(self) -> str:
        return str(self.last.code)


class Trial:
    """A loop whose steps are made one by one."""

    def __init__(
        self, root: Path, *, parallel: int = 4, context_length: int = 2048, n_on_gpu: int = 0, **options: Any
    ) -> None:
        """`root`: a models directory with one model, of which so many layers are on a fake GPU."""
        from tests.support import fakegpu
        from worker.engine import llama
        from worker.engine.decode import Engine
        from worker.engine.loop import Loop

        model = only_model(root)
        planned = plan(
            LoadRequest(model=model.key, parallel=parallel, context_length=context_length), model, Settings()
        )
        log = llama.initialise(GPUS[0] if n_on_gpu else NO_GPU)
        log.is_muted = True
        self.gpu = fakegpu.add("CUDA0", 1 << 30)
        layers = [n_on_gpu] if n_on_gpu else []
        self.loaded = llama.Loaded(
            load([root / shard for shard in model.shards], planned, layers), log, lambda phase, n_bytes: None
        )
        self.engine = Engine(self.loaded, log, n_outputs_max=parallel, n_threads=1)
        self.outcomes: list[Outcome] = []
        self.loop = Loop(
            self.engine,
            self.outcomes.extend,
            context_length=context_length,
            parallel=parallel,
            on_gpu=False,
            **options,
        )

    def endless(self, **sampling: Any) -> Sampling:
        """Return parameters with which no answer ends by itself."""
        vocabulary = self.engine.vocabulary
        ends = {token: -1000.0 for token in range(vocabulary.n_tokens) if vocabulary.is_end(token)}
        return Sampling(**{**sampling, "logit_bias": {**ends, **sampling.get("logit_bias", {})}})

    def job(self, prompt: str | list[int], **options: Any) -> Job:
        """Return a job, of client "a" unless said otherwise."""
        now = time.monotonic()
        tokens = self.loop.tokenize(prompt, True) if isinstance(prompt, str) else prompt
        usual = {"client": "a", "sampling": self.endless(), "arrived_at": now, "deadline": now + 600}
        return Job(**{**usual, "tokens": tokens, **options})

    def run(self, *jobs: Job) -> list[Answered]:
        """Submit jobs together and return what became of them."""
        for job in jobs:
            self.loop.submit(job)
        self.loop.step()
        self.finish()
        return [self.answered(job) for job in jobs]

    def finish(self) -> None:
        """Make steps until no job is left."""
        while self.loop.counters.running or self.loop.counters.waiting:
            self.loop.step()

    def answered(self, job: Job) -> Answered:
        """Return what became of a job so far."""
        answered = Answered()
        for outcome in self.outcomes:
            if outcome.job is not job:
                continue
            if not isinstance(outcome, Piece):
                answered.kinds.append(type(outcome).__name__)
                if isinstance(outcome, Begun):
                    answered.cached_tokens = outcome.cached_tokens
                elif not isinstance(outcome, Waiting):
                    answered.last = outcome
                continue
            choice = outcome.choice
            assert choice not in answered.finishes, "a piece after the last one"
            answered.texts[choice] = answered.texts.get(choice, "") + outcome.text
            answered.logprobs.setdefault(choice, []).extend(outcome.logprobs)
            answered.n_tokens += outcome.n_tokens
            if outcome.finish is not None:
                answered.finishes[choice] = outcome.finish
                assert outcome.stop is not None
                answered.stops[choice] = outcome.stop
        return answered


def only_model(root: Path) -> Model:
    """Return the model of a directory."""
    (model,) = catalog(root, root.parent / "catalog").values()
    return model


def ids_of(answered: Answered, choice: int = 0) -> list[bytes]:
    """Return the tokens of an answer that reports log probabilities."""
    return [each.token for each in answered.logprobs[choice]]
