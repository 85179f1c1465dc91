"""The tuner: what it measures, what it chooses, and what becomes of its profiles."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

import mlx_mtp
from mlx_mtp import profile
from mlx_mtp.cli import app
from mlx_mtp.decode.objective import OBJECTIVES
from mlx_mtp.decode.round_cost import Prices
from mlx_mtp.errors import MemoryBudgetError, MTPError, ProfileError, PromptError
from mlx_mtp.measuring import prompts
from mlx_mtp.measuring.spread import Spread
from mlx_mtp.models.moe import Router
from mlx_mtp.tuning import acceptance, choose, costs
from mlx_mtp.tuning.costs import Measurement, Step
from mlx_mtp.tuning.plot import check_plot, write_plot
from tests.support.command_line import Done, arguments, run
from tests.support.tiny_checkpoints import make_pair

PROMPTS = {"words": [[5, 9, 200], [7, 7, 100, 3]], "more": [[4, 40, 44]]}


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_MTP_PROFILES", str(tmp_path / "profiles"))
    # Few laps do: what they say about this machine isn't tested.
    monkeypatch.setattr(costs, "_SWEEPS", 1)
    monkeypatch.setattr(costs, "_SECONDS", 0.0)
    monkeypatch.setattr(acceptance, "ANSWER_TOKENS", 12)
    return tmp_path / "profiles"


def tune(*args: object) -> Done:
    return run("tune", *args)


def measured(lm: mlx_mtp.MTPModel, **options: object) -> Measurement:
    found = Measurement()
    options = {"batches": (1, 2), "lengths": (1, 2, 3), "contexts": (20,), "prompts": PROMPTS} | options
    acceptance.measure(lm, found, **options)  # type: ignore[arg-type]
    return found


def seconds(value: float) -> Spread:
    return Spread(value, value, value)


def synthetic(
    verify: dict[int, list[float]], draft: float | None, acceptance: list[float] | None, experts: bool = False
) -> Measurement:
    """A measurement with these seconds of verify passes, by rows and from width 1 on."""
    steps = [
        Step(100, rows, {i: seconds(s) for i, s in enumerate(times, 1)}, draft and seconds(draft), 0.0,
             {i: float(rows + i) for i in range(1, len(times) + 1)} if experts else {})
        for rows, times in verify.items()
    ]  # fmt: skip
    return Measurement(steps, {"all": acceptance} if acceptance else {}, complete=True)


def test_the_command_measures_saves_and_lists(profiles: Path, tmp_path: Path):
    plot = tmp_path / "plot.png"
    done = tune("--batch-sizes", "1,2", "--contexts", 32, "--json", "--objective", "throughput", "--plot", plot)
    assert done.returncode == 0 and plot.read_bytes().startswith(b"\x89PNG"), done.stderr
    facts = json.loads(done.stdout)
    steps = facts["measurement"]["steps"]
    assert [(step["context"], step["rows"]) for step in steps] == [(32, 1), (32, 2)]
    for step in steps:
        assert list(step["verify"]) == [str(width) for width in range(1, 10)]
        assert all(0 < s["low"] <= s["median"] <= s["high"] for s in (*step["verify"].values(), step["draft"]))
    assert set(facts["measurement"]["acceptance"]) == {"chat", "code", "JSON", "prose"}
    assert all(0 <= a <= 1 for chances in facts["measurement"]["acceptance"].values() for a in chances)
    assert facts["measurement"]["drafter_position"] == "committed", "what the pair was trained with"
    best = max(facts["options"], key=lambda option: option["total_tps"])
    chosen = facts["choices"]["throughput"]
    assert (chosen["rows"], chosen["drafts"]) == (best["rows"], best["drafts"])
    assert Path(facts["profile"]).parent == profiles
    (listed,) = json.loads(tune("--list", "--json").stdout)
    assert listed["usable"] and (listed["rows"], listed["objective"]) == (best["rows"], "throughput")
    assert "draft length" in tune("--list").stdout


def test_a_profile_is_used_and_changes_no_text(profiles: Path):
    question, options = "Tell me a short story about a fox.", {"max_tokens": 60, "temperature": 0.7, "seed": 3}
    with mlx_mtp.load() as lm:
        assert lm.profile is None
        expected = lm.generate(question, **options)
        saved = a_profile(lm)
        path = profile.save_profile(saved)
    with mlx_mtp.load() as lm:
        assert lm.profile == saved
        with lm.models() as (_, drafter):
            assert drafter and drafter.position == "bonus"
        assert lm.generate(question, **options).tokens == expected.tokens
        several = lm.generate_batch([question] * 4, **options)
        # Plain decoding is said to be a thousand times as fast as drafting: the first rounds believe it.
        assert several[0].tokens == expected.tokens and several[0].stats.draft_lengths.get(0, 0) > 10
    with mlx_mtp.load(profile=path) as lm:
        assert lm.profile == saved
    with mlx_mtp.load(profile=None) as lm:
        assert lm.profile is None


def a_profile(lm: mlx_mtp.MTPModel) -> profile.Profile:
    return profile.Profile(
        key=profile.key_of(lm.description, lm.drafter_description),
        costs={1: Prices({1: 0.01, 2: 9.0, 8: 63.0}, 1.0, 0.0), 3: Prices({1: 0.03, 2: 27.0, 8: 189.0}, 3.0, 0.01)},
        acceptance={"chat": [0.9, 0.8]},
        rows=3,
        drafts=0,
        objective="balanced",
        drafter_position="bonus",
        measured="2026-01-01T00:00:00+00:00",
    )


@pytest.mark.parametrize("field, value, culprit", [
    ("mlx", "0.1", "another version of mlx"), ("mlx_mtp", "0.0.1", "another version of mlx_mtp"),
    ("device", "Apple M9", "another device"), ("files", "0" * 64, "other model files"),
    ("quantize", 4, "another quantisation"), ("drafter", "mxfp4", "another precision of the drafter"),
])  # fmt: skip
def test_profiles_of_something_else(field: str, value: object, culprit: str, tmp_path: Path):
    with mlx_mtp.load(drafter=False) as lm:
        saved = a_profile(lm)
    path = tmp_path / "other.json"
    profile.save_profile(replace(saved, key=replace(saved.key, **{field: value}))).rename(path)
    with pytest.raises(ProfileError, match=culprit):
        mlx_mtp.load(drafter=False, profile=path)


@pytest.mark.parametrize("damage", [
    "", "{", "[]", '{"schema": 0}', "[" * 100_000, "rows", "costs", "position", "key",
])  # fmt: skip
def test_a_damaged_profile_is_ignored(damage: str, caplog: pytest.LogCaptureFixture, profiles: Path):
    with mlx_mtp.load(drafter=False) as lm:
        saved = a_profile(lm)
    path = profile.save_profile(saved)
    content = json.loads(path.read_text())
    changes = {
        "rows": {"rows": 0}, "costs": {"costs": {"1": {"verify": {"1": -1}, "draft": 0, "packing": 0}}},
        "position": {"drafter_position": "left"},
        "key": {"key": {}},
    }  # fmt: skip
    path.write_text(json.dumps(content | changes[damage]) if damage in changes else damage)
    with mlx_mtp.load(drafter=False) as lm:
        assert lm.profile is None
    assert "profile ignored" in caplog.text and len(caplog.text.strip().splitlines()) == 1
    assert "__init__" not in caplog.text
    with pytest.raises(ProfileError, match="isn't a valid profile"):
        mlx_mtp.load(drafter=False, profile=path)
    (listed,) = json.loads(tune("--list", "--json").stdout)
    assert not listed["usable"] and "isn't a valid profile" in listed["why"]


@pytest.mark.parametrize("change, named", [
    ({"rows": 0}, "rows: input should be greater"), ({"rows": True}, "rows: "), ({"rows": "3"}, "rows: "),
    ({"drafts": -1}, "drafts: "), ({"drafts": 1.5}, "drafts: "), ({"objective": "speed"}, "objective: "),
    ({"objective": 5}, "objective: "), ({"measured": 5}, "measured: "), ({"acceptance": {"chat": [1.5]}}, "chat.0: "),
    ({"acceptance": {"chat": ["x"]}}, "acceptance.chat.0: "), ({"acceptance": 5}, "acceptance: "),
    ({"more": 1}, "more: "),
    ({"costs": {}}, "costs: "), ({"costs": {"x": {"verify": {"1": 1}, "draft": 0, "packing": 0}}}, "costs.x: "),
    ({"costs": {"1": {"verify": {"1": 0}, "draft": 0, "packing": 0}}}, "costs.1.verify.1: "),
    ({"costs": {"1": {"verify": {"1": 1}, "draft": float("nan"), "packing": 0}}}, "costs.1.draft: "),
    ({"costs": {"1": {"verify": {"1": float("inf")}, "draft": 0, "packing": 0}}}, "costs.1.verify.1: "),
    ({"costs": {"1": {"verify": {"1": 1}, "draft": 0}}}, "costs.1.packing: field required"),
    ({"costs": {"1": {"verify": {"2": 1}, "draft": 0, "packing": 0}}}, "costs of plain decoding are missing"),
    ({"key": {"model": "m"}}, "key.files: field required"), ({"drafter_position": "left"}, "drafter_position: "),
])  # fmt: skip
def test_what_is_wrong_in_a_profile_is_named(change: dict[str, Any], named: str, tmp_path: Path, profiles: Path):
    key = profile.Key("m", "f", None, None, None, "d", "1", "1")
    costs = {1: Prices({1: 1.0, 2: 2}, 0, 0.5)}
    whole = profile.Profile(key, costs, {"chat": [0.9, 1]}, 3, 0, "latency", None, "2026-01-01T00:00:00+00:00")
    path = profile.save_profile(whole)
    assert profile.load_profile(path) == whole, "and what was written comes back"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ProfileError, match=f"isn't a valid profile: .*{re.escape(named)}.*; delete it") as raised:
        profile.load_profile(path)
    assert "\n" not in str(raised.value)


def test_a_missing_profile_is_an_error(tmp_path: Path):
    with pytest.raises(ProfileError, match="can't be read"):
        mlx_mtp.load(profile=tmp_path / "nothing.json")


def test_costs_between_measured_batches():
    key = profile.Key("m", "f", None, None, None, "d", "1", "1")
    two, six = Prices({1: 1.0, 2: 2.0}, 0.1, 0.0), Prices({1: 3.0, 2: 4.0}, 0.3, 0.4)
    known = profile.Profile(key, {2: two, 6: six}, {}, 2, 1, "latency", None, "now")
    assert known.prices(1) == known.prices(2) == two and known.prices(9) == six
    three = known.prices(3)
    assert (three.verify, three.packing) == ({1: 1.5, 2: 2.5}, 0.1) and three.draft == pytest.approx(0.15)
    assert three.even() == pytest.approx({0: 1.5, 1: 2.65})


def test_choices_by_hand():
    # A round yields 1 + .5 = 1.5 tokens with one draft, 1 + .5 + .5 * .4 = 1.7 with two.
    found = choose.options(synthetic({1: [1.0, 1.1, 1.2], 4: [2.0, 2.7, 6.0]}, 0.1, [0.5, 0.4]))
    speed = {(option.rows, option.drafts): option.total_tps for option in found}
    assert speed == pytest.approx({
        (1, 0): 1.0, (1, 1): 1.5 / 1.2, (1, 2): 1.7 / 1.4, (4, 0): 2.0, (4, 1): 4 * 1.5 / 2.8, (4, 2): 4 * 1.7 / 6.2
    })  # fmt: skip
    picked = {name: choose.choose(found, name).option for name in OBJECTIVES}
    assert (picked["latency"].rows, picked["latency"].drafts) == (1, 1)
    assert (picked["throughput"].rows, picked["throughput"].drafts) == (4, 1)
    assert picked["balanced"] == picked["throughput"], "6 / 2.8 / 4 = .54 of plain decoding alone"
    slower = choose.options(synthetic({1: [1.0, 1.1], 4: [2.3, 3.2]}, 0.1, [0.5]))
    assert choose.choose(slower, "balanced").option.rows == 1, "6 / 3.3 / 4 = .45: too little for a row"
    assert "of plain decoding alone" in choose.choose(found, "balanced").why
    fours = [option for option in found if option.rows == 4]
    assert "of plain decoding at batch 4" in choose.choose(fours, "balanced").why


@pytest.mark.parametrize("acceptance", [[0.0, 0.0], [0.3, 0.1]])
def test_nothing_slower_than_plain_decoding_is_chosen(acceptance: list[float]):
    found = choose.options(synthetic({1: [1.0, 1.5, 2.0], 8: [4.0, 7.0, 9.0]}, 0.2, acceptance))
    for objective in OBJECTIVES:
        picked = choose.choose(found, objective)
        assert picked.option.drafts == 0 and "no draft length is faster" in picked.why


def test_without_a_drafter_the_batch_is_chosen():
    found = choose.options(synthetic({1: [1.0, 1.5], 8: [4.0, 7.0]}, None, None))
    picked = choose.choose(found, "throughput")
    assert (picked.option.rows, picked.option.drafts) == (8, 0) and "there is no drafter" in picked.why
    with pytest.raises(MTPError, match="nothing to choose from"):
        choose.choose([], "latency")


def test_a_batch_that_was_not_measured_everywhere_is_no_option():
    found = synthetic({1: [1.0, 1.1], 8: [2.0, 2.2]}, 0.1, [0.9])
    found.steps.append(replace(found.steps[0], context=9000))
    assert {option.rows for option in choose.options(found)} == {1}
    # Here it is only that the second context had just been begun.
    found.complete = False
    assert choose.options(found) == choose.options(replace(found, steps=found.steps[:2]))
    assert choose.comparable_steps(found) == found.steps[:2]


def test_times_of_a_busy_machine_are_noticed():
    steady = {1: [1.0, 1.1, 1.2, 1.1], 4: [2.0, 2.6, 6.0, 5.0]}
    assert choose.timing_anomaly(synthetic(steady, 0.1, [0.5]).steps) is None
    disturbed = synthetic(steady | {8: [4.0, 9.0, 5.0, 6.0]}, 0.1, [0.5]).steps
    assert choose.timing_anomaly(disturbed) is None, "it takes as long each time: a kernel that wider blocks don't use"
    disturbed[-1].verify[2] = Spread(9.0, 5.0, 10.0)
    why = choose.timing_anomaly(disturbed)
    assert why and "batch 8" in why and "a block of 2 took 1.8 times as long as one of 3" in why


@pytest.mark.parametrize("experts", [False, True])
def test_the_split_of_verify_time(experts: bool):
    truth = {rows: [0.5 + 0.01 * rows * w + 0.02 * (rows + w) * experts for w in range(1, 6)] for rows in (1, 2, 8)}
    parts = choose.split(synthetic(truth, None, None, experts).steps)
    assert parts and (parts.fixed, parts.dense) == pytest.approx((0.5, 0.01))
    assert parts.expert == pytest.approx(0.02 * experts, abs=1e-9) and parts.residual < 1e-9
    assert choose.split([]) is None


@pytest.mark.parametrize("kind", ["26b", "e2b"])
def test_what_is_measured(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, drafter = make_pair(kind, tmp_path)
    asked: list[int] = []
    routed = Router.__call__

    def counting(self: Router, x: mx.array) -> tuple[mx.array, mx.array]:
        """Counts the experts with the highest scores, from the weights."""
        rows = np.array(x, dtype=np.float64).reshape(-1, x.shape[-1])
        rows /= np.sqrt((rows**2).mean(-1, keepdims=True) + self._eps)
        scores = (rows * np.array(self.scale) * x.shape[-1] ** -0.5) @ np.array(self.proj.weight).T
        asked.append(np.unique(np.argsort(-scores)[:, : self._chosen]).size)
        return routed(self, x)

    with mlx_mtp.load(target, drafter=drafter) as lm:
        experts = lm.config.text.num_experts
        found = measured(lm)
        assert found.complete and [(s.context, s.rows) for s in found.steps] == [(20, 1), (20, 2)]
        for step in found.steps:
            assert set(step.verify) == {1, 2, 3} and step.draft and step.host > 0 and step.packing >= 0
            assert set(step.experts) == ({1, 2, 3} if experts else set())
        if experts:
            monkeypatch.setattr(Router, "__call__", counting)
            again = measured(lm, batches=(2,), lengths=(3,))
            layers = len(lm.config.text.layers)
            assert again.steps[0].experts[3] == np.mean(asked[-layers:]) > lm.config.text.experts_per_token
            assert found.steps[0].experts[1] == lm.config.text.experts_per_token
            # One text is enough for rows that differ, which ask for further experts.
            alone = measured(lm, batches=(1, 6), lengths=(2,), prompts={"one": [list(range(3, 60))]})
            assert alone.steps[1].experts[2] > alone.steps[0].experts[2]


def test_what_rows_of_different_lengths_take_more_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, drafter = make_pair("12b", tmp_path)
    verify = costs.verify

    def slower(*arguments: Any, counts: Any = None) -> Any:
        time.sleep(0.02 if counts else 0.0)
        return verify(*arguments, counts=counts)

    monkeypatch.setattr(costs, "verify", slower)
    with mlx_mtp.load(target, drafter=drafter) as lm:
        one, two = measured(lm, batches=(1, 2)).steps
    assert one.packing == 0.0 and 0.01 < two.packing < 0.2
    kept = choose.prices([two], 2)
    assert kept.packing == two.packing and kept.verify[3] == two.verify[3].median
    assert two.draft and kept.draft == two.draft.median


def test_tokens_are_chosen_as_the_model_chooses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sampled token takes longer than the best one, so greedy passes would be too cheap."""
    target, drafter = make_pair("12b", tmp_path)
    made: list[tuple[Any, ...]] = []

    class Spy(costs.Sampler):
        def __init__(self, *arguments: Any):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(costs, "Sampler", Spy)
    with mlx_mtp.load(target, drafter=drafter) as lm:
        measured(lm, batches=(2,))
        ((rows, _, suppressed, _),) = made
        assert [(row.temperature, row.top_k, row.top_p) for row in rows] == [(1.0, 64, 0.95)] * 2
        assert suppressed == lm.defaults.suppress_tokens != ()


def test_what_does_not_fit_is_left_out(tmp_path: Path):
    target, drafter = make_pair("31b", tmp_path)
    with mlx_mtp.load(target, drafter=drafter) as lm:
        with lm.models() as (target, _):
            one = costs._needed(target, 1, 23)
        lm.kv_budget = 2 * one
        done: list[str] = []
        found = measured(lm, batches=(1, 2, 4), contexts=(20, 10**6), progress=done.append)
        assert len(done) == costs.points((1, 2, 4), (20, 10**6)), "the bar gets to its end"
        assert {step.rows for step in found.steps} == {1, 2}
        assert any("batch 4" in reason for reason in found.skipped)
        assert any("context 1,000,000" in reason for reason in found.skipped)
        lm.kv_budget = one - 1
        with pytest.raises(MemoryBudgetError, match="nothing could be measured: batch 1"):
            measured(lm)


def test_an_interruption_keeps_what_was_measured(tmp_path: Path):
    target, drafter = make_pair("31b", tmp_path)
    found, calls = Measurement(), []

    def stop(done: str) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with mlx_mtp.load(target, drafter=drafter) as lm:
        with pytest.raises(KeyboardInterrupt):
            acceptance.measure(lm, found, (1, 2, 4), (1, 2), (20,), PROMPTS, stop)
        assert not found.complete and {step.rows for step in found.steps} == {1, 2}
        assert choose.choose(choose.options(found), "throughput").option.rows in (1, 2)
        assert len(lm.generate([5, 6], max_tokens=4).tokens) <= 4, "the model is as good as before"


def test_ctrl_c(profiles: Path):
    command = arguments("tune", "--contexts", "16,3000", "--json")
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stderr and "measuring" in running.stderr.readline()
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and len(errors.strip().splitlines()) == 1 and "stopped" in errors
    facts = json.loads(out)
    assert not facts["measurement"]["complete"]
    assert (facts["profile"] is not None) == bool(facts["options"]) == profiles.exists()


def test_ctrl_c_leaves_a_profile_of_what_was_measured(profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = acceptance.measure

    def interrupted(*args: Any, progress: costs.Progress, **options: Any) -> None:
        def stop(done: str) -> None:
            progress(done)
            if done.startswith("batch 1"):
                raise KeyboardInterrupt

        whole(*args, progress=stop, **options)

    prompt = tmp_path / "one.txt"
    prompt.write_text("Tell me a short story about a fox.")
    arguments = ["tune", "--contexts", "16", "--batch-sizes", "1,2", "--prompts", str(prompt)]
    monkeypatch.setattr(acceptance, "measure", interrupted)
    runner = CliRunner()
    partly = runner.invoke(app, arguments)
    assert partly.exit_code == 130 and "saved for balanced" in partly.stdout
    (path,) = profiles.glob("*.json")
    assert set(profile.load_profile(path).costs) == {1}
    monkeypatch.setattr(acceptance, "measure", whole)
    assert runner.invoke(app, arguments).exit_code == 0 and set(profile.load_profile(path).costs) == {1, 2}
    monkeypatch.setattr(acceptance, "measure", interrupted)
    again = runner.invoke(app, arguments)
    assert again.exit_code == 130 and "not saved" in again.stdout and set(profile.load_profile(path).costs) == {1, 2}


def test_what_was_measured_is_shown_where_no_profile_can_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_MTP_PROFILES", str(tmp_path / "file" / "profiles"))
    done = tune("--contexts", 16, "--batch-sizes", 1, "--json")
    assert done.returncode == 1 and "the profile can't be saved: " in done.stderr and "Traceback" not in done.stderr
    facts = json.loads(done.stdout)
    assert facts["choices"]["latency"]["rows"] == 1 and facts["profile"] is None


def test_prompts_need_a_tokenizer(tmp_path: Path):
    target, drafter = make_pair("31b", tmp_path)
    with mlx_mtp.load(target, drafter=drafter) as lm, pytest.raises(PromptError, match="token ids"):
        measured(lm, prompts=prompts.PROMPTS)


@pytest.mark.parametrize("content, name, culprit", [
    ('{"prompt": [5]}\n{"prompt": [5, 99999999]}', "p.jsonl", "prompt 2: "), ("{", "p.JSONL", "line 1"),
    ("", "p.txt", "holds no prompts"), ("{", "p.jsonl", "line 1"), ('{"prompt": "x"}\n[]', "p.jsonl", "line 2"),
    ('{"prompt": "a\u2028b"}\n[]', "p.jsonl", "line 2"), ('{"prompt": 5}', "p.jsonl", "line 1"),
    ('{"prompt": null}', "p.jsonl", "line 1"),
    ("\udcff", "p.txt", "isn't UTF-8"), (None, "p.txt", "No such file"),
])  # fmt: skip
def test_bad_prompt_files(content: str | None, name: str, culprit: str, tmp_path: Path):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    done = tune("--prompts", tmp_path / name)
    errors = done.stderr.removeprefix("measuring\n")
    assert done.returncode == 1 and culprit in errors and len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize("args", [
    ("--batch-sizes", "1,x"), ("--contexts", "0"), ("--objective", "speed"), ("--simulate", "Z80"),
    ("--quantize", "7"), ("7B", "--simulate", "M4"), ("--simulate", "M4", "--plot", "x.png"),
    ("--drafter", "x", "--no-draft"), ("--simulate", "M4", "--drafter", "x"),
    ("--simulate", "M4", "--contexts", "262145"),
])  # fmt: skip
def test_wrong_use(args: tuple[str, ...]):
    done = tune(*args)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "Z80" not in args or "M4 Max" in done.stderr


def test_simulation(tmp_path: Path):
    done = tune("26B-A4B", "--simulate", "apple m2-pro", "--quantize", 4)
    assert done.returncode == 0 and "PREDICTION" in done.stdout and "M2 Pro" in done.stdout
    target, _ = make_pair("26b", tmp_path)
    own = tune(target, "--simulate", "M4 Max")
    assert own.returncode == 0 and "experts" in own.stdout, own.stderr


def test_simulation_as_json(tmp_path: Path):
    done = tune("31B", "--simulate", "M3 Ultra", "--quantize", 8, "--batch-sizes", "2,3", "--contexts", 4000, "--json")
    facts = json.loads(done.stdout)
    (at,) = facts["contexts"]
    assert facts["predicted"] and (facts["chip"], facts["bits"], at["context"]) == ("M3 Ultra", 8, 4000)
    assert [choice["batch"] for choice in at["choices"]] == [2, 3]
    assert at["chosen"] in at["choices"]
    for choice in at["choices"]:
        assert choice["best"] == max(choice["speeds"]) == choice["speeds"][choice["drafts"]]
        assert choice["plain"] == choice["speeds"][0] and len(choice["speeds"]) == 9
    (nothing,) = json.loads(tune("31B", "--simulate", "M1", "--contexts", 500, "--json").stdout)["contexts"]
    assert nothing["choices"] == [] and nothing["chosen"] is None


def test_what_is_simulated_is_what_was_asked_for():
    def simulated(*args: object) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(
            tune("26B-A4B", "--simulate", "M4 Max", "--quantize", 4, "--json", *args).stdout
        )
        return facts

    for objective, best in (("latency", lambda c: c["best"] / c["batch"]), ("throughput", lambda c: c["best"])):
        found = simulated("--objective", objective, "--contexts", "500,8000")
        assert [at["context"] for at in found["contexts"]] == [500, 8000]
        for at in found["contexts"]:
            assert at["chosen"] == max(at["choices"], key=best)
    (plain,) = simulated("--no-draft", "--contexts", 500)["contexts"]
    assert all(choice["drafts"] == 0 and choice["best"] == choice["plain"] for choice in plain["choices"])


def test_the_bits_of_a_quantised_folder_are_its_own(tmp_path: Path):
    target, _ = make_pair("31b", tmp_path)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 64}}))
    assert "4 bits" in tune(target, "--simulate", "M4 Max").stdout
    again = tune(target, "--simulate", "M4 Max", "--quantize", 8)
    assert again.returncode == 1 and "quantised already" in again.stderr
    (tmp_path / "elsewhere").mkdir()
    alone = tune(target.rename(tmp_path / "elsewhere" / "alone"), "--simulate", "M4 Max")
    assert alone.returncode == 0 and "Without a drafter" in alone.stdout, alone.stderr


def test_a_plot(tmp_path: Path):
    found = choose.options(synthetic({1: [1.0, 1.1, 1.2], 4: [2.0, 2.7, 6.0]}, 0.1, [0.5, 0.4]))
    check_plot(tmp_path / "plot.png")
    write_plot(found, tmp_path / "plot.png", "by hand")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, culprit", [
    ("plot.xyz", "ends in"), ("plot", "ends in"), ("nowhere/plot.png", "can't be written"),
    ("a.png", "can't be written"),
])  # fmt: skip
def test_a_plot_that_cannot_be_written_is_refused_at_once(name: str, culprit: str, tmp_path: Path, profiles: Path):
    (tmp_path / "a.png").mkdir()
    done = tune("--plot", tmp_path / name)
    assert done.returncode == 1 and culprit in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not profiles.exists(), "nothing was measured"


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("mlx_mtp.tuning.plot.find_spec", lambda name: None)
    with pytest.raises(MTPError, match="plot"):
        check_plot(tmp_path / "plot.png")


def test_the_batch_has_the_rows_of_the_profile(profiles: Path):
    with mlx_mtp.load() as lm:
        profile.save_profile(a_profile(lm))
    taken: list[int] = []

    def prompts() -> Iterator[list[int]]:
        for i in range(6):
            taken.append(i)
            yield [5, 6, 7 + i]

    with mlx_mtp.load() as lm:
        answers = lm.generate_each(prompts(), max_tokens=8, ignore_eos=True)
        next(answers)
        assert len(taken) == 3
        answers.close()
