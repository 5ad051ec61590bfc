"""The requirements of a load with several context lengths: by the formula where it was checked, else by the engine.

An API asks the engine of a worker through the queue, and a worker asks its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from msgspec import structs

from shared.memory.estimate import CELLS, Requirements, requirements_of
from shared.memory.placement import Constraints
from shared.memory.plan import plan
from shared.schema.http import LoadRequest
from shared.schema.memory import Usage
from shared.schema.model import Model
from shared.schema.snapshot import Sizing
from shared.settings import Settings

AT_ONCE = 16  # context lengths that a runner tries while it has the model open: a few milliseconds each
MOST_TOKENS = 1 << 22  # a dry run takes 50 bytes per token for the cells of the cache, and 0.2 s here

# Does a dry run for each of the context lengths.  Returns None if the engine cannot say what they would take.
Ask = Callable[[Sizing], Awaitable[list[list[Usage]] | None]]


class Figures:
    """What a load takes on a worker, by context length."""

    def __init__(
        self,
        request: LoadRequest,
        model: Model,
        settings: Settings,
        gpus: Sequence[str],
        ask: Ask,
        *,
        with_cpu: bool = True,
    ) -> None:
        """`gpus`: those of the worker that the load may use.  `with_cpu`: its CPU may also take all layers, or some."""
        self._request = request
        self._model = model
        self._settings = settings
        self._ask = ask
        planned = plan(request, model, settings)
        self.context_length = planned.n_ctx
        self.formula = requirements_of(model, planned)
        n_layers = self.formula.n_layers
        n = Constraints.of(request.gpu).n_layers(self.formula)
        # GPUs, their layers, and the first of these layers.
        self._places: list[tuple[list[str], list[int], int]] = []
        if with_cpu or not gpus or not n:
            self._places.append(([], [], n_layers))
        if gpus and n:
            self._places.append(([gpus[0]], [n], n_layers - n))
        self._is_answered = True
        self._known: dict[int, Requirements] = {}

    @property
    def is_checked(self) -> bool:
        """Whether the formula was checked for the request, on one device."""
        return not any(self._is_asked(self.formula, place) for place in self._places)

    async def requirements(self) -> Requirements:
        """Return the requirements of the request."""
        (requirements,) = await self.of([self.context_length])
        return requirements

    async def of(self, context_lengths: Sequence[int]) -> list[Requirements]:
        """Return the requirements for each context length.  Those that the engine does not report are the formula's.

        After a question without an answer, the engine is not asked again.
        """
        new = {n: self._by_formula(n) for n in context_lengths if n not in self._known}
        for place in self._places:
            gpus, layers, first = place
            asked = [n for n, formula in new.items() if self._is_asked(formula, place) and n <= MOST_TOKENS]
            if not asked or not self._is_answered:
                continue
            sizing = Sizing(
                request=self._request,
                key=self._model.key,
                source=self._model.source,
                gpus=gpus,
                layers=layers,
                context_lengths=asked,
            )
            usages = await self._ask(sizing)
            self._is_answered = usages is not None
            for n, usage in zip(asked, usages or [], strict=self._is_answered):
                new[n] = new[n].measured(first, usage)
        self._known |= new
        return [self._known[n] for n in context_lengths]

    async def largest_context_length(self, has_room: Callable[[Requirements], bool], *, fits: bool) -> int | None:
        """Return the largest context length that fits: a multiple of 256, or the model's maximum; None if none fits.

        `fits`: whether the request does.  The result is at least its context length if it fits, else less.  Relies on
        more context never taking less memory.
        """
        asked, most = self.context_length, self._model.max_context_length
        if fits and (asked == most or has_room((await self.of([most]))[0])):
            return most
        # In multiples of CELLS: `low` fits or is 0, and `high` does not fit.
        low, high = (asked // CELLS, -(-most // CELLS)) if fits else (0, -(-asked // CELLS))
        at_once = 1 if self.is_checked else AT_ONCE
        while high - low > 1:
            n = min(at_once, high - low - 1)
            steps = [low + (high - low) * (i + 1) // (n + 1) for i in range(n)]
            rooms = [has_room(one) for one in await self.of([step * CELLS for step in steps])]
            n_fit = rooms.index(False) if False in rooms else n
            low, high = [low, *steps][n_fit], [*steps, high][n_fit]
        return max(low * CELLS, asked if fits else 0) or None

    def _by_formula(self, context_length: int) -> Requirements:
        request = structs.replace(self._request, context_length=context_length)
        return requirements_of(self._model, plan(request, self._model, self._settings))

    @staticmethod
    def _is_asked(formula: Requirements, place: tuple[list[str], list[int], int]) -> bool:
        gpus, _, first = place
        return not formula.is_exact(len(gpus), first)
