"""Streamed answers of Loadstone and of llama-server, set alike: the two servers, and the client of both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
from msgspec import Struct

from bench.__main__ import OUT
from bench.streams import Round, Stream
from bench.subjects import Failure, free_port, running
from shared.schema.http import KVCacheType

LLAMA_SERVER = OUT / "peers/build/bin/llama-server"  # as `make bench-inference` builds it
START_S, REPLY_S = 120.0, 600.0
ALL_LAYERS = "99"

Who = Literal["Loadstone", "llama-server"]


class Setup(Struct, frozen=True, kw_only=True):
    """The parameters of both servers, in llama.cpp's terms."""

    n_ctx: int
    n_batch: int
    n_ubatch: int
    parallel: int
    n_threads: int  # for llama-server; Loadstone's runner decides alike
    on_gpu: bool = False  # all layers on the first GPU
    flash_attention: bool = True
    kv_type: KVCacheType = "f16"

    def load(self, key: str) -> dict[str, object]:
        """Return the body of Loadstone's request to load a model."""
        kv_type = {} if self.kv_type == "f16" else {"kv_cache_type": self.kv_type}
        return {
            "model": key,
            "context_length": self.n_ctx,
            "eval_batch_size": self.n_batch,
            "physical_batch_size": self.n_ubatch,
            "parallel": self.parallel,
            "flash_attention": self.flash_attention,
            "echo_load_config": True,
            **kv_type,
            **({"gpu": {"offload": "max"}} if self.on_gpu else {}),
        }

    def check(self, loaded: dict[str, Any]) -> None:
        """Raise Failure unless the reply to the load shows what was asked for."""
        asked, applied = self.load(""), loaded["load_config"]
        wrong = {name: applied.get(name) for name in asked if name in applied and applied[name] != asked[name]}
        if wrong:
            raise Failure(f"Loadstone applied another config than the requested one: {wrong}")

    def argv(self, program: Path, model: Path, port: int) -> list[str]:
        """Return the command line of llama-server.

        Without its cache of finished prompts in memory, which Loadstone does not have; it keeps the prompts of idle
        slots, as Loadstone does.
        """
        words: dict[str, object] = {
            "--model": model,
            "--host": "127.0.0.1",
            "--port": port,
            "--ctx-size": self.n_ctx,
            "--batch-size": self.n_batch,
            "--ubatch-size": self.n_ubatch,
            "--parallel": self.parallel,
            "--threads": self.n_threads,
            "--flash-attn": "on" if self.flash_attention else "off",
            "--cache-type-k": self.kv_type,
            "--cache-type-v": self.kv_type,
            "--cache-ram": 0,
            "--gpu-layers": ALL_LAYERS if self.on_gpu else 0,
            "--fit": "off",
        }
        return [str(program), "--kv-unified", *(str(word) for pair in words.items() for word in pair)]

    @property
    def service_variables(self) -> dict[str, str]:
        return {"LOADSTONE_DEVICES": "0,cpu" if self.on_gpu else "cpu"}


class Subject(Struct, frozen=True):
    name: Who
    port: int


class Client:
    """The process that sends the requests: `bench.streams`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def streams(self, subject: Subject, bodies: list[str], path: str = "/v1/chat/completions") -> list[Stream]:
        assert self._process.stdin
        assert self._process.stdout
        task = Round(port=subject.port, path=path, bodies=bodies, within_s=REPLY_S)
        self._process.stdin.write(msgspec.json.encode(task).decode() + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Failure("the client has exited")
        answers = msgspec.json.decode(line, type=list[Stream])
        for answer in answers:
            if answer.error:
                raise Failure(f"{subject.name}: no whole answer: {answer.error}")
        return answers


def gpus(on_gpu: bool) -> dict[str, str]:
    """Return the environment of a program that uses the engine: the first GPU, as NVML and Loadstone count, or none."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0" if on_gpu else ""}


def look_at(program: Path, *, on_gpu: bool) -> str:
    """Return the version of a llama-server and the devices that it uses.  Raises Failure if it cannot be used."""

    def said(word: str) -> list[str]:
        try:
            done = subprocess.run(
                [str(program), word],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=START_S,
                env={**os.environ, **gpus(on_gpu)},
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise Failure(f"llama-server cannot be used: {e}") from e
        if done.returncode:
            raise Failure(f"llama-server cannot be used: {done.stdout.strip() or f'status {done.returncode}'}")
        return done.stdout.splitlines()

    versions = [line.removeprefix("version: ") for line in said("--version") if line.startswith("version: ")]
    devices = [line.strip() for line in said("--list-devices") if re.match(r"  \w+: ", line)]
    if on_gpu and not devices:
        raise Failure("llama-server cannot be used: it sees no GPU")
    return ", ".join([*versions, *devices])


@contextmanager
def client(log: IO[str]) -> Iterator[Client]:
    with running([sys.executable, "-m", "bench.streams"], log) as process:
        yield Client(process)


@contextmanager
def llama_server(program: Path, model: Path, setup: Setup, log: IO[str]) -> Iterator[Subject]:
    """Run llama-server, which has loaded its model."""
    port = free_port()
    with running(setup.argv(program, model, port), log, gpus(setup.on_gpu)) as process:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            if process.poll() is not None:
                raise Failure(f"llama-server has exited with status {process.returncode}; see {log.name}")
            time.sleep(0.1)
        else:
            raise Failure(f"llama-server did not become ready; see {log.name}")
        yield Subject("llama-server", port)
