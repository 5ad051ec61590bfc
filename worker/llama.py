"""The engine: the only importer of llama_cpp, used only inside a runner.

Facts about llama.cpp here were read from its source or measured at commit 0c1e57098, which llama-cpp-python 0.3.36
carries.  Names on this side are llama.cpp's.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from llama_cpp import llama_cpp
from msgspec import UNSET

from shared.schema import Device, FileStat, LoadConfig, Phase
from worker.prefetch import Unreadable, open_model, prefetch
from worker.protocol import Load, Ready

lib: Any = llama_cpp  # ctypes: nothing of it is typed

CPU, GPUS = 0, (1, 2)  # enum ggml_backend_dev_type: GPU, and one that shares the host's memory
ERROR, CONTINUED = 4, 5  # ggml's log levels; llama-cpp-python's own table is an older one
GENERIC = re.compile(r"failed to load model|error loading model$")


class LoadError(Exception):
    """The engine refused; the text is its own reason."""


class Log:
    """What llama.cpp says, line by line, also passed on to stderr.  Alive for as long as the process.

    A load says hundreds of lines.  They are passed on in bunches, since each write wakes the worker, which would
    cost a small model as much as its load: at an error, once the weights are there, at the end, and else 20 times a
    second.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self._unwritten: list[bytes] = []
        self._written_at = 0.0
        self._callback = lib.llama_log_callback(self._add)  # must outlive every call from llama.cpp
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _add(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace")
        if level == CONTINUED and self.lines:
            level, start = self.lines.pop()
            self.lines.append((level, start + line))
        else:
            self.lines.append((level, line))
        self._unwritten.append(text)
        if level == ERROR or time.monotonic() - self._written_at > 0.05:
            self.write()

    def write(self) -> None:
        """Pass on what has come up since the last time."""
        text, self._unwritten = b"".join(self._unwritten), []
        self._written_at = time.monotonic()
        while text:
            text = text[os.write(2, text) :]

    def reason(self, otherwise: str) -> str:
        """The first error that says more than that the load failed."""
        errors = [line.strip() for level, line in self.lines if level == ERROR]
        return next((line for line in errors if not GENERIC.search(line)), errors[0] if errors else otherwise)

    def find(self, marker: str, pattern: str) -> list[str]:
        """What a pattern's one group matches in the lines that hold `marker`, in order."""
        found = (re.search(pattern, line) for _, line in self.lines if marker in line)
        return [match[1] for match in found if match]


def initialise() -> Log:
    """Start the backends (on a GPU this creates the driver's context).  Once per process, never before a fork."""
    log = Log()
    lib.llama_backend_init()
    return log


def devices() -> list[Device]:
    """What a model is loaded onto: the GPUs that the engine sees, with their memory as the engine finds it now, or
    the CPU.

    ggml's functions are reached through libllama's handle, as llama-cpp-python wraps only llama.h.
    """
    ggml = lib._lib
    for function in (ggml.ggml_backend_dev_name, ggml.ggml_backend_dev_description):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    size_p = ctypes.POINTER(ctypes.c_size_t)
    ggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size_p, size_p]
    ggml.ggml_backend_dev_memory.restype = None
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p

    def device(handle: int, kind: Literal["gpu", "cpu"]) -> Device:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        return Device(
            id=ggml.ggml_backend_dev_name(handle).decode(),
            kind=kind,
            name=ggml.ggml_backend_dev_description(handle).decode("utf-8", "replace"),
            total_bytes=total.value,
            free_bytes=free.value,
        )

    found = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    of_type = {handle: ggml.ggml_backend_dev_type(handle) for handle in found}
    gpus = [device(handle, "gpu") for handle in found if of_type[handle] in GPUS]
    return gpus or [device(handle, "cpu") for handle in found if of_type[handle] == CPU]


class Loaded:
    """A model and its context in memory, and how long each phase took."""

    def __init__(self, load: Load, log: Log, report: Callable[[Phase, int], None]) -> None:
        """Load, create the context, decode one token.  Raises LoadError; what was taken by then is given back."""
        self.timing: dict[Phase, float] = {}
        self.files: list[FileStat] = []  # as they were opened
        self._log = log
        with ExitStack() as undo:
            self.model = self._load_model(load, report)
            undo.callback(lib.llama_model_free, self.model)
            log.write()
            report("context", load.total_bytes)
            with _timed(self.timing, "context"):
                self.context = self._create_context(load)
            undo.callback(lib.llama_free, self.context)
            report("warmup", load.total_bytes)
            with _timed(self.timing, "warmup"):
                self._warm_up()
            self._check_files(load)
            self.close = undo.pop_all().close

    def _load_model(self, load: Load, report: Callable[[Phase, int], None]) -> Any:
        """Metadata and weights.

        On a CPU the weights stay a mapping of the file: it is read ahead of llama.cpp, whose own mapping then waits
        for nothing.  On a GPU the file is read and copied tensor by tensor, which llama.cpp reports by itself; with
        a mapping it would read the whole file before the first report.
        """
        gpu = lib.llama_supports_gpu_offload()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = -1
        params.check_tensors = load.check_tensors
        params.use_extra_bufts = False  # repacking costs 20 times the load of a Q4_0 file, and crashed on AMX
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE if gpu else lib.LLAMA_LOAD_MODE_MMAP
        overrides = (lib.llama_model_kv_override * 2)()  # the last one, empty, ends the list
        if load.expert_override is not None:
            key, value = load.expert_override
            overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
            overrides[0].key = key.encode()
            overrides[0].value.val_i64 = value
            params.kv_overrides = overrides

        report("metadata", 0)
        done = 0

        def advanced(n: int) -> None:
            nonlocal done
            done += n
            report("weights", done)

        reading = 0.0
        try:
            for shard in load.shards:
                started = time.monotonic()
                fd = open_model(shard)
                try:
                    self.files.append(FileStat.of(os.fstat(fd)))
                    if not gpu:
                        prefetch(fd, advanced)
                finally:
                    os.close(fd)
                reading += time.monotonic() - started
        except Unreadable as e:
            raise LoadError(str(e)) from None

        first_tensor = 0.0

        def on_progress(fraction: float, _user_data: object) -> bool:
            nonlocal first_tensor
            first_tensor = first_tensor or time.monotonic()
            if gpu:
                report("weights", int(fraction * load.total_bytes))
            return True

        callback = lib.llama_progress_callback(on_progress)
        params.progress_callback = callback
        started = time.monotonic()
        model = lib.llama_model_load_from_file(load.shards[0].encode(), params)
        ended = time.monotonic()
        first_tensor = first_tensor or ended
        self.timing["metadata"] = first_tensor - started
        self.timing["weights"] = reading + ended - first_tensor
        if not model:
            raise LoadError(self._log.reason("llama.cpp gave no reason"))
        return model

    def _create_context(self, load: Load) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = load.n_ctx
        params.n_batch = load.n_batch
        params.n_ubatch = load.n_ubatch
        params.n_seq_max = load.n_seq_max
        params.kv_unified = True  # sequences share n_ctx instead of dividing it
        params.offload_kqv = load.offload_kqv
        params.flash_attn_type = -1 if load.flash_attn is None else int(load.flash_attn)
        params.embeddings = load.embedding
        params.n_threads = params.n_threads_batch = 1  # only the warm-up runs: a pool of threads costs it 10 ms
        context = lib.llama_init_from_model(self.model, params)
        if not context:
            raise LoadError(self._log.reason("llama.cpp could not create a context and gave no reason"))
        return context

    def _warm_up(self) -> None:
        """Run one token through every layer, so that nothing is left to be paid by the first request."""
        vocabulary = lib.llama_model_get_vocab(self.model)
        token = max(lib.llama_vocab_bos(vocabulary), 0)
        tokens = (lib.llama_token * 1)(token)  # borrowed by the batch: referenced until the end
        has_encoder, has_decoder = lib.llama_model_has_encoder(self.model), lib.llama_model_has_decoder(self.model)
        if has_encoder:
            self._run("llama_encode", lib.llama_encode, tokens)
            tokens[0] = max(lib.llama_model_decoder_start_token(self.model), token)
        if has_decoder:
            self._run("llama_decode", lib.llama_decode, tokens)
        memory = lib.llama_get_memory(self.context)
        if memory:
            lib.llama_memory_clear(memory, False)  # the cells, not their data: that takes 15 ms for 2 GB
        lib.llama_synchronize(self.context)

    def _check_files(self, load: Load) -> None:
        """What was read is of the files that were opened, and these are what their paths still name."""
        for shard, before in zip(load.shards, self.files, strict=True):
            try:
                now = FileStat.of(Path(shard).stat())
            except OSError as e:
                raise LoadError(f"a file of the model went away while it was loaded: {e.strerror}") from None
            if now != before:
                raise LoadError("a file of the model changed while it was loaded")

    def _run(self, name: str, function: Callable[..., int], tokens: Any) -> None:
        status = function(self.context, lib.llama_batch_get_one(tokens, 1))
        if status != 0:
            raise LoadError(self._log.reason(f"{name} of the warm-up token failed with status {status}"))

    def ready(self, load: Load) -> Ready:
        """What applied, read back from the model, the context and the engine's log."""
        n_ctx = min(load.n_ctx, lib.llama_n_ctx(self.context))  # llama.cpp pads up to a multiple of 256
        if load.embedding:
            return Ready(config=LoadConfig(context_length=n_ctx), timing=self.timing, files=self.files)
        return Ready(
            config=LoadConfig(
                context_length=n_ctx,
                eval_batch_size=lib.llama_n_batch(self.context),
                parallel=lib.llama_n_seq_max(self.context) if load.parallel_asked else UNSET,
                flash_attention=self._flash_attention(),
                offload_kv_cache_to_gpu=self._kv_on_gpu(load.offload_kqv),
                num_experts=int(self._log.find("n_expert_used", r"= (\d+)")[-1]) if load.moe else UNSET,
            ),
            timing=self.timing,
            files=self.files,
        )

    def _flash_attention(self) -> bool:
        """There is no getter; the context's log says what was asked for, and for "auto" what became of it."""
        asked = self._log.find("llama_context: flash_attn", r"= (\w+)")[-1]
        if asked == "auto":
            return bool(self._log.find("Flash Attention", r"(enabled)"))
        return asked == "enabled"

    def _kv_on_gpu(self, given: bool) -> bool:
        """Where the KV cache went, from the buffers that the log names; without a GPU, the value given."""
        buffers = self._log.find("KV buffer size", r"(\S+) KV buffer size")
        if not lib.llama_supports_gpu_offload() or not buffers:
            return given
        return any(not name.startswith("CPU") for name in buffers)


@contextmanager
def _timed(timing: dict[Phase, float], phase: Phase) -> Iterator[None]:
    started = time.monotonic()
    yield
    timing[phase] = time.monotonic() - started
