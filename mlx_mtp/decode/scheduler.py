"""Who decodes when: requests wait, are prefilled, join the running batch, and leave it.

One `step` is at most one chunk of prefill and one round of the batch, so that running rows never wait for more than a
chunk. Requests are admitted in their order, as long as there is a free row and the KV of all rows at their full length
fits the budget. Short prompts that wait together are prefilled in one block, padded: what a shorter row computes past
its end lies above its length and is never seen. Equal prompts that wait together are prefilled once.

Nothing runs by itself: whoever wants tokens calls `step`. Not thread-safe.

Only "fast" requests share a batch. The other exactness levels promise bits that could depend on the batch's shape, so
they run alone and reuse no KV.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import MemoryBudgetError
from ..kv import LONGEST_VERIFY, Checkpoint, KVBuffers, longest_block
from ..models.drafter import Drafter
from ..models.target import Target
from ..sizes import in_words, row_bytes
from .draft_length import DraftLengthPolicy
from .engine import Engine, Prefilled
from .kv_file import load_entry, save_entry
from .prefill import prefill, prefill_block
from .prompt_cache import Entry, PromptCache
from .request import Request, Row, Stats, check_prompt, token_limit
from .trace import Trace

MAX_ROWS = 8
"""Most rows of a batch unless told otherwise."""

CACHE_BYTES = 2**30
"""Most bytes of KV that are kept for later prompts unless told otherwise."""


@dataclass
class _Prefill:
    """Prompts on their way into buffers of their own.

    Attributes:
        kv: The buffers, a row for each prompt.
        rows: For each prompt, who asked for it.
        start: Tokens that are in the buffers already.
        parting: A length below the prompt's at which a checkpoint is wanted; 0 for none.
        checkpoints: Made, or found, so far.
    """

    kv: KVBuffers
    rows: list[list[Row]]
    start: int = 0
    parting: int = 0
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def prompts(self) -> list[Sequence[int]]:
        return [rows[0].request.prompt for rows in self.rows]


class Scheduler:
    """Runs requests on a target and its drafter.

    Attributes:
        max_rows: Most rows of the batch.
        cache: KV of earlier prompts.
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
        self._engine = Engine(target, drafter, suppress_tokens, policy)
        self._chunk = longest_block(target.config)
        self._waiting: deque[Row] = deque()
        # From the queue until the engine has them: whatever happens in between, they are told.
        self._admitted: list[Row] = []
        self._prefill: _Prefill | None = None

    @property
    def trace(self) -> Trace | None:
        """Where to record what happens when."""
        return self._engine.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._engine.trace = trace

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
                f"{in_words(needed)} of KV, and there are {in_words(self._budget)} for it: ask for fewer tokens or "
                "shorten the prompt"
            )

    def submit(self, request: Request, stats: Stats | None = None) -> Row:
        """Takes a request into the queue; errors as in `check`."""
        self.check(request)
        row = Row(request, stats or Stats(), self._limit(request))
        self._waiting.append(row)
        return row

    def step(self) -> None:
        """A chunk of prefill, if somebody waits for it, and a round for the rows that run.

        Raises:
            BaseException: Whatever went wrong, a KeyboardInterrupt included. All requests under way end with it
                (`Row.error`); those that wait stay in the queue.
        """
        try:
            self._leave()
            if self._prefill and all(row.done for row in self._admitted):
                self._keep_prefilled(self._prefill)
                self._prefill, self._admitted = None, []
            self._prefill = self._prefill or self._next_prefill()
            # Not kept in a variable: the buffers that join are copied, and must not outlive that.
            self._engine.regroup(self._run_chunk(self._prefill) if self._prefill else [])
            if not self._prefill:
                self._admitted = []
            if self._engine.rows:
                self._engine.round(waiting=bool(self._waiting))
        except BaseException as error:
            self._abandon(error)
            raise

    def close(self) -> None:
        """Ends all requests and lets go of all KV."""
        for row in (*self._waiting, *self._under_way()):
            row.cancel()
        self._waiting.clear()
        self._prefill, self._admitted = None, []
        self._engine.clear()
        self.cache.clear()

    def save_prompt(self, prompt: Sequence[int], path: Path) -> None:
        """Prefills a prompt and writes its KV to a file, see `kv_file`; errors as in `check`."""
        self.check(Request(prompt, 1))
        kv, _ = prefill(self._target, prompt)
        save_entry(path, Entry(list(prompt), kv.row(0, kv.written), (), len(prompt)), self._target)

    def load_prompt(self, path: Path) -> int:
        """Takes a saved prompt into the cache; returns its number of tokens."""
        entry = load_entry(path, self._target)
        if entry.nbytes > self.cache.limit:
            raise MemoryBudgetError(
                f"{path} has {in_words(entry.nbytes)} of KV, and {in_words(self.cache.limit)} are kept for prompts: "
                "raise cache_bytes"
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
                if tokens := row.take():
                    yield tokens
        finally:
            row.cancel()

    def _leave(self) -> None:
        """Keeps the KV of rows that are done."""
        kv = self._engine.kv
        if kv is None or kv.nbytes > self.cache.limit * len(self._engine.rows):
            return  # there is nothing to keep, or it would be copied in vain
        for i, row in enumerate(self._engine.rows):
            if row.done:
                self._keep(row, self._engine.row_kv(i), row.held, row.checkpoints)

    def _keep(self, row: Row, kv: KVBuffers, held: list[int], checkpoints: Sequence[Checkpoint]) -> None:
        if row.request.exactness == "fast":
            entry = Entry(held, kv, tuple(checkpoints), min(len(row.request.prompt), len(held)))
            self.cache.put(entry, self._checkpoint_bytes())

    def _keep_prefilled(self, job: _Prefill) -> None:
        """Keeps what a prefill that is given up has done so far."""
        if len(job.rows) == 1 and job.start:
            row = job.rows[0][0]
            kv = job.kv.row(0, job.kv.written)
            self._keep(row, kv, list(row.request.prompt[: job.start]), job.checkpoints)

    def _checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints that rows under way hold."""
        held = {id(it): it.nbytes for row in self._under_way() if not row.done for it in row.checkpoints}
        return sum(held.values())

    def _abandon(self, error: BaseException) -> None:
        """Ends all requests under way; after an interruption, what they have committed is as good as ever."""
        for row in self._under_way():
            if not row.done:
                row.error, row.done = error, True
        prefill, self._prefill, self._admitted = self._prefill, None, []
        if isinstance(error, KeyboardInterrupt):
            if prefill:
                self._keep_prefilled(prefill)
            self._leave()
        self._engine.clear()

    def _under_way(self) -> list[Row]:
        return [*self._engine.rows, *self._admitted]

    def _next_prefill(self) -> _Prefill | None:
        """Takes the next requests from the queue, as many as can be prefilled together."""
        rows = [row for row in self._engine.rows if not row.done]
        self._skip_cancelled()
        if not self._waiting or not self._may_join(self._waiting[0], rows):
            return None
        first, idle = self._waiting[0], not rows
        prompt, reuse = first.request.prompt, first.request.exactness == "fast"
        hit = self.cache.find(prompt) if reuse else None
        groups: list[list[Row]] = []
        while self._waiting and self._may_join(row := self._waiting[0], rows):
            same = next((group for group in groups if list(group[0].request.prompt) == list(row.request.prompt)), None)
            if same:
                same.append(row)
                row.stats.cached_tokens = len(row.request.prompt)
            elif not groups or (not hit and self._fits_block([*groups, [row]], idle)):
                groups.append([row])
            else:
                break
            rows.append(row)
            self._admitted.append(row)
            self._waiting.popleft()
            self._skip_cancelled()
        if idle:
            mx.reset_peak_memory()
        if hit:
            first.stats.cached_tokens = hit.start
            return _Prefill(hit.kv, groups, hit.start, self._parting(prompt, hit.start), hit.checkpoints)
        kv = KVBuffers(self._target.config, len(groups), self._target.dtype, self._chunk)
        return _Prefill(kv, groups, parting=self._parting(prompt, 0) if reuse and len(groups) == 1 else 0)

    def _skip_cancelled(self) -> None:
        while self._waiting and self._waiting[0].done:
            self._waiting.popleft()

    def _may_join(self, row: Row, rows: list[Row]) -> bool:
        if rows and {it.request.exactness for it in (row, *rows)} != {"fast"}:
            return False
        if len(rows) >= self.max_rows:
            return False
        return self._budget is None or self._kv_bytes([it.request for it in (*rows, row)]) <= self._budget

    def _fits_block(self, groups: list[list[Row]], idle: bool) -> bool:
        """Whether prompts can be prefilled in one block: of a chunk's tokens, or of several if nobody has to wait."""
        longest = max(len(group[0].request.prompt) for group in groups)
        # No more than a few: the block's activations take memory that nobody has counted.
        return longest <= self._chunk and longest * len(groups) <= self._chunk * (MAX_ROWS if idle else 1)

    def _parting(self, prompt: Sequence[int], start: int) -> int:
        """Where the prompt parts from an entry that couldn't be taken up there."""
        parting = min(self.cache.parting(prompt), len(prompt) - 1)
        return parting if parting > start + self._chunk else 0

    def _run_chunk(self, job: _Prefill) -> list[Prefilled]:
        """Runs the next chunk of a prefill; returns the prompts that are ready to decode."""
        prompts, start = job.prompts, job.start
        end = min(start + self._chunk, max(map(len, prompts)))
        if start < job.parting < end:
            end = job.parting
        block = [[*prompt[start:end], *[0] * (end - max(len(prompt), start))] for prompt in prompts]
        with self.trace.host("prefill", tokens=len(block) * len(block[0])) if self.trace else nullcontext():
            hidden = prefill_block(self._target, job.kv, block, start, max(rows[0].room for rows in job.rows))
        self._engine.disturb()
        job.start = end
        if end == job.parting:
            job.checkpoints += (job.kv.checkpoint(end),)
        if end < max(map(len, prompts)):
            return []
        self._prefill = None
        ready = []
        for i, (prompt, rows) in enumerate(zip(prompts, job.rows, strict=True)):
            rows = [row for row in rows if not row.done]
            kv = job.kv if len(prompts) == 1 else job.kv.row(i, len(prompt))
            checkpoint = kv.checkpoint(len(prompt))
            checkpoints = [*job.checkpoints, checkpoint]
            # At most half of what may be kept for later is kept by those who run.
            fits = 2 * (self._checkpoint_bytes() + sum(it.nbytes for it in checkpoints)) <= self.cache.limit
            for row in rows:
                row.checkpoints = checkpoints if fits else []
            if rows:
                ready.append(Prefilled(kv, hidden[i : i + 1, len(prompt) - start - 1], rows))
        self.cache.make_room(self._checkpoint_bytes())
        return ready

    def _kv_bytes(self, requests: Sequence[Request]) -> int:
        """Bytes of the KV of some rows when all of them have reached their full length."""
        longest = max(len(request.prompt) + self._limit(request) for request in requests)
        if len(requests) > 1:
            # Drafts are as long as the row with most to go wants them: one near its end has no use for them, but room.
            longest += LONGEST_VERIFY
        return len(requests) * row_bytes(self._target.config, longest, self._target.dtype.size)

    def _limit(self, request: Request) -> int:
        return token_limit(request, self._target.config)
