"""Text under control where it is easily got wrong: rows that come and go, rules that fail, odd grammars and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mlx_mtp.control.penalties import Penalties
from mlx_mtp.control.row import Rules
from mlx_mtp.decode.request import Request
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.random_requests import alone
from tests.support.tiny_checkpoints import load_pair, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Drafter]:
    folder: Path = tmp_path_factory.mktemp("pair")
    return load_pair(*make_pair("12b", folder))


def controlled(target: Target, seed: int, max_tokens: int, **rules: Any) -> Request:
    """A request with penalties, and other rules if they are given."""
    rng, vocab = Random(seed), target.config.vocab_size
    begin = Rules(**{"vocab_size": vocab, "penalties": Penalties(repetition=1.3, frequency=0.5)} | rules).begin
    return Request([rng.randrange(vocab) for _ in range(9)], max_tokens, control=begin)


def run_all(scheduler: Scheduler, requests: Sequence[Request]) -> list[list[int]]:
    rows = [scheduler.submit(request) for request in requests]
    while not all(row.done for row in rows):
        scheduler.step()
    return [row.tokens for row in rows]


@pytest.mark.parametrize("max_rows", [1, 2])
def test_a_row_that_takes_the_place_of_another_begins_with_a_round_of_its_own(
    pair: tuple[Target, Drafter], max_rows: int
):
    """When a batch ends, its next round has begun already: it is nobody's."""
    target, drafter = pair
    requests = [controlled(target, seed, 10 + seed % 2) for seed in range(5)]
    found = run_all(Scheduler(target, drafter, max_rows=max_rows), requests)
    assert found == [alone(target, request) for request in requests]
