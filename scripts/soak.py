"""Runs everything at once for a long time, and looks for wrong texts, and for what isn't given back.

Threads come and go. They call one model by every way there is, with random prompts, lengths and options; they cancel,
leave, read slowly, save prompts, make mistakes, load and unload models. Two servers in the same process answer clients
that ask, leave, close one half, stop sending or don't read. One server offers the model itself, the other loads models
of its own and unloads them when idle. Every text that ends must be the one that its call gets alone (see
tests/support/soak_calls.py); of one that is cut off, the tokens must be its beginning.

After each minute no thread begins anything, and once all have ended, nothing of theirs may be left: no row, no KV but
that of the prompt cache, no thread, descriptor, asyncio task or file. Then the model is unloaded, which must give back
all of MLX's arrays, and answers one question, always the same. The resident memory of that moment must be, in the end,
within 3 % of what it was after the warm-up, by medians over many minutes. On Linux the C library allocates from one
place, and is first told to return what it keeps of freed memory; tests/support/held.py says why. A line has the figures
of before, too.

Exits with 1 if anything is wrong. The same seed draws the same calls, though not the same moments.

    python scripts/soak.py [--minutes 30] [--seed 0]
"""

from __future__ import annotations

import faulthandler
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated

import mlx.core as mx
import typer

import mlx_mtp
from mlx_mtp.server.app import make_app
from mlx_mtp.server.registry import Entry, Models
from mlx_mtp.server.settings import ServerOptions
from mlx_mtp.session.loading import Loaded
from tests.support.held import Held, listening, return_freed, use_one_arena
from tests.support.server import entry, running, wait_until
from tests.support.soak_calls import CACHE_BYTES, Alone, Callers

GROWTH = 0.03
"""Most that resident memory may grow, as a share."""

LEAST = 9
"""Least minutes after which growth counts: in fewer, a process is still warming up."""

CONSTANTS = 2**20
"""Bytes of arrays that may stay when all models are unloaded: constants, such as small ranges of numbers."""

HANGS = 900
"""Seconds after which a thread that doesn't end counts as one that never will."""


@dataclass
class House:
    """What is soaked.

    Attributes:
        lm: The model that all call.
        alone: Says what is right.
        urls: Addresses of the servers.
        entries: What the servers offer; first the model itself.
        folder: Where all temporary files lie.
    """

    lm: mlx_mtp.MTPModel
    alone: Alone
    urls: list[str]
    entries: list[Entry]
    folder: Path

    def is_quiet(self) -> bool:
        """Whether no call runs, and no other model is loaded."""
        served = any(it.answers for it in self.entries)
        loaded = self.alone.lm.loaded or any(it.lm for it in self.entries[1:])
        return not (served or loaded or self.lm._session.call(lambda it: it.scheduler.busy))

    def kept_bytes(self) -> int:
        """Bytes of KV in the prompt cache, once nothing else holds any."""

        def look(owned: Loaded) -> int:
            scheduler = owned.scheduler
            assert scheduler.engine.kv is None, "rows that have left still hold KV"
            return scheduler.cache.nbytes

        return self.lm._session.call(look)


@contextmanager
def opened(folder: Path, seed: int, calls: int, max_tokens: int) -> Iterator[House]:
    """Opens the model and both servers, with nothing loaded."""
    with ExitStack() as stack:
        alone = Alone(seed, calls, max_tokens)
        stack.callback(alone.lm.close)
        lm = stack.enter_context(mlx_mtp.load(cache_bytes=CACHE_BYTES))
        shared = entry("shared", lm)
        own = [Entry(name, partial(mlx_mtp.load, cache_bytes=CACHE_BYTES), 1) for name in ("first", "second")]
        limits = ServerOptions(max_queue=16, stall_limit=3.0)
        unloading = ServerOptions(max_queue=16, stall_limit=3.0, idle_unload=1.0)
        apps = [make_app(Models([shared]), limits), make_app(Models(own), unloading)]
        house = House(lm, alone, [stack.enter_context(running(app)) for app in apps], [shared, *own], folder)
        alone.lm.unload()
        lm.unload()
        yield house


@dataclass
class Soak:
    """A run.

    Attributes:
        callers: What the threads do.
        most: Most threads at a time.
        empty: What was held before the first of them.
        resident: Resident bytes after each minute, always with the same loaded.
        wrong: What wasn't right, in words.
    """

    callers: Callers
    most: int
    empty: Held
    resident: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def minute(self, house: House, seconds: float, dice: Random) -> str:
        """Lets threads come and go, and looks at what they leave.

        Args:
            house: What they use.
            seconds: How long they come.
            dice: Draws when they come, and what they do.

        Returns:
            What has been done and is held, in a line.
        """
        end, threads = time.monotonic() + seconds, list[threading.Thread]()
        while (left := end - time.monotonic()) > 0:
            threads = [it for it in threads if it.is_alive()]
            if len(threads) < self.most:
                work = partial(self.callers.work, Random(dice.getrandbits(64)), end)
                threads.append(threading.Thread(target=work, name="caller"))
                threads[-1].start()
            time.sleep(min(left, dice.expovariate(self.most)))
        for it in threads:
            it.join(HANGS)
            if it.is_alive():
                faulthandler.dump_traceback()
                raise AssertionError("a thread hangs: above is where each is")
        wait_until(house.is_quiet, HANGS)
        kept = house.kept_bytes()
        held = Held.now(house.folder)
        house.lm.unload()
        self.look_for(Held.now(house.folder))
        house.lm.generate("What is a drafter?", 8, temperature=0)
        return_freed()
        self.resident.append(Held.now(house.folder).resident)
        counts = self.callers.counts
        return (
            f"{counts['texts']:,} texts, {counts['tokens']:,} tokens, {counts['cut off']} cut off, "
            f"{counts['bad_client']} bad clients, {len(self.callers.wrong) + len(self.wrong)} wrong; "
            f"{held.resident / 1e6:.1f} MB resident, arrays {held.active / 1e6:.1f}, prompt cache {kept / 1e6:.1f}, "
            f"pool {held.pool / 1e6:.1f}; {self.resident[-1] / 1e6:.1f} MB with the model alone"
        )

    def look_for(self, held: Held) -> None:
        """Takes note of what is held and wasn't before the first thread; models are unloaded."""
        # The threads in which a server loads and encodes end with the server.
        left = [it for it in held.since(self.empty) if not re.search("thread (asyncio|uvloop)_", it)]
        if (arrays := held.active - self.empty.active) > CONSTANTS:
            left.append(f"{arrays:,} bytes of arrays")
        self.wrong += [f"still there: {it}" for it in left if f"still there: {it}" not in self.wrong]

    def growth(self) -> float:
        """Share by which resident memory has grown since the warm-up, the first sixth of all minutes.

        It goes up and down by some percent, so the medians of the first and the last third of the rest are compared.
        """
        warm = self.resident[len(self.resident) // 6 :]
        third = -(-len(warm) // 3)
        return median(warm[-third:]) / median(warm[:third]) - 1


def soak(seconds: float, minute: float, seed: int, calls: int, most: int, max_tokens: int = 40) -> list[str]:
    """Soaks for some time, and prints a line for each minute.

    Args:
        seconds: How long.
        minute: Seconds of a minute.
        seed: Draws calls.
        calls: How many different ones.
        most: Most threads at a time.
        max_tokens: Most tokens of a text.

    Returns:
        What wasn't right, in words.
    """
    dice = Random(seed)
    with tempfile.TemporaryDirectory() as name, listening() as heard:
        folder = Path(name)
        with opened(folder, seed, calls, max_tokens):
            pass  # some libraries open what they then keep
        before = Held.now(folder)
        with opened(folder, seed, calls, max_tokens) as house:
            run = Soak(Callers(house.lm, house.alone, house.urls, folder), most, Held.now(folder))
            begun = time.monotonic()
            while time.monotonic() - begun < seconds:
                line = run.minute(house, minute, dice)
                print(f"{time.monotonic() - begun:.0f} s: {line}", flush=True)
        run.wrong += [f"left in the end: {it}" for it in Held.now(folder).since(before)]
    growth = run.growth()
    print(f"resident memory has grown by {growth:.1%} since the warm-up; {dict(sorted(run.callers.counts.items()))}")
    if growth > GROWTH and len(run.resident) > LEAST:
        run.wrong.append(f"resident memory has grown by {growth:.1%}")
    return [*run.callers.wrong, *run.wrong, *heard]


def main(
    minutes: Annotated[float, typer.Option(help="How long.", min=0.1)] = 30,
    seed: Annotated[int, typer.Option(help="Draws other calls.")] = 0,
) -> None:
    """Soaks, and prints what was wrong."""
    use_one_arena()
    print(f"mlx {mx.__version__} on {mx.default_device()}, {threading.active_count()} threads")
    wrong = soak(60 * minutes, min(60, 60 * minutes), seed, calls=500, most=12)
    for it in wrong:
        print(it)
    print(f"{len(wrong)} things are wrong" if wrong else "all is right")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
