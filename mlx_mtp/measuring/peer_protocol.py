"""How a peer, another program on the same weights, runs in a process of its own and is asked for measurements.

The process reads a line of JSON, the job, loads the models and answers a line. Then it reads a line for each run and
answers what was measured. This module and the peers' import nothing of the package but system/, so that they run in an
environment that has only the peer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypedDict

from ..system.blas import has_openblas, use_openblas


class Job(TypedDict):
    """What a peer loads.

    Attributes:
        target: The target's folder.
        drafter: The drafter's folder; None for none.
        dtype: MLX's name of the type of activations and unquantised weights, such as "bfloat16".
    """

    target: str
    drafter: str | None
    dtype: str


class Measured(TypedDict):
    """What was measured of a batch that was decoded.

    Attributes:
        seconds: Wall-clock seconds until the last token, prefill included.
        prompts: Seconds until every row had its first token.
        first_token: Seconds until a row's first token, the mean over rows.
        further: Tokens of all rows that came later than `prompts`.
        active, peak, pool: Bytes of MLX after the run: in use, at most in use, and kept unused.
    """

    seconds: float
    prompts: float
    first_token: float
    further: int
    active: int
    peak: int
    pool: int


class Clock:
    """Notes when the tokens of a batch come, and MLX's memory; it begins when it is made."""

    def __init__(self) -> None:
        import mlx.core as mx

        mx.reset_peak_memory()
        self._begun = time.perf_counter()
        self._came: dict[int, list[float]] = {}

    def tick(self, row: int, tokens: int = 1, at: float | None = None) -> None:
        """Notes that so many tokens of a row came at a time, in seconds from the beginning; None for now."""
        at = time.perf_counter() - self._begun if at is None else at
        self._came.setdefault(row, []).extend([at] * tokens)

    def measured(self) -> Measured:
        """What there is to say at the end."""
        import mlx.core as mx

        firsts = [times[0] for times in self._came.values()]
        came = [at for times in self._came.values() for at in times]
        return {
            "seconds": max(came),
            "prompts": max(firsts),
            "first_token": sum(firsts) / len(firsts),
            "further": sum(at > max(firsts) for at in came),
            "active": mx.get_active_memory(),
            "peak": mx.get_peak_memory(),
            "pool": mx.get_cache_memory(),
        }


Tick = Callable[[int], None]
"""To be called with a row's number for each of its tokens, as soon as it is known."""

Decode = Callable[[list[list[int]], int, int, Tick], None]
"""Decodes a batch greedily: prompts, tokens of each row whatever they are, draft length (0 for plain), and a tick."""


def serve(package: str, load: Callable[[Job], Decode]) -> None:
    """Serves runs until stdin ends.

    Args:
        package: Name of the peer's distribution, for its version.
        load: Loads the models, and returns what decodes with them.
    """
    use_openblas()  # before MLX is imported
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed isn't an answer

    def answer(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    decode = load(json.loads(sys.stdin.readline()))
    answer({"version": version(package), "openblas": has_openblas()})
    for line in sys.stdin:
        asked = json.loads(line)
        clock = Clock()
        decode(asked["prompts"], asked["tokens"], asked["draft_length"], clock.tick)
        answer(clock.measured())
