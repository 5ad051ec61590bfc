"""Reads the engine's own account of the memory that it uses on each device.

llama.cpp has no C interface for it: `llama_get_memory_breakdown` returns a std::map by value.  The structures below are
the map's nodes as libstdc++ lays them out, and the call follows the Itanium C++ ABI on x86-64, with the address of the
result before the arguments.  The nodes are not freed: about 70 bytes for each of a few buffer types.

The mangled name does not encode the fields of a struct, so the call is made only with the version of llama-cpp-python
that it was checked with.  To check another version, compare its `llama_memory_breakdown_data` with `_Node`, and run
tests/integration/test_devices_of_a_runner.py.
"""

from __future__ import annotations

import ctypes
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from shared.schema.memory import Usage

CHECKED_VERSION = "0.3.36"  # of llama-cpp-python; it carries llama.cpp 0c1e57098
HOST = "CPU"
SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"


class _Node(ctypes.Structure):  # std::_Rb_tree_node of a buffer type and its bytes
    pass


_Node._fields_ = [
    ("color", ctypes.c_int),
    ("parent", ctypes.POINTER(_Node)),
    ("left", ctypes.POINTER(_Node)),
    ("right", ctypes.POINTER(_Node)),
    ("buffer_type", ctypes.c_void_p),
    ("model", ctypes.c_size_t),
    ("context", ctypes.c_size_t),
    ("compute", ctypes.c_size_t),
]


class _Map(ctypes.Structure):  # std::map: its comparison, the header of its tree, its size
    _fields_ = [
        ("compare", ctypes.c_size_t),
        ("color", ctypes.c_int),
        ("root", ctypes.POINTER(_Node)),
        ("first", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    ]


def breakdown(engine: Any, version: str, context: Any, devices: Mapping[int, str]) -> list[Usage] | None:
    """Return the memory of a context and its model: on each of `devices` (ggml's handle -> device id), in their order,
    then on the host.

    Returns None if it is not known for this build of the engine: another version, another processor, or no such symbol.
    `engine` is the handle of libllama, `version` that of llama-cpp-python.
    """
    if version != CHECKED_VERSION or platform.machine() != "x86_64" or not hasattr(engine, SYMBOL):
        return None
    function = getattr(engine, SYMBOL)
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    result = _Map()
    function(ctypes.addressof(result), context)
    sums: defaultdict[str, tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    for node in _nodes(result.root):
        weights, cache, compute = sums[id_ := _device(engine, node.buffer_type, devices)]
        sums[id_] = weights + node.model, cache + node.context, compute + node.compute
    return [
        Usage(id=id_, weights_bytes=weights, context_bytes=cache, compute_bytes=compute)
        for id_ in (*devices.values(), HOST)
        for weights, cache, compute in [sums[id_]]
    ]


def _nodes(node: Any) -> Iterator[Any]:
    if node:
        yield from _nodes(node.contents.left)
        yield node.contents
        yield from _nodes(node.contents.right)


def _device(engine: Any, buffer_type: int, devices: Mapping[int, str]) -> str:
    """Return the device whose memory a buffer type uses.

    ggml assigns pinned host memory ("CUDA_Host") to a GPU, although it is host memory; the CPU's buffer types have no
    device, or the CPU's (ggml-cuda.cu, ggml-backend.cpp).
    """
    engine.ggml_backend_buft_is_host.argtypes = [ctypes.c_void_p]
    engine.ggml_backend_buft_is_host.restype = ctypes.c_bool
    engine.ggml_backend_buft_get_device.argtypes = [ctypes.c_void_p]
    engine.ggml_backend_buft_get_device.restype = ctypes.c_void_p
    if engine.ggml_backend_buft_is_host(buffer_type):
        return HOST
    # HOST: buffers of repacked weights, which ggml does not count as host memory.
    return devices.get(engine.ggml_backend_buft_get_device(buffer_type), HOST)
