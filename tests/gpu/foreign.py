"""`python -m tests.gpu.foreign GPU BYTES`: a program that is none of ours, with a CUDA context and so much memory.

It says "held" once it has it, and ends with its stdin.
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
