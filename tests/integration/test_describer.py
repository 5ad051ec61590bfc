"""The process that asks the hub: what it may do, and its end."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from msgspec import msgpack, structs

import worker.hub.describer
from shared.download import InspectRequest
from shared.schema.model import Model
from shared.schema.snapshot import Described
from shared.synthetic import models as synthetic
from tests.support.hub import LocalHub
from tests.support.service import processes
from worker.hub.client import Access
from worker.hub.describer import Describer
from worker.hub.protocol import Describe, Description


def question(repository: str) -> bytes:
    return msgpack.encode(InspectRequest(repository=repository, revision="main", quantization=None))


QUESTION = question("acme/tiny")


def children() -> list[int]:
    return [one.pid for one in processes() if one.parent == os.getpid() and "worker.hub.process" in one.words]


async def answer(access: Access | None, directory: Path) -> Described:
    return msgpack.decode(await Describer(access, directory / "headers").answer(QUESTION), type=Described)


async def test_a_model_of_the_hub_is_described(tmp_path: Path) -> None:
    file = synthetic.tiny_llama(tmp_path / "tiny-F16.gguf")
    with LocalHub().running() as hub:
        hub.add("acme/tiny", file.name, file)
        described = await answer(Access(endpoint=hub.endpoint, hosts=(hub.cdn,)), tmp_path)
        assert hub.sent[file.name] <= file.stat().st_size
    assert described.model is not None
    assert (described.model.key, described.model.problem) == ("acme/tiny", None)
    assert [one.name for one in described.quantizations] == ["F16"]
    assert not children()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda hub: hub.repositories.clear(), "does not exist on the hub"),
        (lambda hub: setattr(hub, "gated", True), "access is restricted"),
        (lambda hub: hub.listed_sizes.update({"tiny-F16.gguf": 1 << 40}), "is not the one that the hub lists"),
        (lambda hub: hub.cut_after.append(10), "broke"),
        (lambda hub: setattr(hub, "redirect", "http://127.0.0.1:9/x"), "not an allowed host"),
    ],
    ids=["absent", "gated", "lying", "cut", "redirecting"],
)
async def test_a_model_that_cannot_be_read_has_a_reason(
    tmp_path: Path, spoil: Callable[[LocalHub], object], reason: str
) -> None:
    file = synthetic.tiny_llama(tmp_path / "tiny-F16.gguf")
    with LocalHub().running() as hub:
        hub.add("acme/tiny", file.name, file)
        spoil(hub)
        described = await answer(Access(endpoint=hub.endpoint, hosts=(hub.cdn,)), tmp_path)
    assert described.error is not None
    assert reason in described.error.message


async def test_a_hub_that_ignores_ranges_is_read_to_the_header(tmp_path: Path) -> None:
    (file,) = synthetic.sparse_shape(tmp_path / "big-Q4_0.gguf", "qwen3-0.6b", vocabulary=1000)
    with LocalHub().running() as hub:
        hub.add("acme/tiny", file.name, file)
        hub.ignores_ranges = True
        described = await answer(Access(endpoint=hub.endpoint, hosts=(hub.cdn,)), tmp_path)
        assert hub.sent[file.name] < file.stat().st_size / 2
    assert described.model is not None
    assert described.model.weights is not None


async def test_a_hub_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(worker.hub.describer, "WITHIN_S", 5.0)
        described = await answer(Access(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path)
    assert described.error is not None
    assert described.error.message == "The hub did not answer in time."
    assert not children()


async def test_a_cancelled_question_leaves_no_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        asking = asyncio.create_task(answer(Access(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path))
        async with asyncio.timeout(60):
            connection, _ = await asyncio.get_running_loop().sock_accept(silent)
        assert children()
        asking.cancel()
        await asyncio.wait([asking])
        connection.close()
    assert not children()


async def test_an_unreachable_hub_is_not_tried_again_at_once(tmp_path: Path) -> None:
    """Each question about a name that no worker knows would wait for a connection."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        describer = Describer(Access(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}"), tmp_path / "headers")
        first = msgpack.decode(await describer.answer(QUESTION), type=Described)
        assert first.error is not None
        assert "cannot be reached" in first.error.message
        server.listen()
        server.setblocking(False)
        assert msgpack.decode(await describer.answer(question("acme/other")), type=Described) == first
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_an_unreachable_hub_is_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.hub.describer, "UNREACHABLE_S", 0.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        describer = Describer(Access(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}"), tmp_path / "headers")
        await describer.answer(QUESTION)
        server.listen()
        server.setblocking(False)
        asking = asyncio.create_task(describer.answer(QUESTION))
        async with asyncio.timeout(60):
            connection, _ = await asyncio.get_running_loop().sock_accept(server)
        connection.close()
        described = msgpack.decode(await asking, type=Described)
    assert described.error is not None
    assert "broke" in described.error.message


async def test_the_headers_of_the_last_models_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are all that an engine needs for a dry run, and take no more space."""
    monkeypatch.setattr(worker.hub.describer, "KEPT_N", 1)
    (tmp_path / "headers/stale").mkdir(parents=True)
    with LocalHub().running() as hub:
        describer = Describer(Access(endpoint=hub.endpoint, hosts=(hub.cdn,)), tmp_path / "headers")
        models = []
        for repository in ("acme/tiny", "acme/other", "acme/tiny"):
            for shard in synthetic.sparse_shape(tmp_path / "big-Q4_0.gguf", "qwen3-0.6b", shards=2, vocabulary=1000):
                hub.add(repository, shard.name, shard)
            models.append(msgpack.decode(await describer.answer(question(repository)), type=Described).model)
    tiny, other, again = models
    assert describer.of(other) is None
    kept = describer.of(tiny)
    assert kept is not None
    assert kept == describer.of(again)
    files = [os.stat(shard) for shard in kept.shards]
    assert [file.st_size for file in files] == [file.size for file in kept.files]
    assert sum(file.st_blocks * 512 for file in files) < 1 << 20
    assert [path.name for path in (tmp_path / "headers").iterdir()] == [Path(kept.shards[0]).parent.name]


async def test_headers_elsewhere_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker removes the directory of headers that are old, and an engine reads them."""
    (tmp_path / "victim").mkdir()
    monkeypatch.setattr(worker.hub.describer, "KEPT_N", 1)
    model = Model(key="a/b", base="a/b", variant="", shards=["a/b/c.gguf"])

    async def hostile(ask: Describe) -> AsyncIterator[Description]:
        described = Described(model=structs.replace(model, shards=[ask.request.repository]))
        yield Description(described, [str(tmp_path / "victim/x")])

    monkeypatch.setattr(worker.hub.describer, "answers", hostile)
    describer = Describer(Access(), tmp_path / "headers")
    for repository in ("a/b", "a/c"):
        await describer.answer(question(repository))
    kept = describer.of(structs.replace(model, shards=["a/c"]))
    assert kept is not None
    assert [Path(shard).parent.parent for shard in kept.shards] == [tmp_path / "headers"]
    assert (tmp_path / "victim").is_dir()


@pytest.mark.parametrize("said", [r"\377\377\377\377", r"\1\0\0\0\301"], ids=["too long", "no message"])
async def test_a_process_that_says_nonsense_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\nprintf '{said}'\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    described = await answer(Access(), tmp_path)
    assert described.error is not None
    assert not [one for one in processes() if one.parent == os.getpid() and "sleep" in one.words]


async def test_a_worker_without_a_hub_says_so(tmp_path: Path) -> None:
    described = await answer(None, tmp_path)
    assert described.error is not None
    assert described.error.message == "The worker has no hub."
