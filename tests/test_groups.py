"""Rows of unlike lengths in one batch: each costs what it holds (kv/batch.py)."""

from __future__ import annotations

from random import Random
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.decode.request import Request
from mlx_mtp.decode.round import RoundState, decode_round
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.kv import BatchKV, KVBuffers, batch_bytes, kv_bytes
from mlx_mtp.kv import batch as batch_module
from mlx_mtp.kv.batch import in_groups
from mlx_mtp.models import attention
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from mlx_mtp.simulate.known_models import KNOWN_MODELS, known_pair
from tests.support.random_requests import is_plain_text, make_request, run_at_random
from tests.support.tiny_checkpoints import ARCHITECTURES, VOCAB, WINDOW, load_pair, make_pair

Pair = tuple[Target, Drafter]

UNLIKE = [500, 500, 500, 16_000, 500, 500, 500, 500]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, drafter_folder = make_pair(request.param, tmp_path_factory.mktemp(request.param))
    return load_pair(folder, drafter_folder, "float32")


def attention_work(pair: Pair, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Multiplications of a round's attention, from the shapes in its graph, and bytes of KV, for rows of lengths."""
    target, drafter = pair
    rows = [KVBuffers(target.config, 1, target.dtype, positions=length + 8) for length in lengths]
    for row, length in zip(rows, lengths, strict=True):
        row.reserve(length)
    kv = BatchKV()
    order = kv.arrange([(row, 0) for row in rows], [length + 8 for length in lengths])
    kv.reserve([lengths[i] + 8 for i in order])
    work = 0
    attend = mx.fast.scaled_dot_product_attention

    def counted(q: mx.array, k: mx.array, v: mx.array, **how: Any) -> mx.array:
        nonlocal work
        work += q.size * k.shape[2]
        return attend(q, k, v, **how)

    with monkeypatch.context() as patched:
        patched.setattr(attention.mx.fast, "scaled_dot_product_attention", counted)
        count, hidden = len(lengths), target.config.hidden_size
        state = RoundState(mx.array([lengths[i] for i in order]), mx.zeros(count, mx.int32), mx.zeros((count, hidden)))
        decode_round(target, drafter, kv, Sampler([SamplingOptions()] * count), state, 3)
    return work, kv.nbytes


def test_no_row_pays_for_a_longer_one(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    together = attention_work(pair, UNLIKE, monkeypatch)
    each = [attention_work(pair, [length], monkeypatch) for length in UNLIKE]
    for found, parts in zip(together, zip(*each, strict=True), strict=True):
        assert found < 1.3 * sum(parts)
    monkeypatch.setattr(batch_module, "GROUP_SLOTS", 10**9)
    assert attention_work(pair, UNLIKE, monkeypatch)[0] > 2 * together[0], "one group would show it"


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_budget_of_real_sizes(name: str):
    """What a batch may come to is counted as its rows are, and the price of a group is little beside a long row."""
    config = known_pair(name)[0].text
    for lengths in (UNLIKE, [500] * 8, [16_000]):
        assert sum(kv_bytes(config, length, 2) for length in lengths) <= batch_bytes(config, lengths, 2)
    rectangle = len(UNLIKE) * kv_bytes(config, max(UNLIKE), 2)
    assert batch_bytes(config, UNLIKE, 2) < 0.75 * rectangle
    assert batch_bytes(config, [500] * 8, 2) == 8 * kv_bytes(config, 500, 2)


def test_the_budget_covers_every_moment_on_the_way(monkeypatch: pytest.MonkeyPatch):
    config, rng = known_pair("E2B")[0].text, Random(0)
    for _ in range(200):
        final = [rng.randint(1, 30_000) for _ in range(rng.randint(1, 8))]
        now = [rng.randint(1, most) for most in final]
        groups = in_groups([-(-n // 128) * 128 for n in now], batch_module.GROUP_SLOTS)
        held = sum(len(group) * kv_bytes(config, max(now[i] for i in group), 2) for group in groups)
        assert held <= batch_bytes(config, final, 2)


def test_groups():
    assert in_groups([128] * 5, 1) == [[0, 1, 2, 3, 4]]
    assert in_groups([640, 16_384, 640], 4096) == [[0, 2], [1]]
    assert in_groups([640, 1024, 640], 4096) == [[0, 1, 2]], "what a group saves must be worth it"
    assert in_groups([300, 100, 200], 0) == [[1], [2], [0]]


def test_texts_of_rows_in_groups(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Rows join, leave, are cancelled, and outgrow their group."""
    monkeypatch.setattr(batch_module, "GROUP_SLOTS", 1)
    monkeypatch.setattr("mlx_mtp.decode.request.ROOM", 16)
    rng, most = Random(5), [1]
    arrange = BatchKV.arrange
    monkeypatch.setattr(
        BatchKV, "arrange", lambda self, *args: (arrange(self, *args), most.append(len(self.groups)))[0]
    )
    requests = [make_request(rng, VOCAB, WINDOW, 5 * WINDOW) for _ in range(6)]
    requests.append(Request([7] * 150, 80, draft_length=2))
    scheduler = Scheduler(*pair, max_rows=5)
    rows = run_at_random(scheduler, requests, rng)
    assert max(most) > 1
    assert all(is_plain_text(pair[0], row) for row in rows)


def test_rows_that_stay_are_not_copied(pair: Pair):
    """Who joins a group of its own leaves the others' arrays as they are."""
    target, _ = pair
    first, second, third = (KVBuffers(target.config, 1, target.dtype, positions=n) for n in (200, 200, 9000))
    batch = BatchKV()
    batch.arrange([(first, 0), (second, 0)], [200, 200])
    (group,) = batch.groups
    arrays = [id(a) for a in group.arrays()]
    assert batch.arrange([*(batch.find(i) for i in range(2)), (third, 0)], [200, 200, 9000]) == [0, 1, 2]
    assert batch.groups == [group, third] and [id(a) for a in group.arrays()] == arrays
    # The long one leaves again.
    batch.arrange([batch.find(i) for i in range(2)], [200, 200])
    assert batch.groups == [group] and [id(a) for a in group.arrays()] == arrays


def test_joining_holds_no_second_copy(pair: Pair):
    """Two long rows that become a batch: each layer is let go of once it is copied."""
    target, _ = pair
    rows = [KVBuffers(target.config, 1, target.dtype, positions=20_000) for _ in range(2)]
    mx.eval([array for row in rows for array in row.arrays()])
    batch = BatchKV()
    largest = 2 * max(array.nbytes for array in rows[0].arrays())
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    batch.arrange([(row, 0) for row in rows], [20_000] * 2)
    assert mx.get_peak_memory() - before < 1.5 * largest < 0.5 * batch.nbytes
    assert not rows[0].keys


def test_a_short_row_that_joins_a_long_one_goes_before_it(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Its group is the first: rows, buffers and what they decode from change places together."""
    monkeypatch.setattr(batch_module, "GROUP_SLOTS", 1)
    scheduler = Scheduler(*pair, max_rows=2)
    long = scheduler.submit(Request([3 + i for i in range(150)], 8, draft_length=2))
    scheduler.step()
    short = scheduler.submit(Request([5, 6, 7], 8, draft_length=2))
    scheduler.step()
    assert scheduler.engine.rows == [short, long]
    while not (long.done and short.done):
        scheduler.step()
    assert is_plain_text(pair[0], long) and is_plain_text(pair[0], short)
