"""The example app's window, driven as a user does (scripts/example_app.py). Collected where windows can be shown."""

from __future__ import annotations

import shutil
import threading
import time
import tkinter as tk
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import mlx_mtp
from scripts import example_app, example_worker, screenshot_app
from scripts.example_app import EMBEDDED, ChatWindow
from scripts.example_worker import Worker
from tests.support.display import display


@pytest.fixture(scope="module", autouse=True)
def shown() -> Iterator[None]:
    with display():
        yield


@pytest.fixture
def window() -> Iterator[ChatWindow]:
    window = ChatWindow(tk.Tk(), Worker())
    yield window
    if window.root.children:
        window.close()


def until(window: ChatWindow, true: Callable[[], bool]) -> None:
    """Lets the window run until something is true."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it never came about"
        window.root.update()
        time.sleep(0.005)


def ready(window: ChatWindow) -> None:
    until(window, lambda: not window.busy)


def say(window: ChatWindow, text: str) -> None:
    window.entry.insert("end", text)
    window.send_button.invoke()
    window.root.update()


def shown_text(window: ChatWindow, shade: str) -> str:
    """The text of one shade."""
    ranges = [str(index) for index in window.text.tag_ranges(shade)]
    return "".join(window.text.get(a, b) for a, b in zip(ranges[::2], ranges[1::2], strict=True))


def test_a_conversation(window: ChatWindow):
    ready(window)
    assert window.status["text"] == "the embedded pair, with its drafter"
    say(window, "  ")  # nothing to send
    assert not window.busy
    say(window, "Who are you?")
    assert window.busy and window.entry.get("1.0", "end") == "\n"
    window.entry.insert("end", "And now?")
    window.send()  # waits in the field
    ready(window)
    assert window.entry.get("1.0", "end") == "And now?\n"
    assert shown_text(window, "you") == "Who are you?\n"
    assert len(shown_text(window, "own")) > 5 and len(shown_text(window, "drafted")) > 10
    assert "drafts accepted" in window.status["text"]
    window.send_button.invoke()
    ready(window)
    assert shown_text(window, "you").count("\n") == 3  # the message begins a line of its own
    window.reset()
    ready(window)
    assert window.text.get("1.0", "end") == "\n"


def test_stop(window: ChatWindow, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(example_worker, "MAX_TOKENS", 10**6)
    ready(window)
    say(window, "Tell me a short story about a fox.")
    until(window, lambda: bool(shown_text(window, "own")))
    window.stop_button.invoke()
    ready(window)
    assert shown_text(window, "note") in (" [stopped]", "")  # it may have come to its end meanwhile
    assert str(window.stop_button["state"]) == "disabled" and str(window.send_button["state"]) == "normal"


def test_the_window_lives_while_a_model_loads(monkeypatch: pytest.MonkeyPatch):
    """Whatever the user does meanwhile returns at once; a load that waited in its thread would never end here."""
    gate, load = threading.Event(), mlx_mtp.load

    def late(*args: object, **options: object) -> mlx_mtp.MTPModel:
        assert gate.wait(60)
        return load(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(example_worker.mlx_mtp, "load", late)
    window = ChatWindow(tk.Tk(), Worker())
    until(window, lambda: window.status["text"] == "loading the model ...")
    say(window, "Hello!")
    window.stop_button.invoke()
    window.picker.set(EMBEDDED)
    window.picker.event_generate("<<ComboboxSelected>>")
    window.root.geometry("500x400")
    window.root.update()
    assert window.busy and window.entry.get("1.0", "end") == "Hello!\n"
    window.close()
    gate.set()


def test_a_model_that_is_none(window: ChatWindow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ready(window)
    monkeypatch.setattr(example_app.filedialog, "askdirectory", lambda **_: str(tmp_path))
    window.choose_folder()
    ready(window)
    assert window.picker.get() == str(tmp_path) and str(tmp_path) in shown_text(window, "note")
    monkeypatch.setattr(example_app.filedialog, "askdirectory", lambda **_: "")
    window.choose_folder()  # given up
    assert not window.busy
    window.picker.set(EMBEDDED)
    window.choose()
    ready(window)
    assert window.text.get("1.0", "end") == "\n"


def test_readers_of_earlier_text_are_left_where_they_are(window: ChatWindow):
    ready(window)
    window._write([("line\n" * 100, "own")])
    window.root.update()
    assert window.text.yview()[1] == 1.0
    window.text.yview_moveto(0)
    window._write([("more\n", "own")])
    window.root.update()
    assert window.text.yview()[0] == 0.0


if shutil.which("Xvfb"):  # a desktop has windows of its own, and may give the focus to them

    def test_keys(window: ChatWindow):
        ready(window)
        window.entry.focus_force()
        for key in ("a", "<Shift-Return>", "b", "<Return>"):
            window.entry.event_generate(key)
        window.root.update()
        assert shown_text(window, "you") == "a\nb\n" and window.busy
        window.entry.event_generate("<Escape>")
        ready(window)

    def test_the_picture_is_of_the_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(screenshot_app.sys, "argv", ["", str(tmp_path / "app.png")])
        screenshot_app.main()
        assert Image.open(tmp_path / "app.png").size == Image.open(screenshot_app.FILE).size == (640, 460)
        assert screenshot_app.FILE.stat().st_size < 150_000
