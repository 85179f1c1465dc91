"""Requests with everything drawn at random, and what they must give: for tests and proofs of batches."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import mlx.core as mx

from mlx_mtp.decode.prefill import prefill
from mlx_mtp.decode.request import Request, Row
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.models.target import Target


def make_request(rng: Random, vocab: int, window: int, most: int, **given: Any) -> Request:
    """A request for up to `most` tokens: prompts of one token to five windows, greedy or sampled, any draft length."""
    length = rng.choice([1, 2, rng.randint(3, window), rng.randint(window, 5 * window)])
    sampling = rng.choice([
        SamplingOptions(),
        SamplingOptions(temperature=rng.uniform(0.3, 2), seed=rng.getrandbits(40)),
        SamplingOptions(temperature=1.0, top_k=rng.randint(1, 90), top_p=rng.uniform(0.5, 1), seed=rng.getrandbits(20)),
        SamplingOptions(temperature=0.8, min_p=rng.uniform(0, 0.1), seed=rng.getrandbits(20)),
    ])  # fmt: skip
    options: dict[str, Any] = {
        "prompt": [rng.randrange(vocab) for _ in range(length)],
        "max_tokens": rng.randint(1, most),
        "sampling": sampling,
        "draft_length": rng.choice([0, 1, 3, 7, "auto"]),
        "stop_tokens": frozenset(rng.sample(range(vocab), 3)),
    }
    return Request(**{**options, **given})


def alone(target: Target, request: Request) -> list[int]:
    """The text by plain decoding, without anything that was there before."""
    plain = replace(request, draft_length=0, exactness="fast", prediction=())
    return [token for new in Scheduler(target, None).stream(plain) for token in new]


def first_wrong(target: Target, request: Request, tokens: list[int]) -> int | None:
    """Index of the first token that plain decoding wouldn't have chosen after the prompt and the tokens before it.

    If there is none, the tokens are what `alone` gives: each is right if all before it are. This takes one pass over
    the text in fresh buffers instead of one for every token.
    """
    hidden: list[mx.array] = []
    prefill(target, [*request.prompt, *tokens[:-1]], hidden.append)
    first = len(request.prompt)
    logits = target.raw_logits(mx.concatenate(hidden, axis=1)[:, first - 1 :])
    positions = mx.arange(first, first + len(tokens))[None]
    (choices,) = Sampler([request.sampling], target.config.logit_softcap).target(logits, positions).tolist()
    return next((i for i, token in enumerate(tokens) if token != choices[i]), None)


def is_plain_text(target: Target, row: Row) -> bool:
    """Whether a row's text is the one that its request gets alone, and ends where that ends, or where it was cancelled.

    As `row.tokens == alone(target, row.request)`, and many times quicker.
    """
    *before, last = row.tokens or [-1]
    stops = row.request.stop_tokens
    ended = row.cancelled or len(row.tokens) == row.limit or last in stops
    right = not row.tokens or first_wrong(target, row.request, row.tokens) is None
    return right and ended and len(row.tokens) <= row.limit and stops.isdisjoint(before)


def run_at_random(scheduler: Scheduler, requests: list[Request], rng: Random) -> list[Row]:
    """Lets requests come one by one while others run, and cancels one in five on its way."""
    rows: list[Row] = []
    doomed = {i: rng.randint(0, 9) for i in range(len(requests)) if rng.random() < 0.2}
    while len(rows) < len(requests) or not all(row.done for row in rows):
        if len(rows) < len(requests) and rng.random() < 0.5:
            rows.append(scheduler.submit(requests[len(rows)]))
        for i, row in enumerate(rows):
            if len(row.tokens) >= doomed.get(i, 10**9):
                row.cancel()
        scheduler.step()
    return rows


def differs(row: Row, expected: list[int]) -> bool:
    """Whether a row's text isn't the one its request gets alone; of a cancelled row, the beginning counts."""
    whole = len(row.tokens) == row.limit or (row.tokens and row.tokens[-1] in row.request.stop_tokens)
    return row.tokens != (expected if whole else expected[: len(row.tokens)])
