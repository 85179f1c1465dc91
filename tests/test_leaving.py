"""What is left when a step fails or is interrupted, and when rows leave or the scheduler closes (decode/)."""

from __future__ import annotations

from random import Random

import pytest

from mlx_mtp.decode import engine as engine_module
from mlx_mtp.decode.request import Request, Row
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.tiny_checkpoints import VOCAB, load_pair, make_pair

Pair = tuple[Target, Drafter]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    target_folder, drafter_folder = make_pair("e2b", tmp_path_factory.mktemp("e2b"))
    return load_pair(target_folder, drafter_folder, "float32")


def words(count: int, seed: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def run(scheduler: Scheduler, *prompts: list[int], tokens: int = 10) -> list[Row]:
    rows = [scheduler.submit(Request(prompt, tokens, draft_length=3)) for prompt in prompts]
    while not all(row.done for row in rows):
        scheduler.step()
    return rows


def test_an_error_ends_what_is_being_prefilled(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_mtp.decode.scheduler.CHUNK_BESIDE", 16)
    scheduler = Scheduler(*pair)
    running = scheduler.submit(Request(words(4, 0), 40))
    scheduler.step()
    coming = scheduler.submit(Request(words(80, 1), 5))
    scheduler.step()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine_module.Engine, "round", fail)
    assert not coming.tokens and not coming.done
    scheduler.step()
    assert running.done and isinstance(running.error, RuntimeError)
    assert not coming.done


def test_rows_that_have_left_are_forgotten(pair: Pair):
    scheduler = Scheduler(*pair)
    run(scheduler, words(20, 0), words(30, 1))
    run(scheduler, words(3, 2))
    scheduler.step()
    assert not scheduler.kv_bytes


def test_closing_ends_those_who_wait_and_frees_all_kv(pair: Pair):
    scheduler = Scheduler(*pair, max_rows=1)
    run(scheduler, words(20, 0))
    rows = [scheduler.submit(Request(words(n, n), 40)) for n in (4, 5)]
    scheduler.step()
    assert scheduler.cache.nbytes and scheduler.kv_bytes
    scheduler.close()
    assert all(row.done for row in rows)
    assert not (scheduler.cache.nbytes or scheduler.kv_bytes or scheduler.engine.kv or scheduler.busy)
