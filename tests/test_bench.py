"""`mlx-mtp bench` (cli/bench.py, measuring/): what it measures, and how it runs other programs beside."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import mlx_mtp
from mlx_mtp.cli.bench_report import markdown
from mlx_mtp.decode.request import Stats
from mlx_mtp.errors import MTPError, PromptError
from mlx_mtp.measuring import peers, speed
from mlx_mtp.measuring.peer_protocol import Clock, Job, Measured
from mlx_mtp.measuring.peers import Peer
from mlx_mtp.measuring.prompts import prompt_of
from mlx_mtp.measuring.speed import OURS, Case, Ours, Run, Speeds, Theirs, kept_by_position, measure
from mlx_mtp.measuring.spread import Spread
from mlx_mtp.system.blas import has_openblas
from tests.support.command_line import Done, run

JOB: Job = {"target": "target", "drafter": None, "dtype": "float32"}


def bench(*args: object) -> Done:
    small = ("--turns", 1, "--tokens", 4, "--contexts", 24, "--batch-sizes", "1,2", "--draft-lengths", "2,auto")
    return run("bench", *small, *args)


def tables(text: str) -> list[list[list[str]]]:
    """The cells of the Markdown tables in a text."""
    found: list[list[list[str]]] = [[]]
    for line in text.split("\n"):
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def measured(seconds: float, prompts: float, further: int) -> Measured:
    return {"seconds": seconds, "prompts": prompts, "first_token": prompts, "further": further,
            "active": 1, "peak": 3, "pool": 2}  # fmt: skip


def test_the_tables():
    done = bench()
    assert done.returncode == 0 and done.stderr == "measuring\n", done.stderr
    speeds, acceptance, memory = tables(done.stdout)
    assert all(len(row) == len(table[0]) for table in (speeds, acceptance, memory) for row in table)
    cases = [row[:4] for row in speeds[2:]]
    assert cases == [["24", rows, OURS, length] for rows in ("1", "2") for length in ("0", "2", "auto")]
    assert [row[7] == "" for row in speeds[2:]] == [True, False, False] * 2, "the ratio to plain decoding"
    assert [row[:4] for row in memory[2:]] == cases and all(float(row[5]) > 0 for row in memory[2:])
    assert all(0 <= float(share) <= 1 for row in acceptance[2:] for share in row[5:] if share)
    assert "`mlx-mtp bench --turns 1 " in done.stdout and "mlx-mtp " + mlx_mtp.__version__ in done.stdout


def test_json():
    facts = json.loads(bench("--json", "--batch-sizes", 1, "--draft-lengths", "0,3").stdout)
    plain, drafted = facts["cases"]
    assert (plain["draft_length"], drafted["draft_length"]) == (0, 3) and facts["complete"]
    for name in ("tps", "prompt_tps", "first_token_seconds", "over_plain"):
        assert 0 < drafted[name]["low"] <= drafted[name]["median"] <= drafted[name]["high"]
    assert plain["over_plain"]["median"] == 1 and plain["accepted_by_position"] == []
    assert len(drafted["accepted_by_position"]) == 3 and drafted["memory_bytes"]["peak"] > 0


def test_without_a_drafter_nothing_is_drafted(tmp_path: Path):
    with mlx_mtp.load(drafter=False, cache_bytes=0) as lm:
        found = Speeds(3)
        measure(lm, [Ours(lm)], [20], [1], [0, 2, "auto"], 1, found)
        assert [case.draft_length for case in found.cases()] == [0]


def test_ctrl_c_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch):
    whole, calls = Ours.run, []

    def stop(self: Ours, *args: Any) -> Run:
        calls.append(args)
        if len(calls) == 5:  # the first of the first turn after the warm-up is done
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(Ours, "run", stop)
    done = bench("--batch-sizes", 1, "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 130 and not facts["complete"] and len(facts["cases"]) == 1
    assert done.stderr.split() == ["measuring", "stopped:", "partial", "results"]


@pytest.mark.parametrize("args, code, culprit", [
    (("--batch-sizes", "9"), 2, "at most 8"), (("--batch-sizes", "0"), 2, "--batch-sizes"),
    (("--draft-lengths", "2,x"), 2, "--draft-lengths"), (("--tokens", "1"), 2, "--tokens"),
    (("--turns", "0"), 2, "--turns"),
    (("--contexts", "5000"), 2, "the model's context is 4,096"), (("--contexts", "5"), 1, "can't hold the question"),
    (("--compare", "mlx-lm,vllm"), 2, "expected some of mlx-lm, mlx-vlm"),
    (("--compare", "mlx-lm", "--quantize", "4"), 2, "mlx-mtp convert"),
])  # fmt: skip
def test_wrong_options(args: tuple[str, ...], code: int, culprit: str):
    done = bench(*args)
    assert done.returncode == code and culprit in done.stderr and done.stdout == ""


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    done = bench("--compare", "mlx-vlm")
    assert done.returncode == 1 and "pip install mlx-vlm" in done.stderr and len(done.stderr.splitlines()) == 1


def test_beside_mlx_lm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLX_MTP_OPENBLAS", "0")  # as the process of the tests
    done = bench("--compare", "mlx-lm", "--batch-sizes", 2, "--draft-lengths", "2")
    assert done.returncode == 0, done.stderr
    plain, drafted, theirs = tables(done.stdout)[0][2:]
    assert theirs[2:4] == ["mlx-lm", "0"] and plain[8:] == drafted[8:] == ["", ""]
    assert all("(" in ratio and ratio.startswith(tuple("0123456789")) for ratio in theirs[8:])
    assert ", mlx-lm " in done.stdout


def peer(folder: Path, body: str) -> Peer:
    """A peer whose Python is a shell script."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\nread job\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return Peer("mlx-lm", JOB, script)


def test_peers_answer_and_are_ended(tmp_path: Path):
    about = json.dumps({"version": "1.2", "openblas": has_openblas()})
    answer = json.dumps(measured(2.0, 1.0, 3))
    found = peer(tmp_path, f"echo '{about}'\nread asked\necho \"$asked\" >{tmp_path}/asked\necho '{answer}'\nsleep 600")
    assert (found.name, found.version, found.drafts) == ("mlx-lm", "1.2", False)
    assert found.run([(5, 6)], 4, 0) == measured(2.0, 1.0, 3)
    assert json.loads((tmp_path / "asked").read_text()) == {"prompts": [[5, 6]], "tokens": 4, "draft_length": 0}
    found.close()


@pytest.mark.parametrize("body, culprit", [
    ("echo 'ValueError: no such model' >&2; exit 1", "mlx-lm failed with this pair: ValueError: no such model"),
    ("exit 3", "it said nothing"),
    (f"""echo '{{"version": "1", "openblas": {json.dumps(not has_openblas())}}}'""", "OpenBLAS"),
])  # fmt: skip
def test_peers_that_fail(body: str, culprit: str, tmp_path: Path):
    with pytest.raises(MTPError, match=culprit):
        peer(tmp_path, body)


def test_the_clock_counts_what_comes_after_all_prompts(monkeypatch: pytest.MonkeyPatch):
    now = [10.0]
    monkeypatch.setattr("mlx_mtp.measuring.peer_protocol.time.perf_counter", lambda: now[0])
    clock = Clock()
    for at, row, tokens in ((11.0, 0, 1), (12.0, 0, 2), (13.0, 1, 1), (14.0, 1, 3), (15.0, 0, 1)):
        now[0] = at
        clock.tick(row, tokens)
    found = clock.measured()
    assert (found["seconds"], found["prompts"], found["first_token"], found["further"]) == (5.0, 3.0, 2.0, 4)
    clock.tick(0, 1, at=9.0)
    assert (clock.measured()["seconds"], clock.measured()["further"]) == (9.0, 5)
    assert Run(found).tps == 2.0 and Run(measured(1.0, 1.0, 0)).tps == 0


def test_ratios_are_taken_within_turns():
    ours, other = Case(OURS, 100, 2, 0), Case("mlx-lm", 100, 2, 0)
    found = Speeds(9)
    # The machine is half as fast in the second turn, and a third one has only one of them.
    found.runs[ours] = {1: Run(measured(3.0, 1.0, 8)), 2: Run(measured(6.0, 2.0, 8)), 3: Run(measured(2.0, 1.0, 8))}
    found.runs[other] = {1: Run(measured(5.0, 1.0, 8)), 2: Run(measured(10.0, 2.0, 8))}
    assert found.generation(ours) == Spread(4.0, 2.0, 8.0) and found.prompt(other) == Spread(150.0, 100.0, 200.0)
    assert found.ratio(ours, other) == Spread(2.0, 2.0, 2.0)
    assert found.ratio(other, Case(OURS, 100, 2, 4)) is None


def test_programs_take_turns():
    order: list[tuple[int, int]] = []

    def decode(prompts: Sequence[Sequence[int]], tokens: int, draft_length: int) -> Measured:
        order.append((len(prompts), draft_length))
        assert tokens == 5 and all(len(prompt) == 30 for prompt in prompts)
        return measured(2.0, 1.0, 8)

    with mlx_mtp.load(drafter=False) as lm:
        found, done = Speeds(5), list[float]()
        programs = [Theirs("plain", decode, False), Theirs("drafts", decode, True)]
        measure(lm, programs, [30], [1, 2], [0, 3, "auto"], 2, found, done.append)
    cases = speed.cases_of(programs, [30], [1, 2], [0, 3, "auto"])
    assert len(cases) == 6 and done == [*range(1, 19)], "a warm-up and two turns"
    assert all(sorted(order[i : i + 6]) == sorted(order[:6]) for i in (0, 6, 12)) and order[:6] != order[6:12]
    assert all(len(found.runs[case]) == 2 for case in cases)


def test_acceptance_by_position():
    one, other = Stats(), Stats()
    for drafted, accepted in ((3, 3), (3, 1), (1, 1), (0, 0)):
        one.count(drafted, accepted)
    other.count(3, 0)
    assert kept_by_position([one, other]) == pytest.approx([3 / 4, 1 / 3, 1 / 3])
    assert kept_by_position([Stats()]) == []


def test_prompts_of_a_length():
    with mlx_mtp.load(drafter=False) as lm:
        for tokens in (30, 900, 3000):
            one, other = (prompt_of(lm, number, tokens) for number in (0, 1))
            assert len(one) == len(other) == tokens and one != other
            assert (
                one[:3] == lm.encode("What?")[:3] and lm.tokenizer and "speculative" in lm.tokenizer.decode(one[-20:])
            )
        with pytest.raises(PromptError, match="can't hold the question"):
            prompt_of(lm, 0, 6)


def test_markdown():
    assert markdown(["a", "wide"], [["x", "1"], ["long", "22"]], words=(0,)) == [
        "| a    | wide |", "| ---- | ---: |", "| x    |    1 |", "| long |   22 |",
    ]  # fmt: skip
    assert Spread.of([1234.5, 1000.0, 2000.0]).text(1) == "1,234.5 (1,000.0 to 2,000.0)"
