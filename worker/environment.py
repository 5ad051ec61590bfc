"""Restricts the environment of a worker and of the processes that it starts."""

from __future__ import annotations

import os

# Variables for the engine, its drivers and its libraries.  All others, such as credentials of other services, are
# removed.  SSL_CERT_*: the certificate authorities that the worker itself trusts.
KEPT = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_FILE", "SSL_CERT_DIR")
KEPT_PREFIXES = ("LC_", "PYTHON", "GGML_", "LLAMA_", "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_")
KEPT_DRIVERS = ("CUDA_", "NVIDIA_", "NCCL_", "HIP_", "HSA_", "ROCR_", "ROCM_", "VK_", "XDG_", "ONEAPI_", "SYCL_", "ZE_")


def strip_environment() -> None:
    """Remove all variables that are not listed above from this process's environment, which child processes inherit."""
    for name in list(os.environ):
        if name not in KEPT and not name.startswith(KEPT_PREFIXES + KEPT_DRIVERS):
            del os.environ[name]
