"""Failures of a load: codes and sentences for the known messages of llama.cpp, without paths."""

from __future__ import annotations

import re
import signal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.schema.memory import Device
from worker.runner.failure import from_exit, from_reason, needed_bytes, scrub, shortage

ABSOLUTE = re.compile(r"(?:^|[\s'\"(=:,\[<])/[^\s/]+/")
FILE = "/srv/models/p/m/m-q8_0.gguf"

# The engine's first level-4 line for each kind of defect (llama.cpp 0c1e57098).
INVALID = [
    f"gguf_init_from_file: failed to open GGUF file '{FILE}' (No such file or directory)",
    f"gguf_init_from_file: failed to open GGUF file '{FILE}' (Permission denied)",
    f"gguf_init_from_file: failed to open GGUF file '{FILE}' (Too many levels of symbolic links)",
    "gguf_init_from_file_impl: failed to read magic",
    "gguf_init_from_file_impl: invalid magic characters: 'vers', expected 'GGUF'",
    "gguf_init_from_file_impl: bad GGUF version: 0",
    "gguf_init_from_file_impl: GGUFv1 is no longer supported, please use a more up-to-date version",
    "gguf_init_from_file_impl: this GGUF file is version 99 but this software only supports up to version 3",
    "gguf_init_from_file_impl: failed to load model: this GGUF file version 50331648 is extremely large, is there a "
    "mismatch between the host and model endianness?",
    "gguf_init_from_file_impl: failed to read header",
    "gguf_init_from_file_impl: failed to read tensor info",
    "gguf_init_from_file_impl: string length 22 exceeds remaining file size 20 bytes",
    "gguf_init_from_file_impl: failed to read key-value pairs",
    "gguf_init_from_file_impl: number of tensors is -1 but must be in [0, 1]",
    "gguf_init_from_file_impl: tensor 'a' has offset 7, expected 0",
    "gguf_init_from_file_impl: duplicate key 'general.architecture' for tensors 0 and 1",
    "gguf_init_from_file_impl: duplicate tensor name 'a' for tensors 0 and 1",
    "gguf_init_from_file_impl: alignment 3 is not a power of 2",
    "gguf_init_from_file_impl: failed to seek to beginning of data section",
    "llama_model_load: error loading model: tensor 'output.weight' data is not within the file bounds, model is "
    "corrupted or incomplete",
    "llama_model_load: error loading model: check_tensor_dims: tensor 'blk.0.attn_q.weight' not found",
    "llama_model_load: error loading model: done_getting_tensors: wrong number of tensors; expected 40, got 39",
    "llama_model_load: error loading model: key not found in model: llama.block_count",
    "llama_model_load: error loading model: key not found in model: tokenizer.ggml.model",
    "llama_model_load: error loading model: tensor 'token_embd.weight' not found",
    f"llama_model_load: error loading model: failed to load GGUF split from {FILE}",
    "llama_model_load: error loading model: illegal split file idx: 1 (file: "
    f"{FILE}), model must be loaded with the first split",
    f"llama_model_load: error loading model: invalid split file name: {FILE}",
    "llama_model_load: error loading model: tensor 'blk.0.ffn_up.weight' has invalid data",
    "it is not a regular file",
    "the file cannot be opened: No such file or directory",
]
UNSUPPORTED = [
    "llama_model_load: error loading model: unsupported model architecture: 'gptj'",
    "gguf_init_from_file_impl: tensor 'a' of type 31 (TYPE_Q4_0_4_4 REMOVED, use Q4_0 with runtime repacking) has 64 "
    "elements per row, not a multiple of block size (0)",
    "llama_init_from_model: failed to initialize the context: eagle3 requires ctx_other to be set",
    "llama_model_load: error loading model: error loading model architecture: unknown model architecture: 'llamx'",
    "llama_model_load: error loading model: error loading model vocabulary: unknown tokenizer: 'x'",
    "llama_model_load: error loading model: error loading model vocabulary: unknown pre-tokenizer type: 'x'",
    "llama_model_load: error loading model: CLIP cannot be used as main model, use it with --mmproj instead",
    "llama_init_from_model: K cache type q8_0 with block size 32 does not divide n_embd_head_k=80",
    "llama_init_from_model: quantized V cache requires flash_attn to be enabled",
    "load_backend_split: device RPC0 does not support split buffers",
]
MEMORY = [
    "llama_model_load: error loading model: mmap failed: Cannot allocate memory",
    "ggml_aligned_malloc: insufficient memory (attempted to allocate 512.00 MB)",
    "llama_model_load: error loading model: unable to allocate CPU buffer",
    "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
    "alloc_tensor_range: failed to allocate FAKE0 buffer of size 1048576",
    "llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers",
    "llama_init_from_model: failed to initialize the context: std::bad_alloc",
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9.00 MiB on device 0: cudaMalloc failed: out of memory",
    "CUDA error: out of memory",
    "CUDA error: the resource allocation failed",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
]


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        *((reason, "invalid_model_file") for reason in INVALID),
        *((reason, "unsupported_model") for reason in UNSUPPORTED),
        *((reason, "insufficient_memory") for reason in MEMORY),
    ],
)
def test_each_reason_has_a_code_and_keeps_the_engines_words(reason: str, code: str) -> None:
    classified, sentence = from_reason(reason)
    assert classified == code
    assert sentence
    assert not ABSOLUTE.search(sentence)
    assert sentence in scrub(reason)
    for quoted in re.findall(r"'([^'/]+)'", reason):
        assert f"'{quoted}'" in sentence
    assert not sentence.startswith(("llama_model_load", "gguf_init_from_file"))


def test_a_sentence_names_the_file_without_its_directory() -> None:
    assert from_reason(INVALID[0])[1] == "failed to open GGUF file 'm-q8_0.gguf' (No such file or directory)"


@pytest.mark.parametrize("reason", ["", " ", "x", "a: ", "llama_model_load: ", "/"])
def test_every_reason_has_a_code(reason: str) -> None:
    assert from_reason(reason)[0] == "invalid_model_file"


# ---- exits

ASSERT = "/tmp/build/vendor/llama.cpp/src/llama-model.cpp:1362: GGML_ASSERT(hparams.n_expert_used <= hparams.n_expert) failed"  # noqa: E501


def test_a_failed_assert_is_reported_without_the_build_path() -> None:
    code, sentence = from_exit(-signal.SIGABRT, ["load: printing all EOG tokens:", ASSERT, ""])
    assert code == "engine_crashed"
    assert sentence == (
        "the engine was terminated by SIGABRT: llama-model.cpp:1362: GGML_ASSERT(hparams.n_expert_used <= hparams.n_expert) failed"  # noqa: E501
    )


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "with status 0"),
        (1, "with status 1"),
        (3, "with status 3"),
        (-signal.SIGSEGV, "terminated by SIGSEGV"),
        (-signal.SIGABRT, "terminated by SIGABRT"),
        (-signal.SIGTERM, "terminated by SIGTERM"),
        (-signal.SIGKILL, "killed by SIGKILL"),
    ],
)
def test_the_sentence_names_the_exit_status_or_signal(status: int, words: str) -> None:
    for output in ([], ["", "  "], ["the last line"]):
        code, sentence = from_exit(status, output)
        assert code == "engine_crashed"
        assert words in sentence


def test_a_bus_error_is_a_fault_of_the_file() -> None:
    assert from_exit(-signal.SIGBUS, ["a line"])[0] == "invalid_model_file"


def test_a_kill_by_the_kernel_for_memory_is_reported_as_such() -> None:
    assert from_exit(-signal.SIGKILL, ["a line"], oom_killed=True)[0] == "insufficient_memory"
    assert from_exit(-signal.SIGSEGV, ["a line"], oom_killed=True)[0] == "engine_crashed", (
        "the kernel killed another process"
    )


@pytest.mark.parametrize(
    ("lines", "n_bytes"),
    [
        (["ggml_aligned_malloc: insufficient memory (attempted to allocate 512.00 MB)"], 512 << 20),
        (["ggml_aligned_malloc: insufficient memory (attempted to allocate   1.50 MB)"], 3 << 19),
        (["alloc_tensor_range: failed to allocate FAKE0 buffer of size 1048576"], 1 << 20),
        (
            ["cuda_buffer_type_alloc_buffer: allocating 9.00 MiB on device 0: cudaMalloc failed: out of memory"],
            9 << 20,
        ),
        (["failed to allocate A buffer of size 7", "failed to allocate B buffer of size 9", "unable to allocate"], 9),
        (["llama_model_load: error loading model: mmap failed: Cannot allocate memory"], None),
        (["llama_kv_cache: size = 512.00 MiB", "buffer of size 12"], None),
        ([], None),
    ],
)
def test_the_refused_allocation_is_read_from_the_output(lines: list[str], n_bytes: int | None) -> None:
    assert needed_bytes(lines) == n_bytes


def test_a_shortage_has_numbers_in_its_sentence_and_detail() -> None:
    devices = [
        Device(id="CUDA0", kind="gpu", name="a GPU", total_bytes=8 << 30, free_bytes=3 << 29, available_bytes=1 << 30),
        Device(id="CUDA1", kind="gpu", name="a GPU", total_bytes=8 << 30, free_bytes=700, available_bytes=-9),
    ]
    sentence, detail = shortage("it refused", 5 << 20, devices, {"CUDA1": ["p/m", "p/m:2"]}, {"CUDA1": 5})
    assert sentence == (
        "it refused: 0.0049 GiB needed, 1.00 GiB of 8.00 GiB available on CUDA0, "
        "0.00 GiB of 8.00 GiB available on CUDA1"
    )
    assert detail == {
        "needed_bytes": 5 << 20,
        "devices": [
            {
                "id": "CUDA0",
                "total_bytes": 8 << 30,
                "free_bytes": 3 << 29,
                "available_bytes": 1 << 30,
                "used_by_others_bytes": 0,
                "instances": [],
            },
            {
                "id": "CUDA1",
                "total_bytes": 8 << 30,
                "free_bytes": 700,
                "available_bytes": 0,
                "used_by_others_bytes": 5,
                "instances": ["p/m", "p/m:2"],
            },
        ],
    }


@pytest.mark.parametrize("status", [-34, -40, -64])
def test_a_realtime_signal_is_a_crash(status: int) -> None:
    assert from_exit(status, ["x"])[0] == "engine_crashed"


@pytest.mark.parametrize("line", MEMORY)
def test_an_exit_after_an_out_of_memory_line_is_reported_so(line: str) -> None:
    code, sentence = from_exit(-signal.SIGABRT, ["before", line, "after", ASSERT])
    assert (code, sentence) == ("insufficient_memory", scrub(line))


@pytest.mark.parametrize(
    "line",
    [
        "load_tensors: offloading output layer to GPU",
        "print_info: n_expert_used = 2",
        "llama_context: flash_attn = auto",
        "load: special tokens cache size = 3",
        "",
    ],
)
def test_ordinary_lines_do_not_change_the_code(line: str) -> None:
    assert from_exit(-signal.SIGSEGV, [line])[0] == "engine_crashed"


@given(st.integers(-64, 255), st.lists(st.text(max_size=60), max_size=5))
def test_every_exit_has_a_sentence(status: int, output: list[str]) -> None:
    code, sentence = from_exit(status, output)
    assert code in {"engine_crashed", "insufficient_memory", "invalid_model_file"}
    assert sentence.strip()


# ---- no paths

parts = st.text(st.characters(categories=["L", "N"], include_characters="_-.+@~#%"), min_size=1, max_size=8).filter(
    lambda part: part.strip(".")
)
paths = st.lists(parts, min_size=2, max_size=5).map(lambda names: "/" + "/".join(names))
around = st.sampled_from(["", " ", "'", '"', "(", ": ", "=", ", ", "[", "<", "`", "file:", "in "])


@given(st.lists(st.tuples(around, paths), min_size=1, max_size=3), st.text(max_size=10).filter(lambda t: "/" not in t))
@example([("", "/home/user/models/a.gguf")], ":12: GGML_ASSERT(x) failed")
@example([("=", "/home/user/a.gguf")], "")
@example([("'", "/a/b/c")], "' (No such file)")
def test_scrubbing_removes_every_absolute_path(paths_in_text: list[tuple[str, str]], end: str) -> None:
    text = " ".join(before + path for before, path in paths_in_text) + end
    scrubbed = scrub(text)
    assert not ABSOLUTE.search(" " + scrubbed)
    for _, path in paths_in_text:
        assert path.rpartition("/")[0] + "/" not in scrubbed


@given(st.lists(st.tuples(around, paths), max_size=3), st.sampled_from([-11, -9, -7, -6, 0, 1]))
def test_no_sentence_has_a_directory(paths_in_lines: list[tuple[str, str]], status: int) -> None:
    lines = [before + path for before, path in paths_in_lines]
    for sentence in (from_exit(status, lines)[1], *(from_reason(line)[1] for line in lines)):
        assert not any(path.rpartition("/")[0] + "/" in sentence for _, path in paths_in_lines)


@pytest.mark.parametrize(
    "directory",
    ["/home/user/my models", "/mnt/user (new)", "/srv/user/a,b", "/srv/user/it's", "/srv/user/a:b", "/srv//a"],
)
def test_a_directory_of_unusual_characters_is_scrubbed(directory: str) -> None:
    line = f"gguf_init_from_file: failed to open GGUF file '{directory}/p/m.gguf' (No such file or directory)"
    _, sentence = from_reason(line)
    assert not ABSOLUTE.search(sentence)
    assert directory not in sentence
    assert "m.gguf'" in sentence


def test_a_text_without_paths_is_not_changed() -> None:
    for text in ("1/2 of 3/4", "a/b", "n_embd / n_head", "GGML_ASSERT(a / b == 0) failed", "50 % at 3 GB/s"):
        assert scrub(text) == text
