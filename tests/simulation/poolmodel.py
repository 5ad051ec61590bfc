"""A model of a pool of two workers and eight GPUs of different sizes, with their true state.

The ledgers, the placer with its reservations and evictions (`worker.memory.placer`), and the roster of an API
(`api.pool.roster`) are real.  The cards, which hold the true state, the runners, which allocate their memory step by
step, and Redis, which holds the last snapshots of the workers, are simulated.  The event loop's time passes at once.

`play` carries out a list of steps, and raises AssertionError if

- more memory was given than there is: a reservation exceeds what is neither used nor reserved, or a runner finds too
  little memory (unless a foreign program took it meanwhile);
- an instance was unloaded that is not evictable, or whose eviction was not necessary;
- a worker refused a load that it had room for, or a load was given up although a worker had room for it;
- a step waits forever, or an unused card is not free at the end.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

from hypothesis import strategies as st
from msgspec import UNSET, Struct, structs

from api.pool.roster import Roster
from shared.instance import Instance
from shared.lifecycle import State
from shared.memory.estimate import Requirements, requirements_of
from shared.memory.placement import Constraints, Demand, Placement, place
from shared.memory.plan import plan
from shared.schema.http import GPURequest, LoadRequest
from shared.schema.memory import Holding, Usage
from shared.schema.model import Dimensions, Model, Weights
from shared.schema.snapshot import Sizing, WorkerSnapshot, short
from shared.settings import Settings
from shared.telemetry.tally import Tally
from worker.memory.ledger import Ledger
from worker.memory.nvml import Reading
from worker.memory.placer import Placer, Requests
from worker.timing import Timing

MIB = 1 << 20
KEPT_MIB = 256  # kept free on each card, for the memory of a runner beside its model
BESIDE_MIB = 16  # size of that memory
CARDS_MIB = {"w0": (900, 1500, 2500, 5000), "w1": (700, 2000, 2000, 4000)}
FOREIGN_PID = 7
LOAD_S = 0.4  # duration of a load, in four steps
SIZES_MIB = {"small": [60, 60, 60, 100], "middle": [300] * 5, "large": [1100, 500, 500, 900, 700], "huge": [1200] * 5}

# ---- steps


class Load(Struct, frozen=True):
    """Request a load from an API.  The engine uses `error` percent more than the estimate, which is exact only if
    `error` is 0."""

    model: str
    api: int
    ttl: bool
    split: Literal["even", "priority"] | None
    error: int


class Fill(Struct, frozen=True):
    """Load the same model until there is no room for it: without a TTL no copy may be evicted.  With a TTL, where
    copies may be evicted for later ones, load it a few times."""

    model: str
    ttl: bool


class Unload(Struct, frozen=True):
    which: int


class Crash(Struct, frozen=True):
    """Let a runner die, during its load or after it; its cards keep `leaks` percent of its memory."""

    which: int
    leaks: int


class Use(Struct, frozen=True):
    which: int


class Wait(Struct, frozen=True):
    seconds: float


class Foreign(Struct, frozen=True):
    """Let another program hold so much of a card, as far as it is free."""

    card: int
    mib: int


class Unnamed(Struct, frozen=True):
    """Free half of the memory of a card that belongs to no process: initial usage or leaks."""

    card: int


class Publish(Struct, frozen=True):
    """Let a worker do a beat."""

    worker: int


class Refresh(Struct, frozen=True):
    """Let an API do a beat."""

    api: int


Step = Load | Fill | Unload | Crash | Use | Wait | Foreign | Unnamed | Publish | Refresh

_which, _card = st.integers(0, 20), st.integers(0, 7)
_models = st.sampled_from([*SIZES_MIB])
_loads = st.builds(
    Load,
    model=_models,
    api=st.integers(0, 1),
    ttl=st.sampled_from([True, True, False]),
    split=st.sampled_from([None, None, None, "even", "priority"]),
    error=st.sampled_from([0, 0, 0, 8, -8]),
)
_steps = st.one_of(
    _loads,
    _loads,
    _loads,
    st.builds(Fill, model=st.sampled_from(["middle", "large", "huge"]), ttl=st.just(False)),
    st.builds(Fill, model=_models, ttl=st.just(True)),
    st.builds(Unload, which=_which),
    st.builds(Crash, which=_which, leaks=st.sampled_from([0, 0, 40, 100])),
    st.builds(Use, which=_which),
    st.builds(Wait, seconds=st.sampled_from([0.0, 0.15, 0.3, 2.0, 20.0])),
    st.builds(Foreign, card=_card, mib=st.sampled_from([0, 200, 1000, 3000])),
    st.builds(Unnamed, card=_card),
    st.builds(Publish, worker=st.integers(0, 1)),
    st.builds(Refresh, api=st.integers(0, 1)),
)


class Play(Struct, frozen=True):
    """One run.  In a container (`named` is False) a driver reports pids unknown there; such a run has no leaks,
    and its foreign programs do not change during a load, since a worker can see neither."""

    steps: list[Step]
    at_start_mib: list[int]  # of each card
    lag_s: float  # how long after the end of a process its memory is free
    named: bool


plays = st.builds(
    Play,
    steps=st.lists(_steps, min_size=1, max_size=30),
    at_start_mib=st.lists(st.sampled_from([0, 0, 300]), min_size=8, max_size=8),
    lag_s=st.sampled_from([0.0, 0.2, Timing().agree_s + 1]),
    named=st.sampled_from([True, True, True, False]),
)


# ---- time


class Stuck(AssertionError):
    """Every task waits for an event that cannot happen."""


class _Jump(selectors.SelectSelector):
    """A selector without files, which advances the time at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck
        self.now += max(0.0, timeout)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def play(sequence: Play) -> Counter[str]:
    """Carry out a run; return how often each outcome occurred."""
    loop = _Loop()
    try:
        return loop.run_until_complete(_Sim(sequence).run())
    finally:
        for task in asyncio.all_tasks(loop):  # of a run that failed
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


# ---- the true state


class Card:
    """A GPU and the bytes that each process uses of it."""

    def __init__(self, id_: str, mib: int, at_start_mib: int) -> None:
        self.id = id_
        self.total = mib * MIB
        self.unnamed = at_start_mib * MIB  # used by the driver, or leaked
        self.ours: dict[int, int] = {}  # of runners, by pid
        self.dying: dict[int, int] = {}  # of runners that have ended, by pid
        self.foreign = 0
        self.fell = False  # `unnamed` has decreased, and no load has settled since

    @property
    def free(self) -> int:
        return self.total - self.unnamed - self.foreign - sum(self.ours.values()) - sum(self.dying.values())

    def reading(self, named: bool) -> Reading:
        users = self.ours.copy() if named else {pid + 1000: n for pid, n in (self.ours | self.dying).items()}
        if self.foreign:
            users[FOREIGN_PID] = self.foreign
        return Reading(id=self.id, is_gpu=True, name="", total_bytes=self.total, free_bytes=self.free, users=users)


class _Ledger(Ledger):
    """The ledger; every reservation is compared with the true state."""

    worker: _Worker

    def update(self, readings: Sequence[Reading]) -> None:
        super().update(readings)
        self.worker.check_available()

    def reserve(self, instance: str, taken: Iterable[Usage]) -> None:
        taken = [*taken]
        room = self.worker.safe(without=instance)
        for one in taken:
            assert one.total_bytes <= room[one.id], f"{instance} gets {one.total_bytes} of {one.id}: {room}"
        super().reserve(instance, taken)
        self.worker.held[instance].robbed.clear()


async def unanswered(_: Sizing) -> None:
    """Be an engine that does dry runs only in the runner of a load."""


class _Placer(Placer):
    """The real placer, without the thread that queries a driver.  Each decision is compared with the true state of that
    moment: the placer does not wait between its decision and its end."""

    def __init__(self, worker: _Worker) -> None:
        super().__init__(worker.settings, worker.devices, worker.held, unanswered, worker.announce, Tally(), Timing())
        self.worker = worker
        self.evicting: dict[str, Sequence[Holding]] = {}
        self.ledger = ledger = _Ledger(worker.settings.kept_free)
        ledger.worker = worker
        worker.placer = self
        ledger.update(worker.devices.read())

    async def look(self) -> None:
        self.ledger.update(self.worker.devices.read())

    async def _evict(self, victims: Sequence[Holding], instance: Instance) -> None:
        self.evicting[instance.id] = victims
        self.worker.check_victims(victims, instance)
        await super()._evict(victims, instance)

    async def place(self, instance: Instance, model: Model) -> Placement | None:
        placed = await super().place(instance, model)
        if placed is None:
            held = [] if instance.id in self.evicting else self.held()
            assert not self.worker.has_room(instance, held), f"{instance.key} is refused: {self.worker.certain()}"
        return placed


# ---- a worker


class _Worker:
    """The parts of an agent that a Placer uses, and checks against the true state."""

    def __init__(self, sim: _Sim, name: str, cards: list[Card]) -> None:
        self.sim = sim
        self.name = name
        self.cards = {card.id: card for card in cards}
        self.settings = Settings(worker_name=name, evict="idle", device_reserve=f"{KEPT_MIB}MiB")
        self.devices: Any = SimpleNamespace(
            read=lambda: [card.reading(sim.sequence.named) for card in cards], gpus=[card.id for card in cards]
        )
        self.held: dict[str, _Resident] = {}
        self.taken: list[str] = []
        self.changed = asyncio.Event()
        self.placer: _Placer
        _Placer(self)
        self.published = self.snapshot()

    def snapshot(self) -> WorkerSnapshot:
        return WorkerSnapshot(
            name=self.name,
            epoch="e",
            version="",
            catalog="same",
            residents=len(self.held),
            devices=self.placer.devices(),
            held=self.placer.held(),
            taken=[*self.taken],
        )

    async def announce(self) -> None:
        self.published = self.snapshot()

    # ---- the true state

    def _rest(self, *, whole: bool, without: str = "") -> dict[str, int]:
        """Return the rest of each card once every load has its reservation, or its usage if that is larger.

        With `whole` an instance that is leaving counts in the same way, else only with its current usage.
        """
        left = {}
        for card in self.cards.values():
            ours = 0
            for id_, held in self.placer.ledger.reservations.items():
                if id_ == without:
                    continue
                pid = held.pid or 0
                has = card.ours.get(pid, 0) + card.dying.get(pid, 0)
                ours += has if held.is_leaving and not whole else max(has, held.bytes.get(card.id, 0))
            pids = {held.pid for id_, held in self.placer.ledger.reservations.items() if id_ != without}
            strays = sum(n for of in (card.ours, card.dying) for pid, n in of.items() if pid not in pids)
            own = self.placer.ledger.reservations[without].pid if without in self.placer.ledger.reservations else None
            strays -= card.ours.get(own or 0, 0)
            left[card.id] = card.total - card.unnamed - card.foreign - strays - ours - KEPT_MIB * MIB
        return left

    def safe(self, without: str = "") -> dict[str, int]:
        """Return the most that may be given of each card: more would be given twice."""
        return {id_: n + self._unsure for id_, n in self._rest(whole=False, without=without).items()}

    def certain(self) -> dict[str, int]:
        """Return the least that must be available on each card."""
        return {id_: n - self._unsure for id_, n in self._rest(whole=True).items()}

    @property
    def _unsure(self) -> int:
        """In a container the memory of runners beside their models cannot be attributed while one of them changes; the
        memory that is kept free covers it."""
        return 0 if self.sim.is_known else KEPT_MIB * MIB

    def check_available(self) -> None:
        published = {device.id: device.available_bytes for device in self.placer.devices()}
        for id_, card in self.cards.items():
            card.fell = card.fell and self.is_moving(id_)
        safe, certain = self.safe(), self.certain()
        for id_, n_bytes in published.items():
            assert n_bytes <= safe[id_], f"{id_}: {n_bytes - safe[id_]} bytes too many"
            if self.is_known(id_):
                assert n_bytes >= certain[id_], f"{id_}: {certain[id_] - n_bytes} bytes too few"

    def is_known(self, card: str) -> bool:
        """Return whether the ledger can know the state of a card: while an instance loads or leaves, it assumes that
        unnamed memory is still used."""
        if self.placer.ledger._knows_pids is None:  # the ledger has seen no runner yet
            return not self.is_moving(card)
        return not self.is_moving(card) or not self.cards[card].fell

    def is_moving(self, card: str) -> bool:
        return any(card in held.bytes and not held.is_settled for held in self.placer.ledger.reservations.values())

    def _true_snapshot(self, held: Collection[Holding]) -> WorkerSnapshot:
        certain = self.certain()
        published = self.placer.devices()
        devices = [
            structs.replace(
                device, available_bytes=certain[device.id] if self.is_known(device.id) else device.available_bytes
            )
            for device in published
        ]
        return structs.replace(self.snapshot(), devices=devices, held=[*held])

    def requirements(self, instance: Instance) -> Requirements:
        return requirements_of(MODELS[instance.key], plan(instance.request, MODELS[instance.key], self.settings))

    def has_room(self, instance: Instance, held: Collection[Holding] = ()) -> bool:
        return place(self._demand(instance), self._true_snapshot(held)) is not None

    def _demand(self, instance: Instance) -> Demand:
        return Demand(self.requirements(instance), Constraints.of(instance.request.gpu), instance.key)

    def check_victims(self, victims: Sequence[Holding], instance: Instance) -> None:
        by_name = {one.id: one for one in self.held.values()}
        assert victims
        for victim in victims:
            assert by_name[victim.instance_id].may_be_unloaded(), "the victim is not evictable"
            others = [one for one in victims if one is not victim]
            room = self._true_snapshot([])
            devices = [
                structs.replace(
                    device,
                    available_bytes=device.available_bytes + sum(one.devices.get(device.id, 0) for one in others),
                )
                for device in room.devices
            ]
            placement = place(self._demand(instance), structs.replace(room, devices=devices))
            assert placement is None, f"the eviction of {victim.instance_id} was not necessary"


class _Resident:
    """The behaviour of `worker.instance`, with a simulated runner."""

    def __init__(self, worker: _Worker, instance: Instance, load: Load) -> None:
        self.worker = worker
        self.sim = worker.sim
        self.id = instance.id
        self.instance = instance
        self.load = load
        self.key = instance.key
        self.stop, self.freed, self.crash = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.leaks = 0
        self.pid = 0
        self.robbed: set[str] = set()  # cards on which a foreign program took reserved memory
        self.outcome = ""

    @property
    def requests(self) -> Requests:
        return Requests(used_at=self.instance.used_at or 0.0)

    @property
    def is_pinned(self) -> bool:
        return False

    async def close_if_unused(self, since: float) -> bool:
        return True

    def open(self) -> None:
        pass

    def may_be_unloaded(self) -> bool:
        return self.instance.state is State.LOADED and self.instance.request.ttl_seconds is not UNSET

    async def live(self) -> None:
        placer = self.worker.placer
        try:
            async with placer.placing:
                placed = await placer.place(self.instance, MODELS[self.key])
            self.worker.taken.append(short(self.instance.id))
            if placed is None:
                self.outcome = "refused"
                return
            self.sim.seen["evictions"] += len(placed.evicts)
            self.sim.seen["several GPUs"] += len(placed.gpus) > 1
            async with placer.turn(placed.devices, self.stop) as is_its_turn:
                if is_its_turn:
                    await self._load(placed)
            if self.outcome == "loaded":
                self.sim.seen["loaded"] += 1
                waits = [asyncio.ensure_future(event.wait()) for event in (self.stop, self.crash)]
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
                await self._end()
        finally:
            placer.forget(self)
            del self.worker.held[self.id]

    async def _load(self, placed: Placement) -> None:
        placer, cards = self.worker.placer, self.worker.cards
        self.pid = self.sim.next_pid()
        placer.ledger.started(self.id, self.pid)
        placement: Placement | None = placed
        usage = self._true_usage(placed)
        for _ in range(3):
            assert placement is not None
            usage = self._true_usage(placement)
            if not self.load.error and placement.exact:
                break
            await asyncio.sleep(LOAD_S / 4)  # duration of a dry run
            await placer.look()
            before = placement
            placement = placer.corrected(self.instance, before, usage)
            if placement is None:
                self.outcome = "refused"
                return
            if placement.exact and (placement.gpus, placement.layers) == (before.gpus, before.layers):
                break
        else:
            self.outcome = "refused"
            await self._end()
            return
        for part in range(4):
            for one in usage:
                n_bytes = one.total_bytes // 4 + (one.total_bytes % 4 + BESIDE_MIB * MIB if part == 3 else 0)
                if cards[one.id].free < n_bytes:
                    assert one.id in self.robbed, f"{self.id} finds no room on {one.id}"
                    self.sim.seen["robbed"] += 1
                    self.outcome = "failed"
                    await self._end()
                    return
                cards[one.id].ours[self.pid] = cards[one.id].ours.get(self.pid, 0) + n_bytes
            await asyncio.sleep(LOAD_S / 4)
            if self.stop.is_set() or self.crash.is_set():
                self.outcome = "ended early"
                await self._end()
                return
        placer.ledger.settle(self.id, usage)
        now = asyncio.get_running_loop().time()
        self.instance = structs.replace(self.instance, state=State.LOADED, loaded_at=now, used_at=now)
        self.outcome = "loaded"
        await self.worker.announce()

    def _true_usage(self, placed: Placement) -> list[Usage]:
        """Return the engine's usage in a placement: the estimate, changed by the load's error."""
        requirements, start, usages = self.worker.requirements(self.instance), first_gpu_layer(placed, self), []
        for id_, n in zip(placed.gpus, placed.layers, strict=True):
            usage = requirements.on_gpu(id_, start, start + n)
            more = usage.weights_bytes * self.load.error // 100
            usages.append(structs.replace(usage, weights_bytes=usage.weights_bytes + more))
            start += n
        return usages

    async def _end(self) -> None:
        """End the runner; its cards get the memory back after the lag, except for leaks."""
        knows_pids, lag_s = self.worker.placer.ledger._knows_pids, self.sim.sequence.lag_s
        if knows_pids is None:  # the rest of the very first load looks like a second one that starts meanwhile
            lag_s = 0.0
        for card in self.worker.cards.values():
            n_bytes = card.ours.pop(self.pid, 0)
            card.fell = True  # the ledger may not have known the memory beside the model
            leaked = n_bytes * self.leaks // 100 if knows_pids else 0
            card.unnamed += leaked
            self.sim.seen["leaks"] += leaked > 0
            if n_bytes > leaked and lag_s:
                card.dying[self.pid] = n_bytes - leaked
                asyncio.get_running_loop().call_later(lag_s, card.dying.pop, self.pid)
        self.instance = structs.replace(self.instance, state=State.UNLOADING)
        await self.worker.placer.give_back(self)


def first_gpu_layer(placed: Placement, resident: _Resident) -> int:
    return resident.worker.requirements(resident.instance).n_layers - sum(placed.layers)


# ---- the pool


class _Sim:
    def __init__(self, sequence: Play) -> None:
        self.sequence = sequence
        self.seen: Counter[str] = Counter()
        self.is_known = sequence.named  # whether the driver reports the pids that the worker knows
        self.tasks: set[asyncio.Task[None]] = set()
        self.pids = 100
        self.number = 0
        self.workers: dict[str, _Worker] = {}
        self.cards: list[Card] = []
        self.apis: list[Roster] = []
        self.residents: list[_Resident] = []

    def next_pid(self) -> int:
        self.pids += 1
        return self.pids

    async def run(self) -> Counter[str]:
        at_start = iter(self.sequence.at_start_mib)
        for name, sizes in CARDS_MIB.items():
            cards = [Card(f"GPU-{name}-{i}", mib, next(at_start)) for i, mib in enumerate(sizes)]
            self.cards += cards
            self.workers[name] = _Worker(self, name, cards)
        workers: Any = SimpleNamespace(lease_s=10.0, all=self._published, catalog=self._catalog)
        self.apis = [Roster(workers, Settings()) for _ in range(2)]
        for api in self.apis:
            await api.refresh()
        for step in self.sequence.steps:
            await self._do(step)
            await self._calm(0.0)
        await self._end()
        return self.seen

    async def _published(self) -> list[Any]:
        return [
            SimpleNamespace(name=worker.name, epoch="e", snapshot=worker.published) for worker in self.workers.values()
        ]

    async def _catalog(self, _: str) -> list[Model]:
        return [*MODELS.values()]

    async def _calm(self, seconds: float) -> None:
        """Let time pass; raise the exceptions of finished tasks."""
        await asyncio.sleep(seconds)
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.discard(task)
            task.result()

    async def _do(self, step: Step) -> None:
        match step:
            case Load():
                self._begin(step)
            case Fill():
                await self._fill(step)
            case Unload():
                if (resident := self._live(step.which)) is not None:
                    resident.stop.set()
            case Crash():
                if (resident := self._live(step.which)) is not None:
                    resident.leaks = step.leaks
                    resident.crash.set()
            case Use():
                resident = self._live(step.which)
                if resident is not None and resident.instance.state is State.LOADED:
                    resident.instance = structs.replace(resident.instance, used_at=asyncio.get_running_loop().time())
            case Wait():
                await self._calm(step.seconds)
            case Foreign():
                self._foreign(self.cards[step.card], step.mib * MIB)
            case Unnamed():
                self.cards[step.card].unnamed //= 2
                self.cards[step.card].fell = True
            case Publish():
                worker = [*self.workers.values()][step.worker]
                await worker.placer.look()
                await worker.announce()
            case Refresh():
                await self.apis[step.api].refresh()

    def _live(self, which: int) -> _Resident | None:
        live = [one for worker in self.workers.values() for one in worker.held.values()]
        return live[which % len(live)] if live else None

    def _foreign(self, card: Card, n_bytes: int) -> None:
        worker = next(worker for worker in self.workers.values() if card.id in worker.cards)
        if not self.is_known and worker.is_moving(card.id):
            return
        card.foreign = min(n_bytes, card.foreign + card.free)
        if worker.safe()[card.id] < 0:  # the foreign program holds memory that was reserved or kept free
            for one in worker.held.values():
                one.robbed.add(card.id)

    def _begin(self, step: Load) -> asyncio.Task[None]:
        self.number += 1
        task = asyncio.get_running_loop().create_task(self._request(step, f"load_{self.number}"))
        self.tasks.add(task)
        return task

    async def _request(self, step: Load, id_: str) -> None:
        """Carry out a load from its request to its end, with the placement of an API and the retries of the sweep."""
        gpu = UNSET if step.split is None else GPURequest(split=step.split)
        key = f"{step.model}-unsure" if step.error else step.model
        request = LoadRequest(model=key, context_length=256, gpu=gpu, ttl_seconds=1e6 if step.ttl else UNSET)
        refused: list[str] = []
        api = self.apis[step.api]
        while True:
            candidates, _ = api.candidates(request, without=refused)
            if not candidates:
                break
            best, placed = api.choose(candidates, request)
            if placed is None and refused:
                break
            worker = self.workers[best.worker]
            instance = Instance(
                id=id_, instance_id=id_, model=key, key=key, type="llm", worker=worker.name, request=request
            )
            api.placed(instance, placed)
            resident = worker.held[id_] = _Resident(worker, instance, step)
            await resident.live()
            if resident.outcome != "refused":
                return
            self.seen["refused"] += 1
            refused.append(worker.name)
            await api.refresh()
        self.seen["given up"] += 1

    async def _fill(self, step: Fill) -> None:
        """Fill the pool, then check that no worker has room for a load that was given up."""
        await self._quiet()
        model = step.model
        for _ in range(8 if step.ttl else 40):
            given_up = self.seen["given up"]
            task = self._begin(Load(model, 0, step.ttl, None, 0))
            until = asyncio.get_running_loop().time() + 120.0
            while not task.done() and not self._has_loaded(f"load_{self.number}"):
                assert asyncio.get_running_loop().time() < until, "a load has not ended"
                await self._calm(LOAD_S)
            await self._calm(0.0)
            if self.seen["given up"] > given_up and self.sequence.lag_s > Timing().agree_s:
                return  # the memory of evicted instances was freed too late
            if self.seen["given up"] > given_up:
                request = LoadRequest(model=model, context_length=256)
                instance = Instance(id="", model=model, key=model, type="llm", worker="", request=request)
                for worker in self.workers.values():
                    assert not worker.has_room(instance, worker.placer.held()), f"{worker.name} has room for {model}"
                self.seen["filled"] += 1
                return
            await self._publish_all()

    def _has_loaded(self, id_: str) -> bool:
        return any(
            id_ in worker.held and worker.held[id_].instance.state is State.LOADED for worker in self.workers.values()
        )

    async def _publish_all(self) -> None:
        for worker in self.workers.values():
            await worker.placer.look()
            await worker.announce()
        for api in self.apis:
            await api.refresh()

    async def _quiet(self) -> None:
        """Wait until no instance is loading or leaving."""
        for _ in range(200):
            await self._calm(1.0)
            live = [one for worker in self.workers.values() for one in worker.held.values()]
            dying = [pid for card in self.cards for pid in card.dying]
            if not dying and all(one.instance.state is State.LOADED and not one.stop.is_set() for one in live):
                await self._publish_all()
                return
        raise Stuck

    async def _end(self) -> None:
        """Unload everything, and check that all memory is free."""
        await self._quiet()
        while self.tasks:
            for worker in self.workers.values():
                for one in worker.held.values():
                    one.stop.set()
            await self._quiet()
        for card in self.cards:
            card.foreign = card.unnamed = 0
        await self._publish_all()
        assert not self.tasks, self.tasks
        for worker in self.workers.values():
            assert not worker.placer.ledger.reservations
            for device in worker.placer.devices():
                assert device.available_bytes == device.total_bytes - KEPT_MIB * MIB
                assert (device.reserved_bytes, device.leaked_bytes) == (0, 0)


def _model(key: str, sizes_mib: list[int], architecture: str) -> Model:
    *blocks, output = [mib * MIB for mib in sizes_mib]
    return Model(
        key=key,
        base=key,
        variant="",
        shards=[],
        size_bytes=sum(blocks) + output,
        architecture=architecture,
        max_context_length=256,
        dimensions=Dimensions(
            block_count=len(blocks),
            embedding_length=64,
            head_count=4,
            head_count_kv=4,
            key_length=16,
            value_length=16,
            feed_forward_length=128,
            vocabulary=100,
        ),
        weights=Weights(
            input_bytes=MIB, repeating_bytes=sum(blocks), output_bytes=output, has_output=True, block_bytes=blocks
        ),
    )


MODELS = {
    key: _model(key, sizes, architecture)
    for name, sizes in SIZES_MIB.items()
    for key, architecture in ((name, "llama"), (f"{name}-unsure", "deepseek2"))
}
