"""Requests with everything drawn at random, and what they must give: for tests and proofs of batches."""

from __future__ import annotations

from random import Random
from typing import Any

from mlx_mtp.decode.request import Request, Row
from mlx_mtp.decode.sampling import SamplingOptions
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
    plain = Request(request.prompt, request.max_tokens, request.sampling, 0, "fast", request.stop_tokens)
    return [token for new in Scheduler(target, None).stream(plain) for token in new]


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
