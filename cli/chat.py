"""`loadstone chat`: a conversation with a model on a terminal, or one answer for a pipe."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
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
    from cli.openai import CallDelta, Chunk, Timings, Usage

FILE = click.Path(dir_okay=False, path_type=Path)
HELP = """\
/clear         forget the conversation; the system prompt stays
/stats         tokens and times of the last answer
/system TEXT   set the system prompt; without TEXT, show it
/help          show this
Ctrl-C stops an answer. Ctrl-D, or Ctrl-C twice, ends the conversation."""


class Conversation:
    """What was said, and how the last answer went."""

    def __init__(self, model: str, system: str | None, **fields: Any) -> None:
        """`fields`: further ones of all requests."""
        self.model = model
        self.system = system
        self._fields = fields
        self._turns: list[dict[str, Any]] = []
        self._usage: Usage | None = None
        self._timings: Timings | None = None

    def request(self, question: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Return the request for the answer to a question, with the calls of tools for it and their results."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self._turns, {"role": "user", "content": question}, *calls]
        return {"model": self.model, "messages": messages, **self._fields}

    def answered(self, question: str, answer: str, calls: Sequence[dict[str, Any]] = ()) -> None:
        """Keep a question and its answer, which may have been stopped.  A question without an answer is not kept."""
        if answer:
            said = {"role": "assistant", "content": answer}
            self._turns += [{"role": "user", "content": question}, *calls, said]

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
@click.option("--schema", type=FILE, help="File with a JSON schema: each answer is JSON that it describes.")
@click.option("--tools", type=FILE, help="File with a JSON list of tools that the model may call, as OpenAI has it.")
def chat(
    server: Client, as_json: bool, model: str, system: str | None, schema: Path | None, tools: Path | None
) -> None:
    """Talk to a model.  A model that is not loaded is loaded.

    On a terminal this is a conversation; /help lists its commands. Otherwise stdin is one question, and stdout gets
    only the answer. The results of tools are asked for on a terminal; otherwise each call is a line of JSON on stdout,
    after the text of the answer.
    """
    if schema is not None and tools is not None:
        raise click.UsageError("--schema and --tools exclude each other.")
    fields: dict[str, Any] = {}
    if schema is not None:
        described = read(schema, "--schema", dict, "a JSON schema is an object")
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": described}}
    if tools is not None:
        fields["tools"] = read(tools, "--tools", list, "tools are a list of objects")
    conversation = Conversation(model, system, **fields)
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
            return
        printed = Printed(is_terminal=False)
        printed.print(server, conversation, conversation.request(question), arrived)
    for call in printed.calls:
        click.echo(json.dumps({"id": call.id, "name": call.name, "arguments": call.value()}, ensure_ascii=False))
    if schema is not None and printed.is_cut:
        sys.exit(1)


def read(path: Path, option: str, kind: type, what: str) -> Any:
    """Return the JSON value of a file.  Raises click.BadParameter."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise click.BadParameter(f"'{path}' cannot be read: {e.strerror}.", param_hint=option) from None
    except json.JSONDecodeError as e:
        why = f"{e.msg} (line {e.lineno}, column {e.colno})"
        raise click.BadParameter(f"'{path}' is not valid JSON: {why}.", param_hint=option) from None
    except UnicodeDecodeError:
        raise click.BadParameter(f"'{path}' is not UTF-8.", param_hint=option) from None
    except RecursionError:
        raise click.BadParameter(f"'{path}' is nested too deeply.", param_hint=option) from None
    if not isinstance(value, kind):
        raise click.BadParameter(f"'{path}': {what}.", param_hint=option)
    return value


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
    calls: list[dict[str, Any]] = []
    printed = Printed(is_terminal=sys.stdout.isatty())
    try:
        while True:
            with waiting(server, conversation.model) as arrived:
                printed.print(server, conversation, conversation.request(question, calls), arrived)
            if not printed.calls:
                break
            calls += [printed.said(), *map(result, printed.calls)]
            printed = Printed(is_terminal=sys.stdout.isatty())
    except EOFError:
        click.echo()
        say("The question was not added to the conversation: a call has no result.")
        printed.text = ""
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
        conversation.answered(question, "" if printed.calls else printed.text, calls)
    return True


def result(call: Call) -> dict[str, Any]:
    """Ask for the result of a call; return the message with it.  Raises EOFError."""
    return {"role": "tool", "tool_call_id": call.id, "content": input(f"{call.name} returns: ")}


@dataclass
class Call:
    """A call of a tool, as far as it has arrived."""

    id: str
    name: str
    arguments: str = ""

    def value(self) -> Any:
        """Return the arguments: as an object, or as text if they are cut."""
        try:
            return json.loads(self.arguments)
        except json.JSONDecodeError:
            return self.arguments


class Printed:
    """An answer on stdout, with its reasoning if that is a terminal."""

    def __init__(self, *, is_terminal: bool) -> None:
        self.text = ""
        self.calls: list[Call] = []
        self.is_cut = False
        self._is_terminal = is_terminal
        self._is_reasoning = False
        self._is_open = False  # the last line on the terminal has no end yet

    def said(self) -> dict[str, Any]:
        """Return the answer as a message of the conversation."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.calls
        ]
        return {"role": "assistant", "content": self.text, "tool_calls": calls}

    def print(
        self, server: Client, conversation: Conversation, request: dict[str, Any], arrived: Callable[[], None]
    ) -> None:
        """Print the answer to a request as it arrives, then its calls on a terminal.  Calls `arrived` first."""
        with closing(server.chat(request)) as chunks:
            for chunk in chunks:
                arrived()
                conversation.saw(chunk)
                for choice in chunk.choices:
                    self._reason(choice.delta.reasoning_content or "")
                    self._add(choice.delta.content or "")
                    self._call(choice.delta.tool_calls)
                    if choice.finish_reason == "length":
                        self.is_cut = True
                        self.end()
                        say("The answer was cut: the context is full, or the server limits answers.")
        self.end()
        if self._is_terminal:
            for call in self.calls:
                click.echo(clean(f"{call.name}({call.arguments})"))

    def _call(self, deltas: list[CallDelta]) -> None:
        for delta in deltas:
            if delta.index == len(self.calls):
                self.calls.append(Call(delta.id, delta.function.name))
            self.calls[delta.index].arguments += delta.function.arguments

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
