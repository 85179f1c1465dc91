"""A chat window, as a start for an app.

    python scripts/example_app.py [MODEL ...]

A model is a folder or a repository's name; without any there is the embedded pair. Text that came from accepted drafts
is shown in another shade. The model is in example_worker.py, in a thread of its own; this is tkinter, which runs in the
main thread alone and looks for the worker's events every few milliseconds. docs/macos-apps.md has the same for other
toolkits.
"""

from __future__ import annotations

import queue
import sys
import tkinter as tk
from collections.abc import Sequence
from tkinter import filedialog, ttk
from typing import Any

from scripts.example_worker import Ended, Event, Failed, Status, Text, Worker

EMBEDDED = "Embedded pair"

POLL_MS = 30
"""Milliseconds between two looks for events: text that appears this often looks fluent."""

SHADES: dict[str, dict[str, Any]] = {
    "you": {"foreground": "#6b6b70", "spacing1": 10, "spacing3": 4},
    "own": {"foreground": "#1d1d1f"},
    "drafted": {"foreground": "#1768b3"},
    "note": {"foreground": "#a05a00"},
}
"""How the parts of a conversation look; "own" is what the target chose itself."""


class ChatWindow:
    """The window: a model picker, the conversation, a field for the next message, and a status line."""

    def __init__(self, root: tk.Tk, worker: Worker, models: Sequence[str] = ()) -> None:
        """Fills a window and begins to load the first model.

        Args:
            root: The window.
            worker: Answers; closed with the window.
            models: What the picker offers beside the embedded pair.
        """
        self.root, self.worker, self.busy = root, worker, False
        root.title("mlx-mtp")
        root.minsize(480, 360)
        root.protocol("WM_DELETE_WINDOW", self.close)
        root.columnconfigure(0, weight=1)
        root.rowconfigure(1, weight=1)
        self._make_toolbar([*models, EMBEDDED])
        self._make_conversation()
        self._make_entry()
        self.status = ttk.Label(root, padding=(10, 0, 10, 8))
        self.status.grid(row=3, sticky="ew")
        self.choose()
        self._poll()

    # What the user does

    def choose(self) -> None:
        """Loads the model that the picker names."""
        name = self.picker.get().strip() or EMBEDDED
        self._clear()
        self._set_busy(True)
        self.worker.load(None if name == EMBEDDED else name)

    def choose_folder(self) -> None:
        """Lets the user choose a model's folder."""
        if folder := filedialog.askdirectory(title="A folder with a Gemma 4 model"):
            self.picker.set(folder)
            self.choose()

    def send(self) -> None:
        """Sends the message in the field, unless it is empty or an answer is running."""
        text = self.entry.get("1.0", "end").strip()
        if text and not self.busy:
            self.entry.delete("1.0", "end")
            self._write_line(text, "you")
            self._set_busy(True)
            self.worker.ask(text)

    def stop(self) -> None:
        """Ends the running answer; what came of it stays."""
        self.worker.stop()

    def reset(self) -> None:
        """Begins a new conversation."""
        self._clear()
        self._set_busy(True)
        self.worker.reset()

    def close(self) -> None:
        """Closes the window at once; the worker frees the model meanwhile."""
        self.worker.close()
        self.root.destroy()

    # What the worker reports

    def _poll(self) -> None:
        """Shows all events that are there, and looks again soon."""
        try:
            while True:
                self._show(self.worker.events.get_nowait())
        except queue.Empty:
            self.root.after(POLL_MS, self._poll)

    def _show(self, event: Event) -> None:
        if isinstance(event, Status):
            self.status["text"] = event.text
        elif isinstance(event, Text):
            self._write([(span.text, "drafted" if span.drafted else "own") for span in event.spans])
        elif isinstance(event, Ended):
            self._write([(f" [{event.note}]", "note")] if event.note else [])
            self._set_busy(False)
        elif isinstance(event, Failed):
            self._write_line(event.message, "note")
            self.status["text"] = ""
            self._set_busy(False)

    def _write(self, pieces: Sequence[tuple[str, str]]) -> None:
        """Adds pieces of text, each with its shade, and follows them unless the user has scrolled up."""
        at_end = self.text.dlineinfo("end-1c") is not None
        self.text["state"] = "normal"
        for piece, shade in pieces:
            self.text.insert("end", piece, shade)
        self.text["state"] = "disabled"
        if at_end:
            self.text.see("end")

    def _write_line(self, line: str, shade: str) -> None:
        """Adds a line of its own."""
        begins = self.text.get("end-2c") == "\n"  # a text always ends with a newline, after what was written
        self._write([(f"{line}\n" if begins else f"\n{line}\n", shade)])

    def _clear(self) -> None:
        self.text["state"] = "normal"
        self.text.delete("1.0", "end")
        self.text["state"] = "disabled"

    def _set_busy(self, busy: bool) -> None:
        self.busy = busy
        self.send_button["state"] = "disabled" if busy else "normal"
        self.stop_button["state"] = "normal" if busy else "disabled"

    # Widgets

    def _make_toolbar(self, models: Sequence[str]) -> None:
        bar = ttk.Frame(self.root, padding=(10, 8))
        bar.grid(row=0, sticky="ew")
        bar.columnconfigure(0, weight=1)
        self.picker = ttk.Combobox(bar, values=[*models])
        self.picker.set(models[0])
        self.picker.bind("<<ComboboxSelected>>", lambda _: self.choose())
        self.picker.bind("<Return>", lambda _: self.choose())
        self.picker.grid(row=0, column=0, sticky="ew", padx=(0, 6))
        ttk.Button(bar, text="Folder ...", command=self.choose_folder).grid(row=0, column=1, padx=(0, 6))
        ttk.Button(bar, text="New chat", command=self.reset).grid(row=0, column=2)

    def _make_conversation(self) -> None:
        frame = ttk.Frame(self.root, padding=(10, 0))
        frame.grid(row=1, sticky="nsew")
        frame.columnconfigure(0, weight=1)
        frame.rowconfigure(0, weight=1)
        self.text = tk.Text(frame, wrap="word", state="disabled", padx=12, pady=8, borderwidth=0)
        self.text.configure(font="TkTextFont", background="white")
        scrollbar = ttk.Scrollbar(frame, command=self.text.yview)
        self.text["yscrollcommand"] = scrollbar.set
        self.text.bind("<Button-1>", lambda _: self.text.focus_set())  # so that a disabled text can be copied from
        self.text.grid(row=0, column=0, sticky="nsew")
        scrollbar.grid(row=0, column=1, sticky="ns")
        for shade, look in SHADES.items():
            self.text.tag_configure(shade, **look)

    def _make_entry(self) -> None:
        bar = ttk.Frame(self.root, padding=(10, 8))
        bar.grid(row=2, sticky="ew")
        bar.columnconfigure(0, weight=1)
        self.entry = tk.Text(bar, height=3, wrap="word", padx=8, pady=6)
        self.entry.configure(font="TkTextFont", background="white", foreground="#1d1d1f", insertbackground="#1d1d1f")
        self.entry.bind("<Return>", self._on_return)
        self.entry.bind("<Shift-Return>", lambda _: None)  # a new line, as usual
        self.entry.grid(row=0, column=0, rowspan=2, sticky="ew", padx=(0, 6))
        self.entry.focus_set()
        self.send_button = ttk.Button(bar, text="Send", command=self.send)
        self.send_button.grid(row=0, column=1, sticky="ew")
        self.stop_button = ttk.Button(bar, text="Stop", command=self.stop)
        self.stop_button.grid(row=1, column=1, sticky="ew")
        self.root.bind("<Escape>", lambda _: self.stop())

    def _on_return(self, _: object) -> str:
        self.send()
        return "break"  # no new line


def main() -> None:
    """Opens the window and runs until it is closed."""
    root = tk.Tk()
    root.geometry("760x560")
    ChatWindow(root, Worker(), sys.argv[1:])
    root.mainloop()


if __name__ == "__main__":
    main()
