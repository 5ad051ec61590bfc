"""A pool whose Redis fails: restarted, hanging, with cut connections, emptied, or on a full disk.

Loaded instances stay loaded, accepted loads have one outcome, and requests during the outage get 503 with Retry-After.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.exceptions import ResponseError

from shared import paths
from shared.instance import Instance
from shared.lifecycle import State
from shared.synthetic import models as synthetic
from tests.support.chat import answered, ask
from tests.support.responses import read, respond, responded, responding
from tests.support.service import (
    JSON,
    LOAD,
    STATUS,
    TINY,
    Client,
    Process,
    RedisServer,
    Reply,
    Running,
    all_stopped,
    below,
    error,
    is_alive,
    meanwhile,
    openai_error,
    state,
    until,
    wait_gone,
)

LEASE_S = 5.0  # cut connections make a busy machine miss three beats in a row
HANG_S = 6.0  # longer than the lease; the soak tests take 30
GONE_S = LEASE_S + 0.5
CUT_S = 4.0
DROPPED_S = 2.0
FULL_S = LEASE_S + 2.0
ANSWER_S = 60.0  # of an API; it ends a hang
BACK_S = 60.0  # generous limit for the recovery

LIST = "/api/v1/models"
SECOND, THIRD = f"{TINY}:2", f"{TINY}:3"
OTHER = "acme/other"
UNDER_WAY = ("queued", "loading")


class FragileRedis(RedisServer):
    """A Redis with a method for each kind of failure, which lasts until the end of a block."""

    def start(self) -> None:
        """Start with SIGXFSZ blocked, which children inherit: a file that may not grow does not end the process."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXFSZ})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Kill Redis; restart it after the block on the same append-only file."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Replace Redis by a server that drops each connection, as a proxy without a backend does."""
        with self.gone(), socket.socket(socket.AF_UNIX) as front:
            self.socket.unlink()
            front.bind(str(self.socket))
            front.listen()

            def drop() -> None:
                with suppress(OSError):  # the socket is shut down
                    while True:
                        front.accept()[0].close()

            with meanwhile(drop):
                try:
                    yield
                finally:
                    front.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Stop Redis: connections stay open, and no request is answered."""
        os.kill(self.popen.pid, signal.SIGSTOP)
        try:
            until(lambda: all_stopped(self.popen.pid), "every thread of Redis stopped")
            yield
        finally:
            os.kill(self.popen.pid, signal.SIGCONT)

    @contextmanager
    def cut_off(self, every_s: float) -> Iterator[None]:
        """Cut all connections every so many seconds."""
        over = threading.Event()

        def cut() -> None:
            with self.client() as redis:
                while not over.wait(every_s):
                    for kind in ("normal", "pubsub"):
                        redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")  # type: ignore[no-untyped-call]

        with meanwhile(cut) as cutting:
            try:
                yield
            finally:
                over.set()
            cutting.result()

    @contextmanager
    def full(self) -> Iterator[None]:
        """Keep the append-only file from growing: Redis answers reads and refuses all else with MISCONF.

        A full disk has the same effect; a resource limit needs no separate file system.
        """
        soft, hard = resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE, (1, hard))
        try:
            until(self._refuses_writes, "Redis refuses writes")
            yield
        finally:
            resource.prlimit(self.popen.pid, resource.RLIMIT_FSIZE, (soft, hard))

    def _refuses_writes(self) -> bool:
        try:
            with self.client() as redis:
                redis.set("filler", "", px=1)  # Redis notices the limit when it writes
                redis.ping()
        except ResponseError as e:
            return "MISCONF" in str(e)
        return False

    def empty(self) -> None:
        with self.client() as redis:
            redis.flushall()


class Api(Running, Client):
    """`loadstone api`."""

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        Running.__init__(self, directory, "api", "--port", "0", "--drain-s", "0", environ=environ)
        try:
            Client.__init__(self, self.first_line().removeprefix("listening: "))
        except BaseException:
            self.kill()
            raise

    def is_ready(self) -> bool:
        return self.send("GET", "/readyz").status == 200 and self.models().keys() >= {TINY, OTHER}


class Pool:
    """Two APIs and a worker on an external Redis."""

    def __init__(self, home: Path) -> None:
        self.redis = FragileRedis(home / "redis")
        self.environ = {"LOADSTONE_REDIS_URL": self.redis.url, "LOADSTONE_LEASE_S": f"{LEASE_S:g}"}
        for model in (TINY, OTHER):
            synthetic.tiny_llama(home / f"models/{model}/model-f16.gguf")
        self.worker = self.start_worker(home)
        self.apis = [Api(home / name, self.environ) for name in ("first", "second")]

    def start_worker(self, home: Path, *words: str, **variables: str) -> Running:
        flags = ("--models-dir", str(home / "models"), "--data-dir", str(home / "data"), *words)
        return Running(home / "worker", "worker", *flags, environ={**self.environ, **variables})

    # ---- requests to either API

    def wait_ready(self) -> None:
        until(lambda: all(api.is_ready() for api in self.apis), "both APIs are ready", BACK_S)

    def wait_listed(self, *ids: str, within_s: float = BACK_S) -> None:
        """Wait until both APIs list exactly these instances."""
        until(lambda: all(set(api.instances()) == set(ids) for api in self.apis), f"{ids} are listed", within_s)

    def retry(self, send: Callable[[Client], Reply]) -> Reply:
        """Send a request to the APIs in turn until the reply is not 503; return it."""
        turns = itertools.cycle(self.apis)

        def answer() -> Reply | None:
            reply = send(next(turns))
            return reply if reply.status != 503 else None

        return until(answer, "a reply other than 503", BACK_S)

    def ended(self, job_id: str) -> Any:
        """Wait for the end of a job; return it."""

        def over() -> Any:
            job = self.retry(lambda api: api.send("GET", f"{STATUS}/{job_id}")).json()
            return job if job["status"] not in UNDER_WAY else None

        return until(over, f"{job_id} is over", BACK_S)

    def all_jobs(self) -> list[Any]:
        """Return all jobs, newest first."""
        jobs: list[Any] = self.apis[0].send("GET", STATUS, params={"limit": 1000}).json()["jobs"]
        return jobs

    def jobs(self) -> dict[str, Any]:
        """Return the newest job of each instance id."""
        return {job["instance_id"]: job for job in reversed(self.all_jobs())}

    # ---- records and processes

    def state(self, instance_id: str) -> str | None:
        with self.redis.client() as redis:
            return state(redis, instance_id)

    def wait_state(self, instance_id: str, expected: State) -> None:
        until(lambda: self.state(instance_id) == expected, f"{instance_id} is {expected}")

    def revisions(self, job_id: str) -> list[Instance]:
        """Return every revision of a load's record."""
        with self.redis.client() as redis:
            entries: Any = redis.xrange(f"inst:{job_id}:log")
        return [msgspec.msgpack.decode(fields[b"doc"], type=Instance) for _, fields in entries]

    def check_ran_once(self, job_id: str) -> None:
        """Check that a load was claimed once, by one process, and never requeued."""
        revisions = self.revisions(job_id)
        assert {revision.attempt for revision in revisions} == {1}
        steps = [after.state for before, after in pairwise(revisions) if before.state is not after.state]
        assert steps[:2] == [State.LOADING, State.LOADED], steps
        assert steps.count(State.LOADING) == 1, steps
        assert len({revision.epoch for revision in revisions[1:]}) == 1

    def holders(self, loaded: int) -> list[Process]:
        """Return the runners that hold `loaded` instances, without the warm one."""
        warm = self.worker.warm_runner(loaded)
        return [runner for runner in self.worker.runners() if runner != warm]

    def others(self) -> set[Process]:
        """Return all processes but the runners and their helpers."""
        tree = {process for running in (self.worker, *self.apis) for process in running.tree()}
        return tree.difference(*([runner, *below(runner.pid)] for runner in self.worker.runners()))


@pytest.fixture(scope="module")
def the_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("pool"))
    running = (pool.worker, *pool.apis)
    try:
        pool.wait_ready()
        yield pool
        for command in running:
            command.stop()
            assert "[error" not in command.stderr
    finally:
        for api in pool.apis:
            api.close()
        for command in running:
            command.kill()
        pool.redis.kill()


@pytest.fixture
def pool(the_pool: Pool) -> Iterator[Pool]:
    """Return the pool; check after the test that it has recovered in the same processes, and unload everything."""
    before = the_pool.others()
    yield the_pool
    the_pool.wait_ready()
    until(lambda: not any(job["status"] in UNDER_WAY for job in the_pool.all_jobs()), "no load is queued or loading")
    the_pool.apis[0].unload_all()
    assert the_pool.holders(0) == []
    assert the_pool.others() == before


def unavailable(reply: Reply) -> None:
    error(reply, 503, "service_unavailable", "queue_unavailable")
    assert int(reply.headers["retry-after"]) > 0


def not_ready(reply: Reply) -> None:
    assert (reply.status, reply.text) == (503, "Redis does not answer\n")
    assert int(reply.headers["retry-after"]) > 0


def load_with_key(model: str, key: str, api: Client) -> Reply:
    return api.send("POST", LOAD, content=json.dumps({"model": model}), headers={**JSON, "Idempotency-Key": key})


def instances(listed: Reply) -> list[str]:
    """Return the instance ids in a model list."""
    return [instance["id"] for model in listed.json()["models"] for instance in model["loaded_instances"]]


def not_loading(reply: Reply) -> None:
    openai_error(reply, 503, "unavailable_error", "queue_unavailable")


# ---- requests to models


@pytest.mark.parametrize("failure", ["gone", "hanging"])
def test_a_loaded_model_answers_without_redis(pool: Pool, failure: str) -> None:
    pool.apis[0].loaded(TINY)
    for api in pool.apis:
        assert answered(api, model=TINY, max_tokens=1)["model"] == TINY
    with pool.redis.gone() if failure == "gone" else pool.redis.hanging():
        for api in pool.apis:
            for name in (TINY, TINY.upper(), None):
                assert answered(api, model=name, max_tokens=4)["model"] == TINY
        not_loading(ask(pool.apis[0], model=OTHER))
        unavailable(pool.apis[1].send("GET", LIST))


@pytest.mark.parametrize("failure", ["gone", "hanging"])
def test_a_response_that_cannot_be_stored_comes_and_says_so(pool: Pool, failure: str) -> None:
    api = pool.apis[0]
    api.loaded(TINY)
    fields: dict[str, Any] = {"model": TINY, "max_output_tokens": 2}
    first = responded(api, **fields)
    assert first["store"]
    with pool.redis.gone() if failure == "gone" else pool.redis.hanging():
        found = responded(api, **fields)
        assert (found["status"], found["store"]) == ("incomplete", False)
        with responding(api, **fields) as received:
            assert not read(received)["store"]
        not_loading(respond(api, **fields, previous_response_id=first["id"]))
        not_loading(api.send("GET", paths.RESPONSE.format(response_id=first["id"])))


def test_a_loaded_model_answers_while_redis_is_back_empty(pool: Pool) -> None:
    pool.apis[0].loaded(TINY)
    for api in pool.apis:
        assert answered(api, model=TINY, max_tokens=1)["model"] == TINY
    pool.redis.empty()
    for api in pool.apis * 3:
        assert answered(api, model=TINY, max_tokens=1)["model"] == TINY
    pool.wait_listed(TINY)


# ---- restarted


def test_without_redis_each_api_is_alive_but_not_ready(pool: Pool) -> None:
    with pool.redis.gone():
        for api in pool.apis:
            assert api.send("GET", "/healthz").status == 200
            not_ready(api.send("GET", "/readyz"))
            assert api.send("GET", "/healthz").status == 200
    until(
        lambda: all(api.send("GET", "/readyz").text == "ready\n" for api in pool.apis),
        "both APIs are ready again",
        BACK_S,
    )
    assert all(api.send("GET", "/healthz").status == 200 for api in pool.apis)


def test_a_redis_restart_loses_no_instance_and_no_accepted_load(pool: Pool) -> None:
    first, second = pool.apis
    first.loaded(TINY)
    kept = pool.jobs()[TINY]["job_id"]
    before, holders = pool.revisions(kept), pool.holders(1)
    with pool.worker.frozen(1) as runner:
        loading = first.accepted(TINY)["job_id"]
        pool.wait_state(SECOND, State.LOADING)
        queued = second.accepted(TINY)["job_id"]
        with pool.redis.gone():
            began = time.monotonic()
            n_logged = len(pool.worker.stderr)
            os.kill(runner.pid, signal.SIGCONT)
            until(
                lambda: "commit deferred" in pool.worker.stderr[n_logged:],
                "the worker has loaded the model and cannot commit it",
            )
            until(lambda: time.monotonic() - began > GONE_S, "the lease has run out", GONE_S + 1)
    for job_id in (loading, queued):
        assert pool.ended(job_id)["status"] == "loaded"
        pool.check_ran_once(job_id)
    pool.wait_listed(TINY, SECOND, THIRD)
    assert pool.holders(3)[:2] == [*holders, runner]
    assert pool.revisions(kept) == before


def test_connections_dropped_at_once_end_no_process(pool: Pool) -> None:
    first, second = pool.apis
    first.loaded(TINY)
    holders, processes = pool.holders(1), pool.others()
    with pool.redis.dropping():
        began = time.monotonic()

        def outage_is_reported() -> bool:
            with ThreadPoolExecutor(16) as threads:  # more requests than pooled connections
                listed = [threads.submit(api.send, "GET", LIST) for api in pool.apis for _ in range(8)]
            for reply in listed:
                unavailable(reply.result())
            for api in pool.apis:
                unavailable(api.load(TINY))
                not_ready(api.send("GET", "/readyz"))
                assert api.send("GET", "/healthz").status == 200
            return time.monotonic() - began > DROPPED_S

        until(outage_is_reported, "the APIs report the outage for a while", DROPPED_S + ANSWER_S)
    pool.wait_ready()
    pool.wait_listed(TINY)
    assert second.loaded(TINY)["instance_id"] == SECOND
    assert pool.holders(2)[0] == holders[0]
    assert pool.others() == processes


# ---- hanging


def test_a_redis_hanging_past_the_lease_is_reported_and_harmless(pool: Pool) -> None:
    first, second = pool.apis
    first.loaded(TINY)
    kept = pool.jobs()[TINY]["job_id"]
    before, holders = pool.revisions(kept), pool.holders(1)
    with pool.worker.frozen(1) as runner, meanwhile(second.load, TINY) as waiter:
        pool.wait_state(SECOND, State.LOADING)
        loading = pool.jobs()[SECOND]["job_id"]
        queued = first.accepted(TINY)["job_id"]
        with pool.redis.hanging():
            began = time.monotonic()
            os.kill(runner.pid, signal.SIGCONT)  # the load completes while Redis hangs
            replies = replies_while_hanging(pool, kept)
            until(lambda: time.monotonic() - began > HANG_S, "the lease has run out", HANG_S + 1)
        for reply in replies:  # they came while it hung
            unavailable(reply)
        reply = waiter.result(BACK_S)
    if reply.status == 200:
        assert reply.json()["instance_id"] == SECOND
    else:
        unavailable(reply)
    for job_id in (loading, queued):
        assert pool.ended(job_id)["status"] == "loaded"
        pool.check_ran_once(job_id)
    pool.wait_ready()
    for key in ("hang-0", "hang-1"):  # a retry starts a load or joins the first one
        assert pool.retry(partial(load_with_key, TINY, key)).status == 200
    pool.wait_listed(TINY, SECOND, THIRD, f"{TINY}:4", f"{TINY}:5")
    assert pool.holders(5)[:2] == [*holders, runner]
    assert pool.revisions(kept) == before
    assert first.job(kept)["status"] == "loaded"


def replies_while_hanging(pool: Pool, job_id: str) -> list[Reply]:
    """Send requests that need Redis to each API at once; return the replies. /healthz must still answer."""
    pending: list[Future[Reply]] = []
    readiness: list[Future[Reply]] = []
    with ThreadPoolExecutor(8) as threads:
        for number, api in enumerate(pool.apis):
            for ask in (
                partial(api.send, "GET", LIST),
                partial(api.send, "GET", f"{STATUS}/{job_id}"),
                partial(load_with_key, TINY, f"hang-{number}", api),
            ):
                pending.append(threads.submit(ask))
            readiness.append(threads.submit(api.send, "GET", "/readyz"))
            assert api.send("GET", "/healthz").status == 200
    for ready in readiness:
        not_ready(ready.result())
    return [reply.result() for reply in pending]


# ---- cut connections


@pytest.mark.parametrize("every_s", [0.03, 0.001])
def test_connections_cut_repeatedly_lose_and_repeat_no_load(pool: Pool, every_s: float) -> None:
    before = {job["job_id"] for job in pool.all_jobs()}
    processes = pool.others()
    with ThreadPoolExecutor(2) as threads:
        with pool.redis.cut_off(every_s):
            over = time.monotonic() + CUT_S
            clients = [threads.submit(load_and_unload, pool, model, f"{every_s}", over) for model in (TINY, OTHER)]
            until(lambda: time.monotonic() > over, "the connections were cut for long enough", CUT_S + 1)
        ids = [instance_id for client in clients for instance_id in client.result()]
    pool.wait_ready()
    pool.wait_listed(TINY, OTHER)
    new = [job for job in pool.all_jobs() if job["job_id"] not in before]
    assert sorted(job["instance_id"] for job in new) == sorted(ids)
    assert {job["status"] for job in new} == {"loaded"}
    for job in new:
        pool.check_ran_once(job["job_id"])
    assert len(pool.holders(2)) == 2
    assert pool.others() == processes


def load_and_unload(pool: Pool, model: str, name: str, over: float) -> list[str]:
    """Load and unload until the time `over`, each load with its own key, and keep the last; return the instance ids."""
    ids: list[str] = []
    while True:
        reply = pool.retry(partial(load_with_key, model, f"{model}-{name}-{len(ids)}"))
        assert reply.status == 200, reply.text
        ids.append(reply.json()["instance_id"])
        if time.monotonic() > over:
            return ids
        reply = pool.retry(lambda api: api.unload(ids[-1]))
        # 404: the reply to an unload was lost, and the unload was repeated.
        assert reply.status in (200, 404), reply.text


# ---- emptied


def test_an_emptied_redis_regains_instances_but_no_pending_load(pool: Pool) -> None:
    first, second = pool.apis
    first.loaded(TINY)
    kept = pool.jobs()[TINY]["job_id"]
    holders = pool.holders(1)
    with pool.worker.frozen(1) as runner, meanwhile(second.load, TINY) as waiter:
        pool.wait_state(SECOND, State.LOADING)
        under_way = pool.jobs()[SECOND]["job_id"]
        pool.redis.empty()
        unavailable(waiter.result(60))
        for api in pool.apis:
            error(api.send("GET", f"{STATUS}/{under_way}"), 404, "job_not_found", param="job_id")
        pool.wait_listed(TINY, within_s=5)
        wait_gone([runner])
    assert first.job(kept)["status"] == "loaded"
    assert pool.holders(1) == holders
    assert second.loaded(TINY)["instance_id"] == SECOND
    assert first.unload(TINY).status == 200
    assert not is_alive(holders[0])
    pool.wait_listed(SECOND)


def test_loads_just_after_a_flush_take_no_id_in_use(pool: Pool) -> None:
    pool.apis[0].loaded(TINY)
    holders = pool.holders(1)
    names = [f"{TINY}:{number}" for number in range(2, 6)]
    with ThreadPoolExecutor(4) as threads:
        pool.redis.empty()
        loads = [threads.submit(pool.retry, partial(load_with_key, TINY, f"early-{name}")) for name in names]
    replies = [load.result() for load in loads]
    assert [reply.status for reply in replies] == [200] * 4, [reply.text for reply in replies]
    assert sorted(reply.json()["instance_id"] for reply in replies) == names
    pool.wait_listed(TINY, *names)
    assert pool.holders(5)[0] == holders[0]


def test_without_restore_an_emptied_redis_ends_the_instances(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.apis
    other = "acme/elsewhere"
    synthetic.tiny_llama(tmp_path / f"models/{other}/model-f16.gguf")
    worker = pool.start_worker(tmp_path, "--worker-name", "forgetful", LOADSTONE_RESTORE="off")
    try:
        until(lambda: all(other in api.models() for api in pool.apis), "the model of the worker is listed", BACK_S)
        first.loaded(other)
        warm = worker.warm_runner(1)
        (holder,) = [runner for runner in worker.runners() if runner != warm]
        pool.redis.empty()
        wait_gone([holder])
        pool.wait_ready()
        until(lambda: other in first.models(), "the model is listed again", BACK_S)
        pool.wait_listed()
        assert second.loaded(other)["instance_id"] == other
        assert first.loaded(TINY)["instance_id"] == TINY
        pool.wait_listed(other, TINY)
        assert first.unload(other).status == 200
        worker.stop()
    finally:
        worker.kill()


# ---- on a full disk


def test_a_full_redis_disk_is_reported_and_the_pool_recovers(pool: Pool) -> None:
    first, _ = pool.apis
    first.loaded(TINY)
    kept = pool.jobs()[TINY]["job_id"]
    before, holders = pool.revisions(kept), pool.holders(1)
    with pool.redis.full():
        began = time.monotonic()

        def outage_is_reported() -> bool:
            for api in pool.apis:
                unavailable(api.load(TINY))
                unavailable(api.unload(TINY))
                listed = api.send("GET", LIST)
                if listed.status == 200:
                    assert set(instances(listed)) == {TINY}
                else:
                    unavailable(listed)
                not_ready(api.send("GET", "/readyz"))  # not ready: it cannot accept loads
                assert api.send("GET", "/healthz").status == 200
            return time.monotonic() - began > FULL_S

        until(outage_is_reported, "the outage has lasted longer than the leases", FULL_S + ANSWER_S)
    pool.wait_ready()
    pool.wait_listed(TINY)
    assert pool.holders(1) == holders
    assert pool.revisions(kept) == before
    assert first.loaded(TINY)["instance_id"] == SECOND
    assert pool.holders(2)[0] == holders[0]
