"""What `mlx-mtp verify` prints: a report to read and to paste, or the same as JSON values."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .render import Part, table

if TYPE_CHECKING:
    from ..api import MTPModel
    from ..measuring.texts import Comparison, Mismatch

_SHOWN = 10
"""Most mismatches to show one by one, those that aren't allowed first; --json has all."""

_PROMPT_CHARACTERS = 60
"""Characters of a prompt that are shown: its end, where the question is."""


def report(lm: MTPModel, found: Comparison) -> list[Part]:
    """What was found, as tables and sentences."""
    from ..measuring.machine import machine_line, model_line

    return [
        f"mlx-mtp verify: {model_line(lm)}",
        f"on {machine_line()}",
        *_kernels(found),
        *_scores(found),
        *_texts(found),
        *_mismatches(lm, found),
        *_levels(found),
        "",
        _verdict(found),
    ]


def _kernels(found: Comparison) -> list[Part]:
    from ..measuring.kernels import complaints, summary

    return ["", summary(found.kernels), *complaints(found.kernels)] if found.kernels else []


def _scores(found: Comparison) -> list[Part]:
    if (scores := found.scores) is None:
        return []
    shapes = ", ".join(f"{rows} x {width}" for rows, width in scores.shapes)
    compared = f"the target's scores at {scores.positions} positions, single tokens against passes of {shapes}"
    if not scores.sound:
        off = f"off by {scores.typical:.1%} of their size, and rounding explains {scores.allowed:.1%}"
        return [f"{compared}: {off}: the target itself computes WRONGLY here"]
    if scores.equal:
        return [f"{compared}: equal bit for bit"]
    return [f"{compared}: off by up to {scores.largest:.1e}; scores within {scores.tie:.1e} are a near tie"]


def _texts(found: Comparison) -> list[Part]:
    from ..measuring.texts import PLAIN

    if not found.compared:
        return ["", "no texts were compared"]
    rows = []
    for setting, outcome in found.outcomes.items():
        if not outcome.texts:
            continue
        plain = found.outcomes[PLAIN]
        ties = sum(it.allowed for it in outcome.mismatches)
        wrong = len(outcome.mismatches) - ties
        counted = [_count(ties, "near tie")] * (ties > 0) + [f"{wrong} WRONG"] * (wrong > 0)
        verdict = "the reference" if setting == PLAIN else ", ".join(counted) or "equal"
        rows.append([
            setting.exactness, str(setting.rows), str(setting.draft_length), str(outcome.texts), f"{outcome.tokens:,}",
            f"{outcome.mean_accepted:.2f}", f"{outcome.tps:.1f}", f"{outcome.tps / plain.tps:.2f}", verdict,
        ])  # fmt: skip
    headers = ["exactness", "batch", "drafts", "texts", "tokens", "accepted", "tok/s", "/ plain", "against plain alone"]
    parts: list[Part] = ["", "Texts, greedy and sampled, against plain decoding of the same prompt alone:"]
    parts.append(table(headers, rows, left=(0, 8)))
    if found.missing:
        names = "; ".join(map(str, found.missing))
        parts.append(f"Not compared both greedily and sampled, for want of time (--seconds): {names}")
    return parts


def _mismatches(lm: MTPModel, found: Comparison) -> list[Part]:
    every = sorted(found.mismatches, key=lambda it: it.allowed)
    if not every:
        return []
    parts: list[Part] = ["", "Where texts differ:"]
    for it in every[:_SHOWN]:
        parts += _mismatch(lm, it)
    if len(every) > _SHOWN:
        parts.append(f"  and {len(every) - _SHOWN} more: --json has all")
    return parts


def _mismatch(lm: MTPModel, it: Mismatch) -> list[Part]:
    kind = "near tie" if it.allowed else "near tie, where none is allowed" if it.near_tie else "REAL"
    apart = f"logits {it.logit_gap:.2e} apart" if it.logit_gap is not None else "one text has ended"
    if it.margin is not None and it.margin != it.logit_gap:
        apart += f", with noise {it.margin:.2e}"
    against = "plain" if it.against == "plain" else "another draft length"
    tokens = f"{_token(lm, it.expected)} by {against}, {_token(lm, it.got)} here"
    prompt = lm.tokenizer.decode(it.prompt) if lm.tokenizer else str(it.prompt)
    return [
        f"  {kind}: {it.setting}, {it.sampling}: token {it.position}: {tokens}; {apart}",
        f"    after ...{prompt[-_PROMPT_CHARACTERS:]!r}, seed {it.seed}",
    ]


def _token(lm: MTPModel, token: int | None) -> str:
    if token is None:
        return "the end"
    return f"{token} {lm.tokenizer.decode([token])!r}" if lm.tokenizer else str(token)


def _levels(found: Comparison) -> list[Part]:
    known = {name: found.coincides(name) for name in ("fast", "invariant", "stepwise")}
    same = [name for name, equal in known.items() if equal]
    other = [name for name, equal in known.items() if equal is False]
    if not same and not other:
        return []
    line = (
        f"With one prompt at a time {_and(same)} gave plain decoding's texts" if same else "With one prompt at a time"
    )
    line += f"{', ' if same else ' '}{_and(other)} did not" if other else ""
    return ["", f"{line}."]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _verdict(found: Comparison) -> str:
    if not found.holds:
        return "WRONG: what is marked above should not be; please report this, with this text"
    if not found.compared:
        return "Nothing was compared, so nothing is known."
    ties = f" but for {_count(len(found.mismatches), 'near tie')}" if found.mismatches else ""
    return f"Right: {found.compared:,} tokens are those of plain decoding{ties}, as exactness promises here."


def facts(lm: MTPModel, found: Comparison) -> dict[str, Any]:
    """What was found, as JSON values."""
    from ..measuring.machine import machine_facts, model_facts

    return {
        "machine": machine_facts(),
        "model": model_facts(lm),
        "holds": found.holds,
        "tokens_compared": found.compared,
        "kernels": [
            {"shape": str(it.shape), "share": _finite(it.share), "wrong": it.wrong, "avoided": it.avoided}
            for it in found.kernels
        ],
        "scores": _scores_facts(found),
        "settings": [
            asdict(setting)
            | {
                "texts": it.texts, "tokens": it.tokens, "seconds": it.seconds, "tps": it.tps,
                "mean_accepted": it.mean_accepted, "samplings": it.samplings, "differing": it.differing,
            }
            for setting, it in found.outcomes.items()
        ],
        "mismatches": [asdict(it) for it in found.mismatches],
        "coincides": {name: found.coincides(name) for name in ("fast", "invariant", "stepwise")},
    }  # fmt: skip


def _scores_facts(found: Comparison) -> dict[str, Any] | None:
    if (scores := found.scores) is None:
        return None
    changes = {"largest": _finite(scores.largest), "typical": _finite(scores.typical)}
    return asdict(scores) | changes | {"equal": scores.equal, "sound": scores.sound}


def _finite(value: float) -> float | None:
    """A number that JSON can hold."""
    return value if math.isfinite(value) else None
