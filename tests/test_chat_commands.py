"""The chat's commands, over a pipe (cli/chatting/)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mlx_mtp.cli.chatting.store import Store
from mlx_mtp.cli.render import harmless
from tests.support.command_line import Done, run


def chat(*lines: str, options: tuple[object, ...] = ()) -> Done:
    done = run("chat", "--max-tokens", 12, "--temperature", 0, *options, stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    return done


def test_options_are_set_as_the_command_line_sets_them():
    done = chat(
        "/set temperature -1", "/set draft-length many", "/set stop_token_ids x", "/set exactness very",
        "/set nonsense 1", "/set seed", "/set logit_bias 5", "/set response_format xml", "/set cancel 1",
        "/set max_tokens 3", "/set --draft-length 0", "/set stop am", "/set", "Who are you?", "/set stop default",
        "Who are you?", "/set max_tokens default", "Who are you?",
    )  # fmt: skip
    assert done.stderr.count("error: ") == 9
    for culprit in ("temperature: ", "expected auto or a number", "expected token ids", "exactness must be", "nonsense",
                    "use /set OPTION VALUE", "expected TOKEN=NUMBER", "expected json, regex"):  # fmt: skip
        assert culprit in done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stderr.split("\n") if line.startswith(("max_", "stop ")))
    assert shown["max_tokens"].split() in (["3"], ["set", "to", "default"]) and "nothing drafted" in done.stderr
    first, second, third = done.stdout.strip().split("\n")
    assert first.strip() == "I" and second == "I am the" and third.startswith(second) and len(third) > len(second)


def test_a_file_goes_into_the_next_message(tmp_path: Path):
    text, saved = tmp_path / "some notes.md", tmp_path / "talk.json"
    text.write_bytes("\ufeffHere is ```code```.\r\nEnd.\r\n".encode())
    chat("/file", f"/file {text}", "/file", "What is this?", "And now?", f"/save {saved}")
    first, _, second, _ = json.loads(saved.read_text())
    assert first["content"] == "What is this?\n\nsome notes.md:\n````\nHere is ```code```.\nEnd.\n````"
    assert second["content"] == "And now?"
    chat(f"/file {text}", "/file -", "What is this?", "/retry", f"/save {saved}")
    assert [it["content"] for it in json.loads(saved.read_text()) if it["role"] == "user"] == ["What is this?"]


def test_files_that_are_no_text(tmp_path: Path):
    binary, latin, empty, huge, long = (tmp_path / name for name in ("a.bin", "b.txt", "c.txt", "d.txt", "e.txt"))
    binary.write_bytes(b"text\0text")
    latin.write_bytes(b"caf\xe9")
    empty.write_text(" \n")
    with huge.open("wb") as file:
        file.truncate(2**30)
    long.write_text("word " * 5000)
    os.mkfifo(tmp_path / "pipe")
    names = [binary, latin, empty, huge, long, tmp_path, tmp_path / "pipe", tmp_path / "none", "/dev/zero", "a\0b"]
    done = chat(*(f"/file {name}" for name in names), "/file")
    assert done.stderr.count("error: ") == len(names) and "use /file PATH" in done.stderr
    for reason in ("isn't a text file", "is empty", "more than", "context only", "not a plain file", "No such file"):
        assert reason in done.stderr


def test_conversations_are_loaded_taken_back_and_answered_again(tmp_path: Path):
    saved, again = tmp_path / "talk.json", tmp_path / "again.json"
    chat("/undo", "/retry", "/system Be brief.", "Who are you?", "What is a drafter?", f"/save {saved}")
    done = chat(f"/load {saved}", "/undo", "/retry", f"/save {again}", "/edit", "/undo", "/undo")
    assert "> What is a drafter?" in done.stderr and "taken back: What is a drafter?" in done.stderr
    assert json.loads(again.read_text()) == json.loads(saved.read_text())[:3]
    assert "nothing here can edit" in done.stderr and "error: nothing to undo" in done.stderr


@pytest.mark.parametrize("content", [
    "", "{", '"text"', "[1]", '[{"role": "user", "content": "x"}]', '[{"role": "user"}]', "[" * 1000, "\x80",
])  # fmt: skip
def test_damaged_conversations_change_nothing(tmp_path: Path, content: str):
    damaged, kept = tmp_path / "damaged.json", tmp_path / "kept.json"
    damaged.write_bytes(content.encode("latin-1"))
    done = chat("Who are you?", f"/load {damaged}", "/load", f"/load {tmp_path}/none", f"/save {kept}")
    assert done.stderr.count("error: ") == 3 and len(json.loads(kept.read_text())) == 2


def test_several_answers_over_a_pipe(tmp_path: Path):
    saved = tmp_path / "talk.json"
    done = chat(
        "/n 0", "/pick 1", "/n 2", "Tell me a short story about a fox.", "/pick 3", "/pick x", "/pick 2",
        f"/save {saved}", options=("--temperature", 1, "--seed", 3),
    )  # fmt: skip
    assert "--- answer 1 ---" in done.stderr and "--- answer 2 ---" in done.stderr
    answers = done.stdout.strip().split("\n")
    assert len(answers) == 2 and json.loads(saved.read_text())[1]["content"] == answers[1] != answers[0]
    assert done.stderr.count("error: ") == 4


def test_the_oldest_turns_leave_with_a_notice(tmp_path: Path):
    long = tmp_path / "long.json"
    turn = [{"role": "user", "content": "word " * 3000}, {"role": "assistant", "content": "word " * 1500}]
    long.write_text(json.dumps(turn))
    done = chat(f"/load {long}", "Who are you?")
    assert "the model no longer sees the first 2 messages]" in done.stderr and "tok/s" in done.stderr


def test_a_word_that_begins_with_a_slash_is_no_command():
    done = chat(
        "/usr/bin is what?", "/undoo", "/thoughts", "/thoughts off", "/drafts", "/resume x", options=("--think",)
    )
    assert "did you mean /undo?" in done.stderr and done.stderr.count("tok/s") == 1
    assert "only a terminal" in done.stderr


def test_a_script_s_conversation_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    done = chat("/resume", "Who are you?")
    assert "no earlier conversation" in done.stderr and not list(tmp_path.rglob("*"))
    assert run("chat", "--resume", stdin="").returncode == 1
    assert run("chat", "--resume", "--no-history", stdin="").returncode == 2
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am."}]
    Store().keep(turns)
    saved = tmp_path / "saved.json"
    chat(f"/save {saved}", options=("--resume",))
    assert json.loads(saved.read_text()) == turns


def test_a_session_s_own_conversation_hides_no_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    earlier, later = Store(), Store()
    earlier.keep([{"role": "user", "content": "1"}])
    later.keep([{"role": "user", "content": "2"}])
    later.keep([{"role": "user", "content": "3"}])
    assert later.resume()[0]["content"] == "1" and Store().resume()[0]["content"] == "3"
    history = later.history()
    history.chmod(0o644)
    history.write_text("".join(f"\n# time\n+message {i}\n" for i in range(100_000)))
    assert later.history().stat().st_size < 2**20 and history.stat().st_mode & 0o777 == 0o600
    assert history.read_text().startswith("# time\n+message ") and history.read_text().endswith("+message 99999\n")


def test_terminals_get_no_control_characters():
    text = "a\x1b[31mb\x07\x9b2J\r\n\tc\x7f"
    assert harmless(text) == "a␛[31mb␇\ufffd2J\n\tc␡"
    assert harmless("日本 é") == "日本 é"
