"""Measures speed and memory of a pair in turns, beside peers if there are any, as `mlx-mtp bench` does.

In every turn each program decodes each batch once at every draft length, all in random order, so that a disturbance of
the machine hits all of them; ratios are taken within a turn. The first turn warms up: kernels are compiled, memory is
allocated, and the automatic draft length learns what rounds cost.

    prompt speed       all prompt tokens / seconds until every row has its first token
    generation speed   tokens of all rows that come after that / seconds from there to the last one
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Protocol

from ..decode.request import Stats
from .peer_protocol import Clock, Measured
from .prompts import prompt_of
from .spread import Spread

if TYPE_CHECKING:
    from ..api import MTPModel

OURS = "mlx-mtp"
"""Our name in tables."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        program: OURS, or a peer's name.
        context: Prompt tokens of each row.
        rows: Rows of the batch.
        draft_length: Tokens to draft in a round, 0 for plain decoding, or "auto".
    """

    program: str
    context: int
    rows: int
    draft_length: int | str


@dataclass(frozen=True)
class Run:
    """One run of a case.

    Attributes:
        measured: Times and memory.
        stats: Of each row; empty for peers.
    """

    measured: Measured
    stats: Sequence[Stats] = ()

    @property
    def tps(self) -> float:
        """Tokens per second of all rows after the prompts; 0 if all came at once."""
        after = self.measured["seconds"] - self.measured["prompts"]
        return self.measured["further"] / after if after else 0.0


class Program(Protocol):
    """Something that decodes."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        ...

    def can(self, draft_length: int | str) -> bool:
        """Whether it knows this draft length."""
        ...

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, draft_length: int | str) -> Run:
        """Decodes a batch greedily: so many tokens of each row, whatever they are."""
        ...


@dataclass(frozen=True)
class Ours:
    """The pair itself, through the interface that everybody uses."""

    lm: MTPModel
    name: str = OURS

    def can(self, draft_length: int | str) -> bool:
        """Whether there is a drafter, if one is needed."""
        return draft_length == 0 or self.lm.drafter_config is not None

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, draft_length: int | str) -> Run:
        """See `Program.run`."""
        clock = Clock()

        async def row(number: int, prompt: Sequence[int]) -> Stats:
            stats = Stats()
            async for chunk in self.lm.astream(
                [*prompt], tokens, temperature=0, draft_length=draft_length, ignore_eos=True
            ):
                stats = chunk.stats
                # When the row had them, which doesn't depend on how soon this thread takes them.
                clock.tick(number, len(chunk.tokens), stats.prompt_seconds + stats.generation_seconds)
            return stats

        async def rows() -> list[Stats]:
            return await asyncio.gather(*(row(i, prompt) for i, prompt in enumerate(prompts)))

        stats = asyncio.run(rows())
        return Run(clock.measured(), stats)


@dataclass(frozen=True)
class Theirs:
    """A peer.

    Attributes:
        peer: What runs it: prompts, tokens and a draft length.
        drafts: Whether it can draft.
    """

    name: str
    peer: Callable[[Sequence[Sequence[int]], int, int], Measured]
    drafts: bool

    def can(self, draft_length: int | str) -> bool:
        """Peers have no automatic draft length, and not all draft."""
        return draft_length == 0 or (self.drafts and draft_length != "auto")

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, draft_length: int | str) -> Run:
        """See `Program.run`."""
        return Run(self.peer(prompts, tokens, int(draft_length)))


@dataclass
class Speeds:
    """The runs so far; they grow, so that an interruption loses nothing.

    Attributes:
        tokens: Tokens that each row generates.
        runs: By case and turn; that of the warm-up isn't kept.
    """

    tokens: int
    runs: dict[Case, dict[int, Run]] = field(default_factory=dict)

    def cases(self) -> list[Case]:
        """The cases that were measured, in the order of a table."""
        return sorted(
            (case for case in self.runs if self.by_turn(case)),
            key=lambda it: (it.context, it.rows, it.program != OURS, it.program, it.draft_length == "auto",
                            str(it.draft_length).zfill(2)),
        )  # fmt: skip

    def by_turn(self, case: Case) -> dict[int, float]:
        """Tokens per second of all rows after the prompts, by turn."""
        return {turn: run.tps for turn, run in self.runs.get(case, {}).items() if run.tps}

    def generation(self, case: Case) -> Spread:
        """Tokens per second of all rows after the prompts."""
        return Spread.of([*self.by_turn(case).values()])

    def prompt(self, case: Case) -> Spread:
        """Prompt tokens per second of all rows."""
        return Spread.of([case.rows * case.context / it["prompts"] for it in self.measured(case)])

    def first_token(self, case: Case) -> Spread:
        """Seconds until a row's first token, the mean over rows."""
        return Spread.of([it["first_token"] for it in self.measured(case)])

    def measured(self, case: Case) -> list[Measured]:
        """Times and memory of all turns."""
        return [run.measured for run in self.runs[case].values()]

    def ratio(self, case: Case, baseline: Case) -> Spread | None:
        """Generation speed as a multiple of another case's, turn by turn; None without a common turn."""
        own, other = self.by_turn(case), self.by_turn(baseline)
        ratios = [own[turn] / other[turn] for turn in own if turn in other]
        return Spread.of(ratios) if ratios else None

    def stats(self, case: Case) -> list[Stats]:
        """Statistics of all rows in all turns."""
        return [it for run in self.runs[case].values() for it in run.stats]


def measure(
    lm: MTPModel,
    programs: Sequence[Program],
    contexts: Sequence[int],
    batches: Sequence[int],
    draft_lengths: Sequence[int | str],
    turns: int,
    found: Speeds,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Measures every case once in each turn.

    Args:
        lm: The pair, loaded with `cache_bytes=0`: a cached prompt needs no prefill.
        programs: What to measure.
        contexts: Prompt tokens of each row.
        batches: Rows, at most `decode.scheduler.MAX_ROWS`.
        draft_lengths: Draft lengths; each program takes those that it knows.
        turns: Turns besides the warm-up.
        found: Receives the runs.
        progress: Called with the number of runs so far.

    Raises:
        PromptError: A context is too short for a question, or too long for the model.
        MemoryBudgetError: A batch doesn't fit.
        MTPError: A peer failed.
    """
    prompts = {context: [prompt_of(lm, row, context) for row in range(max(batches))] for context in contexts}
    cases = cases_of(programs, contexts, batches, draft_lengths)
    by_name = {it.name: it for it in programs}
    done = 0
    for turn in range(turns + 1):
        order = [*cases]
        Random(turn).shuffle(order)  # noqa: S311 - not a secret
        for case in order:
            batch = prompts[case.context][: case.rows]
            run = by_name[case.program].run(batch, found.tokens, case.draft_length)
            if turn:
                found.runs.setdefault(case, {})[turn] = run
            done += 1
            progress(done)


def cases_of(
    programs: Sequence[Program], contexts: Sequence[int], batches: Sequence[int], draft_lengths: Sequence[int | str]
) -> list[Case]:
    """What each turn measures: every draft length that a program knows, at every context and batch."""
    return [
        Case(program.name, context, rows, length)
        for context in contexts
        for rows in batches
        for program in programs
        for length in draft_lengths
        if program.can(length)
    ]


def kept_by_position(stats: Sequence[Stats]) -> list[float]:
    """The share of the drafts at each position of a round that were accepted, over all rounds that drafted so many."""
    longest = max((length for it in stats for length in it.draft_lengths), default=0)
    found = []
    for position in range(longest):
        drafted = sum(n for it in stats for length, n in it.draft_lengths.items() if length > position)
        kept = sum(it.accepted_by_position[position] for it in stats if position < len(it.accepted_by_position))
        found.append(kept / drafted)
    return found
