"""Transfers from a hub on this machine that cuts, stalls and lies."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import DownloadFailed, ModelNotFound
from tests.support.certificates import local_tls
from tests.support.hub import LocalHub, sha256
from worker.hub import transfer
from worker.hub.choice import RemoteFile
from worker.hub.client import Access, Hub
from worker.hub.connection import Unavailable
from worker.hub.transfer import GOT, Corrupt, Transfer, discard, opened

PIECE = 256 << 10
SIZE = 10 * PIECE + 12_345
_clients: list[Hub] = []  # to close
REPOSITORY, FILE = "org/name", "name-Q4_K_M.gguf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(transfer, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(SIZE))
    with LocalHub().running() as hub:
        hub.add(REPOSITORY, FILE, source)
        yield hub
        while _clients:
            _clients.pop().close()


def client_of(access: Access) -> Hub:
    client = Hub(access)
    _clients.append(client)
    return client


class Fetched:
    """Fetches the file of a hub into a partial file."""

    def __init__(self, hub: LocalHub, folder: Path, *, stall_s: float = 60.0, patience_s: float = 600.0) -> None:
        self.hub, self.path, self.patience_s = hub, folder / "partial", patience_s
        self.access = Access(endpoint=hub.endpoint, hosts=(hub.cdn,), token=hub.token, stall_s=stall_s)
        self.client = client_of(self.access)
        repository = self.client.repository(REPOSITORY, "main")
        self.commit, (self.file,) = repository.commit, repository.files

    def transfer(self, connections: int) -> Transfer:
        file, patience_s = self.file, self.patience_s
        return Transfer(self.client, REPOSITORY, self.commit, file, connections=connections, patience_s=patience_s)

    def run(self) -> None:
        with opened(self.path, self.file.size) as partial:
            self.transfer(3).run(partial)

    def is_right(self) -> bool:
        return sha256(self.path) == sha256(self.hub.repositories[REPOSITORY][FILE])


def test_the_file_comes_once(hub: LocalHub, tmp_path: Path) -> None:
    fetched = Fetched(hub, tmp_path)
    fetched.run()
    assert fetched.is_right()
    assert hub.sent[FILE] == SIZE


def test_cuts_cost_nothing(hub: LocalHub, tmp_path: Path) -> None:
    hub.cut_after = [1, 1000, 100_000, 0, 77, 5000] * 4
    fetched = Fetched(hub, tmp_path)
    fetched.run()
    assert fetched.is_right()
    assert hub.sent[FILE] == SIZE


def test_a_stalled_connection_is_replaced(hub: LocalHub, tmp_path: Path) -> None:
    hub.stalls = 2
    fetched = Fetched(hub, tmp_path, stall_s=0.5)
    fetched.run()
    assert fetched.is_right()


def test_a_trickle_is_replaced(hub: LocalHub, tmp_path: Path) -> None:
    hub.trickles = True
    fetched = Fetched(hub, tmp_path, stall_s=0.5)
    with opened(fetched.path, fetched.file.size) as partial, pytest.raises(Unavailable, match="only"):
        fetched.transfer(1)._read(partial, 0, PIECE)
    hub.trickles = False
    fetched.run()
    assert fetched.is_right()


def test_a_busy_hub_is_asked_again(hub: LocalHub, tmp_path: Path) -> None:
    hub.statuses = [(429, {"Retry-After": "1"}), (503, {}), (500, {}), (502, {})]
    fetched = Fetched(hub, tmp_path)
    fetched.run()
    assert fetched.is_right()


def test_an_expired_link_is_renewed(hub: LocalHub, tmp_path: Path) -> None:
    hub.statuses = [(403, {})]
    fetched = Fetched(hub, tmp_path)
    fetched.run()
    assert fetched.is_right()


def test_a_hub_without_ranges(hub: LocalHub, tmp_path: Path) -> None:
    hub.ignores_ranges = True
    hub.cut_after = [PIECE, 3 * PIECE]
    fetched = Fetched(hub, tmp_path)
    fetched.run()
    assert fetched.is_right()


def test_a_dead_hub_ends_the_transfer(hub: LocalHub, tmp_path: Path) -> None:
    hub.statuses = [(503, {})] * 1000
    fetched = Fetched(hub, tmp_path, patience_s=0.5)
    with pytest.raises(DownloadFailed, match=r"No progress for 0.5 s\. The hub replied with status 503"):
        fetched.run()


def test_what_came_is_kept(hub: LocalHub, tmp_path: Path) -> None:
    fetched = Fetched(hub, tmp_path)
    with opened(fetched.path, fetched.file.size) as partial:
        fetched.transfer(1)._read(partial, 0, PIECE)
    fetched.run()
    assert fetched.is_right()
    assert hub.sent[FILE] == SIZE


def test_a_wrong_hash(hub: LocalHub, tmp_path: Path) -> None:
    hub.listed_hashes[FILE] = "0" * 64
    fetched = Fetched(hub, tmp_path)
    with pytest.raises(Corrupt, match="has the SHA-256") as info:
        fetched.run()
    assert not info.value.is_resumed
    with pytest.raises(Corrupt) as info:
        fetched.run()
    assert info.value.is_resumed
    discard(fetched.path)
    assert not [*tmp_path.glob("partial*")]


@pytest.mark.parametrize("listed", [SIZE - 1, SIZE + 1])
def test_a_wrong_size(hub: LocalHub, tmp_path: Path, listed: int) -> None:
    hub.listed_sizes[FILE] = listed
    with pytest.raises(DownloadFailed, match=f"sends {SIZE:,} bytes .* lists it with {listed:,}"):
        Fetched(hub, tmp_path).run()


def test_the_token_goes_to_the_hub_only(hub: LocalHub, tmp_path: Path) -> None:
    hub.gated, hub.token = True, "hf_secret"
    fetched = Fetched(hub, tmp_path)
    fetched.run()
    assert fetched.is_right()
    with_token = {server for server, _, headers in hub.requests if "authorization" in headers}
    assert with_token == {"hub"}
    assert "hf_secret" not in repr(fetched.access)


def test_a_gated_repository(hub: LocalHub, tmp_path: Path) -> None:
    hub.gated, hub.token = True, ""
    with pytest.raises(DownloadFailed, match="Set HF_TOKEN of the worker") as info:
        Fetched(hub, tmp_path)
    assert info.value.code == "gated_repository"


def test_an_unknown_repository(hub: LocalHub) -> None:
    client = client_of(Access(endpoint=hub.endpoint))
    with pytest.raises(ModelNotFound, match=r"Repository 'org/other' .* does not exist"):
        client.repository("org/other", "main")


@pytest.mark.parametrize(
    "elsewhere",
    ["http://127.0.0.1:1/x", "http://169.254.169.254/latest", "file:///etc/passwd", "http://huggingface.co/x"],
)
def test_a_redirect_elsewhere_is_refused(hub: LocalHub, tmp_path: Path, elsewhere: str) -> None:
    hub.redirect = elsewhere
    with pytest.raises(DownloadFailed, match="not an allowed host"):
        Fetched(hub, tmp_path).run()


def test_a_redirect_out_of_tls_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, tls = local_tls(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with LocalHub(tls).running() as hub:
        hub.add(REPOSITORY, FILE, authority)
        hub.redirect = f"http://{hub.cdn}/x"
        with pytest.raises(DownloadFailed, match=r"redirects to 'localhost:.*' without TLS"):
            Fetched(hub, tmp_path, patience_s=1.0).run()
        while _clients:
            _clients.pop().close()


def test_a_certificate_that_is_not_trusted_is_final(hub: LocalHub, tmp_path: Path) -> None:
    """It ends the transfer at once, and not for want of progress."""
    _, tls = local_tls(tmp_path)
    with LocalHub(tls).running() as elsewhere:
        hub.redirect = f"{elsewhere.endpoint}/x"
        access = Access(endpoint=hub.endpoint, hosts=(elsewhere.endpoint.partition("//")[2],))
        file = RemoteFile(FILE, SIZE, "0" * 64)
        job = Transfer(client_of(access), REPOSITORY, hub.commit, file, connections=3, patience_s=1.0)
        with opened(tmp_path / "partial", SIZE) as partial, pytest.raises(DownloadFailed) as info:
            job.run(partial)
        assert str(info.value).startswith("The certificate of 'localhost' cannot be verified")


def test_an_allowed_name_with_a_private_address(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the public hub may not lead into this network: the address counts, not the name."""
    hub.redirect = "https://cdn-lfs.hf.co/x"
    real, here = socket.getaddrinfo, [(2, 1, 6, "", ("127.0.0.1", 443))]
    found = lambda host, *args, **names: here if host == "cdn-lfs.hf.co" else real(host, *args, **names)  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", found)
    with pytest.raises(Unavailable, match="its address is not one of the internet"):
        client_of(Access(endpoint=hub.endpoint)).locate(REPOSITORY, hub.commit, FILE)


def test_an_empty_file(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    file = RemoteFile("empty.gguf", 0, sha256(tmp_path / "empty"))
    client = client_of(Access(endpoint=hub.endpoint))
    with opened(tmp_path / "partial", 0) as partial:
        Transfer(client, REPOSITORY, hub.commit, file, connections=2, patience_s=60).run(partial)


def test_a_write_that_is_overtaken_takes_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that ignores ranges may send the whole file while another connection still reads a piece of it."""
    pwrite, data = os.pwrite, memoryview(bytes(range(100)))
    with opened(tmp_path / "part", len(data)) as partial:

        def overtaken(fd: int, written: bytes, at: int) -> int:
            if len(written) == GOT.size:  # the first note of what is there
                monkeypatch.setattr(os, "pwrite", pwrite)
                partial.write(0, data)
            return pwrite(fd, written, at)

        monkeypatch.setattr(os, "pwrite", overtaken)
        partial.write(0, data[:50])
        with partial.grown:
            assert (partial.frontier(), partial.bytes) == (100, 100)
