"""Measures the exported pair with the package itself, on conversations and pages it wasn't trained on.

    python -m demo_pair.evaluate mlx_mtp/demo      (in scripts/)

Conversations come from the same generator with other seeds: the wording is known, most combinations are new. The pages
are from documentation topics that were left out of the training.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mlx.core as mx
from tokenizers import Tokenizer

from mlx_mtp.checkpoint.description import read_drafter, read_target
from mlx_mtp.checkpoint.load import load_drafter, load_target
from mlx_mtp.decode.prefill import prefill
from mlx_mtp.decode.request import Request, Stats
from mlx_mtp.decode.sampling import SamplingOptions
from mlx_mtp.decode.scheduler import Scheduler

from .config import STOP_TOKENS
from .data import KINDS, Document, conversation, prose
from .text import render

SEED = 987_654_321
DRAFTS = 4
LONGEST = 200
PAGE_START = 64
"""Tokens of a page that are given; the model goes on from there."""


@dataclass(frozen=True)
class Row:
    """Results for one kind of text.

    Attributes:
        kind: Of the text.
        prompts: Number of prompts.
        perplexity: Of the reference answers, per token.
        exact: Share of greedy answers that are the reference, letter by letter; None for pages.
        greedy, sampled: Drafts accepted per round of DRAFTS, at temperature 0 and 1.
    """

    kind: str
    prompts: int
    perplexity: float
    exact: float | None
    greedy: float
    sampled: float


class Pair:
    """The exported pair, loaded in float32.

    Attributes:
        tokenizer: Its tokeniser.
    """

    def __init__(self, folder: Path) -> None:
        described = read_target(folder / "target", dtype="float32")
        self._target = load_target(described)
        own = read_drafter(folder / "drafter", dtype="float32")
        drafter = load_drafter(own, described.config, "committed")
        self._scheduler = Scheduler(self._target, drafter)
        self.tokenizer = Tokenizer.from_file(str(folder / "target" / "tokenizer.json"))

    def answer(self, prompt: list[int], temperature: float = 0.0, seed: int = 0) -> tuple[list[int], Stats]:
        """Generates up to LONGEST tokens; the stop token isn't among them."""
        stats = Stats()
        sampling = SamplingOptions(temperature=temperature, seed=seed)
        request = Request(prompt, LONGEST, sampling=sampling, draft_length=DRAFTS, stop_tokens=frozenset(STOP_TOKENS))
        tokens = [token for part in self._scheduler.stream(request, stats) for token in part]
        return (tokens[:-1] if tokens[-1] in STOP_TOKENS else tokens), stats

    def loss(self, prompt: list[int], answer: list[int]) -> float:
        """Sum of the negative log probabilities of an answer's tokens."""
        hidden: list[mx.array] = []
        prefill(self._target, prompt + answer, keep=hidden.append)
        logits = self._target.logits(mx.concatenate(hidden, axis=1)[0, len(prompt) - 1 : -1])
        chosen = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=1)[:, 0]
        return float((mx.logsumexp(logits, axis=1) - chosen).sum().item())


def evaluate(folder: Path, prompts: int = 8) -> list[Row]:
    """Evaluates the pair in `folder` on `prompts` prompts of each kind."""
    pair, rng = Pair(folder), Random(SEED)
    rows = [_row(pair, kind, [conversation(rng, kind, 1) for _ in range(prompts)]) for kind in KINDS]
    pages = [d for d in prose(held_out=True) if len(pair.tokenizer.encode(d.text).ids) > 2 * PAGE_START]
    return [*rows, _row(pair, "prose", pages[:prompts])]


def _row(pair: Pair, kind: str, documents: list[Document]) -> Row:
    nats, tokens, exact = 0.0, 0, 0
    greedy, sampled = Stats(), Stats()
    for i, document in enumerate(documents):
        prompt, reference = _split(pair.tokenizer, document)
        answer, stats = pair.answer(prompt)
        exact += answer == reference
        nats, tokens = nats + pair.loss(prompt, reference), tokens + len(reference)
        for total, one in ((greedy, stats), (sampled, pair.answer(prompt, 1.0, i)[1])):
            total.rounds, total.accepted = total.rounds + one.rounds, total.accepted + one.accepted
    share = exact / len(documents) if documents[0].messages else None
    means = [total.accepted / max(total.rounds, 1) for total in (greedy, sampled)]
    return Row(kind, len(documents), math.exp(nats / tokens), share, *means)


def _split(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[int]]:
    """Prompt and reference answer."""
    if not document.messages:
        ids = tokenizer.encode(render(document)).ids
        return ids[:PAGE_START], ids[PAGE_START : PAGE_START + LONGEST]
    prompt = tokenizer.encode(render(document, prompt=True)).ids
    return prompt, tokenizer.encode(document.messages[-1]["content"]).ids


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"| text | prompts | perplexity | exact answers | accepted of {DRAFTS}: greedy | sampled |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact = "-" if row.exact is None else f"{row.exact:.0%}"
        numbers = f"{row.perplexity:.2f} | {exact} | {row.greedy:.2f} | {row.sampled:.2f}"
        lines.append(f"| {row.kind} | {row.prompts} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(evaluate(Path(sys.argv[1]))))
