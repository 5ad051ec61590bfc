"""Landlock: which files a thread may open, and which processes and sockets it can reach (landlock(7)).

A thread restricts itself; the threads and processes that it starts afterwards inherit that.  A restricted process can
neither trace nor read the memory of a process outside of its own restriction.  On a kernel without Landlock
(before 5.13, or turned off) nothing here has an effect; a kernel of a lower version enforces what it knows.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from shared import libc

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, on all machines
GET_VERSION = 1  # a flag of CREATE_RULESET
PATH_BENEATH = 1  # a type of rule

# linux/landlock.h; files and directories
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
ALL = ((1, (1 << 13) - 1), (2, REFER), (3, TRUNCATE), (5, IOCTL_DEV))  # with the versions that have them
OF_A_FILE = WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # all that a rule for a file can have
TCP = (4, 0b11)  # bind and connect
SCOPES = (6, 0b11)  # abstract Unix sockets, and signals, of processes outside of the restriction
COMPLETE = 6  # the version that has all of these, Linux 6.12

READ = READ_FILE | READ_DIR
WRITE = READ | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
TREE = WRITE | MAKE_DIR | REMOVE_DIR | REFER


def version() -> int:
    """Return the version of Landlock's interface; 0 if the kernel has none, or it is turned off."""
    try:
        return libc.syscall(CREATE_RULESET, 0, 0, GET_VERSION)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return 0


def can_move() -> bool:
    """Return whether a rule can allow to move a file into another folder.  Landlock 1 refuses that in any case."""
    return version() != 1


class Ruleset:
    """Allows what its rules say, and no other file, no TCP, no signal and no abstract Unix socket to a process outside.

    Has no effect until a thread restricts itself.  Raises OSError, also from all methods.
    """

    def __init__(self, rules: Iterable[tuple[str | Path, int]] = (), *, with_network: bool = False) -> None:
        """`rules`: access rights to a file, or to all that is beneath a directory."""
        self._fd = -1
        if not (known := version()):
            return
        self._files = sum(rights for since, rights in ALL if known >= since)
        networks, scopes = (rights if known >= since else 0 for since, rights in (TCP, SCOPES))
        networks = 0 if with_network else networks
        with libc.in_memory(struct.pack("=QQQ", self._files, networks, scopes)) as (address, size):
            self._fd = libc.syscall(CREATE_RULESET, address, size, 0)
        for path, rights in rules:
            self.allow(path, rights)

    def allow(self, path: str | Path, rights: int) -> None:
        """Add a rule.  A path that leads nowhere, or not for this user, needs none."""
        if self._fd < 0:
            return
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        try:
            possible = self._files if Path(path).is_dir() else self._files & OF_A_FILE
            with libc.in_memory(struct.pack("=Qi", rights & possible, fd)) as (address, _):
                libc.syscall(ADD_RULE, self._fd, PATH_BENEATH, address, 0)
        finally:
            os.close(fd)

    def restrict_thread(self) -> None:
        """Restrict the calling thread, for ever.  Needs `no_new_privs`."""
        if self._fd >= 0:
            libc.syscall(RESTRICT_SELF, self._fd, 0)

    def close(self) -> None:
        """Free the ruleset; restrictions stay."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def restrict_thread(rules: Iterable[tuple[str | Path, int]] = (), *, with_network: bool = False) -> None:
    """Restrict the calling thread to these rules, for ever.  Needs `no_new_privs`.  Raises OSError."""
    ruleset = Ruleset(rules, with_network=with_network)
    try:
        ruleset.restrict_thread()
    finally:
        ruleset.close()
