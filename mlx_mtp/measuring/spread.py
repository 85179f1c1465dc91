"""Figures that were measured several times: the median, the lowest and the highest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times, in the unit of its values.

    Attributes:
        median: Their median.
        low: The lowest.
        high: The highest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From the single values, at least one."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """As "1.77 (1.70 to 1.84)"."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
