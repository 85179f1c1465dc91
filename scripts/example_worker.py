"""The half of the example app that has no window: a model and a conversation, in a thread of their own.

A window calls the methods of `Worker`, which all return at once, and takes `Worker.events` from its event loop. So it
never waits for a model, whatever toolkit it is made with; example_app.py shows it with tkinter.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx_mtp
from mlx_mtp.decode.request import Stats
from mlx_mtp.session.answer import Span

MAX_TOKENS = 2000
"""Most tokens of an answer."""

IDLE_SECONDS = 600
"""Seconds after which an unused model's memory goes to other apps; the next question loads it again."""


@dataclass(frozen=True)
class Status:
    """There is something new for the status line."""

    text: str


@dataclass(frozen=True)
class Text:
    """The answer goes on.

    Attributes:
        spans: The new text, token by token; each says whether it was drafted.
    """

    spans: Sequence[Span]


@dataclass(frozen=True)
class Ended:
    """A command was carried out.

    Attributes:
        note: What to say about an answer that ended early, else "".
    """

    note: str = ""


@dataclass(frozen=True)
class Failed:
    """A command wasn't carried out.

    Attributes:
        message: One line that says what to do.
    """

    message: str


Event = Status | Text | Ended | Failed


class Worker:
    """A model that answers in a thread of its own. All methods return at once, and may be called from any thread.

    Attributes:
        events: What happened. Each of `load`, `ask` and `reset` gives one `Ended` or `Failed` in the end.
    """

    def __init__(self) -> None:
        """Starts the thread, without a model."""
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._lm: mlx_mtp.MTPModel | None = None
        self._chat: mlx_mtp.Chat | None = None
        # A daemon: if the app quits while a model is loading, mlx_mtp ends it in good order.
        threading.Thread(target=self._run, name="worker", daemon=True).start()

    def load(self, model: str | None) -> None:
        """Changes to another model: a folder, a repository's name, or None for the embedded pair."""
        self.stop()
        self._commands.put(partial(self._load, model))

    def ask(self, text: str) -> None:
        """Asks the model; the answer comes as `Text` events."""
        self._stop = threading.Event()  # one for each answer: setting the one before can't end this
        self._commands.put(partial(self._ask, text, self._stop))

    def stop(self) -> None:
        """Ends the answer that is running, if any."""
        self._stop.set()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.stop()
        self._commands.put(self._reset)

    def close(self) -> None:
        """Ends the thread and frees the model; no command may follow."""
        self.stop()
        self._commands.put(None)

    # In the worker's thread

    def _run(self) -> None:
        while command := self._commands.get():
            try:
                command()
            except mlx_mtp.MTPError as error:
                self.events.put(Failed(str(error)))
            except Exception as error:  # a defect, but no reason to leave the window waiting for an end
                self.events.put(Failed(repr(error)))
        self._free()

    def _load(self, model: str | None) -> None:
        self.events.put(Status("loading the model ..."))
        self._free()  # first, since there may not be room for both
        self._lm = mlx_mtp.load(model, idle_unload=IDLE_SECONDS)
        self._chat = self._lm.chat()
        drafter = "with its drafter" if self._lm.drafter_config else "without a drafter"
        self.events.put(Status(f"{self._lm.folder.name if model else 'the embedded pair'}, {drafter}"))
        self.events.put(Ended())

    def _ask(self, text: str, stop: threading.Event) -> None:
        if self._lm is None or self._chat is None:
            raise mlx_mtp.MTPError("no model is loaded: choose one first")
        self.events.put(Status("thinking ..." if self._lm.loaded else "loading the model again ..."))
        reason = None
        # `prefill_progress` is called in the model's thread: it, too, only puts an event into the queue.
        for chunk in self._chat.send(text, MAX_TOKENS, cancel=stop, prefill_progress=self._report_prefill):
            self.events.put(Text(chunk.spans))
            self.events.put(Status(describe(chunk.stats)))
            reason = chunk.finish_reason
        self.events.put(Ended({"cancelled": "stopped", "length": "cut off"}.get(reason or "", "")))

    def _report_prefill(self, done: int, total: int) -> None:
        self.events.put(Status(f"reading {total} tokens: {done / total:.0%}"))

    def _reset(self) -> None:
        if self._chat:
            self._chat.reset()
        self.events.put(Ended())

    def _free(self) -> None:
        if self._lm:
            self._lm.close()
        self._lm = self._chat = None


def describe(stats: Stats) -> str:
    """The status line for a running or finished answer."""
    line = f"{stats.generated_tokens} tokens, {stats.generation_tps:.1f} tokens/s"
    if stats.drafted:
        line += f", {stats.accepted} of {stats.drafted} drafts accepted ({stats.accepted / stats.drafted:.0%})"
    return line
