"""A loaded model as the engine loop uses it: batches, memory, logits and vocabulary.  Names are llama.cpp's.

Facts about llama.cpp were read from its source or measured at commit 0c1e57098.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ctypeslib  # else numpy imports it at the first use, when the runner can open no file any more
from numpy.typing import NDArray

from worker.engine.llama import Loaded, Log, lib
from worker.engine.slots import Change, Copy, Cut, Drop, Restore, Sequence, most_checkpoints

Logits = NDArray[np.float32]

NO_CELLS, ABORTED = 1, 2  # results of llama_decode
PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
SMALL_BYTES = 16 << 20  # of weights; below, several threads take longer than one
PIECE_BYTES = 256
IDS = np.dtype("<i4")
FEW_THREADS = 4

Ids = list[int] | NDArray[np.int32]


class EngineError(Exception):
    """The engine could not decode a batch; the message is its reason."""


class Vocabulary:
    """The tokens of a model.  What may be called from any thread says so; the rest from one."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocab = lib.llama_model_get_vocab(model)
        self.n_tokens: int = lib.llama_vocab_n_tokens(self._vocab)
        self._buffer = ctypes.create_string_buffer(PIECE_BYTES)
        self._pieces: dict[tuple[int, bool], bytes] = {}  # as they occur: all of them would take a second
        self._ends: dict[int, bool] = {}

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text.  May be called from any thread.

        `special`: the text is a whole prompt, with all that `encode` can do for one.
        """
        ids = np.frombuffer(self.encode(text, add_special=special, parse_special=special), IDS)
        tokens: list[int] = ids.tolist()
        return tokens

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> bytes:
        """Return the tokens of a text, as little-endian 32-bit integers.  May be called from any thread.

        `add_special`: put the model's first token before it, and its last one after it, if the model wants them.
        `parse_special`: control tokens that the text spells become tokens.
        """
        data = text.encode("utf-8", "surrogatepass")
        n = len(data) + 2
        while True:
            tokens = np.empty(n, np.int32)
            pointer = ctypes.cast(_address(tokens), ctypes.POINTER(lib.llama_token))
            count = lib.llama_tokenize(self._vocab, data, len(data), pointer, n, add_special, parse_special)
            if count >= 0:
                return tokens[:count].astype(IDS).tobytes()
            n = -count

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens of the vocabulary, that of control tokens included.  May be called from any thread.

        Without the space that the tokenizer puts before a text.  What is not whole in UTF-8 becomes U+FFFD.
        """
        ids = np.array(tokens, np.int32)
        pointer = ctypes.cast(_address(ids), ctypes.POINTER(lib.llama_token))
        n = PIECE_BYTES + 8 * len(tokens)
        while True:
            text = ctypes.create_string_buffer(n)
            count = lib.llama_detokenize(self._vocab, pointer, len(tokens), text, n, False, True)
            if count >= 0:
                return text.raw[:count].decode("utf-8", "replace")
            n = -count

    def piece(self, token: int, *, is_shown: bool) -> bytes:
        """Return the text of a token, which may be part of a character.  `is_shown`: also that of a control token."""
        piece = self._pieces.get((token, is_shown))
        if piece is None:
            piece = self._pieces[token, is_shown] = self._piece(token, self._buffer, is_shown=is_shown)
        return piece

    def _piece(self, token: int, buffer: Any, *, is_shown: bool) -> bytes:
        n = lib.llama_token_to_piece(self._vocab, token, buffer, PIECE_BYTES, 0, is_shown)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = lib.llama_token_to_piece(self._vocab, token, buffer, -n, 0, is_shown)
        piece: bytes = buffer[:n]
        return piece

    def pieces(self, tokens: list[int]) -> list[bytes]:
        """Return the texts of tokens, with those of control tokens.  May be called from any thread."""
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        return [self._piece(token, buffer, is_shown=True) for token in tokens]

    def infill(self, before: list[int], after: list[int]) -> list[int] | None:
        """Return the prompt for a text between two others; None if the model has no tokens for that.  May be called
        from any thread.

        It is that of llama-server (format_prompt_infill, tools/server/server-common.cpp) without names of files.
        """
        marks = [
            fim(self._vocab) for fim in (lib.llama_vocab_fim_pre, lib.llama_vocab_fim_suf, lib.llama_vocab_fim_mid)
        ]
        if min(marks) < 0:
            return None
        first = [lib.llama_vocab_bos(self._vocab)] if lib.llama_vocab_get_add_bos(self._vocab) else []
        return [*first, marks[0], *before, marks[1], *after, marks[2]]

    def description(self) -> tuple[str | None, str | None, str | None]:
        """Return the texts of the tokens that begin and end a text, and the chat template; None for what the model does
        not have.  May be called from any thread."""
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        bos, eos = (
            self._piece(token, buffer, is_shown=True).decode("utf-8", "replace") if token >= 0 else None
            for token in (lib.llama_vocab_bos(self._vocab), lib.llama_vocab_eos(self._vocab))
        )
        template = lib.llama_model_chat_template(self._model, None)
        return bos, eos, template.decode("utf-8", "replace") if template else None

    def is_end(self, token: int) -> bool:
        """Return whether a token ends an answer."""
        is_end = self._ends.get(token)
        if is_end is None:
            is_end = self._ends[token] = bool(lib.llama_vocab_is_eog(self._vocab, token))
        return is_end

    def suppressed(self) -> NDArray[np.int32]:
        """Return the tokens that the model must not generate."""
        count = ctypes.c_int32()
        tokens = lib.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return np.array(tokens[: count.value] if count.value else [], np.int32)


class Batch:
    """The tokens of one step, in arrays whose addresses the engine gets once."""

    def __init__(self, n_batch: int, n_outputs_max: int) -> None:
        self.n_batch = n_batch
        self.n_outputs_max = n_outputs_max
        self.n_tokens = self.n_outputs = 0
        self._token = np.zeros(n_batch, np.int32)
        self._pos = np.zeros(n_batch, np.int32)
        self._seq = np.zeros(n_batch, np.int32)
        self._output = np.zeros(n_batch, np.int8)
        self._n_seq = np.ones(n_batch, np.int32)
        base = _address(self._seq)
        self._seqs = np.arange(base, base + 4 * n_batch, 4, dtype=np.uintp)
        struct = self._struct = lib.llama_batch()
        arrays: dict[str, NDArray[Any]] = {
            "token": self._token,
            "pos": self._pos,
            "n_seq_id": self._n_seq,
            "seq_id": self._seqs,
            "logits": self._output,
        }
        for name, array in arrays.items():
            pointer: Any = dict(struct._fields_)[name]
            setattr(struct, name, ctypes.cast(_address(array), pointer))

    def clear(self) -> None:
        self.n_tokens = self.n_outputs = 0

    def add(self, tokens: Ids, pos: int, seq_id: int, *, n_outputs: int) -> int:
        """Append tokens of one sequence, of which the last `n_outputs` get logits.  Returns the index of the last one
        in the batch."""
        start, end = self.n_tokens, self.n_tokens + len(tokens)
        self._token[start:end] = tokens
        self._pos[start:end] = np.arange(pos, pos + len(tokens))
        self._seq[start:end] = seq_id
        self._output[start:end] = 0
        self.n_tokens = end
        self._output[end - n_outputs : end] = 1
        self.n_outputs += n_outputs
        return end - 1

    def struct(self) -> Any:
        """Return the llama_batch.  More outputs than the context has room for would abort the process."""
        assert self.n_outputs <= self.n_outputs_max
        self._struct.n_tokens = self.n_tokens
        return self._struct


def _state(state: NDArray[np.uint8]) -> tuple[Any, int]:
    return ctypes.cast(_address(state), ctypes.POINTER(ctypes.c_uint8)), state.size


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class Engine:
    """A model and its context."""

    def __init__(self, loaded: Loaded, log: Log, *, n_outputs_max: int, n_threads: int) -> None:
        """`n_outputs_max`: as the context was created with; `n_threads`: for decoding."""
        self.context = loaded.context
        self._log = log
        self.vocabulary = Vocabulary(loaded.model)
        self._memory = lib.llama_get_memory(self.context)
        self.n_cells: int = lib.llama_n_ctx(self.context)
        self.n_sequences: int = lib.llama_n_seq_max(self.context)
        self.batch = Batch(lib.llama_n_batch(self.context), n_outputs_max)
        self.rewinds = not (lib.llama_model_is_recurrent(loaded.model) or lib.llama_model_is_hybrid(loaded.model))
        self.n_checkpoints = most_checkpoints(self.n_sequences) if loaded.state_bytes else 0
        self.can_generate = bool(
            self._memory
            and lib.llama_model_has_decoder(loaded.model)
            and not lib.llama_model_has_encoder(loaded.model)
            and not lib.llama_model_is_diffusion(loaded.model)
        )
        self.ranks = lib.llama_pooling_type(self.context) == lib.LLAMA_POOLING_TYPE_RANK
        self.n_vector: int = (
            lib.llama_model_n_cls_out(loaded.model) if self.ranks else lib.llama_model_n_embd_out(loaded.model)
        )
        self._rows: Logits = np.empty((0, 0), np.float32)
        self._address = 0
        lib.llama_set_n_threads(self.context, n_threads, n_threads)
        self._abort = _Abort(self.context)
        self.abort: Callable[[], None] = self._abort.set

    def resume(self) -> None:
        """Let the next batch be decoded, after an `abort`, which another thread may call."""
        self._abort.clear()

    def decode(self) -> int:
        """Decode the batch.  Returns 0, NO_CELLS or ABORTED; the latter two without effect on the context, unless the
        batch was in the middle of it.  Raises EngineError."""
        status: int = lib.llama_decode(self.context, self.batch.struct())
        if status not in (0, NO_CELLS, ABORTED):
            reason = self._log.reason(f"llama_decode failed with status {status}")
            self.write_log()
            raise EngineError(reason)
        return status

    def logits(self) -> Logits:
        """Wait for the batch and return its logits, a row for each output.  Valid up to the next batch."""
        address = ctypes.cast(lib.llama_get_logits(self.context), ctypes.c_void_p).value
        assert address
        n = self.batch.n_outputs
        if address != self._address or n > len(self._rows):
            n_vocab = self.vocabulary.n_tokens
            data = (ctypes.c_float * (n * n_vocab)).from_address(address)
            self._rows = np.ctypeslib.as_array(data).reshape(n, n_vocab)
            self._address = address
        return self._rows[:n]

    def vectors(self, n: int) -> NDArray[np.float32]:
        """Wait for the batch, and return what the model made of its first `n` sequences: a row for each."""
        return np.stack(
            [
                np.ctypeslib.as_array(lib.llama_get_embeddings_seq(self.context, seq_id), (self.n_vector,)).copy()
                for seq_id in range(n)
            ]
        )

    def forget(self) -> None:
        """Forget the tokens of all sequences.  An encoder keeps none."""
        if self._memory:
            lib.llama_memory_clear(self._memory, False)

    def apply(self, change: Change) -> bool:
        """Change the context's memory.  Returns False if a sequence could not return to an earlier token."""
        match change:
            case Drop(sequence):
                return bool(lib.llama_memory_seq_rm(self._memory, sequence.id, -1, -1))
            case Cut(sequence, n):
                return bool(lib.llama_memory_seq_rm(self._memory, sequence.id, n, -1))
            case Copy(source, target, n):
                is_whole = n == lib.llama_memory_seq_pos_max(self._memory, source.id) + 1
                lib.llama_memory_seq_cp(
                    self._memory, source.id, target.id, -1 if is_whole else 0, -1 if is_whole else n
                )
                return True
            case Restore(sequence, checkpoint):
                state: NDArray[np.uint8] = checkpoint.state
                return bool(lib.llama_state_seq_set_data_ext(self.context, *_state(state), sequence.id, PARTIAL))

    def state(self, sequence: Sequence) -> NDArray[np.uint8]:
        """Return what a sequence of a model with recurrent layers cannot return to by itself: the state of these
        layers.  Its size does not depend on the number of tokens."""
        size = lib.llama_state_seq_get_size_ext(self.context, sequence.id, PARTIAL)
        state = np.empty(size, np.uint8)
        lib.llama_state_seq_get_data_ext(self.context, *_state(state), sequence.id, PARTIAL)
        return state

    @staticmethod
    def note(text: str) -> None:
        """Write a line to stderr, beside the engine's own."""
        os.write(2, f"{text}\n".encode())

    def write_log(self) -> None:
        """Write what the engine logged to stderr, and forget it."""
        if self._log.lines:
            self._log.write()
            self._log.forget()


class _Abort:
    """A flag that ends the decoding of a batch on a CPU between two operations.

    The engine asks before each of about a thousand operations of a batch.  A function in Python would take the
    interpreter's lock each time, so the function is strlen(3): true unless the string is empty.
    """

    def __init__(self, context: Any) -> None:
        self._text = ctypes.create_string_buffer(2)
        ask = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        lib.llama_set_abort_callback(context, ask, ctypes.addressof(self._text))

    def set(self) -> None:
        self._text[0] = b"1"

    def clear(self) -> None:
        self._text[0] = b"\0"


def cores() -> int:
    """Return the number of cores that this process may use: two threads on one core decode no faster than one, and
    threads beyond a container's limit stop all of them."""
    siblings = set()
    for processor in os.sched_getaffinity(0):
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(processor))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:
        quota, period = "max", ""
    return len(siblings) if quota == "max" else max(1, min(len(siblings), int(quota) // int(period)))


def decoding_threads(n_bytes: int, *, on_gpu: bool) -> int:
    """Return the number of threads for decoding a model with weights of this size.

    All cores if the CPU computes; runners that decode at one time share them.  If GPUs compute, little is left for the
    CPU.  For a tiny model, threads take longer to start than to compute.
    """
    if n_bytes < SMALL_BYTES:
        return 1
    return min(FEW_THREADS, cores()) if on_gpu else cores()
