"""Rows of a batch get the text they would get alone, whoever shares the batch (decode/scheduler.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.checkpoint.sizes import row_bytes
from mlx_mtp.decode import engine as engine_module
from mlx_mtp.decode import in_flight
from mlx_mtp.decode.prefill import CHUNK
from mlx_mtp.decode.request import Request, Row
from mlx_mtp.decode.sampling import SamplingOptions
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.decode.waiting import MOST_PASSED
from mlx_mtp.errors import MemoryBudgetError
from mlx_mtp.kv import kv_bytes
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.random_requests import alone, differs, first_wrong, is_plain_text, make_request, run_at_random
from tests.support.scripted_drafter import LuckyDrafter, ScriptedDrafter
from tests.support.tiny_checkpoints import ARCHITECTURES, VOCAB, WINDOW, load_pair, make_pair

Pair = tuple[Target, Drafter]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def e2b(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load("e2b", tmp_path_factory.mktemp("e2b"))


def load(kind: str, folder: Path) -> Pair:
    target_folder, drafter_folder = make_pair(kind, folder)
    return load_pair(target_folder, drafter_folder, "float32")


def draw(rng: Random, **given: Any) -> Request:
    return make_request(rng, VOCAB, WINDOW, 4 * WINDOW, **given)


def run(scheduler: Scheduler, rows: list[Row]) -> None:
    while not all(row.done for row in rows):
        scheduler.step()


def test_what_tells_plain_text(pair: Pair):
    """What many tests rely on: it is right of plain decoding, and of nothing that differs from it."""
    rng = Random(0)
    for _ in range(4):
        request = draw(rng, max_tokens=20, stop_tokens=frozenset())
        tokens = alone(pair[0], request)
        assert first_wrong(pair[0], request, tokens) is None
        for i in (0, 9, 19):
            changed = [*tokens[:i], (tokens[i] + 1) % VOCAB, *tokens[i + 1 :]]
            assert first_wrong(pair[0], request, changed) == i


def test_rows_are_what_they_are_alone(pair: Pair):
    """More requests than rows, so that rows leave and others join while the rest is running."""
    rng = Random(1)
    requests = [draw(rng) for _ in range(10)]
    scheduler = Scheduler(*pair, max_rows=5)
    rows = [scheduler.submit(request) for request in requests]
    run(scheduler, rows)
    for row in rows:
        assert is_plain_text(pair[0], row), row.request
    assert any(row.stats.drafted for row in rows)


@pytest.mark.parametrize("size", range(1, 9))
def test_every_batch_size(e2b: Pair, size: int):
    rng = Random(size)
    requests = [draw(rng, max_tokens=30) for _ in range(size)]
    scheduler = Scheduler(*e2b)
    rows = [scheduler.submit(request) for request in requests]
    run(scheduler, rows)
    assert all(is_plain_text(e2b[0], row) for row in rows)


def test_rows_join_and_are_cancelled_at_any_moment(pair: Pair):
    """With a drafter whose luck differs from row to row and from round to round."""
    target, rng = pair[0], Random(3)
    requests = [draw(rng) for _ in range(10)]
    texts = [alone(target, request) for request in requests]
    drafter = LuckyDrafter(target, [[*it.prompt, *text] for it, text in zip(requests, texts, strict=True)], 0.8, rng)
    rows = run_at_random(Scheduler(target, drafter, max_rows=4), requests, rng)  # type: ignore[arg-type]
    assert len(rows) == 10 and not any(map(differs, rows, texts))
    assert any(row.tokens for row in rows if len(row.tokens) < row.limit)
    assert len({row.stats.mean_accepted for row in rows if row.stats.drafted}) > 4


def test_the_only_running_row_is_cancelled_during_a_step(e2b: Pair, monkeypatch: pytest.MonkeyPatch):
    """By another thread, while the thread that waits for a long prompt runs it."""
    scheduler = Scheduler(*e2b)
    row = scheduler.submit(Request([3] * 4, 200))
    scheduler.step()
    other = scheduler.submit(Request([4] * (5 * WINDOW), 10))
    with monkeypatch.context() as patch:
        update_batch = scheduler.engine.update_batch
        patch.setattr(scheduler.engine, "update_batch", lambda *joining: (update_batch(*joining), row.cancel()))
        scheduler.step()
    run(scheduler, [other])
    assert is_plain_text(e2b[0], other)


def test_large_buffers_are_handed_over_late(e2b: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_flight, "COPY_LIMIT", 0)
    rng = Random(3)
    requests = [draw(rng) for _ in range(10)]
    scheduler = Scheduler(*e2b, max_rows=4)
    rows = [scheduler.submit(request) for request in requests]
    run(scheduler, rows)
    assert all(is_plain_text(e2b[0], row) for row in rows)


def test_each_row_keeps_what_it_earns(e2b: Pair):
    """The drafter is always right for one row and mostly wrong for the others: no row waits for another."""
    target, _ = e2b
    prompts = [[7 + i] * 20 for i in range(4)]
    texts = [alone(e2b[0], Request(prompt, 41)) for prompt in prompts]
    scheduler = Scheduler(target, ScriptedDrafter(prompts[0] + texts[0]))  # type: ignore[arg-type]
    rows = [scheduler.submit(Request(prompt, 41, draft_length=4)) for prompt in prompts]
    run(scheduler, rows)
    assert [row.tokens for row in rows] == texts
    assert rows[0].stats.mean_accepted == 4 and rows[0].stats.rounds == 8
    assert all(row.stats.mean_accepted < 1 and row.stats.rounds > 30 for row in rows[1:])


def test_rows_with_and_without_drafts(e2b: Pair):
    target, _ = e2b
    prompt = [5] * 20
    text = alone(e2b[0], Request(prompt, 40))
    scheduler = Scheduler(target, ScriptedDrafter(prompt + text))  # type: ignore[arg-type]
    rows = [scheduler.submit(Request(prompt, 40, draft_length=k)) for k in (0, 2, 7)]
    run(scheduler, rows)
    assert all(row.tokens == text for row in rows)
    assert [row.stats.mean_accepted for row in rows[:2]] == [0, 2]
    assert [sorted(row.stats.draft_lengths) for row in rows[:2]] == [[0], [2]]
    assert rows[2].stats.rounds < rows[1].stats.rounds < rows[0].stats.rounds


def test_running_rows_wait_for_one_chunk_at_most(e2b: Pair):
    scheduler = Scheduler(*e2b)
    first = scheduler.submit(Request([3] * 4, 200, draft_length=0))
    scheduler.step()
    scheduler.submit(Request([4] * (20 * WINDOW), 10))
    while scheduler._prefill or scheduler._waiting:
        before = len(first.tokens)
        scheduler.step()
        assert len(first.tokens) == before + 1


def test_the_order_of_requests_is_kept(e2b: Pair):
    scheduler = Scheduler(*e2b, max_rows=2)
    rows = [scheduler.submit(Request([i] * (3 if i % 2 else 5 * WINDOW), 10)) for i in range(8)]
    begun: list[int] = []
    while not all(row.done for row in rows):
        scheduler.step()
        begun += [i for i, row in enumerate(rows) if row.tokens and i not in begun]
    assert begun == sorted(begun)


def test_a_row_whose_reader_has_caught_up_waits_for_a_place(e2b: Pair):
    scheduler = Scheduler(*e2b, max_rows=1)
    rows = [scheduler.submit(Request([i, 5, 6], 30, draft_length=2)) for i in (1, 2)]
    while not rows[0].tokens:
        scheduler.step()
    rows[0].paused = True
    while not rows[1].tokens:
        scheduler.step()
    rows[0].paused = False
    while not all(row.done for row in rows):
        scheduler.step()
        assert len(scheduler.engine.rows) <= 1
        assert rows[1].done or len(rows[0].tokens) < 30
    assert all(is_plain_text(e2b[0], row) for row in rows)


def test_equal_prompts_are_prefilled_once(e2b: Pair, monkeypatch: pytest.MonkeyPatch):
    target, drafter = e2b
    blocks = []
    call = Target.prefill
    monkeypatch.setattr(Target, "prefill", lambda *args: (blocks.append(args[1].shape), call(*args))[1])
    scheduler = Scheduler(target, drafter)
    prompt = [9] * (WINDOW // 2)
    options = [SamplingOptions(temperature=1.0, seed=seed) for seed in range(4)]
    rows = [scheduler.submit(Request(prompt, 20, sampling, 2)) for sampling in options]
    run(scheduler, rows)
    assert sum(b * width for b, width in blocks) == len(prompt)
    assert all(is_plain_text(e2b[0], row) for row in rows)
    assert len({tuple(row.tokens) for row in rows}) == 4


def test_a_first_block_of_many_prompts_is_bounded(e2b: Pair, monkeypatch: pytest.MonkeyPatch):
    """A block's activations are memory that the budget doesn't count."""
    target, drafter = e2b
    widest = []
    call = Target.prefill
    monkeypatch.setattr(Target, "prefill", lambda *args: widest.append(args[1].size) or call(*args))
    scheduler = Scheduler(target, drafter, max_rows=200)
    rows = [scheduler.submit(Request([i + 3] * 12, 6, draft_length=2)) for i in range(200)]
    run(scheduler, rows)
    assert max(widest) <= CHUNK < 200 * 12
    assert all(is_plain_text(target, row) for row in rows[::9])


@pytest.mark.parametrize("exactness", ["invariant", "stepwise"])
def test_exact_requests_run_alone(e2b: Pair, exactness: str):
    scheduler = Scheduler(*e2b)
    rows = [scheduler.submit(Request([i] * 6, 20, exactness=e, draft_length=3))
            for i, e in enumerate(("fast", exactness, "fast", exactness))]  # fmt: skip
    sizes: dict[str, set[int]] = {"fast": set(), exactness: set()}
    while not all(row.done for row in rows):
        scheduler.step()
        running = scheduler.engine.rows
        sizes[running[0].request.exactness].add(len(running))
    assert sizes[exactness] == {1}
    assert all(is_plain_text(e2b[0], row) for row in rows)


def test_the_budget_admits_what_fits(e2b: Pair):
    target, drafter = e2b
    one = kv_bytes(target.config, 100, 4)
    scheduler = Scheduler(target, drafter, kv_budget=2 * one)
    rows = [scheduler.submit(Request([i] * 10, 50)) for i in range(5)]
    most = 0
    while not all(row.done for row in rows):
        scheduler.step()
        most = max(most, len(scheduler.engine.rows))
    assert most == 2
    assert all(is_plain_text(e2b[0], row) for row in rows)
    with pytest.raises(MemoryBudgetError, match="need .* of KV"):
        Scheduler(target, drafter, kv_budget=one - 1).submit(Request([1], 50))


def test_a_request_may_take_the_whole_budget(e2b: Pair):
    scheduler = Scheduler(*e2b, kv_budget=row_bytes(e2b[0].config, 60, 4))
    row = scheduler.submit(Request([5] * 10, 50))
    run(scheduler, [row])
    assert len(row.tokens) == 50


def test_the_budget_holds_for_rows_near_their_end(e2b: Pair):
    """They needn't be drafted for any more, but get as many drafts as the others."""
    budget = 4 * row_bytes(e2b[0].config, 200, 4)
    scheduler = Scheduler(*e2b, kv_budget=budget, cache_bytes=0)
    rows = [scheduler.submit(Request([i] * (205 if i % 3 else 70), 35, draft_length=15)) for i in range(6)]
    while not all(row.done for row in rows):
        scheduler.step()
        assert not scheduler.engine.kv or scheduler.engine.kv.nbytes <= budget


def test_growing_holds_no_second_copy(e2b: Pair):
    """While a batch regroups, no more than one of its arrays exists twice."""
    target, _ = e2b
    scheduler = Scheduler(target, None, cache_bytes=0)
    rows = [scheduler.submit(Request([i] * 4, 2000)) for i in range(4)]
    for _ in range(2):
        scheduler.step()
    engine = scheduler.engine
    kv = engine.kv
    assert kv is not None
    for grow in (
        lambda: kv.reserve([40_000] * 4),
        lambda: kv.arrange([kv.find(i) for i in range(3)], [40_000] * 3),
    ):
        mx.eval(kv.arrays())
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        grow()
        largest = max(a.nbytes for a in kv.arrays())
        assert mx.get_peak_memory() - max(before, mx.get_active_memory()) < 1.5 * largest
        assert kv.nbytes > 10 * largest / 4
    for row in rows:
        row.cancel()


def test_one_host_read_a_round(e2b: Pair, monkeypatch: pytest.MonkeyPatch):
    """Counted at the two ways in which the package gets values from the device."""
    scheduler = Scheduler(*e2b)
    rows = [scheduler.submit(Request([i] * 6, 60, draft_length=3, sampling=SamplingOptions(1.0))) for i in range(4)]
    scheduler.step()
    scheduler.step()
    events: list[str] = []

    def count(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: events.append(name) or call(*args, **options)

    monkeypatch.setattr(engine_module, "_host", count("read", engine_module._host))
    monkeypatch.setattr(mx, "eval", count("eval", mx.eval))
    monkeypatch.setattr(mx, "async_eval", count("submit", mx.async_eval))
    for _ in range(10):
        scheduler.step()
    assert events == ["submit", "read"] * 10
    for row in rows:
        row.cancel()


def test_an_error_ends_what_runs_and_nothing_else(e2b: Pair, monkeypatch: pytest.MonkeyPatch):
    scheduler = Scheduler(*e2b, max_rows=2)
    rows = [scheduler.submit(Request([i] * 6, 40)) for i in range(3)]
    scheduler.step()
    scheduler.step()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module.Engine, "round", fail)
        scheduler.step()
    assert [bool(row.error) for row in rows] == [True, True, False]
    run(scheduler, rows)
    assert is_plain_text(e2b[0], rows[2])


def test_fast_requests_pass_one_that_waits_for_an_empty_batch(e2b: Pair):
    """A few of them: then the batch runs empty, and it has its turn."""
    scheduler = Scheduler(*e2b, max_rows=4)
    running = [scheduler.submit(Request([i + 3] * 6, 30, draft_length=0)) for i in range(2)]
    scheduler.step()
    exact = scheduler.submit(Request([9] * 6, 4, exactness="invariant", draft_length=2))
    later = [scheduler.submit(Request([i + 20] * 6, 8, draft_length=0)) for i in range(MOST_PASSED + 6)]
    while not exact.tokens:
        scheduler.step()
    assert all(row.done for row in running)
    assert [bool(row.tokens) for row in later] == [True] * MOST_PASSED + [False] * 6
    run(scheduler, [exact, *later])
    assert all(is_plain_text(e2b[0], row) for row in later)


def test_what_waits_for_room_is_passed_by_what_fits(e2b: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_mtp.kv.batch.GROUP_SLOTS", 64)
    target, drafter = e2b
    config = target.config
    budget = row_bytes(config, 3000, 4) + row_bytes(config, 300, 4)
    scheduler = Scheduler(target, drafter, kv_budget=budget)
    long = scheduler.submit(Request([5] * 2000, 900, draft_length=0))
    while not long.tokens:
        scheduler.step()
    large = scheduler.submit(Request([6] * 2000, 900, draft_length=0))
    small = scheduler.submit(Request([7] * 20, 5, draft_length=0))
    run(scheduler, [small])
    assert not large.tokens and not long.done
    long.cancel()
    large.cancel()
