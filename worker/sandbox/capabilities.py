"""Capabilities: what root may do beyond other users (capabilities(7))."""

from __future__ import annotations

import os
from ctypes import addressof, c_uint32

from shared import libc

CAPGET, CAPSET = 125, 126  # system calls of x86-64
VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
OVERRIDE = 1 << 1  # reads and writes all files
READ_SEARCH = 1 << 2  # reads all files


def drop(*, keep: int = 0) -> None:
    """Give up all capabilities of this thread but those of `keep`, for ever.  Raises OSError.

    Root has the right to read the environment of all processes, whatever Landlock says (CAP_PERFMON).
    """
    if os.uname().machine != "x86_64":
        return
    header = (c_uint32 * 2)(VERSION, 0)  # of this thread
    words = (c_uint32 * 6)()  # effective, permitted, inheritable; then the same of the capabilities from 32 on
    libc.syscall(CAPGET, addressof(header), addressof(words))
    kept = (c_uint32 * 6)(words[1] & keep, words[1] & keep)
    libc.syscall(CAPSET, addressof(header), addressof(kept))
