"""The client commands: retries, display of progress, and parsing of event streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from api.openapi.document import document
from cli import commands, downloads, servers
from cli.address import url_of
from cli.bar import Meter
from cli.client import LONGEST_PAUSE_S, PATIENCE_S, Patience, events, new_lines
from cli.display import Lines, clean, facts, table
from cli.environment import PROXY_VARIABLES, TLS_VARIABLES
from cli.failure import Failure
from cli.names import Load, meant
from cli.program import CLIENTS, DOWNLOADS, SERVERS, program
from shared.errors import ErrorBody
from shared.schema.http import GPURequest, LoadProgress, LoadRequest

ROOT = Path(__file__).parents[2]
ERROR = ErrorBody(type="service_unavailable", message="Redis does not answer.")


class Clock:
    """A clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def progress(**fields: object) -> LoadProgress:
    base = {
        "type": "model_load.progress",
        "model_instance_id": "m",
        "job_id": "load_1",
        "status": "loading",
        "progress": 0.25,
        "phase": "weights",
        "total_size_bytes": 8 << 30,
        "loaded_bytes": 2 << 30,
        "bytes_per_second": 100 << 20,
        "estimated_completion": None,
    }
    return msgspec.convert(base | fields, LoadProgress)


# ---- retries


def test_patience_ends_without_an_answer() -> None:
    clock = Clock()
    patience = Patience(lambda sentence: None, clock, clock.sleep)
    with pytest.raises(Failure, match="Redis does not answer"):
        retry_for_ever(patience)
    assert PATIENCE_S - LONGEST_PAUSE_S <= clock.now - 100 <= PATIENCE_S
    assert clock.pauses == sorted(clock.pauses)
    assert clock.pauses[-1] == LONGEST_PAUSE_S


def retry_for_ever(patience: Patience) -> None:
    while True:
        patience.wait(Failure(ERROR, 0.0))


def test_an_answer_renews_patience() -> None:
    clock = Clock()
    patience = Patience(lambda sentence: None, clock, clock.sleep)
    for _ in range(50):
        patience.wait(Failure(ERROR, 4.0))
        patience.reset()
    assert clock.now == 300


def test_a_retry_waits_as_long_as_the_server_says() -> None:
    clock, messages = Clock(), list[str]()
    patience = Patience(messages.append, clock, clock.sleep)
    patience.wait(Failure(ERROR, 7.0))
    assert clock.pauses == [7.0]
    assert messages == ["Redis does not answer. Retrying."]


@pytest.mark.parametrize("retry_after_s", [None, PATIENCE_S + 1])
def test_a_final_or_too_long_failure_is_not_retried(retry_after_s: float | None) -> None:
    clock = Clock()
    with pytest.raises(Failure):
        Patience(lambda sentence: None, clock, clock.sleep).wait(Failure(ERROR, retry_after_s))
    assert clock.pauses == []


# ---- the stream


def test_comments_and_unknown_fields_of_a_stream_are_ignored() -> None:
    stream = b": hello\n\nid: 1-0\nevent: e\ndata: {}\nretry: 5\n\n: still here\n\nid:2-0\ndata:a\ndata: b\n\ndata: cut"
    assert list(events(stream.split(b"\n"))) == [("1-0", b"{}"), ("2-0", b"a\nb")]


def test_an_event_without_an_id_keeps_the_last_id() -> None:
    assert list(events([b"id: 1", b"data: a", b"", b"data: b", b""])) == [("1", b"a"), ("1", b"b")]


# ---- logs


@pytest.mark.parametrize(
    ("seen", "lines", "new"),
    [
        ([], ["t", "a"], ["t", "a"]),
        (["t", "a"], ["t", "a"], []),
        (["t", "a"], ["t", "a", "b", "c"], ["b", "c"]),
        (["t", "a", "b", "c"], ["t", "c", "d"], ["d"]),
        (["t", "a", "a"], ["t", "a", "a", "a"], ["a"]),
        (["t", "a"], ["t", "x"], ["t", "x"]),
        (["t", "a"], ["t", "a", "loadstone: why"], ["loadstone: why"]),
    ],
)
def test_a_followed_log_continues_where_it_was(seen: list[str], lines: list[str], new: list[str]) -> None:
    assert new_lines(seen, lines) == new


# ---- names

LOADS = [
    Load("load_9c", "acme/tiny"),
    Load("load_8a", "acme/tiny:2"),
    Load("load_8b", "acme/moe"),
    Load("load_7a", "acme/tiny"),  # before
    Load("load_6a", "load_9"),
    Load("load_4a", "acme/qwen"),
]
PREFERRED = [Load("load_5a", "acme/qwen:2")]


@pytest.mark.parametrize(
    ("word", "job_id"),
    [
        ("acme/tiny", "load_9c"),
        ("acme/tiny:", "load_8a"),
        ("acme/m", "load_8b"),
        ("load_9", "load_6a"),  # a whole id
        ("load_7a", "load_7a"),
        ("acme/q", "load_5a"),  # only one of them is preferred
        ("acme/qwen", "load_4a"),
        ("load_7", "load_7a"),
        ("none", None),
        ("", None),
    ],
)
def test_a_load_is_named_by_an_id_or_a_prefix(word: str, job_id: str | None) -> None:
    load = meant(word, PREFERRED, [*PREFERRED, *LOADS])
    assert (load and load.job_id) == job_id


def test_an_ambiguous_prefix_lists_the_candidates() -> None:
    with pytest.raises(Failure) as failed:
        meant("load_8", PREFERRED, LOADS)
    assert str(failed.value) == "'load_8' is ambiguous: acme/tiny:2 (load_8a), acme/moe (load_8b)."
    with pytest.raises(Failure) as failed:
        meant("acme/t", [], [*LOADS, *(Load(f"load_x{n}", f"acme/t{n}") for n in range(20))])
    assert str(failed.value).endswith("acme/t7 (load_x7) and 12 more.")


# ---- the display


def test_columns_are_as_wide_as_their_widest_cell(capsys: pytest.CaptureFixture[str]) -> None:
    table(("A", "LONG HEADING", "C"), [("x", "y", "z"), ("\u6a21\u578b", "e\u0301\x1b", "")])
    assert capsys.readouterr().out.splitlines() == [
        "A      LONG HEADING   C",
        "x      y              z",
        "\u6a21\u578b   e\u0301\N{REPLACEMENT CHARACTER}",
    ]


def test_the_displayed_share_moves_evenly_and_never_back() -> None:
    clock = Clock()
    meter = Meter(clock)
    shown = []
    for share in (0.0, 0.2, 0.4, 0.3, 0.6):  # one per second; one of them decreases
        meter.saw(share)
        for _ in range(10):
            clock.now += 0.1
            shown.append(meter.share())
            assert shown[-1] <= max(share, 0.4 if share == 0.3 else 0) + 1e-9
    assert shown == sorted(shown)
    assert max(after - before for before, after in pairwise(shown)) < 0.025
    assert shown[-1] == pytest.approx(0.6)


def test_a_line_is_written_for_each_phase_and_each_tenth() -> None:
    lines_written = list[str]()
    lines = Lines("m", lines_written.append)
    lines.show(progress(status="queued", phase=None, progress=0.0))
    lines.show(progress(status="loading", phase=None, progress=0.0))
    for hundredth in range(100):
        lines.show(progress(progress=hundredth / 100, loaded_bytes=hundredth * (8 << 30) // 100))
    lines.show(progress(phase="context", progress=0.995, loaded_bytes=8 << 30))
    assert lines_written[:2] == ["m: 0% queued", "m: 0% starting"]
    assert lines_written[3] == "m: 10% weights, 0.80 GiB of 8.00 GiB, 0.098 GiB/s, 0:01:14 left"
    assert lines_written[-1] == "m: 99% context, 8.00 GiB of 8.00 GiB"
    assert len(lines_written) == 13


def test_an_unknown_rate_is_left_out() -> None:
    assert facts(progress(bytes_per_second=None)) == "weights, 2.00 GiB of 8.00 GiB"
    assert facts(progress(bytes_per_second=0)) == "weights, 2.00 GiB of 8.00 GiB"


def test_control_characters_of_a_name_are_replaced() -> None:
    assert clean("a\x1b[2Jb\x07\tc\n") == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}\tc\n"


# ---- the commands


def test_the_program_lists_every_command() -> None:
    assert all(
        program.get_command(click.Context(program), name) for name in (*CLIENTS, *DOWNLOADS)
    )  # imports all their modules
    assert {*CLIENTS, *DOWNLOADS} == {*commands.client.commands, *downloads.COMMANDS}
    assert set(SERVERS) == set(servers.servers.commands)


@pytest.mark.parametrize("kind", [LoadRequest, GPURequest])
def test_each_option_of_load_has_the_text_of_its_field(kind: type[msgspec.Struct]) -> None:
    helps = {option.name: option.help for option in commands.load.params if isinstance(option, click.Option)}
    schema = document()["components"]["schemas"][kind.__name__]["properties"]
    without = {"model", "gpu", "echo_load_config"}  # an argument, a group of options, and a field that is always set
    fields = {name: field["description"] for name, field in schema.items() if name not in without}
    assert fields
    assert [name for name, text in fields.items() if not str(helps.get(name)).startswith(text)] == []


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h", "http://h"),
        ("https://h:1/prefix/", "https://h:1/prefix"),
        ("HTTP://Host:80", "http://host:80"),
        ("localhost", "http://localhost:1234"),
        ("localhost:1235", "http://localhost:1235"),
        ("localhost:1235/", "http://localhost:1235"),
        ("10.0.0.7", "http://10.0.0.7:1234"),
        ("host/v1", "http://host:1234"),
        ("http://host/v1", "http://host"),
        ("http://host:1234/v1/", "http://host:1234"),
        ("http://host:1234/api/v1", "http://host:1234"),
        ("http://host:1234/api/v0", "http://host:1234"),
        ("https://host/prefix/api/v1/", "https://host/prefix"),
        ("https://host/xv1", "https://host/xv1"),
        ("http://[::1]:1234", "http://[::1]:1234"),
        ("[::1]:1235", "http://[::1]:1235"),
        ("[::1]", "http://[::1]:1234"),
        ("::1", "http://[::1]:1234"),
        ("2001:DB8::1", "http://[2001:db8::1]:1234"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_the_url_of_a_server_is_what_a_person_means(text: str, url: str) -> None:
    assert url_of(text) == url
    assert url_of(url) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://h",
        "http://",
        "http://u:p@h",
        "u:p@h",
        "http://h?x",
        "http://h#x",
        "h:x",
        "/x",
        ":1235",
        "1235",
        "http://h:65536",
        "http://h:-1",
        "http://h:0",
        "http://a..b",
        "http://[::1",
        "http://[x:y]",
        "a b",
        "http://h\n",
    ],
)
def test_another_text_is_refused_as_a_url(text: str) -> None:
    assert url_of(text) is None


@pytest.mark.parametrize(
    "words",
    [
        ["load"],
        ["load", "m", "--context-length", "0"],
        ["load", "m", "--idempotency-key", "a b"],
        ["unload"],
        ["unload", "m", "--all"],
        ["ls", "--url", "h:x"],
        ["jobs", "--status", "lost"],
        ["cancel"],
        ["logs", "x", "-f", "--json"],
        ["logs", "x", "--tail", "-1"],
        ["jobs", "-n", "0"],
    ],
)
def test_wrong_usage_exits_with_status_2(words: list[str]) -> None:
    result = CliRunner().invoke(program, words)
    assert (result.exit_code, result.stdout) == (2, "")


def test_h_is_help_and_list_is_ls() -> None:
    for words in ([], ["ls"], ["load"], ["up"]):
        short, long = (CliRunner().invoke(program, [*words, flag]) for flag in ("-h", "--help"))
        assert (short.exit_code, short.stdout) == (0, long.stdout)
    commands_shown = CliRunner().invoke(program, ["-h"]).stdout.partition("Commands:")[2]
    assert "..." not in commands_shown, "a sentence is cut"
    assert "List the models." in CliRunner().invoke(program, ["list", "-h"]).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_documented_line_makes_a_shell_complete(shell: str) -> None:
    assert f"_LOADSTONE_COMPLETE={shell}_source loadstone" in (ROOT / "docs/clients.md").read_text()
    made = CliRunner().invoke(program, prog_name="loadstone", env={"_LOADSTONE_COMPLETE": f"{shell}_source"})
    assert (made.exit_code, f"_LOADSTONE_COMPLETE={shell}_complete" in made.stdout) == (0, True)


def test_commands_and_options_are_completed() -> None:
    for words, expected in (("loadstone wo", {"worker", "workers"}), ("loadstone logs --ta", {"--tail"})):
        environ = {"_LOADSTONE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        made = CliRunner().invoke(program, prog_name="loadstone", env=environ)
        assert {line.removeprefix("plain,") for line in made.stdout.splitlines()} == expected


def test_a_token_that_fits_no_header_is_not_shown() -> None:
    result = CliRunner().invoke(program, ["ls"], env={"LOADSTONE_TOKEN": "s3cret\n"})
    assert result.exit_code == 2
    assert "visible ASCII" in result.stderr
    assert "s3cret" not in result.output


# ---- the environment


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return an environment without proxies and certificates."""
    for name in os.environ:
        if name.upper() in PROXY_VARIABLES | TLS_VARIABLES:
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ALL_PROXY", "socks5h://user:s3cret@127.0.0.1:1", "SOCKS is not supported"),
        ("https_proxy", "ftp://user:s3cret@127.0.0.1:1", "unknown scheme"),
        ("HTTPS_PROXY", "http://x:y:z", "invalid port"),
        ("HTTPS_PROXY", "http://user:s3cret/more@127.0.0.1:1", "invalid port"),
        ("HTTPS_PROXY", "http://a..b", "invalid host name"),
        ("SSL_CERT_FILE", "/nonexistent", "No such file or directory"),
        ("SSL_CERT_FILE", "/etc", "Is a directory"),
        ("SSL_CERT_FILE", "/etc/passwd", "no certificate or crl found"),
        ("SSLKEYLOGFILE", "/nonexistent/log", "No such file or directory"),
    ],
)
def test_an_unusable_environment_fails_in_one_sentence(
    environ: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    environ.setenv(variable, value)
    result = CliRunner().invoke(program, ["ls", "--url", "https://server.invalid"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(rf"loadstone: .*\({variable}\) are unusable: .*{reason}.*\.\n", result.stderr), result.stderr
    assert "s3cret" not in result.stderr


def test_a_refused_connection_may_be_that_of_a_proxy(environ: pytest.MonkeyPatch) -> None:
    environ.setenv("HTTP_PROXY", "http://user:s3cret@127.0.0.1:1")
    result = CliRunner().invoke(program, ["ls", "--url", "http://server.invalid"])
    start = "loadstone: Cannot connect to http://server.invalid or to its proxy (HTTP_PROXY) ("
    assert (result.exit_code, result.stderr.startswith(start)) == (1, True)
    assert "s3cret" not in result.stderr


def test_arguments_that_are_not_utf_8_are_wrong_usage() -> None:
    for words in (["load", "m\udcff"], ["logs", "m\udcff"], ["unload", "m\udcff"]):
        result = CliRunner().invoke(program, [*words, "--url", "http://127.0.0.1:1"])
        assert result.exit_code == 2
        assert "must be UTF-8" in result.stderr


# ---- the output


@pytest.mark.parametrize("words", [("chat", "p/m"), ("embed", "p/m")])
def test_input_that_is_not_utf_8_is_wrong_usage(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(program, words, input=b"\xff")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "must be UTF-8" in done.stderr


def run(program: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False, **options)


def test_a_full_disk_fails_the_output_in_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        done = run("from cli.main import main; main()", "--help", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "loadstone: the output cannot be written: No space left on device.\n"


def test_a_character_that_the_output_lacks_is_escaped() -> None:
    code = "import sys; from cli.program import program; sys.argv[0] = chr(9731); program(['--help'])"
    done = run(code, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: \\u2603 ")
