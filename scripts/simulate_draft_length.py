"""Compares automatic draft length with plain decoding and every fixed length on a simulated clock.

Costs of rounds and texts are those of tests/support/simulated_cases.py, which names their sources: a development part,
used to choose constants, and a held-out part. Every cell is a mean over seeds. Also measures the policy's host time.

    python scripts/simulate_draft_length.py [--seeds 4] [--part both] [--save docs/measurements/draft_length.json]
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any

import typer

from mlx_mtp.decode.draft_length import DraftLengthPolicy
from mlx_mtp.decode.request import Request, Row, Stats
from tests.support.simulated_cases import BATCH_COSTS, COSTS
from tests.support.simulated_clock import Case, against_fixed, by_hand, cases

GROUPS = ("one row", "rows that go on", "rows that end", "prices of real sizes")
CELLS = list(cases())
PRICE = BATCH_COSTS["kernel step"]
"""Costs of rounds while the host time is measured."""


def group(case: Case) -> str:
    """The one of `GROUPS` that a cell belongs to."""
    price = case.name.split(": ")[0]
    if price in COSTS:
        return GROUPS[0] if len(case.chances) == 1 else GROUPS[1]
    return GROUPS[2] if price in BATCH_COSTS else GROUPS[3]


def cell(job: tuple[int, int]) -> dict[str, Any]:
    """The figures of a cell, given its index and the number of seeds."""
    case = CELLS[job[0]]
    of_plain, of_best, best = against_fixed(DraftLengthPolicy, case, job[1])
    part = "held out" if case.held_out else "development"
    facts = {"cell": case.name, "group": group(case), "part": part}
    return facts | {"of_plain": round(of_plain, 4), "of_best": round(of_best, 4), "best": best}


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and worst case of some cells, and the worst of those with drafts that are always wrong."""
    wrong = [it["of_plain"] for it in found if it["cell"].endswith(": wrong")]
    return {
        "cells": len(found),
        "of_best_mean": round(geometric_mean([it["of_best"] for it in found]), 4),
        "of_best_worst": min(it["of_best"] for it in found),
        "of_plain_worst": min(it["of_plain"] for it in found),
        **({"wrong_worst": min(wrong)} if wrong else {}),
    }


def host_microseconds(rows: int, kept: float, waiting: bool, rounds: int = 1000) -> float:
    """Host microseconds per round for choosing and learning, including the little of the simulation itself."""
    batch = [Row(Request([0], 10**6), Stats(), 10**6) for _ in range(rows)]
    best = float("inf")
    for _ in range(3):
        policy = DraftLengthPolicy()
        started = time.process_time()
        for i in range(rounds):
            by_hand(policy, batch, lambda _, n, i=i: min(n, int(kept * n + i % 2 * kept)), PRICE, waiting)  # type: ignore[misc]
        best = min(best, (time.process_time() - started) / rounds * 1e6)
    return round(best, 1)


def main(
    seeds: Annotated[int, typer.Option(help="Runs of every cell.", min=1)] = 4,
    part: Annotated[str, typer.Option(help="development, held-out or both.")] = "both",
    processes: Annotated[int, typer.Option(help="Cells simulated at a time.", min=1)] = 2,
    save: Annotated[Path | None, typer.Option(help="Where to write all figures, as JSON.")] = None,
    worst: Annotated[int, typer.Option(help="Cells to list, the worst first.", min=0)] = 10,
) -> None:
    """Simulates all cells and prints a table."""
    if part not in ("development", "held-out", "both"):
        raise typer.BadParameter("expected development, held-out or both", param_hint="--part")
    wanted = [i for i, it in enumerate(CELLS) if part == "both" or it.held_out == (part == "held-out")]
    with Pool(processes) as pool:
        found = pool.map(cell, [(i, seeds) for i in wanted], chunksize=1)
    summaries: dict[str, dict[str, Any]] = {}
    print(f"{'':36}{'cells':>6}{'mean of auto / best fixed':>28}{'worst':>8}{'worst of auto / plain':>24}")
    for name in ("development", "held out"):
        own = [it for it in found if it["part"] == name]
        for kind in (*GROUPS, "all") if own else ():
            facts = summary([it for it in own if kind in ("all", it["group"])])
            summaries.setdefault(name, {})[kind] = facts
            print(
                f"{name + ', ' + kind:36}{facts['cells']:6d}{facts['of_best_mean']:28.3f}{facts['of_best_worst']:8.3f}"
                f"{facts['of_plain_worst']:24.3f}"
            )
        if own:
            print(f"drafts always wrong: {summaries[name]['one row']['wrong_worst']:.3f} of plain decoding at least")
    for it in sorted(found, key=lambda it: float(it["of_best"]))[:worst]:
        print(f"  {it['cell']:44}{it['of_plain']:8.3f}{it['of_best']:8.3f}  (best fixed: {it['best']})")
    host = {
        f"{rows} rows, {'drafting' if kept else 'nothing kept'}, {'others wait' if waiting else 'nobody waits'}": (
            host_microseconds(rows, kept, waiting)
        )
        for rows, waiting in ((1, False), (8, True), (8, False))
        for kept in (0.7, 0.0)
    }
    for label, micros in host.items():
        print(f"host time a round, {label}: {micros:.0f} us")
    if save:
        command = f"python scripts/simulate_draft_length.py --seeds {seeds}"
        facts = {"command": command, "host_machine": platform.machine(), "host_microseconds": host}
        text = json.dumps(facts | {"summary": summaries}, indent=1)
        cells = ",\n".join("  " + json.dumps(it) for it in found)
        save.write_text(f'{text[:-2]},\n "cells": [\n{cells}\n ]\n}}\n')


if __name__ == "__main__":
    typer.run(main)
