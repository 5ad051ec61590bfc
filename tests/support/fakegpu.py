"""Fake GPUs on a machine without one: ggml devices of type GPU over the CPU backend, each with its own memory.

A device computes on the CPU and its buffers are host memory, but it has its own name and capacity, reports its free
memory and refuses larger allocations.  So llama.cpp offloads to it, splits over several devices and runs out of memory
as on a real card.  It uses only ctypes and the stock build: it lays out ggml's private structs
(ggml/src/ggml-backend-impl.h) as in llama-cpp-python 0.3.36.  For tests only.

Every ggml function comes from the handle of libllama: a second handle on libggml would be a second copy of it, with its
own device registry.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_bool, c_int, c_size_t, c_void_p
from typing import Any, Protocol

from llama_cpp import llama_cpp

TYPE_CPU, TYPE_GPU = 0, 1  # enum ggml_backend_dev_type
SET_TENSOR = 4  # the place of the function among those that a ggml_backend_buffer begins with
LOG_ERROR = 4  # enum ggml_log_level
ALLOC_FAILED, FAILED, SUCCESS = -2, -1, 0  # enum ggml_status

_ggml: Any = llama_cpp._lib


def _pointers(*names: str) -> list[tuple[str, type[c_void_p]]]:
    return [(name, c_void_p) for name in names]


class _BufferType(ctypes.Structure):  # ggml_backend_buffer_type
    _fields_ = _pointers(
        *("get_name", "alloc_buffer", "get_alignment", "get_max_size", "get_alloc_size", "is_host"),
        *("device", "context"),
    )


class _Device(ctypes.Structure):  # ggml_backend_device
    _fields_ = _pointers(
        *("get_name", "get_description", "get_memory", "get_type", "get_props", "init_backend", "get_buffer_type"),
        *("get_host_buffer_type", "buffer_from_host_ptr", "supports_op", "supports_buft", "offload_op"),
        *("event_new", "event_free", "event_synchronize", "reg", "context"),
    )


class _Backend(ctypes.Structure):  # ggml_backend
    _fields_ = _pointers(
        *("guid", *(f"function_{i}" for i in range(12)), "graph_compute", "event_record", "event_wait"),
        *("graph_optimize", "device", "context"),
    )


class _Capabilities(ctypes.Structure):  # ggml_backend_dev_caps
    _fields_ = [(name, c_bool) for name in ("async_", "host_buffer", "buffer_from_host_ptr", "events", "mmap_support")]


class _Properties(ctypes.Structure):  # ggml_backend_dev_props; strings are addresses of bytes kept elsewhere
    _fields_ = [
        *_pointers("name", "description"),
        ("memory_free", c_size_t),
        ("memory_total", c_size_t),
        ("type", c_int),
        ("device_id", c_void_p),
        ("caps", _Capabilities),
    ]


# A pointer also stands for a string: ctypes does not keep a string that a callback returns.
_Pointer = ctypes.CFUNCTYPE(c_void_p, c_void_p)
_PointerOfTwo = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p)
_Type = ctypes.CFUNCTYPE(c_int, c_void_p)
_Bool = ctypes.CFUNCTYPE(c_bool, c_void_p)
_BoolOfTwo = ctypes.CFUNCTYPE(c_bool, c_void_p, c_void_p)
_Memory = ctypes.CFUNCTYPE(None, c_void_p, ctypes.POINTER(c_size_t), ctypes.POINTER(c_size_t))
_Props = ctypes.CFUNCTYPE(None, c_void_p, ctypes.POINTER(_Properties))
_Alloc = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_size_t)
_Free = ctypes.CFUNCTYPE(None, c_void_p)
_Set = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_size_t, c_size_t)
_Compute = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)


def _bind(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(_ggml, name)
    function.restype, function.argtypes = result, arguments
    return function  # type: ignore[no-any-return]  # a C function has no type


_cpu_buffer_type = _bind("ggml_backend_cpu_buffer_type", c_void_p)
_cpu_backend = _bind("ggml_backend_cpu_init", c_void_p)
_free_backend = _bind("ggml_backend_free", None, c_void_p)
_device_by_type = _bind("ggml_backend_dev_by_type", c_void_p, c_int)
_register = _bind("ggml_backend_device_register", None, c_void_p)
_graph_node = _bind("ggml_graph_node", c_void_p, c_void_p, c_int)
_n_rows = _bind("ggml_nrows", ctypes.c_int64, c_void_p)
_log = _bind("ggml_log_internal", None, c_int, ctypes.c_char_p)  # in fact of a variable number of arguments, as below
_abort = _bind("ggml_abort", None, ctypes.c_char_p, c_int, ctypes.c_char_p)

_registered: list[FakeGPU] = []  # ggml never frees devices, so their structs are kept too


class Memory(Protocol):
    """The memory of a device that several processes share."""

    def begin(self) -> bool:
        """Take the driver's memory for this process, once; return whether there was room."""

    def take(self, n_bytes: int) -> bool:
        """Take so many bytes for this process; return whether there was room."""

    def give(self, n_bytes: int) -> None: ...

    def grow(self, n_rows: int) -> bool:
        """Take what this process needs to compute so many rows at once; return whether there was room."""

    def free_bytes(self) -> int: ...


class Copies(Protocol):
    """Sees copies from host memory to a device before they are made."""

    def copies(self, address: int, size: int) -> None: ...


class FakeGPU:
    """One fake device.  `used_bytes` and `peak_bytes` are the current and the largest usage of llama.cpp in this
    process; if other processes use the device too, `shared` has its free memory.  `statuses` has results (of ggml) of
    the next computations, of which only those with SUCCESS are made.

    Created and registered by `add`; never unregistered, since ggml has no function for that.
    """

    def __init__(self, name: str, total_bytes: int, shared: Memory | None = None, copies: Copies | None = None) -> None:
        self.name = name
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self.statuses: list[int] = []
        self._shared = shared
        self._copies = copies
        self._set_tensor: Any = None  # the CPU backend's function
        self._compute_graph: Any = None  # likewise
        self._live: dict[int, tuple[int, int]] = {}  # buffer -> its bytes, and the CPU backend's free function
        self._strings = [ctypes.create_string_buffer(text.encode()) for text in (name, "fake GPU", f"fake:{name}")]
        self._name, self._description, self._id = map(ctypes.addressof, self._strings)

        cpu = _Device.from_address(_device_by_type(TYPE_CPU))
        cpu_buffers = _BufferType.from_address(_cpu_buffer_type())
        self._cpu_alloc = _Alloc(cpu_buffers.alloc_buffer)
        self._device = _Device.from_buffer_copy(cpu)
        self._buffers = _BufferType.from_buffer_copy(cpu_buffers)
        self._device_at = ctypes.addressof(self._device)
        self._buffers_at = ctypes.addressof(self._buffers)

        self._free_callback = _Free(self._free)
        self._set_callback = _Set(self._set)
        self._compute_callback = _Compute(self._compute)
        self._device_callbacks: dict[str, Any] = {
            "get_name": _Pointer(lambda _: self._name),
            "get_description": _Pointer(lambda _: self._description),
            "get_memory": _Memory(self._get_memory),
            "get_type": _Type(lambda _: TYPE_GPU),
            "get_props": _Props(self._get_properties),
            "init_backend": _PointerOfTwo(self._init_backend),
            "get_buffer_type": _Pointer(lambda _: self._buffers_at),
            "supports_buft": _BoolOfTwo(lambda _, buffer_type: buffer_type == self._buffers_at),
        }
        self._buffer_callbacks: dict[str, Any] = {
            "get_name": _Pointer(lambda _: self._name),
            "alloc_buffer": _Alloc(self._alloc),
            "is_host": _Bool(lambda _: False),
        }
        for name_of, callback in self._device_callbacks.items():
            setattr(self._device, name_of, _address(callback))
        for absent in ("get_host_buffer_type", "buffer_from_host_ptr", "offload_op"):
            setattr(self._device, absent, None)
        for name_of, callback in self._buffer_callbacks.items():
            setattr(self._buffers, name_of, _address(callback))
        self._buffers.device = self._device_at

    @property
    def free_bytes(self) -> int:
        return self._shared.free_bytes() if self._shared else self.total_bytes - self.used_bytes

    def _alloc(self, buffer_type: int, n_bytes: int) -> int | None:
        shared = self._shared
        if not (shared.begin() and shared.take(n_bytes) if shared else n_bytes <= self.free_bytes):
            return None  # out of memory, as a device reports it
        buffer: int | None = self._cpu_alloc(buffer_type, n_bytes)
        if not buffer and self._shared:
            self._shared.give(n_bytes)
        if buffer:
            self.used_bytes += n_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            free_buffer = c_void_p.from_address(buffer)  # the first field of a ggml_backend_buffer
            self._live[buffer] = n_bytes, free_buffer.value or 0
            free_buffer.value = _address(self._free_callback)
            if self._copies is not None:
                set_tensor = c_void_p.from_address(buffer + SET_TENSOR * ctypes.sizeof(c_void_p))
                self._set_tensor = _Set(set_tensor.value or 0)
                set_tensor.value = _address(self._set_callback)
        return buffer

    def _set(self, buffer: int, tensor: int, data: int, offset: int, size: int) -> None:
        assert self._copies is not None
        self._copies.copies(data, size)
        self._set_tensor(buffer, tensor, data, offset, size)

    def _free(self, buffer: int) -> None:
        n_bytes, cpu_free = self._live.pop(buffer)
        self.used_bytes -= n_bytes
        if self._shared:
            self._shared.give(n_bytes)
        if cpu_free:
            _Free(cpu_free)(buffer)

    def _get_memory(self, _: int, free: Any, total: Any) -> None:
        if self._shared:
            self._shared.begin()  # like cudaMemGetInfo, which ggml-cuda.cu calls here and for the properties
        free[0], total[0] = self.free_bytes, self.total_bytes

    def _get_properties(self, _: int, properties: Any) -> None:
        if self._shared:
            self._shared.begin()
        properties[0] = _Properties(
            *(self._name, self._description, self.free_bytes, self.total_bytes, TYPE_GPU, self._id),
            _Capabilities(mmap_support=True),  # like a separate card: weights are copied from a mapped file
        )

    def _init_backend(self, *_: int) -> int:
        backend: int = _cpu_backend()
        functions = _Backend.from_address(backend)
        functions.device = self._device_at
        self._compute_graph = _Compute(functions.graph_compute or 0)
        functions.graph_compute = _address(self._compute_callback)
        return backend

    def _compute(self, backend: int, graph: int) -> int:
        """Compute; or end the process, as ggml_cuda_error does where CUDA has no memory for intermediate results."""
        if self.statuses and (status := self.statuses.pop(0)) != SUCCESS:
            return status
        if self._shared and not self._shared.grow(_n_rows(_graph_node(graph, 0))):
            _log(LOG_ERROR, b"CUDA error: out of memory\n")
            _log(LOG_ERROR, b"  current device: 0, in function alloc at ggml-cuda.cu:578\n")
            _log(LOG_ERROR, b"  cuMemCreate(&handle, reserve_size, &prop, 0)\n")
            _abort(b"ggml-cuda.cu", 109, b"CUDA error")
        result: int = self._compute_graph(backend, graph)
        return result


def add(name: str, total_bytes: int, shared: Memory | None = None, copies: Copies | None = None) -> FakeGPU:
    """Add a device to this process; its name must be unique.

    Call it after llama_backend_init and before the first model load, any number of times.
    """
    _check_layout()
    gpu = FakeGPU(name, total_bytes, shared, copies)
    _registered.append(gpu)
    _register(gpu._device_at)
    return gpu


def _check_layout() -> None:
    """Raise RuntimeError if ggml's structs have another layout than above, instead of crashing later."""
    cpu = _device_by_type(TYPE_CPU)
    backend = _cpu_backend()
    device = _Backend.from_address(backend).device
    _free_backend(backend)
    if device != cpu or _Type(_Device.from_address(cpu).get_type)(cpu) != TYPE_CPU:
        raise RuntimeError("ggml's private structs have changed; see ggml-backend-impl.h of this llama.cpp")


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, c_void_p).value
