"""Fits the free parameters of the cost model to step times, by least squares on the relative error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from mlx_mtp.errors import MTPError
from mlx_mtp.simulate.chips import Chip
from mlx_mtp.simulate.cost_model import Pair, verify_seconds
from mlx_mtp.simulate.kernels import TILE_ROWS, Calibration


@dataclass(frozen=True)
class Step:
    """A measured step of a quantised target that runs on the vector kernel, on M3 or later.

    Attributes:
        chip: The chip.
        pair: The models.
        batch: Rows.
        length: Tokens of each row.
        context: Committed tokens of each row.
        seconds: The measured time.
        overlap: See `cost_model.distinct_experts`.
    """

    chip: Chip
    pair: Pair
    batch: int
    length: int
    context: int
    seconds: float
    overlap: float = 0.0


def fit_steps(steps: Sequence[Step], start: Calibration) -> Calibration:
    """Fits the parameters bandwidth, vector and launch.

    If reading takes longer than a row's arithmetic, the time of a step is linear in launch and in the reciprocals of
    the two shares. So there is a unique solution, which needs no search.

    Args:
        steps: Measured steps.
        start: The other parameters.

    Returns:
        `start` with the fitted parameters.

    Raises:
        MTPError: The steps can't tell the parameters apart, or contradict the model (a negative cost).
    """
    # A column is the time with the other parameters at no cost; for arithmetic, the time that it adds to reading.
    reading = Calibration(bandwidth=1, vector=inf, vector_early=inf, wide=None, matrix=inf, launch=0)
    launching = replace(reading, bandwidth=inf, launch=1)

    def seconds(step: Step, fit: Calibration) -> float:
        return verify_seconds(step.chip, step.pair, step.batch, step.length, step.context, step.overlap, fit)

    rows = np.array([
        [
            seconds(s, reading) / s.seconds,
            (seconds(s, replace(reading, vector=1)) - seconds(s, reading)) / s.seconds,
            seconds(s, launching) / s.seconds,
        ]
        for s in steps
    ])  # fmt: skip
    scale = np.abs(rows).max(axis=0, initial=0)
    if len(steps) < 3 or not scale.all():
        raise MTPError("the steps can't tell the parameters apart: give plain and wide steps of several models")
    solution, _, rank, _ = np.linalg.lstsq(rows / scale, np.ones(len(steps)), rcond=1e-9)
    if rank < 3 or min(solution) <= 0:
        raise MTPError("the steps can't tell the parameters apart: give plain and wide steps of several models")
    read, arithmetic, launch = solution / scale
    return replace(start, bandwidth=1 / float(read), vector=1 / float(arithmetic), launch=float(launch))


def share_of_peak(tflops: float, bandwidth: float, bits_per_weight: float, rows: int, relative: float) -> float:
    """Share of the arithmetic peak that a kernel reaches, from its time relative to that of one row.

    Args:
        tflops: The peak.
        bandwidth: Bandwidth in GB/s at which the product of a single row reads the weight.
        bits_per_weight: Bits as stored, scales included.
        rows: Rows that the kernel computes; `TILE_ROWS` for a tile.
        relative: Its time in units of the single row's. It must be so large that arithmetic limits the kernel.
    """
    one_row = bits_per_weight / 8 / (bandwidth * 1e9)
    return rows * 2 / (relative * one_row * tflops * 1e12)


def tile_share(tflops: float, bandwidth: float, bits_per_weight: float, relative: float) -> float:
    """`share_of_peak` for a tile of a matrix kernel, whose time doesn't depend on the rows in it."""
    return share_of_peak(tflops, bandwidth, bits_per_weight, TILE_ROWS, relative)
