"""Kernels are checked before they are used: right ones pass, and a wrong one costs no more than time.

Kernels are made wrong here on purpose, and stay wrong: the texts afterwards must be those of right ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp.models import attention, avoided, clustered_head, kernel_checks, moe, self_test
from mlx_mtp.models.avoided import AVOIDED, AttentionShape, GatherShape, ProductShape, Shape
from mlx_mtp.models.self_test import SWITCH, Finding
from tests.support.tiny_checkpoints import KINDS, VOCAB, make_pair

PROMPT = [int(t) for t in np.random.default_rng(1).integers(0, VOCAB, 40)]
TOKENS = 12

Kernel = Callable[..., mx.array]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, in which every model is tested."""
    monkeypatch.setattr(self_test, "_known", {})
    monkeypatch.setenv(SWITCH, "1")
    yield
    AVOIDED.clear()


def load(folder: Path, quantize: int | None = None) -> mlx_mtp.MTPModel:
    return mlx_mtp.load(folder, quantize=quantize, dtype="float32", profile=None)


def findings(lm: mlx_mtp.MTPModel) -> list[Finding]:
    with lm.models() as (target, drafter):
        return self_test.self_test(target, drafter)


def texts(lm: mlx_mtp.MTPModel, *draft_lengths: int) -> list[list[int]]:
    """A greedy text for each of some draft lengths."""
    return [
        lm.generate(PROMPT, max_tokens=TOKENS, temperature=0, draft_length=k, ignore_eos=True).tokens
        for k in draft_lengths
    ]


def untested(folder: Path, bits: int | None, monkeypatch: pytest.MonkeyPatch, k: int = 0) -> list[int]:
    """The text without a self-test: what it should be, or what a spoilt kernel makes of it unless it is found."""
    with monkeypatch.context() as meanwhile:
        meanwhile.setenv(SWITCH, "0")
        return texts(load(folder, bits), k)[0]


def spoil(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Callable[[mx.array, Any, Any], bool]) -> None:
    """Has a kernel return the opposite of what it should wherever `wrong` says so of its arguments."""
    right = getattr(where, name)

    def kernel(*args: Any, **more: Any) -> mx.array:
        return right(*args, **more) * (-1 if wrong(args[0], args, more) else 1)

    monkeypatch.setattr(where, name, kernel)


@pytest.mark.parametrize("kind, bits", [*((kind, 4) for kind in KINDS), ("26b", None)])
def test_right_kernels_pass(kind: str, bits: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    lm = load(make_pair(kind, tmp_path)[0], bits)
    found = findings(lm)
    assert (
        not AVOIDED
        and not caplog.records
        and all(it.wrong is None and it.share < 0.5 and not it.avoided for it in found)
    )
    shapes = {it.shape for it in found}
    layers = {(layer.head_dim, lm.config.text.num_heads // layer.kv_heads) for layer in lm.config.text.layers}
    for head_dim, heads in layers:
        each = {it.tokens for it in shapes if isinstance(it, AttentionShape) and it[:2] == (head_dim, heads)}
        assert each == set(range(1, 10))
    assert {it.slots for it in shapes if isinstance(it, AttentionShape)} == {0, 1024}
    assert {it.rows for it in shapes if isinstance(it, ProductShape)} == (set(range(1, 10)) if bits else set())
    # Clustered heads have some too, on a GPU.
    orders = {it.order for it in shapes if isinstance(it, GatherShape) and it.matrices == lm.config.text.num_experts}
    assert orders == ({"unsorted", "sorted, many"} if kind == "26b" else set())


@pytest.mark.parametrize("switch", ["0", None, "yes"])
def test_it_is_for_metal_unless_asked_for(switch: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if switch is None:
        monkeypatch.delenv(SWITCH)
    else:
        monkeypatch.setenv(SWITCH, switch)
    spoil(monkeypatch, mx.fast, "scaled_dot_product_attention", lambda *_: True)
    load(make_pair("31b", tmp_path)[0])
    on_metal = mx.metal.is_available() and mx.default_device() == mx.gpu
    assert bool(AVOIDED) == (on_metal and switch != "0")


def test_attention_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Half of the slots for single tokens, nothing of the last of 2, zeros for 3, an error for 4, no numbers for 5."""
    folder, _ = make_pair("31b", tmp_path)
    expected = untested(folder, None, monkeypatch)
    right = mx.fast.scaled_dot_product_attention

    def kernel(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array) -> mx.array:
        length = queries.shape[2]
        if length == 4:
            raise RuntimeError("[metal::Device] Too many threads\nin this threadgroup")
        if length == 1:
            mask = mask & (mx.arange(mask.shape[-1]) >= mask.shape[-1] // 2)
        out = right(queries, keys, values, scale=scale, mask=mask)
        spoilt = {2: mx.array([[1.0], [0.0]]), 3: mx.array(0.0), 5: mx.array(mx.nan)}
        return out * spoilt.get(length, mx.array(1.0))

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", kernel)
    assert untested(folder, None, monkeypatch) != expected
    lm = load(folder)
    assert {(type(it), it.tokens) for it in AVOIDED if isinstance(it, AttentionShape)} == {
        (AttentionShape, n) for n in (1, 2, 3, 4, 5)
    }
    assert texts(lm, 0, 1, 2, 3, 4) == [expected] * 5
    said = "\n".join(record.getMessage() for record in caplog.records)
    for words in ("tokens: 3", "heads of 128", "off by 1", "Too many threads in this", "aren't finite numbers"):
        assert words in said
    assert "please report" in said and {record.levelno for record in caplog.records} == {logging.WARNING}
    assert {it.avoided for it in findings(lm) if it.wrong} == {True}


def test_quantised_products_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 3 rows; in a second model too, for which nothing is tested again."""
    folder, _ = make_pair("e4b", tmp_path)
    expected = untested(folder, 4, monkeypatch)
    monkeypatch.setattr(avoided, "OUTPUTS", 100)  # or no table is so large
    spoil(monkeypatch, mx, "quantized_matmul", lambda x, *_: x.size // x.shape[-1] == 3)
    assert untested(folder, 4, monkeypatch, 2) != expected
    lm = load(folder, 4)
    assert {(type(it), getattr(it, "rows", 0)) for it in AVOIDED} == {(ProductShape, 3)}
    assert {it.shape for it in findings(lm) if it.wrong} == AVOIDED
    assert texts(lm, 0, 2) == [expected] * 2
    monkeypatch.setattr(kernel_checks, "_random", None)  # what every new check calls
    assert texts(load(folder, 4), 2) == [expected]


@pytest.mark.parametrize("bits, name", [(4, "gather_qmm"), (None, "gather_mm")])
@pytest.mark.parametrize("in_order", [False, True])
def test_experts_products_that_are_wrong(
    bits: int | None, name: str, in_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sorted for the prompt, unsorted for the text after it."""
    for module in (moe, kernel_checks):
        monkeypatch.setattr(module, "SORT_FROM", 20)  # prompts come in blocks of 16 tokens, each for 2 experts
    folder, _ = make_pair("26b", tmp_path)
    expected = untested(folder, bits, monkeypatch)
    spoil(monkeypatch, mx, name, lambda _, args, more: more["sorted_indices"] is in_order)
    assert untested(folder, bits, monkeypatch) != expected
    lm = load(folder, bits)
    wrong: set[Shape] = {it.shape for it in findings(lm) if it.wrong}
    orders = {"sorted", "sorted, many"} if in_order else {"unsorted"}
    assert wrong == AVOIDED and {getattr(it, "order", None) for it in wrong} == orders
    assert texts(lm, 0, 2) == [expected] * 2


@pytest.mark.parametrize("bits, name", [(4, "gather_qmm"), (None, "gather_mm")])
def test_a_clustered_head_that_is_wrong(
    bits: int | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Such a head is a gathered product on a GPU only."""
    folder, _ = make_pair("e2b", tmp_path)
    expected = load(folder, bits).propose(PROMPT, 5)
    for module in (clustered_head, kernel_checks):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    self_test._known.clear()
    assert any(isinstance(it.shape, GatherShape) for it in findings(load(folder, bits)))
    assert not AVOIDED and not caplog.records
    self_test._known.clear()
    right = getattr(mx, name)
    monkeypatch.setattr(mx, name, lambda *args, **more: -right(*args, **more))
    lm = load(folder, bits)
    assert [type(it) for it in AVOIDED] == [GatherShape]
    assert lm.propose(PROMPT, 5) == expected


def test_when_neither_way_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Then nothing is changed, and a warning says so."""
    spoil(monkeypatch, mx.fast, "scaled_dot_product_attention", lambda q, *_: q.shape[2] == 2)
    spoil(monkeypatch, attention, "folded_attention", lambda *_: True)
    lm = load(make_pair("12b", tmp_path)[0])
    assert not AVOIDED and {it.avoided for it in findings(lm)} == {False}
    assert "texts may be wrong" in caplog.text


def test_a_self_test_that_cannot_be_done_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """It needs a little memory of its own."""
    folder, _ = make_pair("31b", tmp_path)

    def full(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("[malloc] Unable to allocate 8 bytes.")

    monkeypatch.setattr(mx, "dequantize", full)
    lm = load(folder, 8)
    assert not AVOIDED and "self-test" in caplog.text and "Unable to allocate" in caplog.text
    assert lm.config.text.num_heads == 8


def test_many_findings_are_few_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    spoil(monkeypatch, mx.fast, "scaled_dot_product_attention", lambda *_: True)
    load(make_pair("12b", tmp_path)[0])
    assert len(AVOIDED) > 20 and len(caplog.records) <= 11 and f"{len(AVOIDED)} kernels" in caplog.text
