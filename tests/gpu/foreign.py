"""`python -m tests.gpu.foreign GPU BYTES`: a foreign program with a CUDA context and so many bytes of GPU memory.

It prints "held" once it has the memory, and exits when its stdin closes.
"""

from __future__ import annotations

import sys

from bench.cuda import GPU


def main(id_: str, n_bytes: int) -> None:
    gpu = GPU(id_)
    if n_bytes:
        gpu.hold(n_bytes)
    print("held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
