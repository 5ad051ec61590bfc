"""`python -m tests.gpu.foreign GPU BYTES|all`: a foreign program with a CUDA context and so many bytes of GPU memory.

It prints "held" once it has the memory, and exits when its stdin closes.
"""

from __future__ import annotations

import sys

from bench.cuda import GPU, CUDAError

LARGEST, LEAST = 1 << 40, 1 << 16  # bytes of an allocation


def main(id_: str, amount: str) -> None:
    gpu = GPU(id_)
    if amount == "all":
        hold_all(gpu)
    elif n_bytes := int(amount):
        gpu.hold(n_bytes)
    print("held", flush=True)
    sys.stdin.read()


def hold_all(gpu: GPU) -> None:
    """Allocate memory in ever smaller pieces until there is none."""
    n_bytes = LARGEST
    while n_bytes >= LEAST:
        try:
            gpu.hold(n_bytes)
        except CUDAError as e:
            if "OUT_OF_MEMORY" not in str(e):
                raise
            n_bytes //= 2


if __name__ == "__main__":
    main(*sys.argv[1:])
