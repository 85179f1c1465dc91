"""`mlx-mtp chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MTPError
from ..files import replacing
from . import options as o
from .generation import generating

if TYPE_CHECKING:
    from ..chat import Chat
    from ..session.options import GenerationOptions

QUOTES = '"""'

HELP = """\
/help              show this list
/reset             clear the conversation
/system [TEXT]     set or remove the system prompt
/think [on|off]    let the model think before it answers
/stats             statistics of the latest answer
/save FILE         write the conversation to a JSON file
/quit              leave (or Ctrl-D)
A \\ at the end continues a line in the next one. Put text of several lines between \"\"\" and \"\"\".
Ctrl-C ends the running answer."""


@generating(max_tokens=2048)
def chat(
    model: o.Model = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    adapter: o.Adapter = None,
    *,
    generation: GenerationOptions,
    system: o.System = None,
    think: o.Think = False,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    trace: o.TraceFile = None,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Chats with a model; /help lists the commands."""
    with o.load(model, drafter, no_draft, quantize, quantize_drafter, adapter=adapter) as lm, o.tracing(lm, trace):
        name = "the embedded demo pair" if model is None else model
        print(f"{name}{'' if lm.drafter_config else ', without a drafter'}; /help lists commands", file=sys.stderr)
        conversation = lm.chat(system, think)
        for text, quoted in inputs(_line_reader(), stoppable=sys.stdin.isatty()):
            try:
                if quoted or not text.startswith("/"):
                    _answer(conversation, text, generation)
                elif not _command(conversation, text):
                    return
            except MTPError as error:  # the chat continues: the user can reset or shorten it
                print(f"error: {error}", file=sys.stderr)


def _answer(conversation: Chat, text: str, generation: GenerationOptions) -> None:
    """Streams an answer and prints the status line."""
    chunks = conversation.send(text, options=generation)
    try:
        o.show(chunks)
    except KeyboardInterrupt:
        chunks.close()
        print(" [stopped]", end="", file=sys.stderr)
    print(flush=True)
    if stats := conversation.stats:
        cached = f", {stats.cached_tokens} of {stats.prompt_tokens} prompt tokens cached" if stats.cached_tokens else ""
        print(f"[{o.status(stats)}{cached}]", file=sys.stderr)


def _command(conversation: Chat, line: str) -> bool:
    """Runs a command; False ends the chat."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        print(HELP, file=sys.stderr)
    elif name == "/reset":
        conversation.reset()
        print("conversation cleared", file=sys.stderr)
    elif name == "/system":
        conversation.system = rest or None
        print("system prompt set" if rest else "no system prompt", file=sys.stderr)
    elif name == "/think":
        _set_thinking(conversation, rest)
    elif name == "/stats":
        _print_stats(conversation)
    elif name == "/save":
        _save_to(rest, conversation)
    else:
        print(f"unknown command {line!r}; /help lists the commands", file=sys.stderr)
    return True


def _set_thinking(conversation: Chat, value: str) -> None:
    if value not in ("", "on", "off"):
        print("use /think, /think on or /think off", file=sys.stderr)
        return
    conversation.thinking = value == "on" if value else not conversation.thinking
    print(f"thinking {'on' if conversation.thinking else 'off'}", file=sys.stderr)


def _print_stats(conversation: Chat) -> None:
    stats = conversation.stats
    if stats is None:
        print("no answer yet", file=sys.stderr)
        return
    print(
        f"prompt       {stats.prompt_tokens} tokens, {stats.cached_tokens} cached, "
        f"{stats.prompt_seconds:.2f} s\n"
        f"answer       {o.status(stats)}\n"
        f"accepted     {stats.accepted} of {stats.drafted} drafts; by position {stats.accepted_by_position}\n"
        f"rounds       by draft length {dict(sorted(stats.draft_lengths.items()))}\n"
        f"peak memory  {stats.peak_memory_bytes / 2**20:.0f} MiB",
        file=sys.stderr,
    )


def _save_to(name: str, conversation: Chat) -> None:
    if not name:
        print("use /save FILE", file=sys.stderr)
        return
    try:
        _save(conversation, Path(name).expanduser())
        print(f"saved to {name}", file=sys.stderr)
    except OSError as error:
        print(f"error: not saved: {o.os_message(error)}", file=sys.stderr)
    except (RuntimeError, ValueError) as error:  # a home folder that doesn't exist ("~name"); a NUL in the name
        print(f"error: not saved: {error}", file=sys.stderr)


def _save(conversation: Chat, path: Path) -> None:
    """Writes the conversation as JSON; if that fails, an older file stays as it is.

    Raises:
        OSError: The file can't be written.
        ValueError: The name can't be one of a file.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": conversation.system}] if conversation.system else []
    with replacing(path) as aside:
        aside.write_text(json.dumps(messages + conversation.messages, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _line_reader() -> Callable[[str], str]:
    """A function that reads a line and raises EOFError at the end: with editing in a terminal, else without prompt."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and history
        return input

    def read(_: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read


def inputs(read: Callable[[str], str], stoppable: bool) -> Iterator[tuple[str, bool]]:
    """Yields the texts that the user enters, joining continued lines.

    Args:
        read: Shows a prompt and reads a line; raises EOFError at the end.
        stoppable: Whether Ctrl-C drops the text that is being entered; else it ends the program.

    Yields:
        A text, and whether it was quoted, so that it can't be a command.
    """
    ended = False
    while not ended:
        text, quoted = "", False
        try:
            text = read("> ").strip()
            if quoted := text.startswith(QUOTES):
                text = text.removeprefix(QUOTES)
                while not text.rstrip().endswith(QUOTES):
                    text += "\n" + read(". ")
            else:
                while text.endswith("\\"):
                    text = text[:-1] + "\n"
                    text += read(". ")
        except KeyboardInterrupt:
            if not stoppable:
                raise
            print(file=sys.stderr)
            continue
        except EOFError:
            ended = True  # after the text entered so far
        if quoted:
            text = text.rstrip().removesuffix(QUOTES).strip("\n")
        if text.strip():
            yield text, quoted
