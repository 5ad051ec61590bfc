"""Downloads of a worker: its records, its processes and the files, with a hub on this machine."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import redis

from shared.download import Download, InspectRequest, Offer, Plan, Refusal, Removed, State
from shared.schema.model import Model
from shared.store.store import Store
from tests.support.hub import LocalHub, sha256
from tests.support.waiting import until
from worker.catalog.catalog import Catalog
from worker.catalog.stores import writable
from worker.downloads import Downloads
from worker.hub import partials
from worker.hub.client import Access

REPOSITORY = "org/name-GGUF"
SHARDS = [f"q8/name-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
MIB = 1 << 20
DEADLINE_S = 120.0


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub().running() as hub:
        for i, shard in enumerate(SHARDS):
            file = tmp_path / f"source{i}"
            file.write_bytes(random.Random(i).randbytes(5 * MIB + i))
            hub.add(REPOSITORY, shard, file)
        yield hub


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    return root


def downloads_of(store: Store, hub: LocalHub, *roots: Path, name: str = "w", patience_s: float = 600.0) -> Downloads:
    access = Access(endpoint=hub.endpoint, hosts=(hub.cdn,), token=hub.token)
    return Downloads(name, roots, access, store.downloads, patience_s)


@asynccontextmanager
async def running(downloads: Downloads) -> AsyncIterator[Downloads]:
    task = asyncio.create_task(downloads.run())
    try:
        yield downloads
    finally:
        task.cancel()
        await asyncio.wait([task])


async def offered(downloads: Downloads, quantization: str | None = None) -> Offer:
    request = InspectRequest(repository=REPOSITORY, revision="main", quantization=quantization)
    offer = await downloads.inspect(request)
    assert isinstance(offer, Offer), offer
    return offer


async def created(store: Store, offer: Offer, id_: str = "job_1", name: str = "w") -> Download:
    return await store.downloads.create(
        Download(id=id_, model=REPOSITORY, worker=name, store=offer.store, plan=offer.plan, created_at=time.time())
    )


async def reached(store: Store, id_: str, state: State, since: State = State.DOWNLOADING) -> Download:
    found: list[Download] = []

    async def is_there() -> bool:
        download = await store.downloads.get(id_)
        assert download is not None
        if download.state not in (state, since, State.DOWNLOADING, State.PAUSED):
            pytest.fail(f"{download.state}: {download.error}")
        found.append(download)
        return download.state is state

    await eventually(is_there)
    return found[-1]


async def eventually(is_true: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not await is_true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def assert_complete(hub: LocalHub, root: Path) -> None:
    for shard in SHARDS:
        assert sha256(root / REPOSITORY / shard) == sha256(hub.repositories[REPOSITORY][shard])
    assert not [*(root / partials.FOLDER).iterdir()]


def children() -> list[int]:
    """Return the ids of the processes that talk to a hub for this process."""
    found = []
    for line in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"worker.hub.process" in Path(f"/proc/{line}/cmdline").read_bytes():
            found.append(int(line))
    return found


async def test_a_model_comes(store: Store, hub: LocalHub, root: Path) -> None:
    async with running(downloads_of(store, hub, root)) as downloads:
        offer = await offered(downloads)
        assert [file.path for file in offer.plan.files] == SHARDS
        assert (offer.plan.commit, offer.is_here) == (hub.commit, False)
        await created(store, offer)
        download = await reached(store, "job_1", State.COMPLETED)
        assert download.downloaded_bytes == offer.plan.total_bytes == 10 * MIB + 1
        assert_complete(hub, root)
        assert (await offered(downloads)).is_here


async def test_nothing_half_done_is_listed(store: Store, hub: LocalHub, root: Path, tmp_path: Path) -> None:
    hub.stalls = 1
    catalog = Catalog([root], tmp_path / "cache")
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        await until(lambda: hub.sent.total() > MIB, "some bytes", DEADLINE_S)
        catalog.look()
        assert catalog.models() == []
        assert not (root / REPOSITORY).exists()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
async def test_a_killed_process_resumes(store: Store, hub: LocalHub, root: Path, part: float) -> None:
    total = 10 * MIB + 1
    hub.bytes_s, hub.holds_at = 4 * MIB, round(part * total)
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        await until(lambda: hub.sent.total() >= round(part * total), "a part", DEADLINE_S)
        (child,) = children()
        os.kill(child, signal.SIGKILL)
        hub.bytes_s, hub.holds_at = 0, None
        await reached(store, "job_1", State.COMPLETED)
    assert_complete(hub, root)
    # What was on its way in the socket buffers of its connections counts as sent.
    assert hub.sent.total() <= total + 6 * MIB


async def test_a_new_worker_resumes(store: Store, hub: LocalHub, root: Path) -> None:
    hub.bytes_s, hub.holds_at = MIB, 3 * MIB
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        await until(lambda: hub.sent.total() >= 3 * MIB, "a part", DEADLINE_S)
    assert not children()
    hub.bytes_s, hub.holds_at = 0, None
    async with running(downloads_of(store, hub, root)):
        await reached(store, "job_1", State.COMPLETED)
    assert_complete(hub, root)


async def test_redis_loses_everything(store: Store, raw: redis.Redis, hub: LocalHub, root: Path) -> None:
    hub.bytes_s, hub.holds_at = MIB, 3 * MIB
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        await until(lambda: hub.sent.total() >= 3 * MIB, "a part", DEADLINE_S)
        raw.flushall()
    hub.bytes_s, hub.holds_at = 0, None
    assert await store.downloads.get("job_1") is None
    async with running(downloads_of(store, hub, root)):

        async def is_back() -> bool:
            return await store.downloads.get("job_1") is not None

        await eventually(is_back)
        await reached(store, "job_1", State.COMPLETED)
    assert_complete(hub, root)


async def test_pause_and_resume(store: Store, hub: LocalHub, root: Path) -> None:
    hub.bytes_s, hub.holds_at = MIB, 2 * MIB
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        await until(lambda: hub.sent.total() >= 2 * MIB, "a part", DEADLINE_S)
        await store.downloads.want("job_1", "pause")
        downloads.wake()
        await reached(store, "job_1", State.PAUSED)
        assert not children()
    async with running(downloads_of(store, hub, root)) as downloads:  # a restart does not resume it
        hub.bytes_s, hub.holds_at = 0, None
        await store.downloads.want("job_1", "run")
        downloads.wake()
        await reached(store, "job_1", State.COMPLETED)
    assert_complete(hub, root)


async def test_a_cancelled_download_leaves_nothing(store: Store, hub: LocalHub, root: Path) -> None:
    hub.bytes_s, hub.holds_at = MIB, 2 * MIB
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        await until(lambda: hub.sent.total() >= 2 * MIB, "a part", DEADLINE_S)
        await store.downloads.want("job_1", "cancel")
        downloads.wake()
        await reached(store, "job_1", State.CANCELLED)
    assert not [*(root / partials.FOLDER).iterdir()]
    assert not (root / REPOSITORY).exists()


async def test_a_failed_download_can_be_resumed(store: Store, hub: LocalHub, root: Path) -> None:
    hub.statuses = [(503, {})] * 1000
    async with running(downloads_of(store, hub, root, patience_s=0.2)) as downloads:
        await created(store, await offered(downloads))
        failed = await reached(store, "job_1", State.FAILED)
        assert failed.error is not None
        assert failed.error.code == "hub_unavailable"
        hub.statuses = []
        await store.downloads.want("job_1", "run")
        downloads.wake()
        await reached(store, "job_1", State.COMPLETED, since=State.FAILED)
    assert_complete(hub, root)


async def test_a_wrong_hash_fails(store: Store, hub: LocalHub, root: Path) -> None:
    hub.listed_hashes[SHARDS[1]] = "0" * 64
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        failed = await reached(store, "job_1", State.FAILED)
        assert failed.error is not None
        assert failed.error.code == "checksum_mismatch"
    assert not (root / REPOSITORY).exists()


async def test_main_moves(store: Store, hub: LocalHub, root: Path) -> None:
    """The commit is that of the beginning, whatever `main` is meanwhile."""
    hub.bytes_s, hub.holds_at = MIB, MIB
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        await until(lambda: hub.sent.total() >= MIB, "a part", DEADLINE_S)
        hub.commit, hub.bytes_s, hub.holds_at = "b" * 40, 0, None
        await reached(store, "job_1", State.COMPLETED)
    assert_complete(hub, root)
    assert not [path for _, path, _ in hub.requests if f"/resolve/{hub.commit}/" in path]


async def test_two_workers_share_a_directory(store: Store, hub: LocalHub, root: Path) -> None:
    hub.bytes_s = 4 * MIB
    async with (
        running(downloads_of(store, hub, root)) as first,
        running(downloads_of(store, hub, root, name="another")) as second,
    ):
        one, two = await offered(first), await offered(second)
        assert one == msgspec.structs.replace(two, free_bytes=one.free_bytes)
        await created(store, one)
        assert (await created(store, two, "job_2", "another")).id == "job_1"
        # Even if Redis does not know of the other download, the files are written by one process only.
        other = msgspec.structs.replace(
            (await created(store, one)), id="job_2", worker="another", created_at=time.time()
        )
        await store.downloads.commit(other)
        second.wake()
        await reached(store, "job_1", State.COMPLETED)
        await reached(store, "job_2", State.COMPLETED)
    assert_complete(hub, root)
    assert hub.sent.total() == 10 * MIB + 1


async def test_a_thousand_files(store: Store, hub: LocalHub, root: Path) -> None:
    small = next(iter(hub.repositories[REPOSITORY].values())).with_name("small")
    small.write_bytes(b"x")
    for i in range(1000):
        hub.add(REPOSITORY, f"other/file-{i}.txt", small)
    offer = await offered(downloads_of(store, hub, root), "q8_0")
    assert [file.path for file in offer.plan.files] == SHARDS


async def test_names_that_are_no_paths(store: Store, hub: LocalHub, root: Path) -> None:
    source = hub.repositories[REPOSITORY].pop(SHARDS[1])
    del hub.repositories[REPOSITORY][SHARDS[0]]
    hub.add(REPOSITORY, "../../evil-Q4_0.gguf", source)
    request = InspectRequest(repository=REPOSITORY, revision="main", quantization=None)
    refusal = await downloads_of(store, hub, root).inspect(request)
    assert isinstance(refusal, Refusal)
    assert "cannot be the path of a model file" in refusal.error.message


async def test_a_record_with_a_bad_path_writes_nothing(store: Store, hub: LocalHub, root: Path) -> None:
    """Whoever can write to Redis cannot have files written elsewhere."""
    async with running(downloads_of(store, hub, root)) as downloads:
        offer = await offered(downloads)
        file = msgspec.structs.replace(offer.plan.files[0], path="../../../evil.gguf")
        await created(store, msgspec.structs.replace(offer, plan=msgspec.structs.replace(offer.plan, files=[file])))
        failed = await reached(store, "job_1", State.FAILED)
        assert failed.error is not None
        assert failed.error.code == "invalid_hub_reply"


async def test_a_full_disk_is_refused_at_the_start(store: Store, hub: LocalHub, root: Path) -> None:
    hub.listed_sizes[SHARDS[0]] = 1 << 41
    request = InspectRequest(repository=REPOSITORY, revision="main", quantization=None)
    refusal = await downloads_of(store, hub, root).inspect(request)
    assert isinstance(refusal, Refusal)
    assert refusal.error.code == "insufficient_disk"
    detail = refusal.error.detail
    assert isinstance(detail, dict)
    assert detail["needed_bytes"] == (1 << 41) + 5 * MIB + 1


async def test_other_downloads_count_as_taken(hub: LocalHub, root: Path, store: Store) -> None:
    offer = await offered(downloads_of(store, hub, root))
    download = Download(id="job_1", model="m", worker="w", store=offer.store, plan=offer.plan)
    partials.write(root, download)
    other = Plan(repository="a/b", commit=hub.commit, files=[])
    assert partials.pending_bytes(root, other) == offer.plan.total_bytes
    assert partials.pending_bytes(root, offer.plan) == 0


async def test_what_failed_long_ago_is_removed(store: Store, hub: LocalHub, root: Path) -> None:
    offer = await offered(downloads_of(store, hub, root))
    download = Download(id="job_1", model="m", worker="w", store=offer.store, plan=offer.plan)
    for n, age_s in enumerate((0.0, 8 * 86400.0)):
        plan = msgspec.structs.replace(offer.plan, commit=str(n))
        failed = msgspec.structs.replace(download, plan=plan, state=State.FAILED, completed_at=time.time() - age_s)
        partials.write(root, failed)
    async with running(downloads_of(store, hub, root)):

        async def is_removed() -> bool:
            return [one.plan.commit for one in partials.records(root)] == ["0"]

        await eventually(is_removed)


async def test_a_read_only_directory(store: Store, hub: LocalHub, root: Path) -> None:
    (root / "models--org--name" / "snapshots").mkdir(parents=True)
    request = InspectRequest(repository=REPOSITORY, revision="main", quantization=None)
    refusal = await downloads_of(store, hub, root).inspect(request)
    assert isinstance(refusal, Refusal)
    assert refusal.error.code == "read_only_store"


async def test_the_first_writable_directory_gets_it(store: Store, hub: LocalHub, root: Path, tmp_path: Path) -> None:
    """It may be a link, and have folders that are links to others of it."""
    (tmp_path / "cache/models--org--name/snapshots").mkdir(parents=True)
    (root / "elsewhere").mkdir()
    (root / REPOSITORY).parent.symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(root)
    async with running(downloads_of(store, hub, tmp_path / "cache", tmp_path / "link")) as downloads:
        await created(store, await offered(downloads))
        await reached(store, "job_1", State.COMPLETED)
    assert_complete(hub, root)


@pytest.mark.parametrize("linked", [partials.FOLDER, "org"])
async def test_a_link_out_of_the_directory(
    store: Store, hub: LocalHub, root: Path, tmp_path: Path, linked: str
) -> None:
    """Also of the folder for partial files, which is the process's own: the kernel keeps it from what is outside."""
    (tmp_path / "outside").mkdir()
    (root / linked).symlink_to(tmp_path / "outside")
    async with running(downloads_of(store, hub, root)) as downloads:
        await created(store, await offered(downloads))
        failed = await reached(store, "job_1", State.FAILED)
    assert failed.error is not None
    assert failed.error.code == "store_error"
    assert not [*(tmp_path / "outside").rglob("*.gguf")]


async def test_downloads_turned_off(store: Store, root: Path) -> None:
    downloads = Downloads("w", [root], None, store.downloads, 1.0)
    refusal = await downloads.inspect(InspectRequest(repository="a/b", revision="main", quantization=None))
    assert isinstance(refusal, Refusal)
    assert refusal.error.code == "downloads_off"


async def test_a_model_is_removed(store: Store, hub: LocalHub, root: Path) -> None:
    writable([root])
    folder = root / "p" / "name"
    folder.mkdir(parents=True)
    (folder / "a.gguf").touch()
    model = Model(key="p/name", base="p/name", variant="", shards=["p/name/a.gguf"])
    downloads = downloads_of(store, hub, root)
    refusal = await downloads.remove({"p/name": model}, lambda _: True, "p/name")
    assert isinstance(refusal, Refusal)
    assert refusal.error.code == "model_in_use"
    assert isinstance(await downloads.remove({"p/name": model}, lambda _: False, "p/name"), Removed)
    assert not folder.parent.exists()
