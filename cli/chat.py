"""`loadstone chat`: a conversation with a model on a terminal, or one answer for a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from cli import interrupt
from cli.commands import CANCELLED, command, document, say
from cli.completion import completing, llms
from cli.display import clean
from cli.failure import Failure
from cli.waiting import waiting

if TYPE_CHECKING:
    from cli.client import Client
    from cli.openai import Chunk, Timings, Usage

HELP = """\
/clear         forget the conversation; the system prompt stays
/stats         tokens and times of the last answer
/system TEXT   set the system prompt; without TEXT, show it
/help          show this
Ctrl-C stops an answer. Ctrl-D, or Ctrl-C twice, ends the conversation."""


class Conversation:
    """What was said, and how the last answer went."""

    def __init__(self, model: str, system: str | None) -> None:
        self.model = model
        self.system = system
        self._turns: list[dict[str, str]] = []
        self._usage: Usage | None = None
        self._timings: Timings | None = None

    def request(self, question: str) -> dict[str, Any]:
        """Return the request for the answer to a question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self.model, "messages": [*system, *self._turns, {"role": "user", "content": question}]}

    def answered(self, question: str, answer: str) -> None:
        """Keep a question and its answer, which may have been stopped.  A question without an answer is not kept."""
        if answer:
            self._turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def saw(self, chunk: Chunk) -> None:
        """Note the numbers of an answer, which come with its last chunk."""
        if chunk.usage is not None:
            self._usage, self._timings = chunk.usage, chunk.timings

    def clear(self) -> None:
        self._turns = []

    @property
    def has_turns(self) -> bool:
        return bool(self._turns)

    def stats(self) -> str:
        """Format the numbers of the last answer."""
        usage, timings = self._usage, self._timings
        if usage is None:
            return "There is no answer yet."
        cached = usage.prompt_tokens_details.cached_tokens
        lines = [f"prompt: {usage.prompt_tokens} tokens, {cached} of them kept from before"]
        lines += [f"answer: {usage.completion_tokens} tokens"]
        if timings is not None:
            lines[1] += f", {timings.predicted_per_second:.1f} per second"
            lines += [
                f"times: waited {timings.queued_ms / 1000:.2f} s, prompt {timings.prompt_ms / 1000:.2f} s, "
                f"answer {timings.predicted_ms / 1000:.2f} s"
            ]
        return "\n".join(lines)


@command
@click.argument("model", shell_complete=completing(llms))
@click.option("--system", metavar="TEXT", help="System prompt of the conversation.")
def chat(server: Client, as_json: bool, model: str, system: str | None) -> None:
    """Talk to a model.  A model that is not loaded is loaded.

    On a terminal this is a conversation; /help lists its commands. Otherwise stdin is one question, and stdout gets
    only the answer.
    """
    conversation = Conversation(model, system)
    if sys.stdin is not None and sys.stdin.isatty():
        if as_json:
            raise click.UsageError("--json needs the question on stdin.")
        server.has_model(model)
        with interrupt.Raising():
            converse(server, conversation)
        return
    question = "" if sys.stdin is None else sys.stdin.read().rstrip("\n")
    if not question.strip():
        raise click.UsageError("There is no question on stdin.")
    with waiting(server, model) as arrived:
        if as_json:
            reply = server.chat_reply(conversation.request(question))
            arrived()
            document(reply)
        else:
            Printed(is_terminal=False).print(server, conversation, question, arrived)


def converse(server: Client, conversation: Conversation) -> None:
    """Answer lines of the terminal until its end, or until Ctrl-C is pressed twice."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing and history)

    was_interrupted = False
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "").strip()
            line.encode()  # some locales let bytes through that are not UTF-8
        except EOFError:
            click.echo()
            return
        except UnicodeError:
            say("The line is not UTF-8.")
            continue
        except KeyboardInterrupt:
            click.echo()
            if was_interrupted:
                sys.exit(CANCELLED)
            was_interrupted = True
            say("Press Ctrl-C again, or Ctrl-D, to end the conversation.")
            continue
        was_interrupted = False
        if line.startswith("/"):
            obeyed(conversation, line)
        elif line:
            was_interrupted = not answer(server, conversation, line)


def obeyed(conversation: Conversation, line: str) -> None:
    """Carry out a command of the conversation."""
    word, _, rest = line.partition(" ")
    match word:
        case "/clear":
            conversation.clear()
        case "/stats":
            click.echo(conversation.stats(), err=True)
        case "/system" if rest.strip():
            conversation.system = rest.strip()
        case "/system":
            click.echo(conversation.system or "There is no system prompt.", err=True)
        case "/help":
            click.echo(HELP, err=True)
        case _:
            say(f"There is no command {word}. /help lists the commands.")


def answer(server: Client, conversation: Conversation, question: str) -> bool:
    """Print the answer to a question, or why there is none.  Returns whether Ctrl-C did not stop it."""
    printed = Printed(is_terminal=sys.stdout.isatty())
    try:
        with waiting(server, conversation.model) as arrived:
            printed.print(server, conversation, question, arrived)
    except KeyboardInterrupt:
        printed.end()
        say("The answer was stopped.")
        return False
    except Failure as failure:
        printed.end()
        say(str(failure))
        if failure.error.code == "context_length_exceeded" and conversation.has_turns:
            say("The question was not added to the conversation. /clear begins a new one.")
    finally:
        conversation.answered(question, printed.text)
    return True


class Printed:
    """An answer on stdout, with its reasoning if that is a terminal."""

    def __init__(self, *, is_terminal: bool) -> None:
        self.text = ""
        self._is_terminal = is_terminal
        self._is_reasoning = False
        self._is_open = False  # the last line on the terminal has no end yet

    def print(self, server: Client, conversation: Conversation, question: str, arrived: Callable[[], None]) -> None:
        """Print the answer to a question as it arrives.  Calls `arrived` at its beginning."""
        with closing(server.chat(conversation.request(question))) as chunks:
            for chunk in chunks:
                arrived()
                conversation.saw(chunk)
                for choice in chunk.choices:
                    self._reason(choice.delta.reasoning_content or "")
                    self._add(choice.delta.content or "")
                    if choice.finish_reason == "length":
                        self.end()
                        say("The answer was cut: the context is full, or the server limits answers.")
        self.end()

    def _reason(self, text: str) -> None:
        if text and self._is_terminal:
            self._is_reasoning = True
            self._write(click.style(clean(text), dim=True))

    def _add(self, text: str) -> None:
        if not text:
            return
        if self._is_reasoning:
            self._is_reasoning = False
            self._write("\n\n")
        self.text += text
        self._write(clean(text) if self._is_terminal else text)

    def _write(self, text: str) -> None:
        click.echo(text, nl=False, color=None if self._is_terminal else True)  # True: as it is
        self._is_open = not text.endswith("\n")

    def end(self) -> None:
        """End the last line."""
        if self._is_open:
            click.echo()
            self._is_open = False
