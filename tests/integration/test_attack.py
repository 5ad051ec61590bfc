"""An attacker's code in a runner and in a helper gets nothing but its model and its requests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from msgspec import json, structs

import worker.runner.warm
from shared.channel.messages import Ended
from shared.synthetic.models import tiny_llama
from tests.support import attack
from tests.support.agents import Begin, released
from tests.support.attack import REFUSALS, Targets, When
from tests.support.loaded import Loaded
from tests.support.service import below, open_files
from tests.support.waiting import until
from worker.chat import helper
from worker.chat.code import ChatError, Message
from worker.chat.handle import Helper
from worker.chat.protocol import Prompt, Template
from worker.engine.confine import confine
from worker.runner.process import MOST_UNREAD, Runner, Unreadable
from worker.runner.protocol import NO_GPU
from worker.runner.warm import Runners
from worker.timing import Timing

DEADLINE_S = 60.0
LISTENER = "worker.listener.server"

pytestmark = [pytest.mark.usefixtures("forkserver"), attack.NEEDED]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "p/llama/llama-f16.gguf", tokenizer="bpe")
    tiny_llama(root / "p/other/other-f16.gguf")
    return root


@pytest.fixture
def targets(models_dir: Path, tmp_path: Path, redis_server: str) -> Iterator[Targets]:
    """What is beside a runner: this process is its worker."""
    redis = redis_server.removeprefix("unix://").partition("?")[0]
    with attack.targets(tmp_path, models_dir / "p/other/other-f16.gguf", {"Redis": redis}) as made:
        yield made


@asynccontextmanager
async def attacked(
    when: When, targets: Targets, begin: Begin, tmp_path: Path, patched: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Loaded, Targets]]:
    """Run a worker whose runners have an attacker in them, who knows where the worker's listener is."""
    path = tmp_path / "worker.sock"
    sockets = {**targets.sockets, "the listener": str(path)}
    targets = structs.replace(targets, sockets=sockets)
    patched.setattr(worker.runner.warm, "run_child", partial(attack.run_child, targets, when))
    agent = await begin()
    with agent.listener.bound([path]):
        listening = asyncio.create_task(agent.listener.run())
        loaded = Loaded(agent)
        try:
            yield loaded, targets
        finally:
            await loaded.channels.close()
            listening.cancel()
            await asyncio.wait([listening])


def descriptors(pid: int) -> str:
    return " ".join(open_files(pid, above=2))


async def reported(runner: Runner) -> dict[str, str]:
    await until(lambda: attack.report(runner) is not None, "the attacker is done")
    return attack.report(runner) or {}


async def test_an_attacker_in_a_loaded_runner(
    targets: Targets, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with attacked("loaded", targets, begin, tmp_path, monkeypatch) as (loaded, _):
        instance = await loaded.load()
        results = await reported(loaded.runners[instance.id])
        assert {name: result for name, result in results.items() if result not in REFUSALS} == {}
        assert isinstance((await loaded.ask(instance))[-1], Ended)
        (listener,) = [one for one in below(os.getpid()) if LISTENER in one.words]
        await until(lambda: "pipe" not in descriptors(listener.pid), "the listener keeps nothing of what it sent")
        assert [one for one in below(os.getpid()) if LISTENER in one.words] == [listener]
        loaded.agent.stop(instance.id)
        await released(loaded.agent, instance.id)
    assert (tmp_path / "victim").read_text() == "data of the worker"
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "made").exists()


async def test_an_attacker_in_the_parser_of_a_file(
    targets: Targets, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with attacked("loading", targets, begin, tmp_path, monkeypatch) as (loaded, _):
        instance = await loaded.load()
        results = await reported(loaded.runners[instance.id])
        assert {name: result for name, result in results.items() if result not in REFUSALS} == {}
        assert isinstance((await loaded.ask(instance))[-1], Ended)


@pytest.mark.parametrize("bad", [attack.flood, attack.boast])
async def test_a_worker_bounds_what_it_reads(bad: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.runner.warm, "run_child", bad)
    runners = Runners(10.0, visible=NO_GPU, timing=Timing(grace_s=0.1))
    runner = await runners.take()
    await until(runner._listening.done, "it is not read any more")
    received = 1
    async with asyncio.timeout(DEADLINE_S):
        while not isinstance(await runner.receive(), Unreadable):
            received += 1
    assert received <= MOST_UNREAD + 2
    await runner.stop()
    await runners.close()


def test_an_attacker_in_a_helper(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    def render(_: object, conversation: bytes, output: object = None) -> Prompt:
        if conversation == helper.TRIAL:  # before the helper gives up what it needs to start
            return Prompt(text="", stops=[], shown=[], source=None, is_open=False, before=Message())
        results = attack.outcomes({**attack.attempts(targets), **attack.of_debuggers(targets)})
        raise ChatError(json.encode(results).decode())

    monkeypatch.setattr(helper.Chat, "_render", render)
    running = Helper(confine)
    try:
        running.compile(Template(source="Hello")).result()
        with pytest.raises(ChatError) as said:
            asyncio.run(running.render(b"{}"))
        results = json.decode(str(said.value), type=dict[str, str])
        assert {name: result for name, result in results.items() if result not in REFUSALS} == {}
        with pytest.raises(ChatError):  # the same helper answers
            asyncio.run(running.render(b"{}"))
    finally:
        running.close()


def test_the_attack_succeeds_elsewhere(targets: Targets) -> None:
    """Otherwise its failure in a runner would say nothing."""
    command = [sys.executable, "-m", "tests.support.attack", json.encode(targets).decode()]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    results = json.decode(done.stdout, type=dict[str, str])
    assert {name: result for name, result in results.items() if result} == {}
