"""The self-test: checks that MLX's kernels for a pair compute correctly on this machine.

A kernel can fail on a single chip and version of macOS, if it needs more threads than allowed there, or because of a
compiler bug. MLX then raises an error or returns garbage. So before a pair is used on Metal, each kernel that MLX may
choose for it is run once and compared with a plain formula: attention by heads, tokens and slots; products with
quantised weights by their sizes and number of rows; gathered products (experts, clustered heads). The checks themselves
are in kernel_checks.py.

A shape whose kernel is wrong is added to `models.avoided.AVOIDED`, and is computed in another way from then on. Results
hold for the whole process, so another model of the same shapes needs no test. The environment variable
MLX_MTP_SELF_TEST turns the test off ("0") or on for any backend ("1"); by default it runs on Metal.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from ..errors import one_line
from ..system.fusing import on_gpu
from .avoided import AVOIDED, Shape, apply_avoided
from .drafter import Drafter
from .kernel_checks import Check, checks_of, numbers
from .target import Target

log = logging.getLogger(__name__)

SWITCH = "MLX_MTP_SELF_TEST"
"""Environment variable: "0" for no self-test, "1" for a self-test on any backend."""

ROUNDINGS = 8
"""Largest allowed difference from the formula, in roundings (`finfo.eps`) of a result of typical size. Two or three are
normal: half a rounding of the result, which may be four times the typical size, and the roundings of scores, softmax
and weights. Attention that misses one slot in fifty is off by ten or more."""

COARSEST_FLOAT32 = 2**-10
"""Rounding assumed for float32: new chips may compute its products in TF32."""

_REPORTED = 10
"""Most findings to log one by one: if everything is wrong, the rest adds nothing."""

_FAILURES = (RuntimeError, ValueError, MemoryError)
"""The exceptions of MLX when a kernel can't be built or run."""


@dataclass(frozen=True)
class Finding:
    """The self-test's result for one shape.

    Attributes:
        shape: The shape; `str` describes it.
        share: Difference from the formula, as a share of the largest that rounding explains; infinite without results.
        wrong: What is wrong with MLX's kernel; None if the share is at most 1.
        avoided: Whether the shape is now computed in another way; False if that is wrong, too.
    """

    shape: Shape
    share: float
    wrong: str | None
    avoided: bool


_known: dict[Shape, Finding] = {}


def at_load(target: Target, drafter: Drafter | None) -> None:
    """Runs `self_test` on a pair that was just loaded: on Metal, unless the environment variable SWITCH says otherwise.

    A test that can't be run is logged as a warning.

    Args:
        target: The target.
        drafter: Its drafter, or None.
    """
    switch = os.environ.get(SWITCH)
    if switch == "0" or (switch != "1" and not (on_gpu() and mx.metal.is_available())):
        return
    try:
        self_test(target, drafter)
    except _FAILURES as error:
        log.warning("the self-test of MLX's kernels can't be done here: %s", one_line(error))


def self_test(target: Target, drafter: Drafter | None) -> list[Finding]:
    """Checks the kernels that a pair uses, on any backend, and makes the models avoid those that are wrong.

    Kernels that are found wrong for the first time in this process are logged as warnings.

    Args:
        target: The target.
        drafter: Its drafter, or None.

    Returns:
        A finding for each of the pair's shapes.

    Raises:
        RuntimeError: The expected results can't be computed.
        ValueError: The same.
        MemoryError: The same.
    """
    found: dict[Shape, Finding] = {}
    new: list[Finding] = []
    try:
        for group in checks_of(target, drafter):
            unknown = [check for check in group if check.shape not in _known]
            for check, (share, wrong) in zip(unknown, _judge(unknown), strict=True):
                avoided = wrong is not None and _avoid(check, target, drafter)
                _known[check.shape] = Finding(check.shape, share, wrong, avoided)
                new.append(_known[check.shape])
            found |= {check.shape: _known[check.shape] for check in group}
    finally:
        apply_avoided(target, drafter)  # for shapes found wrong with an earlier pair, too
        mx.clear_cache()
        _report([finding for finding in new if finding.wrong])
    return list(found.values())


def _avoid(check: Check, target: Target, drafter: Drafter | None) -> bool:
    """Avoids a shape's kernel; returns False, and changes nothing, if the replacement is wrong as well."""
    AVOIDED.add(check.shape)
    apply_avoided(target, drafter)
    if _judge([check])[0][1] is None:
        return True
    AVOIDED.discard(check.shape)
    return False


def _report(wrong: list[Finding]) -> None:
    for finding in wrong[:_REPORTED]:
        way = "a slower way is used instead" if finding.avoided else "there is no other way: texts may be wrong"
        log.warning("MLX computes wrongly here: %s: %s; %s", finding.shape, finding.wrong, way)
    if wrong:
        log.warning(
            "%d kernels of MLX %s are wrong on this machine: please report this to the authors of MLX and of mlx-mtp, "
            "with these lines and the machine's details from 'mlx-mtp info'", len(wrong), version("mlx"),
        )  # fmt: skip


def _judge(checks: list[Check]) -> list[tuple[float, str | None]]:
    """Runs a group of checks; returns `Finding.share` and `Finding.wrong` of each."""
    try:
        results = [check.run() for check in checks]
        mx.eval(results)  # all at once: waiting for each would take longer than computing it
    except _FAILURES as error:
        # One of them failed: run them one by one.
        return [(math.inf, one_line(error))] if len(checks) == 1 else [_judge([check])[0] for check in checks]
    with np.errstate(all="ignore"):  # on Macs numpy's products give false warnings
        return [_compare(result, check) for result, check in zip(results, checks, strict=True)]


def _compare(result: mx.array, check: Check) -> tuple[float, str | None]:
    expected, most = check.expected(), ROUNDINGS * max(float(mx.finfo(result.dtype).eps), COARSEST_FLOAT32)
    if result.dtype.size == 2 and not on_gpu():
        # A CPU rounds sums to 16 bits after every term; these errors add up like a random walk.
        most *= 1 + check.terms**0.5 / ROUNDINGS
    # Results much larger than typical may differ by their own rounding; the minimum avoids a division by zero.
    size = np.maximum(np.sqrt(np.mean(expected**2, axis=-1, keepdims=True)), np.finfo(np.float32).tiny)
    apart = float(np.max(np.abs(numbers(result) - expected) / np.maximum(size, np.abs(expected))))
    if not math.isfinite(apart):
        return math.inf, "results aren't finite numbers"
    wrong = None if apart <= most else f"results are off by {apart:.2g} of their size, and rounding explains {most:.2g}"
    return apart / most, wrong
