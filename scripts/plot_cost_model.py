"""The plots of docs/cost_model.md, all of them predictions; `scripts/check_cost_model.py --plots docs` writes them."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mlx_mtp.checkpoint.quantization import Format
from mlx_mtp.simulate import cost_model as model
from mlx_mtp.simulate.chips import chip
from mlx_mtp.simulate.known_models import known_pair
from mlx_mtp.simulate.report import choices

MODEL, CHIP, CONTEXT = "26B-A4B", "M4 Max", 1000
BATCHES = tuple(range(1, 13))
COLOURS = ("tab:blue", "tab:orange")


def write_plots(folder: Path) -> None:
    """Writes batch.png and experts.png.

    Args:
        folder: Folder of the plots; created if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _batch(folder / "cost_model_batch.png")
    _experts(folder / "cost_model_experts.png")


def _batch(path: Path) -> None:
    figure, (total, row) = plt.subplots(1, 2, figsize=(10, 4))
    for colour, bits in zip(COLOURS, (4, None), strict=True):
        how = Format(bits) if bits else None
        found = choices(chip(CHIP), model.pair(*known_pair(MODEL), how, how), CONTEXT, batches=BATCHES)
        name = f"{bits} bits" if bits else "bf16"
        batches = [c.batch for c in found]
        for axes, share in ((total, lambda c: 1), (row, lambda c: c.batch)):
            axes.plot(
                batches, [c.best / share(c) for c in found], "o-", color=colour, label=f"{name}, best draft length"
            )
            axes.plot(batches, [c.plain / share(c) for c in found], ".--", color=colour, label=f"{name}, no drafts")
        for c in found:
            total.annotate(
                str(c.drafts), (c.batch, c.best), (0, 5), textcoords="offset points", ha="center", fontsize=7
            )
    total.set(xlabel="batch", ylabel="tok/s, all rows (number: drafts a round)", ylim=(0, None))
    row.set(xlabel="batch", ylabel="tok/s of one row", ylim=(0, None))
    for axes in (total, row):
        axes.axvspan(4, 8, color="grey", alpha=0.12)
        axes.grid(alpha=0.3)
    row.legend(fontsize=8)
    figure.suptitle(f"Predicted, not measured: Gemma 4 {MODEL} on {CHIP}, {CONTEXT} tokens of context", fontsize=10)
    _save(figure, path)


def _experts(path: Path) -> None:
    text = known_pair(MODEL)[0].text
    figure, (count, growth) = plt.subplots(1, 2, figsize=(10, 4))
    tokens = range(1, 49)
    for overlap in (0.0, 0.3, 0.6):
        touched = [model.distinct_experts(text.num_experts, text.experts_per_token, n, overlap) for n in tokens]
        count.plot(tokens, touched, label=f"overlap {overlap:g}")
        ratios = [touched[4 * batch - 1] / touched[batch - 1] for batch in BATCHES]
        growth.plot(BATCHES, ratios, "o-", label=f"overlap {overlap:g}")
    count.axhline(text.num_experts, color="grey", linestyle=":")
    count.set(xlabel="tokens in the pass (batch x length)", ylabel="distinct experts of a layer", ylim=(0, None))
    growth.set(xlabel="batch", ylabel="experts of a block of 4 / of a plain step", ylim=(0.9, None))
    for axes in (count, growth):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        f"Experts touched by Gemma 4 {MODEL} (8 of 128 a token): E(1-(1-k/E)^n), and with overlap", fontsize=10
    )
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
