"""`mlx-mtp chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MTPError
from ..files import replacing
from . import options as o

if TYPE_CHECKING:
    from ..chat import Chat
    from ..session.options import GenerationOptions

QUOTES = '"""'

HELP = """\
/help              show this list
/reset             forget the conversation
/system [TEXT]     set the system prompt, or remove it
/think [on|off]    let the model think before it answers
/stats             figures of the latest answer
/save FILE         write the conversation to a JSON file
/quit              leave (or Ctrl-D)
A line that ends with \\ goes on in the next one; a text of several lines may stand between \"\"\" and \"\"\".
Ctrl-C ends the answer that is running."""


@o.generating(max_tokens=2048)
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
    debug: o.Debug = False,
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
            except MTPError as error:  # the conversation goes on: it can be reset, or shortened
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
        kept = f", {stats.cached_tokens} of {stats.prompt_tokens} prompt tokens kept" if stats.cached_tokens else ""
        print(f"[{o.status(stats)}{kept}]", file=sys.stderr)


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
        print("forgotten", file=sys.stderr)
    elif name == "/system":
        conversation.system = rest or None
        print("system prompt set" if rest else "no system prompt", file=sys.stderr)
    elif name == "/think":
        if rest not in ("", "on", "off"):
            print("use /think, /think on or /think off", file=sys.stderr)
            return True
        conversation.thinking = not conversation.thinking if not rest else rest == "on"
        print(f"thinking {'on' if conversation.thinking else 'off'}", file=sys.stderr)
    elif name == "/stats":
        _print_stats(conversation)
    elif name == "/save":
        if not rest:
            print("use /save FILE", file=sys.stderr)
            return True
        try:
            _save(conversation, Path(rest).expanduser())
            print(f"saved to {rest}", file=sys.stderr)
        except OSError as error:
            print(f"error: not saved: {o.os_message(error)}", file=sys.stderr)
        except (RuntimeError, ValueError) as error:  # "~somebody" unknown here; a NUL in the name
            print(f"error: not saved: {error}", file=sys.stderr)
    else:
        print(f"unknown command {line!r}; /help lists the commands", file=sys.stderr)
    return True


def _print_stats(conversation: Chat) -> None:
    stats = conversation.stats
    if stats is None:
        print("no answer yet", file=sys.stderr)
        return
    print(
        f"prompt       {stats.prompt_tokens} tokens, {stats.cached_tokens} kept from before, "
        f"{stats.prompt_seconds:.2f} s\n"
        f"answer       {o.status(stats)}\n"
        f"accepted     {stats.accepted} of {stats.drafted} drafts; by position {stats.accepted_by_position}\n"
        f"rounds       by draft length {dict(sorted(stats.draft_lengths.items()))}\n"
        f"peak memory  {stats.peak_memory_bytes / 2**20:.0f} MiB",
        file=sys.stderr,
    )


def _save(conversation: Chat, path: Path) -> None:
    """Writes aside and renames, so that an older file isn't lost if this one can't be written.

    Raises:
        OSError, ValueError: It can't be written there.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": conversation.system}] if conversation.system else []
    with replacing(path) as aside:
        aside.write_text(json.dumps(messages + conversation.messages, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _line_reader() -> Callable[[str], str]:
    """Reads a line, raising EOFError at the end; from a terminal with editing, from a pipe without a prompt."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401 - gives input() editing and history
        except ImportError:
            pass
        return input

    def read(_: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read


def inputs(read: Callable[[str], str], stoppable: bool) -> Iterator[tuple[str, bool]]:
    """What the user enters, lines that belong together as one text, and whether it was quoted: then it's no command.

    Args:
        read: Shows a prompt and reads a line; raises EOFError at the end.
        stoppable: Whether Ctrl-C drops what is being entered; else it ends the program.
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
            ended = True  # what was entered before it counts
        if quoted:
            text = text.rstrip().removesuffix(QUOTES).strip("\n")
        if text.strip():
            yield text, quoted
