"""The running batch: rows that decode in the same rounds, each at its own pace.

Committed length, acceptance, sampling options, token limit and stop tokens belong to each row, and its text is the one
it would get alone. Rows join with a prefilled prompt and leave when they are done; both rearrange the KV buffers.

The host builds round n + 1 while round n runs, and submits it before it reads the tokens of round n. All rows are read
at once, in one read more if rows have just joined and have their first tokens. The host therefore learns of a stop
token one round late, and drops the tokens after it. If submitting early would make MLX copy large buffers, round n + 1
is still built early but submitted only when round n is done (see `submits_late`).

A batch with a controlled row (adjustments.py) takes its rounds in two parts. What its logits need is known only when
the drafts are on the host; so a round is first drafted and run through the target, and while the target runs, the
host reads the drafts, works out the adjustments and builds the rest of the round, and the first part of the next one.

Not here: which requests join and when, and prefill (scheduler.py); text (api.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import mlx.core as mx

from ..kv import LONGEST_VERIFY, BatchKV, KVBuffers
from ..models.drafter import Drafter
from ..models.target import Target
from .draft_length import Decision, DraftLengthPolicy, longest_auto
from .host_drafts import Offer, best_offers
from .in_flight import BegunRound, InFlightRound, Parked, Prefilled, same_cost, submits_late
from .limits import MAX_DRAFT_LENGTH
from .logprobs import Logprobs, logprobs
from .request import INVARIANT_WIDTH, Row
from .round import (
    Adjustments,
    Forward,
    RoundState,
    choose,
    commit,
    draft_block,
    forward,
    last_position,
    select_rows,
)
from .sampling import Sampler
from .trace import Trace

assert MAX_DRAFT_LENGTH < LONGEST_VERIFY


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
        self._in_flight: list[InFlightRound] = []
        self._begun: BegunRound | None = None
        self._latest: Decision | None = None
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
        if not stay:
            self._begun = None  # nobody is left whose round that is
        if self._begun:
            self._read_and_deliver()
            self._finish_begun()
            stay = [i for i, row in enumerate(self.rows) if not row.done and row not in leaving]
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
        firsts = {id(it): self._first(it) for it in joining if isinstance(it, Prefilled)}
        states = [it.state if isinstance(it, Parked) else firsts[id(it)][0] for it in joining]
        state = select_rows(self._state, stay, states)
        self._state = state if order == list(range(len(rows))) else select_rows(state, order, [])
        self.rows = [rows[i] for i in order]
        self._sampler, self.kv = self._make_sampler(self.rows), kv
        for _, first in firsts.values():
            mx.async_eval(*first.arrays)
            self._in_flight.append(first)

    def clear(self) -> None:
        """Drops all rows and their KV."""
        self.rows, self.kv, self._state, self._in_flight, self._begun = [], None, None, [], None

    def row_kv(self, index: int) -> KVBuffers:
        """The KV of row `index` of the batch, see `KVBuffers.row`."""
        assert self.kv is not None
        return self.kv.row(index, self._max_written(self.rows[index]))

    def park(self) -> list[Parked]:
        """Takes the paused rows out of the batch and returns them."""
        if not any(row.paused and not row.done for row in self.rows):
            return []
        # Until the rounds in flight are read, the committed length isn't known.
        self._read_and_deliver()
        if self._begun:
            self._finish_begun()
            self._read_and_deliver()
        assert self._state is not None
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
        if self._begun or self._is_controlled() or self._has_offers():
            self._controlled_round(waiting)
        else:
            self._plain_round(waiting)

    def _plain_round(self, waiting: bool) -> None:
        assert self.kv is not None
        kv, decision = self.kv, self._decide(waiting)
        before, k = kv.snapshot(), max(decision.lengths)
        with self.span("build", rows=len(self.rows), drafts=k):
            begun = self._begin(decision)
            state, flight = self._finish(begun)
        late = self._submits_late()
        if not late:
            before = []
            if self.trace and k:
                self._submit("draft", begun.block.drafts)
            self._submit("verify", *flight.arrays, state.lengths, state.hidden)
        self._read_and_deliver(decision.lengths)
        if before and all(row.done for row in self.rows):
            kv.restore(before)  # the round built ahead was never submitted, and isn't needed
            return
        if late:
            before = []  # frees the snapshot, so that the buffers are written in place
            self._submit("draft and verify" if k else "verify", *flight.arrays, state.lengths, state.hidden)
        self._state = state
        self._in_flight.append(flight)

    def _controlled_round(self, waiting: bool) -> None:
        """Finishes the round that was begun, and begins the next one while the device is busy with it."""
        # With nothing begun, every token is on the host after this: the host's drafts follow the text as it is.
        read = self._begun is None
        self._read_and_deliver(self._begun.decision.lengths if self._begun else ())
        if all(row.done for row in self.rows):
            return
        if not read:
            self._finish_begun()
            if not self._is_controlled() or self._submits_late() or self._has_offers():
                return
        decision = self._decide(waiting, take_offers=read)
        with self.span("build", rows=len(self.rows), drafts=max(decision.lengths)):
            begun = self._begin(decision)
        if begun.block.drafts.size:
            self._submit("draft", begun.block.drafts)  # by itself: the host reads it while the target runs
        self._submit("verify", begun.seen.logits, begun.seen.hidden)
        self._begun = begun

    def _is_controlled(self) -> bool:
        return any(row.control and not row.done for row in self.rows)

    def _offers(self) -> dict[int, Offer]:
        """What the host can draft for the text that it knows, by row."""
        offers = dict[int, Offer]()
        for i, row in enumerate(self.rows):
            if row.host_drafts and not row.done and row.remaining > 1:
                offer = row.offer(min(MAX_DRAFT_LENGTH, row.remaining - 1))
                offers |= {i: offer} if offer else {}
        return offers

    def _has_offers(self) -> bool:
        """Whether the host's drafts would be worth waiting for the round in flight, by what is known of the text."""
        offers, latest = self._offers(), self._latest
        return bool(offers and latest and latest.rows is self.rows and best_offers(latest, offers))

    def _decide(self, waiting: bool, take_offers: bool = False) -> Decision:
        """Chooses the next round's draft lengths, and makes room for it."""
        assert self.kv is not None
        decision = self._policy.next(self.rows, waiting, drafting=self._drafter is not None)
        self._latest = decision
        if take_offers and not decision.trial and (taken := best_offers(decision, self._offers())):
            lengths = [len(taken[i].tokens) if i in taken else own for i, own in enumerate(decision.lengths)]
            decision = replace(decision, lengths=lengths, given=taken)
        width = self._width or max(decision.lengths) + 1
        self.kv.reserve([self._max_written(row) + width for row in self.rows])
        return decision

    @property
    def _width(self) -> int | None:
        """Width of every verify block, if the rows want that fixed."""
        return INVARIANT_WIDTH if self.rows[0].request.exactness == "invariant" else None

    def _begin(self, decision: Decision) -> BegunRound:
        """Builds the first part of a round: drafts, and the target's pass over them."""
        assert self.kv is not None
        assert self._state is not None
        kv, state, stepwise = self.kv, self._state, self.rows[0].request.exactness == "stepwise"
        given = {i: offer.tokens for i, offer in decision.given.items()}
        block = draft_block(self._target, self._drafter, kv, self._sampler, state, decision.lengths, self._width, given)
        counts = None if stepwise else block.counts
        return BegunRound(block, forward(self._target, kv, state.lengths, block.tokens, stepwise, counts), decision)

    def _finish(self, begun: BegunRound, adjustments: Adjustments | None = None) -> tuple[RoundState, InFlightRound]:
        """Builds the rest of a round: choices, and what is accepted."""
        assert self._state is not None
        choices = choose(self._sampler, self._state.lengths, begun.seen, adjustments)
        state, report = commit(self._state, begun.block, begun.seen, choices)
        return state, InFlightRound(report, self.rows, begun.decision, self._logprobs(self.rows, begun.seen, choices))

    def _finish_begun(self) -> None:
        """Finishes the round that was begun, once every token before it is on the host, and submits it."""
        begun, self._begun = self._begun, None
        assert begun is not None
        drafts = _host(self._settled(begun.block.drafts))
        drafts = [own[:length] for own, length in zip(drafts, begun.decision.lengths, strict=True)]
        with self.span("adjust", rows=len(self.rows)):
            adjustments = self._adjustments(self.rows, drafts)
        self._state, flight = self._finish(begun, adjustments)
        self._submit("choose", *flight.arrays, self._state.lengths, self._state.hidden)
        self._in_flight.append(flight)

    @staticmethod
    def _adjustments(rows: Sequence[Row], drafts: Sequence[Sequence[int]]) -> Adjustments:
        return [row.adjustments(own) for row, own in zip(rows, drafts, strict=True)]

    def _logprobs(self, rows: Sequence[Row], seen: Forward, choices: mx.array) -> Logprobs | None:
        return logprobs([row.request.logprobs for row in rows], seen, choices, self._target.config.logit_softcap)

    def disturb(self) -> None:
        """Says that other work takes time now, so the time until the next read isn't a round's duration."""
        self._read_at = None

    def _submits_late(self) -> bool:
        assert self.kv is not None
        if (late := submits_late(self.kv)) is not self._deferred:
            self.disturb()
            self._deferred = late
        return late

    def _submit(self, name: str, *results: mx.array) -> None:
        with self.trace.device(name, results[0], rows=len(self.rows)) if self.trace else nullcontext():
            mx.async_eval(*results)

    def _read_and_deliver(self, next_lengths: Sequence[int] = ()) -> None:
        """Waits for the rounds in flight, gives every row its tokens, and tells the draft-length policy how it went.

        Args:
            next_lengths: Draft lengths of the round that was submitted in the meantime.
        """
        if not self._in_flight:
            return  # between the two parts of a round, whose time goes on
        with self.span("wait and read"):
            reports = [_host(self._settled(it.report)) for it in self._in_flight]
            scored = [it.logprobs.host() if it.logprobs else {} for it in self._in_flight]
        before, self._read_at = self._read_at, time.perf_counter()
        in_flight, self._in_flight = self._in_flight, []
        with self.span("deliver"):
            for done, report, scores in zip(in_flight, reports, scored, strict=True):
                lengths = done.decision.lengths if done.decision else [None] * len(done.rows)
                given = done.decision.given if done.decision else {}
                accepted = list[int | None]()
                for i, (row, length, (*choices, count)) in enumerate(zip(done.rows, lengths, report, strict=True)):
                    if done.decision:
                        row.count_positions(len(choices), count)
                    accepted.append(None if row.done else count)
                    if not row.done:
                        row.receive(choices, count, length, scores.get(i), given.get(i))
                if done.decision:
                    # The measured time overlaps with the next round: on a CPU, MLX computes while a round is submitted.
                    # It counts only if both rounds cost about the same, or if there is no next one yet.
                    alone = bool(done.decision.given) and not next_lengths
                    own = len(in_flight) == 1 and (alone or same_cost(done.decision.lengths, next_lengths))
                    self._policy.observe(done.decision, accepted, self._read_at - before if before and own else None)

    def _settled(self, result: mx.array) -> mx.array:
        """A result that the host will wait for; a trace first records the work up to it."""
        if self.trace:
            self.trace.settle(result)
        return result

    def _max_written(self, row: Row) -> int:
        """Upper bound of the row's written positions once every submitted round has run."""
        in_flight = sum(it.report.shape[1] - 1 for it in self._in_flight if it.decision and row in it.rows)
        begun = self._begun.block.tokens.shape[1] if self._begun else 0
        return max(row.written, row.reached + in_flight + begun)

    def _has_room(self) -> bool:
        """Whether the buffers have room for another round of any draft length."""
        return not self.kv or self.kv.fits([self._max_written(row) + LONGEST_VERIFY for row in self.rows])

    def _first(self, prompt: Prefilled) -> tuple[RoundState, InFlightRound]:
        """What the rows of a prompt start from, and their first tokens."""
        rows, count = prompt.rows, len(prompt.rows)
        lengths = mx.full((count,), len(rows[0].request.prompt), dtype=mx.int32)
        hidden = mx.repeat(prompt.hidden, count, axis=0)
        seen, adjustments = last_position(self._target, hidden), self._adjustments(rows, [[]] * count)
        choices = choose(self._make_sampler(rows), lengths - 1, seen, adjustments)
        report = mx.concatenate([choices, mx.zeros_like(choices)], axis=1)
        flight = InFlightRound(report, rows, None, self._logprobs(rows, seen, choices))
        return RoundState(lengths, choices[:, 0], hidden), flight

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
            [row.request.sampling for row in rows], config.logit_softcap, self._suppressed, config.vocab_size,
            [row.control is not None for row in rows],
        )  # fmt: skip


def _host(result: mx.array) -> list[list[int]]:
    """Waits for a report, or for drafts. While rows decode, the host reads token ids from the device only here."""
    return cast("list[list[int]]", result.tolist())
