"""The helper of a runner: a process that runs llama.cpp's chat code, and may die of it.

Templates come from untrusted files and conversations from clients.  llama.cpp's code for them can overflow its stack,
run for ever, or allocate without end.  So it runs apart from the model, with limits, and is replaced when it dies.

A process with threads, or one that has initialised CUDA, cannot be forked safely.  So the runner, before it has either,
forks a zygote: a process with one thread, which runs no foreign code and forks the helpers.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, assert_never

import msgspec
from msgspec import json
from msgspec.structs import replace

from shared import framing, libc
from shared.channel.messages import Grammar, Schema
from worker.chat import tools
from worker.chat.code import ChatCode, ChatError, ParserSource, Rendered, Templates
from worker.chat.constraint import ConstraintError, check
from worker.chat.protocol import (
    Answer,
    Check,
    Checked,
    Compiled,
    Constraint,
    FromHelper,
    Parse,
    Prompt,
    Rejected,
    Render,
    Template,
    Thinking,
    ToHelper,
    Unenforceable,
    decode_to_helper,
    frame,
)
from worker.chat.system import fronted
from worker.chat.turns import joined
from worker.sandbox import capabilities, landlock, seccomp

CPU_S = 5.0  # processor time for one message; a pause of the machine does not count
MEMORY_BYTES = 3 << 30  # of address space, beyond what the process has at its start
NO_MEMORY = 12  # exit status
LARGE_BYTES = 1 << 20  # of a message; the memory that it took is given back
PARSERS = 64  # that are kept compiled
FORK = b"f"  # asks the zygote for a helper; the same with the helper's socket is the answer
NUMBER = struct.Struct("<i")  # and later the helper's exit status
TRIAL = b'{"messages": [{"role": "user", "content": "Hello"}]}'
HARMONY_CHANNEL, HARMONY_FINAL = "<|channel|>", "<|channel|>final<|message|>"  # of gpt-oss
HARMONY_CLOSE = f"<|end|><|start|>assistant{HARMONY_FINAL}"
EFFORT = "reasoning_effort"
# Efforts that few templates know, and what the others get: the nearest one, or for "none" nothing.
EFFORTS = {b'"none"': b"", b'"minimal"': b'"low"', b'"xhigh"': b'"high"'}
FIXED = frozenset({"epsilon", "literal", "sequence", "end"})  # parsers that read a fixed text, and say nothing

Confine = Callable[[int], None]  # restricts a process, and closes all its descriptors but this one


def start(confine: Confine, cpu_s: float, memory_bytes: int) -> tuple[int, socket.socket]:
    """Fork the zygote; return its pid, and the socket on which it takes FORK."""
    ours, theirs = socket.socketpair()
    if (pid := os.fork()) == 0:
        try:
            _become("chat zygote", theirs, confine)
            seccomp.outside(forks=True)
            _fork_helpers(theirs, confine, cpu_s, memory_bytes)
        finally:
            os._exit(1)
    theirs.close()
    return pid, ours


def _become(name: str, kept: socket.socket, confine: Confine) -> None:
    """Give the process a name, and nothing that it inherited but a socket.

    The limits are set again, since the request for SIGKILL at the parent's death is not inherited.
    """
    confine(kept.fileno())
    null = os.open(
        os.devnull, os.O_RDWR
    )  # a crash would write into the log of the runner, which says how that one died
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    with suppress(OSError):  # /proc may be read-only
        Path("/proc/self/comm").write_text(name)


def _fork_helpers(control: socket.socket, confine: Confine, cpu_s: float, memory_bytes: int) -> NoReturn:
    while control.recv(1) == FORK:
        theirs, helpers = socket.socketpair()
        if (pid := os.fork()) == 0:
            try:
                _become("chat helper", helpers, confine)
                _limit(memory_bytes)
                _serve(helpers, cpu_s)
            except MemoryError:
                os._exit(NO_MEMORY)
            finally:
                os._exit(1)
        helpers.close()
        socket.send_fds(control, [FORK], [theirs.fileno()])
        ends = select.poll()
        ends.register(theirs, 0)  # reports the end of the helper, but not its replies
        ends.register(control, select.POLLIN)  # the runner's end: it asks for nothing while there is a helper
        ends.poll()
        os.kill(pid, signal.SIGKILL)  # the runner cannot; a helper that is exiting keeps its status
        theirs.close()
        _, status = os.waitpid(pid, 0)
        control.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _limit(memory_bytes: int) -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes, in_use + memory_bytes))
    with suppress(OSError):  # /proc may be read-only
        # If the host runs out of memory, the kernel kills this process first, and not a runner with its model.
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def _serve(connection: socket.socket, cpu_s: float) -> NoReturn:
    chat = Chat()
    capabilities.drop()
    landlock.restrict_thread()
    seccomp.outside()
    seccomp.no_files()
    with connection.makefile("rb") as stream:
        while (data := framing.read_blocking(stream)) is not None:
            # The signal's default action ends the process, also within native code that runs for ever.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            reply = frame(chat.answer(decode_to_helper(data)))
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(reply)
            if len(data) > LARGE_BYTES:
                libc.trim_heap()
    os._exit(0)


class Chat:
    """Answers messages."""

    def __init__(self) -> None:
        """Load the libraries, and use them once: a process faults in its code at first use, which takes 10 ms."""
        self._code = ChatCode()
        self._templates: Templates | None = None
        self._source = ""  # of the template
        self._parser = lru_cache(PARSERS)(self._code.parser)
        self._compile(Template(source="chatml"))
        check(Constraint(kind="json_schema", text="{}"))

    def answer(self, message: ToHelper) -> FromHelper:
        try:
            match message:
                case Template():
                    return self._compile(message)
                case Render():
                    return self._render(message.conversation, message.output)
                case Parse():
                    parser = self._parser(message.source)
                    parsed = parser.parse(message.answer.encode(), partial=message.partial)
                    is_generic = message.source.is_generic
                    return Answer(tools.read(parsed, partial=message.partial) if is_generic else parsed)
                case Check():
                    check(message.constraint)
                    return Checked()
                case _:
                    assert_never(message)
        except ChatError as e:
            if "std::bad_alloc" in str(e):  # llama.cpp adds where in the template it was
                raise MemoryError from e
            return Rejected(str(e))
        except ConstraintError as e:
            return Unenforceable(str(e))
        except (msgspec.MsgspecError, RecursionError) as e:
            return Rejected(f"the request is not valid: {e}")

    def _compile(self, template: Template) -> Compiled:
        self._source = template.source
        self._templates = self._code.templates(template.source, bos_token=template.bos, eos_token=template.eos)
        self._render(TRIAL)
        return Compiled(self._templates.capabilities)

    def _render(self, conversation: bytes, output: Schema | Grammar | None = None) -> Prompt:
        assert self._templates is not None
        if tools.mentions_tools(conversation):
            return self._with_tools(json.decode(conversation), output)
        rendered = self._filled(conversation)
        return self._prompt(rendered, constrained(output, rendered))

    def _prompt(self, rendered: Rendered, constraint: Constraint | None = None) -> Prompt:
        says_all, is_open = reading(rendered.parser)
        source = source_of(rendered)
        return Prompt(
            text=rendered.prompt,
            stops=rendered.stops,
            shown=rendered.preserved_tokens,
            source=None if says_all else source,
            is_open=is_open,
            before=self._parser(source).parse(b"", partial=True),
            constraint=constraint,
            thinking=thinking(rendered),
        )

    def _with_tools(self, conversation: dict[str, Any], output: Schema | Grammar | None) -> Prompt:
        """Render a conversation that has tools, calls or results: with the template's own form of calls if llama.cpp
        can read it, or else with the generic one."""
        assert self._templates is not None
        capabilities = self._templates.capabilities
        asked = msgspec.convert(conversation, tools.Asked)
        if asked.tools and output is not None:
            raise ChatError("answers with tools cannot have another form")
        most = 0 if not asked.tools else None if asked.parallel_tool_calls else 1
        if capabilities["supports_tools"] or capabilities["supports_tool_calls"]:
            rendered = self._rendered(tools.fitted(conversation, asked, capabilities, self._source))
            if tools.has_form(rendered, asked, capabilities):
                constraint = tools.constraint(rendered) or constrained(output, rendered)
                return replace(self._prompt(rendered, constraint), most_calls=most)
        rendered = self._rendered(tools.generic(conversation, asked))
        if not asked.tools:
            return self._prompt(rendered, constrained(output, rendered))
        prompt = self._prompt(rendered, tools.grammar(asked, rendered))
        source = replace(source_of(rendered), is_generic=True)
        return replace(prompt, source=source, is_open=False, most_calls=most)

    def _rendered(self, conversation: dict[str, Any]) -> Rendered:
        """Render a conversation with calls or results, if need be with repaired ones."""
        try:
            rendered = self._filled(json.encode(conversation))
        except ChatError:
            repaired = tools.repaired(conversation)
            if repaired == conversation:
                raise
            rendered = self._filled(json.encode(repaired))
        try:
            self._parser(source_of(rendered)).parse(b"", partial=True)
        except ChatError:
            # After results, a prompt may end otherwise than the parser expects; it need not know.
            plain = self._filled(json.encode({**conversation, "messages": [{"role": "user", "content": "Hello"}]}))
            return replace(rendered, generation_prompt=plain.generation_prompt)
        return rendered

    def _filled(self, conversation: bytes) -> Rendered:
        """Render a conversation: with one message of the user instead of several, if the template takes turns only."""
        try:
            return self._placed(conversation)
        except ChatError:
            if (other := joined(conversation)) is None:
                raise
            return self._placed(other)

    def _placed(self, conversation: bytes) -> Rendered:
        """Render a conversation: with all system messages as the first one, if the template has no place for others."""
        other = fronted(conversation)
        try:
            rendered = self._as_it_is(conversation)
        except ChatError:
            if other is None:
                raise
        else:
            if other is None or all(text in rendered.prompt for text in other.texts):
                return rendered
        return self._as_it_is(other.conversation)

    def _as_it_is(self, conversation: bytes) -> Rendered:
        assert self._templates is not None
        return self._templates.render(self._with_defaults(conversation))

    def _with_defaults(self, conversation: bytes) -> bytes:
        assert self._templates is not None
        return with_defaults(conversation, self._templates.capabilities["supports_thinking"], self._source)


def source_of(rendered: Rendered) -> ParserSource:
    """Return what makes the parser of the answers to a prompt."""
    return ParserSource(rendered.format, rendered.parser, rendered.generation_prompt)


def thinking(rendered: Rendered) -> Thinking | None:
    """Return where an answer to a prompt reasons; None if it does not, or if the prompt has closed its reasoning."""
    start, ends = rendered.thinking_start, rendered.thinking_ends
    if not (start and ends):
        return None
    if start.startswith(HARMONY_CHANNEL):  # each part of an answer is in a channel, and the last one is the answer
        return Thinking(is_open=False, start=start, ends=[HARMONY_FINAL], close=HARMONY_CLOSE)
    _, begun, thought = rendered.generation_prompt.rpartition(start)
    if begun and any(end in thought for end in ends):
        return None
    return Thinking(is_open=bool(begun), start=start, ends=ends, close=ends[0])


def constrained(output: Schema | Grammar | None, rendered: Rendered) -> Constraint | None:
    """Return the constraint that answers to a prompt have a form, after any reasoning."""
    if output is None:
        return None
    thinks = thinking(rendered)
    # Before the last channel there may be others than that of reasoning.
    is_thinking = thinks is not None and (thinks.is_open or thinks.start.startswith(HARMONY_CHANNEL))
    return Constraint(
        kind="gbnf" if isinstance(output, Grammar) else "json_schema",
        text=output.text if isinstance(output, Grammar) else output.schema.decode(),
        is_thinking=is_thinking,
        thinking_start=thinks.start if thinks is not None and not is_thinking else "",
        thinking_ends=rendered.thinking_ends if thinks is None else thinks.ends,
    )


def with_defaults(conversation: bytes, thinks: bool, template: str) -> bytes:
    """Add what llama-server adds to a request (tools/server/server-common.cpp, oaicompat_chat_params_parse; its
    `preserve_reasoning` is on by default)."""
    fields = json.decode(conversation, type=dict[str, msgspec.Raw])
    variables = json.decode(fields.get("chat_template_kwargs", b"{}"), type=dict[str, msgspec.Raw])
    defaults = {"enable_thinking": msgspec.Raw(json.encode(thinks))}
    effort = variables.get(EFFORT)
    word = "" if effort is None else bytes(effort).decode()
    if word.encode() in EFFORTS and word not in template.replace("'", '"'):
        variables = {name: value for name, value in variables.items() if name != EFFORT}
        if other := EFFORTS[word.encode()]:
            variables[EFFORT] = msgspec.Raw(other)
    variables = {"preserve_reasoning": msgspec.Raw(b"true"), **variables}
    return json.encode({**defaults, **fields, "chat_template_kwargs": variables})


@lru_cache(PARSERS)
def reading(parser: str) -> tuple[bool, bool]:
    """Return how a serialized parser (`common_peg_arena`, common/peg-parser.h) reads an answer: whether all of it is
    content, and whether content that has begun extends to its end.

    Only simple parsers are recognised; both are False for the others.
    """
    nodes: list[dict[str, Any]] = json.decode(parser)["parsers"] if parser else []
    contents = [nodes[node["child"]] for node in nodes if node.get("tag") == "content"]
    is_open = all(node["type"] == "until" and not node["delimiters"] for node in contents)
    others = [node for node in nodes if node not in contents and node.get("tag") != "content"]
    return is_open and all(node["type"] in FIXED for node in others), is_open
