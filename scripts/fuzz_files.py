"""Does any file, damaged or hostile, do more than raise the package's own errors?

Each case changes one thing that is read from outside (a config, an index, a safetensors header, a tokenizer, a chat
template, a profile, a saved prompt or conversation, an adapter, messages, a line of JSON, a schema, an interrupted
conversion's journal) and reads it as the package does. Of every case:

- only an `MTPError` of one line comes out, or nothing; the process goes on;
- nothing outside the case's folder is opened but Python's own files, nothing is written, no program is started, and no
  connection made (an audit hook sees what Python does; what MLX and the tokenizer's library do in C it doesn't);
- no code in the folder is imported, and no pickle opened: the folder has some;
- it takes at most 2 s of the processor, and no more memory than 200 MB above the file's size.

Cases run in batches, each batch in a process of its own. A case that exceeds a limit there runs again in a process for
itself, which decides. Seeded: case i of a kind and a seed is the same in every run.

    python scripts/fuzz_files.py [--cases 1000000] [--seed 0] [--first 0] [--kind template] [--jobs 2] [--minutes 60]
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from multiprocessing.connection import Connection
from random import Random
from time import process_time
from typing import Annotated, Any

import typer

from mlx_mtp.errors import MTPError
from tests.support.fuzz_files import Files, peak_memory, prepared
from tests.support.fuzz_guard import Guard

SECONDS, MEGABYTES = 2.0, 200
"""What a case may take."""

BATCH = 20_000
"""Cases of a process: it takes seconds to start, and memory that one of them has taken hides that of later ones."""

STUCK_SECONDS = 300.0
"""A case that hasn't ended by then never does. Much longer than SECONDS, for the machine may be busy."""

MOST_ADDRESSES = 2**34
"""Most memory of a batch's process, in bytes, so that no case takes all of the machine's."""


@dataclass
class Result:
    """What cases have come to.

    Attributes:
        cases: Their number.
        refused: How many have raised an error.
        bad: Kind, number and what is wrong, of those that have done something wrong.
    """

    cases: int = 0
    refused: int = 0
    bad: list[tuple[str, int, str]] = field(default_factory=list)

    def add(self, other: Result) -> None:
        """Adds what other cases have come to."""
        self.cases, self.refused = self.cases + other.cases, self.refused + other.refused
        self.bad += other.bad


def wrong(files: Files, guard: Guard, kind: str, seed: int, number: int) -> tuple[str, str, bool]:
    """Runs a case.

    Returns:
        What is wrong with it, "" for nothing; by how much it exceeds a limit, "" if it doesn't; and whether an error
        was raised.
    """
    path, make, read = files.kinds[kind]
    sound = path.read_bytes() if path.exists() else None
    content = make(Random(f"{seed} {kind} {number}"))
    path.write_bytes(content)
    begun, peak = process_time(), peak_memory()
    found, refused = [], True
    try:
        with guard.watching():
            read()
        refused = False
    except MTPError as error:
        if "\n" in str(error) or not str(error):
            found.append(f"an error of several lines, or none: {str(error)!r:.300}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found.append(f"{type(error).__name__} comes out: {str(error)!r:.300}")
    finally:
        if sound is None:
            path.unlink()
        else:
            path.write_bytes(sound)
    exceeded = []
    if (took := process_time() - begun) > SECONDS:
        exceeded.append(f"takes {took:.1f} s")
    if (now := peak_memory()) > peak and now - files.peak > MEGABYTES * 2**20 + len(content):
        exceeded.append(f"takes {(now - files.peak) / 2**20:.0f} MB")
    return "; ".join([*found, *guard.found[:3]]), "; ".join(exceeded), refused


def run(kinds: list[str], seed: int, numbers: range, end: float = inf) -> Result:
    """Runs the cases of these numbers in a process of their own; goes on in another one where that ends.

    Args:
        kinds: In turn.
        seed: What the cases are drawn with.
        numbers: Of the cases.
        end: When to stop, by `time.monotonic`.
    """
    result, spawn = Result(), multiprocessing.get_context("spawn")  # a fork can't use MLX
    while numbers and time.monotonic() < end:
        state, (receive, send) = spawn.Array("q", [-1, 0], lock=False), spawn.Pipe(duplex=False)
        process = spawn.Process(target=_batch, args=(kinds, seed, numbers, state, send), daemon=True)
        process.start()
        send.close()
        for number, problem, exceeded in _told(receive, state, end):
            if exceeded and len(numbers) > 1:
                result.bad += run(kinds, seed, range(number, number + 1)).bad
            else:
                found = kinds[number % len(kinds)], number, "; ".join(filter(None, [problem, exceeded]))
                print(*found, flush=True)
                result.bad.append(found)
        process.kill()
        process.join()
        if state[0] < numbers.start and time.monotonic() < end:
            raise RuntimeError("the folder can't be prepared")
        result.cases += max(state[0] + 1 - numbers.start, 0)
        result.refused += state[1]
        numbers = range(state[0] + 1, numbers.stop)
    return result


def _told(receive: Connection, state: Any, end: float) -> Iterator[tuple[int, str, str]]:
    """What a batch tells until the end, and which case has ended its process or never ends."""
    seen, since = state[0], time.monotonic()
    while time.monotonic() < end:
        try:
            if receive.poll(1):
                if (told := receive.recv()) is None:
                    return
                yield told
        except EOFError:
            yield state[0], "ends the process", ""
            return
        if state[0] != seen:
            seen, since = state[0], time.monotonic()
        elif time.monotonic() - since > STUCK_SECONDS:
            yield state[0], "never ends", ""
            return


def _batch(kinds: list[str], seed: int, numbers: range, state: Any, out: Connection) -> None:
    """Runs cases, up to one that exceeds a limit; tells what is wrong.

    Args:
        kinds: In turn.
        seed: What the cases are drawn with.
        numbers: Of the cases.
        state: Shared; the number of the last case that has begun, and how many were refused.
        out: Takes number, problem and excess of a bad case, and None at the end.
    """
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
    with prepared() as (files, guard):
        for number in numbers:
            state[0] = number
            problem, exceeded, refused = wrong(files, guard, kinds[number % len(kinds)], seed, number)
            state[1] += refused
            if problem or exceeded:
                out.send((number, problem, exceeded))
            if exceeded:
                break
    out.send(None)


def main(
    cases: Annotated[int, typer.Option(help="How many cases.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="What they are drawn with.")] = 0,
    first: Annotated[int, typer.Option(help="Number of the first one.")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help="Which kinds; all by default, in turn.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes at the same time.")] = 1,
    minutes: Annotated[float, typer.Option(help="Stop after that.")] = 1e9,
) -> None:
    """Prints every case that is wrong; exits with 1 if there is any."""
    begun, total = time.monotonic(), Result()
    with prepared() as (files, _):
        kinds = kind or list(files.kinds)

    def batch(start: int) -> Result:
        return run(kinds, seed, range(start, min(start + BATCH, first + cases)), begun + 60 * minutes)

    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(batch, range(first, first + cases, BATCH)):
            if found.cases == 0:  # the time was over
                break
            total.add(found)
            print(f"{total.cases:,} cases, {total.refused:,} refused: {len(total.bad)} wrong", flush=True)
    raise SystemExit(bool(total.bad))


if __name__ == "__main__":
    typer.run(main)
