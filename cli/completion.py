"""What a shell completes: besides commands and options, the names that the server knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import BashComplete, add_completion_class, split_arg_string

from cli.failure import Failure

if TYPE_CHECKING:
    from cli.client import Client
    from shared.schema.http import ListedModel

ANSWER_S = 5.0  # a person waits
NEWEST_JOBS = 20

Read = Callable[["Client", str], Iterable[str]]  # of what was typed so far


class Bash(BashComplete):
    """Completes in bash names with characters at which bash breaks words, such as `:`.

    Click takes the words from bash, which has several for one such name.
    """

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" part="${COMP_WORDS[COMP_CWORD]}" word before response type value
    word="${line##*[[:space:]]}"
    [[ "$part" == [:@=] ]] && part=""
    before="${word%%"$part"}"  # bash completes only the part
    response=$(env COMP_WORDS="$line" %(complete_var)s=bash_complete $1)
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        [[ $type == 'plain' ]] && COMPREPLY+=("${value#"$before"}")
    done
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the whole words before the cursor, and the beginning of one at the cursor."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        incomplete = "" if line[-1:].isspace() else words.pop()
        return words[1:], incomplete


def register() -> None:
    """Make click use what is better here."""
    add_completion_class(Bash, "bash")


def completing(read: Read) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return a completion with names that are read from the server.  Without an answer there is none."""

    def complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        from cli.client import Client

        url = context.params.get("url")
        if not url:  # it is invalid
            return []
        try:
            with Client(url, context.params.get("token") or "", answer_s=ANSWER_S) as server:
                return sorted({name for name in read(server, incomplete) if name.startswith(incomplete)})
        except Failure:
            return []

    return complete


def models(server: Client, typed: str) -> Iterable[str]:
    for model in server.models().models:
        yield from _keys(model, typed)


def llms(server: Client, typed: str) -> Iterable[str]:
    """Yield the names of LLMs, and the ids of their instances."""
    for model in server.models().models:
        if model.type == "llm":
            yield from _keys(model, typed)
            yield from (instance.id for instance in model.loaded_instances)


def embedding_models(server: Client, typed: str) -> Iterable[str]:
    for model in server.models().models:
        if model.type == "embedding":
            yield from _keys(model, typed)
            yield from (instance.id for instance in model.loaded_instances)


def _keys(model: ListedModel, typed: str) -> Iterable[str]:
    """Yield the key of a model, and with an @ those of its quantizations."""
    yield model.key
    if "@" in typed:
        yield from model.variants or ()


def instances(server: Client, _: str) -> Iterable[str]:
    return (instance.id for worker in server.workers().workers for instance in worker.instances)


def loads(server: Client, typed: str) -> Iterable[str]:
    """Yield the ids of instances, or of jobs if such a one was typed."""
    if typed.startswith("load_"):
        return (job.job_id for job in server.jobs(limit=NEWEST_JOBS).jobs)
    return instances(server, typed)


def workers(server: Client, _: str) -> Iterable[str]:
    return (worker.name for worker in server.workers().workers)


def devices(server: Client, _: str) -> Iterable[str]:
    return (device.id for worker in server.workers().workers for device in worker.devices)
