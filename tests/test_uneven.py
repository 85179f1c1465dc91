"""Rounds whose rows have different draft lengths: the same choices, for the tokens that are verified alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decode.prefill import prefill
from mlx_mtp.decode.round import decode_round, first_state, verify
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.kv import BatchKV
from mlx_mtp.models import attention
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.ragged import RaggedBlock
from mlx_mtp.models.target import Target
from tests.support.tiny_checkpoints import ARCHITECTURES, VOCAB, load_pair, make_pair

COUNTS = [3, 1, 6, 2]
OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=1.0, seed=3),
    SamplingOptions(temperature=0.7, top_k=20, top_p=0.9, seed=4),
    SamplingOptions(),
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Drafter]:
    folder, drafter_folder = make_pair(request.param, tmp_path_factory.mktemp(request.param))
    return load_pair(folder, drafter_folder)


def batch(target: Target, positions: list[int]) -> tuple[BatchKV, mx.array, mx.array]:
    """Rows of these lengths in one batch: buffers, lengths, and the hidden states at their ends."""
    random = np.random.default_rng(0)
    parts = [prefill(target, random.integers(0, VOCAB, length).tolist()) for length in positions]
    kv = BatchKV.of([own for own, _ in parts], max(positions) + 40)
    return kv, mx.array(positions, dtype=mx.int32), mx.concatenate([hidden for _, hidden in parts])


def test_what_a_packing_says():
    ragged = RaggedBlock.of([1, 3])
    line = mx.array([[10, 20, 21, 22]])
    assert ragged.pad(line).tolist() == [[10, 10, 10], [20, 21, 22]]
    assert ragged.flatten(ragged.pad(line)).tolist() == line.tolist()
    assert (ragged.width, ragged.rows) == (3, [0, 1, 1, 1])


@pytest.mark.parametrize("gpu", [False, True], ids=["row by row", "spread, as on a GPU"])
def test_verifying_fewer_tokens_of_some_rows(pair: tuple[Target, Drafter], gpu: bool, monkeypatch: pytest.MonkeyPatch):
    """Before and past the wrap of the window; the next block sees no trace of the places that were left out."""
    if gpu:
        monkeypatch.setattr(attention, "on_gpu", lambda: True)
    target, _ = pair
    sampler = Sampler(OPTIONS, target.config.logit_softcap)
    positions = [5, 60, 17, 131]
    even, lengths, _ = batch(target, positions)
    uneven, _, _ = batch(target, positions)
    for seed in range(3):
        block = mx.random.randint(0, VOCAB, (4, max(COUNTS)), key=mx.random.key(seed)).astype(mx.int32)
        choices, hidden = verify(target, even, sampler, lengths, block)
        few, few_hidden = verify(target, uneven, sampler, lengths, block, counts=COUNTS)
        for row, count in enumerate(COUNTS):
            assert few[row, :count].tolist() == choices[row, :count].tolist()
            assert mx.array_equal(few_hidden[row, :count], hidden[row, :count])
        lengths = lengths + mx.array(COUNTS, dtype=mx.int32)


def test_no_row_keeps_more_than_its_own_drafts(pair: tuple[Target, Drafter]):
    """And the round has the outcome that each row would have alone with its draft length."""
    target, drafter = pair
    positions, each = [20, 33, 40, 26], [4, 0, 2, 7]
    kv, lengths, hidden = batch(target, positions)
    sampler = Sampler(OPTIONS, target.config.logit_softcap)
    state = first_state(target, sampler, hidden, lengths)
    after, report, _ = decode_round(target, drafter, kv, sampler, state, each)
    random = np.random.default_rng(0)
    for row, (options, length) in enumerate(zip(OPTIONS, positions, strict=True)):
        own, hidden = prefill(target, random.integers(0, VOCAB, length).tolist())
        own.reserve(length + 40)
        alone = Sampler([options], target.config.logit_softcap)
        start = first_state(target, alone, hidden, mx.array([length]))
        expected, said, _ = decode_round(target, drafter, own, alone, start, each[row])
        kept = said[0, -1].item()
        assert kept <= each[row] and report[row, -1].item() == kept
        assert report[row, : kept + 1].tolist() == said[0, : kept + 1].tolist()
        assert after.lengths[row].item() == expected.lengths.item()
        assert after.tokens[row].item() == expected.tokens.item()
        assert mx.array_equal(after.hidden[row], expected.hidden[0])
