"""Agents that people run, unmodified and without a terminal: a call, what it did, and the answer to that.

Each asks a model that recites a call of one of the agent's tools, and after its result another text.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.reciting import MARKER, reciting
from tests.support.service import Service, up

CONTEXT_LENGTH = 131_072
SECRET, ANSWER, QUESTION = "The fact is 42.", "The file was read: DONE-42.", "Read fact.txt and tell me the fact."
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if '<tool_response>' in messages[-1].content %}" + MARKER + "{% endif %}{% endif %}"
)
CALLS: dict[str, tuple[str, Any]] = {  # by model
    "acme/claude": ("Bash", {"command": "cat fact.txt", "description": "Show it"}),
    "acme/codex": ("exec_command", {"cmd": "cat fact.txt"}),
}
RUN_S = 300


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("agents")
    for key, (name, arguments) in CALLS.items():
        call = json.dumps({"name": name, "arguments": arguments})
        text = f"I will look.\n<tool_call>\n{call}\n</tool_call>"
        metadata = {"llama.context_length": CONTEXT_LENGTH}
        reciting(home / f"models/{key}/recites-f32.gguf", text, TEMPLATE, then=ANSWER, metadata=metadata)
    with up(home, LOADSTONE_JIT_CONTEXT=str(CONTEXT_LENGTH)) as service:
        yield service


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a directory with the file that the tools read, beside the home directory of the agent."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work/fact.txt").write_text(SECRET)
    return tmp_path / "work"


def run(work: Path, *command: str, **environ: str) -> str:
    """Return what an agent writes."""
    home = work.parent / "home"
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **environ},
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_claude_code_runs_a_call(agents: Path, service: Service, work: Path) -> None:
    options = ("--output-format", "stream-json", "--verbose", "--tools", "Bash", "--allowedTools", "Bash")
    written = run(
        work,
        *(str(agents / "claude"), "-p", QUESTION, *options),
        ANTHROPIC_BASE_URL=service.url,
        ANTHROPIC_AUTH_TOKEN="none",
        ANTHROPIC_MODEL="acme/claude",
        ANTHROPIC_SMALL_FAST_MODEL="acme/claude",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )
    events = [json.loads(line) for line in written.splitlines()]
    assert SECRET in json.dumps([event for event in events if event["type"] == "user"])
    assert (events[-1]["subtype"], events[-1]["result"], events[-1]["num_turns"]) == ("success", ANSWER, 2)
    assert events[-1]["usage"]["cache_read_input_tokens"] > 1000, "the second request reuses the first"


def test_codex_runs_a_call(agents: Path, service: Service, work: Path) -> None:
    settings = {
        "model": '"acme/codex"',
        "model_provider": '"loadstone"',
        "model_providers.loadstone": f'{{name="Loadstone", base_url="{service.url}/v1", wire_api="responses"}}',
    }
    options = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json")
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    (work.parent / "home/.codex").mkdir()
    written = run(work, str(agents / "codex"), "exec", *options, *words, QUESTION)
    events = [json.loads(line) for line in written.splitlines()]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    (command,) = (item for item in items if item["type"] == "command_execution")
    assert (command["aggregated_output"], command["exit_code"]) == (SECRET, 0)
    assert [item["text"] for item in items if item["type"] == "agent_message"][-1] == ANSWER
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["cached_input_tokens"] > 1000
