"""Downloads models into this worker's directory: makes what runs match the records, and keeps these on the disk.

The bytes come in a process of their own (`worker.hub.process`); to pause or cancel is to end it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import assert_never

import msgspec
from msgspec import Struct

from shared.backoff import Backoff
from shared.download import (
    Download,
    Event,
    InspectRequest,
    Offer,
    Refusal,
    Removed,
    State,
    Wanted,
)
from shared.errors import DownloadFailed, ModelInUse, ModelNotFound, ServiceError
from shared.schema.model import Model
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.downloads import Downloads as Records
from shared.store.downloads import Held
from shared.store.keys import DOWNLOAD_RETAIN_S
from shared.telemetry import log
from worker.catalog import stores
from worker.hub import partials
from worker.hub.child import answers
from worker.hub.client import Access
from worker.hub.protocol import Busy, Description, Fetch, Finished, Inspect, Progressed

LIVE = (State.DOWNLOADING, State.PAUSED)
MOST_DEATHS = 5  # of a process in a row, before its download fails
AT_ONCE = 2  # downloads of a worker
BEAT_S = 2.0
WRITE_S = 1.0  # between two revisions of the progress of a download
RATE_S = 5.0  # over which the rate is averaged, about
FIRST_PAUSE_S, LAST_PAUSE_S, STABLE_S = 1.0, 60.0, 60.0

_log = log.get("worker")


class Start(Struct, frozen=True):
    """Fetch, unless it runs already."""


class Move(Struct, frozen=True):
    """End what runs, and write the record after an event that a client asked for."""

    event: Event
    done: Wanted


def decide(held: Held) -> Start | Move | None:
    """Return what makes a download as its record and the request of a client say."""
    match held.download.state:
        case State.DOWNLOADING:
            if held.wanted == "pause":
                return Move(Event.PAUSE, "pause")
            return Move(Event.CANCEL, "cancel") if held.wanted == "cancel" else Start()
        case State.PAUSED | State.FAILED:
            if held.wanted == "run":
                return Move(Event.RESUME, "run")
            return Move(Event.CANCEL, "cancel") if held.wanted == "cancel" else None
        case State.COMPLETED | State.CANCELLED:
            return None
        case _:
            assert_never(held.download.state)


class Downloads:
    """The downloads of a worker.  Run `run` as a task; the methods may be called before."""

    def __init__(
        self,
        name: str,
        roots: Sequence[Path],
        access: Access | None,
        records: Records,
        patience_s: float,
    ) -> None:
        """`access`: None if downloads are turned off.  `patience_s`: time without a byte after which one fails."""
        self._name, self._roots, self._access, self._patience_s = name, roots, access, patience_s
        self._records = records
        self._held: dict[str, Download] = {}  # not over, as written last
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Look at the records now."""
        self._woken.set()

    async def run(self) -> None:
        """Make what runs match the records, at each beat and when woken.  Runs until cancelled."""
        self._held = {one.id: one for one in await asyncio.to_thread(self._kept)}
        try:
            while True:
                self._woken.clear()
                try:
                    await self._reconcile()
                except UNAVAILABLE as e:
                    _log.warning("downloads not read", action="redis_unavailable", error=str(e))
                check_cancelled()
                with suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_S):
                        await self._woken.wait()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _kept(self) -> list[Download]:
        """Return the records that are kept on the disk and belong to this worker.  Removes what failed long ago."""
        kept = []
        for root in self._roots:
            for record in [one for one in partials.records(root) if one.worker == self._name]:
                if record.state in LIVE:
                    kept.append(record)
                elif (record.completed_at or 0.0) < time.time() - DOWNLOAD_RETAIN_S:
                    partials.remove(root, record.plan)
        return kept

    # ---- for clients

    async def inspect(self, request: InspectRequest) -> Offer | Refusal:
        """Return what a download would fetch."""
        if self._access is None:
            return Refusal(_off().body())
        try:
            store = await asyncio.to_thread(stores.writable, self._roots)
        except stores.ReadOnly as e:
            return Refusal(DownloadFailed("read_only_store", str(e)).body())
        except OSError as e:
            return Refusal(partials.unwritable(e).body())
        ask = Inspect(access=self._access, root=str(store.path), store=store.id, request=request)
        async with aclosing(answers(ask)) as told:
            async for one in told:
                if isinstance(one, Offer | Refusal):
                    return one
        return Refusal(DownloadFailed("hub_unavailable", "The process that asks the hub ended.").body())

    async def remove(self, models: Mapping[str, Model], in_use: Callable[[Model], bool], key: str) -> Removed | Refusal:
        """Remove the files of a model, unless it is loaded."""
        model = models.get(key)
        try:
            if model is None:
                raise ModelNotFound(f"Model '{key}' not found.", param="model")
            if in_use(model):
                raise ModelInUse(f"Model '{key}' is loaded. Unload it first.", param="model")
            await asyncio.to_thread(_unlink, self._roots, model)
        except ServiceError as e:
            return Refusal(e.body())
        except OSError as e:
            return Refusal(DownloadFailed("store_error", f"Model '{key}' cannot be removed: {e.strerror}.").body())
        _log.info("model removed", action="model_removed", model=key)
        return Removed()

    # ---- records

    async def _reconcile(self) -> None:
        """Compare the records with what runs, and act.  Raises what UNAVAILABLE lists."""
        found = await self._records.held(self._name)
        for lost in self._held.keys() - {held.download.id for held in found}:  # by Redis
            if await self._records.commit(self._held[lost]):
                found.append(Held(self._held[lost], None))
            else:
                self._held.pop(lost)  # it is over
        for held in found:
            known = self._held.get(held.download.id)
            if held.download.state in LIVE and (known is None or known.rev < held.download.rev):
                self._held[held.download.id] = held.download
            action = decide(held)
            match action:
                case Start():
                    self._start(held.download)
                case Move(event, done):
                    await self._move(held.download, event, done)
                case None:
                    pass
                case _:
                    assert_never(action)

    def _start(self, download: Download) -> None:
        if download.id not in self._tasks:
            task = asyncio.create_task(self._fetch(self._held[download.id]))
            self._tasks[download.id] = task
            task.add_done_callback(lambda _: self._tasks.pop(download.id, None))

    async def _move(self, download: Download, event: Event, done: Wanted) -> None:
        """Do what a client asked for.  Raises what UNAVAILABLE lists."""
        if (task := self._tasks.get(download.id)) is not None:
            task.cancel()
            await asyncio.wait([task])
        download = self._held.get(download.id, download)
        if (event is Event.PAUSE) and download.state is not State.DOWNLOADING:
            return  # it has ended meanwhile
        if event is Event.CANCEL:
            for root in self._roots:
                await asyncio.to_thread(partials.remove, root, download.plan)
        await self._write(download.after(event, time.time()), done)
        if event is Event.RESUME:
            self._start(self._held[download.id])

    async def _write(self, download: Download, done: Wanted | None = None) -> None:
        """Write the next revision of a record, on the disk if its state matters there.

        Raises what UNAVAILABLE lists.
        """
        before = self._held.get(download.id)
        download = msgspec.structs.replace(download, rev=download.rev + 1)
        if download.state in LIVE:
            self._held[download.id] = download
        else:
            self._held.pop(download.id, None)
        if before is None or before.state is not download.state:
            why = {} if download.error is None else {"reason": download.error.message}
            _log.info("download", action=f"download_{download.state}", **download.ids, **why)
            if download.state not in (State.COMPLETED, State.CANCELLED):  # their folder is gone
                await self._keep(download)
        await self._records.commit(download, done=done)

    async def _keep(self, download: Download) -> None:
        root = await asyncio.to_thread(self._root, download.store)
        if root is not None:
            with suppress(OSError):  # the download itself will report it
                await asyncio.to_thread(partials.write, root, download)

    def _root(self, store: str) -> Path | None:
        """Return the models directory with an id, if it may be written to."""
        found = [stores.seen(root) for root in self._roots]
        return next((one.path for one in found if one.id == store and not one.is_read_only), None)

    # ---- fetching

    async def _fetch(self, download: Download) -> None:
        """Fetch a download and write how it goes.  Starts again a process that dies."""
        backoff = Backoff(FIRST_PAUSE_S, LAST_PAUSE_S, STABLE_S)
        async with self._slots:
            await self._keep(download)
            download = msgspec.structs.replace(download, started_at=download.started_at or time.time())
            deaths = 0
            while True:
                began = time.monotonic()
                match end := await self._once(download):
                    case Finished():
                        await self._ended(self._held[download.id].after(Event.FINISH, time.time()))
                        return
                    case Refusal():
                        await self._ended(self._held[download.id].after(Event.FAIL, time.time(), end.error))
                        return
                    case Busy():  # another worker fetches it
                        await asyncio.sleep(BEAT_S)
                    case None:
                        ran_s = time.monotonic() - began
                        deaths = 1 if ran_s > STABLE_S else deaths + 1
                        if deaths >= MOST_DEATHS:
                            error = DownloadFailed("download_crashed", "The process of the download dies repeatedly.")
                            await self._ended(self._held[download.id].after(Event.FAIL, time.time(), error.body()))
                            return
                        _log.warning("download process died", action="download_died", **download.ids)
                        await asyncio.sleep(backoff.after(ran_s))
                    case _:
                        assert_never(end)

    async def _once(self, download: Download) -> Finished | Refusal | Busy | None:
        """Run the process once; None if it dies."""
        if self._access is None:
            return Refusal(_off().body())
        root = await asyncio.to_thread(self._root, download.store)
        if root is None:
            sentence = "The models directory of the download is not there, or not writable for the worker."
            return Refusal(DownloadFailed("store_error", sentence).body())
        ask = Fetch(access=self._access, root=str(root), plan=download.plan, patience_s=self._patience_s)
        rate, written = Rate(), 0.0
        async with aclosing(answers(ask)) as told:
            async for one in told:
                match one:
                    case Progressed():
                        rate.note(one.bytes)
                        if (now := time.monotonic()) - written >= WRITE_S:
                            written = now
                            await self._progressed(download, one.bytes, rate)
                    case Finished() | Refusal() | Busy():
                        return one
                    case Offer() | Description():
                        raise AssertionError("it was not asked for")
                    case _:
                        assert_never(one)
        return None

    async def _progressed(self, download: Download, n_bytes: int, rate: Rate) -> None:
        held = msgspec.structs.replace(
            self._held[download.id],
            downloaded_bytes=n_bytes,
            bytes_per_second=rate.bytes_s,
            started_at=download.started_at,
        )
        with suppress(*UNAVAILABLE):  # the next one says more
            await self._write(held)

    async def _ended(self, download: Download) -> None:
        """Write the last revision, however long Redis does not answer."""
        while True:
            try:
                await self._write(download, "run")
            except UNAVAILABLE:
                await asyncio.sleep(BEAT_S)
            else:
                return


class Rate:
    """The rate at which bytes come, averaged over some seconds."""

    def __init__(self) -> None:
        self.bytes_s: float | None = None
        self._last: tuple[float, int] | None = None

    def note(self, n_bytes: int) -> None:
        now = time.monotonic()
        if self._last is not None and (took_s := now - self._last[0]) > 0:
            rate = (n_bytes - self._last[1]) / took_s
            weight = min(1.0, took_s / RATE_S)
            self.bytes_s = rate if self.bytes_s is None else self.bytes_s + weight * (rate - self.bytes_s)
        self._last = now, n_bytes


def _unlink(roots: Sequence[Path], model: Model) -> None:
    """Remove the files of a model, and the folders that are empty then.  Raises DownloadFailed and OSError."""
    root = roots[model.root]
    store = stores.seen(root)
    if store.is_read_only:
        raise DownloadFailed("read_only_store", f"The models directory {store.refusal}.")
    for shard in model.shards:  # the first one first: without it, the model is not listed
        path = root / shard
        path.unlink()
        for folder in path.parents:
            if folder == root or not folder.is_relative_to(root):
                break
            try:
                folder.rmdir()
            except OSError:
                break  # it has other files


def _off() -> DownloadFailed:
    return DownloadFailed("downloads_off", "Downloads are turned off for this worker.")
