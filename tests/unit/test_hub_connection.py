"""Which addresses of a host are connected to, in which order, and for how long."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from worker.hub.client import Access, Hub
from worker.hub.connection import CONNECT_S, Unreachable

SIX = ["2001:db8::1", "2001:db8::2", "2001:db8::3"]
FOUR = ["192.0.2.1", "192.0.2.2"]


class Network:
    """Addresses that do not answer, or refuse, and a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tried: list[str] = []
        self.refusing: set[str] = set()

    def connect(self, address: tuple[str, int], timeout: float) -> None:
        self.tried.append(address[0])
        if address[0] in self.refusing:
            raise ConnectionRefusedError("refused")
        self.now += timeout
        raise TimeoutError("timed out")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(time, "monotonic", lambda: network.now)
    monkeypatch.setattr(socket, "create_connection", network.connect)
    found = [(0, 1, 6, "", (address, 80)) for address in (*SIX, *FOUR)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    return network


@pytest.fixture
def ask(network: Network) -> Callable[[], None]:
    hub = Hub(Access(endpoint="http://hub.example"))

    def ask() -> None:
        with pytest.raises(Unreachable, match=r"'hub\.example' cannot be reached"):
            hub.repository("org/name", "main")

    return ask


def test_all_addresses_share_the_time(network: Network, ask: Callable[[], None]) -> None:
    """Each of them would otherwise have all of it, and a host may have many."""
    ask()
    assert network.tried == [SIX[0], FOUR[0], SIX[1], FOUR[1], SIX[2]]
    assert network.now == pytest.approx(CONNECT_S)


def test_an_address_that_refuses_leaves_its_time_to_others(network: Network, ask: Callable[[], None]) -> None:
    network.refusing = {*SIX, *FOUR[1:]}
    ask()
    assert network.now == pytest.approx(CONNECT_S / 4)  # that of the second of five
