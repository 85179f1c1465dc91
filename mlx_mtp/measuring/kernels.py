"""The findings of the kernel self-test (models/self_test.py) in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..models.self_test import Finding


def summary(found: Sequence[Finding]) -> str:
    """What was checked and how it went, in one line."""
    kinds = Counter(type(it.shape).__name__.removesuffix("Shape").lower() for it in found)
    what = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    wrong = sum(it.wrong is not None for it in found)
    worst = max((it.share for it in found), default=0.0)
    verdict = f"{wrong} WRONG" if wrong else f"right, off by {worst:.2f} of what may be"
    return f"{what} kernels: {verdict}"


def complaints(found: Sequence[Finding]) -> list[str]:
    """A line for each kernel that is wrong."""
    return [f"{it.shape}: {it.wrong}; {'avoided' if it.avoided else 'NO OTHER WAY'}" for it in found if it.wrong]
