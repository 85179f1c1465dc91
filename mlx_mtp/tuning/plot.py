"""The plot of `mlx-mtp tune`: tokens per second of all rows, and of each row, by batch size.

Needs matplotlib, from the extra `plot`. Doesn't import MLX, because the command line checks the plot's file before it
loads a faster BLAS, which must happen before MLX is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MTPError
from ..files import replacing

if TYPE_CHECKING:
    from .choose import Option

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Checks that a plot can be written, before anything is measured for it.

    Raises:
        MTPError: matplotlib is missing, the file's suffix is unknown, or its folder doesn't exist.
    """
    if find_spec("matplotlib") is None:
        raise MTPError("a plot needs matplotlib: pip install 'mlx-mtp[plot]'")
    if path.suffix.lower() not in SUFFIXES:
        raise MTPError(f"a plot's file ends in {', '.join(SUFFIXES)}, and {path} doesn't")
    if not path.parent.is_dir() or path.is_dir():
        raise MTPError(f"{path} can't be written: give a file in a folder that exists")


def write_plot(options: Sequence[Option], path: Path, title: str) -> None:
    """Plots plain decoding and every draft length that is the best one of a batch.

    Args:
        options: At least one.
        path: The file, see `check_plot`.
        title: The title of the figure.

    Raises:
        OSError: The file can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = sorted({option.rows for option in options})
    best = {max((x for x in options if x.rows == rows), key=lambda x: x.total_tps).drafts for rows in batches}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for drafts in sorted({0, *best}):
        own = sorted((x for x in options if x.drafts == drafts), key=lambda x: x.rows)
        label = f"{drafts} drafts" if drafts else "plain"
        axes[0].plot([x.rows for x in own], [x.total_tps for x in own], "o-", label=label)
        axes[1].plot([x.rows for x in own], [x.row_tps for x in own], "o-", label=label)
    for axis, name in zip(axes, ("all rows", "each row"), strict=True):
        axis.set(xlabel="batch", ylabel="tokens per second", title=name, xticks=batches)
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with replacing(path, path.suffix) as aside:
        figure.savefig(aside, dpi=120)
    plt.close(figure)
