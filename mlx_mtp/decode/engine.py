"""The running batch: rows of KV buffers that go through rounds together, each at its own pace.

A row keeps what it earns: lengths, acceptance, sampling options, limits and stop tokens are its own, and its text is
the one it would get alone. Rows join with a prefilled prompt and leave when they are done; both regroup the buffers.

The host builds round n + 1 while round n runs, and hands it over before it reads the tokens of round n, in one read
for all rows (and one more for the first tokens of rows that have just joined); it learns of a stop token one round late
and drops the surplus. Where that would have MLX copy large buffers, round n + 1 is built early but handed over only
once round n is done, see `submits_late`.

Not here: who joins and when, prefill (scheduler.py), text (api.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from ..config import TextConfig
from ..kv import LONGEST_VERIFY, BatchKV, KVBuffers
from ..models.attention import longest_fused
from ..models.drafter import Drafter
from ..models.target import Target
from ..system.fusing import on_gpu
from .draft_length import Decision, DraftLengthPolicy
from .limits import MAX_AUTO_LENGTH, MAX_DRAFT_LENGTH
from .request import INVARIANT_WIDTH, Row
from .round import RoundState, decode_round, first_state, select_rows
from .sampling import Sampler
from .trace import Trace

COPY_LIMIT = 32 * 2**20
"""Bytes of KV from which copying them costs more than the gap left by handing a round over late."""

SWITCH = "MLX_MTP_HAND_OVER"
"""Environment variable: "early" or "late", in place of what `submits_late` would say."""

assert MAX_DRAFT_LENGTH < LONGEST_VERIFY


@dataclass(frozen=True)
class Prefilled:
    """A prompt that is ready to decode.

    Attributes:
        kv: One row of buffers that hold it.
        hidden: [1, hidden], the target's hidden state at its last position.
        rows: Who asked for it; several rows share the prompt, and part from here on.
    """

    kv: KVBuffers
    hidden: mx.array
    rows: list[Row]


@dataclass(frozen=True)
class Parked:
    """A row that has made room, and can go on where it was.

    Attributes:
        kv: Buffers of its own.
        state: What its next round starts from.
        rows: The row.
    """

    kv: KVBuffers
    state: RoundState
    rows: list[Row]


@dataclass(frozen=True)
class _InFlightRound:
    """A round whose tokens the host hasn't read.

    Attributes:
        report: int32 [B, width + 1], see `round.decode_round`.
        rows: The batch's rows when it was built.
        decision: What it drafts; None for the first tokens after a prefill.
    """

    report: mx.array
    rows: list[Row]
    decision: Decision | None


def submits_late(kv: BatchKV) -> bool:
    """Whether a round waits for the one before it to be done, which leaves the device idle meanwhile.

    MLX writes a buffer in place only while nothing in flight reads it, and copies it otherwise. On a GPU it never has
    more than 10 command buffers of about 50 kernels in flight, and between a layer's reading its KV in one round and
    writing it in the next lies a whole round, hundreds of kernels. On a CPU a round of a small model is shorter, and
    what runs in flight computes on the same cores, so that little is lost by waiting.
    """
    switch = os.environ.get(SWITCH)
    return switch == "late" if switch in ("early", "late") else not on_gpu() and kv.nbytes > COPY_LIMIT


def longest_auto(config: TextConfig) -> int:
    """Longest draft that is chosen by itself while nothing was measured.

    On a GPU no more than the fused attention kernel takes with the newest token: for E2B, with 8 query heads for a KV
    head, 3 drafts, and for others 7. Beyond, a round takes a step up, and whether it pays is for a tuner to find out.
    """
    return max(1, min(MAX_AUTO_LENGTH, longest_fused(config) - 1)) if on_gpu() else MAX_AUTO_LENGTH


def same_cost(lengths: Sequence[int], others: Sequence[int]) -> bool:
    """Whether rounds with these draft lengths, by row, take about the same time: an eighth of the tokens at most."""
    verified = sum(lengths) + len(lengths)
    same = len(lengths) == len(others) and max(lengths) == max(others)
    return same and 8 * abs(sum(lengths) - sum(others)) <= verified


class Engine:
    """Rows that decode together.

    Attributes:
        rows: Who is in the batch, in the order of the buffers' rows.
        kv: Their buffers; None while nobody is in it.
        trace: Where to record what happens when, or None.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        suppress_tokens: Sequence[int] = (),
        policy: DraftLengthPolicy | None = None,
    ):
        """Makes an empty batch; arguments as for `Scheduler`."""
        self.rows: list[Row] = []
        self.kv: BatchKV | None = None
        self.trace: Trace | None = None
        self._target, self._drafter, self._suppressed = target, drafter, tuple(suppress_tokens)
        self._state: RoundState | None = None
        self._sampler: Sampler
        self._in_flight: list[_InFlightRound] = []
        self._deferred = False
        # When the last round was read; None if something else has taken time since.
        self._read_at: float | None = None
        self._policy = policy or DraftLengthPolicy(longest=longest_auto(target.config))

    def update_batch(self, joining: Sequence[Prefilled | Parked] = (), leaving: Sequence[Row] = ()) -> None:
        """Lets go of rows that are done or leave, takes in others, and gives all of them room to grow."""
        stay = [i for i, row in enumerate(self.rows) if not row.done and row not in leaving]
        if len(stay) == len(self.rows) and not joining and self._has_room():
            return
        self.disturb()
        new = [row for prompt in joining for row in prompt.rows]
        rows = [self.rows[i] for i in stay] + new
        if not rows:
            self.clear()
            return
        for prompt in joining:
            for row in prompt.rows:
                row.written = prompt.kv.written
        # Out of sight meanwhile: buffers that are half rearranged are of no use to anybody (see Scheduler.step).
        kv, self.kv = self.kv, None
        sources = [kv.find(i) for i in stay] if kv else []
        sources += [(prompt.kv, 0) for prompt in joining for _ in prompt.rows]
        kv = kv if kv and stay else BatchKV()
        order = kv.arrange(sources, [max(self._max_written(row) + LONGEST_VERIFY, row.room) for row in rows])
        states = [it.state if isinstance(it, Parked) else self._first(it) for it in joining]
        state = select_rows(self._state, stay, states)
        self._state = state if order == list(range(len(rows))) else select_rows(state, order, [])
        self.rows = [rows[i] for i in order]
        self._sampler, self.kv = self._make_sampler(self.rows), kv
        for prompt, first in zip(joining, states, strict=True):
            if isinstance(prompt, Prefilled):
                report = mx.stack([first.tokens, mx.zeros_like(first.tokens)], axis=1)
                mx.async_eval(report)
                self._in_flight.append(_InFlightRound(report, prompt.rows, None))

    def clear(self) -> None:
        """Forgets all rows."""
        self.rows, self.kv, self._state, self._in_flight = [], None, None, []

    def row_kv(self, index: int) -> KVBuffers:
        """The buffers of a row, see `KVBuffers.row`."""
        assert self.kv is not None
        return self.kv.row(index, self._max_written(self.rows[index]))

    def park(self) -> list[Parked]:
        """Takes out the rows that are paused."""
        if not any(row.paused and not row.done for row in self.rows):
            return []
        assert self._state is not None
        with self.span("wait and read"):
            reports, _ = self._read()  # of the round in flight: what was written is then known
        self._deliver(reports, None, [])
        parked = [
            Parked(self.row_kv(i), select_rows(self._state, [i], []), [row])
            for i, row in enumerate(self.rows)
            if row.paused and not row.done
        ]
        mx.eval([array for it in parked for array in (it.state.lengths, it.state.tokens, it.state.hidden)])
        self.update_batch(leaving=[row for it in parked for row in it.rows])
        return parked

    def round(self, waiting: bool = False) -> None:
        """Builds the next round and reads the tokens of the one before; there must be rows that aren't done.

        Args:
            waiting: Whether others wait for the places of rows that are done.
        """
        assert self.kv is not None and self._state is not None
        kv, exactness = self.kv, self.rows[0].request.exactness
        decision = self._policy.next(self.rows, waiting) if self._drafter else Decision(self.rows, [0] * len(self.rows))
        lengths, k = decision.lengths, max(decision.lengths)
        width = INVARIANT_WIDTH if exactness == "invariant" else None
        kv.reserve([self._max_written(row) + (width or k + 1) for row in self.rows])
        before = kv.snapshot()
        with self.span("build", rows=len(self.rows), drafts=k):
            state, report, drafts = decode_round(
                self._target, self._drafter, kv, self._sampler, self._state, lengths, width, exactness == "stepwise"
            )
        late = submits_late(kv)
        if late is not self._deferred:
            self.disturb()
            self._deferred = late
        if not late:
            before = []
            if self.trace and k:
                self._submit_round("draft", drafts)
            self._submit_round("verify", report, state.lengths, state.hidden)
        with self.span("wait and read"):
            reports = self._read()
        with self.span("deliver"):
            self._deliver(*reports, lengths)
        if before and all(row.done for row in self.rows):
            kv.restore(before)  # the round built ahead was never handed over: forget it
            return
        if late:
            before = []  # lets go of the buffers, so that they are written in place
            self._submit_round("draft and verify" if k else "verify", report, state.lengths, state.hidden)
        self._state = state
        self._in_flight.append(_InFlightRound(report, self.rows, decision))

    def disturb(self) -> None:
        """Something else than a round takes time: that until the next one isn't a round's."""
        self._read_at = None

    def _submit_round(self, name: str, *results: mx.array) -> None:
        with self.trace.device(name, results[0], rows=len(self.rows)) if self.trace else nullcontext():
            mx.async_eval(*results)

    def _read(self) -> tuple[list[list[list[int]]], float | None]:
        """Waits for the rounds handed over before the latest; their reports, and the seconds they took."""
        reports = [_host(it.report) for it in self._in_flight]
        before, self._read_at = self._read_at, time.perf_counter()
        return reports, None if before is None else self._read_at - before

    def _deliver(self, reports: list[list[list[int]]], seconds: float | None, next_lengths: list[int]) -> None:
        """Gives every row its tokens, and the policy what it can learn from a round.

        Args:
            reports: See `_read`.
            seconds: See `_read`.
            next_lengths: Draft lengths of the round that was handed over meanwhile.
        """
        in_flight, self._in_flight = self._in_flight, []
        for flown, report in zip(in_flight, reports, strict=True):
            lengths = flown.decision.lengths if flown.decision else [None] * len(flown.rows)
            kept = list[int | None]()
            for row, length, (*choices, count) in zip(flown.rows, lengths, report, strict=True):
                kept.append(None if row.done else count)
                if not row.done:
                    row.receive(choices, count, length)
            if flown.decision and self._drafter:
                # The time counts only if all of it was this round's. On a CPU much of it is the next round's: work is
                # done while it is handed over.
                own = seconds is not None and len(in_flight) == 1 and same_cost(flown.decision.lengths, next_lengths)
                self._policy.observe(flown.decision, kept, seconds if own else None)

    def _max_written(self, row: Row) -> int:
        """Positions that may have been written for the row once everything handed over so far has run."""
        in_flight = (it.report.shape[1] - 1 for it in self._in_flight if it.decision and row in it.rows)
        return max(row.written, row.committed + sum(in_flight))

    def _has_room(self) -> bool:
        """Whether the buffers have room for another round, however long its drafts."""
        return not self.kv or self.kv.fits([self._max_written(row) + LONGEST_VERIFY for row in self.rows])

    def _first(self, prompt: Prefilled) -> RoundState:
        count = len(prompt.rows)
        lengths = mx.full((count,), len(prompt.rows[0].request.prompt), dtype=mx.int32)
        hidden = mx.repeat(prompt.hidden, count, axis=0)
        return first_state(self._target, self._make_sampler(prompt.rows), hidden, lengths)

    def span(self, name: str, **facts: int) -> AbstractContextManager[None]:
        """A bar of the host's in the trace, if one is being recorded."""
        return self.trace.host(name, **facts) if self.trace else nullcontext()

    def _make_sampler(self, rows: Sequence[Row]) -> Sampler:
        config = self._target.config
        return Sampler(
            [row.request.sampling for row in rows], config.logit_softcap, self._suppressed, config.vocab_size
        )


def _host(report: mx.array) -> list[list[int]]:
    """Waits for a report: the only place where the host reads from the device while rows are decoded."""
    return cast("list[list[int]]", report.tolist())
