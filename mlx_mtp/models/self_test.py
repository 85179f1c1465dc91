"""Are the kernels that a model will use right on this machine? Each is run once, beside a plain formula.

A kernel can fail on one chip and one version of macOS only: more threads than its pipeline may have there, a compiler's
mistake. MLX then raises an error, or returns garbage. So before a pair is used on Metal, what MLX chooses kernels by is
gone through: attention by heads, tokens and slots; products with quantised weights by their sizes and the number of
rows; gathered products (experts, clustered heads). What is run, and what it should give, is in kernel_checks.py.

What is wrong is put into `models.avoided.AVOIDED`, so that it is computed another way from then on. Results hold for
the whole process; another model of the same shapes costs nothing. MLX_MTP_SELF_TEST says whether this is done: "0"
never, "1" on any backend; else on Metal.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import one_line
from ..system.fusing import on_gpu
from .avoided import AVOIDED, Shape, keep_to_avoided
from .drafter import Drafter
from .kernel_checks import Check, checks_of, numbers
from .target import Target

log = logging.getLogger(__name__)

SWITCH = "MLX_MTP_SELF_TEST"
"""Environment variable: "0" for no self-test, "1" for one on any backend."""

ROUNDINGS = 8
"""Largest difference from the formula, in roundings (`finfo.eps`) of a result of typical size. Two or three are to be
expected: half a one of the result itself, which may be four times as large as is typical, and those of scores, shares
and weights on the way to it. Attention that leaves out a fiftieth of the slots is off by ten or more."""

COARSEST_FLOAT32 = 2**-10
"""Rounding of float32 where products may be computed in TF32, as they are on new chips."""

_REPORTED = 10
"""Most findings that are logged one by one. If all is wrong, each is no news."""

_FAILURES = (RuntimeError, ValueError, MemoryError)
"""What MLX raises when a kernel can't be had or run."""


@dataclass(frozen=True)
class Finding:
    """What the self-test says of one shape.

    Attributes:
        shape: The shape; `str` gives it in words.
        share: Difference from the formula, of the largest that rounding explains; infinite without results.
        wrong: What was wrong with MLX's kernel, or None if the share is at most 1.
        avoided: Whether it is computed another way since. Not if that is wrong too.
    """

    shape: Shape
    share: float
    wrong: str | None
    avoided: bool


_known: dict[Shape, Finding] = {}


def at_load(target: Target, drafter: Drafter | None) -> None:
    """`self_test` of a pair that was just loaded, where that is wanted: on Metal, unless SWITCH says otherwise."""
    switch = os.environ.get(SWITCH)
    if switch == "0" or (switch != "1" and not (on_gpu() and mx.metal.is_available())):
        return
    try:
        self_test(target, drafter)
    except _FAILURES as error:
        log.warning("the self-test of MLX's kernels can't be done here: %s", one_line(error))


def self_test(target: Target, drafter: Drafter | None) -> list[Finding]:
    """Checks the kernels that a pair uses, on any backend, and has those that are wrong avoided.

    A warning says what is found wrong for the first time in this process.

    Returns:
        A finding for each of the pair's shapes.

    Raises:
        RuntimeError, ValueError, MemoryError: What the results are compared with can't be computed.
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
        keep_to_avoided(target, drafter)  # as far as was known before, too
        mx.clear_cache()
        _report([finding for finding in new if finding.wrong])
    return list(found.values())


def _avoid(check: Check, target: Target, drafter: Drafter | None) -> bool:
    """Has a shape computed the other way; False, and nothing is changed, if that isn't right either."""
    AVOIDED.add(check.shape)
    keep_to_avoided(target, drafter)
    if _judge([check])[0][1] is None:
        return True
    AVOIDED.discard(check.shape)
    return False


def _report(wrong: list[Finding]) -> None:
    for finding in wrong[:_REPORTED]:
        way = "it is computed another, slower way" if finding.avoided else "there is no other way: texts may be wrong"
        log.warning("MLX computes wrongly here: %s: %s; %s", finding.shape, finding.wrong, way)
    if wrong:
        log.warning(
            "%d kernels of MLX %s are wrong on this machine: please report that to the authors of MLX and of mlx-mtp, "
            "with these lines and what 'mlx-mtp info' says of the machine", len(wrong), mx.__version__,
        )  # fmt: skip


def _judge(checks: list[Check]) -> list[tuple[float, str | None]]:
    """The share and what is wrong, as in `Finding`, of each of some shapes of a kind."""
    try:
        results = [check.run() for check in checks]
        mx.eval(results)  # all at once: waiting for each would take longer than computing it
    except _FAILURES as error:
        # Somewhere among them: one by one, then.
        return [(math.inf, one_line(error))] if len(checks) == 1 else [_judge([check])[0] for check in checks]
    with np.errstate(all="ignore"):  # on Macs numpy's products warn of what doesn't happen
        return [_compare(result, check) for result, check in zip(results, checks, strict=True)]


def _compare(result: mx.array, check: Check) -> tuple[float, str | None]:
    expected, most = check.expected(), ROUNDINGS * max(float(mx.finfo(result.dtype).eps), COARSEST_FLOAT32)
    if result.dtype.size == 2 and not on_gpu():
        # There alone sums are rounded to 16 bits after every term; these errors add up like steps in random directions.
        most *= 1 + check.terms**0.5 / ROUNDINGS
    # A result of an outlier among weights is rounded by its own size; one of zeros only isn't divided by that.
    size = np.maximum(np.sqrt(np.mean(expected**2, axis=-1, keepdims=True)), np.finfo(np.float32).tiny)
    apart = float(np.max(np.abs(numbers(result) - expected) / np.maximum(size, np.abs(expected))))
    if not math.isfinite(apart):
        return math.inf, "results are no finite numbers"
    wrong = None if apart <= most else f"results are off by {apart:.2g} of their size, and rounding explains {most:.2g}"
    return apart / most, wrong
