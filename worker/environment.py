"""What a worker, and all that it starts, may read of its environment."""

from __future__ import annotations

import os

# What an engine, its drivers and its libraries may read; all else, such as credentials of other services, goes.
# SSL_CERT_*: where the worker, which strips its environment for all that it starts, finds the authorities it trusts.
KEPT = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_FILE", "SSL_CERT_DIR")
KEPT_PREFIXES = ("LC_", "PYTHON", "GGML_", "LLAMA_", "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_")
KEPT_DRIVERS = ("CUDA_", "NVIDIA_", "NCCL_", "HIP_", "HSA_", "ROCR_", "ROCM_", "VK_", "XDG_", "ONEAPI_", "SYCL_", "ZE_")


def strip_environment() -> None:
    """Leave in our environment, and so in that of everything we start, only what is listed above."""
    for name in list(os.environ):
        if name not in KEPT and not name.startswith(KEPT_PREFIXES + KEPT_DRIVERS):
            del os.environ[name]
