"""How many kernels a round is on a GPU: there the small models spend much of a round on starting them.

Layers, heads and head sizes are the published ones; all else is small, since it changes no number of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_mtp.decode import sampling
from mlx_mtp.decode.sampling import best_few
from mlx_mtp.models import clustered_head
from mlx_mtp.models.attention import folded_attention
from mlx_mtp.models.clustered_head import ClusteredHead
from mlx_mtp.models.elementwise import add_scaled, geglu, softcap
from mlx_mtp.system.metal import DEFAULTS
from tests.support.dispatches import GEMMA, GREEDY, Round, as_on_a_gpu, compiling, count, kernels_of

BUDGETS = {
    "E2B": (765, 1000), "E4B": (925, 1160), "12B": (865, 1090), "26B-A4B": (1000, 1225), "31B": (1075, 1300),
}  # fmt: skip
"""Most kernels of a plain step, and of a round with 3 drafts, at batch 1 and 4 bits."""


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    with compiling():
        yield


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Round:
    return kernels_of(request.param, monkeypatch)


@pytest.mark.parametrize("kernels, budget", BUDGETS.items(), indirect=["kernels"], ids=BUDGETS)
def test_kernels_of_a_round(kernels: Round, budget: tuple[int, int]):
    plain_most, drafting_most = budget
    assert kernels(GREEDY, 0) <= plain_most and kernels(GREEDY, 3) <= drafting_most
    # Else a buffer would still be read when the next step writes it, and be copied: MLX has ten command buffers in
    # flight and fills another.
    assert kernels(GREEDY, 0) > 11 * int(DEFAULTS["MLX_MAX_OPS_PER_BUFFER"])
    plain, one, two = ([kernels(options, k) for options in (GREEDY, GEMMA)] for k in range(3))
    verify, first, second = (sampled - greedy for greedy, sampled in (plain, one, two))
    assert 0 < verify <= 25 and 0 < first - verify <= 25 and 0 < second - first <= 25, "Gemma's sampling costs more"


@pytest.mark.parametrize("formula, arrays", [(geglu, 2), (add_scaled, 3), (softcap, 2)])
def test_element_wise_formulas_are_one_kernel(
    formula: Callable[..., mx.array], arrays: int, monkeypatch: pytest.MonkeyPatch
):
    as_on_a_gpu(monkeypatch)
    inputs = [mx.ones((4, 8), mx.bfloat16)] * arrays
    mx.eval(inputs)
    assert count(formula(*inputs)) == 1


@pytest.mark.parametrize("batch, heads, kv_heads, length", [(1, 8, 1, 4), (2, 8, 2, 3), (1, 16, 2, 1), (2, 4, 4, 16)])
def test_folded_attention_is_attention(batch: int, heads: int, kv_heads: int, length: int):
    mx.random.seed(1)
    queries = mx.random.normal((batch, heads, length, 32))
    keys, values = mx.random.normal((2, batch, kv_heads, 50, 32))
    visible = mx.random.uniform(shape=(batch, 1, length, 50)) < 0.5
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=visible)
    assert mx.allclose(folded_attention(queries, keys, values, visible), expected, rtol=1e-5, atol=1e-5).item()


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_clustered_head_scores_the_same_on_a_gpu(bits: int | None, monkeypatch: pytest.MonkeyPatch):
    """There in one gathered product, on a CPU from a copy of the chosen rows."""
    head = ClusteredHead(vocab_size=512, hidden_size=64, clusters=32, clusters_read=4)
    mx.random.seed(2)
    head.apply(lambda old: mx.random.normal(old.shape) if mx.issubdtype(old.dtype, mx.floating) else old)
    if bits:
        nn.quantize(head, bits=bits)
    hidden = mx.random.normal((3, 64))
    logits, ids = head(hidden)
    monkeypatch.setattr(clustered_head, "on_gpu", lambda: True)
    gathered, same = head(hidden)
    assert mx.array_equal(ids, same).item() and mx.allclose(logits, gathered, rtol=1e-4, atol=1e-4).item()


@pytest.mark.parametrize("size", [100, 2048, 262_144])
def test_the_best_few_are_sorted_on_a_gpu_and_the_same(size: int, monkeypatch: pytest.MonkeyPatch):
    logits = mx.array(np.random.default_rng(size).permutation(size).astype(np.float32))[None]
    found = best_few(logits, 64)
    assert found.tolist() == np.argsort(np.array(logits), axis=-1)[:, -64:].tolist()
    monkeypatch.setattr(sampling, "on_gpu", lambda: True)
    monkeypatch.setattr(sampling, "_in_block", lambda blocks, place, size: blocks * size + place % size)
    assert best_few(logits, 64).tolist() == found.tolist()
