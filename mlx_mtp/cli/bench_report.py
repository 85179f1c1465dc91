"""What `mlx-mtp bench` prints: tables in Markdown, or the same as JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..api import MTPModel
    from ..measuring.speed import Case, Speeds
    from ..measuring.spread import Spread

_DISTURBED = 1.3
"""Ratio of the fastest to the slowest turn that shows a disturbance, as for the tuner."""


def report(lm: MTPModel, found: Speeds, versions: Mapping[str, str], command: str) -> list[str]:
    """What was measured, as lines of Markdown.

    Args:
        lm: The pair.
        found: The runs.
        versions: Versions of the peers, by name.
        command: The command line that measured.
    """
    from ..measuring.machine import machine_line, model_line

    others = "".join(f", {name} {version}" for name, version in versions.items())
    turns = max((len(runs) for runs in found.runs.values()), default=0)
    lines = [
        f"**{model_line(lm)}**", "", f"{machine_line()}{others}", "", f"`{command}`", "",
        f"Greedy, {found.tokens} tokens a row, {turns} turn{'s' if turns != 1 else ''}; medians (lowest to highest).",
    ]  # fmt: skip
    if not found.cases():
        return [*lines, "", "Nothing was measured."]
    return [*lines, *_disturbed(found), *_speeds(found, bool(versions)), *_acceptance(found), *_memory(found)]


def _disturbed(found: Speeds) -> list[str]:
    """A warning if one case's speed differs much between turns."""
    spreads = {case: found.generation(case) for case in found.cases()}
    worst = max(spreads, key=lambda case: spreads[case].high / spreads[case].low)
    if (factor := spreads[worst].high / spreads[worst].low) <= _DISTURBED:
        return []
    named = f"{worst.program} at context {worst.context:,}, batch {worst.rows}, draft length {worst.draft_length}"
    busy = f"The machine was busy with something else: one turn of {named} was {factor:.1f} times as fast as another."
    return ["", f"{busy} Measure again when it is idle."]


def _speeds(found: Speeds, compared: bool) -> list[str]:
    headers = ["context", "batch", "program", "drafts", "prompt tok/s", "first token, s", "tok/s", "/ plain"]
    if compared:
        headers += ["ours / theirs", "our best / theirs"]
    rows = []
    for case in found.cases():
        cells = [
            *_named(case), found.prompt(case).text(0), found.first_token(case).text(3), found.generation(case).text(1),
            _ratio(found.ratio(case, replace(case, draft_length=0)) if case.draft_length != 0 else None),
        ]  # fmt: skip
        if compared:
            same, best = _against(found, case)
            cells += [_ratio(same), _ratio(best)]
        rows.append(cells)
    return ["", *markdown(headers, rows, words=(2,))]


def _against(found: Speeds, case: Case) -> tuple[Spread | None, Spread | None]:
    """Our speed as a multiple of a peer's: at the same draft length, and at our fastest one."""
    from ..measuring.speed import OURS

    if case.program == OURS:
        return None, None
    own = [it for it in found.cases() if (it.program, it.context, it.rows) == (OURS, case.context, case.rows)]
    if not own:
        return None, None
    best = max(own, key=lambda it: found.generation(it).median)
    return found.ratio(replace(case, program=OURS), case), found.ratio(best, case)


def _acceptance(found: Speeds) -> list[str]:
    from ..measuring.speed import kept_by_position

    rows = []
    for case in found.cases():
        stats = found.stats(case)
        if kept := kept_by_position(stats):
            drafting = sum(it.rounds - it.draft_lengths.get(0, 0) for it in stats)
            mean = sum(it.accepted for it in stats) / drafting
            rows.append([*_named(case), f"{mean:.2f}", *(f"{share:.2f}" for share in kept)])
    if not rows:
        return []
    longest = max(map(len, rows))
    headers = ["context", "batch", "program", "drafts", "accepted a round", *map(str, range(1, longest - 4))]
    filled = [[*row, *[""] * (longest - len(row))] for row in rows]
    return ["", "Share of drafts accepted, by position in the round:", "", *markdown(headers, filled, words=(2,))]


def _memory(found: Speeds) -> list[str]:
    rows = []
    for case in found.cases():
        most = _most_memory(found, case).values()
        rows.append([*_named(case), *(f"{size / 1e9:.3f}" for size in most)])
    headers = ["context", "batch", "program", "drafts", "active", "peak", "pool"]
    return ["", "MLX's memory in GB: in use after a run, most in use, and kept unused; the most of all turns:", "",
            *markdown(headers, rows, words=(2,))]  # fmt: skip


def _most_memory(found: Speeds, case: Case) -> dict[str, int]:
    """Bytes by name, each the most of all turns."""
    every = found.measured(case)
    return {
        "active": max(it["active"] for it in every),
        "peak": max(it["peak"] for it in every),
        "pool": max(it["pool"] for it in every),
    }


def _named(case: Case) -> list[str]:
    return [f"{case.context:,}", str(case.rows), case.program, str(case.draft_length)]


def _ratio(ratio: Spread | None) -> str:
    return ratio.text() if ratio else ""


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = ()) -> list[str]:
    """A table as lines of Markdown, in columns of even width.

    Args:
        headers: Headers of the columns.
        rows: Cells.
        words: Indices of columns that are flush left.
    """
    body = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = [
        [
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in body
    ]
    rule = ["-" * width if i in words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [f"| {' | '.join(row)} |" for row in (lines[0], rule, *lines[1:])]


def facts(lm: MTPModel, found: Speeds, versions: Mapping[str, str]) -> dict[str, Any]:
    """What was measured, as JSON values."""
    from ..measuring.machine import machine_facts, model_facts
    from ..measuring.speed import kept_by_position

    cases = []
    for case in found.cases():
        plain = found.ratio(case, replace(case, draft_length=0))
        same, best = _against(found, case)
        cases.append(asdict(case) | {
            "prompt_tps": asdict(found.prompt(case)), "first_token_seconds": asdict(found.first_token(case)),
            "tps": asdict(found.generation(case)), "over_plain": plain and asdict(plain),
            "ours_over_this": same and asdict(same), "our_best_over_this": best and asdict(best),
            "accepted_by_position": kept_by_position(found.stats(case)),
            "memory_bytes": _most_memory(found, case), "turns": len(found.runs[case]),
        })  # fmt: skip
    return {
        "machine": machine_facts(), "model": model_facts(lm), "peers": dict(versions), "tokens": found.tokens,
        "cases": cases,
    }  # fmt: skip
