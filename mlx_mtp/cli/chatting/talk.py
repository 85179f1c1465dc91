"""The loop of the chat: a message in, an answer out, and what stays between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...errors import MTPError
from .. import options as o
from . import commands
from .attached import Attached
from .lines import Reader
from .screen import Screen
from .settings import Settings
from .several import show_several
from .store import Messages, Store

if TYPE_CHECKING:
    from ...chat import Chat
    from ...session.answer import Chunk
    from ...session.options import GenerationOptions


@dataclass
class Talk:
    """A conversation with somebody at a terminal or a pipe.

    Attributes:
        chat: The conversation.
        generation: Options of the answers.
        settings: Changes them.
        reader: Where messages and commands come from.
        screen: Where answers go.
        store: What is kept for later sessions; None for nothing.
        answers: Number of answers to each message.
        count: Counts the tokens of a text.
        context: Tokens that the model's context holds.
        attached: Files that go into the next message.
        thoughts: Reasoning of each of the latest answers.
    """

    chat: Chat
    generation: GenerationOptions
    settings: Settings
    reader: Reader
    screen: Screen
    store: Store | None
    answers: int
    count: Callable[[str], int]
    context: int
    attached: list[Attached] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    _begin: str = ""
    _replacing: bool = False
    # The latest message, what was typed of it, and the files in it.
    _sent: tuple[str, str, list[Attached]] = ("", "", [])

    @property
    def messages(self) -> Messages:
        """The conversation as files hold it: the system prompt, if there is one, and the turns."""
        system = [{"role": "system", "content": self.chat.system}] if self.chat.system else []
        return [*system, *self.chat.messages]

    def run(self) -> None:
        """Reads and answers until the user leaves."""
        while True:
            begin, self._begin = self._begin, ""
            try:
                entered = self.reader.read(begin)
            except EOFError:
                return
            replacing, self._replacing = self._replacing, False
            try:
                if entered is None:
                    if replacing:  # the files are those of the message that stays
                        self.attached.clear()
                    continue
                if not entered.command:
                    self.say(entered.text, replacing)
                elif not commands.run(self, entered.text):
                    return
            except MTPError as error:  # the chat goes on: the user can say something else
                print(f"error: {error}", file=sys.stderr)

    def edit(self, message: str) -> None:
        """Begins the next entry with the latest message, whose place it takes; files in it are attached again."""
        sent, typed, attached = self._sent
        self._replacing = True
        self._begin, self.attached = (typed, list(attached)) if message == sent else (message, [])

    def say(self, text: str, replacing: bool = False) -> None:
        """Sends a message with the attached files, and shows the answer.

        Args:
            text: The message.
            replacing: Whether it takes the place of the latest turn, unless nothing comes of it.

        Raises:
            MTPError: The message can't be answered; the conversation is as it was.
        """
        before, stats = self.messages, self.chat.stats
        if replacing:
            self.chat.undo()
        try:
            message = "\n\n".join([text, *map(str, self.attached)])
            self._answer(message)
        finally:
            if replacing and len(self.messages) < len(before):
                self.chat.restore(before)
                self.chat.stats = stats
        if self.chat.stats:  # else it was stopped before anything came, and can be sent again
            self._sent = message, text, self.attached
            self.attached = []
            self.keep()

    def keep(self) -> None:
        """Keeps the conversation for later sessions, unless it is a script's."""
        if self.store and self.chat.messages and sys.stdin.isatty():
            try:
                self.store.keep(self.messages)
            except OSError as error:
                print(f"error: the conversation can't be kept: {o.os_message(error)}", file=sys.stderr)
                self.store = None  # said once

    def pick(self, answer: str) -> None:
        """Goes on with another of the latest answers.

        Args:
            answer: Its number as the user sees it, from 1.

        Raises:
            MTPError: There is none of that number.
        """
        try:
            self.chat.choose(int(answer) - 1)
        except (MTPError, ValueError):
            raise MTPError(f"there is no answer {answer!r} to go on with") from None
        self.screen.note(f"the conversation goes on with answer {int(answer)}")
        self.keep()

    def _answer(self, message: str) -> None:
        options = replace(self.generation, prefill_progress=self.screen.prefill)
        forgotten = self.chat.forgotten
        self.thoughts = [""] * self.answers
        stopped = False
        try:
            if self.answers == 1:
                with closing(self.chat.send(message, options=options)) as chunks:
                    self._say_what_left(forgotten)
                    self.screen.show(chunk for _, chunk in self._noting((0, chunk) for chunk in chunks))
            else:
                with closing(self.chat.send_several(message, self.answers, options=options)) as pairs:
                    self._say_what_left(forgotten)
                    show_several(self.screen, self._noting(pairs), self.answers)
        except KeyboardInterrupt:
            stopped = True
        self._show_status(stopped)
        if self.answers > 1 and self.chat.stats:
            self._ask_which()

    def _ask_which(self) -> None:
        number = self.reader.ask(f"Which answer goes on? 1 to {self.answers} [1] ")
        try:
            if number:
                self.pick(number)
        except MTPError as error:
            self.screen.note(f"{error}: answer 1 goes on; /pick N chooses another")

    def _noting(self, chunks: Iterable[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk]]:
        for i, chunk in chunks:
            self.thoughts[i] += chunk.reasoning
            yield i, chunk

    def _say_what_left(self, before: int) -> None:
        if self.chat.forgotten > before:
            self.screen.note(
                f"[the context is full: the model no longer sees the first {self.chat.forgotten} messages]"
            )

    def _show_status(self, stopped: bool) -> None:
        if stopped:
            self.screen.note("[stopped]")
        if stats := self.chat.stats:
            cached = f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens cached"
            self.screen.note(f"[{o.status(stats)}{', ' + cached if stats.cached_tokens else ''}]")
