"""Sizes computed from a configuration are those of the files and of the loaded models (sizes.py)."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_mtp
from mlx_mtp.checkpoint import sizes
from mlx_mtp.checkpoint.description import read_drafter, read_target
from mlx_mtp.checkpoint.load import load_drafter, load_target
from mlx_mtp.checkpoint.quantization import Format
from mlx_mtp.cli.info import describe
from mlx_mtp.errors import MemoryBudgetError
from mlx_mtp.kv import KVBuffers, kv_bytes
from tests.support.tiny_checkpoints import KINDS, make_pair


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_weights_take_what_was_predicted(kind: str, bits: int | None, tmp_path: Path):
    target_folder, drafter_folder = make_pair(kind, tmp_path)
    quantize = Format(bits) if bits else None
    target, drafter = read_target(target_folder, quantize), read_drafter(drafter_folder, quantize)
    for model, predicted in (
        (load_target(target), sizes.of(target)),
        (load_drafter(drafter, target.config, "committed"), sizes.of(drafter)),
    ):
        assert predicted.weights == sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        assert predicted.read_per_token <= predicted.weights
        if not bits:
            floats = sum(a.size for _, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating))
            assert predicted.parameters == floats


def test_a_token_reads_only_the_experts_it_is_sent_to(tmp_path: Path):
    folder, _ = make_pair("26b", tmp_path)
    config, target = read_target(folder).config, load_target(read_target(folder))
    experts = sum(a.nbytes for name, a in tree_flatten(target.parameters()) if ".experts." in name)
    unread = experts * (1 - config.text.experts_per_token / config.text.num_experts)
    predicted = sizes.target_sizes(config.text, 4)
    assert predicted.read_per_token == predicted.weights - round(unread)


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, _ = make_pair("e2b", tmp_path)
    config = read_target(folder).text
    needed = sizes.target_sizes(config, 4).weights
    monkeypatch.setattr(sizes, "memory_for_models", lambda: needed - 1)
    with pytest.raises(MemoryBudgetError, match="--quantize 4"):
        load_target(read_target(folder))
    load_target(read_target(folder, Format(4)))


def test_kv_is_what_the_buffers_take(tmp_path: Path):
    folder, _ = make_pair("e2b", tmp_path)
    config = read_target(folder).text
    for tokens in (10, 300, 2000):
        kv = KVBuffers(config, 1, mx.float32)
        kv.reserve(tokens)
        assert kv_bytes(config, tokens, 4) == kv.nbytes


@pytest.mark.parametrize("kind", ["e2b", "31b"])
def test_the_longest_context_is_the_last_that_fits(kind: str, tmp_path: Path):
    config = read_target(make_pair(kind, tmp_path)[0]).text
    everything = sizes.row_bytes(config, config.max_positions + 1, 4)
    assert sizes.longest_context(config, everything, 4) == config.max_positions
    for memory in (sizes.row_bytes(config, 1000, 4), everything - 1):
        longest = sizes.longest_context(config, memory, 4)
        assert 0 < longest < config.max_positions
        assert sizes.row_bytes(config, longest, 4) <= memory < sizes.row_bytes(config, longest + 1, 4)
    assert sizes.longest_context(config, sizes.row_bytes(config, 1, 4) - 1, 4) == 0
    assert sizes.longest_context(config, -1, 4) == 0


@pytest.mark.parametrize("beside", [0.7e6, 4e6, 10e6])
def test_a_text_as_long_as_info_promises_is_taken(beside: float, monkeypatch: pytest.MonkeyPatch):
    """And none that is longer. `beside` is the memory beside the models: for few tokens, for some, for all."""
    memory = int(describe(None, None, None, None)["machine"]["needed"] + beside)
    monkeypatch.setattr(sizes, "memory_for_models", lambda: memory)
    facts = describe(None, None, None, None)
    longest, context = facts["machine"]["longest_context"], facts["target"]["context"]
    with mlx_mtp.load() as lm:
        lm.stream([5] * (longest - 10), max_tokens=10).close()
        if longest < context:
            with pytest.raises(MemoryBudgetError, match=r"need \d+\.\d\d [kM]B of KV, and there are \d+\.\d\d [kM]B"):
                lm.stream([5] * (longest - 10), max_tokens=11)
        else:
            lm.stream([5] * context, max_tokens=10).close()
