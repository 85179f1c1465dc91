"""The command line on the embedded pair (cli/)."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

import weights_convert
from mlx_mtp.cli import app
from tests.support.command_line import arguments, run, start
from tests.support.tiny_checkpoints import make_pair

QUESTION = "What is a drafter?"


def only_line(stderr: str) -> str:
    """The one line of an error."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_imports_no_mlx():
    code = "import sys; sys.argv = ['mlx-mtp', '--help']\nfrom mlx_mtp.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'mlx.core' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("chat", "generate", "info"):
        assert command in done.stdout
        help_text = run(command, "--help")
        assert help_text.returncode == 0 and "--drafter" in help_text.stdout


def test_help_in_80_columns_says_all_of_a_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands = run("--help").stdout.partition("Commands:\n")[2]
    assert "info " in commands and "..." not in commands


def test_version():
    assert start("--version").stdout.startswith("mlx-mtp 0.")


def test_nothing_at_all_says_what_to_do_next():
    done = run()
    assert done.returncode == 2 and done.stdout == ""
    steps = done.stderr.splitlines()
    assert len(steps) == 5 and all(len(step) <= 110 for step in steps)
    for step in steps[:-1]:
        program, command, *_ = step.split()
        assert program == "mlx-mtp" and run(command, "--help").returncode == 0


@pytest.mark.parametrize("typed, expected", [
    ("mlx-mtp ge", ["generate", "get"]), ("mlx-mtp get E", ["E2B", "E4B"]), ("mlx-mtp info --no", ["--no-draft"]),
])  # fmt: skip
def test_the_shell_completes_without_importing_mlx(typed: str, expected: list[str]):
    code = "import sys; sys.argv = ['mlx-mtp']\nfrom mlx_mtp.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'mlx.core' not in sys.modules"
    place = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_MLX_MTP_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | place)
    assert done.stdout.split() == expected and not done.stderr


def test_generate_prints_the_answer_and_nothing_else():
    done = start("generate", QUESTION, "--max-tokens", 30, "--temperature", 0)
    piped = start("generate", "--max-tokens", 30, "--temperature", 0, stdin=QUESTION)
    plain = run("generate", QUESTION, "--max-tokens", 30, "--temperature", 0, "--no-draft")
    assert done.returncode == piped.returncode == plain.returncode == 0
    assert done.stdout.strip() and done.stdout == piped.stdout == plain.stdout
    assert "tok/s" in done.stderr and "accepted" in done.stderr
    assert "nothing drafted" in plain.stderr


def test_generate_json():
    answers = [
        run("generate", QUESTION, "--max-tokens", 30, "--seed", 5, "--draft-length", k, "--json") for k in (0, 3)
    ]
    plain, mtp = (json.loads(answer.stdout) for answer in answers)
    assert plain["text"] == mtp["text"] and plain["tokens"] == mtp["tokens"]
    assert mtp["finish_reason"] in ("stop", "length")
    stats = mtp["stats"]
    assert set(stats) >= {
        "prompt_tokens", "generated_tokens", "rounds", "drafted", "accepted", "accepted_by_position", "mean_accepted",
        "prompt_tps", "generation_tps", "peak_memory_bytes", "draft_lengths",
    }  # fmt: skip
    assert stats["generated_tokens"] == len(mtp["tokens"]) and stats["draft_lengths"]["3"] > 0
    assert plain["stats"]["drafted"] == 0


def test_text_may_be_completed_as_it_is_and_special_tokens_may_be_those(tmp_path: Path):
    def prompt_tokens(*options: str) -> int:
        arguments = ["generate", "a <|turn> b", "--json", "--max-tokens", "1", *options]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return int(json.loads(done.stdout)["stats"]["prompt_tokens"])

    asked, bare, raw = prompt_tokens(), prompt_tokens("--no-sanitize"), prompt_tokens("--raw")
    assert asked > bare > raw
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a <|turn> b"}\n{"prompt": [{"role": "user", "content": "x"}]}\n')
    done = CliRunner().invoke(app, ["batch", str(source), "-o", str(output), "--max-tokens", "1", "--raw"])
    text, messages = (json.loads(line) for line in output.read_text().splitlines())
    assert text["stats"]["prompt_tokens"] == raw and "messages need" in messages["error"]
    assert done.exit_code == 1
    for option in (("--system", "x"), ("--think",)):
        assert CliRunner().invoke(app, ["generate", "x", "--raw", *option]).exit_code == 2


def test_a_stop_string_ends_the_tokens_at_the_same_place_at_any_draft_length():
    options = ("--stop", "fox", "--temperature", 0, "--json", "--draft-length")
    plain, mtp = (json.loads(run("generate", "Tell me a short story about a fox.", *options, k).stdout) for k in (0, 5))
    assert plain["finish_reason"] == mtp["finish_reason"] == "stop"
    assert plain["text"] == mtp["text"] and plain["text"] and "fox" not in plain["text"]
    assert plain["tokens"] == mtp["tokens"] and mtp["stats"]["generated_tokens"] == len(mtp["tokens"])


def test_thoughts_are_no_part_of_the_answer():
    question = ("generate", "What is 3 + 4?", "--think", "--temperature", 0, "--max-tokens", 120)
    shown, facts = run(*question), json.loads(run(*question, "--json").stdout)
    assert facts["reasoning"].strip() and facts["text"].strip()
    assert shown.stdout == facts["text"] + "\n" and facts["reasoning"] in shown.stderr


def test_a_reader_that_goes_away():
    command = arguments("generate", "Tell me a short story about a fox.")
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout and done.stderr
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait(60) == 1


@pytest.mark.parametrize("args, begun", [
    (("generate", "Tell me a long story.", "--max-tokens", "4000", "--temperature", "2"), "stdout"),
    (("chat",), "stderr"),
])  # fmt: skip
def test_control_c_ends_generate_and_a_chat_that_reads_a_pipe(args: tuple[str, ...], begun: str):
    for _ in range(5):
        running = subprocess.Popen(
            arguments(*args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert getattr(running, begun).read(1)
        time.sleep(0.05)  # by now the chat waits for a line
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
        assert b"Traceback" not in errors
        if b"tok/s" not in errors:  # else the answer was short, and the signal met a program that was ending
            break
    assert running.returncode == 130


def test_chat_over_a_pipe(tmp_path: Path):
    saved = tmp_path / "talk.json"
    script = [
        "/help", "/stats", "/system Answer briefly.", QUESTION, "/stats", '"""Who', "", "are you?", '"""', "/think on",
        "/think off", "/nonsense", f"/save {saved}", f"/save {tmp_path}/no/such/folder.json", "/reset", "one \\",
        "line", "/quit", "never said",
    ]  # fmt: skip
    done = start("chat", "--max-tokens", 20, "--temperature", 0, stdin="\n".join(script) + "\n")
    assert done.returncode == 0, done.stderr
    talk = json.loads(saved.read_text())
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert talk[3]["content"] == "Who\n\nare you?"
    for answer in (talk[2], talk[4]):
        assert answer["content"] in done.stdout
    assert done.stderr.count("tok/s") == 4  # three status lines, and /stats
    assert "prompt tokens cached" in done.stderr
    assert "unknown command '/nonsense'" in done.stderr and "no answer yet" in done.stderr
    assert f"error: not saved: {tmp_path}/no/such/folder.json: No such file" in done.stderr
    assert list(tmp_path.iterdir()) == [saved]


def test_what_is_quoted_or_cut_off_is_said_all_the_same():
    script = ['"""', "/quit is a word", '"""', "/save", "/think maybe", "/reset", "/stats", '"""Who', "are you?"]
    done = run("chat", "--max-tokens", 5, stdin="\n".join(script) + "\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tok/s") == 2, "one of the two messages wasn't answered"
    assert "use /save FILE" in done.stderr and "use /think" in done.stderr and "unknown" not in done.stderr
    assert "no answer yet" in done.stderr
    # A line that is to go on, and doesn't.
    done = run("chat", "--max-tokens", 5, stdin="Who are you? \\")
    assert done.returncode == 0 and done.stderr.count("tok/s") == 1


def test_a_turn_that_memory_has_no_room_for_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_mtp.checkpoint.sizes.memory_for_models", lambda: 20_000_000)
    long = "What is a drafter? " * 300
    done = CliRunner().invoke(app, ["chat", "--max-tokens", "5"], input=f"{long}\nWho are you?\n")
    assert done.exit_code == 0
    assert done.stderr.count("error: ") == 1 and "KV" in done.stderr and done.stderr.count("tok/s") == 1


def test_a_file_that_cannot_be_saved_is_left_as_it_is(tmp_path: Path):
    pipe, kept, link = tmp_path / "pipe", tmp_path / "kept.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    kept.write_text("old")
    link.symlink_to(kept)
    script = [f"/save {pipe}", f"/save {tmp_path}", "/save ~nobody/x", "/save a\0b", f"/save {link}"]
    done = run("chat", stdin="\n".join(script) + "\n")
    assert done.returncode == 0 and done.stderr.count("error: not saved: ") == 4
    assert pipe.is_fifo() and link.is_symlink() and json.loads(kept.read_text()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="macOS has no device that is always full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = arguments("generate", "x", "--max-tokens", 5)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "No space left" in only_line(done.stderr)


def test_closed_streams():
    """Errors are no tracebacks without stdout, and nothing but answers goes there without stderr."""

    def without(stream: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", f'exec "$@" {stream}>&-', "sh", *arguments(*args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = without("1", "generate", "x", "--trace", "/no/such/folder/x")
    assert done.returncode == 1 and "No such file" in only_line(done.stderr)
    done = without("2", "generate", "x", "--max-tokens", "5", "--temperature", "0")
    assert done.returncode == 0 and done.stdout == start("generate", "x", *done.args[-4:]).stdout
    assert without("2", "generate", "").stdout == ""


def test_the_root_folder_is_no_model():
    assert "config.json" in only_line(run("info", "/").stderr)


def test_control_c_stops_the_answer_and_not_the_chat():
    main, terminal = pty.openpty()
    chat = subprocess.Popen(
        # Other seeds have answers that end within a second.
        arguments(*"chat --max-tokens 4000 --draft-length 0 --temperature 2 --seed 4".split()),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(terminal)
    seen = ""

    def wait_for(text: str) -> str:
        """Reads until the text has come; keeps what follows it for the next call."""
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            readable, _, _ = select.select([main], [], [], deadline - time.monotonic())
            assert readable and chat.poll() is None, seen
            seen += os.read(main, 4096).decode(errors="replace")
        before, _, seen = seen.partition(text)
        return before

    try:
        wait_for("> ")
        os.write(main, b"/stats\n")
        wait_for("no answer yet")
        for _ in range(3):  # a loaded machine may let the answer end before the signal is sent
            wait_for("> ")
            os.write(main, b"Tell me a long story about a fox, a bear and a bird.\n")
            wait_for("bird.\r\n")
            wait_for(" ")
            chat.send_signal(signal.SIGINT)
            if "[stopped]" in wait_for("tok/s"):
                break
        else:
            pytest.fail(f"no answer was stopped: {seen}")
        os.write(main, b"/quit\n")
        assert chat.wait(30) == 0
    finally:
        chat.kill()
        os.close(main)


def test_info_predicts_for_a_chip():
    facts = json.loads(run("info", "--json", "--chip", "m4 max", "--quantize", 4).stdout)
    low, high = facts["expected"]["plain_tps"]
    assert facts["expected"]["chip"] == "M4 Max" and 0 < low < high
    assert facts["expected"]["drafting_tps"][0] >= low
    assert "PREDICTED, not measured" in run("info", "--chip", "M1").stdout
    alone = json.loads(run("info", "--json", "--chip", "m4 max", "--quantize", 4, "--no-draft").stdout)["expected"]
    assert alone["plain_tps"] == [low, high] and alone["drafting_tps"] is alone["draft_length"] is None
    assert "no drafter" in run("info", "--chip", "M1", "--no-draft").stdout
    wrong = run("info", "--chip", "Z80")
    assert wrong.returncode == 2 and "M4 Max" in wrong.stderr


def test_info():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["target"]["layers"] == 12 and facts["drafter"]["pairing"] == "fits the target"
    assert facts["machine"]["fits"] is True
    assert facts["target"]["bytes_on_disk"] > 2 * facts["target"]["parameters"]
    choices = facts["machine"]["choices"]
    assert [choice["quantize"] for choice in choices] == [None, 8, 6, 4]
    assert all(more["needed"] > less["needed"] for more, less in pairwise(choices))
    assert choices[0]["needed"] == facts["target"]["bytes_in_memory"] + facts["drafter"]["bytes_in_memory"]
    quantized = json.loads(run("info", "--json", "--quantize", 4).stdout)
    assert quantized["machine"]["needed"] == choices[-1]["needed"]
    assert quantized["target"]["bytes_in_memory"] < facts["target"]["bytes_in_memory"] / 4
    table = run("info").stdout
    for word in ("target", "drafter", "context", "KV", "fits", "4 bits", "one token reads"):
        assert word in table


def test_info_names_what_clashes(tmp_path: Path):
    target, drafter = make_pair("e2b", tmp_path, drafter="31b")
    shown = run("info", target, "--drafter", drafter, "--chip", "M1").stdout
    assert "made for another target" in shown and "tok/s plain, no drafter" in shown
    done = run("generate", "x", "--model", target, "--drafter", drafter)
    assert done.returncode == 1 and "made for another target" in only_line(done.stderr)
    assert "--no-draft" in done.stderr


@pytest.mark.parametrize("damage", ["missing", "unknown", "of the wrong shape"])
@pytest.mark.parametrize("part", [0, 1])
def test_info_refuses_what_cannot_be_loaded(damage: str, part: int, tmp_path: Path):
    """By the headers of the files, and with the words that loading has."""
    pair = make_pair("e2b", tmp_path)
    weights = pair[part] / "model.safetensors"
    tensors = mx.load(str(weights))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    name = next(name for name in sorted(tensors) if name.endswith("layers.1.self_attn.q_proj.weight"))
    tensor = tensors.pop(name)
    if damage == "unknown":
        tensors |= {name: tensor, name.replace("q_proj", "other"): tensor}
    if damage == "of the wrong shape":
        tensors[name] = tensor[:-1]
    mx.save_safetensors(str(weights), tensors)
    done = run("info", pair[0], "--drafter", pair[1])
    assert done.returncode == 1 and done.stdout == ""
    assert "layers.1.self_attn" in only_line(done.stderr) and damage in done.stderr
    assert ("--no-draft" in done.stderr) == bool(part)
    loading = run("generate", "x", "--model", pair[0], "--drafter", pair[1])
    assert loading.stderr == done.stderr


def test_info_of_a_quantised_folder(tmp_path: Path):
    source, _ = make_pair("e2b", tmp_path)
    folder = weights_convert.convert(source, tmp_path / "new", weights_convert.Scheme(weights_convert.Format(4)))
    done = run("info", folder, "--quantize", 8)
    assert done.returncode == 1 and "is quantised already" in only_line(done.stderr)
    assert "4 bits, affine" in run("info", folder).stdout


def test_info_says_which_files_are_missing(tmp_path: Path):
    folder, _ = make_pair("e2b", tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    done = run("info", folder)
    assert done.returncode == 0 and "NOT complete: model-00002-of-00003.safetensors is missing" in done.stdout


def test_a_model_without_a_tokenizer(tmp_path: Path):
    done = run("generate", "x", "--model", make_pair("e2b", tmp_path)[0])
    assert done.returncode == 1 and "has no tokenizer.json: copy the original's" in done.stderr


def test_a_message_longer_than_the_context_does_not_end_the_chat():
    script = ["Who are you?", "word " * 5000, "/reset", "Who are you?"]
    done = run("chat", "--max-tokens", 20, "--temperature", 0, stdin="\n".join(script))
    assert done.returncode == 0 and "shorten it" in done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == second


def test_what_is_not_utf8():
    broken = b"caf\xe9".decode("utf-8", "surrogateescape")
    for done in (start("generate", broken), start("generate", stdin=broken)):
        assert done.returncode == 1 and "UTF-8" in only_line(done.stderr)
    chat = run("chat", "--max-tokens", 5, stdin=f"{broken}\nWho are you?\n")
    assert chat.returncode == 0 and "UTF-8" in chat.stderr and chat.stdout.strip()


def test_a_terminal_that_is_not_utf8():
    """Whatever it can't show doesn't end the answer; JSON loses nothing."""
    options = ("generate", "x", "--temperature", 50, "--seed", 1, "--max-tokens", 40)
    utf8, narrow = (start(*options, PYTHONIOENCODING=encoding) for encoding in ("utf-8", "ascii"))
    assert narrow.returncode == 0 and not utf8.stdout.isascii()
    assert narrow.stdout == utf8.stdout.encode("ascii", "replace").decode()
    assert json.loads(start(*options, "--json", PYTHONIOENCODING="ascii").stdout)["text"] + "\n" == utf8.stdout


@pytest.mark.parametrize("command", [("generate", "x", "--model"), ("chat",), ("info",)])
def test_truncated_weights(command: tuple[str, ...], tmp_path: Path):
    target, _ = make_pair("e2b", tmp_path)
    weights = next(target.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run(*command, target, "--no-draft")
    assert done.returncode == 1 and "truncated" in only_line(done.stderr) and done.stdout == ""


@pytest.mark.parametrize("command", [("generate", "x", "--model"), ("chat",), ("info",)])
def test_models_that_cannot_be_had(command: tuple[str, ...], tmp_path: Path):
    nothing = run(*command, tmp_path / "nothing")
    assert nothing.returncode == 1 and "nothing" in only_line(nothing.stderr)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    other = run(*command, tmp_path)
    assert other.returncode == 1 and "'llama'" in only_line(other.stderr)
    offline = start(*command, "nobody/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert offline.returncode == 1 and "nobody/nothing" in only_line(offline.stderr)


def test_a_traceback_only_for_those_who_ask(tmp_path: Path):
    assert "Traceback" in start("info", tmp_path, "--debug").stderr


@pytest.mark.parametrize("wrong", [
    ("--temperature", -1), ("--top-p", 2), ("--max-tokens", 0), ("--draft-length", "many"), ("--draft-length", 99),
    ("--temperature", "nan"), ("--temperature", "inf"), ("--exactness", "very"), ("--quantize", 7), ("--stop", ""),
    ("--draft-length", 9, "--exactness", "invariant"), ("--drafter", "x", "--no-draft"), ("--no-such-option",),
])  # fmt: skip
def test_wrong_use(wrong: tuple[object, ...]):
    done = run("generate", "x", *wrong)
    assert done.returncode == 2 and str(wrong[0]) in only_line(done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_an_empty_prompt(prompt: str):
    done = run("generate", stdin=prompt)
    assert done.returncode == 2 and "empty" in only_line(done.stderr)


def test_a_prompt_over_the_context():
    done = run("generate", "word " * 20_000)
    assert done.returncode == 1 and "context" in only_line(done.stderr)
