"""KV buffers: which slots a query sees, through wraps, rejected drafts and growth (kv.py)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.config import TextConfig, target_config
from mlx_mtp.kv import CAPACITY_STEP, KVBuffers, kv_bytes
from mlx_mtp.kv.batch import BatchKV
from mlx_mtp.kv.buffers import capacity_for, ring_slots

WINDOW, LONGEST = 8, 6


@pytest.fixture
def config() -> TextConfig:
    return config_with()


def config_with(**fields: object) -> TextConfig:
    """Three layers: sliding, full, and a sliding one without KV of its own."""
    return target_config(
        {
            "model_type": "gemma4_text",
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "intermediate_size": 32,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "global_head_dim": 8,
            "sliding_window": WINDOW,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            **fields,
        }
    ).text


def write(kv: KVBuffers, lengths: list[int], marks: np.ndarray) -> dict[bool, mx.array]:
    """Writes a block whose keys carry `marks` [B, L], as the target would; returns what its queries see."""
    rows, width = marks.shape
    kv.reserve(max(lengths) + width)
    block = kv.block(mx.array(lengths), width)
    for layer, sliding in ((0, True), (1, False)):
        keys = mx.broadcast_to(
            mx.array(marks, dtype=mx.float32)[:, None, :, None], (rows, 1, width, 4 if sliding else 8)
        )
        block[sliding].write(layer, keys, keys)
    return {sliding: block[sliding].views(layer)[0].visible for sliding, layer in kv.source_layers.items()}


def seen(kv: KVBuffers, visible: mx.array, layer: int, row: int, query: int) -> list[int]:
    """Marks that a query sees in a layer, sorted."""
    marks = np.array(kv.read(layer)[0][row, 0, :, 0])[np.array(visible[row, 0, query])]
    return sorted(int(m) for m in marks)


def test_queries_see_their_window_and_nothing_else_whatever_was_rejected(config: TextConfig):
    """Two rows take blocks of random width, of which a random part is kept; junk carries negative marks."""
    rng = np.random.default_rng(0)
    kv = KVBuffers(config, batch=2, dtype=mx.float32, longest_block=LONGEST)
    lengths = [0, 0]
    while max(lengths) < 6 * ring_slots(WINDOW, LONGEST):
        width = int(rng.integers(1, LONGEST + 1))
        kept = rng.integers(1, width + 1, size=2)
        positions = np.array(lengths)[:, None] + np.arange(width)
        marks = np.where(np.arange(width) < kept[:, None], positions, -1 - positions)
        visible = write(kv, lengths, marks)
        for row in range(2):
            for query in range(kept[row]):  # what the queries of rejected drafts see doesn't matter
                at = lengths[row] + query
                assert seen(kv, visible[True], 0, row, query) == list(range(max(0, at - WINDOW + 1), at + 1))
                assert seen(kv, visible[False], 1, row, query) == list(range(at + 1))
        lengths = [n + int(k) for n, k in zip(lengths, kept, strict=True)]
        lent = {kind: views[0].visible for kind, views in kv.shared(mx.array(lengths), WINDOW).items()}
        for row, n in enumerate(lengths):
            assert seen(kv, lent[True], 0, row, 0) == list(range(max(0, n - WINDOW), n))
            assert seen(kv, lent[False], 1, row, 0) == list(range(n))


def test_the_drafter_gets_the_very_arrays(config: TextConfig):
    kv = KVBuffers(config, batch=1, dtype=mx.float32, longest_block=LONGEST)
    for sliding, layer in ((True, 0), (False, 1)):
        (view,) = kv.shared(mx.array([3]), WINDOW)[sliding]
        assert view.keys is kv.keys[layer] and view.values is kv.values[layer]
    assert sorted(kv.keys) == [0, 1], "layers that share KV own none"


@pytest.mark.parametrize("heads, full_heads", [(1, None), (3, None), (4, 2)])
@pytest.mark.parametrize("positions", [1, 100, 1000])
def test_the_bytes_of_buffers_are_known_before_they_are_made(heads: int, full_heads: int | None, positions: int):
    fields = {"num_key_value_heads": heads, "num_attention_heads": 12, "num_global_key_value_heads": full_heads}
    config = config_with(**fields, attention_k_eq_v=full_heads is not None)
    kv = KVBuffers(config, batch=1, dtype=mx.float16)
    kv.reserve(positions)
    assert kv.nbytes == kv_bytes(config, positions, 2)


def test_growth_keeps_what_was_written(config: TextConfig):
    kv = KVBuffers(config, batch=1, dtype=mx.float32, longest_block=LONGEST)
    for start in range(0, 2 * CAPACITY_STEP, 4):
        visible = write(kv, [start], np.arange(start, start + 4)[None])
    assert kv.capacity == 2 * CAPACITY_STEP
    assert seen(kv, visible[False], 1, 0, 3) == list(range(2 * CAPACITY_STEP))
    assert kv.keys[0].shape[2] == ring_slots(WINDOW, LONGEST), "sliding layers stop growing"


def test_a_ring_has_the_window_and_a_block_and_hardly_more():
    """And one position more: in transformers, a drafter sees that before the window."""
    for window in range(1, 70):
        for block in (1, LONGEST, 16):
            slots = ring_slots(window, block)
            assert slots % 32 == 0 and window + 1 + block <= slots < window + 1 + block + 32


def test_a_write_is_in_place(config: TextConfig):
    kv = KVBuffers(config, batch=1, dtype=mx.float32, longest_block=LONGEST)
    kv.reserve(200_000)
    mx.eval(kv.arrays())
    place = kv.block(mx.array([100_000]), 4)[False]
    block = mx.ones((1, 1, 4, 8))
    mx.eval(block)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    place.write(1, block, block)
    mx.eval(kv.keys[1], kv.values[1])
    assert mx.get_peak_memory() - before < kv.keys[1].nbytes / 100


def test_rewinding_is_refused_once_the_window_was_overwritten(config: TextConfig):
    kv = KVBuffers(config, batch=1, dtype=mx.float32, longest_block=LONGEST)
    for start in range(0, 60, 4):
        write(kv, [start], np.arange(start, start + 4)[None])
    shortest = next(n for n in range(1, 61) if kv.can_rewind(n))
    assert shortest > 1
    # In transformers, a drafter sees one position more than the window.
    (lent,) = kv.shared(mx.array([shortest]), WINDOW + 1)[True]
    assert seen(kv, lent.visible, 0, 0, 0) == list(range(shortest - WINDOW - 1, shortest))
    visible = write(kv, [shortest], np.array([[shortest]]))
    at = shortest
    assert seen(kv, visible[True], 0, 0, 0) == list(range(max(0, at - WINDOW + 1), at + 1))
    assert kv.can_rewind(0)


def test_an_unevaluated_write_can_be_forgotten(config: TextConfig):
    kv = KVBuffers(config, batch=1, dtype=mx.float32, longest_block=LONGEST)
    write(kv, [0], np.array([[5, 6]]))
    mx.eval(kv.arrays())
    before = kv.snapshot()
    write(kv, [2], np.array([[7, 8]]))
    kv.restore(before)
    assert np.array(kv.keys[1][0, 0, :4, 0]).tolist() == [5, 6, 0, 0]


@pytest.mark.parametrize("had, wanted", [(3 * CAPACITY_STEP, 10), (10, 3 * CAPACITY_STEP)])
def test_a_batch_takes_the_room_that_its_rows_are_given_not_what_they_had(config: TextConfig, had: int, wanted: int):
    rows = []
    for start in (10, 20):
        rows.append(KVBuffers(config, batch=1, dtype=mx.float32, longest_block=LONGEST))
        rows[-1].reserve(had)
        write(rows[-1], [0], np.arange(start, start + 4)[None])
    batch = BatchKV.of(rows, wanted)
    (group,) = batch.groups
    assert group.capacity == capacity_for(wanted) and group.keys[1].shape == (2, 1, capacity_for(wanted), 8)
    assert batch.fits([wanted, wanted]) and not batch.fits([wanted, capacity_for(wanted) + 1])
    assert [np.array(group.keys[1][row, 0, :4, 0]).tolist() for row in (0, 1)] == [[10, 11, 12, 13], [20, 21, 22, 23]]
