"""A pool over several hosts, which know each other from Redis alone, with a password over TLS.

For loads, workers and APIs need only a connection to Redis; for answers, a worker listens on a port, if it can.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import DONE, answered, ask, events
from tests.support.fakehosts import Device, FakeHost
from tests.support.hosts import ClientOn, GuardedRedis, Host, Network, TlsProxy, certificate, network, open_ports
from tests.support.service import Running, check_keys, error, meanwhile, openai_error, until

LEASE_S = 10.0  # the default
START_S = 60.0
PASSWORD, TOKEN = "the-pools-password", "the-clients-token"
MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {  # by the host of the worker that has it
    "alpha": ("acme/llama", synthetic.tiny_llama),
    "beta": ("acme/moe", synthetic.tiny_moe),
    "gamma": ("acme/other", synthetic.tiny_llama),
}
NOWHERE = "192.0.2.1"  # an address for documentation, RFC 5737: as that of a worker behind NAT
VARIABLES: dict[str, dict[str, str]] = {  # of each worker; the first one gets no name, the second one no port
    "alpha": {"LOADSTONE_WORKER_LISTEN": "0.0.0.0:0"},
    "beta": {"LOADSTONE_WORKER_NAME": "second"},
    "gamma": {
        "LOADSTONE_WORKER_NAME": "third",
        "LOADSTONE_WORKER_LISTEN": "0.0.0.0:0",
        "LOADSTONE_WORKER_ADVERTISE": NOWHERE,
    },
}
GPUS = {"alpha": 2, "beta": 1, "gamma": 0}


class Pool:
    """A Redis, two APIs and three workers, each on its own host."""

    def __init__(self, home: Path, hosts: Network, closing: ExitStack) -> None:
        self.home, self.hosts, self._closing = home, hosts, closing
        ours, strangers, of_another = (certificate(home, name) for name in (hosts.server, hosts.server, "other.test"))
        trusted = home / "trusted"
        trusted.write_text(ours.read_text() + of_another.read_text())
        self.redis_host = hosts.host("redis", 1)
        self.redis = GuardedRedis(home / "redis")
        closing.callback(self.redis.kill)
        self.redis.guard(PASSWORD)
        doors = (ours, strangers, of_another)
        self.proxy = TlsProxy(self.redis_host, hosts.server_address, self.redis.socket, *doors)
        closing.callback(self.proxy.kill)
        self.environ = {"SSL_CERT_FILE": str(trusted), "LOADSTONE_REDIS_URL": self.url()}
        self.worker_hosts = {name: hosts.host(name, 21 + n) for n, name in enumerate(MODELS)}
        self.names = {
            on: VARIABLES[on].get("LOADSTONE_WORKER_NAME", host.name) for on, host in self.worker_hosts.items()
        }
        for on, (key, write) in MODELS.items():
            write(self.models_dir(on) / key / "model-f16.gguf")
        self.gpus = {on: FakeHost.made(home / on / "gpus") for on in MODELS}
        for on, gpus in self.gpus.items():
            gpus.has(*(Device(f"GPU-{on}-{n}", "Fake GPU", 1 << 30) for n in range(GPUS[on])))
        self.workers = {on: self.worker(on) for on in MODELS}
        self.api_hosts = [hosts.host(f"api-{n}", 10 + n) for n in (1, 2)]
        self.apis = [self.api(f"api-{n}", host) for n, host in enumerate(self.api_hosts)]
        self.clients = [self.client(host, api) for host, api in zip(self.api_hosts, self.apis, strict=True)]
        for on in MODELS:
            self.wait_ready(on)

    def url(self, door: int = 0, password: str = PASSWORD) -> str:
        return f"rediss://:{password}@{self.hosts.server}:{self.proxy.ports[door]}/0"

    def models_dir(self, on: str) -> Path:
        return self.home / on / "models"

    def running(self, host: Host, home: str, *words: str, **variables: str) -> Running:
        started = host.do(Running, self.home / home, *words, environ={**self.environ, **variables})
        self._closing.callback(started.kill)
        return started

    def worker(self, on: str, *, home: str = "", **variables: str) -> Running:
        """Start a worker without waiting; with `home` it runs beside the worker of that host."""
        directories = ("--models-dir", str(self.models_dir(on)), "--data-dir", str(self.home / (home or on) / "data"))
        its = {**VARIABLES[on], **self.gpus[on].environ(), **variables}
        return self.running(self.worker_hosts[on], home or on, "worker", *directories, **its)

    def api(self, home: str, host: Host, **variables: str) -> Running:
        settings = {"LOADSTONE_API_TOKENS": TOKEN, "LOADSTONE_DRAIN_S": "0", **variables}
        return self.running(host, home, "api", "--host", host.address, "--port", "0", **settings)

    def client(self, host: Host, api: Running) -> ClientOn:
        client = ClientOn(host, api.first_line().removeprefix("listening: "), TOKEN)
        self._closing.callback(client.close)
        return client

    def wait_ready(self, on: str) -> None:
        worker = self.workers[on]
        until(
            lambda: "action=ready" in worker.stderr or worker.popen.poll() is not None, "the worker is ready", START_S
        )
        assert worker.popen.poll() is None, worker.stderr
        until(lambda: all(self.names[on] in listed(client) for client in self.clients), "both APIs list the worker")

    def is_whole(self) -> bool:
        """Return whether each API lists every worker and every model."""
        keys = {key for key, _ in MODELS.values()}
        return all(listed(one) == {*self.names.values()} and set(one.models()) == keys for one in self.clients)

    def end(self) -> None:
        for running in (*self.workers.values(), *self.apis):
            running.stop()


def listed(client: ClientOn) -> set[str]:
    """Return the names of the live workers."""
    reply = client.send("GET", "/api/v1/workers")
    assert reply.status == 200, reply.text
    return {worker["name"] for worker in reply.json()["workers"]}


def is_answered(client: ClientOn, key: str) -> bool:
    return ask(client, model=key, max_tokens=2).status == 200


def skip_unless_apart(pool: Pool) -> None:
    if not pool.worker_hosts["alpha"].is_apart:
        pytest.skip("hosts with their own boot id need root, namespaces and `ip`")


@pytest.fixture(scope="module")
def the_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    home = tmp_path_factory.mktemp("hosts")
    with network(home) as hosts, ExitStack() as closing:
        pool = Pool(home, hosts, closing)
        yield pool
        with pool.redis.client() as redis:
            check_keys(redis)
        pool.end()


@pytest.fixture
def pool(the_pool: Pool) -> Iterator[Pool]:
    """Return the pool once each API lists every worker; unload everything after the test."""
    until(the_pool.is_whole, "each API lists every worker")
    yield the_pool
    the_pool.clients[0].unload_all()


def test_each_api_lists_all_models_and_loads_go_to_their_worker(pool: Pool) -> None:
    first, second = pool.clients
    for on, (key, _) in MODELS.items():
        job = first.accepted(key)
        done = second.job(job["job_id"], wait_s=10)
        assert (done["status"], done["worker"], done["instance_id"]) == ("loaded", pool.names[on], key)
    placed = {key: pool.names[on] for on, (key, _) in MODELS.items()}
    for client in pool.clients:
        assert {id_: one["worker"] for id_, one in client.instances().items()} == placed


def test_each_worker_owns_and_uses_the_devices_of_its_host(pool: Pool) -> None:
    one, other = pool.clients
    workers = {worker["name"]: worker for worker in one.send("GET", "/api/v1/workers").json()["workers"]}
    for on, name in pool.names.items():
        ids = [device["id"] for device in workers[name]["devices"]]
        assert ids == [*(f"GPU-{on}-{n}" for n in range(GPUS[on])), "CPU"]
    for on, (key, _) in MODELS.items():
        instance_id = other.loaded(key)["instance_id"]
        device = one.instances()[instance_id]["devices"][0]
        assert device in ([f"GPU-{on}-{n}" for n in range(GPUS[on])] or ["CPU"])
        assert [gpus.used_bytes(device) > 0 for gpus in pool.gpus.values() if (gpus.directory / device).exists()] == [
            True
        ] * (device != "CPU")
        assert one.unload(instance_id).status == 200
        assert not any(gpus.used_bytes(d.uuid) for gpus in pool.gpus.values() for d in gpus.devices())


def test_an_unnamed_worker_takes_the_name_of_its_host(pool: Pool) -> None:
    host = pool.worker_hosts["alpha"]
    assert pool.names["alpha"] == host.do(socket.gethostname)
    assert pool.names["alpha"] in listed(pool.clients[0])
    assert host.is_apart is (pool.names["alpha"] == "alpha")


def test_a_worker_listens_only_on_the_port_that_it_is_given(pool: Pool) -> None:
    for on in ("alpha", "beta"):
        pool.clients[0].loaded(MODELS[on][0])
    assert open_ports(pool.apis[0].tree()), "an API listens"
    assert open_ports(pool.workers["beta"].tree()) == set()
    ports = open_ports(pool.workers["alpha"].tree())
    assert len({port.split()[1] for port in ports}) == 1
    assert all("worker" in port for port in ports), "a runner has no port"


def test_answers_stream_from_a_worker_of_another_host(pool: Pool) -> None:
    key, _ = MODELS["alpha"]
    pool.clients[0].loaded(key)
    whole = answered(pool.clients[0], model=key, max_tokens=20)
    reply = ask(pool.clients[0], model=key, max_tokens=20, stream=True)
    assert reply.status == 200, reply.text
    *parts, done = events(iter(reply.text.splitlines()))
    assert done == DONE
    deltas = [json.loads(part)["choices"][0]["delta"].get("content", "") for part in parts]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]
    assert len(deltas) > 2


@pytest.mark.parametrize("on", ["beta", "gamma"])
def test_a_worker_out_of_reach_loads_and_says_what_is_missing(pool: Pool, on: str) -> None:
    skip_unless_apart(pool)
    key, _ = MODELS[on]
    client = pool.clients[0]
    instance_id = client.loaded(key)["instance_id"]
    assert client.instances()[instance_id]["worker"] == pool.names[on]
    what = {
        "beta": r"is on another host.*set LOADSTONE_WORKER_LISTEN",
        "gamma": rf"cannot be reached at {NOWHERE} port \d+: .*LOADSTONE_WORKER_ADVERTISE",
    }[on]
    message = openai_error(ask(client, model=key), 503, "unavailable_error", "no_route")
    assert re.search(f"Worker '{pool.names[on]}' {what}", message)
    assert client.unload(instance_id).status == 200
    assert client.instances() == {}


def test_a_worker_with_a_new_address_keeps_lease_and_instances(pool: Pool) -> None:
    key, _ = MODELS["beta"]
    host, worker, client = pool.worker_hosts["beta"], pool.workers["beta"], pool.clients[0]
    client.loaded(key)
    before, process, (holder, *_) = client.instances(), worker.worker(), worker.runners()
    worker.warm_runner(1)
    if host.is_apart:
        assert host.address in pool.proxy.peers()
        pool.hosts.move(host, 122)  # without a notice: its open connections hang
    else:
        pool.proxy.cut()
    job = client.accepted(key)
    done = client.job(job["job_id"], wait_s=15)
    assert (done["status"], done["worker"], done["instance_id"]) == ("loaded", "second", f"{key}:2")
    assert not host.is_apart or host.address in pool.proxy.peers()
    assert client.unload(f"{key}:2").status == 200
    assert client.instances() == before
    assert (worker.worker(), worker.runners()[0]) == (process, holder), "the processes were not restarted"


def test_answers_come_from_the_new_address_of_a_worker(pool: Pool) -> None:
    """A channel to the old one, which nobody closes, ends within about 10 s; a request on it does, too."""
    skip_unless_apart(pool)
    key, _ = MODELS["alpha"]
    pool.clients[0].loaded(key)
    assert is_answered(pool.clients[0], key)
    pool.hosts.move(pool.worker_hosts["alpha"], 121)
    with meanwhile(until, partial(is_answered, pool.clients[0], key), "the channel is replaced") as replaced:
        until(partial(is_answered, pool.clients[1], key), "the new address is published")
        replaced.result()


def test_a_renamed_worker_replaces_the_old_one(pool: Pool) -> None:
    """The new one's address is taken by a server in between, which has another certificate."""
    key, _ = MODELS["gamma"]
    first, second = pool.clients
    first.loaded(key)
    pool.workers["gamma"].stop()
    between = f"{pool.hosts.server_address}:{pool.proxy.ports[1]}"
    name = {"LOADSTONE_WORKER_NAME": "renamed"}
    pool.workers["gamma"] = pool.worker("gamma", LOADSTONE_WORKER_ADVERTISE=between, **name)
    pool.names["gamma"] = "renamed"
    until(pool.is_whole, "each API lists the new name and not the old one", LEASE_S)
    assert second.instances() == {}, "a renamed worker does not restore instances of the old name"
    assert second.loaded(key)["instance_id"] == key
    assert first.instances()[key]["worker"] == "renamed"
    if pool.worker_hosts["gamma"].is_apart:
        message = openai_error(ask(first, model=key), 503, "unavailable_error", "no_route")
        assert "another certificate" in message


@pytest.mark.parametrize(
    ("door", "password", "reason"),
    [
        (0, "another-password", "invalid username-password pair"),
        (1, PASSWORD, "certificate verify failed: self-signed certificate"),
        (2, PASSWORD, "certificate verify failed: Hostname mismatch"),
    ],
    ids=["password", "stranger", "name"],
)
def test_a_wrong_password_or_certificate_keeps_a_process_out(pool: Pool, door: int, password: str, reason: str) -> None:
    wrong, home = {"LOADSTONE_REDIS_URL": pool.url(door, password)}, f"wrong-{door}"
    worker = pool.worker("gamma", home=f"{home}/worker", LOADSTONE_WORKER_NAME="wrong", **wrong)
    api = pool.api(f"{home}/api", pool.api_hosts[0], **wrong)
    client = pool.client(pool.api_hosts[0], api)
    error(client.send("GET", "/api/v1/models"), 503, "service_unavailable", "queue_unavailable")
    until(lambda: reason in worker.stderr and reason in api.stderr, reason)
    for running in (worker, api):
        running.stop()
        assert password not in running.stderr
    assert "action=ready" not in worker.stderr
    assert pool.is_whole(), "no other worker is listed"
