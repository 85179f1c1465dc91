"""The scheduler: requests wait, are prefilled, join the running batch, and leave it.

One `step` is at most one chunk of prefill and one round of the batch, so running rows never wait for more than a chunk.
Who joins next is in waiting.py. Rows whose reader is far behind leave the batch until it has caught up.

Short prompts that wait together are prefilled in one padded block: what a shorter row computes past its end lies above
its committed length and is never seen. Equal prompts that wait together are prefilled once.

The scheduler has no thread: the owner of the model (session/owner.py) calls `step`. Rows are made, in any thread, by
its `capacity`.

Only "fast" requests share a batch. The other exactness levels promise results that could depend, in the last bit, on
the batch's shape, so they run alone and reuse no KV.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import mlx.core as mx

from ..checkpoint.sizes import format_bytes
from ..errors import MemoryBudgetError, detached
from ..kv import KVBuffers, RingState, kv_bytes
from ..kv.buffers import ring_slots
from ..models.drafter import Drafter
from ..models.target import Target
from .capacity import Capacity
from .draft_length import DraftLengthPolicy
from .engine import Engine
from .in_flight import Parked, Prefilled
from .prefill import CHUNK, CHUNK_BESIDE, PrefillJob, prefill_by_chunks
from .prompt_cache import Entry, Hit, PromptCache
from .prompt_file import load_entry, save_entry
from .request import Request, Row, Stats
from .waiting import Waiting

log = logging.getLogger(__name__)

MAX_ROWS = 8
"""Default for the most rows of a batch."""

CACHE_BYTES = 2**30
"""Default for the most bytes of KV kept for later prompts."""


class Scheduler:
    """Runs requests on a target and its drafter.

    Attributes:
        capacity: What it has room for.
        max_rows: Most rows of the batch, unless the `width` of an active row allows more.
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
    ) -> None:
        """Makes a scheduler without requests.

        Args:
            target: The target.
            drafter: Its drafter, or None.
            suppress_tokens: Token ids that are never chosen.
            max_rows: Most rows of the batch.
            kv_budget: Most bytes for the KV of all rows; None for no limit.
            cache_bytes: Most bytes of KV kept for later prompts.
            policy: Chooses draft lengths; None for a policy without measured prices.
        """
        self.max_rows, self.cache = max_rows, PromptCache(cache_bytes)
        self.capacity = Capacity(target.config, target.dtype.size, sys.maxsize if kv_budget is None else kv_budget)
        self._target = target
        self._ring = ring_slots(target.config.sliding_window)
        self.engine = Engine(target, drafter, suppress_tokens, policy)
        self._waiting = Waiting(self.capacity, max_rows)
        # Every row that has left the queue, until it has left the batch: a failure may catch it between two places.
        self._active: list[Row] = []
        self._prefill: PrefillJob | None = None
        self._parked: list[Parked] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        parked = self._parked_rows
        if self.engine.rows or self._prefill or any(row.done or not row.paused for row in parked):
            return True
        # Parked rows hold KV, which may leave no room for the waiting ones.
        return any(row.done for row in self._waiting) or self._waiting.next([], parked) is not None

    @property
    def kv_bytes(self) -> int:
        """KV bytes of all active rows at their full length."""
        requests = [row.request for row in self._active]
        return self.capacity.kv_bytes(requests) if requests else 0

    @property
    def needed(self) -> int:
        """The smallest KV budget with which all requests that are here can run."""
        return max([self.kv_bytes, *(self.capacity.kv_bytes([row.request]) for row in self._waiting)])

    def enqueue(self, row: Row) -> None:
        """Adds a row to the queue."""
        self._waiting.append(row)

    def submit(self, request: Request, stats: Stats | None = None) -> Row:
        """Adds a request to the queue and returns its row; errors as in `Capacity.check`."""
        row = self.capacity.row(request, stats=stats)
        self.enqueue(row)
        return row

    def step(self) -> None:
        """Runs a chunk of prefill, if a request needs one, and a round of the batch.

        Anything that fails ends the rows that it concerns (`Row.error`): those whose prompts are being prefilled, or
        those of the batch. All others go on.
        """
        try:
            self._cache_finished()
            self._parked += self.engine.park()
            if self._prefill and all(row.done for row in self._prefill.all_rows):
                self._cache_cancelled(self._prefill)
                self._prefill = None
            resumed = self._resume()
            # Not kept in a variable: the buffers of joining rows are copied, and should be freed right after.
            self.engine.update_batch([*resumed, *self._prefilled([row for it in resumed for row in it.rows])])
            del resumed
            if self.engine.rows:
                self.engine.round(waiting=bool(self._waiting))
            self._forget_ended()
        except BaseException as error:
            self._end(error, beside=[*self._parked_rows, *(self._prefill.all_rows if self._prefill else [])])
            self.engine.clear()
            self._forget_ended()

    def abandon(self, error: BaseException) -> None:
        """Ends all requests but those in the queue with an error: something may be half done. May be called again."""
        self._end(error)
        self._prefill, self._parked = None, []
        self.engine.clear()
        self._forget_ended()

    def close(self) -> None:
        """Cancels all requests and frees all KV."""
        for row in (*self._waiting, *self._active):
            row.cancel()
        self._waiting.clear()
        self._prefill, self._parked, self._active = None, [], []
        self.engine.clear()
        self.cache.clear()

    def save_prompt(self, prompt: Sequence[int], path: Path) -> Generator[None, None, None]:
        """Prefills a prompt and writes its KV to a file, see `prompt_file`.

        Args:
            prompt: Token ids.
            path: The file to write.

        Yields:
            After every chunk, so that other work can run in between.

        Raises:
            PromptError, MemoryBudgetError: See `Capacity.check`.
            OSError: The file can't be written.
        """
        self.capacity.check(Request(prompt, 1))
        kv, _ = yield from prefill_by_chunks(self._target, prompt)
        save_entry(path, Entry(list(prompt), kv.row(0, kv.written), (), len(prompt)), self._target)

    def load_prompt(self, path: Path) -> int:
        """Adds a saved prompt to the cache and returns its number of tokens.

        Raises:
            CheckpointError: See `prompt_file.load_entry`.
            MemoryBudgetError: The prompt's KV is larger than the cache.
        """
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
        """Runs a request by itself and yields its new tokens after each round, the stop token included.

        Errors as in `Capacity.check`, and whatever ended the row. Closing the generator cancels the request.
        """
        row = self.submit(request, stats)
        try:
            while not row.done:
                self.step()
                if tokens := row.pop_unread():
                    yield tokens
            if row.error:
                raise row.error
        finally:
            row.cancel()

    def _cache_finished(self) -> None:
        """Puts the KV of rows that are done into the cache; if that fails, it isn't kept."""
        config, size = self._target.config, self._target.dtype.size
        for i, row in enumerate(self.engine.rows if self.engine.kv else ()):
            # The cache would refuse a larger one, after it had been copied.
            if row.done and kv_bytes(config, row.committed, size) <= self.cache.limit:
                try:
                    self._cache_row(row, self.engine.row_kv(i), row.committed_tokens, row.ring_states)
                except Exception as error:
                    log.debug("the KV of a text could not be kept", exc_info=error)

    def _cache_row(self, row: Row, kv: KVBuffers, tokens: list[int], ring_states: Sequence[RingState]) -> None:
        if row.request.exactness == "fast":
            entry = Entry(tokens, kv, tuple(ring_states), min(len(row.request.prompt), len(tokens)))
            self.cache.put(entry, self._ring_state_bytes())

    def _cache_cancelled(self, job: PrefillJob) -> None:
        """Puts the KV of a cancelled prefill into the cache, as far as it got; if that fails, it isn't kept."""
        if len(job.rows) == 1 and job.start:
            row = job.rows[0][0]
            try:
                kv = job.kv.row(0, job.kv.written)
                self._cache_row(row, kv, list(row.request.prompt[: job.start]), job.ring_states)
            except Exception as error:
                log.debug("the KV of a prompt could not be kept", exc_info=error)

    def _ring_state_bytes(self) -> int:
        """Bytes of the ring states of active rows."""
        sizes = {id(it): it.nbytes for row in self._active if not row.done for it in row.ring_states}
        return sum(sizes.values())

    def _end(self, error: BaseException, beside: Iterable[Row] = ()) -> None:
        """Ends active rows with an error.

        Args:
            error: What happened.
            beside: The rows that don't end.
        """
        log.debug("a step has failed", exc_info=error)
        going_on = {id(row) for row in beside}
        for row in self._active:
            if not row.done and id(row) not in going_on:
                row.error, row.done = error, True
        detached(error)  # else its frames keep the KV
        mx.clear_cache()

    def _forget_ended(self) -> None:
        """Drops rows that are done and have left the batch."""
        held = {id(row) for row in self.engine.rows}
        self._active = [row for row in self._active if not row.done or id(row) in held]

    @property
    def _parked_rows(self) -> list[Row]:
        return [row for it in self._parked for row in it.rows]

    def _resume(self) -> list[Parked]:
        """Takes the parked rows that may rejoin the batch, and drops those that are done."""
        self._parked = [it for it in self._parked if not it.rows[0].done]
        coming = self._prefill.all_rows if self._prefill else ()
        running = [row for row in (*self.engine.rows, *coming) if not row.done]
        free = self._waiting.width(running) - len(running)
        ready = [it for it in self._parked if not it.rows[0].paused]
        kinds = {row.request.exactness for row in (*running, *(it.rows[0] for it in ready))}
        resumed = ready[: max(0, free)] if kinds <= {"fast"} else ready[: int(not running)]
        self._parked = [it for it in self._parked if it not in resumed]
        return resumed

    def _prefilled(self, resumed: list[Row]) -> list[Prefilled]:
        """Runs a chunk of a prefill, if a request needs one; returns the prompts that are ready to decode.

        Args:
            resumed: Rows that rejoin the batch in this step, and take places in it.
        """
        others = [*self.engine.rows, *self._parked_rows, *resumed]
        try:
            # Hidden while a chunk runs: if it fails, sliding layers have lost what it would be repeated from.
            job, self._prefill = self._prefill, None
            job = job or self._next_prefill(resumed)
            return self._run_chunk(job) if job else []
        except BaseException as error:
            self._prefill = None
            self._end(error, beside=others)
        return []

    def _next_prefill(self, resumed: list[Row]) -> PrefillJob | None:
        """Takes the next requests from the queue, as many as can be prefilled together.

        Args:
            resumed: Rows that rejoin the batch in this step, and take places in it.
        """
        running = [row for row in self.engine.rows if not row.done] + resumed
        rows, idle = [*running, *self._parked_rows], not running
        first = self._waiting.next(running, rows)
        if not first:
            return None
        prompt, reuse = first.request.prompt, first.request.exactness == "fast"
        hit = self._find_cached(prompt) if reuse else None
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
            self._active.append(row)
            self._waiting.take(row)
            row = self._waiting.next(running, rows)
        if hit:
            first.stats.cached_tokens = hit.start
            job = PrefillJob(hit.kv, groups, hit.start, self._branch_point(prompt, hit.start), hit.ring_states)
        else:
            kv = KVBuffers(self._target.config, len(groups), self._target.dtype)
            branch_point = self._branch_point(prompt, 0) if reuse and len(groups) == 1 else 0
            job = PrefillJob(kv, groups, branch_point=branch_point)
        job.report()
        return job

    def _find_cached(self, prompt: Sequence[int]) -> Hit | None:
        """What the cache has for a prompt; None also if that fails, since the prompt can be prefilled."""
        try:
            return self.cache.find(prompt)
        except Exception as error:
            log.debug("kept KV could not be used", exc_info=error)
            return None

    def _fits_block(self, groups: list[list[Row]], idle: bool) -> bool:
        """Whether prompts can be prefilled together, in one chunk."""
        longest = max(len(group[0].request.prompt) for group in groups)
        # In a longer block, a full ring would overwrite positions that the shorter prompts still need.
        return longest <= self._ring and longest * len(groups) <= (CHUNK if idle else CHUNK_BESIDE)

    def _branch_point(self, prompt: Sequence[int], start: int) -> int:
        """Where the prompt branches off a cached text, if a ring state is worth recording there; else 0.

        Args:
            prompt: Token ids.
            start: Number of its tokens that need no prefill.
        """
        branch_point = min(self.cache.branch_point(prompt), len(prompt) - 1)
        # A ring state takes the memory of about a window and splits a chunk in two, so it should save enough tokens.
        return branch_point if branch_point > start + self._target.config.sliding_window // 2 else 0

    def _run_chunk(self, job: PrefillJob) -> list[Prefilled]:
        """Runs the next chunk of a prefill; returns the prompts that are ready to decode."""
        end = job.next_end(CHUNK_BESIDE if any(not row.done for row in self.engine.rows) else CHUNK)
        with self.engine.span("prefill", tokens=len(job.rows) * (end - job.start)):
            hidden = job.advance(self._target, end)
        self.engine.disturb()
        if not job.finished:
            self._prefill = job
            return []
        ready = []
        for i, (prompt, requested) in enumerate(zip(job.prompts, job.rows, strict=True)):
            rows = [row for row in requested if not row.done]
            kv = job.kv if len(job.rows) == 1 else job.kv.row(i, len(prompt))
            ring_states = [*job.ring_states, kv.ring_state(len(prompt))]
            # Active rows hold at most half of the cache's bytes in ring states.
            fits = 2 * (self._ring_state_bytes() + sum(it.nbytes for it in ring_states)) <= self.cache.limit
            for row in rows:
                row.ring_states = ring_states if fits else []
            if rows:
                ready.append(Prefilled(kv, hidden[i : i + 1], rows))
        self.cache.make_room(self._ring_state_bytes())
        return ready
