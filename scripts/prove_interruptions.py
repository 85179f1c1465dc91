"""Does a model survive whatever strikes its thread, or its callers'?

Calls of every kind (greedy and sampled texts, stop strings, grammars, penalties, predictions, several answers, batches,
conversations, streams that are left, unloading, saved prompts) run one to three at a time, and one thread is struck:

    line     an exception is raised at a line of the package that hasn't been struck before
    async    an exception is raised in the thread wherever it is, also in the standard library's code
    signal   SIGINT reaches the main thread, as Ctrl-C

After each, other calls must have their own texts, no call hangs, a text that was cut begins as it should, a new call is
right, and nothing is left of the calls that have ended; and now and then the model is closed, and its memory counted.

    python scripts/prove_interruptions.py [--interruptions 500] [--seed 1]
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections import Counter
from random import Random
from typing import Annotated

import typer

from tests.support.siege import Siege, Wrong

HOW = ("line", "line", "line", "async", "signal")
"""Of five interruptions, how many are of which kind."""

BETWEEN_RENEWALS = 25


def main(
    interruptions: Annotated[int, typer.Option(help="How many interruptions.")] = 500,
    seed: Annotated[int, typer.Option(help="What they are drawn with.")] = 1,
) -> None:
    """Prints every finding; exits with 1 if there is any."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    begun, rng, reached = time.monotonic(), Random(seed), Counter[str]()
    siege = Siege(seed)
    lines = set().union(*siege.lines.values())
    print(f"{len(siege.lines) // 2} calls, which run {len(lines)} lines of the package", flush=True)
    wrong = ""
    try:
        while not wrong and reached.total() < interruptions:
            how = rng.choice(HOW)
            came = siege.interrupt(how)
            reached[how] += came
            if came and reached.total() % BETWEEN_RENEWALS == 0:
                siege.renew()
                print(f"{dict(reached)} in {time.monotonic() - begun:.0f} s, {dict(siege.ends)}", flush=True)
        siege.renew()
    except Wrong:
        wrong = traceback.format_exc()
        print(f"after {dict(reached)}: {wrong}", flush=True)
    print(f"{reached.total()} interruptions ({dict(reached)}), at {len(siege.struck)} lines, in "
          f"{time.monotonic() - begun:.0f} s: {'something is wrong' if wrong else 'all right'}")  # fmt: skip
    for (side, end), count in sorted(siege.ends.items()):
        print(f"  {side} struck: {count} calls {end}")
    if wrong:
        os._exit(1)  # a call that hangs can't be waited for


if __name__ == "__main__":
    typer.run(main)
