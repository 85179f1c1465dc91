"""The cost model: known totals, bounds, directions, and a fit that finds what made its data (tuning/)."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_mtp.checkpoint.quantization import Format
from mlx_mtp.checkpoint.sizes import ReadPerStep, drafter_sizes, kv_read_bytes, target_sizes
from mlx_mtp.cli.render import plain
from mlx_mtp.cli.tune_tables import simulation
from mlx_mtp.config import check_pair
from mlx_mtp.errors import MTPError
from mlx_mtp.simulate import cost_model as model
from mlx_mtp.simulate.chips import CHIPS, chip
from mlx_mtp.simulate.kernels import Calibration, attention_seconds, kernel, matmul_seconds, sides
from mlx_mtp.simulate.known_models import KNOWN_MODELS, known_pair
from mlx_mtp.simulate.report import BATCHES, choices, chosen
from scripts import check_cost_model
from scripts.cost_model_fit import Step, fit_steps, share_of_peak, tile_share

# Bytes of a decoded token, counted from the tensor lists of the published checkpoints: 16-bit and 4 bits.
PER_TOKEN = {
    "E2B": (4_559_539_270, 1_282_781_526),
    "E4B": (9_288_908_884, 2_613_310_868),
    "12B": (23_814_708_320, 6_698_993_360),
    "26B-A4B": (7_645_066_812, 2_156_588_652),
    "31B": (61_394_701_432, 17_269_173_832),
}
DRAFTER_STEP = {"E2B": 23_377_928, "E4B": 24_952_840, "12B": 845_721_608, "26B-A4B": 839_428_104, "31B": 939_047_944}
KV_AT_8K = {"E2B": 132e6, "E4B": 272e6, "12B": 470e6, "26B-A4B": 377e6, "31B": 1510e6}


def _parts(traffic):
    return traffic.body, traffic.head, traffic.experts


@pytest.mark.parametrize("name", KNOWN_MODELS)
@pytest.mark.parametrize("bits", [None, 4])
def test_bytes_of_a_token_are_those_of_the_published_tensors(name: str, bits: int | None):
    target, drafter = known_pair(name)
    pair = model.pair(target, drafter, bits and Format(bits))
    read = sum(part.bytes for part in _parts(pair.traffic))
    # The published count includes the token's own row of the embedding, which a tied head has read already.
    embedding = target.text.hidden_size * (0.5625 if bits else 2)
    assert read + embedding == pytest.approx(PER_TOKEN[name][bits is not None], rel=1e-6, abs=0)
    if name == "26B-A4B" and bits == 4:
        assert read + embedding == 2_156_588_652
    assert sum(part.bytes for part in _parts(pair.drafter_traffic)) == pytest.approx(DRAFTER_STEP[name], rel=1e-3)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_parts_add_up_to_the_sizes(name: str):
    target, drafter = known_pair(name)
    check_pair(target, drafter)
    pair = model.pair(target, drafter, Format(4))
    assert sum(p.bytes for p in _parts(pair.drafter_traffic)) == pytest.approx(drafter_sizes(drafter, 2).read_per_token)
    whole = model.pair(target, drafter, None)
    assert sum(p.bytes for p in _parts(whole.traffic)) == pytest.approx(target_sizes(target.text, 2).read_per_token)
    for part in _parts(whole.traffic):
        assert part.bytes == pytest.approx(2 * part.parameters)
    assert (pair.traffic.experts.bytes > 0) == (name == "26B-A4B")
    assert kv_read_bytes(target.text, 8192, 2) == pytest.approx(KV_AT_8K[name], rel=0.002)


def test_tokens_per_round_is_bounded_and_grows():
    assert model.tokens_per_round(()) == 1
    assert model.tokens_per_round((0.0, 1.0)) == 1
    assert model.tokens_per_round((1.0,) * 5) == 6
    assert model.tokens_per_round((0.5, 0.5)) == 1.75
    lengths = [model.tokens_per_round(model.acceptance_for(drafts)) for drafts in range(9)]
    assert lengths == sorted(lengths)
    assert all(1 <= value <= drafts + 1 for drafts, value in enumerate(lengths))


def test_distinct_experts_lie_between_one_token_and_all():
    touched = [model.distinct_experts(128, 8, tokens) for tokens in range(1, 200)]
    assert touched == sorted(touched)
    assert touched[0] == pytest.approx(8)
    assert touched[3] == pytest.approx(128 * (1 - (15 / 16) ** 4))
    assert touched[-1] < 128
    for tokens in (1, 4, 32):
        half = model.distinct_experts(128, 8, tokens, 0.5)
        assert 8 <= half <= model.distinct_experts(128, 8, tokens) + 1e-9
        assert model.distinct_experts(128, 8, tokens, 1.0) == pytest.approx(8)


@pytest.mark.parametrize("name", KNOWN_MODELS)
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("where", ["M1 Pro", "M3 Ultra", "M5 Max"])
def test_more_work_never_takes_less_time(name: str, bits: int | None, where: str):
    here, pair = chip(where), model.pair(*known_pair(name), bits and Format(bits))

    def rising(values):
        assert all(later >= earlier > 0 for earlier, later in pairwise(values))

    def alike(rows: int) -> list[str]:
        """Kernels by class of matrix: where MLX takes another one, more rows can take less time."""
        return [kernel(here, rows, pair.how, side=side) for side in (2048, 4096, 5000)]

    for length in (1, 4, 8):
        for batch in range(1, 40):
            if alike(length * batch) == alike(length * batch + length):
                rising([model.verify_seconds(here, pair, rows, length, 1000) for rows in (batch, batch + 1)])
    rising([model.verify_seconds(here, pair, 2, 4, context) for context in (100, 1000, 10_000, 100_000)])
    rising([model.draft_seconds(here, pair, batch, 1000) for batch in range(1, 12)])
    rising([model.verify_seconds(here, pair, 4, 4, 1000, overlap) for overlap in (1.0, 0.5, 0.0)])


def test_a_plain_step_is_at_least_its_reading():
    for here in CHIPS.values():
        pair = model.pair(*known_pair("E2B"), Format(4))
        read = sum(part.bytes for part in _parts(pair.traffic)) / (here.bandwidth * 1e9)
        assert model.verify_seconds(here, pair, 1, 1, 0) > read


def test_newer_kernels_verify_for_less():
    before = replace(model.FITTED, wide=None)
    for how in (Format(4), Format.make("mxfp4"), None):
        pair = model.pair(*known_pair("31B"), how)
        for here in CHIPS.values():
            new, old = (model.verify_seconds(here, pair, 1, 5, 1000, fit=f) for f in (model.FITTED, before))
            everywhere = how is not None and how.mode != "affine"
            if here.generation < 3 and not everywhere:
                assert new == old
            else:  # M5's matrix units make a 16-bit tile as cheap
                assert new < old or (new == old and how is None and here.generation == 5)


V, W, M = "vector", "wide", "matrix"


@pytest.mark.parametrize("where, how, side, expected", [
    ("M1 Pro", Format(4), 5376, {1: V, 2: V, 5: V, 6: M, 32: M}),
    ("M2 Max", Format(4), 4096, {1: V, 9: V, 10: M}),
    ("M2", Format(4), 2048, {13: V, 14: M}),
    ("M1 Ultra", Format(4), 5376, {2: V, 11: V, 12: M}),
    ("M2 Ultra", Format(4), 4096, {17: V, 18: M}),
    ("M1 Pro", Format(4, 32, "mxfp4"), 5376, {1: V, 2: W, 5: W, 6: M}),
    ("M3 Max", Format(4), 5376, {1: V, 2: W, 12: W, 13: M}),
    ("M4", Format(8), 4096, {14: W, 15: M}),
    ("M3 Ultra", Format(4), 5376, {11: W, 12: M}),
    ("M5 Max", Format(4), 5376, {12: W, 13: M}),
    ("M5", Format(4), 4096, {24: W, 25: M}),
    ("M5", Format(4), 2048, {32: W, 33: M}),
    ("M2 Max", None, 5376, {1: V, 2: M, 64: M}),
    ("M4 Max", None, 5376, {1: V, 2: W, 15: W, 16: M}),
])  # fmt: skip
def test_which_kernel_multiplies_how_many_rows(where: str, how: Format | None, side: int, expected: dict[int, str]):
    assert {rows: kernel(chip(where), rows, how, side=side) for rows in expected} == expected


@pytest.mark.parametrize("where, how, steps", [
    # In units of one row's time, by rows. The wide kernel is bound by reading here: passes over 5 rows.
    ("M3 Ultra", None, {2: 1, 5: 1, 6: 2, 10: 2, 11: 3, 15: 3}),
    # Bound by arithmetic beyond some rows: what counts is rows in a pass, times passes.
    ("M4 Pro", Format(4), {2: 1, 5: 1.394, 6: 2, 8: 2.231, 10: 2.789, 11: 3.346}),
    # A pass a row, each bound by arithmetic, then a tile that costs the same up to 32 rows and twice as much for 33.
    ("M2 Pro", Format(4), {2: 2, 5: 5, 6: 2.26, 32: 2.26, 33: 4.53}),
])  # fmt: skip
def test_what_a_product_of_several_rows_costs(where: str, how: Format | None, steps: dict[int, float]):
    here, weight = chip(where), ReadPerStep(0.5625e9 if how else 2e9, 1e9)
    one = matmul_seconds(here, weight, 1, how, model.FITTED)
    costs = {rows: matmul_seconds(here, weight, rows, how, model.FITTED) / one for rows in steps}
    assert costs == pytest.approx(steps, rel=0.01)


def test_attention_costs_where_no_fused_kernel_takes_it():
    """Blocks of E2B (8 query heads a KV head) of up to 4 tokens are fused in sliding layers, of E4B (4) up to 8."""

    def tiles(name: str, length: int, ours: bool = True) -> float:
        # In tiles of 64 rows over a context of 1 in a head of 1: all that isn't counted so is divided out.
        here, config = chip("M2 Max"), known_pair(name)[0].text
        unit = 64 * 2 / (model.FITTED.matrix * here.fp16_tflops * 1e12)
        return attention_seconds(here, config, 1, length, 400, model.FITTED, ours) / unit / 400

    full = {name: 2 * 512 * (35 // 5 if name == "E2B" else 42 // 6) for name in ("E2B", "E4B")}
    for name, fused in (("E2B", 4), ("E4B", 8)):
        kv_heads = 1 if name == "E2B" else 2
        assert tiles(name, 1) == 0
        assert tiles(name, 2) == tiles(name, fused) == pytest.approx(kv_heads * full[name])
        assert tiles(name, fused + 1) > 2 * tiles(name, fused)
        # Other engines fill a tile for every query head.
        assert tiles(name, 4, ours=False) == pytest.approx(8 * full[name])


def test_stacked_matrices_are_in_a_larger_class():
    """gate and up of 26B-A4B are 2,112 wide each: apart they are multiplied row by row for longer than together."""
    text = known_pair("26B-A4B")[0].text
    ours, theirs = sides(text), sides(text, stacked=False)
    assert sum(ours.values()) == pytest.approx(1) == sum(theirs.values())
    assert ours[4096] < 0.3 and theirs[4096] > 0.8
    assert set(sides(known_pair("31B")[0].text)) == {4097}


def test_chips_are_found_however_they_are_spelt():
    assert chip("m3-ultra") is chip("Apple M3 Ultra") is CHIPS["M3 Ultra"]
    assert all(c.name == name and name.startswith(f"M{c.generation}") for name, c in CHIPS.items())
    assert CHIPS["M3 Max"].fp32_tflops == pytest.approx(14.3, abs=0.1)
    assert CHIPS["M5 Max"].fp16_tflops == pytest.approx(4 * CHIPS["M5 Max"].fp32_tflops)


@pytest.mark.parametrize("name", ["M9", "", "RTX 4090"])
def test_an_unknown_chip_lists_the_known_ones(name: str):
    with pytest.raises(MTPError) as raised:
        chip(name)
    assert all(known in str(raised.value) for known in CHIPS)


def test_unknown_models_are_refused():
    with pytest.raises(MTPError, match="26B-A4B"):
        known_pair("27B")


def _steps(truth: model.Calibration, names=("E2B", "26B-A4B", "31B"), batches=(1, 4)) -> list[Step]:
    here, truth = chip("M3 Max"), replace(truth, wide=None)
    pairs = [model.pair(*known_pair(name), Format(4)) for name in names]
    return [
        Step(here, pair, batch, 1, 500, model.verify_seconds(here, pair, batch, 1, 500, fit=truth))
        for pair in pairs
        for batch in batches
    ]


def test_the_fit_finds_the_parameters_that_made_its_data():
    truth = Calibration(bandwidth=0.83, vector=0.11, vector_early=0.05, wide=0.3, matrix=0.4, launch=7e-6)
    start = replace(truth, bandwidth=0.5, vector=0.5, launch=1e-6)
    found = fit_steps(_steps(truth), start)
    assert found.bandwidth == pytest.approx(truth.bandwidth)
    assert found.vector == pytest.approx(truth.vector)
    assert found.launch == pytest.approx(truth.launch)
    assert (found.vector_early, found.wide, found.matrix) == (truth.vector_early, truth.wide, truth.matrix)
    noisy = [replace(s, seconds=s.seconds * (1.02 if i % 2 else 0.98)) for i, s in enumerate(_steps(truth))]
    assert fit_steps(noisy, start).bandwidth == pytest.approx(truth.bandwidth, rel=0.1)


@pytest.mark.parametrize("batches, names", [((1,), ("E2B", "26B-A4B", "31B")), ((1, 4), ("E2B",)), ((), ("E2B",))])
def test_a_fit_without_enough_to_go_on_is_refused(batches, names):
    with pytest.raises(MTPError, match="can't tell"):
        fit_steps(_steps(model.FITTED, names, batches), model.FITTED)


def test_shares_of_peak_reproduce_the_times_they_came_from():
    here, weight = chip("M4 Pro"), ReadPerStep(0.5625e9, 1e9)
    wide = share_of_peak(here.fp32_tflops, model.FITTED.bandwidth * here.bandwidth, 4.5, 8, 2.5)
    fit = replace(model.FITTED, wide=wide)
    one = matmul_seconds(here, weight, 1, Format(4), fit)
    assert matmul_seconds(here, weight, 8, Format(4), fit) == pytest.approx(2.5 * one)
    weight = ReadPerStep(2e9, 1e9)
    tile = tile_share(here.fp16_tflops, model.FITTED.bandwidth * here.bandwidth, 16, 2.0)
    fit = replace(model.FITTED, matrix=tile, wide=None)
    one = matmul_seconds(here, weight, 1, None, fit)
    for rows in (2, 64):
        assert matmul_seconds(here, weight, rows, None, fit) == pytest.approx(2 * one)


def test_the_parameters_in_use_are_those_that_the_published_rows_give():
    assert asdict(check_cost_model.fit()) == pytest.approx(asdict(model.FITTED), rel=0.03)
    fitted = [row for row in check_cost_model.rows(model.FITTED) if row.use == "fit"]
    assert len(fitted) == 16 and all(abs(row.error) < 0.1 for row in fitted)


def test_the_page_and_the_readme_show_what_the_script_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["check_cost_model.py"])
    check_cost_model.main()
    printed = capsys.readouterr().out
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs/cost_model.md").read_text("utf-8")
    tables = [line for line in printed.splitlines() if line.startswith(("| fit", "| check", "| other", "| M", "- "))]
    assert len(tables) > 50 and all(line in page for line in tables)
    count, middle, worst = re.search(r"check: (\d+) rows, median error (\d+)%, largest (\d+)%", printed).groups()
    readme = " ".join((root / "README.md").read_text("utf-8").split())
    assert f"a median error of {middle} % and a largest one of {worst} % against {count} published" in readme


def test_drafting_is_never_chosen_where_it_loses():
    pair = model.pair(*known_pair("26B-A4B"), Format(4))
    for here in CHIPS.values():
        for choice in choices(here, pair, 1000, acceptance=(0.05,)):
            assert (choice.drafts, choice.best) == (0, choice.plain)
        for choice in choices(here, pair, 1000):
            assert choice.best >= choice.plain


def test_a_row_keeps_its_share_in_the_balanced_choice():
    here, pair = chip("M4 Max"), model.pair(*known_pair("26B-A4B"), Format(4))
    alone = model.tokens_per_second(here, pair, 1, (), 1000)
    best = chosen(choices(here, pair, 1000), alone, "balanced")
    assert best.best / best.batch >= 0.5 * alone
    assert best.best > alone


def test_the_table_says_that_it_is_a_prediction_and_leaves_out_what_does_not_fit():
    def simulated(name: str, size: str, bits: int = 4, context: int = 1000) -> str:
        pair = model.pair(*known_pair(size), Format(bits))
        return plain(simulation(chip(name), size, pair, context, BATCHES))

    text = simulated("M4 Max", "26B-A4B")
    assert text.startswith("PREDICTION, not a measurement") and "experts" in text and "Balanced" in text
    assert "experts" not in simulated("M4 Max", "31B")
    assert "doesn't fit" in simulated("M1", "31B")
    here, pair = chip("M4"), model.pair(*known_pair("12B"), Format(8))
    assert [c.batch for c in choices(here, pair, 100_000)] == [1, 2, 4]
    assert not model.fits(here, pair, 6, 100_000)
    assert "Left out: batch 6, 8, which 32 GB" in simulated("M4", "12B", 8, 100_000)
