"""What a model has room for: requests are checked against it before they wait, also while the weights aren't loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.sizes import format_bytes, rows_bytes
from ..config import TextConfig
from ..errors import MemoryBudgetError
from .request import Request, Row, Stats, check_prompt, token_limit


@dataclass
class Capacity:
    """The context of a model, and the memory that there is for KV. Holds no weights; thread-safe.

    Attributes:
        config: The target's.
        dtype_bytes: Bytes of a key's or value's number.
        kv_budget: Most bytes for the KV of all rows. May shrink to `Scheduler.needed` between two steps.
    """

    config: TextConfig
    dtype_bytes: int
    kv_budget: int

    def check(self, request: Request) -> None:
        """Checks that a request can be run.

        Raises:
            PromptError: See `request.check_prompt`.
            MemoryBudgetError: Its KV alone exceeds the budget.
        """
        check_prompt(request.prompt, self.config)
        if not self.fits([request]):
            raise MemoryBudgetError(
                f"a prompt of {len(request.prompt)} tokens and up to {self._limit(request)} more need "
                f"{format_bytes(self.kv_bytes([request]))} of KV, and there are {format_bytes(self.kv_budget)} for it: "
                "ask for fewer tokens or shorten the prompt"
            )

    def row(self, request: Request, width: int = 0, stats: Stats | None = None) -> Row:
        """Makes a row for `Scheduler.enqueue`; errors as in `check`.

        Args:
            request: What to generate.
            width: Rows that the batch may have while this one is active, if more than its usual number.
            stats: Where to count; None for new statistics.
        """
        self.check(request)
        return Row(request, stats or Stats(), self._limit(request), width)

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether the KV of all of them, at their full length, fits the budget."""
        return self.kv_bytes(requests) <= self.kv_budget

    def kv_bytes(self, requests: Sequence[Request]) -> int:
        """Bytes of the requests' KV when all of them have reached their full length."""
        tokens = [len(request.prompt) + self._limit(request) for request in requests]
        return rows_bytes(self.config, tokens, self.dtype_bytes)

    def _limit(self, request: Request) -> int:
        return token_limit(request, self.config)
