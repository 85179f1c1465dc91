"""Compares texts with and without drafting, in batches and alone, as `mlx-mtp verify` does.

In turns, each with other prompts, another seed and either sampling: plain decoding of each prompt alone is what all
settings must give. The turns go on until the time is up, and every other one has longer texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

import mlx.core as mx

from ..decode.limits import MAX_AUTO_LENGTH
from ..decode.noise import row_seed
from ..decode.request import INVARIANT_WIDTH
from ..decode.sampling import SamplingOptions
from ..models.self_test import Finding, self_test
from ..session.answer import Generation
from .prompts import question
from .scores import Agreement, agreement, gap, margin

if TYPE_CHECKING:
    from ..api import MTPModel

SAMPLINGS = {"greedy": SamplingOptions(), "sampled": SamplingOptions(temperature=1.0, top_k=64)}
"""How the tokens of a turn are chosen. 64 is Gemma's own top-k; top-p would only leave out what is seldom drawn."""

SHORTEST, LONGEST = 32, 256
"""Tokens of a text in the first turns, which must all fit into the time, and the most."""

TEXT_TOKENS = 40
"""Tokens of the text whose scores are compared."""


@dataclass(frozen=True)
class Setting:
    """A way to decode.

    Attributes:
        exactness: See `GenerationOptions`.
        rows: Prompts that decode together.
        draft_length: See `GenerationOptions`.
    """

    exactness: str
    rows: int
    draft_length: int | str

    def __str__(self) -> str:
        return f"{self.exactness}, batch {self.rows}, draft length {self.draft_length}"


PLAIN = Setting("fast", 1, 0)


@dataclass(frozen=True)
class Mismatch:
    """The first token at which a text differs from the one that it is compared with.

    Attributes:
        setting: What gave the text.
        against: What it is compared with: "plain", or for the second text of exactness "invariant", "invariant".
        sampling: "greedy" or "sampled".
        seed: The row's seed.
        prompt: The prompt's token ids.
        position: Index of the token in the text.
        expected, got: The token of the other text and that of this one; None where a text has ended.
        logit_gap: Difference of their logits after the common text; None if a text has ended.
        margin: How far the choice of one is from that of the other, noise included, see `scores.margin`; likewise.
        near_tie: Whether rounding explains it.
        allowed: Whether the documented guarantee allows it: a near tie, where exactness doesn't exclude those.
    """

    setting: Setting
    against: str
    sampling: str
    seed: int
    prompt: list[int]
    position: int
    expected: int | None
    got: int | None
    logit_gap: float | None
    margin: float | None
    near_tie: bool
    allowed: bool


@dataclass
class Outcome:
    """What a setting gave so far.

    Attributes:
        texts, tokens: How many were compared.
        seconds: Wall-clock seconds that they took, prefill included.
        accepted, drafting: Drafts accepted, and rounds that drafted.
        samplings: By kind of sampling, the texts compared.
        differing: Texts that differ from plain decoding.
        mismatches: Where they do, and where those of "invariant" differ from each other.
    """

    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    accepted: int = 0
    drafting: int = 0
    samplings: dict[str, int] = field(default_factory=dict)
    differing: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def tps(self) -> float:
        """Tokens per second of all rows, prefill included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_accepted(self) -> float:
        """Accepted drafts per round that drafted, without the bonus token."""
        return self.accepted / self.drafting if self.drafting else 0.0

    def count(self, sampling: str, found: Sequence[Generation], seconds: float) -> None:
        """Adds texts that were decoded together."""
        self.texts += len(found)
        self.samplings[sampling] = self.samplings.get(sampling, 0) + len(found)
        self.seconds += seconds
        for it in found:
            self.tokens += len(it.tokens)
            self.accepted += it.stats.accepted
            self.drafting += it.stats.rounds - it.stats.draft_lengths.get(0, 0)


@dataclass
class Comparison:
    """What was found so far; it grows, so that an interruption loses nothing.

    Attributes:
        kernels: What the self-test says of MLX's kernels.
        scores: See `scores.agreement`; None before it was done.
        outcomes: By setting; that of PLAIN has no mismatches.
    """

    kernels: list[Finding] = field(default_factory=list)
    scores: Agreement | None = None
    outcomes: dict[Setting, Outcome] = field(default_factory=dict)

    @property
    def compared(self) -> int:
        """Number of tokens that were compared with those of plain decoding."""
        return sum(outcome.tokens for setting, outcome in self.outcomes.items() if setting != PLAIN)

    @property
    def mismatches(self) -> list[Mismatch]:
        """All of them."""
        return [it for outcome in self.outcomes.values() for it in outcome.mismatches]

    @property
    def missing(self) -> list[Setting]:
        """Settings that weren't compared both greedily and sampled: the time was too short."""
        return [it for it, outcome in self.outcomes.items() if set(outcome.samplings) != set(SAMPLINGS)]

    @property
    def holds(self) -> bool:
        """Whether nothing was found that the guarantee doesn't allow."""
        sound = self.scores is None or self.scores.sound
        kernels = all(it.avoided for it in self.kernels if it.wrong)
        return kernels and sound and all(it.allowed for it in self.mismatches)

    def coincides(self, exactness: str) -> bool | None:
        """Whether all texts of one prompt at this exactness are those of plain decoding; None if there are none."""
        own = [o for s, o in self.outcomes.items() if s.exactness == exactness and s.rows == 1 and s != PLAIN]
        return not any(it.differing for it in own) if any(it.texts for it in own) else None


def settings(batches: Sequence[int], draft_lengths: Sequence[int | str], drafter: bool) -> list[Setting]:
    """The settings to compare with plain decoding of a prompt alone.

    Args:
        batches: Batch sizes.
        draft_lengths: Draft lengths; plain decoding of a batch is always compared too.
        drafter: Whether there is a drafter; else nothing can be drafted.
    """
    lengths = [0, *(it for it in draft_lengths if it != 0)] if drafter else [0]
    found = [Setting("fast", rows, length) for rows in batches for length in lengths]
    # These run alone whatever the batch. Two draft lengths, because exactness "invariant" promises equal texts for any.
    exact = [it for it in lengths if it != 0][-2:] or [0]
    found += [Setting("invariant", 1, it if it == "auto" else min(int(it), MAX_AUTO_LENGTH)) for it in exact]
    found.append(Setting("stepwise", 1, exact[0]))
    return [it for it in dict.fromkeys(found) if it != PLAIN]


def compared_scores(lm: MTPModel, wanted: Sequence[Setting]) -> Agreement:
    """Compares the target's scores in passes of the shapes that the settings have, on a text of its own."""
    prompt = question(lm, 0)
    text = lm.generate(prompt, TEXT_TOKENS, temperature=0, draft_length=0, ignore_eos=True)
    lengths = [it.draft_length for it in wanted if isinstance(it.draft_length, int)]
    widths, batches = {INVARIANT_WIDTH, *(length + 1 for length in lengths if length)}, {it.rows for it in wanted} - {1}
    shapes = [(1, width) for width in sorted(widths)]
    shapes += [(rows, width) for rows in sorted(batches) for width in (1, max(lengths, default=0) + 1)]
    with lm.models() as (target, _):
        return agreement(target, [*prompt, *text.tokens], len(prompt), [*dict.fromkeys(shapes)])


def compare(
    lm: MTPModel,
    wanted: Sequence[Setting],
    seconds: float,
    found: Comparison,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Checks the kernels, compares scores, and then texts until the time is up.

    Args:
        lm: The pair, loaded with `cache_bytes=0`: a cached prompt would be KV that another setting computed.
        wanted: The settings, without PLAIN.
        seconds: How long all may take. Texts get half of it at least; the one that runs at the end is finished.
        found: Receives what is found, setting by setting.
        progress: Called with the seconds that have passed, before each text or batch.
    """
    begun = monotonic()
    with lm.models() as pair:
        found.kernels = self_test(*pair)
    found.scores = compared_scores(lm, wanted)
    for setting in (PLAIN, *wanted):
        found.outcomes[setting] = Outcome()
    until = max(begun + seconds, monotonic() + seconds / 2)

    def over() -> bool:
        now = monotonic()
        progress(now - begun)
        return now >= until

    turn = 0
    while not over():
        _Turn(lm, turn, found, over).run(wanted)
        turn += 1


class _Turn:
    """Prompts, a seed and a kind of sampling that all settings get."""

    def __init__(self, lm: MTPModel, number: int, found: Comparison, over: Callable[[], bool]) -> None:
        self._lm, self._number, self._found, self._over = lm, number, found, over
        self._sampling = [*SAMPLINGS][number % len(SAMPLINGS)]
        self._tokens = min(SHORTEST << number // len(SAMPLINGS), LONGEST)
        self._plain: dict[int, Generation] = {}
        self._invariant: dict[int, Generation] = {}

    def run(self, wanted: Sequence[Setting]) -> None:
        """Compares each setting once, in random order, unless the time is up before."""
        order = [*wanted]
        Random(self._number).shuffle(order)  # noqa: S311 - whatever follows what isn't a secret
        for setting in order:
            for row in range(setting.rows):
                if row not in self._plain:
                    if self._over():
                        return
                    (self._plain[row],) = self._decode(PLAIN, [row])
            if self._over():
                return
            texts = self._decode(setting, range(setting.rows))
            for row, text in enumerate(texts):
                self._check(setting, row, text)

    def _decode(self, setting: Setting, rows: Sequence[int]) -> list[Generation]:
        how = SAMPLINGS[self._sampling]
        prompts = [{"prompt": self._prompt(row), "seed": self._seed(row)} for row in rows]
        begun = perf_counter()
        texts = self._lm.generate_batch(
            prompts, len(prompts), max_tokens=self._tokens, draft_length=setting.draft_length,
            exactness=setting.exactness, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p,
        )  # fmt: skip
        self._found.outcomes[setting].count(self._sampling, texts, perf_counter() - begun)
        return texts

    def _prompt(self, row: int) -> list[int]:
        return question(self._lm, self._number + row)

    def _seed(self, row: int) -> int:
        return row_seed(self._number, row)

    def _check(self, setting: Setting, row: int, text: Generation) -> None:
        outcome = self._found.outcomes[setting]
        if found := self._mismatch(setting, row, text, self._plain[row], "plain"):
            outcome.differing += 1
            outcome.mismatches.append(found)
        if setting.exactness == "invariant":
            other = self._invariant.setdefault(row, text)
            if found := self._mismatch(setting, row, text, other, "invariant"):
                outcome.mismatches.append(found)

    def _mismatch(
        self, setting: Setting, row: int, text: Generation, other: Generation, against: str
    ) -> Mismatch | None:
        position = first_difference(other.tokens, text.tokens)
        if position is None:
            return None
        prompt, seed = self._prompt(row), self._seed(row)
        expected, got = (it.tokens[position] if position < len(it.tokens) else None for it in (other, text))
        logit_gap, apart = None, None
        if expected is not None and got is not None:
            logits = self._lm.logits([*prompt, *other.tokens[:position]])[-1]
            sampling = replace(SAMPLINGS[self._sampling], seed=seed)
            logit_gap = gap(logits[mx.array([expected, got])])
            apart = margin(logits, expected, got, sampling, len(prompt) + position)
        # Where scores don't depend on the shape of a pass, only equal ones are a near tie.
        near = apart is not None and self._found.scores is not None and apart <= self._found.scores.tie
        strict = setting.exactness == "stepwise" or against == "invariant"
        return Mismatch(
            setting, against, self._sampling, seed, prompt, position, expected, got, logit_gap, apart, near,
            near and not strict,
        )  # fmt: skip


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token at which two texts differ, or at which one of them ends; None if they are equal."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
