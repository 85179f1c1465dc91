"""From documents to token ids: the chat template, the tokeniser, and which tokens the model is to learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import jinja2
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import tokenizer as tok
from .data import Document, conversations, prose
from .export import TEMPLATE

LONGEST = 768
"""Most tokens of a training text."""

QUESTION_WEIGHT = 0.05
"""Weight of tokens that the model doesn't write itself; what users ask is hardly predictable."""

_template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())


def render(document: Document, prompt: bool = False) -> str:
    """The document as text; with `prompt`, up to where the model is to give its last answer."""
    if not document.messages:
        return "<bos>" + document.text + "<eos>"
    messages = document.messages[:-1] if prompt else document.messages
    return _template.render(messages=messages, enable_thinking=document.thinking, add_generation_prompt=prompt)


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[float]]:
    """Token ids of a document and the weight of each as something to predict."""
    ids = tokenizer.encode(render(document), add_special_tokens=False).ids[:LONGEST]
    return ids, weights_of(tokenizer, ids)


def weights_of(tokenizer: Tokenizer, ids: list[int]) -> list[float]:
    """How much each token counts as something to predict."""
    if tok.TURN not in ids:
        return [1.0] * len(ids)
    model = tokenizer.token_to_id("model")
    weights, answering = [], False
    for i, token in enumerate(ids):
        weights.append(1.0 if answering and ids[i - 2] != tok.TURN else QUESTION_WEIGHT)
        if token == tok.END_TURN:
            answering = False
        elif i and ids[i - 1] == tok.TURN:
            answering = token == model
    if tok.THINK in ids:
        # Earlier thoughts are left out of a conversation: its earlier answers aren't what the model is to say.
        last = len(ids) - 1 - ids[::-1].index(tok.TURN)
        weights[:last] = [min(weight, QUESTION_WEIGHT) for weight in weights[:last]]
    return weights


@dataclass(frozen=True)
class Batch:
    """Texts of similar length.

    Attributes:
        tokens: int64 [B, L], padded with 0 on the right.
        weights: float32 [B, L], 0 for padding and for the first token.
    """

    tokens: Tensor
    weights: Tensor


def stream(tokenizer: Tokenizer, seed: int, batch_tokens: int, drill: bool = False) -> Iterator[Batch]:
    """Endless batches of new conversations, with a share of about 15 % documentation."""
    rng, pages, part = Random(seed), prose(held_out=False), 0
    while True:
        documents = [*conversations(seed * 1_000_003 + part, 1000, drill), *rng.sample(pages, 100)]
        batches = list(batch(tokenizer, documents, batch_tokens))
        rng.shuffle(batches)
        yield from batches
        part += 1


def batch(tokenizer: Tokenizer, documents: list[Document], batch_tokens: int) -> Iterator[Batch]:
    """Puts documents of similar length together."""
    yield from _batches([encode(tokenizer, d) for d in documents], batch_tokens)


def batch_ids(texts: list[list[int]], tokenizer: Tokenizer, batch_tokens: int, seed: int) -> Iterator[Batch]:
    """Endless batches of given texts, in an order that is new each time."""
    batches, rng = list(_batches([(ids, weights_of(tokenizer, ids)) for ids in texts], batch_tokens)), Random(seed)
    while True:
        rng.shuffle(batches)
        yield from batches


def _batches(encoded: list[tuple[list[int], list[float]]], batch_tokens: int) -> Iterator[Batch]:
    rows: list[tuple[list[int], list[float]]] = []
    for ids, weights in sorted(encoded, key=lambda e: len(e[0])):
        if rows and len(ids) * (len(rows) + 1) > batch_tokens:
            yield _pad(rows)
            rows = []
        rows.append((ids, weights))
    if rows:
        yield _pad(rows)


def _pad(rows: list[tuple[list[int], list[float]]]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for i, (ids, w) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        weights[i, 1 : len(ids)] = torch.tensor(w[1:])
    return Batch(tokens, weights)
