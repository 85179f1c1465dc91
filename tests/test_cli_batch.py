"""`mlx-mtp batch`: order, errors a line, killed and continued runs (cli/batch.py)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from tests.support.command_line import Done, arguments, run, start

LINES: list[Any] = [
    {"prompt": "Who are you?", "id": "first"},
    {"prompt": "Tell me a short story about a fox.", "temperature": 1.0},
    {"prompt": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 3},
    {"prompt": "Tell me a story about an owl."},
]


def command(source: Path, output: Path, *options: object) -> list[object]:
    return ["batch", source, "-o", output, "--max-tokens", 40, "--seed", 5, *options]


def batch(source: Path, output: Path, *options: object) -> Done:
    return run(*command(source, output, *options))


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def essence(answers: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(a["index"], a["id"], a.get("text"), a.get("error")) for a in answers]


def test_answers_come_in_the_order_of_the_lines(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", LINES)
    done = batch(source, tmp_path / "out.jsonl")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    answers = read(tmp_path / "out.jsonl")
    assert [a["index"] for a in answers] == [0, 1, 2, 3] and answers[0]["id"] == "first"
    with mlx_mtp.load() as lm:
        for i, line in enumerate(LINES):
            given = {"max_tokens": 40, "seed": mlx_mtp.api.row_seed(5, i), **line}
            given.pop("id", None)
            assert lm.generate(**given).text == answers[i]["text"]
    assert answers[2]["stats"]["generated_tokens"] == 3 and answers[2]["finish_reason"] == "length"
    assert list(tmp_path.iterdir()) and not list(tmp_path.glob("*.partial"))


def test_a_bad_line_is_recorded_and_the_rest_goes_on(tmp_path: Path):
    lines = ["{not json", *LINES[:1], "[1, 2]", {"prompt": ""}, {"prompt": "x", "max_tokens": 0}, "", *LINES[2:3],
             {"prompt": "x", "stop": 5}, {"prompt": 5}, {"prompt": None}, {"prompt": "x", "seed": "y"},
             '{"prompt": "x", "id": NaN}']  # fmt: skip
    done = batch(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    assert done.returncode == 1 and "9 of 11 lines" in done.stderr.splitlines()[-1]
    answers = read(tmp_path / "out.jsonl")
    assert [a["index"] for a in answers] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert [a["index"] for a in answers if "error" in a] == [0, 2, 3, 4, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, how: signal.Signals):
    lines = [{"prompt": f"How many minutes are {i} hours?"} for i in range(16)]
    source, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    stopped = command(source, output, "--batch-size", 2)
    running = subprocess.Popen(arguments(*stopped), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (output.exists() and output.read_text().count("\n") >= 3):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(how)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in errors
    kept = read_whole(output)
    assert 3 <= len(kept) < len(lines)
    with output.open("a") as file:
        file.write('{"index": 15, "te')  # as a kill in the middle of a line would leave it
    done = start(*command(source, output))
    assert done.returncode == 0, done.stderr
    answers = read(output)
    assert [a["index"] for a in answers] == list(range(16))
    by_index = {a["index"]: a for a in answers}
    assert all(by_index[a["index"]] == a for a in kept), "a finished line was answered again"
    assert start(*command(source, tmp_path / "fresh.jsonl")).returncode == 0
    assert essence(answers) == essence(read(tmp_path / "fresh.jsonl"))


def read_whole(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


def test_lines_with_an_error_are_tried_again(tmp_path: Path):
    """They may be the model's fault: here it has no tokenizer."""
    source, output = write(tmp_path / "in.jsonl", [*LINES[:1], {"prompt": ""}]), tmp_path / "out.jsonl"
    model = shutil.copytree(DEMO / "target", tmp_path / "model")
    (model / "tokenizer.json").unlink()
    assert batch(source, output, "--model", model, "--no-draft").returncode == 1
    assert ["error" in answer for answer in read(output)] == [True, True]
    done = batch(source, output)
    assert done.returncode == 1 and "1 of 2 lines" in done.stderr
    assert ["error" in answer for answer in read(output)] == [False, True]


def test_lines_that_changed_are_answered_again(tmp_path: Path):
    source, output = write(tmp_path / "in.jsonl", LINES[:1]), tmp_path / "out.jsonl"
    assert batch(source, output).returncode == 0
    write(source, [*LINES[:1], {"prompt": "What is the capital of Italy?"}])
    assert batch(source, output).returncode == 0
    write(source, [*LINES[:1], {"prompt": "What is the capital of Spain?"}])
    assert batch(source, output).returncode == 0
    assert "Madrid" in read(output)[1]["text"] and read(output)[0]["id"] == "first"


@pytest.mark.parametrize(
    "text", ["something else\n", '{"a": 1}\n', '{"index": 1e999, "line_sha256": 0}\n', "no newline"]
)
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, text: str):
    source, output = write(tmp_path / "in.jsonl", LINES[:1]), tmp_path / "out.jsonl"
    output.write_text(text)
    done = batch(source, output)
    assert done.returncode == 1 and "choose another name" in done.stderr and output.read_text() == text


def test_lines_end_where_json_says(tmp_path: Path):
    odd = {"prompt": "Who are you?\u2028\u0085", "id": "\u2028"}
    source = tmp_path / "in.jsonl"
    source.write_text(
        "\ufeff" + json.dumps(odd, ensure_ascii=False) + "\r\n" + '{"prompt": "x", "id": "\\ud800"}\n' + "[" * 100_000
    )
    output = tmp_path / "out.jsonl"
    for _ in range(2):  # the second run finds what the first has written
        done = batch(source, output, "--max-tokens", 3)
        assert done.returncode == 1 and "1 of 3 lines" in done.stderr.splitlines()[-1], done.stderr[-500:]
    answers = [json.loads(line) for line in output.read_text().split("\n") if line]
    assert [("error" in a, a["id"]) for a in answers] == [(False, "\u2028"), (False, "\ud800"), (True, None)]


def test_the_output_stays_what_it_was(tmp_path: Path):
    source, real, link = write(tmp_path / "in.jsonl", LINES[:1]), tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.touch(0o600)
    link.symlink_to(real)
    assert batch(source, link).returncode == 0
    assert link.is_symlink() and len(read(real)) == 1 and real.stat().st_mode & 0o777 == 0o600
    before = source.read_text()
    same = batch(source, source)
    assert same.returncode == 1 and "is the input" in same.stderr and source.read_text() == before
    for device in ("/dev/null", "/dev/stdout", "-"):
        refused = start(*command(source, Path(device)))
        assert refused.returncode == 1 and "isn't a plain file" in refused.stderr and not refused.stdout
    assert Path("/dev/null").is_char_device()
    # Answers to another input, and a model that isn't there: nothing is lost.
    kept = real.read_text()
    other = batch(write(tmp_path / "other.jsonl", LINES[1:2]), real)
    assert other.returncode == 1 and "choose another name" in other.stderr and real.read_text() == kept
    write(source, LINES[:2])
    assert batch(source, real, "--model", tmp_path / "no model").returncode == 1 and real.read_text() == kept


def test_wrong_use(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", LINES[:1])
    missing = batch(tmp_path / "nothing.jsonl", tmp_path / "out.jsonl")
    assert missing.returncode == 1 and "No such file" in missing.stderr
    nowhere = batch(source, tmp_path / "no" / "out.jsonl")
    assert nowhere.returncode == 1 and "No such file" in nowhere.stderr
    assert batch(source, tmp_path / "out.jsonl", "--batch-size", 0).returncode == 2
    assert run("batch", source).returncode == 2
    source.write_bytes(b"\xff\xfe")
    assert batch(source, tmp_path / "out.jsonl").returncode == 1
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_the_help_names_every_option_that_a_line_may_have():
    functions = {"cancel", "logits_processors", "prefill_progress"}
    options = {field.name for field in fields(mlx_mtp.GenerationOptions)} - functions
    shown = run("batch", "--help").stdout
    assert options <= set(re.findall(r"\w+", shown.partition("A line of OUT.jsonl")[0]))
