"""The running batch: rows that decode in the same rounds, each at its own pace.

Committed length, acceptance, sampling options, token limit and stop tokens belong to each row, and its text is the one
it would get alone. Rows join with a prefilled prompt and leave when they are done; both rearrange the KV buffers.

The host builds round n + 1 while round n runs, and submits it before it reads the tokens of round n. All rows are read
at once, in one read more if rows have just joined and have their first tokens. The host therefore learns of a stop
token one round late, and drops the tokens after it. If submitting early would make MLX copy large buffers, round n + 1
is still built early but submitted only when round n is done (see `submits_late`).

Not here: which requests join and when, and prefill (scheduler.py); text (api.py).
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
"""KV bytes above which copying the buffers costs more than the idle time that a late submission causes."""

SWITCH = "MLX_MTP_HAND_OVER"
"""Environment variable that overrides `submits_late`: "early" or "late"."""

assert MAX_DRAFT_LENGTH < LONGEST_VERIFY


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
class _InFlightRound:
    """A round whose tokens the host hasn't read yet.

    Attributes:
        report: int32 [B, width + 1], see `round.decode_round`.
        rows: The batch's rows when the round was built.
        decision: The draft lengths; None for the first tokens after a prefill.
    """

    report: mx.array
    rows: list[Row]
    decision: Decision | None


def submits_late(kv: BatchKV) -> bool:
    """Whether a round is submitted only when the round before it is done, which leaves the device idle in between.

    MLX writes a buffer in place only if no submitted work still reads it, and copies it otherwise. On a GPU, MLX has at
    most 10 command buffers of about 50 kernels in flight. A layer reads its KV in one round and writes it in the next,
    hundreds of kernels later, so the read is over by then and nothing is copied. On a CPU a round of a small model is
    shorter; but there the host shares its cores with the round in flight, so waiting costs little.
    """
    switch = os.environ.get(SWITCH)
    return switch == "late" if switch in ("early", "late") else not on_gpu() and kv.nbytes > COPY_LIMIT


def longest_auto(config: TextConfig) -> int:
    """Longest draft length that "auto" chooses for a pair without a profile.

    On a GPU the verify block must fit the fused attention kernel: E2B, with 8 query heads per KV head, gets 3 drafts,
    the other models 7. Wider blocks take clearly longer, and only a measurement can tell whether they pay.
    """
    return max(1, min(MAX_AUTO_LENGTH, longest_fused(config) - 1)) if on_gpu() else MAX_AUTO_LENGTH


def same_cost(lengths: Sequence[int], others: Sequence[int]) -> bool:
    """Whether rounds with these draft lengths by row take about the same time.

    They do if their longest draft is the same and their number of verified tokens differs by at most an eighth.
    """
    verified = sum(lengths) + len(lengths)
    same = len(lengths) == len(others) and max(lengths) == max(others)
    return same and 8 * abs(sum(lengths) - sum(others)) <= verified


class Engine:
    """Decodes a batch of rows, round by round.

    Attributes:
        rows: The rows of the batch, in the order of the buffers' rows.
        kv: Their buffers; None while the batch is empty.
        trace: Where to record a timeline, or None.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        suppress_tokens: Sequence[int] = (),
        policy: DraftLengthPolicy | None = None,
    ) -> None:
        """Makes an empty batch; arguments as for `Scheduler`."""
        self.rows: list[Row] = []
        self.kv: BatchKV | None = None
        self.trace: Trace | None = None
        self._target, self._drafter, self._suppressed = target, drafter, tuple(suppress_tokens)
        self._state: RoundState | None = None
        self._sampler: Sampler
        self._in_flight: list[_InFlightRound] = []
        self._deferred = False
        # When the last round was read; None if other work has run since.
        self._read_at: float | None = None
        self._policy = policy or DraftLengthPolicy(longest=longest_auto(target.config))

    def update_batch(self, joining: Sequence[Prefilled | Parked] = (), leaving: Sequence[Row] = ()) -> None:
        """Removes rows that are done or leaving, adds the joining ones, and gives all rows room to grow.

        Args:
            joining: Rows to add, each with its KV. Their buffers become the batch's.
            leaving: Rows to remove although they aren't done.
        """
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
        # Hidden until they are complete: half rearranged buffers mustn't be used if this fails (see Scheduler.step).
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
        """Drops all rows and their KV."""
        self.rows, self.kv, self._state, self._in_flight = [], None, None, []

    def row_kv(self, index: int) -> KVBuffers:
        """The KV of row `index` of the batch, see `KVBuffers.row`."""
        assert self.kv is not None
        return self.kv.row(index, self._max_written(self.rows[index]))

    def park(self) -> list[Parked]:
        """Takes the paused rows out of the batch and returns them."""
        if not any(row.paused and not row.done for row in self.rows):
            return []
        assert self._state is not None
        with self.span("wait and read"):
            reports, _ = self._read()  # until the round in flight is read, the committed length isn't known
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
        """Builds the next round and reads the tokens of the one before. At least one row must not be done.

        Args:
            waiting: Whether requests wait for a place in the batch.
        """
        assert self.kv is not None
        assert self._state is not None
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
            kv.restore(before)  # the round built ahead was never submitted, and isn't needed
            return
        if late:
            before = []  # frees the snapshot, so that the buffers are written in place
            self._submit_round("draft and verify" if k else "verify", report, state.lengths, state.hidden)
        self._state = state
        self._in_flight.append(_InFlightRound(report, self.rows, decision))

    def disturb(self) -> None:
        """Says that other work takes time now, so the time until the next read isn't a round's duration."""
        self._read_at = None

    def _submit_round(self, name: str, *results: mx.array) -> None:
        with self.trace.device(name, results[0], rows=len(self.rows)) if self.trace else nullcontext():
            mx.async_eval(*results)

    def _read(self) -> tuple[list[list[list[int]]], float | None]:
        """Waits for the rounds in flight; returns their reports, and the seconds since the last read if known."""
        reports = [_host(it.report) for it in self._in_flight]
        before, self._read_at = self._read_at, time.perf_counter()
        return reports, None if before is None else self._read_at - before

    def _deliver(self, reports: list[list[list[int]]], seconds: float | None, next_lengths: list[int]) -> None:
        """Gives every row its tokens, and tells the draft-length policy how the round went.

        Args:
            reports: See `_read`.
            seconds: See `_read`.
            next_lengths: Draft lengths of the round that was submitted in the meantime.
        """
        in_flight, self._in_flight = self._in_flight, []
        for done, report in zip(in_flight, reports, strict=True):
            lengths = done.decision.lengths if done.decision else [None] * len(done.rows)
            accepted = list[int | None]()
            for row, length, (*choices, count) in zip(done.rows, lengths, report, strict=True):
                accepted.append(None if row.done else count)
                if not row.done:
                    row.receive(choices, count, length)
            if done.decision and self._drafter:
                # The measured time overlaps with the next round: on a CPU, MLX computes while a round is submitted. It
                # counts only if both rounds cost about the same.
                own = seconds is not None and len(in_flight) == 1 and same_cost(done.decision.lengths, next_lengths)
                self._policy.observe(done.decision, accepted, seconds if own else None)

    def _max_written(self, row: Row) -> int:
        """Upper bound of the row's written positions once every submitted round has run."""
        in_flight = (it.report.shape[1] - 1 for it in self._in_flight if it.decision and row in it.rows)
        return max(row.written, row.committed + sum(in_flight))

    def _has_room(self) -> bool:
        """Whether the buffers have room for another round of any draft length."""
        return not self.kv or self.kv.fits([self._max_written(row) + LONGEST_VERIFY for row in self.rows])

    def _first(self, prompt: Prefilled) -> RoundState:
        count = len(prompt.rows)
        lengths = mx.full((count,), len(prompt.rows[0].request.prompt), dtype=mx.int32)
        hidden = mx.repeat(prompt.hidden, count, axis=0)
        return first_state(self._target, self._make_sampler(prompt.rows), hidden, lengths)

    def span(self, name: str, **facts: int) -> AbstractContextManager[None]:
        """Records a span of host time, if a trace is being recorded.

        Args:
            name: The span's label.
            facts: Numbers to show with it.
        """
        return self.trace.host(name, **facts) if self.trace else nullcontext()

    def _make_sampler(self, rows: Sequence[Row]) -> Sampler:
        config = self._target.config
        return Sampler(
            [row.request.sampling for row in rows], config.logit_softcap, self._suppressed, config.vocab_size
        )


def _host(report: mx.array) -> list[list[int]]:
    """Waits for a report. While rows decode, the host reads from the device only here."""
    return cast("list[list[int]]", report.tolist())
