"""Chooses tokens from logits, with llama.cpp's samplers.

The order is logit bias, the mask of a constraint, penalties, top_k, typical_p, top_p, min_p, temperature, draw.
Penalties see the end of the prompt too, as in llama-server.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.channel.messages import Sampling
from worker.chat.constraint import ConstraintError
from worker.engine.constrain import Constrained
from worker.engine.decode import Logits
from worker.engine.llama import lib

MOST_CANDIDATES = 256  # that top_k lets pass: the samplers after it take 15 ms for a vocabulary of 150,000
GREEDY_BELOW = 1e-4  # temperature; dividing by less overflows
MOST_THREADS = 16
TOKENS_OF_A_THREAD = 200_000  # of vocabularies to look through, for which a thread pays (docs/benchmarks/tokens.md)
BLOCK, PIECE = 256, 16_384  # tokens of a row that are looked at together
MOST_REJECTED = 4  # tokens, before a mask is computed that takes as long as to draw some more
SEEDS = 0xFFFFFFFF  # this one itself would mean a random seed to llama.cpp


CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class BadRequest(Exception):
    """A job asks for what the engine cannot do.  `param` names the field at fault, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadLogits(Exception):
    """The engine computed something that is not a number."""

    def __init__(self) -> None:
        super().__init__("The engine computed logits that are not numbers.")


def check(sampling: Sampling, n_tokens: int) -> None:
    """Raise BadRequest for what llama.cpp would abort on, or misunderstand."""
    numbers = [sampling.temperature, sampling.top_p, sampling.min_p, sampling.typical_p]
    numbers += [sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty]
    if not all(map(math.isfinite, numbers)) or sampling.repeat_penalty <= 0:
        raise BadRequest("The sampling parameters must be finite, and repeat_penalty greater than 0.")
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < n_tokens:
            message = f"'logit_bias': the model has no token {token} (its vocabulary has {n_tokens} tokens)."
            raise BadRequest(message, "logit_bias")
        if math.isnan(bias) or bias == math.inf:
            raise BadRequest("'logit_bias': a bias must be a number.", "logit_bias")


class Bias:
    """What is added to the logits of a job before anything else."""

    def __init__(self, sampling: Sampling, suppressed: NDArray[np.int32]) -> None:
        self.is_empty = not sampling.logit_bias and not suppressed.size
        self._tokens = np.array([*sampling.logit_bias], np.int32)
        self._values = np.array([*sampling.logit_bias.values()], np.float32)
        self._suppressed = suppressed

    def add(self, row: Logits) -> None:
        """Change a row, once."""
        if self._tokens.size:
            row[self._tokens] += self._values
        if self._suppressed.size:
            row[self._suppressed] = -np.inf


class Sampler:
    """The sampling state of one answer."""

    def __init__(self, sampling: Sampling, prompt: list[int], seed: int, *, n_tokens: int, context_length: int) -> None:
        self._chain: Any = None
        last_n = context_length if sampling.repeat_last_n < 0 else min(sampling.repeat_last_n, context_length)
        has_penalties = last_n > 0 and (
            sampling.repeat_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        is_greedy = sampling.temperature < GREEDY_BELOW or sampling.top_k == 1
        if is_greedy and not has_penalties:
            return
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if has_penalties:
            penalties = lib.llama_sampler_init_penalties(
                n_tokens,
                last_n,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
            for token in prompt[-last_n:]:
                lib.llama_sampler_accept(penalties, token)
            self._add(penalties)
        if is_greedy:
            self._add(lib.llama_sampler_init_greedy())
            return
        self._add(lib.llama_sampler_init_top_k(min(sampling.top_k, MOST_CANDIDATES) or MOST_CANDIDATES))
        if sampling.typical_p < 1.0:
            self._add(lib.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1.0:
            self._add(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0.0:
            self._add(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(lib.llama_sampler_init_temp(sampling.temperature))
        self._add(lib.llama_sampler_init_dist(seed % SEEDS))

    def _add(self, sampler: Any) -> None:
        lib.llama_sampler_chain_add(self._chain, sampler)  # which owns it from then on

    @property
    def is_quick(self) -> bool:
        """The most probable token is chosen, for which no candidates are collected."""
        return self._chain is None

    def sample(self, row: Logits, context: Any, index: int) -> int:
        """Choose a token.  `index`: of the row's token in the batch.  Raises BadLogits."""
        token = int(row.argmax())  # of a row with NaN: its place
        if not math.isfinite(row[token]):
            raise BadLogits
        return token if self._chain is None else int(lib.llama_sampler_sample(self._chain, context, index))

    def draw(self, row: Logits) -> int:
        """Choose a token that may still be rejected.  Raises BadLogits."""
        token = int(row.argmax())
        if not math.isfinite(row[token]):
            raise BadLogits
        if self._chain is None:
            return token
        candidates = np.zeros(row.size, CANDIDATE)
        candidates["id"] = np.arange(row.size)
        candidates["logit"] = row
        array = lib.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, lib.llama_token_data_p), size=row.size, selected=-1, sorted=False
        )
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def accept(self, token: int) -> None:
        """Take a token that `draw` returned."""
        if self._chain is not None:
            lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        """Free the samplers."""
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)
            self._chain = None


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Log probabilities at one place of an answer, before samplers changed them."""

    logprob: float  # of the token that was chosen
    top: list[tuple[int, float]]  # the most probable tokens, most probable first


def alternatives(row: Logits, tokens: list[int], n: int) -> list[Alternatives]:
    """Return the log probabilities of tokens at the place of a row, each with the `n` most probable tokens.

    Raises BadLogits.
    """
    total = _log_of_sum(row)
    if not math.isfinite(total):
        raise BadLogits
    top = [(token, float(row[token]) - total) for token in best(row, n)]
    return [Alternatives(float(row[token]) - total, top) for token in tokens]


def best(row: Logits, n: int) -> list[int]:
    """Return the `n` most probable tokens, most probable first.

    They are in the `n` blocks with the greatest values: to look for them there takes 0.1 ms for a vocabulary of
    150,000, and in the whole row 5 ms.
    """
    n = min(n, row.size)
    if not n:
        return []
    starts = np.arange(0, row.size, BLOCK)
    greatest = np.maximum.reduceat(row, starts)
    if n < starts.size:
        starts = starts[np.argpartition(greatest, -n)[-n:]]
    places = (starts[:, None] + np.arange(BLOCK)).ravel()
    places = places[places < row.size]
    found: list[int] = places[np.argpartition(row[places], -n)[-n:]].tolist()
    return sorted(found, key=lambda token: (-row[token], token))


def _log_of_sum(row: Logits) -> float:
    """Return the logarithm of the sum of the exponentials.  Piece by piece: larger arrays would be new pages of memory
    each time, which takes three times as long."""
    greatest = row.max()
    pieces = (row[start : start + PIECE] for start in range(0, row.size, PIECE))
    return float(greatest) + math.log(sum(float(np.exp(piece - greatest).sum()) for piece in pieces))


@dataclass(eq=False, slots=True, kw_only=True)
class Draw:
    """A row of logits, from which one answer takes a token; of a prompt with several answers, each of them."""

    row: Logits
    index: int  # of the row's token in the batch
    samplers: list[Sampler]
    bias: Bias
    logprobs: int | None
    constrained: Constrained | None  # at the end of a prompt, that of any of its answers
    forced: int | None = None  # the token that each answer takes, whatever is probable
    tokens: list[int] = field(default_factory=list)  # the result; empty: none could be chosen
    failure: str = ""  # why not
    alternatives: list[Alternatives] = field(default_factory=list)  # of each token, if `logprobs` is set

    @property
    def is_quick(self) -> bool:
        return self.logprobs is None and self.constrained is None and all(sampler.is_quick for sampler in self.samplers)

    def run(self, context: Any) -> None:
        """Choose the tokens."""
        is_changed = not self.bias.is_empty or self.constrained is not None
        raw = self.row.copy() if is_changed and self.logprobs is not None else self.row
        self.bias.add(self.row)
        try:
            self._choose(context)
            if self.logprobs is not None:
                self.alternatives = alternatives(raw, self.tokens, self.logprobs)
        except (BadLogits, ConstraintError) as e:
            self.tokens, self.failure = [], str(e)

    def _choose(self, context: Any) -> None:
        """Choose the tokens.  A constraint masks the row before, or once it rejected a few tokens."""
        if self.forced is not None:
            for sampler in self.samplers:
                sampler.accept(self.forced)
            self.tokens = [self.forced] * len(self.samplers)
            return
        constrained = self.constrained
        if constrained is None or not constrained.checks_first:
            if constrained is not None:
                constrained.mask(self.row)
            self.tokens = [sampler.sample(self.row, context, self.index) for sampler in self.samplers]
            return
        n_left = MOST_REJECTED
        for sampler in self.samplers:
            token = sampler.draw(self.row)
            while not constrained.allows(token):
                self.row[token] = -np.inf
                n_left -= 1
                if not n_left:
                    constrained.mask(self.row)
                token = sampler.draw(self.row)
            sampler.accept(token)
            self.tokens.append(token)


class Draws:
    """Runs the draws of a step, in several threads if that pays: llama.cpp's samplers do not hold the interpreter's
    lock."""

    def __init__(self, context: Any, n_vocab: int, tokens_of_a_thread: int = TOKENS_OF_A_THREAD) -> None:
        self._context = context
        self._n_vocab = n_vocab
        self._tokens_of_a_thread = tokens_of_a_thread
        self._n_threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
        self._threads: ThreadPoolExecutor | None = None

    def threads(self, n: int) -> int:
        """Return the number of threads for `n` draws that look through the vocabulary."""
        return max(1, min(self._n_threads, n, n * self._n_vocab // self._tokens_of_a_thread))

    def run(self, draws: list[Draw]) -> None:
        """Fill in the results."""
        slow = [draw for draw in draws if not draw.is_quick]
        for draw in draws:
            if draw.is_quick:
                draw.run(self._context)
        n = self.threads(len(slow))
        if n == 1:
            self._run(slow)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._n_threads - 1, thread_name_prefix="sample")
        futures = [self._threads.submit(self._run, slow[i::n]) for i in range(1, n)]
        self._run(slow[::n])
        for future in futures:
            future.result()

    def _run(self, draws: Sequence[Draw]) -> None:
        for draw in draws:
            draw.run(self._context)
