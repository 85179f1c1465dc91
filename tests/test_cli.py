"""The command line on the embedded pair, as a user runs it (cli/)."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_checkpoints import make_pair

QUESTION = "What is a drafter?"


def mlx_mtp(*args: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_mtp", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


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
        help_text = mlx_mtp(command, "--help")
        assert help_text.returncode == 0 and "--drafter" in help_text.stdout


def test_version():
    assert mlx_mtp("--version").stdout.startswith("mlx-mtp 0.")


def test_generate_prints_the_answer_and_nothing_else():
    done = mlx_mtp("generate", QUESTION, "--max-tokens", 30, "--temperature", 0)
    piped = mlx_mtp("generate", "--max-tokens", 30, "--temperature", 0, stdin=QUESTION)
    plain = mlx_mtp("generate", QUESTION, "--max-tokens", 30, "--temperature", 0, "--no-draft")
    assert done.returncode == piped.returncode == plain.returncode == 0
    assert done.stdout.strip() and done.stdout == piped.stdout == plain.stdout
    assert "tok/s" in done.stderr and "accepted" in done.stderr
    assert "nothing drafted" in plain.stderr


def test_generate_json():
    answers = [
        mlx_mtp("generate", QUESTION, "--max-tokens", 30, "--seed", 5, "--draft-length", k, "--json") for k in (0, 3)
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


def test_chat_over_a_pipe(tmp_path: Path):
    saved = tmp_path / "talk.json"
    script = [
        "/help", "/stats", "/system Answer briefly.", QUESTION, "/stats", '"""', "Who", "are you?", '"""', "/think on",
        "/think off", "/nonsense", f"/save {saved}", f"/save {tmp_path}/no/such/folder.json", "/reset", "one \\",
        "line", "/quit", "never said",
    ]  # fmt: skip
    done = mlx_mtp("chat", "--max-tokens", 20, "--temperature", 0, stdin="\n".join(script) + "\n")
    assert done.returncode == 0, done.stderr
    talk = json.loads(saved.read_text())
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert talk[3]["content"] == "Who\nare you?"
    for answer in (talk[2], talk[4]):
        assert answer["content"] in done.stdout
    assert done.stderr.count("tok/s") == 4  # three status lines, and /stats
    assert "prompt tokens kept" in done.stderr
    assert "unknown command '/nonsense'" in done.stderr and "no answer yet" in done.stderr
    assert "No such file" in done.stderr
    assert list(tmp_path.iterdir()) == [saved]


def test_control_c_stops_the_answer_and_not_the_chat():
    main, terminal = pty.openpty()
    chat = subprocess.Popen(
        [sys.executable, "-m", "mlx_mtp", "chat", "--max-tokens", "4000", "--draft-length", "0"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(terminal)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline and chat.poll() is None, seen
            seen += os.read(main, 4096).decode(errors="replace")

    try:
        wait_for("> ")
        os.write(main, b"/stats\n")
        wait_for("no answer yet")
        for _ in range(3):  # a loaded machine may let the answer end before the signal is sent
            seen = ""
            os.write(main, b"Tell me a long story about a fox, a bear and a bird.\n")
            wait_for("bird.\r\n")
            seen = ""
            wait_for(" ")
            chat.send_signal(signal.SIGINT)
            wait_for("tok/s")
            if "[stopped]" in seen:
                break
        else:
            pytest.fail(f"no answer was stopped: {seen}")
        os.write(main, b"/quit\n")
        assert chat.wait(30) == 0
    finally:
        chat.kill()
        os.close(main)


def test_info():
    facts = json.loads(mlx_mtp("info", "--json").stdout)
    assert facts["target"]["layers"] == 12 and facts["drafter"]["pairing"] == "fits the target"
    assert facts["machine"]["fits"] is True
    assert facts["target"]["bytes_on_disk"] > 2 * facts["target"]["parameters"]
    quantized = json.loads(mlx_mtp("info", "--json", "--quantize", 4).stdout)
    assert quantized["target"]["bytes_in_memory"] < facts["target"]["bytes_in_memory"] / 4
    table = mlx_mtp("info").stdout
    for word in ("target", "drafter", "context", "KV", "fits"):
        assert word in table


def test_info_names_what_clashes(tmp_path: Path):
    target, drafter = make_pair("e2b", tmp_path, drafter="31b")
    assert "made for another target" in mlx_mtp("info", target, "--drafter", drafter).stdout
    done = mlx_mtp("generate", "x", "--model", target)
    assert done.returncode == 1 and "made for another target" in only_line(done.stderr)


@pytest.mark.parametrize("command", [("generate", "x", "--model"), ("chat",), ("info",)])
def test_models_that_cannot_be_had(command: tuple[str, ...], tmp_path: Path):
    nothing = mlx_mtp(*command, tmp_path / "nothing")
    assert nothing.returncode == 1 and "nothing" in only_line(nothing.stderr)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    other = mlx_mtp(*command, tmp_path)
    assert other.returncode == 1 and "'llama'" in only_line(other.stderr)
    offline = mlx_mtp(*command, "nobody/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert offline.returncode == 1 and "nobody/nothing" in only_line(offline.stderr)


def test_a_traceback_only_for_those_who_ask(tmp_path: Path):
    assert "Traceback" in mlx_mtp("info", tmp_path, "--debug").stderr


@pytest.mark.parametrize("wrong", [
    ("--temperature", -1), ("--top-p", 2), ("--max-tokens", 0), ("--draft-length", "many"), ("--draft-length", 99),
    ("--exactness", "very"), ("--quantize", 7), ("--no-such-option",),
])  # fmt: skip
def test_wrong_use(wrong: tuple[object, ...]):
    done = mlx_mtp("generate", "x", *wrong)
    assert done.returncode == 2 and str(wrong[0]) in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_an_empty_prompt(prompt: str):
    done = mlx_mtp("generate", stdin=prompt)
    assert done.returncode == 2 and "empty" in done.stderr


def test_a_prompt_over_the_context():
    done = mlx_mtp("generate", "word " * 20_000)
    assert done.returncode == 1 and "context" in only_line(done.stderr)
