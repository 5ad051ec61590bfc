"""An attacker's code in the parser of a file, in a runner that uses a real GPU and whose driver opens files."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

import worker.runner.warm
from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.settings import Settings
from tests.gpu.conftest import LONG, TINY
from tests.gpu.gpus import GPUs
from tests.gpu.watched import LOAD_S
from tests.support import attack
from tests.support.waiting import until
from worker.runner.parameters import plan
from worker.runner.protocol import Progress, Ready
from worker.runner.warm import Runners

pytestmark = [pytest.mark.usefixtures("forkserver"), attack.NEEDED]


@pytest.mark.parametrize("is_warm", [True, False])
async def test_a_load_works_and_an_attacker_in_it_gets_nothing(
    gpus: GPUs,
    gpu: str,
    models: dict[str, Model],
    models_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_warm: bool,
) -> None:
    """A runner that is warm has started the driver, which then has threads of its own."""
    for name, value in gpus.environ().items():
        monkeypatch.setenv(name, value)
    model = models[TINY]
    assert model.dimensions
    load = plan(
        LoadRequest(model=TINY), model, Settings(models_dir=models_dir), [gpu], [model.dimensions.block_count + 1]
    )
    with attack.targets(tmp_path, models_dir / LONG / "long-Q8_0.gguf", {}) as targets:
        monkeypatch.setattr(worker.runner.warm, "run_child", partial(attack.run_child, targets, "loading"))
        runners = Runners(LOAD_S, visible=gpu if is_warm else None)
        async with asyncio.timeout(LOAD_S):
            runner = await runners.take()
        try:
            async with asyncio.timeout(LOAD_S):
                await runner.send(load)
                while isinstance(message := await runner.receive(), Progress):
                    pass
            assert isinstance(message, Ready), (message, list(runner.output))
            await until(lambda: attack.report(runner) is not None, "the attacker is done")
            results = attack.report(runner) or {}
            assert {name: result for name, result in results.items() if result not in attack.REFUSALS} == {}
        finally:
            runner.kill()
            await runner.reaped()
            await runners.close()
