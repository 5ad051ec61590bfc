"""The client commands, such as `loadstone load`, run as users run them against a running service."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from cli.completion import ANSWER_S
from shared.synthetic import models as synthetic
from shared.units import size
from tests.support.chat import ENDLESS, begun, streaming
from tests.support.service import LOADSTONE, Running, Service, is_alive, tiny_quantized, until, up
from tests.support.terminal import Terminal
from tests.support.terminal import terminal as terminal_of

TINY, MOE, BERT, PAIR = "acme/tiny", "acme/moe", "nomic/bert", "acme/pair"
LONG, BROKEN = "acme/long", "acme/broken"
TOKEN = "t0ken-of-the-test"
ENDS_S = 60.0
ENDLESS_CONTEXT = 131_072  # long enough for an answer that lasts as long as a test needs it
# The stages of a load with a frozen runner: after a while the worker reports a phase.
FIRST_STAGES = ("starting", "metadata")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("commands")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    synthetic.tiny_moe(home / f"models/{MOE}/moe-f16.gguf")
    synthetic.tiny_llama(home / f"models/{LONG}/long-f16.gguf", metadata={"llama.context_length": 1 << 30})
    synthetic.tiny_llama(home / f"models/{BROKEN}/broken-f16.gguf", drop=["blk.1.ffn_up.weight"])
    synthetic.tiny_bert(home / f"models/{BERT}/bert-f32.gguf")
    for quantization in ("Q4_0", "Q8_0"):
        tiny_quantized(home / f"models/{PAIR}/pair-{quantization}.gguf", quantization)
    url = "http://127.0.0.1:1"  # the server ignores the variables of the client
    with up(home, token=TOKEN, LOADSTONE_API_TOKENS=TOKEN, LOADSTONE_URL=url, LOADSTONE_TOKEN="x") as service:
        until(lambda: all(model["params_string"] for model in service.models().values()), "every header has been read")
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the module's service; unload everything after the test."""
    yield running
    running.unload_all()


class Done:
    """A finished command; checks that its output contains no token and no traceback."""

    def __init__(self, command: Running) -> None:
        self.status = command.popen.wait(ENDS_S)
        self.out, self.err = command.stdout, command.stderr
        for text in (self.out, self.err):
            assert TOKEN not in text
            assert "Traceback" not in text

    def json(self) -> Any:
        """Parse stdout, which must be one JSON document."""
        return json.loads(self.out)

    def rows(self) -> list[list[str]]:
        """Return the cells of the table on stdout, without its headings."""
        return [re.split(r" {2,}", line.strip()) for line in self.out.splitlines()[1:]]


@contextmanager
def started(service: Service, *words: str, **variables: str) -> Iterator[Running]:
    """Run a command in the background; wait for its end when the block ends."""
    environ = {"LOADSTONE_URL": service.url, "LOADSTONE_TOKEN": TOKEN, **variables}
    command = Running(service.directory / "command", *words, environ=environ)
    try:
        yield command
        command.popen.wait(ENDS_S)
    finally:
        command.kill()


def run(service: Service, *words: str, **variables: str) -> Done:
    with started(service, *words, **variables) as command:
        return Done(command)


def result(service: Service, *words: str) -> Any:
    """Return the JSON document of a command that must succeed."""
    done = run(service, *words, "--json")
    assert (done.status, done.err if words[0] != "load" else "") == (0, "")
    return done.json()


def wait_until_loading(service: Service, command: Running) -> None:
    until(lambda: "starting" in command.stderr, "the command reports that the load has started")
    assert service.state(TINY) == "loading"


def last_job(service: Service) -> Any:
    return service.send("GET", "/api/v1/models/load/status").json()["jobs"][0]


# ---- each command once with text output and once with JSON


def test_ls_lists_the_models(service: Service) -> None:
    service.loaded(TINY)
    done = run(service, "ls")
    assert (done.status, done.err) == (0, "")
    assert done.out.split()[:6] == ["MODEL", "TYPE", "ARCHITECTURE", "QUANTIZATION", "SIZE", "MAX"]
    rows = {row[0]: row for row in done.rows()}
    assert set(rows) == {TINY, MOE, BERT, PAIR, LONG, BROKEN}
    assert rows[TINY][1:4] + rows[TINY][5:] == ["llm", "llama", "F16", "4096", "1", "@f16"]
    assert rows[BERT][1:4] == ["embedding", "-", "F32"]
    assert (rows[PAIR][3], rows[PAIR][-1]) == ("Q4_0", "@q4_0, @q8_0"), "the one that the key loads is first"
    assert result(service, "ls") == service.send("GET", "/api/v1/models").json()


def test_workers_lists_workers_with_devices_and_instances(service: Service) -> None:
    service.loaded(TINY)
    done, shown = run(service, "workers"), result(service, "workers")
    assert (done.status, done.err) == (0, "")
    ((name, state, device, *_, version, engine, chat),) = done.rows()
    (worker,) = shown["workers"]
    built = worker["engine"]
    assert (name, state, device, version) == (worker["name"], "ready", "CPU", worker["version"])
    assert engine == f"{built['llama_cpp_python']} ({built['llama_cpp_commit']}, {'+'.join(built['backends'])})"
    assert chat == ("no" if built["chat_unavailable"] else "yes")
    assert f"llama_cpp_commit={built['llama_cpp_commit']}" in service.stderr
    assert [instance["id"] for instance in worker["instances"]] == [TINY]


def test_load_prints_the_instance_id_and_its_progress(service: Service) -> None:
    done = run(service, "load", TINY, "--context-length", "1024")
    assert (done.status, done.out) == (0, f"{TINY}\n")
    lines = done.err.splitlines()
    assert any(re.fullmatch(rf"loadstone: {TINY}: \d+% weights, .*", line) for line in lines)
    assert lines[-1].startswith("loadstone: loaded in 0.")
    assert "context_length 1024" in lines[-1]
    assert "\x1b" not in done.err
    assert set(service.instances()) == {TINY}


def test_load_sends_every_option_and_prints_the_reply(service: Service) -> None:
    options = [
        "--context-length",
        "512",
        "--eval-batch-size",
        "64",
        "--physical-batch-size",
        "32",
        "--no-flash-attention",
        "--no-offload-kv-cache",
    ]
    reply = result(service, "load", MOE, *options, "--num-experts", "3", "--parallel", "2")
    assert reply.pop("load_time_seconds") > 0
    applied = {
        "context_length": 512,
        "eval_batch_size": 64,
        "physical_batch_size": 32,
        "parallel": 2,
        "flash_attention": False,
        "offload_kv_cache_to_gpu": False,
        "num_experts": 3,
    }
    ids = {"model_instance_id": MOE, "instance_id": MOE}
    assert reply == {"type": "llm", **ids, "status": "loaded", "load_config": applied}
    quantized = result(service, "load", MOE, "--kv-cache-type", "q8_0")
    assert quantized["load_config"]["kv_cache_type"] == "q8_0"


def test_the_same_idempotency_key_joins_the_load(service: Service) -> None:
    first = result(service, "load", TINY, "--idempotency-key", "once")
    assert result(service, "load", TINY, "--idempotency-key", "once") == first
    assert set(service.instances()) == {TINY}


def test_load_with_detach_prints_the_job_id_and_exits(service: Service) -> None:
    with service.frozen():
        done = run(service, "load", TINY, "--detach")
        (word,) = done.out.split()
        assert done.status == 0
        assert word == last_job(service)["job_id"]
        job = result(service, "load", TINY, "--detach")
        assert (job["job_id"], job["status"]) == (last_job(service)["job_id"], "queued")
    until(lambda: len(service.instances()) == 2, "both instances are loaded")


def test_ps_shows_loaded_instances_and_running_jobs(service: Service) -> None:
    service.loaded(BERT)
    with service.frozen(1):
        service.send("POST", "/api/v1/models/load", json={"model": TINY}, headers={"Prefer": "respond-async"})
        until(lambda: service.state(TINY) == "loading", "the model is loading")
        done, shown = run(service, "ps"), result(service, "ps")
        shown_jobs = result(service, "jobs")["jobs"]
    assert done.status == 0
    sizes = {key: size(model["size_bytes"]) for key, model in service.models().items()}
    (loaded, loading) = done.rows()
    jobs = {job["instance_id"]: job["job_id"] for job in reversed(shown_jobs)}
    assert (loaded[:3], loaded[4:]) == (
        [BERT, BERT, "loaded"],
        ["CPU", sizes[BERT], "0/512", "0", "0", "0.0", "100%", "-", jobs[BERT]],
    )
    assert (loading[:2], loading[4:]) == ([TINY, TINY], ["CPU", sizes[TINY], "-", "-", "-", "-", "0%", "-", jobs[TINY]])
    assert loading[2] in FIRST_STAGES
    (instance,), (job,) = shown["instances"], shown["jobs"]
    assert (instance["id"], instance["model"], instance["state"]) == (BERT, BERT, "loaded")
    assert (instance["job_id"], instance["size_bytes"]) == (jobs[BERT], service.models()[BERT]["size_bytes"])
    assert (job["instance_id"], job["status"]) == (TINY, "loading")
    until(lambda: TINY in service.instances(), "the model is loaded")


def test_ps_and_workers_show_what_an_instance_does(service: Service) -> None:
    service.loaded(LONG, context_length=ENDLESS_CONTEXT, parallel=1)
    with streaming(service, **ENDLESS) as first, streaming(service, **ENDLESS) as second:
        begun(first)
        next(second)  # it is accepted, and waits

        def shown() -> Any:
            ((_, _, _, _, _, _, context, running, waiting, rate, *_),) = run(service, "ps").rows()
            used, _, n_cells = context.partition("/")
            is_busy = (n_cells, running, waiting) == (str(ENDLESS_CONTEXT), "1", "1") and int(used) > 0
            return is_busy and float(rate) > 0

        until(shown, "the table shows both requests, and that tokens are generated")
        (instance,) = result(service, "ps")["instances"]
        (worker,) = service.send("GET", "/api/v1/workers").json()["workers"]
        for one in (instance, worker["instances"][0]):
            assert (one["requests_running"], one["requests_waiting"]) == (1, 1)
            assert 0 < one["kv_cells_used"] <= ENDLESS_CONTEXT
            assert one["generated_tokens_per_second"] > 0

    def is_idle() -> bool:
        (one,) = service.send("GET", "/api/v1/workers").json()["workers"][0]["instances"]
        return (one["requests_running"], one["requests_waiting"], one["generated_tokens_per_second"]) == (0, 0, 0)

    until(is_idle, "the instance is idle again")


def test_ps_tells_which_of_several_variants_is_loaded(service: Service) -> None:
    service.loaded(f"{PAIR}@q8_0")
    assert [row[:2] for row in run(service, "ps").rows()] == [[f"{PAIR}@q8_0", f"{PAIR}@q8_0"]]


def test_jobs_and_logs_show_a_load(service: Service) -> None:
    service.loaded(TINY)
    job = last_job(service)
    done = run(service, "jobs", "--status", "loaded", "--limit", "1")
    assert done.status == 0
    (row,) = done.rows()
    assert row[:3] == [job["job_id"], "loaded", TINY]
    assert result(service, "jobs", "--limit", "1") == {"jobs": [job]}
    logs = result(service, "logs", job["job_id"])
    assert logs["job_id"] == job["job_id"]
    assert any("llama" in line for line in logs["lines"])
    done = run(service, "logs", job["job_id"])
    assert (done.status, done.err, done.out.splitlines()) == (0, "", logs["lines"])


def test_jobs_shows_20_loads_and_what_became_of_them(service: Service) -> None:
    ids = [service.loaded(TINY)["instance_id"] for _ in range(21)]
    service.unload(ids[-1])
    done = run(service, "jobs")
    assert done.err == "loadstone: There are more than 20 loads. List them with -n N or --all.\n"
    assert [row[1:4] for row in done.rows()] == [
        ["loaded", instance, "unloaded" if instance == ids[-1] else "loaded"] for instance in reversed(ids[1:])
    ]
    everything = run(service, "jobs", "--all")
    assert (len(everything.rows()) > 20, everything.err) == (True, "")
    assert len(run(service, "jobs", "-n", "2").rows()) == len(result(service, "jobs", "-n", "2")["jobs"]) == 2


def test_logs_and_cancel_take_an_instance_id_or_a_prefix(service: Service) -> None:
    service.loaded(BERT)
    with service.frozen(1):
        job_id = run(service, "load", TINY, "--detach").out.strip()
        until(lambda: service.state(TINY) == "loading", "the model is loading")
        ambiguous = run(service, "logs", "load_")
        assert (ambiguous.status, ambiguous.out) == (1, "")
        assert f"{TINY} ({job_id})" in ambiguous.err
        unknown = run(service, "logs", "nobody/no thing?")
        assert (unknown.status, len(unknown.err.splitlines())) == (1, 1)
        assert run(service, "logs", "acme/t").status == 0
        assert run(service, "cancel", "acme/t").out == f"{job_id}\n"
    for word in (TINY, job_id, job_id[:-1]):
        assert run(service, "logs", word, "--tail", "1").out.endswith("the load was cancelled\n")
    lines = result(service, "logs", BERT)["lines"]
    assert result(service, "logs", BERT, "--tail", "2")["lines"] == lines[-2:]
    assert result(service, "logs", BERT, "--tail", "0")["lines"] == []


def test_a_followed_log_ends_with_the_instance(service: Service) -> None:
    with service.frozen(), started(service, "load", TINY, "--detach"):
        until(lambda: service.state(TINY) == "loading", "the model is loading")
        follower = Running(
            service.directory / "logs",
            *("logs", "-f", TINY),
            environ={"LOADSTONE_URL": service.url, "LOADSTONE_TOKEN": TOKEN},
        )
    until(lambda: "n_ctx" in follower.stdout, "what the engine wrote later is shown")
    job_id = last_job(service)["job_id"]
    service.unload(TINY)
    done = Done(follower)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == result(service, "logs", job_id)["lines"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((LONG, "-c", str(1 << 29)), " GiB needed"),
        ((BROKEN,), "'blk.1.ffn_up.weight' not found"),
    ],
)
def test_a_refused_load_has_its_reason_in_its_log(service: Service, words: tuple[str, ...], reason: str) -> None:
    refused = run(service, "load", *words)
    assert (refused.status, refused.out) == (1, "")
    sentence = refused.err.splitlines()[-1]
    assert reason in sentence
    assert run(service, "logs", words[0]).out.splitlines()[-1] == sentence


def test_an_option_without_effect_is_named_on_stderr(service: Service) -> None:
    done = run(service, "load", TINY, "--num-experts", "3", "--gpu-offload", "max", "-c", "512", "--copies", "2")
    assert (done.status, done.err.count("no effect")) == (0, 2)
    assert "loadstone: --num-experts has no effect on this model.\n" in done.err
    assert "loadstone: --gpu-offload has no effect: the instance uses no GPU.\n" in done.err
    done = run(service, "load", BERT, "--no-flash-attention", "--json")
    assert done.err.endswith("loadstone: --no-flash-attention has no effect on this model.\n")
    assert "no effect" not in run(service, "load", MOE, "--num-experts", "3", "--gpu-offload", "off").err


def test_unload_takes_several_ids_or_all(service: Service) -> None:
    for _ in range(4):
        service.loaded(TINY)
    assert run(service, "unload", TINY).out == f"{TINY}\n"
    done = run(service, "unload", "nobody", f"{TINY}:2")
    assert (done.status, done.out) == (1, f"{TINY}:2\n")
    assert done.err == "loadstone: Model with instance identifier 'nobody' is not loaded.\n"
    assert set(service.instances()) == {f"{TINY}:3", f"{TINY}:4"}
    assert result(service, "unload", "--all") == {"unloaded": [f"{TINY}:3", f"{TINY}:4"], "errors": []}
    assert service.instances() == {}
    assert run(service, "unload", "--all").status == 0


# ---- cancelling


def test_cancel_ends_a_load_that_another_command_waits_for(service: Service) -> None:
    with service.frozen(), started(service, "load", TINY) as waiter:
        wait_until_loading(service, waiter)
        job = result_of_cancel(service, last_job(service)["job_id"])
        done = Done(waiter)
    assert job["status"] == "cancelled"
    assert (done.status, done.out) == (130, "")
    assert "the load was cancelled" in done.err.splitlines()[-1]
    again = run(service, "cancel", job["job_id"])
    assert (again.status, again.out) == (1, "")
    assert len(again.err.splitlines()) == 1


def result_of_cancel(service: Service, job_id: str) -> Any:
    environ = {"LOADSTONE_URL": service.url, "LOADSTONE_TOKEN": TOKEN}
    command = Running(service.directory / "cancel", "cancel", job_id, "--json", environ=environ)
    done = Done(command)
    assert (done.status, done.err) == (0, "")
    return done.json()


def test_ctrl_c_cancels_the_load_and_waits_until_it_ends(service: Service) -> None:
    with service.frozen() as runner, started(service, "load", TINY, "--json") as command:
        wait_until_loading(service, command)
        command.popen.send_signal(signal.SIGINT)
        done = Done(command)
        assert not is_alive(runner)
    assert done.status == 130
    assert (done.json()["error"]["type"], done.json()["error"]["code"]) == ("model_load_failed", "load_cancelled")
    assert last_job(service)["status"] == "cancelled"


def test_a_second_ctrl_c_exits_without_waiting(service: Service) -> None:
    with service.frozen(), started(service, "load", TINY) as command:
        wait_until_loading(service, command)
        command.popen.send_signal(signal.SIGINT)
        until(lambda: service.state(TINY) == "unloading", "the server is cancelling")
        command.popen.send_signal(signal.SIGINT)
        done = Done(command)
        until(lambda: last_job(service)["status"] == "cancelled", "the load is cancelled")
    assert (done.status, done.out) == (130, "")
    assert done.err.splitlines()[-1].startswith("loadstone: Not waiting.")


# ---- completion


def completed(service: Service, line: str, token: str = TOKEN, url: str = "") -> set[str]:
    """Return what a shell offers for the end of a line."""
    environ = {"LOADSTONE_URL": url or service.url, "LOADSTONE_TOKEN": token, "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [str(LOADSTONE)],
        env={**environ, "_LOADSTONE_COMPLETE": "bash_complete", "COMP_WORDS": line},
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=True,
    )
    assert done.stderr == ""
    return {each.removeprefix("plain,") for each in done.stdout.splitlines() if each}


def wait_until_completed(service: Service, line: str, names: set[str]) -> None:
    """Complete a line, again if the server did not answer in time."""
    until(lambda: completed(service, line) == names, f"{line!r} is completed with {names}")


def test_names_that_the_server_knows_are_completed(service: Service) -> None:
    job_id = service.accepted(TINY)["job_id"]
    until(lambda: TINY in service.instances(), "the model is loaded")
    service.loaded(TINY)
    (worker,) = service.send("GET", "/api/v1/workers").json()["workers"]
    for line, names in (
        ("loadstone load acme/p", {PAIR}),
        (f"loadstone load {PAIR}@", {f"{PAIR}@q4_0", f"{PAIR}@q8_0"}),
        ("loadstone chat ", {TINY, f"{TINY}:2", MOE, PAIR, LONG, BROKEN}),
        ("loadstone unload ", {TINY, f"{TINY}:2"}),
        (f"loadstone logs {job_id[:12]}", {job_id}),
        ("loadstone load x --gpu-worker ", {worker["name"]}),
        ("loadstone load x --gpu-device=", {"CPU"}),
    ):
        wait_until_completed(service, line, names)


@pytest.mark.parametrize(("token", "url"), [("wrong", ""), (TOKEN, "http://127.0.0.1:1"), (TOKEN, "ftp://nowhere")])
def test_without_an_answer_nothing_is_completed(service: Service, token: str, url: str) -> None:
    assert completed(service, "loadstone load ", token, url) == set()


def tabbed(screen: Terminal, typed: str, added: str) -> None:
    """Type the beginning of a word, and wait until the tabulator adds the rest."""
    screen.send(typed)

    def is_added() -> bool:
        screen.send("\t")  # again if the server did not answer in time
        with suppress(AssertionError):
            return bool(screen.wait(added, within_s=2 * ANSWER_S))
        return False

    until(is_added, f"{added!r} is added to {typed!r}")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_a_name_with_a_colon(service: Service) -> None:
    for _ in range(2):
        service.loaded(TINY)
    environ = {
        "PATH": f"{LOADSTONE.parent}:{os.environ['PATH']}",
        "TERM": "dumb",
        "COLUMNS": "200",
        "PS1": "$ ",
        "LOADSTONE_URL": service.url,
        "LOADSTONE_TOKEN": TOKEN,
    }
    with terminal_of("bash", "--norc", "--noprofile", "-i", environ=environ) as screen:
        screen.wait("$ ")
        screen.send('eval "$(_LOADSTONE_COMPLETE=bash_source loadstone)"; echo do""ne\n')
        screen.wait("done\r\n")
        tabbed(screen, "loadstone unl", "oad ")
        tabbed(screen, "acme", "/tiny")  # what both ids have in common
        tabbed(screen, ":", "2")


# ---- the terminal


def test_a_terminal_shows_a_bar_and_stdout_only_the_id(service: Service) -> None:
    with terminal() as (master, slave), service.frozen() as runner:
        command = subprocess.Popen(
            [str(LOADSTONE), "load", TINY, "--url", service.url],
            env={"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "120", "LOADSTONE_TOKEN": TOKEN},
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=slave,
            text=True,
        )
        with command:
            drawn = ""
            while not any(stage in drawn for stage in FIRST_STAGES):
                drawn += os.read(master, 4096).decode(errors="replace")
            os.kill(runner.pid, signal.SIGCONT)
            out, _ = command.communicate(timeout=ENDS_S)
            while "loaded in" not in drawn:
                drawn += os.read(master, 4096).decode(errors="replace")
    assert (command.returncode, out) == (0, f"{TINY}\n")
    assert drawn.count("━" * 5) > 1
    assert "\x1b[?25l" in drawn  # the cursor is hidden ...
    assert drawn.index("\x1b[?25l") < drawn.rindex("\x1b[?25h")  # ... and shown again at the end
    shares = [int(share) for share in re.findall(r"(\d+)%", drawn)]
    assert shares == sorted(shares)
    assert shares[-1] == 100


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


# ---- errors


def test_load_keeps_following_when_the_api_is_killed(service: Service) -> None:
    with service.frozen() as runner, started(service, "load", TINY) as command:
        wait_until_loading(service, command)
        (api,) = (process for process in service.tree() if process.words[2:4] == ("-m", "api"))
        os.kill(api.pid, signal.SIGKILL)
        until(lambda: "Retrying." in command.stderr, "the command has noticed the failure")
        os.kill(runner.pid, signal.SIGCONT)
        done = Done(command)
    assert (done.status, done.out) == (0, f"{TINY}\n")
    assert set(service.instances()) == {TINY}


def test_a_refusal_prints_the_servers_message(service: Service) -> None:
    done = run(service, "load", "acme/none")
    assert (done.status, done.out) == (1, "")
    assert done.err == "loadstone: Model acme/none not found in downloaded models\n"
    done = run(service, "load", "acme/none", "--json")
    assert done.status == 1
    assert done.json()["error"]["type"] == "model_not_found"
    for words in (("cancel", ".."), ("logs", "../../x"), ("cancel", "load_0")):
        done = run(service, *words)
        assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1)


def test_the_token_comes_from_the_variable_or_the_option(service: Service) -> None:
    wrong = run(service, "ls", "--token", "wr0ng")
    assert (wrong.status, wrong.out) == (1, "")
    assert wrong.err == "loadstone: The server does not accept the token of LOADSTONE_TOKEN or --token.\n"
    none = run(service, "ls", LOADSTONE_TOKEN="")
    assert none.status == 1
    assert none.err == "loadstone: The server needs a token: set LOADSTONE_TOKEN, or give --token.\n"
    assert run(service, "ls", "--token", TOKEN, LOADSTONE_TOKEN="wr0ng").status == 0
    assert run(service, "ls", "--url", service.url, LOADSTONE_URL="http://127.0.0.1:1").status == 0
    unsendable = run(service, "ls", LOADSTONE_TOKEN=f"{TOKEN}\n")
    assert (unsendable.status, unsendable.out) == (2, "")


@pytest.mark.parametrize("words", [("ls",), ("load", TINY), ("unload", "--all")])
def test_an_unreachable_server_is_reported_in_one_line(service: Service, words: tuple[str, ...]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = run(service, *words, LOADSTONE_URL=url)
        assert (done.status, done.out) == (1, "")
        assert done.err == (
            f"loadstone: Cannot connect to {url} ([Errno 111] Connection refused)."
            " Start a server with `loadstone up`, or name another with --url.\n"
        )
        if words[0] == "load":
            assert run(service, *words, "--json", LOADSTONE_URL=url).json()["error"]["type"] == "unreachable"


def test_a_url_without_a_loadstone_is_reported_in_one_line(service: Service) -> None:
    done = run(service, "ls", "--url", f"{service.url}/elsewhere")
    assert (done.status, done.out) == (1, "")
    assert done.err == "loadstone: Unexpected endpoint or method. (GET /elsewhere/api/v1/models)\n"


def test_wrong_usage_exits_with_status_2(service: Service) -> None:
    done = run(service, "load", TINY, "--context-length", "x")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("Usage: loadstone load ")
