"""Generates token ids for one request at a time, on KV buffers of its own.

An `Engine` remembers which tokens its buffers hold, and the sliding layers' rings as they were after the latest
prefill. A prompt that begins with what they hold is not prefilled again: this is how a chat's later turns start at
once, also when an answer was long or its thoughts are left out of the history.

The host builds round n + 1 while round n runs, and hands it over before it reads the tokens of round n; it learns of
a stop token one round late and drops the surplus. Handing over early has a price: MLX writes a buffer in place only
while nothing in flight reads it, and copies it otherwise. So when the buffers are large, round n + 1 is built early
but handed over only once round n is done.

Not here: text (api.py), several rows at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from ..config import TextConfig
from ..errors import PromptError
from ..kv import LONGEST_VERIFY, KVBuffers, Snapshot, longest_block
from ..models.drafter import Drafter
from ..models.target import Target
from .draft_length import MAX_AUTO_LENGTH, MAX_DRAFT_LENGTH, AutoLength, DraftLength, FixedLength
from .round import decode_round, first_state
from .sampling import Sampler, SamplingOptions, is_int

COPY_LIMIT = 32 * 2**20
"""Bytes of KV from which copying them costs more than the gap left by handing a round over late."""

EXACTNESS = ("fast", "invariant", "stepwise")

INVARIANT_WIDTH = MAX_AUTO_LENGTH + 1

assert MAX_DRAFT_LENGTH < LONGEST_VERIFY


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
        suppress_tokens: Tokens that are never chosen.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingOptions = SamplingOptions()
    draft_length: int | str = "auto"
    exactness: str = "fast"
    stop_tokens: frozenset[int] = frozenset()
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not is_int(self.max_tokens) or self.max_tokens < 1:
            raise PromptError(f"max_tokens must be a whole number from 1, not {self.max_tokens!r}")
        if self.exactness not in EXACTNESS:
            raise PromptError(f"exactness must be one of {', '.join(EXACTNESS)}, not {self.exactness!r}")
        if self.draft_length != "auto":
            most = INVARIANT_WIDTH - 1 if self.exactness == "invariant" else MAX_DRAFT_LENGTH
            if not is_int(self.draft_length) or not 0 <= self.draft_length <= most:
                raise PromptError(f"draft_length must be 'auto' or 0 to {most}, not {self.draft_length!r}")


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

    def count(self, drafted: int, kept: int) -> None:
        """Records a round."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += kept
        self.draft_lengths[drafted] = self.draft_lengths.get(drafted, 0) + 1
        self.accepted_by_position.extend([0] * (kept - len(self.accepted_by_position)))
        for j in range(kept):
            self.accepted_by_position[j] += 1


class Engine:
    """One row of KV buffers, and the requests that run on it one after the other."""

    def __init__(self, target: Target, drafter: Drafter | None):
        self._target, self._drafter = target, drafter
        self._chunk = longest_block(target.config)
        self._kv: KVBuffers | None = None
        self._held: list[int] = []
        # The latest prompt, and the rings when exactly it was committed: a long answer overwrites them.
        self._prompt: tuple[list[int], Snapshot, int] | None = None
        # Learn from every request what rounds cost, which depends on the exactness.
        self._auto = {exactness: AutoLength() for exactness in EXACTNESS}

    @property
    def kv_bytes(self) -> int:
        """Size of the KV buffers, in bytes."""
        return self._kv.nbytes if self._kv else 0

    def prefill(
        self, prompt: Sequence[int], keep: Callable[[mx.array], None] | None = None, reuse: bool = True
    ) -> tuple[KVBuffers, mx.array, int]:
        """Brings the prompt's KV into the buffers, chunk by chunk.

        Args:
            prompt: Token ids.
            keep: Called with every chunk's hidden states [1, L, hidden]; nothing is reused then.
            reuse: Whether KV that is there already may be used.

        Returns:
            The buffers, the hidden state [1, hidden] at the last position, and the number of cached tokens.

        Raises:
            PromptError: See `check_prompt`.
        """
        check_prompt(prompt, self._target.config)
        if self._kv is None:
            self._kv = KVBuffers(self._target.config, 1, self._target.dtype, self._chunk)
        kv = self._kv
        # The last prompt token always runs: its hidden state is needed.
        start = min(_common_prefix(self._held, prompt), len(prompt) - 1) if reuse and not keep else 0
        if not kv.can_rewind(start):
            start = self._rewind_to_prompt(kv, prompt, start)
        if not start:
            kv.written = 0  # what is there belongs to another text and will not be asked for
        cached, self._held, self._prompt = start, [], None
        while start < len(prompt):
            block = list(prompt[start : start + self._chunk])
            kv.reserve(start + len(block))
            hidden = self._target(mx.array([block], dtype=mx.int32), mx.array([start], dtype=mx.int32), kv)
            if keep:
                keep(hidden)
            mx.eval(kv.arrays(), hidden)
            start += len(block)
        self._held = list(prompt)
        self._prompt = self._held, kv.rings(), kv.written
        return kv, hidden[:, -1], cached

    def _rewind_to_prompt(self, kv: KVBuffers, prompt: Sequence[int], common: int) -> int:
        """Goes back to the end of the latest prompt, if the new one begins with it; returns where to start from."""
        if self._prompt is None:
            return 0
        tokens, rings, written = self._prompt
        if common < min(len(tokens), len(prompt) - 1):
            return 0
        kv.restore_rings(rings, written)
        return min(len(tokens), len(prompt) - 1)

    def stream(self, request: Request, stats: Stats) -> Generator[list[int], None, None]:
        """Generates tokens, round by round.

        Args:
            request: What to generate.
            stats: Filled in while running.

        Yields:
            The new tokens of each round, at least one, the stop token included.

        Raises:
            PromptError: See `check_prompt`.
        """
        prompt, target = list(request.prompt), self._target
        limit = token_limit(request, target.config)
        sampler = Sampler(
            [request.sampling], target.config.logit_softcap, request.suppress_tokens, target.config.vocab_size
        )
        policy = self._policy(request)
        width = INVARIANT_WIDTH if request.exactness == "invariant" else None

        mx.reset_peak_memory()
        started = time.perf_counter()
        # The widths of the blocks that made the KV can matter in the last bit.
        kv, hidden, stats.cached_tokens = self.prefill(prompt, reuse=request.exactness == "fast")
        stats.prompt_tokens = len(prompt)
        state = first_state(target, sampler, hidden, mx.array([len(prompt)], dtype=mx.int32))
        report, k = mx.stack([state.tokens, mx.zeros_like(state.tokens)], axis=1), None
        mx.async_eval(report)

        generated: list[int] = []
        clock = _Clock(started)
        # Upper bound of the row's committed tokens once everything handed over so far has run.
        reach = len(prompt)
        try:
            while True:
                next_k = min(policy.next(), max(limit - len(generated) - 1, 0))
                block = width or next_k + 1
                kv.reserve(reach + block)
                before: Snapshot | None = kv.snapshot()
                next_state, next_report = decode_round(
                    target, self._drafter, kv, sampler, state, next_k, width, request.exactness == "stepwise"
                )
                late = kv.nbytes > COPY_LIMIT
                if not late:
                    before = None
                    mx.async_eval(next_report, next_state.lengths, next_state.hidden)
                clock.wait()
                *choices, kept = cast("list[int]", report[0].tolist())
                seconds = clock.lap()
                tokens = _until_stop(choices[: kept + 1], request.stop_tokens, limit - len(generated))
                generated += tokens
                if k is None:
                    stats.prompt_seconds = clock.last - started
                    clock.first = clock.last
                else:
                    stats.count(k, min(kept, len(tokens)))
                    policy.observe(k, kept, seconds)
                stats.generated_tokens = len(generated)
                stats.generation_seconds = clock.last - clock.first
                stats.peak_memory_bytes = mx.get_peak_memory()
                done = len(generated) >= limit or generated[-1] in request.stop_tokens
                if done and before:
                    kv.restore(before)  # the round built ahead was never handed over: forget it
                elif late:
                    before = None  # lets go of the buffers, so that they are written in place
                    mx.async_eval(next_report, next_state.lengths, next_state.hidden)
                self._held = (prompt + generated)[:-1]
                yield tokens
                clock.resume()
                if done:
                    return
                reach = len(self._held) + block
                state, report, k = next_state, next_report, next_k
        finally:
            # A closed iterator leaves a round in flight; its writes lie above what is held.
            self._held = (prompt + generated)[:-1] if generated else prompt

    def _policy(self, request: Request) -> DraftLength:
        if self._drafter is None:
            return FixedLength(0)
        if request.draft_length != "auto":
            return FixedLength(int(request.draft_length))
        policy = self._auto[request.exactness]
        policy.begin()
        return policy


class _Clock:
    """Times rounds as the host sees them finish."""

    def __init__(self, started: float):
        self.first = self.last = self._resumed = self._waited_from = started

    def resume(self) -> None:
        """The consumer of the tokens has come back."""
        self._resumed = time.perf_counter()

    def wait(self) -> None:
        """The host has nothing left to do but to wait for the round."""
        self._waited_from = time.perf_counter()

    def lap(self) -> float | None:
        """The round is there: seconds since the one before, or None if the consumer, not the round, took them."""
        now = time.perf_counter()
        lap, waited, paused = now - self.last, now - self._waited_from, self._resumed - self.last
        self.last = now
        return None if paused > 0.1 * lap and waited < 0.05 * lap else lap


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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _until_stop(tokens: list[int], stop: frozenset[int], limit: int) -> list[int]:
    tokens = tokens[:limit]
    return next((tokens[: i + 1] for i, t in enumerate(tokens) if t in stop), tokens)
