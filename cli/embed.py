"""`loadstone embed`: the embeddings of texts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import click
import msgspec

from cli.commands import command, document
from cli.completion import completing, embedding_models
from cli.openai import Embedding
from cli.waiting import waiting

if TYPE_CHECKING:
    from cli.client import Client

MOST_TEXTS = 256  # of a request


@command
@click.argument("model", shell_complete=completing(embedding_models))
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
def embed(server: Client, as_json: bool, model: str, texts: tuple[str, ...]) -> None:
    """Write the embeddings of texts, or else of the lines of stdin.  A model that is not loaded is loaded.

    Each is one line of JSON on stdout: {"index", "embedding"}. With --json they are one document.
    """
    lines = texts or (line.rstrip("\n") for line in sys.stdin or ())
    made = embedded(server, model, lines)
    if as_json:
        document({"data": [*made]})
        return
    for one in made:
        click.echo(msgspec.json.encode(one))


def embedded(server: Client, model: str, texts: Iterable[str]) -> Iterator[Embedding]:
    """Yield the embeddings of texts, in order, as they are made.  Reads no more texts than fit into one request."""
    remaining, n_before = iter(texts), 0
    while some := [*islice(remaining, MOST_TEXTS)]:
        with waiting(server, model):
            made = server.embed(model, some)
        for one in made:
            yield msgspec.structs.replace(one, index=n_before + one.index)
        n_before += len(some)
