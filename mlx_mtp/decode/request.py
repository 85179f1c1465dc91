"""What is asked of the decoder, and what it keeps count of: requests, their rows in a batch, statistics."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import mlx.core as mx

from ..checkpoint.sizes import ABOVE
from ..config import TextConfig
from ..errors import PromptError
from ..kv import RingState
from .limits import MAX_AUTO_LENGTH, MAX_DRAFT_LENGTH
from .sampling import SamplingOptions, is_int

EXACTNESS = ("fast", "invariant", "stepwise")

INVARIANT_WIDTH = MAX_AUTO_LENGTH + 1
"""Width of every verify block under exactness "invariant"."""


ROOM = 1024
"""Tokens that a row has room to grow by, or a quarter of what it has: seldom enough for copying it to cost nothing."""

_NUMBERS = count()


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt: Token ids.
        max_tokens: Most tokens to generate, at least 1.
        sampling: How tokens are chosen.
        draft_length: Tokens to draft a round, or "auto".
        exactness: "fast", "invariant" (one block width for the whole run) or "stepwise" (verifies token by token).
        stop_tokens: Generation ends after one of these.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingOptions = SamplingOptions()
    draft_length: int | str = "auto"
    exactness: str = "fast"
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not is_int(self.max_tokens) or self.max_tokens < 1:
            raise PromptError(f"max_tokens must be a whole number from 1, not {self.max_tokens!r}")
        check_draft_length(self.draft_length, self.exactness)


def check_draft_length(draft_length: object, exactness: object) -> None:
    """Checks what a request asks for.

    Raises:
        PromptError: There is no such exactness, or it takes no such draft length.
    """
    if exactness not in EXACTNESS:
        raise PromptError(f"exactness must be one of {', '.join(EXACTNESS)}, not {exactness!r}")
    if draft_length != "auto":
        most = INVARIANT_WIDTH - 1 if exactness == "invariant" else MAX_DRAFT_LENGTH
        if not is_int(draft_length) or not 0 <= draft_length <= most:
            raise PromptError(f"draft_length must be 'auto' or 0 to {most}, not {draft_length!r}")


@dataclass
class Stats:
    """What one generation took.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: How many of them were in the KV buffers already.
        generated_tokens: Tokens kept.
        rounds: Verify passes that yielded kept tokens.
        drafted: Tokens drafted in them.
        accepted: Drafts kept.
        accepted_by_position: At index j, how often the j-th draft of a round was kept.
        draft_lengths: Number of rounds by draft length.
        prompt_seconds: From the start to the first token.
        generation_seconds: From the first token to the last.
        peak_memory_bytes: Most memory MLX held during the generation, for whatever this process did with it.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    draft_lengths: dict[int, int] = field(default_factory=dict)
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def mean_accepted(self) -> float:
        """Drafts kept per round that drafted."""
        drafting = self.rounds - self.draft_lengths.get(0, 0)
        return self.accepted / drafting if drafting else 0.0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens processed per second, cached ones not counted."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        """Tokens per second after the first."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0

    def rates(self) -> dict[str, float]:
        """What follows from the other figures, by name."""
        return {name: getattr(self, name) for name in ("mean_accepted", "prompt_tps", "generation_tps")}

    def snapshot(self) -> Stats:
        """A copy, as it is now."""
        return replace(self, accepted_by_position=[*self.accepted_by_position], draft_lengths=dict(self.draft_lengths))

    def count(self, drafted: int, kept: int) -> None:
        """Records a round."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += kept
        self.draft_lengths[drafted] = self.draft_lengths.get(drafted, 0) + 1
        self.accepted_by_position.extend([0] * (kept - len(self.accepted_by_position)))
        for j in range(kept):
            self.accepted_by_position[j] += 1


class Row:
    """A request on its way: waiting, being prefilled, or a row of the batch.

    Attributes:
        number: Its own among all rows of the process.
        request: What was asked for.
        stats: What it has taken so far.
        limit: Most tokens it can generate, see `token_limit`.
        width: Rows that the batch may have while it is under way, if more than usual.
        tokens: Generated so far, the stop token included.
        unread: Those of them that `pop_unread` hasn't returned yet.
        done: Whether there will be no more: finished, or cancelled.
        cancelled: Whether it was ended before it was finished, as somebody wished.
        cancel_event: What else ends it, once set; whoever steps the scheduler looks at it.
        paused: Whether it is to make room until its reader has caught up.
        passed: How many requests behind it in the queue were admitted before it.
        error: Exception of the step that ended it; None if it finished or was cancelled.
        ring_states: Where its KV can be taken up again later, see `prompt_cache.Entry`.
        written: Positions that its buffers had been written to when it joined the batch, see `KVBuffers.written`. They
            may be more than it has committed: buffers of a longer text that begins like its prompt.
    """

    def __init__(self, request: Request, stats: Stats, limit: int, width: int = 0):
        self.number = next(_NUMBERS)
        self.request, self.stats, self.limit, self.width = request, stats, limit, width
        self.tokens: list[int] = []
        self.unread: list[int] = []
        self.done = self.cancelled = self.paused = False
        self.cancel_event: threading.Event | None = None
        self.passed = 0
        self.error: BaseException | None = None
        self.ring_states: list[RingState] = []
        self.written = 0
        stats.prompt_tokens = len(request.prompt)
        self._submitted = self._first = time.perf_counter()

    @property
    def committed(self) -> int:
        """Tokens whose KV is committed; the newest token's isn't yet."""
        return len(self.request.prompt) + max(len(self.tokens) - 1, 0)

    @property
    def room(self) -> int:
        """Positions to make room for when there is none: all that it may come to, unless these are many more."""
        most = len(self.request.prompt) + self.limit + ABOVE
        return min(most, self.committed + max(ROOM, self.committed // 4))

    @property
    def committed_tokens(self) -> list[int]:
        """Those tokens, prompt included."""
        return [*self.request.prompt, *self.tokens[:-1]]

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.limit - len(self.tokens)

    @property
    def draft_length(self) -> int | None:
        """The draft length that it asked for; None for "auto"."""
        return None if self.request.draft_length == "auto" else int(self.request.draft_length)

    def receive(self, choices: Sequence[int], kept: int, k: int | None) -> None:
        """Takes a round's outcome.

        Args:
            choices: The target's choices.
            kept: Drafts kept.
            k: Drafts made for this row; None after the prefill, whose only choice is the first token.
        """
        tokens = list(choices[: min(kept + 1, self.remaining)])
        stop = next((i for i, token in enumerate(tokens) if token in self.request.stop_tokens), None)
        tokens = tokens if stop is None else tokens[: stop + 1]
        self.tokens += tokens
        self.unread += tokens
        if stop is not None or not self.remaining:
            self.done = True
        now, stats = time.perf_counter(), self.stats
        if k is None:
            self._first = now
            stats.prompt_seconds = now - self._submitted
        else:
            stats.count(k, min(kept, len(tokens)))
        stats.generated_tokens = len(self.tokens)
        stats.generation_seconds = now - self._first
        stats.peak_memory_bytes = mx.get_peak_memory()

    def cancel(self) -> None:
        """Ends it, wherever it is; may be called from any thread, at any time."""
        if not self.done:
            self.cancelled = self.done = True

    def pop_unread(self) -> list[int]:
        """The tokens that came since the last call."""
        unread, self.unread = self.unread, []
        return unread


def check_prompt(prompt: Sequence[int], config: TextConfig) -> None:
    """Checks that a prompt can be run.

    Raises:
        PromptError: Empty, longer than the context, or a token id outside the vocabulary.
    """
    if not prompt:
        raise PromptError("the prompt is empty: give it at least one token")
    if len(prompt) > config.max_positions:
        raise PromptError(f"the prompt has {len(prompt)} tokens, the model's context only {config.max_positions}")
    if (bad := next((t for t in prompt if not 0 <= t < config.vocab_size), None)) is not None:
        raise PromptError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")


def token_limit(request: Request, config: TextConfig) -> int:
    """Most tokens the request can generate: its own limit, or what the context has room for."""
    # The last token generated needs no room: it is never read.
    return min(request.max_tokens, config.max_positions - len(request.prompt) + 1)
