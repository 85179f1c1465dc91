"""Compares the cost model with published measurements of other machines; prints a Markdown table.

    python scripts/check_cost_model.py                  # fit, table, summary
    python scripts/check_cost_model.py --plots docs     # and the plots of docs/cost_model.md (pip install '.[plot]')

This project measured none of these figures. Rows marked "fit" determine the free parameters, rows marked "check" test
the predictions, and rows marked "other" don't count: they are from another engine, or depend on a guess. The texts and
acceptance of most figures are unknown; PUBLISHED_ACCEPTANCE is assumed for all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, median

from mlx_mtp.checkpoint.quantization import Format
from mlx_mtp.checkpoint.sizes import ReadPerStep
from mlx_mtp.simulate import cost_model as model
from mlx_mtp.simulate.chips import Chip, chip
from mlx_mtp.simulate.kernels import matmul_seconds
from mlx_mtp.simulate.known_models import known_pair
from mlx_mtp.simulate.report import choices
from scripts.cost_model_fit import Step, fit_steps, share_of_peak, tile_share

CONTEXT = 500
"""Context in tokens for sources that don't state it."""

MLX_VLM = "mlx-vlm #1166"
PLAIN_1166 = {"26B-A4B": (84.7, 212.2), "31B": (24.9, 44.8), "E4B": (94.7, 225.6), "E2B": (135.6, 378.1)}
"""Tokens per second at batch 1 and 4, all with 5 bits. The chip isn't stated; an M3 Ultra is assumed. 31B with 5 bits
reads 525 GB/s, which otherwise only an M2 Ultra could do: an M1 Ultra is known to be slower (mlxcel #216)."""

DRAFTED_1166 = {"26B-A4B": (112.3, 193.8), "31B": (33.8, 61.6), "E4B": (121.5, 257.4), "E2B": (171.3, 383.5)}
"""The same with 2 drafts in a round."""

KERNEL_BANDWIDTH = 0.9
"""Share of the nominal bandwidth that a large product reaches when kernels are timed alone: between the values of an
M3 Ultra (0.80, mlx #4265, 16-bit) and an M3 Max (0.97, mlx #3863)."""

MULTI_ROW = {2: 1.74, 4: 3.12, 5: 3.82, 9: 6.13}
"""Time of a verify pass by block width, in plain steps: 26B-A4B with 4 bits on an M2 Pro; source: Rapid-MLX."""

WIDE_KERNEL = (("M4 Pro", 4.25, 8, 2.84), ("M4 Pro", 4.5, 8, 2.69), ("M4 Pro", 4.5, 8, 2.46), ("M5 Max", 4.5, 8, 2.20))
"""Chip, bits with scales, rows, time in units of one row: mlx #3852, #3839 (two shapes), #3791 (a whole 70B model)."""

CONTRADICTORY = "E4B, bf16, M3 Max"
"""Four figures that contradict each other: a step of 4 rows takes 101 ms and one of 8 rows 74 ms; a round that verifies
16 tokens in 4 rows takes 201 ms, and one that verifies 16 tokens in 8 rows 133 ms."""

UNUSED = (
    ("31B, vLLM on an H100", "not a Metal GPU; the kernels are others"),
    ("12B, mlxcel on an M5 Max, code and enumeration", "their acceptance isn't stated, and is far from chat's"),
    ("31B, mlxcel, speed-ups by block size", "tokens a round over the cost of a round, and that cost is checked"),
)


@dataclass(frozen=True)
class Row:
    """A published figure and its prediction."""

    use: str
    what: str
    source: str
    unit: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.published - 1


def fit() -> model.Calibration:
    """Fits the free parameters to the rows marked "fit"."""
    ultra = chip("M3 Ultra")
    steps = [
        Step(ultra, _pair(name, 5), batch, 1, CONTEXT, batch / speed, _copies(batch, 1))
        for name, speeds in PLAIN_1166.items()
        for batch, speed in zip((1, 4), speeds, strict=True)
    ]
    wide = mean(
        share_of_peak(c.fp32_tflops, KERNEL_BANDWIDTH * c.bandwidth, bits, rows, relative)
        for c, bits, rows, relative in ((chip(name), *rest) for name, *rest in WIDE_KERNEL)
    )
    # A 16-bit product of 2 to 8 rows takes as long as two of a single row (mlx #4265).
    tile = tile_share(ultra.fp16_tflops, KERNEL_BANDWIDTH * ultra.bandwidth, 16, 2.0)
    found = replace(fit_steps(steps, model.FITTED), wide=wide, matrix=tile)
    # There is no closed form: search in steps of a hundredth of the other chips' value.
    early = [replace(found, vector_early=found.vector * i / 100) for i in range(10, 101)]
    return min(early, key=lambda c: sum((cost / MULTI_ROW[width] - 1) ** 2 for width, cost in _widths(c).items()))


def _widths(calibration: model.Calibration) -> dict[int, float]:
    """The model's predictions for `MULTI_ROW`."""
    where, pair, old = chip("M2 Pro"), _pair("26B-A4B", 4), replace(calibration, wide=None)
    step, *wide = (
        model.verify_seconds(where, pair, 1, width, CONTEXT, fit=old, ours=False) for width in (1, *MULTI_ROW)
    )
    return {width: seconds / step for width, seconds in zip(MULTI_ROW, wide, strict=True)}


def host_gap(calibration: model.Calibration) -> float:
    """Seconds that the GPU waits for mlx-vlm's host after each read of a round, fitted to four drafted rows at batch 1.

    mlx-vlm reads every draft, the accepted tokens and the next hidden state, and builds the next graph only after each
    read. Least squares on the relative error.
    """
    old = replace(calibration, wide=None)
    accepted = model.acceptance_for(2)
    above = below = 0.0
    for name, (alone, _) in DRAFTED_1166.items():
        published = model.tokens_per_round(accepted) / alone
        base = model.round_seconds(chip("M3 Ultra"), _pair(name, 5), 1, 2, CONTEXT, fit=old, ours=False)
        above += _reads(2) / published * (1 - base / published)
        below += (_reads(2) / published) ** 2
    return above / below


def _reads(drafts: int) -> int:
    """Number of reads from the GPU in a round of mlx-vlm with drafts."""
    return drafts + 2


def rows(calibration: model.Calibration) -> Iterable[Row]:  # noqa: C901 - a table, source by source
    """Every usable published figure."""
    old, gap = replace(calibration, wide=None), host_gap(calibration)
    ultra = chip("M3 Ultra")

    def speed(
        where: Chip,
        pair: model.Pair,
        batch: int,
        accepted: Sequence[float],
        with_: model.Calibration,
        overlap: float = 0.0,
    ) -> float:
        return model.tokens_per_second(where, pair, batch, accepted, CONTEXT, overlap, with_, ours=False)

    def mlx_vlm(where: Chip, pair: model.Pair, batch: int, accepted: Sequence[float], overlap: float = 0.0) -> float:
        plain = speed(where, pair, batch, accepted, old, overlap)
        yielded = batch * model.tokens_per_round(accepted)
        return yielded / (yielded / plain + gap * _reads(len(accepted))) if accepted else plain

    for name, plain in PLAIN_1166.items():
        pair = _pair(name, 5)
        for batch, published, drafted in zip((1, 4), plain, DRAFTED_1166[name], strict=True):
            what = f"{name}, 5 bits, M3 Ultra (assumed), B={batch}"
            for use, figure, drafts in (("fit", published, 0), ("fit" if batch == 1 else "check", drafted, 2)):
                accepted, overlap = model.acceptance_for(drafts), _copies(batch, drafts + 1)
                predicted = mlx_vlm(ultra, pair, batch, accepted, overlap)
                yield Row(use, what + f", K={drafts}" * (drafts > 0), MLX_VLM, "tok/s", figure, predicted)

    moe = _pair("26B-A4B", 4)
    for batch, published in ((1, 93.0), (2, 139.0), (4, 201.0), (8, 275.0)):
        what = f"26B-A4B, 4 bits, M3 Ultra, B={batch}"
        yield Row("check", what, "vllm-mlx #256", "tok/s", published, speed(ultra, moe, batch, (), old))
    for width, cost in _widths(calibration).items():
        what = f"26B-A4B, 4 bits, M2 Pro, width {width}"
        yield Row("fit", what, "Rapid-MLX", "plain steps", MULTI_ROW[width], cost)
    m1 = chip("M1 Pro")
    for context, plain_speed, drafted in ((4096, 28.5, 26.4), (16384, 27.4, 21.7)):
        for accepted, published in (((), plain_speed), (model.acceptance_for(3), drafted)):
            predicted = model.tokens_per_second(m1, moe, 1, accepted, context, fit=calibration, ours=False)
            what = f"26B-A4B, 4 bits, M1 Pro, context {context}, " + ("K=3 (assumed)" if accepted else "K=0")
            yield Row("check", what, "omlx #2748", "tok/s", published, predicted)

    m3, m5 = chip("M3 Max"), chip("M5 Max")
    # Plain speeds follow from the stated gains, of which two are doubtful (3.94x and 2.29x).
    for name, batch, drafts, published in (
        ("26B-A4B", 4, 2, 85.5), ("26B-A4B", 8, 0, 106.5), ("26B-A4B", 8, 2, 165.1),
        ("31B", 4, 2, 17.1), ("31B", 8, 0, 15.2), ("31B", 8, 1, 21.4),
        ("E4B", 4, 0, 39.8), ("E4B", 4, 3, 62.1), ("E4B", 8, 0, 108.3), ("E4B", 8, 1, 115.9),
    ):  # fmt: skip
        accepted, overlap = model.acceptance_for(drafts), _copies(batch, drafts + 1)
        predicted = mlx_vlm(m3, _pair(name, None), batch, accepted, overlap)
        what = f"{name}, bf16, M3 Max, B={batch}, K={drafts}"
        yield Row("check", what, "mlx-vlm drafter's README", "tok/s", published, predicted)
    for drafts, published in ((0, 93.0), (3, 68.0)):
        predicted = mlx_vlm(m5, _pair("26B-A4B", None), 4, _clamped(drafts, 4))
        what = "26B-A4B, bf16, M5 Max, B=4, " + ("K=3 (assumed)" if drafts else "K=0")
        yield Row("check", what, "mlx-vlm #1144", "tok/s", published, predicted)

    dense = _pair("31B", 4)
    step = model.verify_seconds(ultra, dense, 1, 1, CONTEXT, fit=calibration)
    for block in (2, 4, 8):
        # The source fits its measurements by 0.83 + 0.170 x block.
        cost = model.round_seconds(ultra, dense, 1, block - 1, CONTEXT, fit=calibration, ours=False) / step
        what = f"31B, 4 bits, M3 Ultra, a round of block {block}"
        yield Row("check", what, "mlxcel #1217", "plain steps", 0.83 + 0.170 * block, cost)
    m1 = chip("M1 Ultra")
    plain_speed = speed(m1, dense, 1, (), calibration)
    yield Row("check", "31B, 4 bits, M1 Ultra, B=1", "mlxcel #216", "tok/s", 18.2, plain_speed)
    cost = 1000 * model.round_seconds(m1, dense, 1, 3, CONTEXT, fit=calibration, ours=False)
    yield Row("check", "31B, 4 bits, M1 Ultra, a round of block 4", "mlxcel #1621", "ms", 5936.1 / 34, cost)

    weight = ReadPerStep(0.5625e9, 1e9)
    for where, kernels, source, figures in (
        (chip("M4 Pro"), calibration, "mlx #3852", ((2, 0.99), (3, 1.13), (4, 1.43), (32, 4.5))),
        (ultra, old, "mlx #4265", ((2, 1.83), (4, 3.26), (8, 6.12))),
        (m3, calibration, "mlx #3863", ((2, 1.00), (4, 1.28), (8, 2.50))),
    ):
        alone = replace(kernels, bandwidth=KERNEL_BANDWIDTH)
        for width, published in figures:
            one, cost = (matmul_seconds(where, weight, n, Format(4), alone) for n in (1, width))
            what = f"a 4-bit product, {where.name}, {width} rows"
            yield Row("check", what, source, "single rows", published, cost / one)

    m4 = chip("M4 Pro")
    for name, *figures in (("E2B", 84.0, 144.0), ("E4B", 44.6, 82.8)):
        for drafts, published in zip((0, 3), figures, strict=True):
            predicted = speed(m4, _pair(name, 4), 1, model.acceptance_for(drafts), calibration)
            what = f"{name}, int4, M4 Pro, B=1, " + ("K=3 (assumed)" if drafts else "K=0")
            yield Row("other", what, "LiteRT-LM, not MLX", "tok/s", published, predicted)
    dense, m5 = _pair("12B", 4), chip("M5 Max")
    gain = speed(m5, dense, 1, model.acceptance_for(3), calibration) / speed(m5, dense, 1, (), calibration)
    yield Row("other", "12B, 4 bits, M5 Max, prose, K=3 (assumed)", "mlxcel", "times plain", 1.90, gain)


def moe_by_batch() -> Iterable[str]:
    """Lines of a table: seconds of a round of 26B-A4B, and the gain from drafting, by batch."""
    batches = (1, 2, 4, 8)
    yield "| chip, weights | " + " | ".join(f"B={batch}" for batch in batches) + " |"
    yield "|---|" + "---|" * len(batches)
    cases = [("M1 Pro", 4)] + [
        (name, bits) for name in ("M2 Max", "M3 Ultra", "M4 Max", "M5 Max") for bits in (4, None)
    ]
    for name, bits in cases:
        pair = _pair("26B-A4B", bits, bits)
        chat = choices(chip(name), pair, 1000, batches=batches)
        code = choices(chip(name), pair, 1000, acceptance=(0.66,), batches=batches)
        cells = []
        for batch, most, less in zip(batches, chat, code, strict=True):
            step, cost = (model.round_seconds(chip(name), pair, batch, drafts, 1000) for drafts in (0, 3))
            cells.append(f"{cost / step:.2f}; {most.best / most.plain:.2f}x, {less.best / less.plain:.2f}x")
        yield f"| {name}, {f'{bits} bits' if bits else 'bf16'} | " + " | ".join(cells) + " |"


@cache
def _pair(name: str, bits: int | None, drafter_bits: int | None = None) -> model.Pair:
    """A size with its drafter, which is assumed to have 16 bits, as published."""
    return model.pair(*known_pair(name), *(Format(it) if it else None for it in (bits, drafter_bits)))


def _copies(batch: int, length: int) -> float:
    """The `overlap` of a batch whose rows hold the same text, and so are routed to the same experts.

    mlx-vlm's figures are from one prompt at temperature 0, sent once for each row.
    """
    own, all_ = (model.distinct_experts(128, 8, tokens) for tokens in (length, batch * length))
    return (all_ - own) / (all_ - 8) if all_ > 8 else 0.0


def _clamped(drafts: int, batch: int) -> tuple[float, ...]:
    # In a batch that accepts as much as its worst row, a draft is accepted if all rows accept it.
    return tuple(chance**batch for chance in model.acceptance_for(drafts))


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--plots", type=Path, metavar="FOLDER", help="write the plots there")
    folder = arguments.parse_args().plots
    calibration = fit()
    print(f"Fitted: {calibration}\nIn use: {model.FITTED}")
    print(f"mlx-vlm's host: {1000 * host_gap(model.FITTED):.2f} ms a read\n")
    table = list(rows(model.FITTED))
    print("| | figure | source | published | predicted | error |\n|---|---|---|---|---|---|")
    for row in sorted(table, key=lambda row: ("fit", "check", "other").index(row.use)):
        figures = f"{row.published:.4g} {row.unit} | {row.predicted:.4g} | {row.error:+.0%}"
        print(f"| {row.use} | {row.what} | {row.source} | {figures} |")
    print()
    kept = [row for row in table if row.use == "check" and not row.what.startswith(CONTRADICTORY)]
    for what, chosen in (
        ("fit", [row for row in table if row.use == "fit"]),
        ("check", [row for row in table if row.use == "check"]),
        (f"check without {CONTRADICTORY}", kept),
    ):
        errors = [abs(row.error) for row in chosen]
        print(f"{what}: {len(errors)} rows, median error {median(errors):.0%}, largest {max(errors):.0%}")
    print("\nNot used:")
    for what, why in UNUSED:
        print(f"- {what}: {why}")
    print("\n26B-A4B: a round of 3 drafts in plain steps; best gain with chat's acceptance, with 0.66 throughout\n")
    print("\n".join(moe_by_batch()))
    if folder:
        from scripts.plot_cost_model import write_plots

        write_plots(folder)


if __name__ == "__main__":
    main()
