"""Stored responses: what a model answered, with its conversation, for the requests that continue it.

Each belongs to the client that asked for it.  What a client has is bounded by number, bytes and age: the oldest are
removed first.
"""

from __future__ import annotations

from msgspec import Struct
from redis.asyncio import Redis

from shared.store import keys
from shared.store.script import Script

ENTRY_BYTES = 512  # of a response in Redis besides its content, roughly


class Stored(Struct, frozen=True, kw_only=True):
    """A stored response, in the form of the route that wrote it."""

    response: bytes  # as its client reads it; empty if the route that wrote it has no way to read it
    conversation: bytes  # the messages up to and with the answer, without a system prompt of the request


class Responses:
    """Reads and writes responses.  Every method raises what UNAVAILABLE lists if Redis does not answer.

    `owner` is the client, as `api.auth` names it.  `id_` must be well-formed: it is a part of a key.
    """

    def __init__(self, redis: Redis, *, most: int, most_bytes: int, retain_s: int) -> None:
        """The bounds for each owner; `most` 0: nothing is stored."""
        self._redis = redis
        self._most, self._most_bytes, self._retain_s = most, most_bytes, retain_s
        self._put = Script(redis, "response_put", "response_drop")
        self._delete = Script(redis, "response_delete", "response_drop")

    @property
    def is_on(self) -> bool:
        """Whether responses are stored."""
        return self._most > 0

    async def put(self, owner: str, id_: str, stored: Stored) -> bool:
        """Store a response.  Returns False if it alone is over the bounds."""
        n_bytes = len(stored.response) + len(stored.conversation) + ENTRY_BYTES
        if not self.is_on or n_bytes > self._most_bytes:
            return False
        await self._put(
            keys.responses_of(owner),
            keys.response_bytes_of(owner),
            records=keys.response(owner, ""),
            id=id_,
            response=stored.response,
            conversation=stored.conversation,
            n_bytes=n_bytes,
            most=self._most,
            most_bytes=self._most_bytes,
            retain_s=self._retain_s,
        )
        return True

    async def get(self, owner: str, id_: str) -> Stored | None:
        names = list(Stored.__struct_fields__)
        response, conversation = await self._redis.hmget(keys.response(owner, id_), names)  # type: ignore[misc]
        return None if conversation is None else Stored(response=response, conversation=conversation)

    async def delete(self, owner: str, id_: str) -> bool:
        """Remove a response.  Returns False if there is none."""
        return bool(await self._deleted(owner, [id_]))

    async def delete_all(self, owner: str) -> int:
        """Remove all responses of a client; return how many there were."""
        return await self._deleted(owner, None)

    async def _deleted(self, owner: str, ids: list[str] | None) -> int:
        n: int = await self._delete(
            keys.responses_of(owner), keys.response_bytes_of(owner), records=keys.response(owner, ""), ids=ids
        )
        return n
