"""Several hosts of a pool on one machine, with TLS between them.

If this machine allows it (root, a kernel with namespaces, and `ip`), each host has its own network, name, boot id and
/etc/hosts; otherwise hosts are loopback addresses.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from redis import Redis

from tests.support.service import Client, Process, RedisServer, Reply

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000  # linux/sched.h
ESTABLISHED, LISTENING = "01", "0A"  # net/tcp_states.h, as in /proc/net/tcp

P = ParamSpec("P")
T = TypeVar("T")


# ---- hosts


class Host:
    """This machine, under one of its loopback addresses."""

    is_apart = False

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def do(self, function: Callable[P, T], *args: P.args, **fields: P.kwargs) -> T:
        """Call a function on this host: its processes and sockets belong to the host."""
        return function(*args, **fields)


class Apart(Host):
    """A host with its own namespaces.

    A thread and the processes that it starts are in them.  When these have ended, in whatever way, the kernel removes
    the namespaces and the links into them, so a test cannot leave them behind.
    """

    is_apart = True

    def __init__(self, name: str, address: str = "") -> None:
        super().__init__(name, address)
        self._thread = ThreadPoolExecutor(1, f"host-{name}")
        try:
            self.thread_id = self.do(self._leave)
        except BaseException:
            self.close()
            raise

    def do(self, function: Callable[P, T], *args: P.args, **fields: P.kwargs) -> T:
        return self._thread.submit(function, *args, **fields).result()

    def run(self, *words: str) -> None:
        self.do(run, *words)

    def _leave(self) -> int:
        """Enter new namespaces; raise OSError or CalledProcessError if this machine does not allow it."""
        libc = ctypes.CDLL(None, use_errno=True)  # os.unshare came with Python 3.12
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        run("mount", "--make-rprivate", "/")  # otherwise mounts would be visible outside
        socket.sethostname(self.name)
        run("ip", "link", "set", "lo", "up")
        return threading.get_native_id()

    def close(self) -> None:
        self._thread.shutdown()


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=60)


class Network:
    """A network of hosts.  `server` is the name of the host at `server_address`."""

    server, server_address = "localhost", "127.0.0.1"

    def __init__(self) -> None:
        self._closing = ExitStack()

    def host(self, name: str, number: int) -> Host:
        """Add a host.  Each number from 1 to 250 may be used once; 1 is the server's."""
        return Host(socket.gethostname(), f"127.0.0.{number}")

    def move(self, host: Host, number: int) -> None:
        """Give a host another address, without a notice to its peers."""
        raise AssertionError("only a host with its own network can change its address")

    def close(self) -> None:
        self._closing.close()


class Switched(Network):
    """Hosts with their own namespaces, connected by a private switch."""

    server, server_address = "redis.test", "10.0.0.1"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._switch = Apart("switch")
        self._closing.callback(self._switch.close)
        try:
            self._switch.run("ip", "link", "add", "switch", "type", "bridge")
            self._switch.run("ip", "link", "set", "switch", "up")
            self._names = directory / "hosts"
            self._names.write_text(f"127.0.0.1 localhost\n{self.server_address} {self.server}\n")
            self.host("probe", 250)  # fails now if a host cannot be created
        except BaseException:
            self.close()
            raise

    def host(self, name: str, number: int) -> Apart:
        host = Apart(name)
        self._closing.callback(host.close)
        link = f"to-{number}"
        ends = ("type", "veth", "peer", "name", "eth0", "netns", str(host.thread_id))
        self._switch.run("ip", "link", "add", link, *ends)
        self._switch.run("ip", "link", "set", link, "master", "switch", "up")
        host.run("mount", "--bind", str(self._names), "/etc/hosts")
        boot_id = self._names.with_name(f"boot-id-{number}")
        boot_id.write_text(f"{uuid.uuid4()}\n")
        host.run(
            "mount", "--bind", str(boot_id), "/proc/sys/kernel/random/boot_id"
        )  # it is the kernel's, see random(4)
        host.run("ip", "link", "set", "eth0", "up")
        self.move(host, number)
        return host

    def move(self, host: Host, number: int) -> None:
        host.address = f"10.0.0.{number}"
        host.do(run, "ip", "address", "flush", "dev", "eth0")
        host.do(run, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")


@contextmanager
def network(directory: Path) -> Iterator[Network]:
    """Create a network, of hosts with their own namespaces if this machine allows it."""
    try:
        chosen: Network = Switched(directory)
    except (OSError, subprocess.CalledProcessError):  # no root, no `ip`, or no kernel support
        chosen = Network()
    try:
        yield chosen
    finally:
        chosen.close()


class ClientOn(Client):
    """A client that sends its requests from a host."""

    def __init__(self, host: Host, url: str, token: str) -> None:
        super().__init__(url, token)
        self._host = host

    def send(self, method: str, path: str, **options: Any) -> Reply:
        return self._host.do(partial(super().send, method, path, **options))


def open_ports(tree: Iterable[Process]) -> set[str]:
    """Return where processes can be reached over a network: listening TCP sockets, and all UDP sockets."""
    ports = set()
    for process in tree:
        with suppress(FileNotFoundError, ProcessLookupError):  # the process has ended
            inodes = _sockets(process.pid)
            for protocol in ("tcp", "tcp6", "udp", "udp6"):
                for local, _, state, inode in _table(process.pid, protocol):
                    if inode in inodes and (state == LISTENING or protocol.startswith("udp")):
                        ports.add(f"{protocol} {local} of {' '.join(process.words)}")
    return ports


def _sockets(pid: int) -> set[str]:
    """Return the inodes of a process's sockets."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            inodes |= {*re.findall(r"socket:\[(\d+)\]", os.readlink(entry))}
    return inodes


def _table(pid: int, protocol: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield local address, remote address, state and inode of the sockets in a process's network; none without IPv6."""
    table = Path(f"/proc/{pid}/net/{protocol}")
    for row in table.read_text().splitlines()[1:] if table.exists() else ():
        fields = row.split()
        yield fields[1], fields[2], fields[3], fields[9]


# ---- a Redis with a password, behind TLS


class GuardedRedis(RedisServer):
    """A Redis that requires a password."""

    password: str | None = None

    def guard(self, password: str) -> None:
        with self.client() as redis:
            redis.config_set("requirepass", password)
        self.password = password

    @contextmanager
    def client(self) -> Iterator[Redis]:
        with Redis(unix_socket_path=str(self.socket), password=self.password) as redis:
            yield redis


def certificate(directory: Path, name: str) -> Path:
    """Create a self-signed certificate for a host name; its key is in the file beside it."""
    file = directory / f"{len([*directory.glob('*.pem')])}.pem"
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    names = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}")
    uses = ("-addext", "keyUsage=critical,digitalSignature,keyCertSign")  # required by Python 3.13: VERIFY_X509_STRICT
    run("openssl", "req", *kind, *names, *uses, "-keyout", str(file.with_suffix(".key")), "-out", str(file))
    return file


class TlsProxy:
    """A process that terminates TLS on one port for each certificate, and forwards to a server on a unix socket."""

    def __init__(self, host: Host, address: str, behind: Path, *certificates: Path) -> None:
        doors = [host.do(socket.create_server, (address, 0)) for _ in certificates]
        self.ports: list[int] = [door.getsockname()[1] for door in doors]
        pairs = [
            word for door, file in zip(doors, certificates, strict=True) for word in (str(door.fileno()), str(file))
        ]
        words = [sys.executable, "-m", "tests.support.hosts", str(behind), *pairs]
        root = Path(__file__).parents[2]
        self.popen = host.do(subprocess.Popen, words, cwd=root, pass_fds=[door.fileno() for door in doors])
        for door in doors:
            door.close()

    def peers(self) -> set[str]:
        """Return the addresses of the peers with open connections, including peers that vanished without closing."""
        rows = _table(self.popen.pid, "tcp")
        ours = [remote for local, remote, state, _ in rows if state == ESTABLISHED and _port(local) in self.ports]
        return {socket.inet_ntoa(int(remote.partition(":")[0], 16).to_bytes(4, sys.byteorder)) for remote in ours}

    def cut(self) -> None:
        """Break every connection."""
        self.popen.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


def _port(shown: str) -> int:
    """Return the port of an address in the format of /proc/net/tcp."""
    return int(shown.partition(":")[2], 16)


async def _take_off_tls(behind: str, *pairs: str) -> None:
    """Serve on `pairs` of a listening socket's descriptor and a certificate file."""
    writers: set[asyncio.StreamWriter] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inward, outward = await asyncio.open_unix_connection(behind)
        writers.add(writer)
        both = {asyncio.create_task(_pass_on(reader, outward)), asyncio.create_task(_pass_on(inward, writer))}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        writers.discard(writer)
        for end in (writer, outward):
            end.transport.abort()
        await asyncio.wait(both)

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, cut)
    for descriptor, file in zip(pairs[::2], pairs[1::2], strict=True):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(file, Path(file).with_suffix(".key"))
        await asyncio.start_server(connected, sock=socket.socket(fileno=int(descriptor)), ssl=context)
    await asyncio.Event().wait()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # either end may break the connection; then both are closed
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()


if __name__ == "__main__":
    asyncio.run(_take_off_tls(*sys.argv[1:]))
