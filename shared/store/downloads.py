"""The records of downloads.  A record is written by its worker; clients only leave requests in it."""

from __future__ import annotations

from typing import Literal, NamedTuple, assert_never, get_args

from msgspec import msgpack
from redis.asyncio import Redis

from shared.download import OVER, Download, Wanted
from shared.store import keys
from shared.store.keys import DOWNLOAD_RETAIN_S
from shared.store.script import Script

Created = Literal["created", "remembered", "joined"]
MOST_LISTED = 1000

_decode = msgpack.Decoder(Download).decode
_WANTED: dict[bytes | None, Wanted] = {wanted.encode(): wanted for wanted in get_args(Wanted)}


class Held(NamedTuple):
    """A record, and the request of a client that its worker has not fulfilled yet."""

    download: Download
    wanted: Wanted | None


class KeyReused(Exception):
    """The Idempotency-Key was used for another request."""


class Downloads:
    """Reads and writes records.  Every method raises what UNAVAILABLE lists if Redis does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._create = Script(redis, "download_create")
        self._commit = Script(redis, "download_commit")
        self._want = Script(redis, "download_want")

    async def remembered(self, key: str, digest: str) -> Download | None:
        """Return the download of an Idempotency-Key, by its digest and that of its request.  Raises KeyReused."""
        id_, known = await self._redis.hmget(keys.download_idempotency(key), ["id", "digest"])  # type: ignore[misc]
        if id_ is None:
            return None
        if known != digest.encode():
            raise KeyReused
        return await self.get(id_.decode())

    async def create(self, download: Download, *, key: str = "", digest: str = "") -> Download:
        """Write a new record and wake its worker; return it, or the record to use instead.

        That is the one with the same `key`, or one that is fetching the same.  Raises KeyReused.
        """
        first, id_, known = await self._create(
            keys.download(download.id),
            keys.download_idempotency(key),
            keys.download_of(download.target),
            id=download.id,
            doc=msgpack.encode(download),
            worker=download.worker,
            created=download.created_at,
            retain_s=DOWNLOAD_RETAIN_S,
            key=bool(key),
            digest=digest,
        )
        outcome: Created = first.decode()
        match outcome:
            case "created":
                return download
            case "remembered":
                if known.decode() != digest:
                    raise KeyReused
            case "joined":
                pass
            case _:
                assert_never(outcome)
        return await self.get(id_.decode()) or download

    async def commit(self, download: Download, *, done: Wanted | None = None) -> bool:
        """Write a revision of a record, also if Redis lost the record.  Returns False if Redis has a later one.

        `done`: the request of a client that this revision fulfils.
        """
        written = await self._commit(
            keys.download(download.id),
            keys.download_of(download.target),
            id=download.id,
            rev=download.rev,
            doc=msgpack.encode(download),
            worker=download.worker,
            created=download.created_at,
            retain_s=DOWNLOAD_RETAIN_S,
            over=download.state in OVER,
            done=done,
        )
        return written is not None

    async def want(self, id_: str, wanted: Wanted) -> bool:
        """Leave a request for the worker of a download, and wake it.  Returns False if there is no such record."""
        return await self._want(keys.download(id_), id=id_, wanted=wanted, retain_s=DOWNLOAD_RETAIN_S) is not None

    async def get(self, id_: str) -> Download | None:
        doc = await self._redis.hget(keys.download(id_), "doc")  # type: ignore[misc]
        return None if doc is None else _decode(doc)

    async def held(self, worker: str) -> list[Held]:
        """Return the downloads that a worker has to look at."""
        ids = [id_.decode() for id_ in await self._redis.smembers(keys.downloads_at(worker))]  # type: ignore[misc]
        async with self._redis.pipeline(transaction=False) as pipe:
            for id_ in ids:
                pipe.hmget(keys.download(id_), ["doc", "wanted"])
            return [Held(_decode(doc), _WANTED.get(wanted)) for doc, wanted in await pipe.execute() if doc is not None]

    async def newest(self, limit: int) -> list[Download]:
        """Return the newest records, the newest first."""
        ids = [id_.decode() for id_ in await self._redis.zrevrange(keys.DOWNLOADS, 0, limit - 1)]
        async with self._redis.pipeline(transaction=False) as pipe:
            for id_ in ids:
                pipe.hget(keys.download(id_), "doc")
            return [_decode(doc) for doc in await pipe.execute() if doc is not None]
