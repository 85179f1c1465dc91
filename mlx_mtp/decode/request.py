"""Requests to the decoder, their rows in a batch, and statistics."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import mlx.core as mx

from ..checkpoint.sizes import ABOVE
from ..config import TextConfig
from ..errors import MTPError, PromptError, detached
from ..kv import RingState
from .adjustments import Adjustment, RowControl
from .host_drafts import HostDrafts, Offer
from .limits import MAX_AUTO_LENGTH, MAX_DRAFT_LENGTH, is_int
from .logprobs import TokenLogprob
from .sampling import SamplingOptions

log = logging.getLogger(__name__)

EXACTNESS = ("fast", "invariant", "stepwise")

INVARIANT_WIDTH = MAX_AUTO_LENGTH + 1
"""Width of every verify block under exactness "invariant"."""

ROOM = 1024
"""Positions by which a row's buffers grow at least (else by a quarter): rarely enough for copying to be free."""

_GREEDY = SamplingOptions()

_NUMBERS = count()


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt: Token ids.
        max_tokens: Most tokens to generate, at least 1.
        sampling: How tokens are chosen.
        draft_length: Tokens to draft in each round, or "auto".
        exactness: "fast", "invariant" (one block width for the whole run) or "stepwise" (verifies token by token).
        stop_tokens: Generation ends after one of these token ids.
        control: Makes the row's control, from the prompt; None for none.
        logprobs: Whether log-probabilities are wanted, and of how many tokens beside the chosen one; None for none.
        prediction: Token ids that most of the text is expected to be; empty for no expectation.
        prefill_progress: Called with the number of prompt tokens that are prefilled, and of all; None for no calls.

    Raises:
        PromptError: max_tokens, exactness or draft_length is out of its range.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingOptions = _GREEDY
    draft_length: int | str = "auto"
    exactness: str = "fast"
    stop_tokens: frozenset[int] = frozenset()
    control: Callable[[Sequence[int]], RowControl] | None = None
    logprobs: int | None = None
    prediction: Sequence[int] = ()
    prefill_progress: Callable[[int, int], object] | None = None

    def __post_init__(self) -> None:
        if not is_int(self.max_tokens) or self.max_tokens < 1:
            raise PromptError(f"max_tokens must be a whole number from 1, not {self.max_tokens!r}")
        check_draft_length(self.draft_length, self.exactness)


def check_draft_length(draft_length: object, exactness: object) -> None:
    """Checks a request's draft length and exactness.

    Raises:
        PromptError: The exactness is unknown, or doesn't allow this draft length.
    """
    if exactness not in EXACTNESS:
        raise PromptError(f"exactness must be one of {', '.join(EXACTNESS)}, not {exactness!r}")
    if draft_length != "auto":
        most = INVARIANT_WIDTH - 1 if exactness == "invariant" else MAX_DRAFT_LENGTH
        if not is_int(draft_length) or not 0 <= draft_length <= most:
            raise PromptError(f"draft_length must be 'auto' or 0 to {most}, not {draft_length!r}")


@dataclass
class Stats:
    """Statistics of one generation.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Prompt tokens whose KV was reused instead of prefilled.
        generated_tokens: Tokens of the text, the stop token included.
        rounds: Verify passes that gave tokens to this text.
        drafted: Tokens drafted in these rounds.
        accepted: Drafts accepted; bonus tokens aren't counted.
        accepted_by_position: At index j, how often the draft at position j of a round was accepted.
        draft_lengths: Number of rounds by draft length.
        drafted_by_source: Tokens drafted by where they came from: "drafter", or a source of `host_drafts`.
        accepted_by_source: Drafts accepted, likewise.
        prompt_seconds: From submission to the first token.
        generation_seconds: From the first token to the last.
        peak_memory_bytes: Peak memory of MLX in this process so far.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    draft_lengths: dict[int, int] = field(default_factory=dict)
    drafted_by_source: dict[str, int] = field(default_factory=dict)
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def mean_accepted(self) -> float:
        """Accepted drafts per round that drafted, without the bonus token."""
        drafting = self.rounds - self.draft_lengths.get(0, 0)
        return self.accepted / drafting if drafting else 0.0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens prefilled per second; cached ones don't count."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        """Tokens per second after the first."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0

    def rates(self) -> dict[str, float]:
        """The properties that are computed from the other statistics, by name."""
        return {name: getattr(self, name) for name in ("mean_accepted", "prompt_tps", "generation_tps")}

    def snapshot(self) -> Stats:
        """A copy that later rounds don't change."""
        return replace(
            self,
            accepted_by_position=[*self.accepted_by_position],
            draft_lengths=dict(self.draft_lengths),
            drafted_by_source=dict(self.drafted_by_source),
            accepted_by_source=dict(self.accepted_by_source),
        )

    def count(self, drafted: int, accepted: int, source: str = "drafter") -> None:
        """Records a round with `drafted` drafts, of which `accepted` were accepted, and where they came from."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        if drafted:
            self.drafted_by_source[source] = self.drafted_by_source.get(source, 0) + drafted
            self.accepted_by_source[source] = self.accepted_by_source.get(source, 0) + accepted
        self.draft_lengths[drafted] = self.draft_lengths.get(drafted, 0) + 1
        self.accepted_by_position.extend([0] * (accepted - len(self.accepted_by_position)))
        for j in range(accepted):
            self.accepted_by_position[j] += 1


class Row:
    """A request in progress: waiting, being prefilled, or a row of the batch.

    Attributes:
        number: Identifies the row in this process.
        request: What to generate.
        stats: Its statistics so far.
        limit: Most tokens that it can generate, see `token_limit`.
        width: Rows that the batch may have while this row is active, if more than the scheduler's `max_rows`.
        tokens: The tokens generated so far, the stop token included.
        drafted: For each of `tokens`, whether it was an accepted draft. Only ever grows.
        unread: Those of `tokens` that `pop_unread` hasn't returned yet.
        logprobs: One for each of `tokens`, if they were asked for. Only ever grows.
        control: Steers its tokens; None for none.
        host_drafts: Drafts that the host knows; None if the request has a draft length of its own.
        read: Number of `tokens` that its reader has taken. Written by the reader's thread.
        done: Whether it gets no more tokens: it has finished, failed or been cancelled.
        cancelled: Whether it was cancelled before it finished.
        cancel_event: Cancels the row once it is set; the scheduler's owner checks it.
        paused: Whether the row should leave the batch until its reader has caught up.
        passed: Number of requests behind it in the queue that were admitted before it.
        error: Exception of the step that ended it; None if it finished or was cancelled.
        ring_states: States to which its sliding layers can be rewound, see `prompt_cache.Entry`.
        reached: Committed tokens as the device counts them in the rounds that were read: more than `committed` in a row
            that has ended, whose last drafts don't all belong to its text.
        written: Positions that were written in its buffers by then, as a count, see `KVBuffers.written`: those of
            rejected drafts count, and those of a longer text that its prompt's KV comes from.
    """

    def __init__(self, request: Request, stats: Stats, limit: int, width: int = 0) -> None:
        """Makes a waiting row; the time to its first token counts from here.

        Args:
            request: What to generate.
            stats: Where to count.
            limit: Most tokens to generate, at most `token_limit`.
            width: See the attribute.
        """
        self.number = next(_NUMBERS)
        self.request, self.stats, self.limit, self.width = request, stats, limit, width
        self.tokens: list[int] = []
        self.drafted: list[bool] = []
        self.unread: list[int] = []
        self.read = 0
        self.logprobs: list[TokenLogprob] = []
        self.control = request.control(request.prompt) if request.control else None
        automatic = request.draft_length == "auto" and request.exactness == "fast"
        self.host_drafts = HostDrafts(request.prompt, request.prediction, self.control) if automatic else None
        self.done = self.cancelled = self.paused = False
        self.cancel_event: threading.Event | None = None
        self.passed = 0
        self.error: BaseException | None = None
        self.ring_states: list[RingState] = []
        self.reached, self.written = len(request.prompt), 0
        stats.prompt_tokens = len(request.prompt)
        self._submitted = self._first = time.perf_counter()

    @property
    def committed(self) -> int:
        """Number of tokens whose KV is committed: all but the newest."""
        return len(self.request.prompt) + max(len(self.tokens) - 1, 0)

    @property
    def room(self) -> int:
        """Positions that new buffers should have room for: the row's full length, unless that is far ahead."""
        most = len(self.request.prompt) + self.limit + ABOVE
        return min(most, self.committed + max(ROOM, self.committed // 4))

    @property
    def committed_tokens(self) -> list[int]:
        """The tokens whose KV is committed, the prompt's included."""
        return [*self.request.prompt, *self.tokens[:-1]]

    @property
    def remaining(self) -> int:
        """Number of tokens that it may still generate."""
        return self.limit - len(self.tokens)

    @property
    def draft_length(self) -> int | None:
        """The fixed draft length of the request; None for "auto"."""
        return None if self.request.draft_length == "auto" else int(self.request.draft_length)

    def count_positions(self, width: int, accepted: int) -> None:
        """Counts what a round has written and committed, whether the row has ended meanwhile or not.

        Args:
            width: Width of its verify block.
            accepted: Number of accepted drafts.
        """
        self.written = max(self.written, self.reached + width)
        self.reached += accepted + 1

    def receive(
        self,
        choices: Sequence[int],
        accepted: int,
        k: int | None,
        scores: Sequence[tuple[float, list[tuple[int, float]]]] | None = None,
        given: Offer | None = None,
    ) -> None:
        """Adds the tokens of a round, up to a stop token or the limit, and counts it.

        Args:
            choices: The target's choices.
            accepted: Number of accepted drafts; the bonus token comes on top.
            k: Draft length of this row; None after the prefill, whose only choice is the first token.
            scores: For each choice, its log-probability and the best tokens' (see `Logprobs.host`); None for none.
            given: Its drafts, if the host made them.
        """
        tokens = list(choices[: min(accepted + 1, self.remaining)])
        stop = next((i for i, token in enumerate(tokens) if token in self.request.stop_tokens), None)
        tokens = tokens if stop is None else tokens[: stop + 1]
        if scores and (count := self.request.logprobs) is not None:
            self.logprobs += [
                TokenLogprob(token, own, top[:count]) for token, (own, top) in zip(tokens, scores, strict=False)
            ]
        self.drafted += [i < accepted for i in range(len(tokens))]  # before `tokens`, which other threads read
        self.tokens += tokens
        self.unread += tokens
        if self.control:
            try:
                self.control.advance(tokens)
            except BaseException as error:  # whatever it is, it concerns this row alone
                self.fail(error)
        if self.host_drafts:
            try:
                self.host_drafts.advance(tokens)
            except Exception as error:
                self._draft_without_host(error)
        if stop is not None or not self.remaining:
            self.done = True
        now, stats = time.perf_counter(), self.stats
        if k is None:
            self._first = now
            stats.prompt_seconds = now - self._submitted
        else:
            stats.count(k, min(accepted, len(tokens)), given.source if given else "drafter")
        stats.generated_tokens = len(self.tokens)
        stats.generation_seconds = now - self._first
        stats.peak_memory_bytes = mx.get_peak_memory()

    def adjustments(self, drafts: Sequence[int]) -> list[Adjustment] | None:
        """What is done to its logits after each beginning of some drafts, see `RowControl`; None for nothing."""
        if not self.control or self.done:
            return None
        try:
            found = self.control.adjustments(drafts)
        except BaseException as error:
            self.fail(error)
            return None
        return [replace(it, process=partial(self._processed, it.process)) if it.process else it for it in found]

    def _processed(self, process: Callable[[mx.array], mx.array], logits: mx.array) -> mx.array:
        """Logits as a function of the caller's changes them; if it fails, the row ends, and they stay as they are."""
        try:
            if self.done:
                return logits
            processed = process(logits)
            if not isinstance(processed, mx.array) or processed.shape != logits.shape:
                raise PromptError(f"a logits processor must return an array of shape {logits.shape}")
            return processed.astype(mx.float32)
        except BaseException as error:
            self.fail(error)
            return logits

    def report_prefill(self, done: int) -> None:
        """Tells the caller how many tokens of the prompt are prefilled; a callback that fails ends the row."""
        if self.request.prefill_progress and not self.done:
            total = len(self.request.prompt)
            try:
                self.request.prefill_progress(min(done, total), total)
            except BaseException as error:
                self.fail(error, "prefill_progress")

    def offer(self, most: int) -> Offer | None:
        """At most so many drafts that the host knows; None if it knows none."""
        try:
            return self.host_drafts.offer(most) if self.host_drafts else None
        except Exception as error:
            self._draft_without_host(error)
            return None

    def _draft_without_host(self, error: Exception) -> None:
        """Goes on without the host's drafts after one of them failed: they never change the text."""
        log.debug("the host's drafts have failed", exc_info=error)
        self.host_drafts = None

    def fail(self, error: BaseException, failing: str = "a rule of the text") -> None:
        """Ends the row with an error of its own, a `PromptError`: what it asks for doesn't work.

        Args:
            error: What was raised.
            failing: What raised it, for the message.
        """
        failed = PromptError(str(error) if isinstance(error, MTPError) else f"{failing} failed: {error!r}")
        failed.__cause__ = detached(error)
        self.error, self.done = failed, True

    def cancel(self) -> None:
        """Ends the row, wherever it is. Thread-safe."""
        if not self.done:
            self.cancelled = self.done = True

    def pop_unread(self) -> list[int]:
        """The tokens since the last call."""
        unread, self.unread = self.unread, []
        return unread


def check_prompt(prompt: Sequence[int], config: TextConfig) -> None:
    """Checks that a prompt can be run.

    Raises:
        PromptError: It is empty, longer than the context, or has a token id outside the vocabulary.
    """
    if not prompt:
        raise PromptError("the prompt is empty: give it at least one token")
    if len(prompt) > config.max_positions:
        raise PromptError(f"the prompt has {len(prompt)} tokens, the model's context only {config.max_positions}")
    if (bad := next((t for t in prompt if not 0 <= t < config.vocab_size), None)) is not None:
        raise PromptError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")


def token_limit(request: Request, config: TextConfig) -> int:
    """Most tokens that the request can generate: its `max_tokens`, or what the context has room for."""
    # The last generated token needs no position: it is never run through the target.
    return min(request.max_tokens, config.max_positions - len(request.prompt) + 1)
