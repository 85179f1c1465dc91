"""Who decodes when: requests wait, are prefilled, join the running batch, and leave it.

One `step` is at most one chunk of prefill and one round of the batch, so that running rows never wait for more than a
chunk. Requests are admitted in their order, as long as there is a free row and the KV of all rows at their full length
fits the budget; one that has to wait for an empty batch, or for room, is passed by a few behind it that needn't. Rows
whose reader is far behind make room for others until it has caught up.

Short prompts that wait together are prefilled in one block, padded: what a shorter row computes past its end lies above
its length and is never seen. Equal prompts that wait together are prefilled once.

Nothing runs by itself: the owner of the model (session/owner.py) calls `step`. Only `check` and `row` are
thread-safe.

Only "fast" requests share a batch. The other exactness levels promise bits that could depend on the batch's shape, so
they run alone and reuse no KV.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..checkpoint.sizes import format_bytes, rows_bytes
from ..errors import MemoryBudgetError
from ..kv import KVBuffers, RingState, kv_bytes
from ..kv.buffers import ring_slots
from ..models.drafter import Drafter
from ..models.target import Target
from .draft_length import DraftLengthPolicy
from .engine import Engine, Parked, Prefilled
from .prefill import CHUNK, CHUNK_BESIDE, prefill_block, prefill_by_chunks
from .prompt_cache import Entry, PromptCache
from .prompt_file import load_entry, save_entry
from .request import Request, Row, Stats, check_prompt, token_limit

MAX_ROWS = 8
"""Most rows of a batch unless told otherwise."""

MOST_PASSED = 8
"""Requests that may be admitted before one that came earlier."""

CACHE_BYTES = 2**30
"""Most bytes of KV that are kept for later prompts unless told otherwise."""


@dataclass
class _PrefillJob:
    """Prompts on their way into buffers of their own.

    Attributes:
        kv: The buffers, a row for each prompt.
        rows: For each prompt, who asked for it.
        start: Tokens that are in the buffers already.
        branch_point: A length below the prompt's at which a ring state is wanted; 0 for none.
        ring_states: Made, or found, so far.
    """

    kv: KVBuffers
    rows: list[list[Row]]
    start: int = 0
    branch_point: int = 0
    ring_states: tuple[RingState, ...] = ()

    @property
    def prompts(self) -> list[Sequence[int]]:
        return [rows[0].request.prompt for rows in self.rows]


class Scheduler:
    """Runs requests on a target and its drafter.

    Attributes:
        max_rows: Most rows of the batch, unless a row under way says otherwise.
        cache: KV of earlier prompts.
        engine: The running batch.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        suppress_tokens: Sequence[int] = (),
        max_rows: int = MAX_ROWS,
        kv_budget: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        policy: DraftLengthPolicy | None = None,
    ):
        """Makes a scheduler with nothing to do.

        Args:
            target: The target.
            drafter: Its drafter, or None.
            suppress_tokens: Token ids that are never chosen.
            max_rows: Most rows of the batch.
            kv_budget: Most bytes for the KV of all rows; None for no limit.
            cache_bytes: Most bytes of KV kept for later prompts.
            policy: What chooses draft lengths; None for one that knows no prices.
        """
        self.max_rows, self.cache = max_rows, PromptCache(cache_bytes)
        self._target, self._budget = target, kv_budget
        self._ring = ring_slots(target.config.sliding_window)
        self.engine = Engine(target, drafter, suppress_tokens, policy)
        self._waiting: deque[Row] = deque()
        # From the queue until the engine has them: whatever happens in between, they are told.
        self._admitted: list[Row] = []
        self._prefill: _PrefillJob | None = None
        self._parked: list[Parked] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        parked = [row for it in self._parked for row in it.rows]
        if self.engine.rows or self._admitted or any(row.done or not row.paused for row in parked):
            return True
        # Parked rows hold KV, and may leave no room for whom the queue has.
        return any(row.done for row in self._waiting) or self._next_waiting([], parked) is not None

    @property
    def kv_bytes(self) -> int:
        """Most bytes of KV that the rows under way come to."""
        requests = [row.request for row in self._under_way()]
        return self._kv_bytes(requests) if requests else 0

    def check(self, request: Request) -> None:
        """Checks that a request can be run here.

        Raises:
            PromptError: See `request.check_prompt`.
            MemoryBudgetError: Its KV wouldn't fit even alone.
        """
        check_prompt(request.prompt, self._target.config)
        needed = self._kv_bytes([request])
        if self._budget is not None and needed > self._budget:
            raise MemoryBudgetError(
                f"a prompt of {len(request.prompt)} tokens and up to {self._limit(request)} more need "
                f"{format_bytes(needed)} of KV, and there are {format_bytes(self._budget)} for it: "
                "ask for fewer tokens or shorten the prompt"
            )

    def row(self, request: Request, width: int = 0, stats: Stats | None = None) -> Row:
        """A row for `enqueue`; errors as in `check`. May be called from any thread.

        Args:
            request: What to generate.
            width: Rows that the batch may have while this one is under way, if more than `max_rows`.
            stats: Where to count; None for new ones.
        """
        self.check(request)
        return Row(request, stats or Stats(), self._limit(request), width)

    def enqueue(self, row: Row) -> None:
        """Takes a row into the queue."""
        self._waiting.append(row)

    def submit(self, request: Request, stats: Stats | None = None) -> Row:
        """Takes a request into the queue; errors as in `check`."""
        row = self.row(request, stats=stats)
        self.enqueue(row)
        return row

    def step(self) -> None:
        """A chunk of prefill, if somebody waits for it, and a round for the rows that run.

        Raises:
            BaseException: Whatever went wrong. All requests under way end with it (`Row.error`); those that wait stay
                in the queue.
        """
        try:
            self._leave()
            self._parked += self.engine.park()
            if self._prefill and all(row.done for row in self._admitted):
                self._keep_prefilled(self._prefill)
                self._prefill, self._admitted = None, []
            back = self._come_back()
            self._prefill = self._prefill or self._next_prefill([row for it in back for row in it.rows])
            # Not kept in a variable: the buffers that join are copied, and must not outlive that.
            self.engine.update_batch([*back, *(self._run_chunk(self._prefill) if self._prefill else [])])
            del back
            if not self._prefill:
                self._admitted = []
            if self.engine.rows:
                self.engine.round(waiting=bool(self._waiting))
        except BaseException as error:
            self._abandon(error)
            raise

    def close(self) -> None:
        """Ends all requests and lets go of all KV."""
        for row in (*self._waiting, *self._under_way()):
            row.cancel()
        self._waiting.clear()
        self._prefill, self._admitted, self._parked = None, [], []
        self.engine.clear()
        self.cache.clear()

    def save_prompt(self, prompt: Sequence[int], path: Path) -> Generator[None, None, None]:
        """Prefills a prompt, chunk by chunk, and writes its KV to a file, see `prompt_file`; errors as in `check`."""
        self.check(Request(prompt, 1))
        kv, _ = yield from prefill_by_chunks(self._target, prompt)
        save_entry(path, Entry(list(prompt), kv.row(0, kv.written), (), len(prompt)), self._target)

    def load_prompt(self, path: Path) -> int:
        """Takes a saved prompt into the cache; returns its number of tokens."""
        entry = load_entry(path, self._target)
        if entry.nbytes > self.cache.limit:
            raise MemoryBudgetError(
                f"{path} has {format_bytes(entry.nbytes)} of KV, and {format_bytes(self.cache.limit)} are kept for "
                "prompts: raise cache_bytes"
            )
        mx.eval(entry.kv.arrays())
        self.cache.put(entry)
        return len(entry.tokens)

    def stream(self, request: Request, stats: Stats | None = None) -> Generator[list[int], None, None]:
        """Runs a request and yields its new tokens, round by round, the stop token included."""
        row = self.submit(request, stats)
        try:
            while not row.done:
                self.step()
                if tokens := row.pop_unread():
                    yield tokens
        finally:
            row.cancel()

    def _leave(self) -> None:
        """Keeps the KV of rows that are done."""
        config, size = self._target.config, self._target.dtype.size
        for i, row in enumerate(self.engine.rows if self.engine.kv else ()):
            # A larger one would be copied in vain.
            if row.done and kv_bytes(config, row.committed, size) <= self.cache.limit:
                self._keep(row, self.engine.row_kv(i), row.committed_tokens, row.ring_states)

    def _keep(self, row: Row, kv: KVBuffers, held: list[int], ring_states: Sequence[RingState]) -> None:
        if row.request.exactness == "fast":
            entry = Entry(held, kv, tuple(ring_states), min(len(row.request.prompt), len(held)))
            self.cache.put(entry, self._ring_state_bytes())

    def _keep_prefilled(self, job: _PrefillJob) -> None:
        """Keeps what a prefill that is given up has done so far."""
        if len(job.rows) == 1 and job.start:
            row = job.rows[0][0]
            kv = job.kv.row(0, job.kv.written)
            self._keep(row, kv, list(row.request.prompt[: job.start]), job.ring_states)

    def _ring_state_bytes(self) -> int:
        """Bytes of the ring states that rows under way hold."""
        held = {id(it): it.nbytes for row in self._under_way() if not row.done for it in row.ring_states}
        return sum(held.values())

    def _abandon(self, error: BaseException) -> None:
        """Ends all requests under way."""
        for row in self._under_way():
            if not row.done:
                row.error, row.done = error, True
        self._prefill, self._admitted, self._parked = None, [], []
        self.engine.clear()

    def _under_way(self) -> list[Row]:
        return [*self.engine.rows, *self._admitted, *(row for it in self._parked for row in it.rows)]

    def _come_back(self) -> list[Parked]:
        """Parked rows that go on, as far as there are places for them; lets go of those that are done."""
        self._parked = [it for it in self._parked if not it.rows[0].done]
        running = [row for row in (*self.engine.rows, *self._admitted) if not row.done]
        free = self._width(running) - len(running)
        ready = [it for it in self._parked if not it.rows[0].paused]
        kinds = {row.request.exactness for row in (*running, *(it.rows[0] for it in ready))}
        back = ready[: max(0, free)] if kinds <= {"fast"} else ready[: int(not running)]
        self._parked = [it for it in self._parked if it not in back]
        return back

    def _width(self, rows: Iterable[Row]) -> int:
        """Rows that the batch may have with these."""
        return max([self.max_rows, *(row.width for row in rows)])

    def _next_prefill(self, back: list[Row]) -> _PrefillJob | None:
        """Takes the next requests from the queue, as many as can be prefilled together, beside rows that come back."""
        running = [row for row in self.engine.rows if not row.done] + back
        rows, idle = [*running, *(row for it in self._parked for row in it.rows)], not running
        first = self._next_waiting(running, rows)
        if not first:
            return None
        prompt, reuse = first.request.prompt, first.request.exactness == "fast"
        hit = self.cache.find(prompt) if reuse else None
        groups: list[list[Row]] = []
        row: Row | None = first
        while row:
            wanted = list(row.request.prompt)
            same = next((group for group in groups if list(group[0].request.prompt) == wanted), None)
            if same:
                same.append(row)
                row.stats.cached_tokens = len(wanted)
            elif not groups or (not hit and self._fits_block([*groups, [row]], idle)):
                groups.append([row])
            else:
                break
            running.append(row)
            rows.append(row)
            self._admitted.append(row)
            self._take(row)
            row = self._next_waiting(running, rows)
        if hit:
            first.stats.cached_tokens = hit.start
            return _PrefillJob(hit.kv, groups, hit.start, self._branch_point(prompt, hit.start), hit.ring_states)
        kv = KVBuffers(self._target.config, len(groups), self._target.dtype)
        return _PrefillJob(kv, groups, branch_point=self._branch_point(prompt, 0) if reuse and len(groups) == 1 else 0)

    def _next_waiting(self, running: list[Row], rows: list[Row]) -> Row | None:
        """Who may join next: the first in the queue, or one behind it that needn't wait while that one must.

        Args:
            running: The rows that have a place in the batch.
            rows: Those that have KV: these, and the parked ones.
        """
        while self._waiting and self._waiting[0].done:
            self._waiting.popleft()
        for row in self._waiting:
            if not row.done and self._may_join(row, running, rows):
                return row
            if not row.done and row.passed >= MOST_PASSED:
                break
        return None

    def _take(self, row: Row) -> None:
        """Takes a row out of the queue, and notes whom it has passed."""
        for other in self._waiting:
            if other is row:
                break
            other.passed += 1
        self._waiting.remove(row)

    def _may_join(self, row: Row, running: list[Row], rows: list[Row]) -> bool:
        if running and {it.request.exactness for it in (row, *running)} != {"fast"}:
            return False
        if len(running) >= self._width([*running, row]):
            return False
        return self._budget is None or self._kv_bytes([it.request for it in (*rows, row)]) <= self._budget

    def _fits_block(self, groups: list[list[Row]], idle: bool) -> bool:
        """Whether prompts can be prefilled together, in one chunk."""
        longest = max(len(group[0].request.prompt) for group in groups)
        # Rings that are full would lose what shorter prompts still need of them.
        return longest <= self._ring and longest * len(groups) <= (CHUNK if idle else CHUNK_BESIDE)

    def _branch_point(self, prompt: Sequence[int], start: int) -> int:
        """Where the prompt parts from an entry that couldn't be taken up there."""
        branch_point = min(self.cache.branch_point(prompt), len(prompt) - 1)
        # A ring state holds about a window, and cuts a chunk in two: it should save more than a bit.
        return branch_point if branch_point > start + self._target.config.sliding_window // 2 else 0

    def _run_chunk(self, job: _PrefillJob) -> list[Prefilled]:
        """Runs the next chunk of a prefill; returns the prompts that are ready to decode."""
        prompts, start = job.prompts, job.start
        longest = max(map(len, prompts))
        chunk = CHUNK_BESIDE if any(not row.done for row in self.engine.rows) else CHUNK
        end = longest if len(prompts) > 1 else min(start + chunk, longest)
        if start < job.branch_point < end:
            end = job.branch_point
        block = [[*prompt[start:end], *[0] * (end - max(len(prompt), start))] for prompt in prompts]
        with (
            self.engine.trace.host("prefill", tokens=len(block) * len(block[0])) if self.engine.trace else nullcontext()
        ):
            ends = [min(len(prompt), end) - start - 1 for prompt in prompts]
            hidden = prefill_block(self._target, job.kv, block, start, ends, max(rows[0].room for rows in job.rows))
        self.engine.disturb()
        job.start = end
        if end == job.branch_point:
            job.ring_states += (job.kv.ring_state(end),)
        if end < longest:
            return []
        self._prefill = None
        ready = []
        for i, (prompt, rows) in enumerate(zip(prompts, job.rows, strict=True)):
            rows = [row for row in rows if not row.done]
            kv = job.kv if len(prompts) == 1 else job.kv.row(i, len(prompt))
            ring_states = [*job.ring_states, kv.ring_state(len(prompt))]
            # At most half of what may be kept for later is kept by those who run.
            fits = 2 * (self._ring_state_bytes() + sum(it.nbytes for it in ring_states)) <= self.cache.limit
            for row in rows:
                row.ring_states = ring_states if fits else []
            if rows:
                ready.append(Prefilled(kv, hidden[i : i + 1], rows))
        self.cache.make_room(self._ring_state_bytes())
        return ready

    def _kv_bytes(self, requests: Sequence[Request]) -> int:
        """Bytes of the KV of some rows when all of them have reached their full length."""
        tokens = [len(request.prompt) + self._limit(request) for request in requests]
        return rows_bytes(self._target.config, tokens, self._target.dtype.size)

    def _limit(self, request: Request) -> int:
        return token_limit(request, self._target.config)
