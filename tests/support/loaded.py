"""A worker with loaded instances, to which a test sends requests as an API process does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from msgspec import UNSET

from api.channel.channels import Channels
from shared.channel.messages import Embed, FromRunner, Generate, Rank, Sampling, ToModel
from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.schema.http import LoadRequest
from shared.schema.memory import Holding
from shared.telemetry.tally import Tally, field
from tests.support.agents import record, warm
from tests.support.chat import EOS
from tests.support.waiting import until
from worker.agent import Agent
from worker.runner.process import Runner

DEADLINE_S = 60.0
CONVERSATION = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
ENDLESS = Sampling(logit_bias={EOS: -1000.0})  # no answer ends by itself


class Loaded:
    """A worker with loaded instances, and an API process's end of its channels."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.channels = Channels(lambda _: agent.snapshot(), Tally())
        self.runners: dict[str, Runner] = {}

    async def load(
        self, number: int = 1, key: str = "p/llama", *, context_length: int = 256, ttl_s: float | None = None
    ) -> Instance:
        runner = await warm(self.agent)
        begun = await self.begun(key, number=number, context_length=context_length, ttl_s=ttl_s)
        self.runners[begun.id] = runner
        return await self.reached(begun.id, State.LOADED)

    async def ask(
        self, instance: Instance, *, conversation: bytes = CONVERSATION, n: int | None = 5, client: str = "c"
    ) -> list[FromRunner]:
        """Return all messages of an answer of at most `n` tokens; None: up to the end of the context."""
        request = Generate(id=0, client=client, conversation=conversation, max_tokens=n, sampling=ENDLESS)
        return await self.answered(instance, request)

    async def embed(
        self, instance: Instance, *, texts: Sequence[str] = (), tokens: Sequence[list[int]] = ()
    ) -> list[FromRunner]:
        """Return all messages about the vectors of these texts, or of these lists of tokens."""
        return await self.answered(instance, Embed(id=0, client="c", texts=[*texts], tokens=[*tokens]))

    async def rank(self, instance: Instance, query: str, documents: list[str]) -> list[FromRunner]:
        """Return all messages about the scores of these documents."""
        return await self.answered(instance, Rank(id=0, client="c", query=query, documents=documents))

    async def answered(self, instance: Instance, request: ToModel) -> list[FromRunner]:
        """Return all messages about a request."""
        async with asyncio.timeout(DEADLINE_S), self.channels.answering(instance, request, "/test") as answer:
            return [message async for message in answer]

    async def begun(
        self, key: str, *, number: int = 1, context_length: int = 256, ttl_s: float | None = None
    ) -> Instance:
        """Begin a load."""
        model = self.agent.models[key]
        instance = Instance(
            id=f"load_{number}",
            model=key,
            key=key,
            source=model.source,
            type=model.type,
            worker="w",
            request=LoadRequest(
                model=key, context_length=context_length, ttl_seconds=UNSET if ttl_s is None else ttl_s
            ),
            total_size_bytes=model.size_bytes,
        )
        created = await self.agent.store.instances.create(instance)
        self.agent.deliver(created.id)
        return created

    async def reached(self, id_: str, state: State) -> Instance:
        """Return the record once it has this state; the worker beats meanwhile."""

        async def is_there() -> bool:
            self.ping()
            await self.agent.placer.look()
            current = await record(self.agent, id_)
            assert current.state is state or current.state not in TERMINAL, current
            return current.state is state

        await until(is_there, f"{id_} {state}")
        return await record(self.agent, id_)

    def ping(self) -> None:
        """Ask the runners of all loaded instances for their numbers, as at a beat."""
        for resident in self.agent.residents.values():
            if resident._runner is not None:
                resident._runner.ping(0.0)

    async def refused_eviction(self) -> None:
        """Wait until a runner has refused to close for an eviction."""
        await until(lambda: self.agent.tally._counts.get(field("evictions_refused"), 0) > 0, "an eviction is refused")

    async def used_at(self, instance: Instance) -> float:
        """Return the last use of an instance that the worker would publish at its next beat."""
        return (await self._held(instance)).used_at

    async def running(self, instance: Instance) -> int:
        """Return the number of running requests that the worker would publish at its next beat."""
        return (await self._held(instance)).running

    async def _held(self, instance: Instance) -> Holding:
        runner = self.runners[instance.id]
        runner.ping(1.0)
        await until(lambda: runner.silent_s == 0.0 and not runner._awaits_pong, "pong")
        (held,) = [one for one in self.agent.snapshot().held if one.instance_id == instance.instance_id]
        return held
