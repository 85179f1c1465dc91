"""The chat's commands: lines that begin with /."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ...errors import MTPError
from ...files import expanded
from .. import options as o
from . import clipboard
from .attached import read_attached
from .store import read_conversation, write_conversation

if TYPE_CHECKING:
    from .talk import Talk

MOST_ANSWERS = 8
"""Most answers to a message: more can't be compared at a glance."""


@dataclass(frozen=True)
class _Command:
    """A command.

    Attributes:
        usage: How it is typed.
        help: What it does.
        run: Takes what stands behind its name.
    """

    usage: str
    help: str
    run: Callable[[Talk, str], None]


def run(talk: Talk, line: str) -> bool:
    """Runs a command.

    Returns:
        Whether the chat goes on.

    Raises:
        MTPError: It can't be done, or there is no such command.
    """
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise MTPError(f"unknown command {name!r}; {f'did you mean {near[0]}? ' if near else ''}/help lists them")
    COMMANDS[name].run(talk, rest.strip())
    return True


def _help(talk: Talk, _: str) -> None:
    lines = [f"{command.usage:22}{command.help}" for command in COMMANDS.values()]
    lines.append(f"{'/quit':22}leave (or Ctrl-D)")
    lines += [_EDITING if talk.reader.edits else _LINES, "Ctrl-C ends the running answer."]
    talk.screen.note("\n".join(lines))


_LINES = 'A \\ at the end continues a line in the next one. Put text of several lines between """ and """.'
_EDITING = (
    "Alt-Enter begins a new line, and so does \\ before Enter; a paste is one piece.\n"
    "Up and Ctrl-R find earlier messages, Tab completes, Ctrl-X Ctrl-E opens $EDITOR."
)


def _reset(talk: Talk, _: str) -> None:
    talk.chat.reset()
    talk.attached.clear()
    talk.thoughts = []
    talk.screen.note("conversation cleared")


def _undo(talk: Talk, _: str) -> None:
    text = talk.chat.undo()
    if text is None:
        raise MTPError("nothing to undo")
    talk.screen.note(f"taken back: {_beginning(text)}")
    talk.keep()


def _retry(talk: Talk, _: str) -> None:
    text = _last_message(talk)
    if talk.generation.seed is not None:
        talk.screen.note("[the same seed gives the same answer: /set seed default draws a new one]")
    attached, talk.attached = talk.attached, []  # they belong to the next message
    try:
        talk.say(text, replacing=True)
    finally:
        talk.attached = attached


def _edit(talk: Talk, _: str) -> None:
    if not talk.reader.edits:
        raise MTPError("nothing here can edit a line: /undo, and send the message again")
    talk.edit(_last_message(talk))


def _last_message(talk: Talk) -> str:
    messages = talk.chat.messages
    if not messages:
        raise MTPError("there is no message yet")
    return str(messages[-2]["content"])


def _pick(talk: Talk, rest: str) -> None:
    talk.pick(rest)


def _answers(talk: Talk, rest: str) -> None:
    if not rest.isdecimal() or not 1 <= int(rest) <= MOST_ANSWERS:
        raise MTPError(f"use /n with a number from 1 to {MOST_ANSWERS}")
    talk.answers = int(rest)
    talk.screen.note(f"{talk.answers} answer{'s' * (talk.answers > 1)} to each message")


def _system(talk: Talk, rest: str) -> None:
    talk.chat.system = rest or None
    talk.screen.note("system prompt set" if rest else "no system prompt")


def _think(talk: Talk, rest: str) -> None:
    talk.chat.thinking = _switched("/think", rest, talk.chat.thinking)
    talk.screen.note(f"thinking {_on(talk.chat.thinking)}")


def _thoughts(talk: Talk, rest: str) -> None:
    if rest:
        talk.screen.thoughts = _switched("/thoughts", rest, talk.screen.thoughts)
        talk.screen.note(f"thoughts {'shown' if talk.screen.thoughts else 'folded'}")
        return
    thoughts = [thought.strip() for thought in talk.thoughts if thought.strip()]
    if not thoughts:
        raise MTPError("the latest answer has no thoughts; /think on asks for some")
    talk.screen.note("\n---\n".join(thoughts))


def _drafts(talk: Talk, rest: str) -> None:
    if not talk.screen.styled:
        raise MTPError("only a terminal with styles can show drafts")
    talk.screen.drafts = _switched("/drafts", rest, talk.screen.drafts)
    talk.screen.note(f"drafts {DRAFTS_SHOWN if talk.screen.drafts else 'not shown'}")


DRAFTS_SHOWN = "shown: accepted drafts in another shade, in plain text"


def _set(talk: Talk, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if not name:
        shown = {it.name: getattr(talk.generation, it.name) for it in fields(talk.generation)}
        lines = (f"{name:22}{'the default' if shown[name] is None else shown[name]}" for name in talk.settings.names)
        talk.screen.note("\n".join(lines))
        return
    value = value.strip()
    if not value:
        raise MTPError("use /set OPTION VALUE; default for that of the command line")
    talk.generation = talk.settings.changed(talk.generation, name, value)
    talk.screen.note(f"{name} set to {value}")


def _stats(talk: Talk, _: str) -> None:
    stats = talk.chat.stats
    if stats is None:
        raise MTPError("no answer yet")
    talk.screen.note(
        f"prompt       {stats.prompt_tokens} tokens, {stats.cached_tokens} cached, "
        f"{stats.prompt_seconds:.2f} s; the context holds {talk.context:,}\n"
        f"answer       {o.status(stats)}\n"
        f"accepted     {stats.accepted} of {stats.drafted} drafts; by position {stats.accepted_by_position}\n"
        f"rounds       by draft length {dict(sorted(stats.draft_lengths.items()))}\n"
        f"peak memory  {stats.peak_memory_bytes / 2**20:.0f} MiB"
    )


def _file(talk: Talk, rest: str) -> None:
    if rest == "-":
        talk.attached.clear()
        talk.screen.note("no files attached")
    elif rest:
        file = read_attached(rest)
        tokens = talk.count(str(file))
        if tokens > talk.context:
            raise MTPError(f"{file.name} has {tokens:,} tokens, the model's context only {talk.context:,}")
        talk.attached.append(file)
        talk.screen.note(f"{file.name}, {tokens:,} tokens, goes with the next message; /file - takes files out")
    else:
        names = ", ".join(file.name for file in talk.attached)
        talk.screen.note(f"attached: {names}" if names else "use /file PATH")


def _save(talk: Talk, rest: str) -> None:
    if not rest:
        raise MTPError("use /save FILE")
    try:
        write_conversation(expanded(rest), talk.messages)
    except OSError as error:
        raise MTPError(f"not saved: {o.os_message(error)}") from None
    except MTPError as error:
        raise MTPError(f"not saved: {error}") from None
    talk.screen.note(f"saved to {rest}")


def _load(talk: Talk, rest: str) -> None:
    if not rest:
        raise MTPError("use /load FILE")
    talk.chat.restore(read_conversation(expanded(rest)))
    _say_where(talk)


def resume(talk: Talk, _: str = "") -> None:
    """Goes on with the last conversation.

    Raises:
        MTPError: None is kept.
    """
    if talk.store is None:
        raise MTPError("nothing is kept between sessions here (--no-history)")
    talk.chat.restore(talk.store.resume())
    _say_where(talk)


def _say_where(talk: Talk) -> None:
    """Reminds of where a conversation ended."""
    messages = talk.chat.messages
    talk.attached.clear()
    talk.thoughts = []
    talk.screen.note(f"{len(messages)} messages" + (", the last ones:" if messages else ""))
    for sign, message in zip(("> ", ""), messages[-2:], strict=False):
        talk.screen.note(sign + _beginning(str(message["content"])))


def _copy(talk: Talk, _: str) -> None:
    if not talk.chat.messages:
        raise MTPError("no answer yet")
    talk.screen.note(clipboard.copy(str(talk.chat.messages[-1]["content"])))


def _switched(name: str, value: str, now: bool) -> bool:
    """A switch after "on", "off", or nothing, which turns it over."""
    if value not in ("", "on", "off"):
        raise MTPError(f"use {name}, {name} on or {name} off")
    return value == "on" if value else not now


def _on(switch: bool) -> str:
    return "on" if switch else "off"


def _beginning(text: str) -> str:
    """The beginning of a text, in a line."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        _Command("/help", "show this list", _help),
        _Command("/reset", "clear the conversation", _reset),
        _Command("/undo", "take back the latest message and its answer", _undo),
        _Command("/retry", "answer the latest message again", _retry),
        _Command("/edit", "change the latest message, and send it again", _edit),
        _Command("/n NUMBER", "several answers to each message, side by side", _answers),
        _Command("/pick NUMBER", "go on with another of several answers", _pick),
        _Command("/system [TEXT]", "set or remove the system prompt", _system),
        _Command("/think [on|off]", "let the model think before it answers", _think),
        _Command("/thoughts [on|off]", "show the latest thoughts; with on, always", _thoughts),
        _Command("/drafts [on|off]", "show which tokens came from drafts", _drafts),
        _Command("/set [OPTION VALUE]", "change an option of the generation; alone, list them", _set),
        _Command("/stats", "statistics of the latest answer", _stats),
        _Command("/file [PATH]", "put a text file into the next message", _file),
        _Command("/copy", "copy the latest answer to the clipboard", _copy),
        _Command("/save FILE", "write the conversation to a JSON file", _save),
        _Command("/load FILE", "go on with a saved conversation", _load),
        _Command("/resume", "go on with the last conversation", resume),
    )
}
