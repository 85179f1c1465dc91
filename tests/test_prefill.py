"""Prompts through the target: what is computed doesn't depend on how they are cut into chunks."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.checkpoint.description import read_target
from mlx_mtp.checkpoint.load import load_target
from mlx_mtp.decode import prefill as prefill_module
from mlx_mtp.decode.prefill import prefill, prefill_block
from mlx_mtp.decode.request import Request
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.kv import LONGEST_VERIFY, KVBuffers, blocks
from mlx_mtp.models.target import Target
from tests.support.tiny_checkpoints import KINDS, VOCAB, WINDOW, make_pair

PROMPT = np.random.default_rng(0).integers(0, VOCAB, 4 * WINDOW + 13).tolist()


@pytest.fixture(scope="module", params=KINDS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder, _ = make_pair(request.param, tmp_path_factory.mktemp(request.param))
    return load_target(read_target(folder))


def in_chunks(target: Target, sizes: list[int]) -> tuple[KVBuffers, mx.array]:
    """The buffers and the last hidden state of PROMPT, cut into chunks of these sizes and of what is left."""
    kv, start = KVBuffers(target.config, 1, target.dtype), 0
    for size in [*sizes, len(PROMPT)]:
        chunk = PROMPT[start : start + size]
        if chunk:
            hidden = prefill_block(target, kv, [chunk], start, [len(chunk) - 1], len(PROMPT))
        start += size
    return kv, hidden


@pytest.mark.parametrize("sizes", [[1] * 5, [WINDOW], [WINDOW - 1, 2, 2 * WINDOW], [7] * 9, [3 * WINDOW + 1]])
def test_chunks_of_any_size_write_the_same(target: Target, sizes: list[int], monkeypatch: pytest.MonkeyPatch):
    """To the bit, where products don't depend on their shape."""
    monkeypatch.setattr(blocks, "QUERIES", 24)
    whole, expected = in_chunks(target, [])
    kv, hidden = in_chunks(target, sizes)
    assert mx.array_equal(hidden, expected)
    for layer in kv.keys:
        assert mx.array_equal(kv.keys[layer], whole.keys[layer])
        assert mx.array_equal(kv.values[layer], whole.values[layer])


def test_a_chunk_is_what_single_steps_are(target: Target):
    """Hidden states of every token, and the next step on the buffers that are left behind."""
    stepwise = KVBuffers(target.config, 1, target.dtype)
    steps = []
    for position, token in enumerate(PROMPT):
        stepwise.reserve(position + 1)
        steps.append(target(mx.array([[token]]), mx.array([position]), stepwise))
        mx.eval(steps[-1], stepwise.arrays())
    kept: list[mx.array] = []
    kv, _ = prefill(target, PROMPT, kept.append)
    difference = mx.abs(mx.concatenate(kept, axis=1) - mx.concatenate(steps, axis=1)).max().item()
    scale = mx.abs(kept[0]).max().item()
    assert difference < 1e-4 * scale
    only_last, hidden = prefill(target, PROMPT)
    assert mx.abs(hidden - steps[-1][:, 0]).max().item() < 1e-4 * scale
    block, length = mx.array([[5, 6, 7]]), mx.array([len(PROMPT)])
    for buffers in (kv, only_last):
        buffers.reserve(len(PROMPT) + 3)
        stepwise.reserve(len(PROMPT) + 3)
        difference = mx.abs(target(block, length, buffers) - target(block, length, stepwise)).max().item()
        assert difference < 1e-4 * scale


def test_rings_have_no_room_for_chunks(target: Target):
    kv, _ = prefill(target, PROMPT)
    for layer, spec in enumerate(target.config.layers):
        if spec.sliding and spec.kv_owner == layer:
            assert kv.keys[layer].shape[2] <= -(-(WINDOW + 1 + LONGEST_VERIFY) // 32) * 32 < len(PROMPT)


def test_chunks_are_shorter_beside_rows_that_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_mtp.decode.scheduler.CHUNK", 64)
    monkeypatch.setattr("mlx_mtp.decode.scheduler.CHUNK_BESIDE", 16)
    target = load_target(read_target(make_pair("e2b", tmp_path)[0]))
    widths: list[int] = []
    call = Target.prefill
    monkeypatch.setattr(Target, "prefill", lambda *args: (widths.append(args[1].shape[1]), call(*args))[1])
    scheduler = Scheduler(target, None)
    first = scheduler.submit(Request(PROMPT, 100))
    while not first.unread:
        scheduler.step()
    assert max(widths) == 64 and sum(widths) == len(PROMPT)
    widths.clear()
    second = scheduler.submit(Request([3, *PROMPT], 2))
    while not second.done:
        scheduler.step()
    assert not first.done
    assert max(widths) == 16 and sum(widths) == len(PROMPT) + 1


def test_only_the_last_token_goes_through_layers_that_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = load_target(read_target(make_pair("e2b", tmp_path)[0]))
    owners = {layer.kv_owner for layer in target.config.layers}
    above = range(max(owners) + 1, len(target.layers))
    assert above
    seen: dict[int, set[int]] = {}
    layer_type = type(target.layers[0])
    call = layer_type.__call__

    def counted(self: object, h: mx.array, *args: object) -> mx.array:
        seen.setdefault(self._index, set()).add(h.shape[1])  # type: ignore[attr-defined]
        return call(self, h, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(layer_type, "__call__", counted)
    monkeypatch.setattr(prefill_module, "CHUNK", 38)
    prefill(target, PROMPT[:76])
    assert seen == {i: {1} if i in above else {38} for i in range(len(target.layers))}
