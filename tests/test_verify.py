"""`mlx-mtp verify` (cli/verify.py, measuring/): what it says of a sound pair, and that it finds a broken one."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp.cli import verify_report
from mlx_mtp.decode import round as decode_round
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.measuring import texts
from mlx_mtp.measuring.scores import Agreement, agreement, margin
from mlx_mtp.measuring.texts import PLAIN, Comparison, Mismatch, Outcome, Setting, first_difference, settings
from mlx_mtp.models.target import Target
from tests.support.command_line import Done, arguments, run
from tests.support.tiny_checkpoints import make_pair

SMALL = ("--batch-sizes", "1,2", "--draft-lengths", "3")
TICKS = 20
"""Seconds, of which every look at the clock takes one: enough for two turns."""


@pytest.fixture(autouse=True)
def _few_tokens_and_a_clock_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(texts, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(texts, "SHORTEST", 8)
    monkeypatch.setattr(texts, "LONGEST", 8)
    monkeypatch.setattr(texts, "TEXT_TOKENS", 6)


def verify(*args: object, seconds: int = TICKS) -> Done:
    return run("verify", *SMALL, "--seconds", seconds, *args)


@pytest.fixture
def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the drafting path: drafts are wrong, and count all the same."""
    whole = decode_round.draft

    def accept_all(drafts: mx.array, choices: mx.array, most: Any = None) -> mx.array:
        lengths = [drafts.shape[1]] * drafts.shape[0] if most is None else list(most)
        return mx.array(lengths, dtype=mx.int32)

    monkeypatch.setattr(decode_round, "draft", lambda *args: whole(*args) ^ 1)
    monkeypatch.setattr(decode_round, "accept", accept_all)


def test_a_sound_pair():
    done = verify(seconds=10)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "verifying\n", "no bar where there is no terminal"
    for line in ("kernels: right", "equal bit for bit", "fast, invariant and stepwise gave plain", "\nRight: "):
        assert line in done.stdout
    assert "WRONG" not in done.stdout and "differ" not in done.stdout
    assert str(Path.home()) not in done.stdout, "it may be pasted anywhere"


def test_json():
    done = verify("--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and facts["holds"] and facts["complete"] and facts["mismatches"] == []
    assert facts["scores"]["equal"] and facts["coincides"] == {"fast": True, "invariant": True, "stepwise": True}
    named = {(it["exactness"], it["rows"], it["draft_length"]): it for it in facts["settings"]}
    assert set(named) == {
        ("fast", 1, 0), ("fast", 1, 3), ("fast", 2, 0), ("fast", 2, 3), ("invariant", 1, 3), ("stepwise", 1, 3)
    }  # fmt: skip
    assert all(it["samplings"].keys() == {"greedy", "sampled"} and it["tps"] > 0 for it in named.values())
    assert facts["tokens_compared"] == sum(it["tokens"] for key, it in named.items() if key != ("fast", 1, 0))
    assert named["fast", 2, 3]["mean_accepted"] > 0 == named["fast", 2, 0]["mean_accepted"]
    assert facts["kernels"] and all(it["wrong"] is None for it in facts["kernels"])


@pytest.mark.usefixtures("_broken")
def test_a_broken_drafting_path_is_found():
    facts = json.loads((done := verify("--json")).stdout)
    assert done.returncode == 1 and not facts["holds"]
    found = facts["mismatches"]
    assert {it["setting"]["draft_length"] for it in found} == {3}, "plain decoding is as it was"
    assert {it["sampling"] for it in found} == {"greedy", "sampled"}
    assert facts["coincides"]["fast"] is False
    for it in found:
        assert not it["near_tie"] and not it["allowed"] and it["expected"] != it["got"] and it["margin"] > 0
    with mlx_mtp.load(cache_bytes=0) as lm:
        it = next(it for it in found if it["sampling"] == "sampled" and it["against"] == "plain")
        plain = lm.generate(
            it["prompt"], 8, temperature=1.0, top_k=64, top_p=1.0, min_p=0.0, seed=it["seed"], draft_length=0
        )
        assert plain.tokens[it["position"]] == it["expected"], "what is reported can be done again"
        logits = lm.logits([*it["prompt"], *plain.tokens[: it["position"]]])[-1]
        assert it["logit_gap"] == pytest.approx(abs(float(logits[it["expected"]] - logits[it["got"]])))


@pytest.mark.usefixtures("_broken")
def test_the_report_shows_what_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify_report, "_SHOWN", 2)
    done = verify(seconds=10)
    assert done.returncode == 1 and "\nWRONG: " in done.stdout
    assert "  REAL: " in done.stdout and ", greedy: token " in done.stdout and "logits " in done.stdout
    assert "more: --json has all" in done.stdout and "did not" in done.stdout


@pytest.mark.usefixtures("_broken")
def test_near_ties_are_allowed_only_where_they_are_documented(monkeypatch: pytest.MonkeyPatch):
    # As if scores changed by as much as any two of them differ.
    monkeypatch.setattr(texts, "compared_scores", lambda lm, wanted: Agreement(((1, 2),), 1, 1e3, 0.0, 1.0))
    facts = json.loads((done := verify("--json", "--draft-lengths", "2,3")).stdout)
    assert all(it["near_tie"] for it in facts["mismatches"])
    allowed = {(it["setting"]["exactness"], it["against"]): it["allowed"] for it in facts["mismatches"]}
    assert allowed["fast", "plain"] and allowed["invariant", "plain"]
    assert not allowed["stepwise", "plain"] and not allowed["invariant", "invariant"]
    assert done.returncode == 1


def test_near_ties_alone_are_no_failure():
    own = Setting("fast", 1, 3)
    tie = Mismatch(own, "plain", "greedy", 0, [5], 1, 7, 8, 1e-6, 1e-6, True, True)
    found = Comparison([], Agreement(((1, 2),), 1, 1e-5, 1e-6, 0.1), {PLAIN: Outcome(1, 4, 1.0)})
    found.outcomes[own] = Outcome(1, 4, 1.0, differing=1, mismatches=[tie])
    assert found.holds and found.coincides("fast") is False and found.coincides("stepwise") is None


def test_scores_that_depend_on_the_shape(monkeypatch: pytest.MonkeyPatch):
    whole = Target.__call__

    def disturbed(self: Target, tokens: mx.array, *args: Any, by: float) -> mx.array:
        hidden = whole(self, tokens, *args)
        return hidden * (1 + by * mx.random.normal(hidden.shape)) if tokens.shape[1] > 1 else hidden

    with mlx_mtp.load() as lm, lm.models() as (target, _):
        text = [*range(300, 312)]
        equal = agreement(target, text, 4, [(1, 2), (2, 3)])
        assert equal.equal and equal.sound and equal.tie == 0 and equal.positions == 8
        monkeypatch.setattr(Target, "__call__", lambda *args: disturbed(*args, by=1e-4))
        near = agreement(target, text, 4, [(1, 2), (2, 3)])
        assert not near.equal and near.sound and 0 < near.largest < near.tie < 1
        assert agreement(target, text, 4, [(2, 1)]).equal, "which has blocks of one"
        for by in (0.5, float("nan")):
            monkeypatch.setattr(Target, "__call__", lambda *args, by=by: disturbed(*args, by=by))
            wrong = agreement(target, text, 4, [(1, 2)])
            assert not wrong.sound and wrong.tie == 0, "a wrong target makes no near ties"
            assert not Comparison([], wrong).holds


def test_margins_say_what_is_chosen():
    vocab, rng = 300, np.random.default_rng(0)
    for seed in range(20):
        logits = mx.array(rng.normal(size=vocab).astype(np.float32))
        for sampling in (SamplingOptions(), SamplingOptions(1.0, top_k=16, seed=seed)):
            (chosen,) = Sampler([sampling]).target(logits[None, None], mx.array([[9]])).flatten().tolist()
            other = (chosen + 1) % vocab
            apart = margin(logits, chosen, other, sampling, 9)
            # Raising the other one's logit by a little more than the margin makes it a candidate or the choice.
            raised = logits + (mx.arange(vocab) == other) * (apart + 1e-4)
            (now,) = Sampler([sampling]).target(raised[None, None], mx.array([[9]])).flatten().tolist()
            least = mx.sort(raised)[-16].item()
            assert now == other or (sampling.top_k and raised[other].item() >= least)


def test_ctrl_c_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch):
    def stopped() -> Iterator[float]:
        yield from map(float, range(8))
        raise KeyboardInterrupt

    ticks = stopped()
    monkeypatch.setattr(texts, "monotonic", lambda: next(ticks))
    done = verify()
    assert done.returncode == 130 and "stopped: partial results" in done.stderr
    assert "for want of time" in done.stdout and "\nRight: " in done.stdout


def test_a_real_ctrl_c():
    running = subprocess.Popen(
        arguments("verify", "--seconds", "600", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stderr and running.stderr.readline() == "verifying\n"
    running.send_signal(signal.SIGINT)
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and errors.strip().startswith("stopped") and "Traceback" not in errors
    assert not json.loads(out)["complete"]


def test_too_little_time_is_an_error():
    done = verify(seconds=1)
    assert done.returncode == 1 and "too short to compare a text" in done.stderr
    assert "Nothing was compared" in done.stdout


def test_a_pair_without_a_tokenizer(tmp_path: Path):
    target, drafter = make_pair("e2b", tmp_path)
    done = verify(target, "--drafter", drafter, seconds=10)
    assert done.returncode == 0 and "\nRight: " in done.stdout, done.stdout + done.stderr
    assert str(tmp_path) not in done.stdout


@pytest.mark.parametrize("args, culprit", [
    (("--batch-sizes", "0"), "--batch-sizes"), (("--batch-sizes", "1,x"), "--batch-sizes"),
    (("--draft-lengths", "16"), "from 0 to 15"), (("--draft-lengths", "-1"), "--draft-lengths"),
    (("--draft-lengths", "1,,2"), "--draft-lengths"), (("--seconds", "0"), "--seconds"),
    (("--quantize", "7"), "--quantize"),
])  # fmt: skip
def test_wrong_options(args: tuple[str, ...], culprit: str):
    done = run("verify", *args)
    assert done.returncode == 2 and culprit in done.stderr and len(done.stderr.splitlines()) == 1


def test_settings():
    assert settings([1, 4], [0, 2, 9, "auto"], drafter=True) == [
        Setting("fast", 1, 2), Setting("fast", 1, 9), Setting("fast", 1, "auto"), Setting("fast", 4, 0),
        Setting("fast", 4, 2), Setting("fast", 4, 9), Setting("fast", 4, "auto"), Setting("invariant", 1, 7),
        Setting("invariant", 1, "auto"), Setting("stepwise", 1, 9),
    ]  # fmt: skip
    assert settings([1, 2], [3], drafter=False) == [
        Setting("fast", 2, 0), Setting("invariant", 1, 0), Setting("stepwise", 1, 0)
    ]  # fmt: skip


@pytest.mark.parametrize("one, other, at", [
    ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [1], 0), ([], [], None),
])  # fmt: skip
def test_the_first_difference(one: list[int], other: list[int], at: int | None):
    assert first_difference(one, other) == first_difference(other, one) == at
