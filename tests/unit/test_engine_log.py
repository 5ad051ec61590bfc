"""The engine's log as it is kept: clients read it, and it names no directory of the host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from worker.engine_log import EngineLog
from worker.runner.output import Output


class Instances:
    """Keeps the text that would go to Redis."""

    text = ""

    async def write_engine_log(self, id_: str, text: str, worker: str) -> None:
        self.text = text


async def test_engine_log_names_no_directory_of_the_host() -> None:
    instances: Any = Instances()
    runner: Any = SimpleNamespace(output=Output())
    runner.output.append("failed to open GGUF file '/srv/models/p/m/m.gguf'")
    runner.output.append("failed to open GGUF file '/mnt/models/p/n/n.gguf'")
    runner.output.append("/opt/venv/lib/libggml.so: GGML_ASSERT(n > 0) failed")
    log = EngineLog(instances, "load_1", "w", [Path("/srv/models"), Path("/mnt/models")], 0.0)
    await log.save(runner)
    assert instances.text.splitlines()[1:] == [
        "failed to open GGUF file 'p/m/m.gguf'",
        "failed to open GGUF file 'p/n/n.gguf'",
        "libggml.so: GGML_ASSERT(n > 0) failed",
    ]
