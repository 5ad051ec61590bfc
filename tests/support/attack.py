"""An attacker's code in a runner: tries to reach what is not the runner's, and reports what the kernel said.

`run_child` is a runner with such code, which runs at one moment.  The rest of it is the real one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec import Struct, json

from shared import libc
from shared.framing import LENGTH
from shared.schema.http import EngineBuild
from worker.runner.process import Runner
from worker.runner.protocol import Load, Progress, Warm, frame
from worker.sandbox import landlock, seccomp

SAID = "attack: "
REFUSALS = {"EPERM", "EACCES", "ENOSYS"}
NEEDED = pytest.mark.skipif(
    landlock.version() < landlock.COMPLETE or not seccomp.is_available(), reason="this kernel has not all protections"
)
When = Literal["loading", "loaded"]


class Targets(Struct, frozen=True):
    """What the attacker wants."""

    worker: int  # process
    port: int  # of a TCP server on this host
    sockets: dict[str, str]  # Unix sockets, by whose they are
    abstract: str
    readable: dict[str, str]  # files, by what they are
    listed: dict[str, str]  # directories
    directory: str  # where it would write


@contextmanager
def targets(directory: Path, another_model: Path, sockets: dict[str, str]) -> Iterator[Targets]:
    """Yield what is beside a runner of this process, with a file `victim` in this directory."""
    (directory / "victim").write_text("data of the worker")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("")  # the kernel chooses a name
        abstract.listen()
        yield Targets(
            worker=os.getpid(),
            port=server.getsockname()[1],
            sockets=sockets,
            abstract=abstract.getsockname()[1:].decode(),
            readable={
                "the users": "/etc/passwd",
                "another model": str(another_model),
                "the worker's data": str(directory / "victim"),
            },
            listed={"models": str(another_model.parent), "the worker's data": str(directory)},
            directory=str(directory),
        )


def attempts(targets: Targets) -> dict[str, Callable[[], object]]:
    """Return what an attacker tries.  Each raises OSError, or else succeeded; none of them does harm."""
    worker, parent = targets.worker, os.getppid()
    victim = Path(targets.directory) / "victim"
    return {
        **{f"reads {name}": Path(path).read_bytes for name, path in targets.readable.items()},
        **{f"lists {name}": partial(os.listdir, path) for name, path in targets.listed.items()},
        **{f"connects to {name}": partial(_connect, path) for name, path in targets.sockets.items()},
        "connects to an abstract socket": lambda: _connect("\0" + targets.abstract),
        "connects to TCP": lambda: socket.create_connection(("127.0.0.1", targets.port), 5).close(),
        "sends UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
        "opens a datagram pair": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
        "opens netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "listens": lambda: socket.create_server(("127.0.0.1", 0)).close(),
        "writes a file": lambda: Path(targets.directory, "new").write_text("x"),
        "changes a file": lambda: os.truncate(victim, 1),
        "changes a mode": lambda: victim.chmod(0o600),
        "renames a file": lambda: victim.rename(victim),
        "makes a directory": lambda: os.makedirs(Path(targets.directory, "made")),
        "writes to its own memory's file": lambda: os.close(os.open("/proc/self/mem", os.O_RDWR)),
        "forks": _fork,
        "spawns": lambda: subprocess.run(["true"], check=True),
        "signals the worker": lambda: os.kill(worker, 0),
        "signals its parent": lambda: os.kill(parent, 0),
        "signals a thread of the worker": lambda: libc.syscall(234, worker, worker, 0),
        "signals its group": lambda: os.kill(0, 0),
        "limits the worker": lambda: resource.prlimit(worker, resource.RLIMIT_CORE),
        "has signals sent to the worker": lambda: fcntl.fcntl(1, fcntl.F_SETOWN, worker),
        "opens the worker's descriptors": lambda: os.close(os.pidfd_open(worker)),
    }


def of_debuggers(targets: Targets) -> dict[str, Callable[[], object]]:
    """Return attempts that some kernels refuse to all processes."""
    worker, parent = targets.worker, os.getppid()
    return {
        "reads the worker's environment": lambda: Path(f"/proc/{worker}/environ").read_bytes(),
        "reads its parent's environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "opens the worker's memory": lambda: open(f"/proc/{worker}/mem", "rb").close(),
        "opens its parent's memory": lambda: open(f"/proc/{parent}/mem", "rb").close(),
        "reads the worker's memory": lambda: libc.syscall(310, worker, 0, 0, 0, 0, 0),
        "traces the worker": lambda: libc.syscall(101, 0x4206, worker, 0, 0),  # PTRACE_SEIZE
        "has a new namespace": lambda: libc.syscall(272, 0x10000000),
        "has an io_uring": lambda: libc.syscall(425, 0, 0),
        "has a program in the kernel": lambda: libc.syscall(321, 0, 0, 0),
        "has a keyring": lambda: libc.syscall(250, 0, -3, 1),
        "makes a call that is too new": lambda: libc.syscall(463, 0),
        "makes a call of the x32 interface": lambda: libc.syscall(0x40000000 | 39),
        "becomes another program": lambda: os.execv("/bin/true", ["true"]),
    }


def outcomes(tried: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Return the name of the error of each attempt; "" if it succeeded."""
    results = {}
    for name, attempt in tried.items():
        try:
            attempt()
        except OSError as e:
            results[name] = errno.errorcode.get(e.errno or 0, str(e))
        else:
            results[name] = ""
    return results


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)


def _fork() -> None:
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def report(runner: Runner) -> dict[str, str] | None:
    """Return the outcomes that the attacker in a runner has reported; None: not yet."""
    for line in runner.output:
        if line.startswith(SAID):
            return json.decode(line.removeprefix(SAID), type=dict[str, str])
    return None


# ---- in a runner


def disturb(hand_over: socket.socket) -> None:
    """Send the listener what it did not ask for, with descriptors of all kinds."""
    reading, writing = os.pipe()
    for passed in ([reading, writing], [hand_over.fileno(), reading], [writing]) * 100:
        with suppress(BlockingIOError):  # it has not read the last ones
            socket.send_fds(hand_over, [b"a token of none"], passed)
    os.close(reading)
    os.close(writing)


def flood(control: socket.socket, hand_over: socket.socket, output: socket.socket, visible: str | None) -> None:
    """Run in the place of `worker.runner.warm.run_child`: report progress without end."""
    control.sendall(
        frame(
            Warm(EngineBuild(llama_cpp_python="", llama_cpp_commit="", backends=[], chat_unavailable="it is an attack"))
        )
    )
    while True:
        control.sendall(frame(Progress("weights", 1)) * 100)


def boast(control: socket.socket, hand_over: socket.socket, output: socket.socket, visible: str | None) -> None:
    """Run in the place of `worker.runner.warm.run_child`: announce a message that never ends."""
    control.sendall(
        frame(
            Warm(EngineBuild(llama_cpp_python="", llama_cpp_commit="", backends=[], chat_unavailable="it is an attack"))
        )
    )
    control.sendall(LENGTH.pack(0xFFFFFFFF))
    while True:
        control.sendall(bytes(1 << 16))


def run_child(
    targets: Targets,
    when: When,
    control: socket.socket,
    hand_over: socket.socket,
    output: socket.socket,
    visible: str | None,
) -> None:
    """Run in the place of `worker.runner.warm.run_child`.

    "loaded": the attacker has a thread that started before the load, when the runner serves requests.  "loading": it
    has the engine's, when that reads the file.
    """
    from worker.engine import channels, child, llama, prewarm

    names: dict[str, Any] = {"child": child, "channels": channels.Channels, "llama": llama}  # modules that it changes
    restrict, start, load_model = names["child"].restrict, names["channels"].start, names["llama"]._load_model
    is_loaded = threading.Event()

    def attack() -> None:
        disturb(hand_over)
        results = outcomes({**attempts(targets), **of_debuggers(targets)})
        os.write(1, f"{SAID}{json.encode(results).decode()}\n".encode())

    def attack_later() -> None:
        is_loaded.wait()
        attack()

    def with_thread(*, on_gpu: bool) -> None:
        restrict(on_gpu=on_gpu)
        threading.Thread(target=attack_later, daemon=True).start()

    def and_attack(*arguments: Any) -> None:
        start(*arguments)
        is_loaded.set()

    def attack_first(given: Load, *arguments: Any) -> Any:
        if given.shards != [str(prewarm.MODEL)]:
            attack()
        return load_model(given, *arguments)

    if when == "loaded":
        names["child"].restrict, names["channels"].start = with_thread, and_attack
    else:
        names["llama"]._load_model = attack_first
    child.main(control, hand_over, output, visible)


# ---- in a process that is not confined


def main() -> None:
    """Try what a runner must not do, in a process of its own; writes the outcomes to stdout."""
    targets = json.decode(sys.argv[1], type=Targets)
    sys.stdout.buffer.write(json.encode(outcomes(attempts(targets))))


if __name__ == "__main__":
    main()
