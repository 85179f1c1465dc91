"""`mlx-mtp chat` in a terminal: the line that is edited, what the screen shows, and what is kept (cli/chatting/)."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_line import arguments
from tests.support.screen import Terminal

GREEDY = ("--temperature", 0, "--max-tokens", 60)
DEMO = "I am the demo model of mlx_mtp"


def chatting(folder: Path, *options: object, columns: int = 80, **environment: str) -> Terminal:
    """The chat in a terminal; what it keeps lies in a folder."""
    own = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), **environment}
    return Terminal(arguments("chat", *GREEDY, *options), columns=columns, **own)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def terminal(home: Path) -> Iterator[Terminal]:
    """One chat for the tests that don't mind each other, without a program that copies."""
    with chatting(home, DISPLAY="", WAYLAND_DISPLAY="", SSH_CONNECTION="elsewhere") as running:
        yield running


def kept(folder: Path, name: str) -> Path:
    (path,) = folder.rglob(name)
    return path


def test_an_answer_and_its_status_line(terminal: Terminal, home: Path):
    terminal.say("Who are you?")
    terminal.wait_for("tok/s")
    terminal.wait_for_prompt()
    assert DEMO in terminal.text() and "Who are you?" in kept(home, "history").read_text()
    for name in ("history", "last.json"):
        assert stat.S_IMODE(kept(home, name).stat().st_mode) == 0o600
    assert stat.S_IMODE(kept(home, "last.json").parent.stat().st_mode) == 0o700
    assert json.loads(kept(home, "last.json").read_text())[0]["content"] == "Who are you?"


def test_a_paste_of_several_lines_is_one_message(terminal: Terminal, home: Path):
    terminal.wait_for_prompt()
    terminal.paste("one\r\n/quit\x1b[2J\x07\rthree")
    terminal.wait_for("  three")
    terminal.send("\r")
    terminal.wait_for_prompt()
    assert json.loads(kept(home, "last.json").read_text())[-2]["content"] == "one\n/quit[2J\nthree"
    # In a terminal that doesn't mark pastes. What comes at once counts as typed during the answer.
    time.sleep(0.4)
    terminal.send("four\rfive")
    terminal.wait_for("  five")
    terminal.send("\r")
    terminal.wait_for_prompt()
    assert json.loads(kept(home, "last.json").read_text())[-2]["content"] == "four\nfive"


def test_a_huge_paste_is_a_note_in_the_line(terminal: Terminal, home: Path):
    terminal.say("/reset")
    terminal.wait_for_prompt()
    pasted = "architecture\n" * 399 + "architecture"  # a long word of one token
    terminal.paste(pasted)
    terminal.wait_for("400 lines, 5,199 characters]")
    terminal.send(" What is it?\r")
    terminal.wait_for_prompt()
    assert json.loads(kept(home, "last.json").read_text())[0]["content"] == pasted + " What is it?"
    assert terminal.text().count("architecture") < 200, "the paste itself is shown"
    assert b"reading the prompt: 0 of " in terminal.raw and "reading the prompt" not in terminal.text()


def test_lines_are_edited_and_found_again(terminal: Terminal, home: Path):
    (home / "notes.txt").write_text("notes")
    terminal.say("/reset")
    terminal.say(f"/file {home}/not\t")  # the rest is completed
    terminal.wait_for("notes.txt, ")
    terminal.say("Who are thou?\x1b[D\x1b[D" + "\x7f" * 3 + "yo")
    terminal.wait_for_prompt()
    messages = json.loads(kept(home, "last.json").read_text())
    attached = "\n\nnotes.txt:\n```\nnotes\n```"
    assert [it["content"] for it in messages if it["role"] == "user"] == [f"Who are you?{attached}"]
    terminal.say("/edit")
    terminal.wait_for("> Who are you?")
    terminal.send(" Really?\r")
    terminal.wait_for_prompt()
    messages = json.loads(kept(home, "last.json").read_text())
    assert [it["content"] for it in messages if it["role"] == "user"] == [f"Who are you? Really?{attached}"]
    terminal.say("one\\\rtwo")
    terminal.wait_for_prompt()
    terminal.send("\x1b[A")  # up
    terminal.wait_for("> one", times=2)
    terminal.send("\x03")
    terminal.say("/sta\t\r")
    terminal.wait_for("peak memory")


def test_thoughts_are_folded_and_can_be_seen(terminal: Terminal):
    terminal.say("/reset")
    terminal.say("/think on")
    terminal.say("What is 3 + 4?")
    terminal.wait_for("[thought for ")
    terminal.wait_for_prompt()
    assert "I compute" not in terminal.text() and "3 + 4 = " in terminal.text()
    terminal.say("/thoughts")
    terminal.wait_for("I compute 3 + 4")
    terminal.say("/thoughts on")
    terminal.say("What is 3 + 4?")
    terminal.wait_for("I compute 3 + 4", times=2)
    terminal.say("/think off")
    terminal.wait_for("thinking off")


def test_drafts_have_another_shade(terminal: Terminal):
    terminal.say("/reset")
    terminal.say("/drafts on")
    terminal.say("Who are you?")
    terminal.wait_for_prompt()
    shades = {colour for colour, _ in terminal.style("I can answer questions about this project")}
    assert shades == {"green", "default"} or shades == {"green"}
    terminal.say("/drafts off")
    terminal.say("/retry")
    terminal.wait_for_prompt()
    assert {colour for colour, _ in terminal.style("I can answer questions")} == {"default"}


def test_what_was_copied_reaches_the_terminal(terminal: Terminal):
    terminal.say("/reset")
    terminal.say("/copy")
    terminal.wait_for("no answer yet")
    terminal.say("Who are you?")
    terminal.say("/copy")
    terminal.wait_for("OSC 52")
    assert b"\x1b]52;c;SSBhbSB0aGUgZGVtbyBtb2RlbC" in terminal.raw  # "I am the demo model" in base64


def test_several_answers_side_by_side_and_one_goes_on(tmp_path: Path):
    wild = ("--temperature", 1, "--seed", 3, "--n", 2)
    with chatting(tmp_path, *wild, columns=100) as terminal:
        terminal.say("Tell me a short story about a fox.")
        terminal.wait_for("Which answer goes on?")
        lines = terminal.text().split("\n")
        assert any("answer 1" in line and "answer 2" in line for line in lines)
        assert any(line.count("Once upon a time") == 2 for line in lines)
        terminal.send("2\r")
        terminal.wait_for("goes on with answer 2")
        terminal.wait_for_prompt()
        chosen = json.loads(kept(tmp_path, "last.json").read_text())[1]["content"]
        words = chosen.split()[:9]
        assert all(word in terminal.text() for word in words)
    # What is kept is there in the next session.
    with chatting(tmp_path, "--resume", "--plain") as terminal:
        terminal.wait_for("> Tell me a short story")
        terminal.wait_for(chosen[:40])
        terminal.wait_for_prompt()
        terminal.send("\x1b[A")
        terminal.wait_for("> Tell me a short story about a fox.", times=2)
        terminal.send("\x03")
        terminal.wait_for_prompt()
        terminal.send("\x04")
        assert terminal.wait_for_end() == 0


def test_nothing_is_kept_if_so_wished_and_control_c_ends_the_answer_alone(tmp_path: Path):
    with chatting(tmp_path, "--no-history", "--show-drafts", NO_COLOR="1") as terminal:
        terminal.say("Who are you?")
        terminal.wait_for_prompt()
        assert any(underlined for _, underlined in terminal.style("I can answer questions about this"))
        assert b"\x1b[32m" not in terminal.raw, "a colour"
        terminal.say("/resume")
        terminal.wait_for_prompt()
        assert "--no-history" in terminal.text()
        for setting in ("max_tokens 4000", "draft_length 0", "temperature 2", "seed 4"):
            terminal.say(f"/set {setting}")
        terminal.say("Tell me a long story about a fox, a bear and a bird.")
        terminal.wait_for("bird.\nO")
        terminal.interrupt()
        terminal.wait_for("[stopped]")
        terminal.wait_for_prompt()
        assert "^C" not in terminal.text() and terminal.text().count("tok/s") == 2
        terminal.send("\x04")
        assert terminal.wait_for_end() == 0
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("history"))
