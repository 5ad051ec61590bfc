"""Loads a model with llama.cpp.  The only module that imports llama_cpp; used only in a runner.

Facts about llama.cpp here were read from its source or measured at commit 0c1e57098, which llama-cpp-python 0.3.36
contains.  Names in this module are llama.cpp's.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from llama_cpp import __version__, llama_cpp
from msgspec import UNSET, UnsetType, structs

from shared.memory.estimate import CELLS, logits_bytes
from shared.schema.http import KVCacheType, LoadConfig, Phase
from shared.schema.memory import Usage
from shared.schema.model import FileStat
from worker.chat.code import ChatError
from worker.chat.handle import Helper, HelperDied
from worker.chat.protocol import Template
from worker.engine.breakdown import breakdown
from worker.engine.pagelock import PageLock, refusal
from worker.engine.prefetch import Ahead, Unreadable, open_model
from worker.engine.slots import most_checkpoints
from worker.memory.host import lockable_bytes
from worker.runner.protocol import Load, Ready

lib: Any = llama_cpp  # ctypes: untyped
version = str(__version__)

INFO, ERROR, CONTINUED = 2, 4, 5  # ggml's log levels; llama-cpp-python's table is outdated
TENSORS = "load_tensors: "  # prefix of the first line about the weights (src/llama-model.cpp)
MANY_BYTES, MOST_THREADS = 128 << 20, 8
LEAST_MIB = 0.01  # the smallest size in the log that is not 0
BACKENDS = {  # by the names that they have in ggml's registry, in its order (ggml-backend-reg.cpp)
    "CUDA": "ggml_backend_cuda_reg",
    "SYCL": "ggml_backend_sycl_reg",
    "Vulkan": "ggml_backend_vk_reg",
    "OpenCL": "ggml_backend_opencl_reg",
    "CANN": "ggml_backend_cann_reg",
    "BLAS": "ggml_backend_blas_reg",
    "RPC": "ggml_backend_rpc_reg",
    "CPU": "ggml_backend_cpu_reg",
}
KV_TYPES: dict[KVCacheType, int] = {
    "f16": lib.GGML_TYPE_F16,
    "q8_0": lib.GGML_TYPE_Q8_0,
    "q4_0": lib.GGML_TYPE_Q4_0,
}
GENERIC = re.compile(r"failed to load model|error loading model$")


class LoadError(Exception):
    """The engine rejected the load; the message is the engine's reason."""


class Log:
    """Collects llama.cpp's log by line and forwards it to stderr.  Lives as long as the process.

    A load logs hundreds of lines.  They are written in batches, since each write wakes the worker, which would cost a
    small model as much as its load: at an error, once the weights are loaded, at the end, and otherwise 20 times a
    second.  While `is_muted`, only an error is written, with the lines before it.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.tensors_at: float | None = None  # when the engine reached the weights, by the monotonic clock
        self.is_muted = False
        self._unwritten: list[bytes] = []
        self._written_at = 0.0
        self._callback = lib.llama_log_callback(self._add)  # llama.cpp keeps the pointer: must outlive every call
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _add(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace")
        if level == CONTINUED and self.lines:
            level, start = self.lines.pop()
            self.lines.append((level, start + line))
        else:
            self.lines.append((level, line))
        if self.tensors_at is None and line.startswith(TENSORS):
            self.tensors_at = time.monotonic()
        self._unwritten.append(text)
        if level == ERROR:
            self._flush()
        elif time.monotonic() - self._written_at > 0.05:
            self.write()

    def write(self) -> None:
        """Write the collected lines to stderr, unless muted."""
        if not self.is_muted:
            self._flush()

    def _flush(self) -> None:
        text, self._unwritten = b"".join(self._unwritten), []
        self._written_at = time.monotonic()
        while text:
            text = text[os.write(2, text) :]

    def note(self, line: str) -> None:
        """Add a line that is not llama.cpp's."""
        self._add(INFO, f"{line}\n".encode(), None)

    def forget(self) -> None:
        """Drop all lines, also those that are not written yet."""
        self.lines.clear()
        self.tensors_at = None
        self._unwritten.clear()

    def reason(self, otherwise: str) -> str:
        """Return the first error that is not generic, else the first error, else `otherwise`."""
        errors = [line.strip() for level, line in self.lines if level == ERROR]
        return next((line for line in errors if not GENERIC.search(line)), errors[0] if errors else otherwise)

    def find(self, marker: str, pattern: str) -> list[str]:
        """Return the pattern's group 1 for each matching line that contains `marker`, in order."""
        matches = (re.search(pattern, line) for _, line in self.lines if marker in line)
        return [match[1] for match in matches if match]


def commit() -> str:
    """Return the commit of llama.cpp that libllama was built from."""
    lib._lib.ggml_commit.restype = ctypes.c_char_p
    return str(lib._lib.ggml_commit().decode())


def backends() -> list[str]:
    """Return the backends that the engine was built with: those of which libllama or its dependencies have the symbol
    (dlsym(3)).  Initialises nothing, unlike ggml's own registry."""
    return [name for name, symbol in BACKENDS.items() if hasattr(lib._lib, symbol)]


def initialise(visible: str) -> Log:
    """Start the backends with `visible` as CUDA_VISIBLE_DEVICES.  Call it once per process, never before a fork."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    log = Log()
    lib.llama_backend_init()
    return log


def _gpus(load: Load) -> dict[int, str]:
    """Return the GPUs of a load by ggml's handle.  Raises LoadError if the engine does not see one of them.

    ggml names devices CUDA0, CUDA1, ... in the order of CUDA_VISIBLE_DEVICES.  Its functions are called through
    libllama's handle, as llama-cpp-python wraps only llama.h.
    """
    ggml = lib._lib
    ggml.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    gpus = {}
    for id_ in load.devices:
        name = f"CUDA{visible.index(id_)}" if id_ in visible else ""
        handle = ggml.ggml_backend_dev_by_name(name.encode())
        if not handle:  # llama.cpp would silently load the model onto the CPU
            raise LoadError(f"the engine does not see the GPU {id_}")
        gpus[handle] = id_
    return gpus


def _model_params(load: Load, gpus: dict[int, str]) -> Any:
    """Return the model parameters of a load, except `load_mode`.

    llama.cpp assigns layer `i` to the first device whose cumulative share of `tensor_split` exceeds i / n_gpu_layers:
    with layer counts as shares, each device gets exactly its count (llama-model.cpp, get_layer_buft_list).
    """
    params = lib.llama_model_default_params()
    handles = (ctypes.c_void_p * (len(gpus) + 1))(*gpus)  # NULL-terminated; no list would mean all GPUs
    params.devices = ctypes.addressof(handles)
    params.referenced = handles  # an address alone does not keep the array alive
    params.n_gpu_layers = sum(load.layers)
    params.split_mode = lib.LLAMA_SPLIT_MODE_LAYER if len(gpus) > 1 else lib.LLAMA_SPLIT_MODE_NONE
    params.main_gpu = 0
    if gpus:
        params.tensor_split = (ctypes.c_float * lib.llama_max_devices())(*load.layers)
    params.check_tensors = load.check_tensors
    params.use_extra_bufts = load.repack
    if load.expert_override is not None:
        overrides = (lib.llama_model_kv_override * 2)()  # an empty entry ends the list
        key, value = load.expert_override
        overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
        overrides[0].key = key.encode()
        overrides[0].value.val_i64 = value
        params.kv_overrides = overrides
    return params


def _context_params(load: Load) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = -(-load.n_ctx // CELLS) * CELLS  # as llama.cpp does, but only after it limited the batch to n_ctx
    params.n_batch = load.n_batch
    params.n_ubatch = load.n_ubatch
    params.n_seq_max = load.n_seq_max
    params.n_outputs_max = load.n_outputs_max
    params.type_k = params.type_v = KV_TYPES[load.kv_type]
    params.kv_unified = True  # sequences share n_ctx instead of dividing it
    params.offload_kqv = load.offload_kqv
    params.flash_attn_type = -1 if load.flash_attn is None else int(load.flash_attn)
    params.embeddings = load.embedding
    params.pooling_type = lib.LLAMA_POOLING_TYPE_UNSPECIFIED if load.pooling is None else load.pooling
    params.n_threads = params.n_threads_batch = n_threads(load.total_bytes)
    return params


def n_threads(n_bytes: int) -> int:
    """Return the number of threads for the warm-up token, which is all that is decoded here.

    Decoding it reads all weights: two threads halve the time (2 GB: 273 and 141 ms), and a few saturate the memory's
    bandwidth.  For a small model, starting threads takes longer (0.5 to 10 ms) than decoding.
    """
    return min(MOST_THREADS, len(os.sched_getaffinity(0))) if n_bytes >= MANY_BYTES else 1


def _usage(load: Load, context: Any, gpus: dict[int, str], state_bytes: int) -> list[Usage] | None:
    """Return the memory on each device, then on the host, with that of checkpoints; None if this build of the engine
    does not report it."""
    usage = breakdown(lib._lib, version, context, gpus)
    if usage is None:
        return None
    *on_gpus, host = usage
    n_tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(lib.llama_get_model(context)))
    context_bytes = host.context_bytes
    if not load.embedding:
        context_bytes += state_bytes * most_checkpoints(lib.llama_n_seq_max(context))
    compute_bytes = host.compute_bytes + logits_bytes(load, n_tokens)
    return [*on_gpus, structs.replace(host, context_bytes=context_bytes, compute_bytes=compute_bytes)]


def _state_bytes(context: Any, log: Log) -> int:
    """Return the size of the state that recurrent layers have of a sequence, from the log; 0 if there are none."""
    sizes = log.find("llama_memory_recurrent: size", r"size = +([\d.]+) MiB")
    n_mib = max(LEAST_MIB, *map(float, sizes)) if sizes else 0.0
    n_sequences: int = lib.llama_n_seq_max(context)
    return math.ceil(n_mib * 2**20 / n_sequences)


class DryRuns:
    """Does dry runs: reports the memory that a load would use on each of its devices and on the host.

    With `no_alloc`, llama.cpp builds the model and the context without allocating or reading weights, and sums up the
    sizes of its buffers.  It still reads the whole header: 0.1 to 1 s for the vocabulary.  The model therefore stays
    open for the next dry run, until `close`; a further context takes milliseconds.

    The result equals the usage of the load to the byte, with two exceptions:

    - The weights of a load for the CPU, which maps the file.  A dry run counts tied embeddings twice, and leaves out
      repacked weights and tensors that the engine does not use.
    - The compute buffers if several GPUs take all layers.  A load places each layer's norm on the layer's device, and
      the dry run loses that assignment (graph_get_cb of llama-context.cpp, and ggml_backend_sched_reserve_size, which
      resets it).  A buffer is then too small or too large by one tensor of n_ubatch times the model's width, or by two
      in tiny models.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._model: tuple[object, Any] | None = None  # what it was opened with, and the model

    def measure(self, load: Load) -> list[Usage]:
        """Do a dry run.  Raises LoadError."""
        log = self._log
        log.write()
        log.forget()
        log.is_muted = True  # its lines would look like a load's, with buffers of 0 MiB
        try:
            gpus = _gpus(load)
            context = _create_context(load, self._opened(load, gpus), log)
            try:
                usage = _usage(load, context, gpus, _state_bytes(context, log))
            finally:
                lib.llama_free(context)
            if usage is None:
                raise LoadError("this build of the engine does not report its memory usage")
            log.forget()
            return usage
        finally:
            log.is_muted = False

    def close(self) -> None:
        """Close the model."""
        if self._model is not None:
            lib.llama_model_free(self._model[1])
            self._model = None

    def _opened(self, load: Load, gpus: dict[int, str]) -> Any:
        opened_with = load.shards, load.devices, load.layers, load.expert_override, load.repack, load.check_tensors
        if self._model is None or self._model[0] != opened_with:
            self.close()
            for shard in load.shards:
                os.close(_open_shard(shard))
            params = _model_params(load, gpus)
            params.no_alloc = True
            params.load_mode = lib.LLAMA_LOAD_MODE_NONE
            self._model = opened_with, _load_model(load, params, self._log)
        return self._model[1]


def _open_shard(shard: str) -> int:
    """Open a file of the model and return the descriptor.  Raises LoadError, also for a FIFO, on which llama.cpp would
    block for ever."""
    try:
        return open_model(shard)
    except Unreadable as e:
        raise LoadError(str(e)) from None


def _load_model(load: Load, params: Any, log: Log) -> Any:
    # Not by the first path alone: llama.cpp derives the other paths only from a name in its own spelling (".gguf").
    paths = (ctypes.c_char_p * len(load.shards))(*map(str.encode, load.shards))
    model = lib.llama_model_load_from_splits(paths, len(load.shards), params)
    if not model:
        raise LoadError(log.reason("llama.cpp gave no reason"))
    return model


def _create_context(load: Load, model: Any, log: Log) -> Any:
    context = lib.llama_init_from_model(model, _context_params(load))
    if not context:
        raise LoadError(log.reason("llama.cpp could not create a context and gave no reason"))
    return context


class Loaded:
    """A model and its context in memory, with the duration of each phase in seconds."""

    def __init__(self, load: Load, log: Log, report: Callable[[Phase, int], None], chat: Helper | None = None) -> None:
        """Load the model, create the context, and decode one token.  Raises LoadError, after freeing all memory.

        `chat` tries the chat template at the same time, unless an earlier load did; None: the model is loaded without
        chat.
        """
        self.timing: dict[Phase, float] = {}
        self.capabilities: dict[str, bool] | None = None  # of the chat template; None: there is no chat
        self.untried: Template | None = None  # the chat template, if `chat` has not compiled it yet
        self.files: list[FileStat] = []  # when they were opened
        self._log = log
        log.write()
        log.forget()
        self._gpus = _gpus(load)
        with ExitStack() as undo:
            self.model = self._load_model(load, report)
            undo.callback(lib.llama_model_free, self.model)
            template = None if load.embedding or chat is None else self._template()
            trial = None
            if template is not None and load.capabilities is not None:
                self.capabilities, self.untried = load.capabilities, template
            elif template is not None and chat is not None:
                trial = chat.compile(template)
            log.write()
            report("context", load.total_bytes)
            with _timed(self.timing, "context"):
                self.context = _create_context(load, self.model, log)
            undo.callback(lib.llama_free, self.context)
            self.state_bytes = _state_bytes(self.context, log)
            report("warmup", load.total_bytes)
            with _timed(self.timing, "warmup"):
                self._warm_up()
            if trial is not None:
                self._await_template(trial)
            self._check_files(load)
            self.close = undo.pop_all().close

    def _load_model(self, load: Load, report: Callable[[Phase, int], None]) -> Any:
        """Load metadata and weights.

        `Ahead` reads the file while llama.cpp parses the vocabulary; if llama.cpp maps the file before that is done,
        both continue to read.  On the CPU the weights stay a mapping of the file.  To GPUs they are copied from the
        mapping, which `PageLock` locks meanwhile.  Where it cannot, and of a file that cannot be mapped, llama.cpp
        reads and copies tensor by tensor; for GPUs `Ahead` then only fills the page cache, if that has room beside the
        layers that stay on the CPU.
        """
        lock = self._page_lock(load)
        is_mapped = load.can_map and (not load.devices or lock is not None)
        params = _model_params(load, self._gpus)
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if is_mapped else lib.LLAMA_LOAD_MODE_NONE

        report("metadata", 0)
        done = 0
        ahead: Ahead | None = None
        unreadable: Unreadable | None = None

        def advanced(n: int) -> None:
            nonlocal done
            done += n
            report("weights", done)

        def on_progress(fraction: float, _user_data: object) -> bool:
            """Report what was copied.  The first call comes once the files are mapped and before the first copy, the
            last one, with 1.0, after the last copy."""
            nonlocal ahead, unreadable
            if lock is not None and ahead is not None:
                try:
                    ahead.wait()
                except Unreadable as e:
                    unreadable = e
                    return False  # ends the load
                ahead = None
                lock.lock([file.size for file in self.files])
            if not is_mapped or lock is not None:
                report("weights", int(fraction * load.total_bytes))
            if lock is not None and fraction >= 1.0:
                lock.unlock()
            return True

        callback = lib.llama_progress_callback(on_progress)
        params.progress_callback = callback
        with ExitStack() as files:
            fds = []
            for shard in load.shards:
                fds.append(_open_shard(shard))
                files.callback(os.close, fds[-1])
            self.files = [FileStat.of(os.fstat(fd)) for fd in fds]
            started = time.monotonic()
            if is_mapped:
                ahead = Ahead(fds, advanced, counts_cached=lock is None)  # what is cached still has to be copied
                files.pop_all()
            elif load.devices and 2 * load.total_bytes <= lockable_bytes():
                Ahead(fds, lambda n_bytes: None)
                files.pop_all()
            try:
                model = _load_model(load, params, self._log)
            except LoadError:
                if unreadable is not None:
                    raise LoadError(str(unreadable)) from None
                raise
            finally:
                if lock is not None:
                    lock.unlock()
            if ahead is not None:
                try:
                    ahead.wait()
                except Unreadable as e:
                    lib.llama_model_free(model)
                    raise LoadError(str(e)) from None
        ended = time.monotonic()
        tensors_at = self._log.tensors_at or ended
        self.timing["metadata"] = tensors_at - started
        self.timing["weights"] = ended - tensors_at
        return model

    def _page_lock(self, load: Load) -> PageLock | None:
        """Return the lock of a load for GPUs, or None after a line in the log that says why there is none."""
        if not load.devices:
            return None
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        ordinals = [visible.index(id_) for id_ in load.devices]
        why = refusal(lib._lib, load, ordinals)
        if why is not None:
            self._log.note(f"page_lock: the weights are read, not copied from a locked mapping: {why}")
            return None
        return PageLock(lib._lib, ordinals[0], load.shards, self._log.note)

    def _template(self) -> Template | None:
        """Return the model's chat template, and the tokens that it may write, as llama.cpp reads them
        (common_chat_templates_init, common/chat.cpp)."""
        source = lib.llama_model_chat_template(self.model, None)
        if not source:
            return None
        vocabulary = lib.llama_model_get_vocab(self.model)
        bos, eos = lib.llama_vocab_bos(vocabulary), lib.llama_vocab_eos(vocabulary)
        return Template(source=source.decode("utf-8", "replace"), bos=self.text_of(bos), eos=self.text_of(eos))

    def ends(self) -> tuple[str | None, str | None]:
        """Return the texts of the control tokens with which every prompt begins and ends; None if it does not."""
        vocabulary = lib.llama_model_get_vocab(self.model)
        begin, end = lib.llama_vocab_get_add_bos(vocabulary), lib.llama_vocab_get_add_eos(vocabulary)
        return (
            self.text_of(lib.llama_vocab_bos(vocabulary)) if begin else None,
            self.text_of(lib.llama_vocab_eos(vocabulary)) if end else None,
        )

    def pairs(self) -> tuple[str | None, list[int], list[int], list[int]]:
        """Return how a model that ranks reads a query and a document: its template, or else the tokens before the
        query, between the two, and after the document."""
        template = lib.llama_model_chat_template(self.model, b"rerank")
        if template:
            return template.decode("utf-8", "replace"), [], [], []
        vocabulary = lib.llama_model_get_vocab(self.model)
        bos, eos, sep = (get(vocabulary) for get in (lib.llama_vocab_bos, lib.llama_vocab_eos, lib.llama_vocab_sep))
        eos = sep if eos == lib.LLAMA_TOKEN_NULL else eos
        begin = [bos] if lib.llama_vocab_get_add_bos(vocabulary) else []
        end = [eos] if lib.llama_vocab_get_add_eos(vocabulary) else []
        return None, begin, end + ([sep] if lib.llama_vocab_get_add_sep(vocabulary) else []), end

    def _await_template(self, trial: Future[dict[str, bool]]) -> None:
        """Wait for the trial of the chat template, which counts as metadata."""
        started = time.monotonic()
        try:
            self.capabilities = trial.result()
        except ChatError as e:
            raise LoadError(f"the chat template is not valid: {e}") from None
        except HelperDied as e:
            raise LoadError(f"the chat template cannot be used: {e}") from None
        self.timing["metadata"] += time.monotonic() - started

    def text_of(self, token: int) -> str:
        """Return the text of a token, also of a control token; "" if there is no such token (-1)."""
        buffer = ctypes.create_string_buffer(512)  # the longest token of a vocabulary is far shorter
        vocabulary = lib.llama_model_get_vocab(self.model)
        length = lib.llama_token_to_piece(vocabulary, token, buffer, len(buffer), 0, True) if token >= 0 else 0
        return buffer.raw[: max(length, 0)].decode("utf-8", "replace")

    def _warm_up(self) -> None:
        """Decode one token, so that the first request pays no cost of initialisation."""
        vocabulary = lib.llama_model_get_vocab(self.model)
        token = max(lib.llama_vocab_bos(vocabulary), 0)
        tokens = (lib.llama_token * 1)(token)  # the batch borrows it: keep a reference
        has_encoder, has_decoder = lib.llama_model_has_encoder(self.model), lib.llama_model_has_decoder(self.model)
        if has_encoder:
            self._run("llama_encode", lib.llama_encode, tokens)
            tokens[0] = max(lib.llama_model_decoder_start_token(self.model), token)
        if has_decoder:
            self._run("llama_decode", lib.llama_decode, tokens)
        memory = lib.llama_get_memory(self.context)
        if memory:
            lib.llama_memory_clear(memory, False)  # only the cells; clearing the data takes 15 ms for 2 GB
        lib.llama_synchronize(self.context)

    def _check_files(self, load: Load) -> None:
        """Check that the files are unchanged since they were opened, and that their paths still name them.

        Raises LoadError.
        """
        for shard, before in zip(load.shards, self.files, strict=True):
            try:
                now = FileStat.of(Path(shard).stat())
            except OSError as e:
                raise LoadError(f"a file of the model disappeared while it was loaded: {e.strerror}") from None
            if now != before:
                raise LoadError("a file of the model changed while it was loaded")

    def _run(self, name: str, function: Callable[..., int], tokens: Any) -> None:
        status = function(self.context, lib.llama_batch_get_one(tokens, 1))
        if status != 0:
            raise LoadError(self._log.reason(f"{name} of the warm-up token failed with status {status}"))

    def ready(self, load: Load) -> Ready:
        """Return the applied configuration and usage, read back from the model, the context and the engine's log."""
        usage = _usage(load, self.context, self._gpus, self.state_bytes) or []
        return Ready(
            config=self._config(load),
            timing=self.timing,
            files=self.files,
            usage=usage,
            capabilities=self.capabilities,
        )

    def _config(self, load: Load) -> LoadConfig:
        n_ctx = min(load.n_ctx, lib.llama_n_ctx(self.context))  # llama.cpp pads up to a multiple of 256
        if load.embedding:
            return LoadConfig(context_length=n_ctx)
        return LoadConfig(
            context_length=n_ctx,
            eval_batch_size=lib.llama_n_batch(self.context),
            physical_batch_size=lib.llama_n_ubatch(self.context),
            parallel=min(load.parallel, lib.llama_n_seq_max(self.context)),
            flash_attention=self._flash_attention(),
            offload_kv_cache_to_gpu=self._kv_on_gpu(load),
            kv_cache_type=self._kv_type(),
            num_experts=int(self._log.find("n_expert_used", r"= (\d+)")[-1]) if load.moe else UNSET,
        )

    def _flash_attention(self) -> bool:
        """Return whether flash attention is on.  llama.cpp has no getter; the context's log has the requested value
        and, for "auto", the outcome."""
        requested = self._log.find("llama_context: flash_attn", r"= (\w+)")[-1]
        if requested == "auto":
            return bool(self._log.find("Flash Attention", r"(enabled)"))
        return requested == "enabled"

    def _kv_type(self) -> KVCacheType | UnsetType:
        """Return the type of the KV cache if it is quantized, from the log; a recurrent model has no such cache."""
        types = self._log.find("llama_kv_cache: size", r"K \((\w+)\)")
        return next((name for name in KV_TYPES if name in types and name != "f16"), UNSET)

    def _kv_on_gpu(self, load: Load) -> bool:
        """Return whether the KV cache is on a GPU, from the buffers in the log; without a GPU, the requested value."""
        buffers = self._log.find("KV buffer size", r"(\S+) KV buffer size")
        if not load.devices or not buffers:
            return load.offload_kqv
        return any(not name.startswith("CPU") for name in buffers)


@contextmanager
def _timed(timing: dict[Phase, float], phase: Phase) -> Iterator[None]:
    started = time.monotonic()
    yield
    timing[phase] = time.monotonic() - started
