"""What is on its way to or through the batch: prompts and rows that join, and rounds that the host hasn't read.

Also when the host submits a round: early, while the one before it runs, or late.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..kv import BatchKV, KVBuffers
from ..system.fusing import on_gpu
from .draft_length import Decision
from .logprobs import Logprobs
from .request import Row
from .round import Block, Forward, RoundState

COPY_LIMIT = 32 * 2**20
"""KV bytes above which copying the buffers costs more than the idle time that a late submission causes."""

SWITCH = "MLX_MTP_HAND_OVER"
"""Environment variable that overrides `submits_late`: "early" or "late"."""


@dataclass(frozen=True)
class Prefilled:
    """A prefilled prompt, ready to decode.

    Attributes:
        kv: Buffers of one row that hold the prompt's KV.
        hidden: [1, hidden], the target's hidden state at the prompt's last position.
        rows: The rows that start from this prompt; more than one if several requests have the same prompt.
    """

    kv: KVBuffers
    hidden: mx.array
    rows: list[Row]


@dataclass(frozen=True)
class Parked:
    """A row taken out of the batch, which can continue where it stopped.

    Attributes:
        kv: The row's own buffers.
        state: The state that its next round starts from.
        rows: The row, as the only element.
    """

    kv: KVBuffers
    state: RoundState
    rows: list[Row]


@dataclass(frozen=True)
class InFlightRound:
    """A round whose tokens the host hasn't read yet.

    Attributes:
        report: int32 [B, width + 1], see `round.decode_round`.
        rows: The batch's rows when the round was built.
        decision: The draft lengths; None for the first tokens after a prefill.
        logprobs: For the rows that want them.
    """

    report: mx.array
    rows: list[Row]
    decision: Decision | None
    logprobs: Logprobs | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What the host will read."""
        return [self.report, *(self.logprobs.arrays if self.logprobs else [])]


@dataclass(frozen=True)
class BegunRound:
    """The first part of a round of a controlled batch: the target has been given the block, and nothing is chosen.

    Attributes:
        block: What it verifies.
        seen: The target's view of it.
        decision: The draft lengths.
    """

    block: Block
    seen: Forward
    decision: Decision


def submits_late(kv: BatchKV) -> bool:
    """Whether a round is submitted only when the round before it is done, which leaves the device idle in between.

    MLX writes a buffer in place only if no submitted work still reads it, and copies it otherwise. On a GPU, MLX has at
    most 10 command buffers of about 50 kernels in flight. A layer reads its KV in one round and writes it in the next,
    hundreds of kernels later, so the read is over by then and nothing is copied. On a CPU a round of a small model is
    shorter; but there the host shares its cores with the round in flight, so waiting costs little.
    """
    switch = os.environ.get(SWITCH)
    return switch == "late" if switch in ("early", "late") else not on_gpu() and kv.nbytes > COPY_LIMIT


def same_cost(lengths: Sequence[int], others: Sequence[int]) -> bool:
    """Whether rounds with these draft lengths by row take about the same time.

    They do if their longest draft is the same and their number of verified tokens differs by at most an eighth.
    """
    verified = sum(lengths) + len(lengths)
    same = len(lengths) == len(others) and max(lengths) == max(others)
    return same and 8 * abs(sum(lengths) - sum(others)) <= verified
