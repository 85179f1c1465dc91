"""Messages from a terminal, with editing, history and completion by prompt_toolkit."""

from __future__ import annotations

import hashlib
import re
import select
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.shortcuts import CompleteStyle

from .lines import Entry, entry, unfinished

_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(0x7F, 0xA0)))
"""Characters that no message means: a paste may hold them, the tokenizer would take them for text."""

_LARGE_PASTE = 5_000
"""Characters of a paste from which on the line shows a note in its place: more would fill the screen."""

_PAUSE_SECONDS = 0.02
"""How long a terminal without bracketed paste may take until it sends the next piece of a paste."""

_TYPED_AHEAD_SECONDS = 0.3
"""What arrives this soon after the prompt was typed while an answer ran: each Enter ends a message of its own."""

_PASTED = re.compile(r"\[pasted \w+: [\d,]+ lines, [\d,]+ characters\]")


class _FileHistory(FileHistory):
    """A history whose file may become impossible to write: the chat goes on."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


class Editor:
    """Reads messages in a terminal: Enter sends, Alt-Enter begins a new line, a paste is one piece."""

    edits = True

    def __init__(self, history: Path | None, commands: Sequence[str], options: Sequence[str]) -> None:
        """Sets up the line.

        Args:
            history: File of the history; None keeps it in memory.
            commands: Names of the commands, for completion.
            options: Names of the options of /set, for completion.
        """
        kept: History = InMemoryHistory() if history is None else _FileHistory(str(history))
        self._pastes: dict[str, str] = {}
        self._prompted = 0.0
        self._session: PromptSession[str] = PromptSession(
            history=kept,
            key_bindings=_keys(self._shortened, self._pasting),
            completer=_Completer(commands, options),
            complete_style=CompleteStyle.READLINE_LIKE,  # others keep lines below the prompt free for a menu
            complete_while_typing=False,
            multiline=True,
            prompt_continuation="  ",
            enable_open_in_editor=True,
        )

    def read(self, begin: str = "") -> Entry | None:
        """See `Reader.read`."""
        self._prompted = time.monotonic()
        try:
            text = self._session.prompt("> ", default=begin)
        except KeyboardInterrupt:
            return None
        text = re.sub(r"\\\n", "\n", text) if not text.lstrip().startswith('"""') else text
        text = _PASTED.sub(lambda found: self._pastes.get(found[0], found[0]), text)
        return entry(text.translate(_CONTROLS))

    def ask(self, question: str) -> str:
        """See `Reader.ask`."""
        asking: PromptSession[str] = PromptSession()  # without the history
        try:
            return asking.prompt(question).strip()
        except (KeyboardInterrupt, EOFError):
            return ""

    def _pasting(self, event: KeyPressEvent) -> bool:
        """Whether an Enter is part of a paste, in a terminal that doesn't mark pastes: more follows at once."""
        if time.monotonic() - self._prompted < _TYPED_AHEAD_SECONDS:
            return False
        if any(press.key != Keys.CPRResponse for press in event.key_processor.input_queue):
            return True
        return bool(select.select([sys.stdin], [], [], _PAUSE_SECONDS)[0])

    def _shortened(self, paste: str) -> str:
        """A paste, or a note in its place if it is large; `read` puts it back."""
        if len(paste) <= _LARGE_PASTE:
            return paste
        name = hashlib.sha256(paste.encode("utf-8", "replace")).hexdigest()[:6]
        note = f"[pasted {name}: {paste.count(chr(10)) + 1:,} lines, {len(paste):,} characters]"
        self._pastes[note] = paste
        return note


def _keys(shortened: Callable[[str], str], pasting: Callable[[KeyPressEvent], bool]) -> KeyBindings:
    keys = KeyBindings()

    @keys.add(Keys.BracketedPaste)
    def _(event: KeyPressEvent) -> None:
        pasted = event.data.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)
        event.current_buffer.insert_text(shortened(pasted))

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        entered = entry(buffer.text)
        if (pasting(event) and not (entered and entered.command)) or unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Completer(Completer):
    """Completes names of commands, and what follows them."""

    def __init__(self, commands: Sequence[str], options: Sequence[str]) -> None:
        self._commands = WordCompleter([f"{name} " for name in commands], WORD=True)
        path, switch = PathCompleter(expanduser=True), WordCompleter(["on", "off"])
        self._after: dict[str, Completer] = {
            **dict.fromkeys(("/file", "/load", "/save"), path),
            **dict.fromkeys(("/think", "/thoughts", "/drafts"), switch),
            "/set": WordCompleter(list(options)),
        }

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/"):
            return ()
        if not space:
            return self._commands.get_completions(document, complete_event)
        completer = self._after.get(name)
        return completer.get_completions(Document(rest), complete_event) if completer else ()
