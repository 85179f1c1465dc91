"""Checks that decoding with a drafter gives the same tokens as plain decoding, whatever is drafted.

For a random tiny pair of every Gemma 4 size and for the embedded pair, generates a text by plain decoding, and again
with the drafter at draft lengths 1 to 8 and "auto", and with drafters that are always right or always wrong; greedily
and sampled with a seed; in float32 and quantised to 4 bits. The window of the tiny pairs, 16 tokens, wraps
hundreds of times.

Then batches: for every number of rows from 1 to 8, requests with random prompts, options and limits come and go, and
each text is compared with that of the same request alone. This runs with the pair's own drafter, and with one that is
right four times out of five, so that the rows of a round accept different numbers of drafts.

Prints a table; exits with 1 if any text differs. With --state, an interrupted run is continued.

Runs on MLX's own BLAS: OpenBLAS uses different kernels for one row and for several, which can change the last bit of a
logit (see mlx_mtp/system/blas.py) and so, rarely, a token.

    python scripts/prove_lossless.py [--pair e2b --pair demo] [--state FILE]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, cast

import mlx.core as mx
import typer

import mlx_mtp
from mlx_mtp.checkpoint.description import read_drafter, read_target
from mlx_mtp.checkpoint.load import load_drafter, load_target
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.checkpoint.quantization import Format
from mlx_mtp.decode.request import Request, Stats
from mlx_mtp.decode.sampling import SamplingOptions
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.measuring.texts import first_difference
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.random_requests import alone, differs, make_request, run_at_random
from tests.support.scripted_drafter import LuckyDrafter, ScriptedDrafter
from tests.support.tiny_checkpoints import KINDS, load_pair, make_pair

SAMPLINGS = {
    "greedy": SamplingOptions(),
    "sampled": SamplingOptions(temperature=1.0, top_k=64, top_p=0.95, min_p=0.01, seed=20),
}
DRAFT_LENGTHS: tuple[int | str, ...] = (*range(1, 9), "auto")
PAIRS = (*KINDS, "demo")


@dataclass(frozen=True)
class Run:
    """A text compared with that of plain decoding.

    Attributes:
        sampling: "greedy" or "sampled".
        drafter: "own", "right" or "wrong".
        draft_length: The option.
        exactness: The option.
        tokens: Number of generated tokens.
        differs_at: Index of the first token that differs; None if all are equal.
        accepted: Accepted drafts per round that drafted, without the bonus token.
        distinct: Number of distinct tokens in the text, to detect a text of one repeated token.
    """

    sampling: str
    drafter: str
    draft_length: int | str
    exactness: str
    tokens: int
    differs_at: int | None
    accepted: float
    distinct: int


def generate(
    target: object, drafter: object, prompt: list[int], tokens: int, sampling: str, length: int | str, exactness: str
) -> tuple[list[int], Stats]:
    """Generates a text, ignoring stop tokens."""
    stats = Stats()
    request = Request(prompt, tokens, SAMPLINGS[sampling], length, exactness)
    return [t for new in Scheduler(target, drafter).stream(request, stats) for t in new], stats  # type: ignore[arg-type]


def compare(
    target_folder: Path,
    drafter_folder: Path,
    prompt: list[int],
    tokens: int,
    quantize: int | None = None,
    samplings: tuple[str, ...] = tuple(SAMPLINGS),
    draft_lengths: tuple[int | str, ...] = DRAFT_LENGTHS,
) -> Iterator[Run]:
    """Compares all kinds of runs of a pair with plain decoding."""
    common = Format(quantize) if quantize else None
    described = read_target(target_folder, common, "float32")
    target = load_target(described)
    own = load_drafter(read_drafter(drafter_folder, common, "float32"), described.config, "committed")
    for sampling in samplings:
        plain, _ = generate(target, None, prompt, tokens, sampling, 0, "fast")
        script = prompt + plain
        right = ScriptedDrafter(script)
        wrong = ScriptedDrafter([(token + 1) % described.text.vocab_size for token in script])
        runs = [("own", own, length, "fast") for length in draft_lengths]
        runs += [
            (who, them, length, "fast") for who, them in (("right", right), ("wrong", wrong)) for length in (4, "auto")
        ]
        runs += [("own", own, 3, exactness) for exactness in ("invariant", "stepwise")]
        for who, drafter, length, exactness in runs:
            text, stats = generate(target, drafter, prompt, tokens, sampling, length, exactness)
            yield Run(
                sampling, who, length, exactness, len(text), first_difference(plain, text), stats.mean_accepted,
                len(set(text)),
            )  # fmt: skip


def demo_pair() -> tuple[Path, Path, list[int]]:
    """The folders of the embedded pair, and a prompt."""
    target, drafter = DEMO / "target", DEMO / "drafter"
    return target, drafter, Tokenizer.from_folder(target).chat([{"role": "user", "content": "Tell me a short story."}])


def random_pair(kind: str, folder: Path) -> tuple[Path, Path, list[int]]:
    """The folders of a new tiny pair, and a prompt longer than the window, so that prefill wraps too."""
    prompt = mx.random.randint(0, 500, (40,), key=mx.random.key(1))
    return *make_pair(kind, folder / kind), cast("list[int]", prompt.tolist())


HEAD_SINGLE = (
    f"{'pair':6}{'weights':9}{'tokens are':11}{'drafter':8}{'drafts':>7} {'exactness':10}{'tokens':>7}{'distinct':>9}"
    f"{'accepted':>9}  texts"
)
HEAD_BATCH = f"{'pair':6}{'rows':>5}{'seed':>5} {'drafter':8}{'texts':>6}{'tokens':>8}{'accepted':>9}  texts"

Table = list[tuple[str, int, bool]]
"""Lines of the table, each with its tokens and whether the texts were equal."""


def prove_single(name: str, folders: list[Path], prompt: list[int], tokens: int, bits: int | None, how: str) -> Table:
    """All comparisons of single rows for a pair, a kind of weights and a kind of sampling."""
    table: Table = []
    weights = f"{bits} bits" if bits else "float32"
    for run in compare(*folders, prompt, tokens, bits, (how,)):
        verdict = "equal" if run.differs_at is None else f"DIFFER from token {run.differs_at}"
        line = (
            f"{name:6}{weights:9}{run.sampling:11}{run.drafter:8}{run.draft_length!s:>7} {run.exactness:10}"
            f"{run.tokens:7}{run.distinct:9}{run.accepted:9.2f}  {verdict}"
        )
        table.append((line, run.tokens, run.differs_at is None))
    return table


def prove_batch(name: str, folders: list[Path], size: int, seed: int) -> Table:
    """Compares a batch of up to `size` rows, in which random requests come and go, with the same requests alone."""
    target, own = load_pair(folders[0], folders[1], "float32")
    rng, text, table = Random(100 * size + seed), target.config, []
    requests = [
        make_request(rng, text.vocab_size, min(text.sliding_window, 64), 350, stop_tokens=frozenset())
        for _ in range(6 + 2 * size)
    ]
    expected = [alone(target, request) for request in requests]
    lucky = LuckyDrafter(target, [[*it.prompt, *its] for it, its in zip(requests, expected, strict=True)], 0.8, rng)
    for who, drafter in (("own", own), ("lucky", lucky)):
        rows = run_at_random(Scheduler(target, drafter, max_rows=size), requests, rng)  # type: ignore[arg-type]
        wrong = sum(map(differs, rows, expected))
        tokens = sum(len(row.tokens) for row in rows)
        drafting = sum(row.stats.rounds - row.stats.draft_lengths.get(0, 0) for row in rows)
        accepted = sum(row.stats.accepted for row in rows) / max(drafting, 1)
        verdict = f"{wrong} DIFFER" if wrong else "equal"
        line = f"{name:6}{size:5}{seed:5} {who:8}{len(rows):6}{tokens:8}{accepted:9.2f}  {verdict}"
        table.append((line, tokens, not wrong))
    return table


class Proof:
    """Runs cases and prints their lines; skips those that the state file has.

    Attributes:
        tokens: Number of tokens compared so far.
        failed: Number of lines that differ.
    """

    def __init__(self, state: Path | None) -> None:
        self.tokens = self.failed = 0
        self._state = state
        self._known: dict[str, Table] = {}
        if state and state.exists():
            self._known = dict(map(json.loads, state.read_text().splitlines()))

    def case(self, name: str, run: Callable[[], Table]) -> None:
        """Runs a case, or takes its result from the state file."""
        name = f"mlx_mtp {mlx_mtp.__version__}, mlx {mx.__version__}, {name}"
        if name not in self._known:
            self._known[name] = run()
            if self._state:
                with self._state.open("a") as file:
                    file.write(json.dumps([name, self._known[name]]) + "\n")
        for line, tokens, equal in self._known[name]:
            print(line, flush=True)
            self.tokens, self.failed = self.tokens + tokens, self.failed + (not equal)


Pairs = dict[str, tuple[list[Path], list[int]]]
"""Folders and prompt of each pair."""


def prove_pairs(proof: Proof, pairs: Pairs, lengths: dict[int | None, int]) -> None:
    """One row: every pair, with texts of these lengths by the bits of the weights (None for float32)."""
    print(HEAD_SINGLE)
    for name, (folders, prompt) in pairs.items():
        for bits, length in lengths.items():
            for how in SAMPLINGS:
                run = partial(prove_single, name, folders, prompt, length, bits, how)
                proof.case(f"{name}, {length} tokens, {bits} bits, {how}", run)


def prove_batches(proof: Proof, pairs: Pairs, batches: int) -> None:
    """Batches of every size: so many of each, for every pair."""
    print(HEAD_BATCH)
    for name, (folders, _) in pairs.items():
        for size in range(1, 9):
            for seed in range(batches):
                proof.case(f"{name}, {size} rows, seed {seed}", partial(prove_batch, name, folders, size, seed))


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of every text in float32; 0 leaves them out.")] = 2000,
    quantized_tokens: Annotated[int, typer.Option(help="Tokens of every text in 4 bits; 0 leaves them out.")] = 300,
    batches: Annotated[int, typer.Option(help="Batches of every size and pair; 0 leaves them out.")] = 1,
    pair: Annotated[list[str] | None, typer.Option(help=f"Which pairs: {', '.join(PAIRS)}. Default: all.")] = None,
    state: Annotated[Path | None, typer.Option(help="File that remembers what has been proved.")] = None,
) -> None:
    """Runs the comparisons and prints their tables."""
    if unknown := set(pair or ()) - set(PAIRS):
        raise typer.BadParameter(f"unknown pair {', '.join(unknown)}: expected some of {', '.join(PAIRS)}")
    print(f"mlx {mx.__version__} on {mx.default_device()}; every text against plain decoding of the same pair, alone")
    proof = Proof(state)
    with tempfile.TemporaryDirectory() as folder:
        pairs: Pairs = {}
        for name in pair or PAIRS:
            *folders, prompt = demo_pair() if name == "demo" else random_pair(name, Path(folder))
            pairs[name] = folders, prompt
        if lengths := {bits: length for bits, length in ((None, tokens), (4, quantized_tokens)) if length}:
            prove_pairs(proof, pairs, lengths)
        if batches:
            prove_batches(proof, pairs, batches)
    verdict = f"{proof.failed} lines differ" if proof.failed else "all texts are equal"
    print(f"{proof.tokens:,} tokens compared; {verdict}")
    if proof.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
