"""Seccomp: which system calls a process may make (seccomp(2)).

The lists say what is refused, and not what is allowed: the C library, Python, OpenMP and a GPU's driver use other calls
in each version, and a call that is missing in a list of allowed ones would break a load in a way that no test of ours
sees.  A refused call fails with EPERM, and a call that is newer than these lists with ENOSYS, as on an older kernel:
libraries expect both.  The numbers are those of x86-64; on another machine nothing here has an effect.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from shared import libc

SECCOMP = 317  # the system call
SET_MODE_FILTER, GET_ACTION_AVAIL = 1, 2  # its operations
# For all threads.  The other flag: kernels before 5.16 would slow down all code (Speculative Store Bypass).
FLAGS = 1 << 0 | 1 << 2  # SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_SPEC_ALLOW
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000  # what a filter returns
X86_64 = 0xC000003E  # AUDIT_ARCH_X86_64
LAST = 462  # mseal, of Linux 6.10: the calls up to here were looked at

CONNECT = {"connect": 42}
LISTEN = {"bind": 49, "listen": 50}
ACCEPT = {"accept": 43, "accept4": 288}
PROGRAMS = {"execve": 59, "execveat": 322}
FORKS = {"fork": 57, "vfork": 58}
PROCESSES = {
    **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "process_madvise": 440},
    **{"pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438, "process_mrelease": 448},
    **{"setpgid": 109, "setsid": 112, "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144},
    **{"ioprio_set": 251, "migrate_pages": 256, "move_pages": 279, "sched_setattr": 314},
    **{"shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220},
    **{"msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241},
}
SIGNALS = {"tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297}
KERNEL = {
    **{"bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_setup": 206},
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "setns": 308, "personality": 135},
    **{"mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "open_tree": 428, "move_mount": 429},
    **{"fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442},
    **{"init_module": 175, "delete_module": 176, "finit_module": 313, "kexec_load": 246, "kexec_file_load": 320},
    **{"reboot": 169, "swapon": 167, "swapoff": 168, "acct": 163, "quotactl": 179, "quotactl_fd": 443},
    **{"adjtimex": 159, "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305, "sethostname": 170},
    **{"setdomainname": 171, "iopl": 172, "ioperm": 173, "modify_ldt": 154, "vhangup": 153, "syslog": 103},
    **{"uselib": 134, "ustat": 136, "sysfs": 139, "lookup_dcookie": 212},
    **{"name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300, "fanotify_mark": 301},
}
OPENS = {"open": 2, "openat": 257, "readlink": 89, "readlinkat": 267, "inotify_add_watch": 254}
CHANGES = {  # of files, by their paths
    **{
        "creat": 85,
        "truncate": 76,
        "rename": 82,
        "renameat": 264,
        "renameat2": 316,
        "mkdir": 83,
        "mkdirat": 258,
        "rmdir": 84,
        "link": 86,
    },
    **{"linkat": 265, "unlink": 87, "unlinkat": 263, "symlink": 88, "symlinkat": 266, "mknod": 133, "mknodat": 259},
}
ATTRIBUTES = {  # which Landlock leaves alone
    **{"chmod": 90, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "lchown": 94, "fchownat": 260},
    **{"utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280},
    **{"setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198},
    **{"fremovexattr": 199, "fchmod": 91, "fchown": 93},
}
OPENAT2 = 437
CLONE, CLONE3, KILL, TGKILL, PRLIMIT64, SOCKET, SOCKETPAIR = 56, 435, 62, 234, 302, 41, 53
FCNTL, IOCTL = 72, 16
CLONE_THREAD = 0x10000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TYPE_MASK = 0xF  # of a socket, without SOCK_CLOEXEC and SOCK_NONBLOCK
STREAMS = (int(socket.SOCK_STREAM), int(socket.SOCK_SEQPACKET))  # a datagram socket reaches any address
SIGIO = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: the kernel then sends signals to any process
SIGIO_IOCTLS = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP


@dataclass(frozen=True)
class If:
    """A condition on an argument of a call: its lower 32 bits, masked, are one of the values, or are none of them."""

    argument: int
    values: Collection[int]
    mask: int = 0xFFFFFFFF
    are_allowed: bool = True


def compiled(refused: Iterable[int], conditions: Iterable[tuple[int, If]] = ()) -> bytes:
    """Return a program for the kernel that refuses calls, and lets others pass only under all of their conditions.

    A call has one entry in `conditions` for each of its conditions.
    """
    # struct seccomp_data: number, architecture, instruction pointer, six arguments of 64 bits.
    steps = [
        _step(0x20, 4),  # load the architecture
        _step(0x15, X86_64, 1, 0),  # is it?  Else: a call of 32 bits, which nothing of ours makes
        _step(0x06, KILL_PROCESS),
        _step(0x20, 0),  # load the number
        _step(0x35, LAST + 1, 0, 1),  # at least?
        _step(0x06, ERRNO | errno.ENOSYS),
        # Its flags are in memory, where a filter cannot look: the C library then uses clone.
        _step(0x15, CLONE3, 0, 1),
        _step(0x06, ERRNO | errno.ENOSYS),
    ]
    for number in refused:
        steps += [_step(0x15, number, 0, 1), _step(0x06, ERRNO | errno.EPERM)]
    for number, condition in conditions:
        checks = _checks(condition)
        steps += [_step(0x15, number, 0, len(checks)), *checks]
    return b"".join([*steps, _step(0x06, ALLOW)])


def apply(program: bytes) -> None:
    """Restrict all threads of this process, for ever.  Needs `no_new_privs`.  Raises OSError."""
    with (
        libc.in_memory(program) as (address, size),
        libc.in_memory(struct.pack("@HP", size // 8, address)) as (fprog, _),
    ):
        if thread := libc.syscall(SECCOMP, SET_MODE_FILTER, FLAGS, fprog):
            raise OSError(errno.EBUSY, f"thread {thread} cannot be restricted")


def _checks(condition: If) -> list[bytes]:
    """Return the steps that end the filter if the condition is not met, and go on with the number if it is."""
    n = len(condition.values)
    return [
        _step(0x20, 16 + 8 * condition.argument),
        _step(0x54, condition.mask),
        *(_step(0x15, value, n - i) for i, value in enumerate(condition.values)),  # is it?  Skip the others, and one
        *([] if condition.are_allowed else [_step(0x05, 1)]),  # it was none of them: skip the refusal
        _step(0x06, ERRNO | errno.EPERM),
        _step(0x20, 0),
    ]


def _step(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("@HBBI", code, if_true, if_false, k)  # struct sock_filter


def outside(*, forks: bool = False, accepts: bool = False, on_gpu: bool = False) -> None:
    """Keep this process from the network, from programs and other processes, from the owners and rights of files, and
    from parts of the kernel that it does not need.  Connected sockets that it is given go on working.

    It may signal only itself, and start no process, unless it `forks`.  `accepts`: it accepts connections from sockets
    that it is given.  `on_gpu`: CUDA listens on a Unix socket of its own.
    """
    if not is_available():
        return
    own = os.getpid()
    refused = {**CONNECT, **PROGRAMS, **PROCESSES, **SIGNALS, **KERNEL, **ATTRIBUTES}
    conditions = [
        (SOCKETPAIR, If(0, [int(socket.AF_UNIX)])),
        (SOCKETPAIR, If(1, STREAMS, TYPE_MASK)),
        (FCNTL, If(1, SIGIO, are_allowed=False)),
        (IOCTL, If(1, SIGIO_IOCTLS, are_allowed=False)),
    ]
    if not forks:  # its own process id: a process that it forks would inherit these
        refused |= FORKS
        conditions += [(CLONE, If(0, [CLONE_THREAD], CLONE_THREAD))]
        conditions += [(KILL, If(0, [own])), (TGKILL, If(0, [own])), (PRLIMIT64, If(0, [0, own]))]
    if on_gpu:
        del refused["fchmod"]  # of files that the driver makes
        conditions += [(SOCKET, If(0, [int(socket.AF_UNIX)])), (SOCKET, If(1, STREAMS, TYPE_MASK))]
    else:
        refused |= {"socket": SOCKET, **LISTEN, **({} if accepts else ACCEPT)}
    apply(compiled(refused.values(), conditions))


READ_ONLY = compiled(
    [*CHANGES.values(), OPENAT2],  # the flags of openat2 are in memory
    [(OPENS["open"], If(1, [0], WRITING)), (OPENS["openat"], If(2, [0], WRITING))],
)
NO_FILES = compiled(
    [*OPENS.values(), *CHANGES.values(), OPENAT2]
)  # stat(2) stays: the C library uses it for open files


def read_only() -> None:
    """Keep all threads of this process from changing files, and from opening them for writing."""
    if is_available():
        apply(READ_ONLY)


def no_files() -> None:
    """Keep all threads of this process from opening files, and from changing them by their paths."""
    if is_available():
        apply(NO_FILES)


def is_available() -> bool:
    """Return whether this kernel, on this machine, has what filters need."""
    if os.uname().machine != "x86_64":
        return False
    try:
        with libc.in_memory(struct.pack("=I", ERRNO)) as (address, _):
            return libc.syscall(SECCOMP, GET_ACTION_AVAIL, 0, address) == 0
    except OSError:  # a kernel before 4.14, or one without seccomp; a container may refuse it
        return False
